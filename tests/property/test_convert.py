"""Properties of conversion: scenes come back, states keep their joints, goals keep their pose."""

import tempfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from cmpolicy_data import ReplayBuffer
from cmpolicy_data.convert.goals import absolute_actions
from cmpolicy_data.convert.human import Joint, move_states
from cmpolicy_data.convert.recorded_env import RecordedEnvError
from cmpolicy_data.convert.scenes import read_scenes, write_scenes
from cmpolicy_envs.rotations import axis_angle_to_matrix, matrix_to_axis_angle, rot6d_to_matrix

KINDS = {"hinge": (1, 1), "ball": (4, 3), "free": (7, 6)}
joints = st.lists(
    st.builds(
        lambda name, kind: Joint(name, *KINDS[kind]),
        st.text("abc", min_size=1, max_size=3),
        st.sampled_from(sorted(KINDS)),
    ),
    min_size=1,
    max_size=5,
    unique_by=lambda joint: joint.name,
)


@settings(max_examples=25)
@given(st.lists(st.text(max_size=20), min_size=1, max_size=8).filter(any))
def test_scenes_come_back(models: list[str]):
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "x.zarr"
        buffer = ReplayBuffer.create(path)
        buffer.append_episode({"action": np.ones((2, 1))})
        write_scenes(path, models)
        assert read_scenes(path, len(models)) == models
        assert ReplayBuffer.open(path).n_episodes == 1


@given(joints, st.randoms(use_true_random=False), st.integers(1, 4))
def test_states_keep_what_belongs_to_a_joint(recorded: list[Joint], random, length: int):
    wanted = random.sample(recorded, len(recorded))
    n_qpos = sum(joint.n_qpos for joint in recorded)
    size = 1 + n_qpos + sum(joint.n_qvel for joint in recorded)
    states = np.random.default_rng(0).normal(size=(length, size))
    moved = move_states(states, recorded, wanted, "test")
    assert moved.shape == states.shape
    np.testing.assert_array_equal(moved[:, 0], states[:, 0] - states[0, 0])

    def parts(values: np.ndarray, order: list[Joint]) -> dict[str, np.ndarray]:
        found, at, at_vel = {}, 1, 1 + n_qpos
        for joint in order:
            found[joint.name] = np.concatenate(
                [values[:, at : at + joint.n_qpos], values[:, at_vel : at_vel + joint.n_qvel]], 1
            )
            at, at_vel = at + joint.n_qpos, at_vel + joint.n_qvel
        return found

    before, after = parts(states, recorded), parts(moved, wanted)
    for name, values in before.items():
        np.testing.assert_array_equal(after[name], values)


def test_states_of_other_scenes():
    one = [Joint("a", 1, 1), Joint("b", 7, 6)]
    with pytest.raises(RecordedEnvError, match=r"test: .* lacks the joints c and has b more"):
        move_states(np.zeros((2, 16)), one, [Joint("a", 1, 1), Joint("c", 1, 1)], "test")
    with pytest.raises(RecordedEnvError, match=r"states have shape \(2, 15\); its scene has 16"):
        move_states(np.zeros((2, 15)), one, one, "test")


@given(hnp.arrays(np.float64, st.tuples(st.integers(1, 5), st.just(14)), elements=st.floats(-3, 3)))
def test_absolute_actions_keep_the_pose(goals: np.ndarray):
    arms = absolute_actions(goals).reshape(len(goals), 2, 10)
    before = goals.reshape(len(goals), 2, 7)
    np.testing.assert_array_equal(arms[..., :3], before[..., :3])
    np.testing.assert_array_equal(arms[..., 9], before[..., 6])
    rotation = rot6d_to_matrix(arms[..., 3:9])
    np.testing.assert_allclose(rotation, axis_angle_to_matrix(before[..., 3:6]), atol=1e-12)
    angle = np.linalg.norm(matrix_to_axis_angle(rotation), axis=-1)
    assert (angle <= np.pi + 1e-9).all()
