"""Numbers about a key that one glitch cannot fool: ranges, percentiles, outliers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

Float64Array = npt.NDArray[np.float64]

#: How the values of a key are scaled, see :meth:`KeyStatistics.span`.
Normalize = Literal["auto", "minmax", "quantile", "gaussian"]

PERCENTILES = (0.1, 1.0, 50.0, 99.0, 99.9)
# A value is out of all bounds if it lies farther from the rest than this many times the rest's
# range, and is one of few: at most one in 2000 (three in small data) on its side.
_FAR = 10.0
_ONE_IN = 2000
_FEW = 3
_AT_ONCE = 1 << 22  # numbers
#: Percentiles 1 and 99 that lie closer together than this part of the range do not scale a column.
_LEAST_QUANTILES = 0.05


#: Half of the distance of two float32 numbers, relative to their size.
FLOAT32 = 2.0**-24
#: What varies by less than this many times that distance is not resolved by float32.
COARSE = 1e-3


def needs_float64(values: npt.NDArray[Any]) -> bool:
    """Whether (N, ...) numbers hold more than float32 can: some column is not resolved by it."""
    small = values.dtype.kind in "fiu" and values.dtype.itemsize < 8
    if small or values.dtype.kind not in "fiu" or not len(values):
        return False
    low, high = values.min(axis=0).astype(np.float64), values.max(axis=0).astype(np.float64)
    largest, span = np.maximum(np.abs(low), np.abs(high)), high - low
    # what varies within the rounding of float64 is constant
    return bool(((largest * FLOAT32 > COARSE * span) & (span > 1e-13 * largest)).any())


@dataclass(frozen=True)
class KeyStatistics:
    """Of (N, ...) values over the steps, per dimension (...), in float64.

    Attributes:
        minimum, maximum: of all values.
        low, high: of the values that are not out of all bounds.
        mean, std: of these as well.
        percentiles: (5, ...), see :data:`PERCENTILES`, of all values.
        middle: (2, ...), between which nine in ten values lie.
        n_outliers: values beyond [low, high].
    """

    minimum: Float64Array
    maximum: Float64Array
    low: Float64Array
    high: Float64Array
    mean: Float64Array
    std: Float64Array
    percentiles: Float64Array
    middle: Float64Array
    n_outliers: npt.NDArray[np.int64]

    @classmethod
    def of(cls, values: npt.NDArray[Any]) -> KeyStatistics:
        """Statistics of (N, ...) finite values, N at least 1; a few columns at a time."""
        shape, flat = values.shape[1:], values.reshape(len(values), -1)
        width = max(1, _AT_ONCE // len(values))
        parts = [_of_columns(flat[:, i : i + width]) for i in range(0, flat.shape[1], width)]
        joined = (np.concatenate(column, axis=-1) for column in zip(*parts, strict=True))
        return cls(*(array.reshape((*array.shape[:-1], *shape)) for array in joined))

    def span(self, method: Normalize) -> tuple[Float64Array, Float64Array]:
        """What becomes -1 and 1: two arrays (...).

        ``minmax`` takes the range of all values, ``auto`` that of those not out of all bounds,
        ``quantile`` the percentiles 1 and 99 (but the range where these lie close together, as of
        a trigger that is rarely pressed: it would be far out of [-1, 1], or lost), ``gaussian`` the
        mean minus and plus the standard deviation.
        """
        if method == "minmax":
            return self.minimum, self.maximum
        if method == "quantile":
            low, high = self.percentiles[1], self.percentiles[3]
            rare = high - low < _LEAST_QUANTILES * (self.high - self.low)
            return np.where(rare, self.low, low), np.where(rare, self.high, high)
        if method == "gaussian":
            return self.mean - self.std, self.mean + self.std
        return self.low, self.high


def _of_columns(values: npt.NDArray[Any]) -> tuple[npt.NDArray[Any], ...]:
    """The attributes of :class:`KeyStatistics`, in order, of (N, D) values."""
    numbers = values.astype(np.float64)
    n = len(numbers)
    minimum, maximum = numbers.min(axis=0), numbers.max(axis=0)
    low, high = minimum, maximum
    few = max(_FEW, n // _ONE_IN)
    kept = numbers
    if n > 4 * few:
        ordered = np.partition(numbers, (few, n - 1 - few), axis=0)
        bottom, top = ordered[few], ordered[n - 1 - few]
        reach = _FAR * (top - bottom)
        reach = np.where(reach > 0, reach, np.inf)  # all but few equal: perhaps a switch
        inside = (numbers >= bottom - reach) & (numbers <= top + reach)
        kept = np.where(inside, numbers, np.nan)
        low, high = np.nanmin(kept, axis=0), np.nanmax(kept, axis=0)
    mean, std = np.nanmean(kept, axis=0), np.nanstd(kept, axis=0)
    percentiles = np.percentile(numbers, (*PERCENTILES, 5, 95), axis=0)
    n_outliers = np.isnan(kept).sum(axis=0)
    return minimum, maximum, low, high, mean, std, percentiles[:-2], percentiles[-2:], n_outliers
