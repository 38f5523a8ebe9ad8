"""Push-T advanced by its 10 ms physics steps, for actions that come between two ticks.

Loads no torch: simulator processes import it.
"""

from __future__ import annotations

from typing import Any

import gymnasium
import numpy as np
from gymnasium import spaces
from numpy.typing import NDArray

from cmpolicy_envs.pusht import ARENA, PushTEnv

PHYSICS_HZ = 100
CONTROL_HZ = 10
SUBSTEPS = PHYSICS_HZ // CONTROL_HZ
"""Physics steps of one tick."""


def advance(env: PushTEnv, target: NDArray[Any], substeps: int) -> tuple[Any, float, bool, Any]:
    """Track ``target`` (2,) px for so many physics steps; observation, reward, success, info.

    ``SUBSTEPS`` of them are one step of the environment, bit for bit.
    """
    # gym-pusht makes int(1 / (dt * control_hz)) physics steps; the half guards against rounding.
    env.control_hz = 1 / (env.dt * (substeps + 0.5))
    observation, reward, success, _, info = env.step(target)
    return observation, reward, success, info


class LateActions(gymnasium.Env[Any, NDArray[np.float32]]):
    """Push-T whose action may arrive within a tick.

    The action is (5,): the number of physics steps that go by before the new target is there, in
    [0, 10); the target until then (x, y); the new target (x, y). Observation, reward and success
    are those at the end of the tick, as in ``cmpolicy/PushT-v0``.
    """

    def __init__(self) -> None:
        self._env = PushTEnv()
        self.observation_space = self._env.observation_space
        self.action_space = spaces.Box(0.0, ARENA, (5,), np.float32)

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[Any, dict[str, Any]]:
        return self._env.reset(seed=seed, options=options)

    def step(self, action: NDArray[np.float32]) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        late = round(float(action[0]))
        if late > 0:
            advance(self._env, action[1:3], late)
        observation, reward, success, info = advance(self._env, action[3:], SUBSTEPS - late)
        return observation, reward, success, False, info

    def close(self) -> None:
        self._env.close()
