"""Training state on disk: one safetensors file, replaced atomically, read without pickle.

Everything that a resumed run needs is in ``training_state/state.safetensors``: tensors by name, and
the rest as JSON in the file's metadata. One file means that one rename makes the new state the
current one; until then the previous state is untouched, whatever happens to the disk.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

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
    temporary = target.with_name(f"{FILE}.tmp")
    values = {"format_version": FORMAT_VERSION, **state.values}
    data = safetensors.torch.save(
        {name: tensor.detach().contiguous() for name, tensor in state.tensors.items()},
        metadata={"values": json.dumps(values, allow_nan=False)},
    )
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with temporary.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(target)
        _sync_folder(target.parent)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise CheckpointError(_full_message(target, len(data), error)) from error
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
            values = json.loads((file.metadata() or {})["values"])
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, KeyError, ValueError, OSError) as error:
        raise CheckpointError(
            f"training state {path} is damaged or not one of cmpolicy's: {error}"
        ) from error
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


def _sync_folder(folder: Path) -> None:
    """Make a rename durable (POSIX: the folder's own entry must reach the disk)."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _full_message(target: Path, needed: int, error: OSError) -> str:
    previous = "the previous one is intact" if target.is_file() else "there was no previous one"
    folder = next(p for p in target.parents if p.exists())
    free = shutil.disk_usage(folder).free
    return (
        f"could not write the training state {target}: {error.strerror or error}; it needs "
        f"{needed / 1e6:.1f} MB, {folder} has {free / 1e6:.1f} MB free; {previous}. Free some "
        f"space, then go on with resume={target.parent.parent}"
    )
