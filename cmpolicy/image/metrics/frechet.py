"""Distance of two sets of features as of two normal distributions (Frechet 1957).

    d^2 = |m1 - m2|^2 + tr(S1 + S2 - 2 (S1^1/2 S2 S1^1/2)^1/2)

With the features of one particular Inception network this number is called FID (Heusel et al.
2017). With any other features, as here, it is not FID and is comparable to no published FID; it
compares sets of the same size under the same features. Small sets make it larger.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class FeatureStatistics:
    """Of n features: mean (D,) and covariance (D, D)."""

    mean: Array
    covariance: Array
    n: int

    @classmethod
    def of(cls, features: npt.NDArray[np.floating[Any]]) -> FeatureStatistics:
        """features (N, D), N >= 2.

        Raises:
            ValueError: fewer than two, or values that are not finite.
        """
        if features.ndim != 2 or len(features) < 2:
            raise ValueError(
                f"statistics need at least 2 features of shape (N, D), got {features.shape}"
            )
        x = features.astype(np.float64)
        if not np.isfinite(x).all():
            raise ValueError("the features of some image are not finite; is the image?")
        return cls(x.mean(axis=0), np.atleast_2d(np.cov(x, rowvar=False)), len(x))


def frechet_distance(a: FeatureStatistics, b: FeatureStatistics) -> float:
    """d^2 as above, at least 0.

    Raises:
        ValueError: features of different sizes.
    """
    if a.mean.shape != b.mean.shape:
        raise ValueError(
            f"features of {a.mean.shape[0]} and {b.mean.shape[0]} numbers cannot be compared"
        )
    root = _square_root(a.covariance)
    # eigenvalues of S1^1/2 S2 S1^1/2 are those of S1 S2, and the matrix is symmetric
    product = np.linalg.eigvalsh(root @ b.covariance @ root)
    cross = np.sqrt(product.clip(min=0)).sum()
    gap = a.mean - b.mean
    squared = gap @ gap + np.trace(a.covariance) + np.trace(b.covariance) - 2 * cross
    return float(max(squared, 0.0))


def _square_root(matrix: Array) -> Array:
    """Of a symmetric matrix without negative eigenvalues (rounding aside)."""
    values, vectors = np.linalg.eigh(matrix)
    return np.asarray((vectors * np.sqrt(values.clip(min=0))) @ vectors.T)
