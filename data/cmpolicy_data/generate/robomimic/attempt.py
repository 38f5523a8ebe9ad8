"""One attempt of an expert at a task, recorded."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from cmpolicy_data.generate.robomimic.can import CanExpert
from cmpolicy_data.generate.robomimic.lift import LiftExpert
from cmpolicy_data.generate.robomimic.motion import Array, Strays, Style
from cmpolicy_data.generate.robomimic.square import SquareExpert
from cmpolicy_data.robomimic_writer import Recording
from cmpolicy_envs.robomimic import RobomimicEnv, low_dim_keys
from cmpolicy_envs.robomimic_tasks import get_task

VERSION = 1
# Of the low-dimensional keys of robomimic's files, those that robosuite 1.5 gives.
_RECORDED = (*low_dim_keys(1), "robot0_gripper_qvel", "robot0_joint_pos", "robot0_joint_vel")
_TAIL = 5  # steps that are recorded after success, as people leave them
_ASSETS = re.compile(r'"[^"]*/(robosuite/models/assets/)')


class Expert(Protocol):
    """Acts in one episode."""

    def act(self, obs: Mapping[str, NDArray[Any]]) -> Array:
        """(7,) delta action for an observation."""


@dataclass(frozen=True)
class Skill:
    """How a task is demonstrated.

    Attributes:
        expert: who acts.
        patience: steps after which an attempt has failed.
        strays: where episodes begin that do not begin with the hand at rest.
    """

    expert: Callable[[Style, np.random.Generator], Expert]
    patience: int
    strays: Strays | None = None


SKILLS: dict[str, Skill] = {
    "lift": Skill(LiftExpert, 150),
    # Cans and handles are missed at times; who has seen nothing but perfect grasps then goes on
    # with an empty hand, or tries again where nothing is.
    "can": Skill(CanExpert, 300, Strays(0.5, (-0.05, -0.45, 0.92), (0.3, 0.45, 1.08))),
    "square": Skill(SquareExpert, 350, Strays(0.5, (-0.25, -0.1, 0.86), (0.3, 0.35, 1.05))),
}
"""Task -> its expert."""


def get_skill(task: str) -> Skill:
    """The skill of a task.

    Raises:
        ValueError: no such task, or one that no expert is written for.
    """
    skill = SKILLS.get(get_task(task).name)
    if skill is None:
        raise ValueError(
            f"There is no scripted expert for {task!r}, only for {', '.join(SKILLS)}. For other "
            "tasks there are people's demonstrations: cmpolicy data download robomimic."
        )
    return skill


@dataclass(frozen=True)
class Attempt:
    """What an attempt came to.

    Attributes:
        seed: that env and expert were started with.
        steps: how many it took.
        recording: None if it failed.
    """

    seed: int
    steps: int
    recording: Recording | None


class Demonstrator:
    """A simulator, and the expert of its task.

    An attempt is a function of task, seed and ``VERSION`` alone, whatever was attempted before.

    Raises:
        ValueError: no expert for the task.
        ModuleNotFoundError: robosuite is not installed; says how to install it.
    """

    def __init__(self, task: str) -> None:
        self._skill = get_skill(task)
        self.env = RobomimicEnv(task, keys=_RECORDED)

    def attempt(self, seed: int) -> Attempt:
        """Demonstrate from the start that ``seed`` gives."""
        env, rng = self.env, np.random.default_rng([VERSION, seed])
        expert = self._skill.expert(Style.draw(rng), rng)
        seen, _ = env.reset(seed=seed)
        if self._skill.strays is not None:
            # a stream of its own: episodes that do not stray are those of a task that has none
            for act in self._skill.strays.acts(np.random.default_rng([VERSION, seed, 1])):
                seen, *_ = env.step(act(seen))
        model = portable_model(env.get_state()["model"])
        obs, states = [self._observe()], []
        actions: list[Array] = []
        successes: list[bool] = []
        for _ in range(self._skill.patience + _TAIL):
            # Stores hold float32, so that is what is executed, and a replay is the same episode.
            action = expert.act(seen).astype(np.float32).astype(np.float64)
            states.append(env.sim.flat_state())
            seen, _, success, _, _ = env.step(action)
            actions.append(action)
            obs.append(self._observe())
            successes.append(success)
            if sum(successes) > _TAIL or (len(actions) == self._skill.patience and not success):
                break
        # A success that did not last is none.
        if not successes[-1]:
            return Attempt(seed, len(actions), None)
        succeeded = np.array(successes)
        recording = Recording(
            obs={key: np.array([step[key] for step in obs]) for key in _RECORDED},
            actions=np.array(actions),
            rewards=succeeded.astype(np.float64),
            dones=succeeded.astype(np.int64),
            states=np.array(states),
            model=model,
            attrs={"seed": seed},
        )
        return Attempt(seed, len(actions), recording)

    def close(self) -> None:
        self.env.close()

    def _observe(self) -> dict[str, Array]:
        # As robosuite gives them, float64 and of either sign: robomimic's files hold that.
        return self.env.sim.observe(_RECORDED)


def portable_model(xml: str) -> str:
    """A scene whose meshes are named from robosuite's folder on, wherever that is.

    robosuite finds them again on whatever machine the scene is loaded, and a file of
    demonstrations does not depend on where it was made.
    """
    return _ASSETS.sub(r'"\1', xml)
