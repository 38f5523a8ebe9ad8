"""Camera frames of a store, (N, H, W, 3) uint8: in memory, or mapped from a file if they are many.

A key is read as frames if each step has the shape (H, W, 3) and holds whole numbers in [0, 255]:
uint8, as cmpolicy and LeRobot write them, or float32, as in Diffusion Policy's Push-T store; or if
it is uint8 of the shape (3, H, W). Frames of Push-T that a store lacks are rendered:
:mod:`cmpolicy_data.convert.pusht_frames`.
"""

from __future__ import annotations

import hashlib
import os
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from tqdm import tqdm

from cmpolicy_data.catalog import cache_dir
from cmpolicy_data.chunks import Array, ReplayBufferError, blocks, read_rows
from cmpolicy_data.replay_buffer import ReplayBuffer

Frames = npt.NDArray[np.uint8]

#: Frames smaller than this are no images: (2, 3, 3) is a pair of matrices.
_LEAST_SIZE = 8
#: Smaller numbers in one or four channels may be those of a tactile sensor.
_LEAST_CAMERA = 32
_NO_IMAGES = ". If these are no images, say data.obs.<name>={key: ..., kind: state}"
_GIB = 2**30
_ROWS = 256  # frames that are copied at once


def looks_like_frames(array: Array) -> bool:
    """Whether the steps of an array have the shape (H, W, 3) of an image, or are channels first."""
    shape = array.shape[1:]
    whole = len(shape) == 3 and shape[2] == 3 and min(shape[:2]) >= _LEAST_SIZE
    return whole or channels_first(array)


def channels_first(array: Array) -> bool:
    """Whether the steps of an array are uint8 and have the shape (3, H, W) of an image."""
    return shaped_channels_first(array.shape[1:]) and array.dtype == np.uint8


def shaped_channels_first(shape: tuple[int, ...]) -> bool:
    """Whether steps have the shape (3, H, W) of an image, whatever their numbers are."""
    return len(shape) == 3 and shape[0] == 3 and min(shape[1:]) >= _LEAST_SIZE


def channels_first_message(key: str, stored: str) -> str:
    """What is said of a key, ``stored`` in the store, that has this shape and is no uint8."""
    return (
        "has the shape of camera frames, channels first, and its numbers are not uint8, so it is "
        f"read as plain numbers; say data.obs.{key}={{key: {stored}, layout: chw}} (whole numbers "
        "in [0, 255]), or kind: state if these are no images"
    )


def looks_grey_or_four(array: Array) -> bool:
    """Whether the steps of an array look like a camera's frames, but not in three channels."""
    shape = array.shape[1:]
    sides = shape[:2] if len(shape) == 3 and shape[2] in (1, 4) else shape
    return array.dtype == np.uint8 and len(sides) == 2 and min(sides) >= _LEAST_CAMERA


