"""The environment's observation against the human demonstrations."""

from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
import pytest

from cmpolicy_data import ReplayBuffer
from cmpolicy_envs import PUSHT_ID, keypoints_from_pose

# The recording took keypoints one physics step after the pose. Where the agent overlaps the block,
# the solver moves the block in that step; elsewhere it rests to 0.1 px.
N_MOVED = 58


@pytest.fixture(scope="module")
def demonstrations(pusht_human: Path) -> tuple[np.ndarray, np.ndarray]:
    store = ReplayBuffer.open(pusht_human)
    return store.load("state").astype(np.float64), store.load("keypoint").astype(np.float64)


def test_keypoints_of_the_data_follow_from_its_poses(
    demonstrations: tuple[np.ndarray, np.ndarray],
) -> None:
    state, recorded = demonstrations
    error = np.abs(keypoints_from_pose(state[:, 2:4], state[:, 4]) - recorded).max(axis=(1, 2))
    assert len(error) == 25_650
    assert np.sum(error > 0.1) == N_MOVED
    assert np.median(error) < 1e-4  # float32
    assert error.max() < 2.1


def test_replayed_states_give_the_recorded_observation(
    demonstrations: tuple[np.ndarray, np.ndarray],
) -> None:
    state, recorded = demonstrations
    moved = (
        np.abs(keypoints_from_pose(state[:, 2:4], state[:, 4]) - recorded).max(axis=(1, 2)) > 0.1
    )
    env: Any = gymnasium.make(PUSHT_ID).unwrapped
    for index in range(0, len(state), 97):
        if moved[index]:
            continue
        env.set_pose(state[index])
        obs = env.get_obs()
        np.testing.assert_allclose(obs["keypoint"], recorded[index], atol=0.1)
        np.testing.assert_allclose(obs["agent_pos"], state[index, :2], atol=1e-4)


def test_the_other_steps_are_one_physics_step_late(
    demonstrations: tuple[np.ndarray, np.ndarray],
) -> None:
    state, recorded = demonstrations
    error = np.abs(keypoints_from_pose(state[:, 2:4], state[:, 4]) - recorded).max(axis=(1, 2))
    env: Any = gymnasium.make(PUSHT_ID).unwrapped
    late = []
    for index in np.flatnonzero(error > 0.1):
        env.set_pose(state[index])
        # The solver finds the overlap in one step and moves the block in the next.
        env.space.step(env.dt)
        env.space.step(env.dt)
        late.append(np.abs(env.get_obs()["keypoint"] - recorded[index]).max())
    assert np.median(error[error > 0.1]) > 0.3
    assert np.median(late) < 0.06
    assert np.sum(np.array(late) > 0.1) < 12
