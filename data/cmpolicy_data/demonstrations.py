"""From a store to the arrays that training eats: selectors applied, episodes doubled if asked."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from cmpolicy_data.augment import Episodes, augmentation
from cmpolicy_data.replay_buffer import ReplayBuffer
from cmpolicy_data.selector import Selector
from cmpolicy_data.windows import EpisodeSplit


@dataclass(frozen=True)
class Demonstrations:
    """Aligned arrays of a whole data set.

    Attributes:
        obs: policy key -> (N, ...). action: (N, A) float32.
        episode_ends: (E,) int64.
        source_episode: (E,) int64, the stored episode that each one is or mirrors.
    """

    obs: dict[str, npt.NDArray[Any]]
    action: npt.NDArray[np.float32]
    episode_ends: npt.NDArray[np.int64]
    source_episode: npt.NDArray[np.int64]

    def expand(self, split: EpisodeSplit) -> EpisodeSplit:
        """A split of the stored episodes as one of these: mirror images stay with their source."""
        return EpisodeSplit(
            train_ids=np.flatnonzero(np.isin(self.source_episode, split.train_ids)),
            val_ids=np.flatnonzero(np.isin(self.source_episode, split.val_ids)),
        )


def load_demonstrations(
    path: str | Path,
    obs: Mapping[str, str] | Sequence[str],
    action: str = "action",
    augment: Sequence[str] = (),
) -> Demonstrations:
    """Load what a policy is trained on.

    Args:
        path: of the store.
        obs: policy key -> selector, or a list of keys (then key = selector).
        action: selector of the actions.
        augment: transformations of the demonstrations, applied in this order: names of
            :data:`~cmpolicy_data.augment.AUGMENTATIONS` (Push-T only; they need the key ``state``).

    Raises:
        FileNotFoundError, ReplayBufferError, SelectorError: see ``ReplayBuffer``.
        AugmentError: an unknown name, or data that is not Push-T's.
        ValueError: no observations, or actions that are no vectors.
    """
    selectors = dict(obs) if isinstance(obs, Mapping) else {key: key for key in obs}
    if isinstance(obs, str) or not selectors:
        raise ValueError(
            f"data.obs must name at least one observation, as a list ([state]) or as policy key: "
            f"selector ({{agent_pos: 'state[:2]'}}); got {obs!r}."
        )
    buffer = ReplayBuffer.open(path)
    source = np.arange(buffer.n_episodes, dtype=np.int64)
    if not augment:
        arrays = {key: buffer.load(text) for key, text in selectors.items()}
        actions, ends = buffer.load(action), buffer.episode_ends
    else:
        chosen = {key: Selector.parse(text) for key, text in selectors.items()}
        chosen_action = Selector.parse(action)
        needed = {"state", "action", chosen_action.key, *(s.key for s in chosen.values())}
        episodes = Episodes({key: buffer.load(key) for key in needed}, buffer.episode_ends, source)
        for name in augment:
            episodes = augmentation(name)(episodes)
        arrays = {
            key: selector.take(episodes.data[selector.key]) for key, selector in chosen.items()
        }
        actions = chosen_action.take(episodes.data[chosen_action.key])
        ends, source = episodes.episode_ends, episodes.source
    if actions.ndim != 2:
        raise ValueError(
            f"{path}: the actions ({action}) have shape {actions.shape[1:]} per step; a policy "
            "predicts vectors, so they must be stored as (N, A)."
        )
    return Demonstrations(arrays, actions.astype(np.float32, copy=False), ends, source)
