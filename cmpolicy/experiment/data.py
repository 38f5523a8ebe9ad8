"""From a store of demonstrations to a policy's training and validation batches."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from cmpolicy.experiment.protocols import Simulator
from cmpolicy.normalize import Normalizer
from cmpolicy.schema import ConfigError
from cmpolicy.spec import PolicySpec
from cmpolicy.train.config import PolicyConfig, TrainConfig
from cmpolicy.train.loader import DeviceLoader
from cmpolicy_data import (
    EpisodeSplit,
    ReplayBuffer,
    WindowIndex,
    split_episodes,
    window_index,
)
from cmpolicy_data.catalog import resolve
from cmpolicy_data.demonstrations import Demonstrations, load_demonstrations
from cmpolicy_data.windows import WindowError

ACTION = "action"


@dataclass(frozen=True)
class TrainingData:
    """Arrays in env units, the windows of all their episodes, and which of these train.

    ``source`` names the data set without the machine's own folders; ``simulator`` is what the store
    says of the one it was recorded in.
    """

    arrays: Demonstrations
    windows: WindowIndex
    split: EpisodeSplit
    source: str
    simulator: Simulator = field(default_factory=Simulator)

    def spec(self, config: PolicyConfig) -> PolicySpec:
        """What a policy on this data eats and gives."""
        return PolicySpec(
            obs={key: tuple(value.shape[1:]) for key, value in self.arrays.obs.items()},
            action_dim=self.arrays.action.shape[1],
            horizon=config.horizon,
            n_obs_steps=config.n_obs_steps,
            n_action_steps=config.n_action_steps,
        )

    def normalizer(self) -> Normalizer:
        """Fitted to the training episodes."""
        rows = np.unique(self.windows.select(self.split.train_ids).action)
        named = {**self.arrays.obs, ACTION: self.arrays.action}
        unchanged = {}
        if self.simulator.actions == "absolute":
            unchanged[ACTION] = ~is_position(self.arrays.action.shape[1])
        return Normalizer.fit({key: value[rows] for key, value in named.items()}, unchanged)

    def loader(
        self, *, train: bool, batch_size: int, seed: int, device: torch.device
    ) -> DeviceLoader | None:
        """Batches of the training or of the held-out episodes; None where none are held out."""
        episodes = self.split.train_ids if train else self.split.val_ids
        if len(episodes) == 0:
            return None
        return DeviceLoader(
            self.arrays.obs,
            self.arrays.action,
            self.windows.select(episodes),
            batch_size=batch_size,
            seed=seed,
            device=device,
        )


def load_training_data(config: TrainConfig) -> TrainingData:
    """Read the store that a run trains on.

    Raises:
        ValueError, FileNotFoundError: what is wrong with the store or with the keys asked of it.
    """
    data = config.data
    if data.path is None and data.name == "custom":
        raise ConfigError(
            "data.path is not set: give the store to train on, data.path=my.zarr; its layout is "
            "data/<key> (N, ...) and meta/episode_ends (E,)"
        )
    path = resolve(data.name, data.path)
    arrays = load_demonstrations(path, data.obs, data.action, data.augment)
    for key, values in arrays.obs.items():
        _check_finite(data.obs[key], values, path)
    _check_finite(data.action, arrays.action, path)
    sizes = config.policy
    try:
        windows = window_index(
            arrays.episode_ends,
            horizon=sizes.horizon,
            n_obs_steps=sizes.n_obs_steps,
            n_action_steps=sizes.n_action_steps,
        )
    except WindowError as error:
        raise ConfigError(f"{path}: {error}") from error
    stored = int(arrays.source_episode.max()) + 1
    split = arrays.expand(split_episodes(stored, data.val_fraction, config.seed))
    named = data.path is None or data.name == "pusht_human"  # else a store of the user's own
    simulator = Simulator.from_mapping(ReplayBuffer.open(path).attrs)
    return TrainingData(arrays, windows, split, data.name if named else path.name, simulator)


def is_position(size: int) -> npt.NDArray[np.bool_]:
    """(A,) true where an absolute action holds a position; per arm [position, rotation 6, gripper].

    Rotations and gripper are in [-1, 1] already, and stretching a rotation's entries apart would
    weigh its small ones more than its large ones.

    Raises:
        ConfigError: ``size`` is not a multiple of 10.
    """
    if size % 10:
        raise ConfigError(
            f"absolute actions are 10 numbers per arm (position, 6-D rotation, gripper), got {size}"
        )
    return np.tile(np.arange(10) < 3, size // 10)


def _check_finite(selector: str, values: npt.NDArray[Any], path: Path) -> None:
    finite = np.isfinite(values).reshape(len(values), -1).all(axis=1)
    if not finite.all():
        bad = np.flatnonzero(~finite)
        raise ConfigError(
            f"{path}: {selector!r} holds NaN or inf at {bad.size} steps, the first is step "
            f"{int(bad[0])}; repair or remove them (`cmpolicy data validate {path}` lists them)"
        )
