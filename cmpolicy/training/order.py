"""The order of training data: a pure function of (seed, example counter).

Epoch e visits all N items in the permutation drawn from a generator seeded by (seed, e), and
example number n of a run is entry ``n % N`` of epoch ``n // N``. A run resumed at example n
therefore sees what it would have seen, and the ranks of a distributed run take disjoint slices of
one batch.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor


class ExampleOrder:
    """Which item each example of a run is.

    Args:
        n_items: N, at least 1.
        seed: at least 0.
        device: where the numbers are wanted; they are drawn on the host, so every device has the
            same order.
    """

    def __init__(self, n_items: int, *, seed: int, device: torch.device | str = "cpu") -> None:
        if n_items < 1:
            raise ValueError(f"an order needs at least one item, got {n_items}")
        if seed < 0:
            raise ValueError(f"The loader's seed must not be negative, got {seed}.")
        self.n_items = n_items
        self.seed = seed
        self.device = torch.device(device)
        self._epochs: dict[int, Tensor] = {}

    def numbers(self, first_example: int, count: int) -> Tensor:
        """(count,) int64 on the device: the items that these examples of the run are.

        Raises:
            ValueError: a negative ``first_example``, or a ``count`` below 1.
        """
        if first_example < 0 or count < 1:
            raise ValueError(
                f"A batch needs first_example >= 0 and count >= 1, got {first_example} and {count}."
            )
        parts: list[Tensor] = []
        position, stop = first_example, first_example + count
        while position < stop:
            epoch, offset = divmod(position, self.n_items)
            taken = min(self.n_items - offset, stop - position)
            parts.append(self._epoch(epoch)[offset : offset + taken])
            position += taken
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def _epoch(self, epoch: int) -> Tensor:
        """(N,) int64: the order of an epoch. The two latest are kept: a batch may straddle them."""
        order = self._epochs.get(epoch)
        if order is None:
            rng = np.random.default_rng([self.seed, epoch])
            order = torch.from_numpy(rng.permutation(self.n_items)).to(self.device)
            while len(self._epochs) >= 2:
                del self._epochs[next(iter(self._epochs))]
            self._epochs[epoch] = order
        return order
