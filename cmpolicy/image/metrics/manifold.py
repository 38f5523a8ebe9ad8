"""Precision and recall of generated images (Kynkaanniemi et al., NeurIPS 2019).

The manifold of a set is the union of balls, one around each feature, that reach to its k-th nearest
neighbour in the set. Precision: the share of generated features in the real manifold (are they
realistic). Recall: the share of real features in the generated one (is everything covered).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

NEIGHBOURS = 3
"""k of the paper."""
_BLOCK = 1024
Features = npt.NDArray[np.floating[Any]]  # (N, D)


@dataclass(frozen=True)
class PrecisionRecall:
    """Shares in [0, 1]."""

    precision: float
    recall: float


def precision_recall(real: Features, generated: Features, k: int = NEIGHBOURS) -> PrecisionRecall:
    """real (N, D), generated (M, D): features. Compare sets of like sizes: both shares depend on
    N and M.

    Raises:
        ValueError: a set of k features or fewer, or of different D.
    """
    for name, features in (("real", real), ("generated", generated)):
        if features.ndim != 2 or len(features) <= k:
            raise ValueError(
                f"precision and recall need more than k={k} {name} features (N, D), got "
                f"{features.shape}"
            )
    if real.shape[1] != generated.shape[1]:
        raise ValueError(f"features differ in size: {real.shape[1]} and {generated.shape[1]}")
    r, g = _double(real), _double(generated)
    return PrecisionRecall(
        precision=_share_within(g, r, _radii(r, k)), recall=_share_within(r, g, _radii(g, k))
    )


def _radii(x: Tensor, k: int) -> Tensor:
    """(N,): distance of each to its k-th nearest other."""
    # the nearest is the point itself, at distance 0
    return _by_block(x, x, lambda distances: distances.kthvalue(k + 1, dim=1).values)


def _share_within(x: Tensor, centres: Tensor, radii: Tensor) -> float:
    inside = _by_block(x, centres, lambda distances: (distances <= radii).any(dim=1))
    return float(inside.double().mean())


def _by_block(x: Tensor, y: Tensor, reduce: Callable[[Tensor], Tensor]) -> Tensor:
    """``reduce`` of the distances (block, M) of some x to all y, for all x."""
    return torch.cat([reduce(torch.cdist(block, y)) for block in x.split(_BLOCK)])


# cdist goes by the inner product, which in single precision loses the small distances
def _double(features: Features) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(features, dtype=np.float64))
