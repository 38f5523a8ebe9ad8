"""Noise of successive plans."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]


class NoiseSource:
    """Standard normal noise (1, T, A), one draw per plan; reproducible from ``seed``.

    The numbers are those of ``rollout`` for the same seed.
    """

    def __init__(self, shape: tuple[int, int], seed: int | None) -> None:
        self._shape = shape
        self._noise = np.zeros((1, *shape), np.float32)
        self._seed = seed
        self.reset()

    def reset(self) -> None:
        """Start the stream again."""
        self._rng = np.random.default_rng(self._seed)

    def draw(self) -> Array:
        """(1, T, A); the next draw overwrites it."""
        self._rng.standard_normal(self._shape, dtype=np.float32, out=self._noise[0])
        return self._noise
