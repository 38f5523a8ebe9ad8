"""Properties of conversion: scenes come back, goals keep their pose."""

import tempfile
from pathlib import Path

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from cmpolicy_data import ReplayBuffer
from cmpolicy_data.convert.goals import absolute_actions
from cmpolicy_data.convert.scenes import read_scenes, write_scenes
from cmpolicy_envs.rotations import axis_angle_to_matrix, matrix_to_axis_angle, rot6d_to_matrix


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
