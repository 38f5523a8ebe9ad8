"""Statistics as LeRobot keeps them: of each episode, and of the whole data set from those."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from cmpolicy_data.frames import Frames

Stats = dict[str, npt.NDArray[Any]]
"""``min``, ``max``, ``mean``, ``std``, ``q01`` ... ``q99`` of one feature, and ``count`` (1,)."""

_QUANTILES = {"q01": 0.01, "q10": 0.1, "q50": 0.5, "q90": 0.9, "q99": 0.99}
_FRAMES = 100
_SIDE = 150


def of_rows(rows: npt.NDArray[Any]) -> Stats:
    """Of the rows (L, ...) of an episode; rows that are one number each count as (L, 1)."""
    values = np.asarray(rows[:, None] if rows.ndim == 1 else rows, np.float64)
    stats = {
        "min": values.min(axis=0),
        "max": values.max(axis=0),
        "mean": values.mean(axis=0),
        "std": values.std(axis=0),
        "count": np.array([len(values)]),
    }
    found = np.quantile(values, list(_QUANTILES.values()), axis=0)
    return stats | dict(zip(_QUANTILES, found, strict=True))


class Levels:
    """Grey levels of an episode's frames, of at most about 100 of them and not of every pixel."""

    def __init__(self, length: int, size: tuple[int, int]) -> None:
        self._step = max(1, length // _FRAMES)
        self._stride = max(1, min(size) // _SIDE)
        self._counts = np.zeros((3, 256), np.int64)
        self._seen = self._used = 0

    def add(self, frames: Frames) -> None:
        """Count the next frames (l, H, W, 3)."""
        chosen = frames[-self._seen % self._step :: self._step, :: self._stride, :: self._stride]
        self._seen += len(frames)
        self._used += len(chosen)
        for channel, counts in enumerate(self._counts):
            counts += np.bincount(chosen[..., channel].ravel(), minlength=256)

    def stats(self) -> Stats:
        """Per channel, (3, 1, 1), of levels in [0, 1]."""
        levels = np.arange(256) / 255
        share = self._counts / self._counts.sum(axis=1, keepdims=True)
        below = np.cumsum(share, axis=1)
        mean = share @ levels
        found = {
            "min": levels[(share > 0).argmax(axis=1)],
            "max": levels[255 - (share[:, ::-1] > 0).argmax(axis=1)],
            "mean": mean,
            "std": np.sqrt(np.maximum(share @ levels**2 - mean**2, 0)),
        }
        found |= {
            name: levels[(below >= q - 1e-12).argmax(axis=1)] for name, q in _QUANTILES.items()
        }
        shaped = {name: value.reshape(3, 1, 1) for name, value in found.items()}
        return shaped | {"count": np.array([self._used])}


def merge(episodes: Sequence[Stats]) -> Stats:
    """Of a data set from those of its episodes; quantiles are the weighted mean, as lerobot's."""
    counts = np.array([int(stats["count"][0]) for stats in episodes])

    def mean_of(values: list[npt.NDArray[Any]]) -> npt.NDArray[Any]:
        return np.tensordot(counts / counts.sum(), np.stack(values), axes=1)

    mean = mean_of([stats["mean"] for stats in episodes])
    spread = mean_of([stats["std"] ** 2 + (stats["mean"] - mean) ** 2 for stats in episodes])
    merged = {
        "min": np.min([stats["min"] for stats in episodes], axis=0),
        "max": np.max([stats["max"] for stats in episodes], axis=0),
        "mean": mean,
        "std": np.sqrt(spread),
        "count": np.array([counts.sum()]),
    }
    return merged | {name: mean_of([stats[name] for stats in episodes]) for name in _QUANTILES}
