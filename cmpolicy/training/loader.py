"""Training batches, gathered by precomputed row numbers: no worker processes.

Numbers are a few megabytes and live on the training device. Camera frames stay uint8: on the
device where they fit into half of its free memory, else on the host (in memory or mapped from a
file), from where each batch's frames go to the device once. They are cropped there, by the encoder.

The order of data (:mod:`cmpolicy.training.order`), the numbers that augment frames and the choice
of the examples that forget are pure functions of (seed, example counter), so a resumed run sees
what it would have seen.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Collection, Mapping
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from cmpolicy.policy.policy import Batch
from cmpolicy.schema import at_least
from cmpolicy.training.order import ExampleOrder

#: Added to a seed it gives an order that is independent of the seed's own.
_LOTS = 1 << 33


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
        obs: arrays (N, ...) by observation key: uint8 frames, all else becomes float32.
        action: (N, A) float32.
        windows: row numbers of W windows.
        batch_size: examples of one whole (global) batch.
        seed: of the order of the data.
        device: of the batches.
        n_augment: uniform numbers per example that augment its frames, 0 for none.
        precise: keys of ``obs`` that become float64 instead.
        targets: (N, D) float32, what the features of each step are to tell, or None.
        forget: share in [0, 1] of each epoch's examples whose earlier observations are replaced by
            the newest one.

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
        n_augment: int = 0,
        precise: Collection[str] = (),
        targets: npt.NDArray[np.float32] | None = None,
        forget: float = 0.0,
    ) -> None:
        if not obs:
            raise ValueError("The loader got no observations: name at least one key in data.obs.")
        for key, value in {**obs, "action": action}.items():
            if value.shape[0] != action.shape[0]:
                raise ValueError(
                    f"{key!r} has {value.shape[0]} steps but 'action' has {action.shape[0]}: every "
                    "array must have one row per step."
                )
        self.seed = seed
        self.device = torch.device(device)
        self.n_augment = n_augment
        self._forget = forget
        self._obs = {key: self._placed(value, key in precise) for key, value in obs.items()}
        self._action = self._placed(action)
        self._targets = None if targets is None else self._placed(targets)
        self._set_windows(windows, batch_size)

    def of(self, windows: Windows, *, batch_size: int) -> DeviceLoader:
        """Batches of other windows of the same data, without augmentation.

        The data stays where it is: frames may fill half of a device, and would not fit there twice.
        """
        other = copy.copy(self)
        other.n_augment, other._forget = 0, 0.0
        other._set_windows(windows, batch_size)
        return other

    def _set_windows(self, windows: Windows, batch_size: int) -> None:
        at_least("batch_size", batch_size, 1)
        n_windows = int(windows.action.shape[0])
        if n_windows == 0:
            raise ValueError("There are no training windows: the data has no episodes to train on.")
        top = max(int(windows.obs.max()), int(windows.action.max()))
        n_rows = len(self._action)
        if top >= n_rows:
            raise ValueError(
                f"A window refers to row {top}, but the data has only {n_rows} rows: the windows "
                "were made from other episode_ends than the data's."
            )
        self.batch_size = batch_size
        self.n_windows = n_windows
        self._obs_rows = torch.from_numpy(np.ascontiguousarray(windows.obs)).to(self.device)
        self._action_rows = torch.from_numpy(np.ascontiguousarray(windows.action)).to(self.device)
        self._is_pad = torch.from_numpy(np.ascontiguousarray(windows.action_is_pad)).to(self.device)
        self._order = ExampleOrder(n_windows, seed=self.seed, device=self.device)
        self._lots = ExampleOrder(n_windows, seed=self.seed + _LOTS, device=self.device)

    def batch(self, first_example: int, count: int | None = None) -> Batch:
        """The ``count`` examples of the run from ``first_example`` on (default: a whole batch).

        Rank r of R takes ``batch(first + r * share, share)`` with ``share = batch_size // R``; the
        shares side by side are exactly ``batch(first)``. Batches may straddle epochs.
        """
        size = self.batch_size if count is None else count
        forgets = None
        if self._forget:
            lots = self._lots.numbers(first_example, size)
            forgets = lots < self._forget * self.n_windows
        batch = self.gather(self.window_numbers(first_example, size), forgets)
        if self.n_augment:
            numbers = augment_numbers(self.seed, first_example, size, self.n_augment)
            batch["augment"] = torch.from_numpy(numbers).to(self.device)
        return batch

    def window_numbers(self, first_example: int, count: int) -> Tensor:
        """(count,) int64 on the device: the windows that these examples of the run are."""
        return self._order.numbers(first_example, count)

    def gather(self, window_numbers: Tensor, forgets: Tensor | None = None) -> Batch:
        """The batch of the given windows ((B,) int64 on the device).

        Those that are True in ``forgets`` (B,) bool see the newest observation To times.
        """
        obs_rows = self._obs_rows.index_select(0, window_numbers)
        if forgets is not None:
            obs_rows = torch.where(forgets[:, None], obs_rows[:, -1:], obs_rows)
        action_rows = self._action_rows.index_select(0, window_numbers)
        batch: Batch = {
            "obs": {key: _take(value, obs_rows) for key, value in self._obs.items()},
            "action": _take(self._action, action_rows),
            "action_is_pad": self._is_pad.index_select(0, window_numbers),
        }
        if self._targets is not None:
            batch["targets"] = _take(self._targets, obs_rows)
        return batch

    def _placed(self, value: npt.NDArray[np.generic], precise: bool = False) -> Tensor:
        """A key's values where they stay during training."""
        if value.dtype != np.uint8:
            dtype = np.float64 if precise else np.float32
            return torch.from_numpy(np.array(value, dtype, order="C")).to(self.device)
        frames = torch.from_numpy(_writable(value))  # without a copy: frames may be gigabytes
        if self.device.type != "cuda" or frames.nbytes > torch.cuda.mem_get_info()[0] // 2:
            return frames
        return frames.to(self.device)


def augment_numbers(seed: int, first_example: int, count: int, n: int) -> npt.NDArray[np.float32]:
    """(count, n) uniform in [0, 1) for the examples from ``first_example`` on.

    Those of one example are the same in whatever batch it comes: a counter-based generator is set
    to the example's place (Salmon et al., SC 2011).
    """
    blocks = -(-n // 4)  # Philox makes four 64-bit numbers per step of its counter
    generator = np.random.Philox(key=seed, counter=first_example * blocks)
    bits = generator.random_raw(count * blocks * 4).reshape(count, blocks * 4)[:, :n]
    return ((bits >> np.uint64(40)) * 2.0**-24).astype(np.float32)


def _writable(value: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """The array as torch takes it without a warning: nothing here writes into it."""
    if value.flags.writeable and value.flags.c_contiguous:
        return value
    if value.flags.c_contiguous:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return torch.from_numpy(value).numpy()
    return np.ascontiguousarray(value)


def _take(data: Tensor, rows: Tensor) -> Tensor:
    """data (N, ...) at rows (B, K) -> (B, K, ...), on the device of the rows."""
    here = rows.reshape(-1).to(data.device)
    found = data.index_select(0, here).reshape(*rows.shape, *data.shape[1:])
    if found.device == rows.device:
        return found
    return found.pin_memory().to(rows.device, non_blocking=True)
