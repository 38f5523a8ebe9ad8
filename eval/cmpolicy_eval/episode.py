"""One episode at the pace of action chunks: history in, whole chunks executed, results out."""

import math
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import gymnasium
import numpy as np
from gymnasium.spaces import Dict
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


class BadObservationError(ValueError):
    """An environment gave something that is no observation or no reward."""


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
        space = env.observation_space
        self._shapes = {k: s.shape for k, s in space.items()} if isinstance(space, Dict) else {}

    def reset(self, seed: int, options: dict[str, Any] | None) -> ChunkOutcome:
        """Start the episode of ``seed``."""
        self._length = 0
        observation = self._checked(self.env.reset(seed=seed, options=options)[0])
        self._history.extend([observation] * (self._history.maxlen or 1))
        # the largest reward, which may be below 0: every episode that is scored has a step
        self._done, self._success, self._score, self._length = False, False, -math.inf, 0
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
            self._length += 1
            self._history.append(self._checked(observation))
            if not math.isfinite(reward):
                raise BadObservationError(f"step {self._length}: the reward is {reward}")
            self._score = max(self._score, float(reward))
            self._success = self._success or bool(info["is_success"])
            self._done = bool(terminated or truncated) or self._length >= self._max_steps
            if self._done:
                break
        return self._outcome()

    def close(self) -> None:
        self.env.close()

    def _checked(self, observation: Any) -> Mapping[str, Array]:
        """An observation of the form that the environment declares, with finite numbers."""
        at = f"step {self._length}: the observation"
        if not isinstance(observation, Mapping):
            raise BadObservationError(f"{at} is a {type(observation).__name__}, expected a mapping")
        for key, shape in self._shapes.items():
            if key not in observation:
                raise BadObservationError(
                    f"{at} lacks the key {key!r}; it has {sorted(map(str, observation))}"
                )
            value = np.asarray(observation[key])
            if value.shape != shape:
                raise BadObservationError(
                    f"{at} {key!r} has shape {value.shape}; the environment declares {shape}"
                )
            if value.dtype.kind == "f" and not np.isfinite(value).all():
                raise BadObservationError(f"{at} {key!r} holds NaN or infinite numbers")
        # copies: an environment may give views of a state that it goes on to change
        return {key: np.array(value) for key, value in observation.items()}

    def _outcome(self) -> ChunkOutcome:
        keys = self._history[-1]
        obs = {key: np.stack([o[key] for o in self._history]) for key in keys}
        return ChunkOutcome(obs, self._done, self._score, self._success, self._length)
