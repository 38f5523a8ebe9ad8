"""How rows become chunks of our stores.

Rows may come in parts, so that an episode of frames need not fit into memory.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import zarr
from numcodecs import blosc
from zarr.codecs import BloscCodec, Crc32cCodec

from cmpolicy_data.chunks import Array, ReplayBufferError

_MAX_CHUNK_STEPS = 2048
_CHUNK_BYTES = 1 << 20  # numbers, which are read all at once
_IMAGE_CHUNK_BYTES = 1 << 18  # frames, which are read a few at a time
_PARTS_CHUNK_BYTES = 1 << 22
_WORTH_IT = 0.9  # of its size that a frame may keep when compressed
_PART_BYTES = 16 << 20


def rows_per_chunk(row_bytes: int) -> int:
    """Rows of ``row_bytes`` bytes each in a chunk of a store whose rows come in parts."""
    return min(_MAX_CHUNK_STEPS, max(1, _PARTS_CHUNK_BYTES // max(1, row_bytes)))


def part_sizes(first_row: int, length: int, row_bytes: int) -> Iterator[int]:
    """Sizes of parts that end where chunks do, so that none is read back and written twice.

    Args:
        first_row: row of the store at which the episode begins. length: its rows.
        row_bytes: size of a row.
    """
    chunk = rows_per_chunk(row_bytes)
    step = chunk * max(1, _PART_BYTES // (chunk * max(1, row_bytes)))
    row, end = first_row, first_row + length
    while row < end:
        size = min(step - row % step, end - row)
        yield size
        row += size


@dataclass(frozen=True)
class Parts:
    """The rows of one key of an episode, made while they are written.

    Attributes:
        shape: (L, ...) of all rows. dtype: of every part.
        parts: arrays (l, ...) whose lengths add up to L; gone through once.
    """

    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    parts: Iterable[npt.NDArray[Any]]

    @property
    def ndim(self) -> int:
        return len(self.shape)

    @property
    def nbytes(self) -> int:
        """Size of all rows."""
        return math.prod(self.shape) * self.dtype.itemsize


def in_parts(
    episode: Mapping[str, npt.NDArray[Any] | Parts],
) -> Iterator[tuple[str, int, npt.NDArray[Any]]]:
    """Key, first row and rows of each part, one of each key in turn; an array is one part.

    Raises:
        ValueError: parts that are not what their description says.
    """
    running = {key: _numbered(key, rows) for key, rows in episode.items()}
    while running:
        for key, parts in list(running.items()):
            found = next(parts, None)
            if found is None:
                del running[key]
            else:
                yield (key, *found)


def _numbered(key: str, rows: npt.NDArray[Any] | Parts) -> Iterator[tuple[int, npt.NDArray[Any]]]:
    if not isinstance(rows, Parts):
        yield 0, rows
        return
    start = 0
    for part in rows.parts:
        if part.shape[1:] != rows.shape[1:] or start + len(part) > rows.shape[0]:
            raise ValueError(
                f"{key}: a part of shape {part.shape} at row {start} is none of rows of shape "
                f"{rows.shape}"
            )
        yield start, part
        start += len(part)
    if start != rows.shape[0]:
        raise ValueError(f"{key}: the parts have {start} rows, expected {rows.shape[0]}")


def new_array(
    root: zarr.Group, name: str, rows: npt.NDArray[Any] | Parts, first: npt.NDArray[Any]
) -> Array:
    """A new array without rows, chunked and compressed for rows like these.

    Args:
        root: of the store. name: of the array in it.
        rows: (L, ...) of the first episode. first: the first of them, which tell what compresses.
    """
    row_bytes = max(1, rows.nbytes // rows.shape[0])
    if isinstance(rows, Parts):
        steps = rows_per_chunk(row_bytes)
        how = encoding(fast=True, compress=_compresses(first))
    else:
        size = _IMAGE_CHUNK_BYTES if rows.ndim == 4 else _CHUNK_BYTES
        steps = min(_MAX_CHUNK_STEPS, max(1, size // row_bytes))
        how = encoding()
    return root.create_array(
        name,
        shape=(0, *rows.shape[1:]),
        chunks=(steps, *(max(1, size) for size in rows.shape[1:])),
        dtype=rows.dtype,
        **how,
    )


def _compresses(rows: npt.NDArray[Any]) -> bool:
    """Whether the fast compression makes rows smaller; it does not of what a camera sees."""
    sample = np.ascontiguousarray(rows[:1])
    small = blosc.compress(sample, b"lz4", clevel=1, shuffle=blosc.NOSHUFFLE)
    return len(small) < _WORTH_IT * sample.nbytes


def encoding(*, fast: bool = False, compress: bool = True) -> dict[str, Any]:
    """How our arrays are stored: compressed, with a checksum, every chunk written.

    ``fast``: for frames of a video, which zstd compresses ten times slower than they are decoded.
    """
    codec = BloscCodec(cname="zstd", clevel=5, shuffle="bitshuffle")
    if fast:
        codec = BloscCodec(cname="lz4", clevel=1, shuffle="noshuffle")
    return {
        "compressors": (*([codec] if compress else []), Crc32cCodec()),
        "fill_value": 0,
        "config": {"write_empty_chunks": True},
    }


def check_episode(
    values: Mapping[str, npt.NDArray[Any] | Parts],
    arrays: Mapping[str, zarr.Array[Any]] | None,
    where: str,
) -> int:
    """The number of steps of an episode that is to be appended.

    Args:
        values: by key.
        arrays: those of the store; None for its first episode, which fixes them.
        where: begins messages.

    Raises:
        ReplayBufferError: other keys, shapes or kinds of numbers than the store's, lengths that
            differ, an empty episode, or numbers that the store's cannot hold.
    """
    known = set(values if arrays is None else arrays)
    if not values or set(values) != known:
        raise ReplayBufferError(
            f"{where}: the episode has keys {sorted(values)}, the store has {sorted(known)}."
        )
    lengths = {key: value.shape[0] if value.ndim else 0 for key, value in values.items()}
    if len(set(lengths.values())) > 1 or min(lengths.values()) < 1:
        raise ReplayBufferError(
            f"{where}: every key needs the same number of steps, at least 1; got {lengths}."
        )
    for key, value in values.items():
        if value.dtype.kind not in "biuf":
            raise ReplayBufferError(
                f"{where}: {key!r} has dtype {value.dtype}; only numbers can be stored."
            )
        if 0 in value.shape[1:]:
            raise ReplayBufferError(
                f"{where}: {key!r} has shape {value.shape[1:]} per step, which holds nothing; "
                "leave it out."
            )
        if arrays is None:
            continue
        array = arrays[key]
        if value.shape[1:] != array.shape[1:]:
            raise ReplayBufferError(
                f"{where}: {key!r} has shape {value.shape[1:]} per step, the store has "
                f"{array.shape[1:]}."
            )
        if not np.can_cast(value.dtype, array.dtype, "same_kind"):
            raise ReplayBufferError(
                f"{where}: {key!r} has dtype {value.dtype}, which does not fit the store's "
                f"{array.dtype}."
            )
        if isinstance(value, np.ndarray) and not _fits(value, array.dtype):
            raise ReplayBufferError(
                f"{where}: {key!r} holds {value.min()} to {value.max()}, more than the store's "
                f"{array.dtype} can hold."
            )
    return next(iter(lengths.values()))


def _fits(values: npt.NDArray[Any], dtype: np.dtype[Any]) -> bool:
    """Whether numbers keep their size as ``dtype``: integers do not wrap, floats stay finite."""
    if np.can_cast(values.dtype, dtype, "safe") or dtype.kind not in "iuf":
        return True
    limits: Any = np.finfo(dtype) if dtype.kind == "f" else np.iinfo(dtype)
    known = values[np.isfinite(values)] if values.dtype.kind == "f" else values
    return not known.size or bool(known.min() >= limits.min and known.max() <= limits.max)
