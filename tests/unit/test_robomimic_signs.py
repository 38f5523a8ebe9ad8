"""The sign of quaternions that a gripper takes part in."""

import numpy as np

from cmpolicy_envs.robomimic_signs import canonical_observation
from cmpolicy_envs.robomimic_tasks import TASKS, get_task
from cmpolicy_envs.rotations import quat_to_matrix


def test_q_and_its_opposite_look_the_same_and_mean_the_same() -> None:
    rng = np.random.default_rng(0)
    for task in TASKS.values():
        value = rng.normal(size=(5, task.object_size)).astype(np.float32)
        other = value.copy()
        for begin in task.quats_to_hand:
            other[:, begin : begin + 4] *= -1
        ours = canonical_observation("object", value, task)
        np.testing.assert_array_equal(ours, canonical_observation("object", other, task))
        assert ours.dtype == np.float32
        touched = np.zeros(task.object_size, bool)
        for begin in task.quats_to_hand:
            touched[begin : begin + 4] = True
            quat = slice(begin, begin + 4)
            assert (ours[:, begin] > 0).all()
            np.testing.assert_allclose(
                quat_to_matrix(ours[:, quat]), quat_to_matrix(value[:, quat]), atol=1e-6
            )
        np.testing.assert_array_equal(ours[:, ~touched], value[:, ~touched])


def test_a_half_turned_hand_has_a_steady_sign() -> None:
    task = get_task("square")
    steps = np.zeros((2, task.object_size))
    steps[:, 3:7] = [[0.998, 0.05, 0.01, 1e-3], [-0.998, -0.05, -0.01, 1e-3]]  # w >= 0 both times
    first, second = canonical_observation("object", steps, task)[:, 3:7]
    assert np.abs(first - second).max() < 0.01
    hand = canonical_observation("robot0_eef_quat", steps[:, 3:7], task)
    np.testing.assert_array_equal(hand, canonical_observation("robot0_eef_quat", -hand, task))


def test_other_observations_and_other_sizes_are_left() -> None:
    square = get_task("square")
    value = -np.ones(14)
    for key, given in (("object", -np.ones(28)), ("robot0_eef_pos", -np.ones(3))):
        assert canonical_observation(key, given, square) is given
    assert canonical_observation("object", value, square) is not value
    assert (value == -1).all()
    assert canonical_observation("object", value[:10], get_task("lift")).size == 10
