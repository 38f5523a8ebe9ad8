"""From a store of demonstrations to a policy's training and validation batches."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from cmpolicy.experiment.config import DataConfig, PolicyConfig, TrainConfig, parse_rotation
from cmpolicy.experiment.data_checks import (
    ACTION,
    check_finite,
    check_normalize,
    check_state,
    fingerprint,
    report,
    told_apart,
)
from cmpolicy.experiment.protocols import Simulator
from cmpolicy.experiment.sources import find_source
from cmpolicy.normalize import Normalizer
from cmpolicy.schema import ConfigError
from cmpolicy.spec import PolicySpec, Rotation
from cmpolicy.training.loader import DeviceLoader
from cmpolicy_data import (
    EpisodeSplit,
    ReplayBuffer,
    WindowIndex,
    split_episodes,
    window_index,
)
from cmpolicy_data.demonstrations import Demonstrations, load_demonstrations
from cmpolicy_data.report import decision_steps
from cmpolicy_data.statistics import KeyStatistics
from cmpolicy_data.windows import WindowError, min_episode_length

_ARM = 10  # numbers of an absolute action per arm: position 3, 6-D rotation 6, gripper 1


@dataclass(frozen=True)
class TrainingData:
    """Arrays in env units, the windows of all their episodes, and which of these train.

    Attributes:
        source: names the data set without the machine's own folders.
        simulator: what the store says of the one it was recorded in.
        control_hz: actions per second.
        pad_loss: whether padded actions are trained on.
        rotations: of the action; None where nothing is known.
        fingerprint: tells whether other data is the same: a hash per episode, and the shapes.
        n_stored: episodes of the store, where ``data.episodes`` chooses among them.
        n_short: episodes shorter than a window.
        times: (E,) how often the windows of each episode come in an epoch; None: once.
        normalize, clamp_actions: see ``data.normalize`` and ``data.clamp_actions``.
        span_before: :attr:`target_span` of the run that goes on, if it noted that.
    """

    arrays: Demonstrations
    windows: WindowIndex
    split: EpisodeSplit
    source: str
    simulator: Simulator = field(default_factory=Simulator)
    control_hz: float | None = None
    pad_loss: bool = True
    rotations: tuple[Rotation, ...] | None = None
    fingerprint: Mapping[str, Any] = field(default_factory=dict)
    n_stored: int | None = None
    n_short: int = 0
    n_paused: int = 0
    normalize: Mapping[str, Any] = field(default_factory=lambda: {"default": "auto"})
    clamp_actions: bool = True
    times: npt.NDArray[np.int64] | None = None
    span_before: npt.NDArray[np.float64] | None = None

    @property
    def summary(self) -> str:
        """How much there is, and which of it training uses; one line."""
        ends, windows = self.arrays.episode_ends, self.windows
        n_chosen, held_out = len(np.unique(self.arrays.source_episode)), len(self.split.val_ids)
        of = f" (data.episodes: {n_chosen} of {self.n_stored})" if self.n_stored else ""
        short = f"; {self.n_short} are shorter than a window" if self.n_short else ""
        paused = f"; {self.n_paused} steps of pauses are left out" if self.n_paused else ""
        used = decision_steps(ends, windows.episode, windows.obs[:, -1])
        return (
            f"{self.source}: {len(ends)} episodes{of}, {held_out} of them held out{short}"
            f"{paused}; {used}"
        )

    @property
    def precise(self) -> tuple[str, ...]:
        """Observation keys that float32 does not resolve."""
        return tuple(k for k, v in self.arrays.obs.items() if v.dtype == np.float64)

    def spec(self, config: PolicyConfig) -> PolicySpec:
        """Inputs and outputs of a policy on this data."""
        return PolicySpec(
            obs={key: tuple(value.shape[1:]) for key, value in self.arrays.obs.items()},
            action_dim=self.arrays.action.shape[1],
            horizon=config.horizon,
            n_obs_steps=config.n_obs_steps,
            n_action_steps=config.n_action_steps,
            action_rotations=self.rotations,
            images=self.arrays.images,
            resize=config.resize,
            precise=self.precise,
        )

    def normalizer(self) -> Normalizer:
        """Fitted to the training episodes."""
        rows = np.unique(self.windows.select(self.split.train_ids).action)
        named = {key: value[rows] for key, value in self.arrays.numbers.items()}
        spans, limits = {}, {}
        for key, values in named.items():
            statistics = KeyStatistics.of(values)
            method = self.normalize.get(key, self.normalize["default"])
            spans[key] = statistics.span(method)
            glitches = method != "minmax" and bool(statistics.n_outliers.any())
            if glitches or (key == ACTION and self.clamp_actions):
                limits[key] = statistics.span("minmax" if method == "minmax" else "auto")
        unchanged = {}
        if self.simulator.actions == "absolute":
            unchanged[ACTION] = ~is_position(self.arrays.action.shape[1])
        origins = {
            key: np.asarray((spans[key][0] + spans[key][1]) / 2)
            for key, values in named.items()
            if values.dtype == np.float64
        }
        return Normalizer.fit(named, unchanged, spans=spans, limits=limits, origins=origins)

    def loader(
        self,
        *,
        batch_size: int,
        seed: int,
        device: torch.device,
        n_augment: int = 0,
        forget: float = 0.0,
    ) -> DeviceLoader | None:
        """Batches of the training episodes; None where there are none."""
        windows = self.windows.select(self.split.train_ids)
        if self.times is not None:
            windows = windows.repeat(self.times)
        if len(windows) == 0:
            return None
        return DeviceLoader(
            self.arrays.obs,
            self.arrays.action,
            windows,
            batch_size=batch_size,
            seed=seed,
            device=device,
            n_augment=n_augment,
            precise=self.precise,
            targets=self.targets,
            forget=forget,
        )

    def held_out(self, loader: DeviceLoader, batch_size: int) -> DeviceLoader | None:
        """Batches of the held-out episodes, beside a loader of these data; None: no such."""
        windows = self.windows.select(self.split.val_ids)
        return loader.of(windows, batch_size=batch_size) if len(windows) else None

    @cached_property
    def target_span(self) -> npt.NDArray[np.float64] | None:
        """What ``data.targets`` are scaled by: see :meth:`Demonstrations.target_span`."""
        if self.span_before is not None:
            return self.span_before
        return self.arrays.target_span(self.windows.select(self.split.train_ids).obs)

    @cached_property
    def targets(self) -> npt.NDArray[np.float32] | None:
        """All of ``data.targets``, scaled; see :meth:`Demonstrations.scaled_targets`."""
        span = self.target_span
        return None if span is None else self.arrays.scaled_targets(span)

    def with_held_out_of(
        self, before: Mapping[str, Any], val_fraction: float, seed: int
    ) -> TrainingData:
        """The same data, holding out what a run before held out, and as much of the new episodes.

        Targets keep the scaling of that run, which its features learned to tell them in.

        Args:
            before: :attr:`facts` of that run. Episodes are known by their content.
            val_fraction, seed: see :func:`split_episodes`.
        """
        if not before.get("data"):
            return self
        span = before.get("target_span")  # the oldest runs did not note it
        span_before = None if span is None else np.array(span, np.float64)
        split = self._split_like(before, val_fraction, seed)
        return replace(self, split=split, span_before=span_before)

    def _split_like(
        self, before: Mapping[str, Any], val_fraction: float, seed: int
    ) -> EpisodeSplit:
        if before["data"] == self.fingerprint:  # as it was, also where an episode is there twice
            both = np.r_[self.split.train_ids, self.split.val_ids]
            val = np.array(before.get("val_episodes", ()), np.int64)
            return EpisodeSplit(np.setdiff1d(both, val), val)
        old, now = (
            told_apart(before["data"]["episodes"]),
            told_apart(self.fingerprint["episodes"]),
        )
        held_out = {old[i] for i in before.get("val_episodes", ())}
        source = dict(zip(now, self.arrays.source_episode.tolist(), strict=True))
        chosen = set(source.values())
        kept = {source[key] for key in held_out & source.keys()}
        new = np.array(sorted(chosen - {source[key] for key in source.keys() & set(old)}), np.int64)
        if len(new) > 1:
            kept |= set(new[split_episodes(len(new), val_fraction, seed).val_ids])
        val, train = (np.array(sorted(s), np.int64) for s in (kept, chosen - kept))
        return self.arrays.expand(EpisodeSplit(train_ids=train, val_ids=val))

    @property
    def fingerprint_digest(self) -> str:
        """One hash of all of the data."""
        text = json.dumps(dict(self.fingerprint), sort_keys=True)
        return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()

    @property
    def facts(self) -> dict[str, Any]:
        """What a resumed run has to find unchanged: the data, and how its episodes are used.

        Those that train are named as often as their windows come in an epoch.
        """
        train = self.split.train_ids
        times: Any = 1 if self.times is None else self.times[train]
        return {
            "data": dict(self.fingerprint),
            "val_episodes": self.split.val_ids.tolist(),
            "train_episodes": np.repeat(train, times).tolist(),
            "target_span": None if self.target_span is None else self.target_span.tolist(),
        }


def load_training_data(config: TrainConfig) -> TrainingData:
    """Read the store that a run trains on.

    Raises:
        ValueError, FileNotFoundError: what is wrong with the store or with the keys asked of it.
    """
    data = config.data
    path, source, obs = find_source(data)
    buffer = ReplayBuffer.open(path, missing_chunks=data.missing_chunks)
    chosen = chosen_episodes(buffer, data.episodes)
    arrays = load_demonstrations(
        path,
        obs,
        data.action,
        data.augment,
        targets=data.targets,
        episodes=None if data.episodes is None else chosen,
        image_memory=data.image_memory,
        missing_chunks=data.missing_chunks,
    )
    check_normalize(data.normalize, arrays)
    states = {key: value for key, value in arrays.obs.items() if key not in arrays.images}
    for key, values in {**states, **arrays.targets}.items():
        check_state(key, values, path)
        check_finite(key, values, arrays, path)
    check_finite(data.action, arrays.action, arrays, path)
    n_steps, found = len(arrays.action), fingerprint(arrays)
    if data.max_pause is not None:
        arrays = arrays.without_pauses(data.max_pause)
    texts = buffer.attrs.get("tasks")
    one_each = isinstance(texts, list) and len(texts) == buffer.n_episodes
    tasks = [str(texts[episode]) for episode in chosen] if texts and one_each else []
    report(arrays, path, data, tasks)
    sizes = {
        "horizon": config.policy.horizon,
        "n_obs_steps": config.policy.n_obs_steps,
        "n_action_steps": config.policy.n_action_steps,
    }
    try:
        windows = window_index(arrays.episode_ends, **sizes, short_episodes=data.short_episodes)
    except WindowError as error:
        raise ConfigError(f"{path}: {error}") from error
    parts = split_episodes(len(chosen), data.val_fraction, config.seed)
    split = arrays.expand(EpisodeSplit(chosen[parts.train_ids], chosen[parts.val_ids]))
    attrs = buffer.attrs
    simulator = Simulator.from_mapping(attrs)
    lengths = np.diff(arrays.episode_ends, prepend=0)
    return TrainingData(
        arrays,
        windows,
        split,
        source,
        simulator,
        control_hz=_control_hz(config, attrs),
        pad_loss=simulator.actions != "delta" if data.pad_loss is None else data.pad_loss,
        rotations=_rotations(data, attrs, simulator, arrays.action.shape[1]),
        fingerprint=found,
        n_stored=None if data.episodes is None else buffer.n_episodes,
        n_paused=n_steps - len(arrays.action),
        n_short=int((lengths < min_episode_length(**sizes)).sum()),
        normalize={"default": "auto", **data.normalize},
        clamp_actions=data.clamp_actions,
        times=None if data.weights is None else _times(buffer, data.weights, arrays),
    )


def chosen_episodes(buffer: ReplayBuffer, episodes: Any) -> npt.NDArray[np.int64]:
    """Numbers of the stored episodes that ``data.episodes`` names, sorted.

    Raises:
        ConfigError: numbers that are not there, or none.
        ReplayBufferError: the store knows no such name.
    """
    n = buffer.n_episodes
    if episodes is None:
        return np.arange(n, dtype=np.int64)
    if isinstance(episodes, str):
        found = np.flatnonzero(buffer.per_episode(episodes)).astype(np.int64)
    else:
        if not all(0 <= episode < n for episode in episodes):
            raise ConfigError(f"data.episodes={list(episodes)}: {buffer.path} has 0 to {n - 1}")
        found = np.unique(np.asarray(episodes, dtype=np.int64))
    if not found.size:
        raise ConfigError(f"data.episodes={episodes} names no episode of {buffer.path}")
    return found


def _times(buffer: ReplayBuffer, name: str, arrays: Demonstrations) -> npt.NDArray[np.int64]:
    weights = buffer.per_episode(name)
    whole = weights.astype(np.int64)
    if (whole != weights).any() or (whole < 0).any():
        raise ConfigError(
            f"data.weights={name}: meta/{name} of {buffer.path} must hold whole numbers from 0 on: "
            "how often the windows of an episode come in an epoch"
        )
    times: npt.NDArray[np.int64] = whole[arrays.source_episode]
    if not times.any():
        raise ConfigError(
            f"data.weights={name}: meta/{name} of {buffer.path} is 0 for all episodes"
            f"{'' if whole.any() == times.any() else ' that data.episodes chooses'}: nothing would "
            "be trained on; give some of them 1 or more"
        )
    return times


def is_position(size: int) -> npt.NDArray[np.bool_]:
    """(A,) true where an absolute action holds a position; per arm [position, rotation 6, gripper].

    Rotations and gripper are in [-1, 1] already, and stretching a rotation's entries apart would
    weigh its small ones more than its large ones.

    Raises:
        ConfigError: ``size`` is not a multiple of 10.
    """
    if size % _ARM:
        raise ConfigError(
            f"absolute actions are 10 numbers per arm (position, 6-D rotation, gripper), got {size}"
        )
    return np.tile(np.arange(_ARM) < 3, size // _ARM)


def _control_hz(config: TrainConfig, attrs: Mapping[str, Any]) -> float | None:
    """The rate that the user gave, else what the store says.

    Raises:
        ConfigError: neither says anything, or the store says something that is no rate.
    """
    if config.control_hz is not None:
        return config.control_hz
    stored = attrs.get("control_hz")
    if stored is None:
        raise ConfigError(
            "control_hz is not set: give the rate at which the demonstrations were recorded, in "
            "actions per second, such as control_hz=20. It is saved with the policy, so that a "
            "robot is not driven at another rate"
        )
    if not isinstance(stored, int | float) or not stored > 0:
        raise ConfigError(f"the store says control_hz={stored!r}; give control_hz=<rate>")
    return float(stored)


def _rotations(
    data: DataConfig, attrs: Mapping[str, Any], simulator: Simulator, size: int
) -> tuple[Rotation, ...] | None:
    if data.action_rotations is not None:
        return tuple(parse_rotation(text) for text in data.action_rotations)
    if data.action != ACTION:  # what the store says is of its key of that name
        return None
    if attrs.get("action_rotations") is not None:
        return tuple(parse_rotation(str(text)) for text in attrs["action_rotations"])
    if simulator.actions == "delta":
        return ()  # relative commands, small and around zero: they may be averaged
    if simulator.actions == "absolute":
        arms = range(0, size, _ARM)
        return tuple(Rotation("rotation_6d", tuple(range(a + 3, a + 9))) for a in arms)
    return None
