"""Some of many, the same ones every time."""

from __future__ import annotations

from typing import TypeVar

import numpy as np
import numpy.typing as npt

_SEED = 7
Scalar = TypeVar("Scalar", bound=np.generic)


def some(values: npt.NDArray[Scalar], n: int) -> npt.NDArray[Scalar]:
    """At most n of the rows, drawn from a fixed seed, in their order."""
    if len(values) <= n:
        return values
    rows = np.random.default_rng(_SEED).choice(len(values), n, replace=False)
    return values[np.sort(rows)]
