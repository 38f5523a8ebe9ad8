"""Training batches of labelled images that live, as uint8, on the training device.

Order and mirroring are pure functions of (seed, example counter): :mod:`cmpolicy.training.order`.
"""

from __future__ import annotations

import numpy as np
import torch

from cmpolicy.image.datasets.data import ImageBatch, ImageSet
from cmpolicy.image.pixels import from_uint8
from cmpolicy.schema import at_least
from cmpolicy.training.order import ExampleOrder

_COINS = 1 << 32  # added to a seed it gives an order that is independent of the seed's own


class ImageLoader:
    """Batches of images, gathered on ``device`` (see the module docstring).

    Args:
        data: the training images.
        batch_size: examples of one whole (global) batch.
        seed: of the order of the data.
        flip: mirror half of the images left to right, others in every epoch.
        device: where the data lives.

    Raises:
        ValueError: no images, or a bad batch size or seed.
    """

    def __init__(
        self,
        data: ImageSet,
        *,
        batch_size: int,
        seed: int,
        flip: bool = False,
        device: torch.device | str = "cpu",
    ) -> None:
        at_least("batch_size", batch_size, 1)
        if len(data) == 0:
            raise ValueError("The loader got no images.")
        self.batch_size = batch_size
        self.flip = flip
        self.device = torch.device(device)
        channels_first = np.ascontiguousarray(data.images.transpose(0, 3, 1, 2))
        self._images = torch.from_numpy(channels_first).to(self.device)
        self._labels = torch.from_numpy(data.labels.copy()).to(self.device)
        self._order = ExampleOrder(len(data), seed=seed, device=self.device)
        self._coins = ExampleOrder(len(data), seed=seed + _COINS, device=self.device)

    def batch(self, first_example: int, count: int | None = None) -> ImageBatch:
        """The ``count`` examples of the run from ``first_example`` on (default: a whole batch).

        Rank r of R takes ``batch(first + r * share, share)`` with ``share = batch_size // R``; the
        shares side by side are exactly ``batch(first)``. Batches may straddle epochs.
        """
        size = self.batch_size if count is None else count
        numbers = self._order.numbers(first_example, size)
        images = from_uint8(self._images.index_select(0, numbers))
        if self.flip:
            mirrored = self._coins.numbers(first_example, size) % 2 == 1
            images = torch.where(mirrored[:, None, None, None], images.flip(-1), images)
        return {"images": images, "labels": self._labels.index_select(0, numbers)}
