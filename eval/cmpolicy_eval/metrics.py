"""Intervals of 95 %, for one evaluation and for the difference of two on the same seeds."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

Z95 = 1.959963984540054
"""97.5 % quantile of the standard normal distribution."""

Interval = tuple[float, float]


def wilson_interval(successes: int, n: int, z: float = Z95) -> Interval:
    """Wilson's score interval of a share (Wilson 1927), here of ``successes`` out of ``n``."""
    if not 0 <= successes <= n or n < 1:
        raise ValueError(f"wilson_interval: need 0 <= successes <= n, n >= 1; got {successes}, {n}")
    share = successes / n
    centre = (share + z**2 / (2 * n)) / (1 + z**2 / n)
    half = z / (1 + z**2 / n) * math.sqrt(share * (1 - share) / n + z**2 / (4 * n**2))
    # At the ends the interval reaches 0 or 1 exactly; rounding must not leave it.
    low = 0.0 if successes == 0 else max(0.0, centre - half)
    high = 1.0 if successes == n else min(1.0, centre + half)
    return low, high


def bootstrap_interval(
    values: ArrayLike, *, n_resamples: int = 10_000, seed: int = 0, level: float = 0.95
) -> Interval:
    """Percentile bootstrap interval of the mean of ``values`` (n,); reproducible from ``seed``."""
    sample = np.asarray(values, dtype=np.float64)
    if sample.ndim != 1 or sample.size == 0:
        raise ValueError(f"bootstrap_interval: need (n,) values, n >= 1; got {sample.shape}")
    rng = np.random.default_rng(seed)
    means: NDArray[np.float64] = np.empty(n_resamples)
    block = max(1, 2_000_000 // sample.size)  # bounds the memory of the index table
    for start in range(0, n_resamples, block):
        count = min(block, n_resamples - start)
        index = rng.integers(sample.size, size=(count, sample.size))
        means[start : start + count] = sample[index].mean(axis=1)
    low, high = np.quantile(means, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def crossed_bootstrap_interval(
    values: ArrayLike, *, n_resamples: int = 4000, seed: int = 0, level: float = 0.95
) -> Interval:
    """Percentile bootstrap interval of the mean of ``values`` (groups, n), both resampled.

    Every group (training seed) meets the same n subjects (episodes), so one draw of subjects, with
    replacement, serves all groups that are drawn: more groups do not make a hard subject easier.
    With few groups the interval is too narrow, as any from so few is.
    """
    sample = np.asarray(values, dtype=np.float64)
    if sample.ndim != 2 or sample.size == 0:
        raise ValueError(f"crossed_bootstrap_interval: need (groups, n) values; got {sample.shape}")
    rng = np.random.default_rng(seed)
    times = [rng.multinomial(k, np.full(k, 1 / k), size=n_resamples) for k in sample.shape]
    means = ((times[0] @ sample) * times[1]).sum(axis=1) / sample.size
    low, high = np.quantile(means, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


@dataclass(frozen=True)
class Estimate:
    """A mean over training runs and episodes, and its interval of 95 % over both."""

    values: NDArray[np.float64]
    mean: float
    ci95: Interval

    @classmethod
    def over(cls, values: ArrayLike) -> "Estimate":
        """Of (training runs, episodes)."""
        sample = np.asarray(values, dtype=np.float64)
        return cls(sample, float(sample.mean()), crossed_bootstrap_interval(sample))

    @classmethod
    def of_share(cls, solved: ArrayLike) -> "Estimate":
        """Of zeros and ones. Where all are alike, which leaves nothing to resample: Wilson's
        interval for so many episodes, however many runs met them.
        """
        found = cls.over(solved)
        if found.mean not in (0.0, 1.0):
            return found
        n = found.values.shape[1]
        return cls(found.values, found.mean, wilson_interval(round(n * found.mean), n))

    @property
    def by_seed(self) -> tuple[float, ...]:
        """Means over the episodes."""
        return tuple(float(v) for v in self.values.mean(1))

    def __sub__(self, other: "Estimate") -> "Estimate":
        """The difference, run by run and episode by episode.

        Of shares that differ by the same in every episode of every run, which leaves nothing to
        resample, the interval is the one of a single run.
        """
        found = Estimate.over(self.values - other.values)
        both = np.stack([self.values, other.values])
        if np.ptp(found.values) > 0 or not np.isin(both, (0, 1)).all():
            return found
        return Estimate(found.values, found.mean, paired_share_interval(*both[:, 0]))

    def __str__(self) -> str:
        low, high = self.ci95
        return f"{self.mean:.3f} [{low:.3f}, {high:.3f}]"


def paired_share_interval(first: ArrayLike, second: ArrayLike, z: float = Z95) -> Interval:
    """Interval of the difference of two shares (first minus second) on the same n subjects.

    Laplace-adjusted Wald interval of Bonett & Price (2012): does not shrink to a point when the two
    agree everywhere. ``first`` and ``second`` are (n,) booleans.
    """
    a, b = _paired(first, second)
    n = a.size
    only_a = (float(np.sum((a > 0) & (b == 0))) + 1) / (n + 2)
    only_b = (float(np.sum((a == 0) & (b > 0))) + 1) / (n + 2)
    centre = only_a - only_b
    half = z * math.sqrt((only_a + only_b - centre**2) / (n + 2))
    return max(-1.0, centre - half), min(1.0, centre + half)


@dataclass(frozen=True)
class PairedDifference:
    """First minus second on the same seeds, each with its 95 % interval."""

    n: int
    score: float
    score_ci95: Interval
    success: float
    success_ci95: Interval


def paired_difference(
    first_scores: Sequence[float],
    first_success: Sequence[bool],
    second_scores: Sequence[float],
    second_success: Sequence[bool],
) -> PairedDifference:
    """Differences of two evaluations whose episodes are given in the same order of seeds."""
    a, b = _paired(first_scores, second_scores)
    success_a, success_b = _paired(first_success, second_success)
    return PairedDifference(
        n=a.size,
        score=float(np.mean(a - b)),
        score_ci95=bootstrap_interval(a - b),
        success=float(np.mean(success_a - success_b)),
        success_ci95=paired_share_interval(success_a, success_b),
    )


def _paired(first: ArrayLike, second: ArrayLike) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    a, b = np.asarray(first, dtype=np.float64), np.asarray(second, dtype=np.float64)
    if a.ndim != 1 or a.shape != b.shape or a.size == 0:
        raise ValueError(
            f"paired difference: need two (n,) series of one length, got {a.shape} and {b.shape}"
        )
    return a, b
