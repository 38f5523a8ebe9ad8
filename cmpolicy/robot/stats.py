"""Durations over a run of any length, in fixed memory."""

from __future__ import annotations

import math
from array import array
from dataclasses import dataclass

_SHORTEST = 1e-6
_LONGEST = 1e3
_RATIO = 1.01
_SCALE = 1 / math.log(_RATIO)
_BINS = math.ceil(math.log(_LONGEST / _SHORTEST) * _SCALE) + 1


@dataclass(frozen=True)
class Quantiles:
    """Of durations in milliseconds; p50 and p99 to 1 %, ``max`` exact; nan where there are none."""

    count: int
    p50: float
    p99: float
    max: float


class Histogram:
    """Counts of durations in bins of 1 % width, from 1 µs to 1000 s."""

    def __init__(self) -> None:
        self._counts = array("q", bytes(8 * _BINS))
        self._total = 0
        self._max = 0.0

    def add(self, seconds: float) -> None:
        """Count one duration; negative ones count as 0."""
        index = 0
        if seconds > _SHORTEST:
            index = min(_BINS - 1, int(math.log(seconds / _SHORTEST) * _SCALE) + 1)
        self._counts[index] += 1
        self._total += 1
        self._max = max(self._max, seconds)

    def quantiles(self) -> Quantiles:
        """In milliseconds."""
        if self._total == 0:
            return Quantiles(0, math.nan, math.nan, math.nan)
        return Quantiles(
            self._total, self._quantile(0.5) * 1e3, self._quantile(0.99) * 1e3, self._max * 1e3
        )

    def _quantile(self, share: float) -> float:
        """Upper edge of the bin that holds it, but no more than the largest value."""
        wanted = math.ceil(share * self._total)
        seen = 0
        for index, count in enumerate(self._counts):
            seen += count
            if seen >= wanted:
                return min(self._max, _SHORTEST * _RATIO**index)
        return self._max
