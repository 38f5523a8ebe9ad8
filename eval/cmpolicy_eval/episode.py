"""One episode at the pace of action chunks: history in, whole chunks executed, results out."""

from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import gymnasium
import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float32]
MakeEnv = Callable[[], gymnasium.Env[Any, Any]]


@dataclass(frozen=True)
class ChunkOutcome:
    """State of an episode after a reset or a chunk.

    ``obs`` maps keys to (To, ...), oldest first; ``score`` is the largest reward so far.
    """

    obs: Mapping[str, Array]
    done: bool
    score: float
    success: bool
    length: int


class ChunkedEpisode:
    """Runs chunks of actions in one environment and keeps the observation history.

    The history starts as To copies of the first observation (Diffusion Policy's padding).
    The episode ends when the environment says so or after ``max_steps`` steps, also within a chunk.
    """

    def __init__(self, env: gymnasium.Env[Any, Any], *, n_obs_steps: int, max_steps: int) -> None:
        self.env = env
        self._max_steps = max_steps
        self._history: deque[Mapping[str, Array]] = deque(maxlen=n_obs_steps)
        self._done = True
        self._score, self._success, self._length = 0.0, False, 0

    def reset(self, seed: int, options: dict[str, Any] | None) -> ChunkOutcome:
        """Start the episode of ``seed``."""
        observation, _ = self.env.reset(seed=seed, options=options)
        self._history.extend([observation] * (self._history.maxlen or 1))
        self._done, self._success, self._score, self._length = False, False, 0.0, 0
        return self._outcome()

    def step_chunk(self, actions: Array) -> ChunkOutcome:
        """Execute ``actions`` (Ta, A), stopping early where the episode ends.

        Raises:
            RuntimeError: the episode is over; finished environments stay as they are.
        """
        if self._done:
            raise RuntimeError("step_chunk on a finished episode; reset it first")
        for action in actions:
            observation, reward, terminated, truncated, info = self.env.step(action)
            self._history.append(observation)
            self._length += 1
            self._score = max(self._score, float(reward))
            self._success = self._success or bool(info["is_success"])
            self._done = bool(terminated or truncated) or self._length >= self._max_steps
            if self._done:
                break
        return self._outcome()

    def close(self) -> None:
        """Close the environment."""
        self.env.close()

    def _outcome(self) -> ChunkOutcome:
        keys = self._history[-1]
        obs = {key: np.stack([o[key] for o in self._history]) for key in keys}
        return ChunkOutcome(obs, self._done, self._score, self._success, self._length)
