"""A test part drawn class by class: the same pictures give the same parts, wherever they lie."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

_SEED = 20_260_129


def stratified_test_rows(
    labels: npt.NDArray[np.int64], fraction: float
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Rows (train, test): of each class ``fraction``, rounded, at least one row in either part.

    Drawn from a fixed seed, each class on its own.

    Raises:
        ValueError: a class has fewer than two rows.
    """
    train: list[npt.NDArray[np.int64]] = []
    test: list[npt.NDArray[np.int64]] = []
    for label in np.unique(labels):
        rows = np.flatnonzero(labels == label)
        if len(rows) < 2:
            raise ValueError(f"class {int(label)} has {len(rows)} image; a split needs two")
        n_test = min(max(round(fraction * len(rows)), 1), len(rows) - 1)
        shuffled = np.random.default_rng([_SEED, int(label)]).permutation(rows)
        test.append(shuffled[:n_test])
        train.append(shuffled[n_test:])
    return np.sort(np.concatenate(train)), np.sort(np.concatenate(test))
