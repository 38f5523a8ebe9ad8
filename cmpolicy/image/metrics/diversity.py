"""Whether images vary as the real ones do, and whether they are copies of training images.

Both compare pixels in [0, 1] by Euclidean distance, so no network has a say in them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from cmpolicy.image.metrics.subset import some

Images = npt.NDArray[np.uint8]
Labels = npt.NDArray[np.int64]
_BLOCK = 512
SPREAD_IMAGES = 1000


@dataclass(frozen=True)
class Diversity:
    """Mean distance of two images of one class, relative to the same of the real data.

    Attributes:
        ratio: mean over the classes. lowest: of the least varied class. lowest_class: its label.
    """

    ratio: float
    lowest: float
    lowest_class: int


def spread_by_class(images: Images, labels: Labels) -> dict[int, float]:
    """Mean distance of two images of a class, by label; images (N, H, W, C), labels (N,).

    Of a large class only :data:`SPREAD_IMAGES`, drawn from a fixed seed, are compared. A class with
    one image has no such distance and is left out.
    """
    spread: dict[int, float] = {}
    for label in np.unique(labels).tolist():
        rows = some(np.flatnonzero(labels == label), SPREAD_IMAGES)
        if len(rows) > 1:
            spread[label] = mean_pairwise_distance(images[rows])
    return spread


def diversity(real: Mapping[int, float], generated: Mapping[int, float]) -> Diversity:
    """Of the classes that were generated; both from :func:`spread_by_class`.

    Raises:
        ValueError: no class has two images in both.
    """
    ratios = {label: spread / real[label] for label, spread in generated.items() if label in real}
    if not ratios:
        raise ValueError("variety within a class needs 2 real and 2 generated images of some class")
    lowest = min(ratios, key=lambda label: ratios[label])
    return Diversity(float(np.mean(list(ratios.values()))), ratios[lowest], lowest)


def mean_pairwise_distance(images: Images) -> float:
    """Over all pairs of different images."""
    x = _flat(images)
    total = sum(float(torch.cdist(block, x).sum()) for block in x.split(_BLOCK))
    return total / (len(x) * (len(x) - 1))


@dataclass(frozen=True, eq=False)
class Nearest:
    """Of each of N images the k nearest training images, nearest first.

    Attributes:
        rows: (N, k) rows of the training images. distances: (N, k).
    """

    rows: npt.NDArray[np.int64]
    distances: npt.NDArray[np.float64]


def nearest_neighbours(images: Images, training: Images, k: int = 1) -> Nearest:
    """images (N, H, W, C) among training (M, H, W, C), k <= M."""
    if not 1 <= k <= len(training):
        raise ValueError(f"k={k} neighbours among {len(training)} training images")
    x, y = _flat(images), _flat(training)
    found = [torch.cdist(block, y).topk(k, dim=1, largest=False) for block in x.split(_BLOCK)]
    return Nearest(
        rows=torch.cat([f.indices for f in found]).numpy(),
        distances=torch.cat([f.values for f in found]).numpy(),
    )


def median_nearest(images: Images, training: Images) -> float:
    """Median distance of an image to its nearest training image."""
    return float(np.median(nearest_neighbours(images, training).distances))


# cdist goes by the inner product, which in single precision loses the small distances
def _flat(images: Images) -> Tensor:
    return torch.from_numpy(images.reshape(len(images), -1) / 255.0)
