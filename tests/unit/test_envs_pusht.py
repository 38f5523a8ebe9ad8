"""``cmpolicy/PushT-v0``: the physics of gym-pusht, the observation of the demonstrations."""

import warnings
from typing import Any

import gym_pusht  # noqa: F401  (registers gym_pusht/PushT-v0)
import gymnasium
import numpy as np
import pytest
from gymnasium.utils.env_checker import check_env

from cmpolicy_envs import PUSHT_ID, keypoints_from_pose
from cmpolicy_envs.coverage import GOAL_POSE, coverage

STATE = [120.0, 400.0, 230.0, 260.0, 1.1]


def make(**kwargs: Any) -> gymnasium.Env[Any, Any]:
    return gymnasium.make(PUSHT_ID, **kwargs)


def actions_near(block: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    return np.clip(block + rng.normal(0, 60, 2), 0, 512).astype(np.float32)


def test_gymnasium_finds_nothing_to_object_to() -> None:
    env = make(render_mode="rgb_array").unwrapped
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        check_env(env)
    texts = [str(w.message) for w in caught]
    # Actions are pixels, as in the data; the checker would rather have [-1, 1].
    assert [t for t in texts if "symmetric and normalized" not in t] == []


def test_steps_are_those_of_gym_pusht() -> None:
    ours, theirs = make(), gymnasium.make("gym_pusht/PushT-v0")
    rng = np.random.default_rng(0)
    covered = 0
    for seed, options in ((0, None), (1, {"reset_to_state": STATE})):
        _, info = ours.reset(seed=seed, options=options)
        state, _ = theirs.reset(seed=seed, options=options)
        np.testing.assert_array_equal(info["state"], state)
        for _ in range(200):
            action = actions_near(state[2:4], rng)
            obs, reward, terminated, truncated, info = ours.step(action)
            state, their_reward, their_end, their_cut, their_info = theirs.step(action)
            np.testing.assert_array_equal(info["state"], state)
            np.testing.assert_array_equal(obs["agent_pos"], state[:2].astype(np.float32))
            # GEOS itself differs in the last bit from process to process.
            assert info["coverage"] == pytest.approx(their_info["coverage"], abs=1e-12)
            assert reward == pytest.approx(their_reward, abs=1e-12)
            assert (terminated, truncated) == (their_end, their_cut)
            assert info["is_success"] == their_info["is_success"]
            covered += info["coverage"] > 0
    assert covered > 50  # else the comparison of coverages says nothing


def test_seeded_double_rollout_is_identical() -> None:
    def run() -> list[Any]:
        env = make()
        rng = np.random.default_rng(1)
        obs, info = env.reset(seed=5)
        trace = [(obs, info["coverage"])]
        for _ in range(100):
            obs, reward, terminated, _, info = env.step(
                actions_near(info["state"][2:4].astype(np.float32), rng)
            )
            trace.append((obs, reward, terminated, info["coverage"]))
        return trace

    first, second = run(), run()
    for a, b in zip(first, second, strict=True):
        np.testing.assert_array_equal(a[0]["keypoint"], b[0]["keypoint"])
        np.testing.assert_array_equal(a[0]["agent_pos"], b[0]["agent_pos"])
        assert a[1:] == b[1:]


def test_reaching_the_goal_ends_the_episode_with_reward_one() -> None:
    env = make()
    env.reset(seed=0)
    env.unwrapped.set_pose([30, 30, *GOAL_POSE])  # type: ignore[attr-defined]
    _, reward, terminated, truncated, info = env.step(np.array([30, 30], np.float32))
    assert info["coverage"] == pytest.approx(1.0, abs=1e-9)
    assert (reward, terminated, truncated, info["is_success"]) == (1.0, True, False, True)


def test_set_pose_is_the_inverse_of_the_recorded_state() -> None:
    env: Any = make().unwrapped
    env.reset(seed=0)
    env.set_pose(STATE)
    obs = env.get_obs()
    np.testing.assert_array_equal(obs["agent_pos"], np.float32(STATE[:2]))
    np.testing.assert_allclose(
        obs["keypoint"], keypoints_from_pose(STATE[2:4], STATE[4]), atol=1e-4
    )


def test_time_limit_is_300_steps() -> None:
    env = make()
    env.reset(seed=0)
    steps = 0
    truncated = False
    while not truncated:
        *_, truncated, _ = env.step(np.array([20, 20], np.float32))
        steps += 1
    assert steps == 300


def test_images_only_when_asked_for() -> None:
    plain, drawing = make(), make(render_mode="rgb_array", render_size=256)
    plain.reset(seed=0)
    drawing.reset(seed=0)
    assert plain.unwrapped.render() is None
    image: Any = drawing.render()
    assert image.shape == (256, 256, 3)
    assert image.dtype == np.uint8
    assert len(np.unique(image.reshape(-1, 3), axis=0)) > 3  # walls, goal, block, agent
    np.testing.assert_array_equal(
        drawing.unwrapped.action_pixels([[512, 256]]),  # type: ignore[attr-defined]
        [[256, 128]],
    )


@pytest.mark.parametrize(
    ("x", "y", "angle"), [(256, 256, 0.0), (300, 210, 2.5), (256, 320, -1.0), (190, 250, 0.8)]
)
def test_coverage_is_that_of_polygon_clipping(x: float, y: float, angle: float) -> None:
    env: Any = gymnasium.make("gym_pusht/PushT-v0").unwrapped
    env.reset(seed=0)
    env.block.angle = angle
    env.block.position = x, y
    assert coverage(x, y, angle, GOAL_POSE) == pytest.approx(env._get_coverage(), abs=1e-12)


def test_coverage_far_away_and_on_the_goal() -> None:
    assert coverage(20.0, 20.0, 0.0, GOAL_POSE) == 0.0
    assert coverage(*GOAL_POSE, GOAL_POSE) == pytest.approx(1.0, abs=1e-12)


def test_keypoints_take_any_leading_shape() -> None:
    rng = np.random.default_rng(0)
    xy, angle = rng.uniform(0, 512, (4, 3, 2)), rng.uniform(0, 6, (4, 3))
    many = keypoints_from_pose(xy, angle)
    assert many.shape == (4, 3, 9, 2)
    np.testing.assert_allclose(many[2, 1], keypoints_from_pose(xy[2, 1], angle[2, 1]))


def test_keypoints_say_which_shapes_they_want() -> None:
    with pytest.raises(ValueError, match=r"\(\.\.\., 2\).*got \(5, 3\) and \(5,\)"):
        keypoints_from_pose(np.zeros((5, 3)), np.zeros(5))


@pytest.mark.parametrize("action", [[1.0], [np.nan, 3.0], [1.0, 2.0, 3.0]])
def test_a_bad_action_is_an_error(action: list[float]) -> None:
    env = make().unwrapped
    env.reset(seed=0)
    with pytest.raises(ValueError, match="two finite numbers"):
        env.step(np.array(action))


def test_bad_reset_options_are_errors() -> None:
    env = make().unwrapped
    with pytest.raises(ValueError, match=r"reset_to_state needs five finite numbers.*\[1, 2\]"):
        env.reset(options={"reset_to_state": [1, 2]})
    with pytest.raises(ValueError, match="unknown reset option 'state'"):
        env.reset(options={"state": STATE})


def test_unknown_render_mode_is_an_error() -> None:
    with pytest.raises(ValueError, match="'human'"):
        make(render_mode="human", disable_env_checker=True)
