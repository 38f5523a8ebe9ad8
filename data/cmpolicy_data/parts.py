"""Rows that come in parts, so that an episode of frames need not fit into memory."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

MAX_CHUNK_STEPS = 2048
_CHUNK_BYTES = 1 << 22
_PART_BYTES = 16 << 20


def rows_per_chunk(row_bytes: int) -> int:
    """Rows of ``row_bytes`` bytes each in a chunk of a store whose rows come in parts."""
    return min(MAX_CHUNK_STEPS, max(1, _CHUNK_BYTES // max(1, row_bytes)))


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
        """Number of axes."""
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
