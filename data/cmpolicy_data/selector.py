"""Selectors: which key of a store, and which of its columns (``state``, ``state[:2]``)."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

_PATTERN = re.compile(r"(?P<key>[^\[\]:]+?)(?:\[(?P<start>-?\d+)?:(?P<stop>-?\d+)?\])?")


class SelectorError(ValueError):
    """A selector that cannot be understood, or columns that are not there."""


@dataclass(frozen=True)
class Selector:
    """``key[start:stop]``: a key and a range of its columns (the axis after the steps)."""

    key: str
    start: int | None = None
    stop: int | None = None

    @classmethod
    def parse(cls, text: str) -> Selector:
        """Read ``key`` or ``key[start:stop]``.

        Raises:
            SelectorError: any other form.
        """
        match = _PATTERN.fullmatch(text.strip()) if isinstance(text, str) else None
        if match is None:
            raise SelectorError(
                f"Cannot read the selector {text!r}. Write a key (state) or a key with a range of "
                "columns (state[:2], state[2:5], state[-1:])."
            )
        bounds = (match["start"], match["stop"])
        return cls(match["key"].strip(), *(None if b is None else int(b) for b in bounds))

    @property
    def is_whole(self) -> bool:
        """Whether all columns are taken."""
        return self.start is None and self.stop is None

    def columns(self, width: int) -> slice:
        """The range of columns of an array with ``width`` of them.

        Raises:
            SelectorError: an empty range, or one that reaches outside.
        """
        start = 0 if self.start is None else self.start + (width if self.start < 0 else 0)
        stop = width if self.stop is None else self.stop + (width if self.stop < 0 else 0)
        if not 0 <= start < stop <= width:
            raise SelectorError(
                f"The selector {self} takes columns {start} to {stop - 1}, but {self.key} has "
                f"{width} columns (0 to {width - 1})."
            )
        return slice(start, stop)

    def take(self, rows: npt.NDArray[Any]) -> npt.NDArray[Any]:
        """The chosen columns of ``rows`` (N, D, ...); (N,) counts as one column.

        Raises:
            SelectorError: columns that are not there.
        """
        table = rows[:, None] if rows.ndim == 1 else rows
        if self.is_whole:
            return np.ascontiguousarray(table)
        return np.ascontiguousarray(table[:, self.columns(table.shape[1])])

    def __str__(self) -> str:
        if self.is_whole:
            return self.key
        start = "" if self.start is None else self.start
        stop = "" if self.stop is None else self.stop
        return f"{self.key}[{start}:{stop}]"
