"""Training state on disk: one safetensors file, replaced atomically, read without pickle.

Everything that a resumed run needs is in ``training_state/state.safetensors``: tensors by name, and
the rest as JSON in the file's metadata. One file means that one rename makes the new state the
current one; until then the previous state is untouched, whatever happens to the disk.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from cmpolicy.files import WriteError, write_atomically

FORMAT_VERSION = 2  # 1 counted "samples"
FOLDER = "training_state"
FILE = "state.safetensors"


class CheckpointError(OSError):
    """A training state that cannot be written or read; the message says which and why."""

    exit_status = 1


@dataclass(frozen=True)
class TrainingState:
    """Tensors by name, and numbers that JSON can hold exactly (counters, schedules, settings)."""

    tensors: dict[str, Tensor]
    values: dict[str, Any]


def state_path(run_dir: Path) -> Path:
    """Where a run keeps its training state."""
    return run_dir / FOLDER / FILE


def save_state(run_dir: Path, state: TrainingState) -> Path:
    """Write the state of a run; the previous one stays until the new one is complete.

    Raises:
        CheckpointError: the disk is full or not writable; the previous state is intact.
    """
    target = state_path(run_dir)
    values = {"format_version": FORMAT_VERSION, **state.values}
    tensors = {n: tensor.detach().cpu().contiguous() for n, tensor in state.tensors.items()}
    text = json.dumps(values, allow_nan=False)
    data = safetensors.torch.save(tensors, {"values": text, "digest": _digest(tensors, text)})
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        for part in target.parent.glob(f".{FILE}.*"):  # of a run that was killed as it saved
            part.unlink(missing_ok=True)
        write_atomically(target, data)
    except WriteError as error:
        previous = "the previous one is intact" if target.is_file() else "there is no older one"
        raise CheckpointError(f"{error}; {previous}") from error
    return target


def load_state(run_dir: Path) -> TrainingState:
    """Read the state of a run, tensors on the CPU.

    Raises:
        CheckpointError: there is none, it is damaged, or a newer cmpolicy wrote it.
    """
    path = state_path(run_dir)
    if not path.is_file():
        raise CheckpointError(
            f"{run_dir} holds no training state ({path} is missing); resume=... takes the folder "
            "of a run, such as outputs/<run>"
        )
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            values = json.loads(metadata["values"])
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, KeyError, ValueError, OSError) as error:
        raise CheckpointError(
            f"training state {path} is damaged or not one of cmpolicy's: {error}"
        ) from error
    # required: a damaged name of the entry would otherwise hide what it is there to show
    if metadata.get("digest") != _digest(tensors, metadata["values"]):
        raise CheckpointError(
            f"training state {path} is damaged: its checksum is not that of its content. The "
            f"policies in {run_dir} are files of their own; go on from one of them with init=..."
        )
    version = values.pop("format_version", None)
    if version != FORMAT_VERSION:
        raise CheckpointError(
            f"training state {path} has format version {version}, this cmpolicy reads "
            f"{FORMAT_VERSION}; use the version that wrote it"
        )
    return TrainingState(tensors, values)


def select(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """The tensors under ``prefix/``, without it."""
    return {name[len(prefix) + 1 :]: t for name, t in tensors.items() if _under(name, prefix)}


def _under(name: str, prefix: str) -> bool:
    return name.startswith(f"{prefix}/")


def _digest(tensors: Mapping[str, Tensor], text: str) -> str:
    """Of all that a state holds: a flipped bit would train on to other results."""
    digest = hashlib.blake2b(text.encode(), digest_size=16)
    for name in sorted(tensors):
        tensor = tensors[name]
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()
