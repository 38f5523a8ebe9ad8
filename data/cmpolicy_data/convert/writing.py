"""Writing a converted store: beside its place, and only when it is complete into it."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from cmpolicy_data.chunks import ReplayBufferError
from cmpolicy_data.convert.scenes import write_scenes
from cmpolicy_data.pack import pack
from cmpolicy_data.parts import Parts
from cmpolicy_data.replay_buffer import ReplayBuffer

CONVERTER = "converter"
"""Attribute of the stores that a converter wrote: its name."""
_SYNCS = 16


class Episode(Protocol):
    """What goes into a store of one demonstration."""

    @property
    def model(self) -> str | None:
        """MuJoCo XML of the scene, None if there is none."""

    def arrays(self) -> Mapping[str, npt.NDArray[Any] | Parts]:
        """Key -> rows as they are stored."""


@dataclass(frozen=True)
class ConvertedEpisode:
    """What goes into a store of one demonstration of L steps.

    Attributes:
        obs: key -> (L, ...). action: (L, A).
        state: (L, S) flattened simulator states, None if there are none.
        model: MuJoCo XML of the scene, None if there is none.
    """

    obs: Mapping[str, npt.NDArray[Any]]
    action: npt.NDArray[Any]
    state: npt.NDArray[np.float64] | None
    model: str | None

    def arrays(self) -> dict[str, npt.NDArray[Any]]:
        """Arrays as they are stored: float32, but states float64 and images as they are."""
        arrays = {key: _stored(value) for key, value in self.obs.items()}
        arrays["action"] = self.action.astype(np.float32)
        if self.state is not None:
            arrays["state"] = self.state
        return arrays


def check_target(out: Path) -> None:
    """Refuse to write over anything but a store that a converter wrote and nobody appended to.

    Raises:
        FileExistsError: something else is there. FileNotFoundError: its folder is not.
        ValueError: a name that is no store's.
    """
    if out.suffix not in (".zarr", ".zip"):
        raise ValueError(
            f"out={out} must be the path of a store, ending in .zarr (a folder) or .zip (packed)."
        )
    if not out.parent.is_dir():
        raise FileNotFoundError(f"{out.parent} is not a folder. Create it first.")
    if out.exists() and not _is_converted(out):
        raise FileExistsError(
            f"{out} exists, and it is not known that `cmpolicy data convert` or `edit` (of this "
            "version) wrote all of it: what is in it might be lost. Choose another path, or remove "
            "it."
        )


def write_store(
    out: Path,
    converter: str,
    episodes: Iterable[Episode],
    attrs: Mapping[str, Any] | Callable[[], Mapping[str, Any]],
) -> int:
    """Write the episodes, one at a time, as the store ``out``; returns the number of steps.

    It appears whole or not at all; a store that was there stays until then. ``attrs`` may be a
    function, asked after the last episode.

    Raises:
        FileExistsError, FileNotFoundError, ValueError: see `check_target`.
        ReplayBufferError: episodes that do not fit together.
    """
    check_target(out)
    scratch = Path(tempfile.mkdtemp(prefix=f".{out.name}.", dir=out.parent))
    try:
        new = scratch / "store.zarr"
        buffer = ReplayBuffer.create(new)
        models = []
        for episode in episodes:
            buffer.append_episode(episode.arrays())
            models.append(episode.model)
        buffer.update_attrs({**(attrs() if callable(attrs) else attrs), CONVERTER: converter})
        buffer.mark_converted()
        scenes = [model for model in models if model is not None]
        if scenes and len(scenes) == len(models):
            write_scenes(new, scenes)
        steps = buffer.n_steps
        if out.suffix == ".zip":
            pack(new, out)
        else:
            put_in_place(new, out, aside=scratch / "old")
    finally:
        # Should even putting back the old store have failed, it must not go with the scratch.
        if out.exists() or not (scratch / "old").exists():
            shutil.rmtree(scratch, ignore_errors=True)
    return steps


def _stored(value: npt.NDArray[Any]) -> npt.NDArray[Any]:
    return value.astype(np.float32) if value.dtype.kind == "f" else value


def _is_converted(path: Path) -> bool:
    try:
        return ReplayBuffer.open(path).is_converted
    except (ReplayBufferError, OSError):
        return False


def put_in_place(new: Path, target: Path, aside: Path) -> None:
    """Put ``new``, on disk, in the place of ``target``, which comes back should that fail."""
    _sync(new)
    replaced = target.exists()
    if replaced:
        target.rename(aside)
    try:
        new.rename(target)
    except BaseException:
        if replaced:
            aside.rename(target)
        raise
    _sync_folder(target.parent)


def _sync(folder: Path) -> None:
    """Put every file on the disk, many at a time: a disk takes them together."""

    def sync(path: Path) -> None:
        with path.open("rb") as file:
            os.fsync(file.fileno())

    with ThreadPoolExecutor(_SYNCS) as pool:
        list(pool.map(sync, (path for path in folder.rglob("*") if path.is_file())))


def _sync_folder(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
