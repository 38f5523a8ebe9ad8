"""robomimic's own rollout tool drives the tasks."""

import json
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

pytest.importorskip("robosuite", reason="needs the extra cmpolicy[robomimic]")
pytest.importorskip("robomimic", reason="needs the extra cmpolicy[robomimic]")

from robomimic.algo.algo import RolloutPolicy
from robomimic.utils.train_utils import run_rollout

from cmpolicy_envs.robomimic_args import default_env_args
from cmpolicy_envs.robomimic_base import RobomimicEnvBase


class Lower(RolloutPolicy):  # type: ignore[misc]  # robomimic has no types
    """Lowers the gripper; keeps what it was shown."""

    def __init__(self) -> None:
        self.seen: list[dict[str, np.ndarray]] = []

    def start_episode(self) -> None:
        self.seen.clear()

    def __call__(self, ob: dict[str, np.ndarray], goal: Any = None) -> np.ndarray:
        self.seen.append(ob)
        return np.array([0, 0, -1.0, 0, 0, 0, -1])


@pytest.fixture(scope="module")
def env() -> Iterator[RobomimicEnvBase]:
    metadata = json.loads(default_env_args("can").to_json())
    made = RobomimicEnvBase.from_metadata(metadata)
    yield made
    made.close()


def test_robomimics_rollout_runs(env: RobomimicEnvBase) -> None:
    policy = Lower()
    result = run_rollout(policy, env, horizon=4)
    assert result == {"Return": 0.0, "Horizon": 4, "Success_Rate": 0.0}
    assert len(policy.seen) == 4
    assert {"object", "robot0_eef_pos", "robot0_joint_vel"} <= set(policy.seen[0])
    heights = [seen["robot0_eef_pos"][2] for seen in policy.seen]
    assert (np.diff(heights) < 0).all()


def test_states_and_seeds(env: RobomimicEnvBase) -> None:
    first = env.reset(seed=2)
    state = env.get_state()
    env.step(np.ones(7))
    restored = env.reset_to(state)
    assert restored is not None
    for key, value in first.items():
        np.testing.assert_array_equal(restored[key], value)
    np.testing.assert_array_equal(env.reset(seed=2)["object"], first["object"])
    with pytest.raises(ValueError, match="needs 'states' beside 'model'"):
        env.reset_to({"model": state["model"]})


def test_what_it_says_of_itself(env: RobomimicEnvBase) -> None:
    assert (env.name, env.type, env.action_dimension) == ("PickPlaceCan", 1, 7)
    assert env.is_success() == {"task": False}
    assert not env.is_done()
    assert json.loads(json.dumps(env.serialize()))["env_version"] == env.version
    assert env.rollout_exceptions
    with pytest.raises(ValueError, match="only 'rgb_array' is supported"):
        env.render()


def test_there_are_no_goals(env: RobomimicEnvBase) -> None:
    for ask in (env.get_goal, env.set_goal):
        with pytest.raises(NotImplementedError, match=r"without goals: train\.goal_mode null"):
            ask()


def test_what_cannot_be_made() -> None:
    kwargs = dict(default_env_args("can").env_kwargs)
    with pytest.raises(ValueError, match="'Door' is no task of Robomimic"):
        RobomimicEnvBase("Door", **kwargs)
    with pytest.raises(ValueError, match="there is no window"):
        RobomimicEnvBase("PickPlaceCan", render=True, **kwargs)
    with pytest.raises(ValueError, match="square and of one size"):
        RobomimicEnvBase("PickPlaceCan", use_image_obs=True, camera_heights=[1, 2], **kwargs)
