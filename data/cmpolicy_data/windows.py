"""Which rows of a replay buffer make one training window.

A window is anchored at a decision step ``t`` of one episode (To = ``n_obs_steps``, T = ``horizon``,
Ta = ``n_action_steps``; drawn for To = 2, T = 8, Ta = 4)::

    step           t-1    t   t+1  t+2  t+3  t+4  t+5  t+6
    observations    o     o                                   o[t-To+1 .. t]        (To)
    prediction      a     a    a    a    a    a    a    a     a[t-To+1 .. t-To+T]   (T)
    executed              x    x    x    x                    a[t .. t+Ta-1]        (Ta)

These are the semantics of Diffusion Policy (Chi et al. 2023, arXiv 2303.04137): windows may start
``To - 1`` steps before an episode and end ``Ta - 1`` steps after it, and further where that is
needed for every step whose Ta actions were recorded to be a decision step. What lies outside
repeats the first or last row of the same episode, so no window ever crosses an episode, and is
marked as padding.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt

Int64Array = npt.NDArray[np.int64]
BoolArray = npt.NDArray[np.bool_]


class WindowError(ValueError):
    """The episodes and the window sizes do not fit together."""


@dataclass(frozen=True)
class WindowIndex:
    """Row numbers of W windows, ordered by episode and then by time.

    Attributes:
        obs: (W, To) int64, rows of the observation history, oldest first.
        action: (W, T) int64, rows of the predicted actions; ``action[:, To - 1]`` is row t.
        action_is_pad: (W, T) bool, True where the action is a repeated edge of the episode.
        episode: (W,) int64, the episode that a window belongs to.
    """

    obs: Int64Array
    action: Int64Array
    action_is_pad: BoolArray
    episode: Int64Array

    def __len__(self) -> int:
        return int(self.episode.shape[0])

    def select(self, episodes: npt.ArrayLike) -> WindowIndex:
        """The windows of the given episodes (numbers), in their present order."""
        keep = np.isin(self.episode, np.asarray(episodes, dtype=np.int64))
        return WindowIndex(
            self.obs[keep], self.action[keep], self.action_is_pad[keep], self.episode[keep]
        )

    def repeat(self, times: npt.ArrayLike) -> WindowIndex:
        """Each window as many times, one after the other, as ``times`` (episodes,) says."""
        rows = np.repeat(np.arange(len(self)), np.asarray(times, dtype=np.int64)[self.episode])
        return WindowIndex(
            self.obs[rows], self.action[rows], self.action_is_pad[rows], self.episode[rows]
        )


@dataclass(frozen=True)
class EpisodeSplit:
    """Episode numbers for training and for validation: disjoint, sorted, together complete."""

    train_ids: Int64Array
    val_ids: Int64Array


def min_episode_length(*, horizon: int, n_obs_steps: int, n_action_steps: int) -> int:
    """Fewest steps with which an episode holds a window; a shorter one is short.

    That many steps before the end of an episode is the last decision step: its executed actions
    were recorded, and its window ends at most Ta - 1 steps after the episode unless T > 2 Ta.
    """
    return min(horizon - (n_obs_steps - 1) - (n_action_steps - 1), n_action_steps)


def check_episode_ends(episode_ends: npt.ArrayLike) -> Int64Array:
    """``episode_ends`` as (E,) int64, one past the last row of each episode.

    Raises:
        WindowError: not 1-D integers, empty, or not strictly increasing from above 0.
    """
    ends = np.asarray(episode_ends)
    if ends.ndim != 1 or (ends.size and not np.issubdtype(ends.dtype, np.integer)):
        raise WindowError(
            "episode_ends must be a 1-D array of integers (one past the last row of each episode), "
            f"got shape {ends.shape}, dtype {ends.dtype}."
        )
    if ends.size == 0:
        raise WindowError(
            "The data has no episodes (episode_ends is empty). Append at least one episode first."
        )
    ends = ends.astype(np.int64)
    lengths = np.diff(ends, prepend=0)
    if (lengths <= 0).any():
        bad = int(np.argmax(lengths <= 0))
        before = int(ends[bad - 1]) if bad else 0
        raise WindowError(
            f"episode_ends must increase strictly from above 0, but entry {bad} is "
            f"{int(ends[bad])} after {before}. `cmpolicy data validate` lists every such entry."
        )
    return ends


def window_index(
    episode_ends: npt.ArrayLike,
    *,
    horizon: int,
    n_obs_steps: int,
    n_action_steps: int,
    short_episodes: Literal["pad", "skip"] = "pad",
) -> WindowIndex:
    """Index table of every training window (timeline in the module docstring).

    Args:
        episode_ends: (E,) integers, one past the last row of each episode.
        horizon: T, predicted actions. n_obs_steps: To. n_action_steps: Ta, executed actions.
        short_episodes: ``pad`` gives an episode that is too short one window, filled up with its
            last row; ``skip`` gives it none.

    Raises:
        WindowError: sizes that contradict each other, bad ``episode_ends``, or no window at all.
    """
    sizes = {"horizon": horizon, "n_obs_steps": n_obs_steps, "n_action_steps": n_action_steps}
    for name, value in sizes.items():
        if value < 1:
            raise WindowError(f"{name} must be at least 1, got {value}.")
    needed_horizon = n_obs_steps - 1 + n_action_steps
    if horizon < needed_horizon:
        raise WindowError(
            f"horizon={horizon} is too short: it starts at the oldest of n_obs_steps={n_obs_steps} "
            f"observations and must reach past n_action_steps={n_action_steps} executed actions, "
            f"so it needs at least n_obs_steps - 1 + n_action_steps = {needed_horizon}."
        )
    ends = check_episode_ends(episode_ends)
    lengths = np.diff(ends, prepend=0)
    needed = min_episode_length(**sizes)
    # Episode e has counts[e] windows; window j of it starts at step j - (To - 1) of the episode.
    counts = np.maximum(lengths - needed + 1, 1 if short_episodes == "pad" else 0)
    if not counts.any():
        raise WindowError(
            f"all {ends.size} episodes are shorter than the {needed} steps that a window of "
            f"horizon={horizon}, n_obs_steps={n_obs_steps}, n_action_steps={n_action_steps} needs "
            "(data.short_episodes=skip); use data.short_episodes=pad, or a smaller n_action_steps."
        )
    episode = np.repeat(np.arange(ends.size, dtype=np.int64), counts)
    first_window = np.cumsum(counts) - counts
    start = np.arange(episode.size, dtype=np.int64) - first_window[episode] - (n_obs_steps - 1)
    steps = start[:, None] + np.arange(horizon, dtype=np.int64)  # (W, T), in the episode's own time
    last = lengths[episode][:, None] - 1
    inside = np.clip(steps, 0, last)
    rows = inside + (ends - lengths)[episode][:, None]
    return WindowIndex(
        obs=np.ascontiguousarray(rows[:, :n_obs_steps]),
        action=rows,
        action_is_pad=steps != inside,
        episode=episode,
    )


def split_episodes(n_episodes: int, val_fraction: float, seed: int) -> EpisodeSplit:
    """Split episodes (never windows: neighbours in time are near copies) at random.

    ``val_fraction`` of the episodes, rounded, at least one if above 0, are held out. A pure
    function of its arguments.

    Raises:
        WindowError: no episodes, a fraction outside [0, 1), or nothing left to train on.
    """
    if n_episodes < 1:
        raise WindowError(f"Cannot split {n_episodes} episodes: the data has no episodes.")
    if not 0.0 <= val_fraction < 1.0:
        raise WindowError(f"val_fraction must be at least 0 and below 1, got {val_fraction}.")
    n_val = 0 if val_fraction == 0.0 else max(1, round(n_episodes * val_fraction))
    if n_val >= n_episodes:
        raise WindowError(
            f"val_fraction={val_fraction} of {n_episodes} episodes leaves none to train on. "
            "Lower val_fraction (0 holds out nothing) or add episodes."
        )
    order = np.random.default_rng(seed).permutation(n_episodes).astype(np.int64)
    return EpisodeSplit(train_ids=np.sort(order[n_val:]), val_ids=np.sort(order[:n_val]))
