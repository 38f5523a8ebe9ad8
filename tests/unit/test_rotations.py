"""Rotations: against scipy, there and back, and where each form is ambiguous."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from scipy.spatial.transform import Rotation

from cmpolicy_envs.rotations import (
    axis_angle_to_matrix,
    canonical_quat,
    matrix_to_axis_angle,
    matrix_to_quat,
    matrix_to_rot6d,
    quat_to_matrix,
    rot6d_to_matrix,
)

VECTORS = hnp.arrays(np.float64, (3,), elements=st.floats(-3, 3))


def random_rotations(shape: tuple[int, ...], seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    rotations = Rotation.random(int(np.prod(shape)), random_state=seed)
    return rotations.as_quat().reshape(*shape, 4), rotations.as_matrix().reshape(*shape, 3, 3)


def test_any_leading_shape_and_scipy_agrees() -> None:
    quat, matrix = random_rotations((5, 2))
    np.testing.assert_allclose(quat_to_matrix(quat), matrix, atol=1e-14)
    np.testing.assert_allclose(quat_to_matrix(3 * quat), matrix, atol=1e-14)
    np.testing.assert_allclose(matrix_to_quat(matrix), canonical_quat(quat), atol=1e-14)
    vector = Rotation.from_matrix(matrix.reshape(-1, 3, 3)).as_rotvec().reshape(5, 2, 3)
    np.testing.assert_allclose(matrix_to_axis_angle(matrix), vector, atol=1e-13)
    np.testing.assert_allclose(axis_angle_to_matrix(vector), matrix, atol=1e-14)


def test_rot6d_is_the_first_two_rows() -> None:
    _, matrix = random_rotations((4,))
    rot6d = matrix_to_rot6d(matrix)
    np.testing.assert_array_equal(rot6d[2], [*matrix[2, 0], *matrix[2, 1]])
    np.testing.assert_allclose(rot6d_to_matrix(rot6d), matrix, atol=1e-14)


@given(hnp.arrays(np.float64, (6,), elements=st.floats(-2, 2)))
def test_what_a_network_predicts_becomes_a_rotation(rot6d: np.ndarray) -> None:
    first, second = rot6d[:3], rot6d[3:]
    if np.linalg.norm(np.cross(first, second)) < 1e-3:
        return
    matrix = rot6d_to_matrix(rot6d)
    np.testing.assert_allclose(matrix @ matrix.T, np.eye(3), atol=1e-9)
    assert np.linalg.det(matrix) == pytest.approx(1)
    np.testing.assert_allclose(matrix[0], first / np.linalg.norm(first), atol=1e-12)
    assert matrix[1] @ second > 0


@given(VECTORS)
def test_axis_angle_there_and_back(vector: np.ndarray) -> None:
    matrix = axis_angle_to_matrix(vector)
    again = matrix_to_axis_angle(matrix)
    assert np.linalg.norm(again) <= np.pi + 1e-12
    np.testing.assert_allclose(axis_angle_to_matrix(again), matrix, atol=1e-12)
    if np.linalg.norm(vector) < np.pi - 1e-3:
        np.testing.assert_allclose(again, vector, atol=1e-9)


@pytest.mark.parametrize("axis", [[1, 0, 0], [0, -1, 0], [0, 0, 1], [0.6, 0, -0.8]])
@pytest.mark.parametrize("angle", [0.0, 1e-13, 1e-8, np.pi - 1e-9, np.pi])
def test_small_angles_and_half_turns(axis: list[float], angle: float) -> None:
    vector = np.array(axis) * angle
    back = matrix_to_axis_angle(axis_angle_to_matrix(vector))
    assert np.linalg.norm(back) == pytest.approx(angle, abs=1e-7)
    np.testing.assert_allclose(
        axis_angle_to_matrix(back), Rotation.from_rotvec(vector).as_matrix(), atol=1e-12
    )


def test_both_signs_of_a_quaternion_become_one() -> None:
    quat, _ = random_rotations((50,))
    canonical = canonical_quat(quat)
    np.testing.assert_array_equal(canonical, canonical_quat(-quat))
    np.testing.assert_array_equal(np.abs(canonical), np.abs(quat))
    assert (canonical[:, 0] >= 0).all()
    np.testing.assert_array_equal(canonical_quat([-0.0, 0, -0.5, 0.5]), [0, 0, 0.5, -0.5])
    np.testing.assert_array_equal(canonical_quat([0, 0, 0, -1]), [0, 0, 0, 1])


def test_a_gripper_that_points_down_does_not_jump() -> None:
    # Turns about the vertical up to +-170 degrees, and a tilt that takes w through 0.
    yaw, tilt = np.meshgrid(np.linspace(-170, 170, 69), np.linspace(-4, 4, 9))
    down = Rotation.from_euler("x", 180, degrees=True)
    angles = np.stack([yaw.ravel(), tilt.ravel()], axis=-1)
    quat = (Rotation.from_euler("zx", angles, degrees=True) * down).as_quat().reshape(9, 69, 4)
    canonical = canonical_quat(quat)
    assert np.abs(np.diff(canonical, axis=0)).max() < 0.05
    assert np.abs(np.diff(canonical, axis=1)).max() < 0.05


def test_what_names_no_rotation_is_an_error() -> None:
    with pytest.raises(ValueError, match=r"rot6d_to_matrix: expected shape \(\.\.\., 6\), got"):
        rot6d_to_matrix(np.zeros(5))
    with pytest.raises(ValueError, match=r"\(\.\.\., 3, 3\)"):
        matrix_to_rot6d(np.zeros((3, 2)))
    with pytest.raises(ValueError, match="0 or parallel"):
        rot6d_to_matrix([1, 2, 3, 2, 4, 6])
    with pytest.raises(ValueError, match="length 0"):
        quat_to_matrix([0, 0, 0, 0])
