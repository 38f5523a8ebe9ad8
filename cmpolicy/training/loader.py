"""Training batches from data that lives on the training device.

A low-dimensional data set is a few megabytes, so it is copied to the device once and every batch
is gathered there by precomputed row numbers: no worker processes, no host copies per step.

The order of data is a pure function of (seed, example counter), see :mod:`cmpolicy.training.order`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from cmpolicy.policy.policy import Batch
from cmpolicy.training.order import ExampleOrder


class Windows(Protocol):
    """What the loader needs of a window table (``cmpolicy_data.WindowIndex`` has it)."""

    @property
    def obs(self) -> npt.NDArray[np.int64]: ...  # (W, To)
    @property
    def action(self) -> npt.NDArray[np.int64]: ...  # (W, T)
    @property
    def action_is_pad(self) -> npt.NDArray[np.bool_]: ...  # (W, T)


class DeviceLoader:
    """Batches of windows, gathered on ``device`` (see the module docstring).

    Args:
        obs: arrays (N, ...) by observation key. uint8 (images) stays uint8; all else is float32.
        action: (N, A).
        windows: row numbers of W windows.
        batch_size: examples of one whole (global) batch.
        seed: of the order of the data.
        device: where the data lives.

    Raises:
        ValueError: lengths that differ, rows outside the data, no windows, or a bad batch size.
    """

    def __init__(
        self,
        obs: Mapping[str, npt.NDArray[np.generic]],
        action: npt.NDArray[np.generic],
        windows: Windows,
        *,
        batch_size: int,
        seed: int,
        device: torch.device | str = "cpu",
    ) -> None:
        if batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, got {batch_size}.")
        if not obs:
            raise ValueError("The loader got no observations: name at least one key in data.obs.")
        n_windows = int(windows.action.shape[0])
        if n_windows == 0:
            raise ValueError("There are no training windows: the data has no episodes to train on.")
        for key, value in {**obs, "action": action}.items():
            if value.shape[0] != action.shape[0]:
                raise ValueError(
                    f"{key!r} has {value.shape[0]} steps but 'action' has {action.shape[0]}: every "
                    "array must have one row per step."
                )
        top = max(int(windows.obs.max()), int(windows.action.max()))
        if top >= action.shape[0]:
            raise ValueError(
                f"A window refers to row {top}, but the data has only {action.shape[0]} rows: the "
                "windows were made from other episode_ends than the data's."
            )
        self.batch_size = batch_size
        self.seed = seed
        self.device = torch.device(device)
        self.n_windows = n_windows
        self._obs = {key: self._resident(value) for key, value in obs.items()}
        self._action = self._resident(action)
        self._obs_rows = torch.from_numpy(np.ascontiguousarray(windows.obs)).to(self.device)
        self._action_rows = torch.from_numpy(np.ascontiguousarray(windows.action)).to(self.device)
        self._is_pad = torch.from_numpy(np.ascontiguousarray(windows.action_is_pad)).to(self.device)
        self._order = ExampleOrder(n_windows, seed=seed, device=self.device)

    @property
    def action_range(self) -> float:
        """Largest minus smallest action in env units, root mean square over the dimensions."""
        span = self._action.amax(0) - self._action.amin(0)
        return float(span.square().mean().sqrt())

    def batch(self, first_example: int, count: int | None = None) -> Batch:
        """The ``count`` examples of the run from ``first_example`` on (default: a whole batch).

        Rank r of R takes ``batch(first + r * share, share)`` with ``share = batch_size // R``; the
        shares side by side are exactly ``batch(first)``. Batches may straddle epochs.
        """
        size = self.batch_size if count is None else count
        return self.gather(self.window_numbers(first_example, size))

    def window_numbers(self, first_example: int, count: int) -> Tensor:
        """(count,) int64 on the device: the windows that these examples of the run are."""
        return self._order.numbers(first_example, count)

    def gather(self, window_numbers: Tensor) -> Batch:
        """The batch of the given windows ((B,) int64 on the device)."""
        obs_rows = self._obs_rows.index_select(0, window_numbers)
        action_rows = self._action_rows.index_select(0, window_numbers)
        return {
            "obs": {key: _take(value, obs_rows) for key, value in self._obs.items()},
            "action": _take(self._action, action_rows),
            "action_is_pad": self._is_pad.index_select(0, window_numbers),
        }

    def _resident(self, value: npt.NDArray[np.generic]) -> Tensor:
        keep = value if value.dtype == np.uint8 else value.astype(np.float32)
        return torch.from_numpy(np.array(keep, order="C")).to(self.device)


def _take(data: Tensor, rows: Tensor) -> Tensor:
    """data (N, ...) at rows (B, K) -> (B, K, ...)."""
    return data.index_select(0, rows.reshape(-1)).reshape(*rows.shape, *data.shape[1:])