def load_frames(
    buffer: ReplayBuffer,
    key: str,
    *,
    layout: str | None = None,
    memory: float,
    rows: npt.NDArray[np.int64] | None = None,
) -> Frames:
    """The frames of a key; chunks without any that are asked for are not read.

    Args:
        buffer: the store.
        key: of the store, with one image per step.
        rows: increasing numbers of the N steps that are wanted; None: of all.
        layout: ``hwc``, or ``chw`` for channels first; None: what the shape tells.
        memory: GiB up to which frames are kept in memory; more go into a file of the cache once.

    Returns:
        (N, H, W, 3) uint8, read-only where it is mapped from a file.

    Raises:
        ReplayBufferError: no such key, grey or four-channel frames, numbers that are not grey
            levels, or a chunk that is missing or damaged; names episode and step.
    """
    buffer.check(key)
    array = buffer[key]
    layout = layout or ("chw" if channels_first(array) else "hwc")
    shape = _frame_shape(array, layout, f"{buffer.path}: data/{key}")

    # With the number of steps: an episode may have been appended since the store was opened.
    name = f"{buffer.path.resolve()} {key} {layout} {buffer.n_steps} {_state_of(buffer.path)}"
    if rows is None:
        rows = np.arange(buffer.n_steps)
    else:
        name += f" {hashlib.blake2b(rows.tobytes(), digest_size=16).hexdigest()}"

    chunk = (array.shards or array.chunks)[0]

    def parts() -> Iterator[tuple[int, Frames]]:
        done = 0
        for block in blocks(array):
            first, last = np.searchsorted(rows, block)
            wanted = rows[first:last]
            gaps = np.flatnonzero(np.diff(wanted // chunk) > 1) + 1  # chunks that none is in
            for steps in np.split(wanted, gaps) if wanted.size else ():
                start = int(steps[0])
                found = read_rows(array, start, int(steps[-1]) + 1, buffer.path)[steps - start]
                found = np.moveaxis(found, 1, -1) if layout == "chw" else found
                yield done, as_levels(found, buffer, key, steps)
                done += len(steps)

    return gather_frames(parts, (len(rows), *shape), name, memory, f"reading {key}")


def _frame_shape(array: Array, layout: str, what: str) -> tuple[int, int, int]:
    """(H, W, 3) of an array's frames."""
    shape = array.shape[1:]
    if len(shape) == 2:
        raise ReplayBufferError(
            f"{what} holds grey frames {shape}; store RGB: np.repeat(frames[..., None], 3, -1)"
            f"{_NO_IMAGES}"
        )
    if len(shape) != 3:
        raise ReplayBufferError(f"{what} has shape {shape} per step, an image is (H, W, 3)")
    channels, first = (shape[0], "chw") if layout == "chw" else (shape[2], "hwc")
    if channels != 3:
        other = shape[2] if layout == "chw" else shape[0]
        if other == 3:
            wanted = "hwc" if layout == "chw" else "chw"
            hint = f"they are {wanted}: say so, data.obs.<name>={{key: ..., layout: {wanted}}}"
        elif channels == 4:
            hint = f"drop alpha: store frames[..., :3]{_NO_IMAGES}"
        elif channels == 1:
            hint = f"they are grey; store RGB: np.repeat(frames, 3, -1){_NO_IMAGES}"
        else:
            hint = "store RGB frames"
        raise ReplayBufferError(f"{what} has {channels} channels as {first}, {shape}; {hint}")
    height, width = (shape[1], shape[2]) if layout == "chw" else (shape[0], shape[1])
    return height, width, 3


def starts_as_levels(buffer: ReplayBuffer, key: str) -> bool:
    """Whether the first step holds levels; a later one that does not is an error of the store."""
    array = buffer[key]
    if array.dtype == np.uint8 or not array.shape[0]:
        return True
    first = read_rows(array, 0, 1, buffer.path)
    return bool(np.all((first >= 0) & (first <= 255) & (first == np.floor(first))))


def as_levels(
    rows: npt.NDArray[Any], buffer: ReplayBuffer, key: str, steps: npt.NDArray[np.int64] | range
) -> Frames:
    """Rows of frames as uint8; ``steps`` are their numbers in the store."""
    if rows.dtype == np.uint8:
        return rows
    levels = np.nan_to_num(rows, nan=-1.0).clip(0, 255).astype(np.uint8)
    bad = np.flatnonzero((levels != rows).reshape(len(rows), -1).any(axis=1))
    if bad.size:
        step = int(steps[bad[0]])
        episode = int(np.searchsorted(buffer.episode_ends, step, side="right"))
        within = step - (int(buffer.episode_ends[episode - 1]) if episode else 0)
        low, high = float(rows[bad[0]].min()), float(rows[bad[0]].max())
        hint = "; multiply by 255, round, and store uint8" if low >= 0 and high <= 1 else ""
        raise ReplayBufferError(
            f"{buffer.path}: data/{key} holds numbers that are not whole or not in [0, 255], first "
            f"in episode {episode}, step {within} ({low:.4g} to {high:.4g}); frames are uint8 "
            f"RGB{hint}. If these are no images, say data.obs.<name>={{key: {key}, kind: state}}"
        )
    return levels


def gather_frames(
    parts: Callable[[], Iterator[tuple[int, Frames]]],
    shape: tuple[int, ...],
    name: str,
    memory: float,
    label: str,
    *,
    always_file: bool = False,
) -> Frames:
    """Frames from their parts, in memory or in a file of the cache that is made once."""
    size = int(np.prod(shape))
    fits = size <= memory * _GIB
    if fits and not always_file:
        frames = np.empty(shape, np.uint8)
        _fill(frames, parts(), label)
        return frames
    digest = hashlib.blake2b(name.encode(), digest_size=16).hexdigest()
    file = cache_dir() / "frames" / f"{digest}.npy"
    if not file.is_file():
        _check_space(file, size)
        _write(file, shape, parts(), label)
    mapped = np.load(file, mmap_mode="r")
    return np.array(mapped) if fits else mapped


def select_frames(frames: Frames, keep: npt.NDArray[np.bool_]) -> Frames:
    """The frames of some steps; of frames that are mapped from a file, in another such file."""
    if keep.all():
        return frames
    if not isinstance(frames, np.memmap):
        return frames[keep]
    rows = np.flatnonzero(keep)

    def parts() -> Iterator[tuple[int, Frames]]:
        for start in range(0, len(rows), _ROWS):
            yield start, frames[rows[start : start + _ROWS]]

    digest = hashlib.blake2b(np.packbits(keep).tobytes(), digest_size=16).hexdigest()
    shape = (len(rows), *frames.shape[1:])
    return gather_frames(parts, shape, f"{frames.filename} {digest}", 0.0, "leaving pauses out")


def _write(
    file: Path, shape: tuple[int, ...], parts: Iterator[tuple[int, Frames]], label: str
) -> None:
    """Fill a file beside its place and move it there when it is whole."""
    file.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(suffix=".npy.part", dir=file.parent)
    os.close(handle)
    try:
        mapped: Any = np.lib.format.open_memmap(  # type: ignore[no-untyped-call]
            temporary, mode="w+", dtype=np.uint8, shape=shape
        )
        _fill(mapped, parts, label)
        mapped.flush()
        Path(temporary).replace(file)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def _fill(frames: Frames, parts: Iterator[tuple[int, Frames]], label: str) -> None:
    with tqdm(total=len(frames), desc=label, unit="frame", disable=None, leave=False) as bar:
        for start, rows in parts:
            frames[start : start + len(rows)] = rows
            bar.update(len(rows))


def _check_space(file: Path, size: int) -> None:
    place = file.parent
    while not place.exists():
        place = place.parent
    status = os.statvfs(place)
    free = status.f_bavail * status.f_frsize
    if free < size:
        raise ReplayBufferError(
            f"the frames need {size / _GIB:.1f} GiB in {file.parent}, and {free / _GIB:.1f} GiB "
            "are free there; make room, set XDG_CACHE_HOME to another disk, or raise "
            "data.image_memory"
        )


def _state_of(path: Path) -> str:
    """Changes whenever a store does: number, sizes and times of its files."""
    files = [path] if path.is_file() else sorted(p for p in path.rglob("*") if p.is_file())
    digest = hashlib.blake2b(digest_size=16)
    for file in files:
        status = file.stat()
        digest.update(f"{file.name} {status.st_size} {status.st_mtime_ns}\n".encode())
    return digest.hexdigest()
