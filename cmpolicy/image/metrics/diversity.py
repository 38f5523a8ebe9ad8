"""Whether images vary as the real ones do, and whether they are copies of training images.

Both compare pixels in [0, 1] by Euclidean distance, so no network has a say in them.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

Images = npt.NDArray[np.uint8]
Labels = npt.NDArray[np.int64]
_BLOCK = 512


@dataclass(frozen=True)
class Diversity:
    """Mean distance of two images of one class, relative to the same of the real data.

    Attributes:
        ratio: mean over the classes. lowest: of the least varied class. lowest_class: its label.
    """

    ratio: float
    lowest: float
    lowest_class: int


def diversity(
    real: Images, real_labels: Labels, generated: Images, generated_labels: Labels
) -> Diversity:
    """Of the classes that were generated; images (N, H, W, C).

    Raises:
        ValueError: a class with fewer than two images on either side.
    """
    ratios: dict[int, float] = {}
    for label in np.unique(generated_labels).tolist():
        ours = generated[generated_labels == label]
        theirs = real[real_labels == label]
        for name, images in (("generated", ours), ("real", theirs)):
            if len(images) < 2:
                raise ValueError(
                    f"variety within a class needs 2 images of it; there are {len(images)} "
                    f"{name} of class {label}"
                )
        ratios[label] = mean_pairwise_distance(ours) / mean_pairwise_distance(theirs)
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


def copy_ratio(generated: Images, training: Images, held_out: Images) -> float:
    """Median distance of generated images to the nearest training image, over held-out images' own.

    About 1: as far from the training images as other real images are. Near 0: copies of them.
    """
    ours = nearest_neighbours(generated, training).distances
    theirs = nearest_neighbours(held_out, training).distances
    return float(np.median(ours) / np.median(theirs))


# cdist goes by the inner product, which in single precision loses the small distances
def _flat(images: Images) -> Tensor:
    return torch.from_numpy(images.reshape(len(images), -1) / 255.0)
