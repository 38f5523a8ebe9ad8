"""From a store to the arrays that training eats: selectors applied, episodes doubled if asked."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from cmpolicy_data import augment as augmenting
from cmpolicy_data.augment import AugmentError, Episodes
from cmpolicy_data.chunks import MissingChunks, ReplayBufferError
from cmpolicy_data.frames import (
    load_frames,
    looks_grey_or_four,
    looks_like_frames,
    select_frames,
)
from cmpolicy_data.replay_buffer import ReplayBuffer
from cmpolicy_data.selector import Selector
from cmpolicy_data.statistics import KeyStatistics
from cmpolicy_data.windows import EpisodeSplit

#: What a number may change in a pause, as a share of its range: a hand at rest trembles.
STILL = 1e-3
_SWITCH = 16


@dataclass(frozen=True)
class Demonstrations:
    """Aligned arrays of a whole data set.

    Attributes:
        obs: policy key -> (N, ...). action: (N, A) float32.
        episode_ends: (E,) int64.
        source_episode: (E,) int64, the stored episode that each one is or mirrors.
        images: keys of ``obs`` that hold frames, (N, H, W, 3) uint8.
        targets: (N, ...) by key, numbers that a policy learns to tell but does not see.
    """

    obs: dict[str, npt.NDArray[Any]]
    action: npt.NDArray[np.float32]
    episode_ends: npt.NDArray[np.int64]
    source_episode: npt.NDArray[np.int64]
    images: tuple[str, ...] = ()
    targets: dict[str, npt.NDArray[Any]] = field(default_factory=dict)

    @property
    def numbers(self) -> dict[str, npt.NDArray[Any]]:
        """All that is no image: observation keys, and ``action``."""
        states = {key: value for key, value in self.obs.items() if key not in self.images}
        return {**states, "action": self.action}

    @property
    def tells_pauses(self) -> bool:
        """Whether pauses can be told: frames always differ a little, and actions may be goals."""
        return len(self.numbers) > 1 or bool(self.targets)

    def without_pauses(self, longest: int) -> Demonstrations:
        """Without the steps of each pause beyond its first ``longest``.

        A pause lasts while no number, actions and targets included, is farther than :data:`STILL`
        of its range from where it was when the pause began. A few values out of all bounds do not
        set the range, and columns that only jitter, as of a joint that is never used, are not
        looked at. Nothing is lost between the steps that are left.

        Raises:
            ValueError: nothing but frames is observed, see :attr:`tells_pauses`.
        """
        if not self.tells_pauses:
            raise ValueError(
                f"data.max_pause={longest} needs numbers that tell a pause from a motion, and only "
                f"frames are observed ({', '.join(self.images)}): an action may be a goal that "
                "stays while the arm travels to it. Add the robot's state to data.obs or "
                "data.targets, or leave data.max_pause out"
            )
        numbers = {**self.numbers, **self.targets}
        flat = [v.reshape(len(v), -1).astype(np.float64) for v in numbers.values()]
        rows = np.concatenate(flat, axis=1)
        steady = ~_jitters(rows)
        rows = rows[:, steady] if steady.any() else rows
        low, high = KeyStatistics.of(rows).span("auto")
        reach = np.maximum(STILL * (high - low), np.finfo(np.float64).tiny)
        rows, starts = rows / reach, {0, *self.episode_ends.tolist()}
        keep = np.ones(len(rows), bool)
        began = 0
        for step in range(len(rows)):
            if step in starts or np.abs(rows[step] - rows[began]).max() > 1:
                began = step
            keep[step] = step - began <= longest
        kept = np.r_[0, np.cumsum(keep)]
        return replace(
            self,
            obs={
                key: select_frames(value, keep) if key in self.images else value[keep]
                for key, value in self.obs.items()
            },
            targets={key: value[keep] for key, value in self.targets.items()},
            action=self.action[keep],
            episode_ends=kept[self.episode_ends].astype(np.int64),
        )

    def target_span(self, rows: npt.NDArray[np.int64]) -> npt.NDArray[np.float64] | None:
        """Ends of the range of all targets over the given rows, (2, D); None of none.

        As for observations (``data.normalize=auto``), a few values out of all bounds do not set it.
        """
        if not self.targets:
            return None
        return np.stack(KeyStatistics.of(self._flat_targets()[np.unique(rows)]).span("auto"))

    def scaled_targets(self, span: npt.NDArray[np.float64]) -> npt.NDArray[np.float32]:
        """All targets side by side, (N, D), the span as -1 and 1; what is beyond 2 is cut."""
        low, high = span
        half = np.where(high > low, (high - low) / 2, 1.0)
        scaled = (self._flat_targets() - (low + high) / 2) / half
        return scaled.clip(-2, 2).astype(np.float32)

    def _flat_targets(self) -> npt.NDArray[np.float64]:
        flat = [v.reshape(len(v), -1).astype(np.float64) for v in self.targets.values()]
        return np.concatenate(flat, axis=1)

    def expand(self, split: EpisodeSplit) -> EpisodeSplit:
        """A split of the stored episodes as one of these: mirror images stay with their source."""
        return EpisodeSplit(
            train_ids=np.flatnonzero(np.isin(self.source_episode, split.train_ids)),
            val_ids=np.flatnonzero(np.isin(self.source_episode, split.val_ids)),
        )


def _jitters(rows: npt.NDArray[np.float64]) -> npt.NDArray[np.bool_]:
    """Which columns of (N, D) are noise: a step says little of the next one.

    White noise has a correlation of 0 from one step to the next, and what moves has nearly 1.
    Columns of few different values are switches, whose pulses are short.
    """
    switch = np.array([len(np.unique(column)) <= _SWITCH for column in rows.T], bool)
    middle = np.median(rows, axis=0)
    away = np.clip(rows - middle, *np.percentile(rows - middle, (1, 99), axis=0))  # no glitches
    away -= away.mean(axis=0)
    power = (away**2).mean(axis=0)
    return ~switch & (power > 0) & ((away[1:] * away[:-1]).mean(axis=0) < 0.5 * power)


@dataclass(frozen=True)
class _Source:
    """Where an observation comes from: see ``data.obs``."""

    selector: Selector
    kind: str | None = None
    layout: str | None = None

    @classmethod
    def read(cls, given: str | Mapping[str, str]) -> _Source:
        if isinstance(given, str):
            return cls(Selector.parse(given))
        selector, kind = Selector.parse(given["key"]), given.get("kind")
        if kind == "image" and not selector.is_whole:
            raise ValueError(
                f"data.obs: {given['key']!r} takes a part of each step, and frames are whole: "
                f"write key: {selector.key} (encoder.crop crops)"
            )
        return cls(selector, kind, given.get("layout"))

    def is_image(self, buffer: ReplayBuffer) -> bool:
        key = self.selector.key
        if self.kind is not None or not self.selector.is_whole:
            return self.kind == "image"
        if key not in buffer:
            return _can_render(buffer, key)
        array = buffer[key]  # of frames in other channels the error names the conversion
        return self.layout == "chw" or looks_like_frames(array) or looks_grey_or_four(array)


#: Key of Push-T's frames in the public demonstrations; rendered where a store lacks it.
_PUSHT_FRAMES = "img"
_ARENA = 512.0  # px


def _check_keys(
    buffer: ReplayBuffer, sources: Mapping[str, _Source], obs: Mapping[str, object]
) -> None:
    """Say which setting names a key that the store lacks.

    Raises:
        ReplayBufferError: a key that is not there and cannot be rendered.
    """
    for key, source in sources.items():
        stored = source.selector.key
        there = stored in buffer or stored in buffer.unreadable or _can_render(buffer, stored)
        if buffer.n_episodes and not there:
            setting = "obs" if key in obs else "targets"
            raise ReplayBufferError(
                f"{buffer.path} has no key {stored!r} under data/ (keys: "
                f"{', '.join(buffer.keys())}), which data.{setting} names; say what it is called "
                f"there, data.{setting}.{key}=<key>, or name the keys that are wanted, "
                f"data.{setting}=[...]"
            )


def _can_render(buffer: ReplayBuffer, key: str) -> bool:
    """Whether a key stands for Push-T's frames, and the store holds Push-T's demonstrations."""
    if key != _PUSHT_FRAMES:
        return False
    wanted: dict[str, tuple[int, ...]] = {"state": (5,), "action": (2,), "keypoint": (9, 2)}
    if key in buffer:  # frames of another size are of another camera
        wanted[key] = (96, 96, 3)
    if any(name not in buffer or buffer[name].shape[1:] != s for name, s in wanted.items()):
        return False
    places = np.concatenate([buffer.load("state[:4]"), buffer.load("action")], axis=1)
    return bool(((places >= 0) & (places <= _ARENA)).all())  # px; other arms have five numbers too


def load_demonstrations(
    path: str | Path,
    obs: Mapping[str, str | Mapping[str, str]] | Sequence[str],
    action: str = "action",
    augment: Sequence[str] = (),
    *,
    targets: Mapping[str, str | Mapping[str, str]] | Sequence[str] = (),
    episodes: npt.NDArray[np.int64] | None = None,
    image_memory: float = 4.0,
    missing_chunks: MissingChunks = "auto",
) -> Demonstrations:
    """Load what a policy is trained on.

    Args:
        path: of the store.
        obs: policy key -> selector (or ``{key, kind, layout}``, see ``data.obs``), or a list of
            keys (then key = selector).
        action: selector of the actions.
        augment: transformations of the demonstrations, applied in this order: names of
            :data:`~cmpolicy_data.augment.AUGMENTATIONS` (those that come with cmpolicy are of
            Push-T). Push-T's frames are then rendered from the transformed states.
        targets: as ``obs``, numbers alone, under keys of their own.
        episodes: increasing numbers of the stored episodes that are wanted; None: all. The frames
            of others are not read.
        image_memory: GiB of frames that are kept in memory, see ``frames``.
        missing_chunks: what a chunk that is not there means, see ``ReplayBuffer.open``.

    Raises:
        FileNotFoundError, ReplayBufferError, SelectorError: see ``ReplayBuffer``.
        AugmentError: an unknown name, or data that it cannot work on.
        ValueError: no observations, actions that are no vectors, or targets that are frames or
            observations as well.
    """
    if isinstance(obs, str) or not obs:
        raise ValueError(
            f"data.obs must name at least one observation, as a list ([state]) or as policy key: "
            f"selector ({{agent_pos: 'state[:2]'}}); got {obs!r}."
        )
    named = obs if isinstance(obs, Mapping) else {key: key for key in obs}
    told = targets if isinstance(targets, Mapping) else {key: key for key in targets}
    buffer = ReplayBuffer.open(path, missing_chunks=missing_chunks)
    sources = {key: _Source.read(given) for key, given in {**named, **told}.items()}
    _check_keys(buffer, sources, named)
    images = {key for key, source in sources.items() if source.is_image(buffer)}
    if unfit := [key for key in told if key in images or key in named]:
        raise ValueError(
            f"data.targets={unfit}: targets are numbers that the policy does not see; frames and "
            "keys of data.obs cannot be among them"
        )
    chosen = {key: s.selector for key, s in sources.items() if key not in images}
    chosen_action = Selector.parse(action)
    number, rows = np.arange(buffer.n_episodes, dtype=np.int64), None
    lengths = np.diff(buffer.episode_ends, prepend=0)
    if episodes is not None:
        rows = np.flatnonzero(np.isin(np.repeat(number, lengths), episodes))
        number = episodes
    ends = np.cumsum(lengths[number])

    def load(selector: str) -> npt.NDArray[Any]:
        values = buffer.load(selector)
        return values if rows is None else values[rows]

    if augment:
        needed = {chosen_action.key, *(s.key for s in chosen.values())}
        needed |= {key for key in ("state", "action") if key in buffer}  # Push-T's need the whole
        whole = Episodes({key: load(key) for key in needed}, ends, number)
        for name in augment:
            whole = augmenting.augment(whole, name)
        arrays = {key: s.take(whole.data[s.key]) for key, s in chosen.items()}
        actions = chosen_action.take(whole.data[chosen_action.key])
        ends, number = whole.episode_ends, whole.source
        states = whole.data.get("state")
    else:
        arrays = {key: load(str(s)) for key, s in chosen.items()}
        actions, states = load(action), None
    for key in images:
        source = sources[key]
        stored = source.selector.key
        if augment and not _can_render(buffer, stored):
            raise AugmentError(
                f"data.augment={list(augment)} cannot transform the frames of {stored!r}; only "
                f"Push-T's ({_PUSHT_FRAMES}) are rendered again from the transformed states."
            )
        if stored in buffer and states is None:
            memory = image_memory / len(images)
            arrays[key] = load_frames(
                buffer, stored, layout=source.layout, memory=memory, rows=rows
            )
        else:
            if not _can_render(buffer, stored):
                buffer.check(stored)  # raises, where it is not there
            from cmpolicy_data.convert.pusht_frames import render_pusht_frames  # the simulator

            shown = load("state") if states is None else states
            arrays[key] = render_pusht_frames(shown, memory=image_memory)
    if actions.ndim != 2:
        raise ValueError(
            f"{path}: the actions ({action}) have shape {actions.shape[1:]} per step; a policy "
            "predicts vectors, so they must be stored as (N, A)."
        )
    return Demonstrations(
        {key: arrays[key] for key in named},
        actions.astype(np.float32, copy=False),
        ends,
        number,
        images=tuple(key for key in named if key in images),
        targets={key: arrays[key] for key in told},
    )
