"""From a store to the arrays that training eats: selectors applied, episodes doubled if asked."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from cmpolicy_data.augment import mirror_pusht
from cmpolicy_data.replay_buffer import ReplayBuffer
from cmpolicy_data.selector import Selector
from cmpolicy_data.windows import EpisodeSplit

AUGMENTATIONS = ("mirror",)


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
    augment: str | None = None,
) -> Demonstrations:
    """Load what a policy is trained on.

    Args:
        path: of the store.
        obs: policy key -> selector, or a list of keys (then key = selector).
        action: selector of the actions.
        augment: None, or ``"mirror"`` (Push-T only; needs the key ``state``).

    Raises:
        FileNotFoundError, ReplayBufferError, SelectorError: see ``ReplayBuffer``.
        AugmentError: the data is not Push-T's.
        ValueError: no observations, actions that are no vectors, or an unknown augmentation.
    """
    selectors = dict(obs) if isinstance(obs, Mapping) else {key: key for key in obs}
    if isinstance(obs, str) or not selectors:
        raise ValueError(
            f"data.obs must name at least one observation, as a list ([state]) or as policy key: "
            f"selector ({{agent_pos: 'state[:2]'}}); got {obs!r}."
        )
    buffer = ReplayBuffer.open(path)
    if augment is None:
        arrays = {key: buffer.load(text) for key, text in selectors.items()}
        actions = buffer.load(action)
        ends, source = buffer.episode_ends, np.arange(buffer.n_episodes, dtype=np.int64)
    elif augment in AUGMENTATIONS:
        chosen = {key: Selector.parse(text) for key, text in selectors.items()}
        chosen_action = Selector.parse(action)
        needed = {"state", chosen_action.key, *(selector.key for selector in chosen.values())}
        mirrored = mirror_pusht({key: buffer.load(key) for key in needed}, buffer.episode_ends)
        arrays = {
            key: selector.take(mirrored.data[selector.key]) for key, selector in chosen.items()
        }
        actions = chosen_action.take(mirrored.data[chosen_action.key])
        ends, source = mirrored.episode_ends, np.tile(np.arange(buffer.n_episodes), 2)
    else:
        raise ValueError(
            f"Unknown augmentation {augment!r} (data.augment). Known: {', '.join(AUGMENTATIONS)}; "
            "null for none."
        )
    if actions.ndim != 2:
        raise ValueError(
            f"{path}: the actions ({action}) have shape {actions.shape[1:]} per step; a policy "
            "predicts vectors, so they must be stored as (N, A)."
        )
    return Demonstrations(arrays, actions.astype(np.float32, copy=False), ends, source)
