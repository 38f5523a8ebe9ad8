"""Rotations in numpy: quaternions (x, y, z, w), axis-angle, matrices and the 6-D form.

Every function takes any leading shape ``(...)`` and computes in float64. The 6-D form is that of
Zhou et al., "On the Continuity of Rotation Representations in Neural Networks" (1812.07035), here
the first two *rows* of the matrix one after the other, as PyTorch3D lays it out: it is continuous,
which neither quaternions nor axis-angle are, so it is what policies predict.
"""

import numpy as np
from numpy.typing import ArrayLike, NDArray

Array = NDArray[np.float64]


def canonical_quat(quat: ArrayLike) -> Array:
    """The one of q and -q, which are the same rotation, with x >= 0.

    Where x is 0 the first of y, z, w that is not 0 is positive. The one rule for recorded and for
    simulated observations: a policy never sees a sign that its data could not hold. It goes by x,
    not by w: a Panda that points down has x = cos(yaw / 2) and w near 0, so that w would flip the
    sign at every small tilt, x only where the gripper is turned about by 180 degrees.

    Args:
        quat: (..., 4) quaternions (x, y, z, w), in the units they come in: not normalised here.

    Raises:
        ValueError: another shape.
    """
    q = _checked(quat, (4,), "canonical_quat")
    first = np.argmax(q != 0, axis=-1)  # the first that is not 0
    decides = np.take_along_axis(q, first[..., None], axis=-1)
    return np.where(decides < 0, -q, q) + 0.0  # + 0.0: no negative zeros


def quat_to_matrix(quat: ArrayLike) -> Array:
    """(..., 4) quaternions (x, y, z, w), not 0, of any length to (..., 3, 3) matrices.

    Raises:
        ValueError: another shape, or a quaternion of length 0.
    """
    q = _checked(quat, (4,), "quat_to_matrix")
    square = np.sum(q * q, axis=-1)
    if np.any(square == 0):
        raise ValueError("quat_to_matrix: a quaternion of length 0 is no rotation")
    x, y, z, w = np.moveaxis(q, -1, 0)
    s = 2.0 / square
    rows = (
        (1 - s * (y * y + z * z), s * (x * y - z * w), s * (x * z + y * w)),
        (s * (x * y + z * w), 1 - s * (x * x + z * z), s * (y * z - x * w)),
        (s * (x * z - y * w), s * (y * z + x * w), 1 - s * (x * x + y * y)),
    )
    return np.stack([np.stack(row, axis=-1) for row in rows], axis=-2)


def matrix_to_quat(matrix: ArrayLike) -> Array:
    """(..., 3, 3) rotation matrices to (..., 4) canonical unit quaternions (x, y, z, w).

    Raises:
        ValueError: another shape.
    """
    m = _checked(matrix, (3, 3), "matrix_to_quat")
    # Row k of this symmetric matrix is 4 q_k (x, y, z, w); the longest row is the exact one.
    diagonal = np.diagonal(m, axis1=-2, axis2=-1)
    trace = diagonal.sum(-1)
    products = np.empty((*m.shape[:-2], 4, 4))
    for i in range(3):
        for j in range(3):
            products[..., i, j] = m[..., i, j] + m[..., j, i]
        products[..., i, i] = 1 + 2 * diagonal[..., i] - trace
        j, k = (i + 1) % 3, (i + 2) % 3
        products[..., i, 3] = products[..., 3, i] = m[..., k, j] - m[..., j, k]
    products[..., 3, 3] = 1 + trace
    longest = np.argmax(np.diagonal(products, axis1=-2, axis2=-1), axis=-1)
    row = np.take_along_axis(products, longest[..., None, None], axis=-2)[..., 0, :]
    return canonical_quat(row / np.linalg.norm(row, axis=-1, keepdims=True))


def axis_angle_to_matrix(axis_angle: ArrayLike) -> Array:
    """(..., 3) axis times angle (rad) to (..., 3, 3) matrices (Rodrigues' formula).

    Raises:
        ValueError: another shape.
    """
    v = _checked(axis_angle, (3,), "axis_angle_to_matrix")
    half = np.linalg.norm(v, axis=-1, keepdims=True) / 2
    # sin(a/2) / a without dividing by 0: sinc(x) = sin(pi x) / (pi x).
    imaginary = v * np.sinc(half / np.pi) / 2
    return quat_to_matrix(np.concatenate([imaginary, np.cos(half)], axis=-1))


def matrix_to_axis_angle(matrix: ArrayLike) -> Array:
    """(..., 3, 3) rotation matrices to (..., 3) axis times angle, angle in [0, pi].

    Raises:
        ValueError: another shape.
    """
    q = matrix_to_quat(matrix)
    q = np.where(q[..., 3:] < 0, -q, q)  # the shorter way round
    xyz, w = q[..., :3], q[..., 3:]
    sine = np.linalg.norm(xyz, axis=-1, keepdims=True)
    angle = 2 * np.arctan2(sine, w)
    small = sine < 1e-12
    return xyz * np.where(small, 2.0, angle / np.where(small, 1.0, sine))


def matrix_to_rot6d(matrix: ArrayLike) -> Array:
    """(..., 3, 3) rotation matrices to (..., 6): the first two rows, one after the other.

    Raises:
        ValueError: another shape.
    """
    m = _checked(matrix, (3, 3), "matrix_to_rot6d")
    return m[..., :2, :].reshape(*m.shape[:-2], 6).copy()


def rot6d_to_matrix(rot6d: ArrayLike) -> Array:
    """(..., 6) to the (..., 3, 3) rotation matrices that Gram-Schmidt makes of the two rows.

    Any two rows that are not parallel give a rotation, so the output of a network may be passed as
    it is.

    Raises:
        ValueError: another shape, or rows that are 0 or parallel and so name no rotation.
    """
    v = _checked(rot6d, (6,), "rot6d_to_matrix")
    first = _unit(v[..., :3])
    second = v[..., 3:] - np.sum(first * v[..., 3:], axis=-1, keepdims=True) * first
    second = _unit(second)
    return np.stack([first, second, np.cross(first, second)], axis=-2)


def _unit(v: Array) -> Array:
    length = np.linalg.norm(v, axis=-1, keepdims=True)
    if not np.all(length > 1e-9):
        raise ValueError(
            "rot6d_to_matrix: the two rows of a 6-D rotation are 0 or parallel; expected two "
            "directions, such as [1, 0, 0, 0, 1, 0]"
        )
    return v / length


def _checked(value: ArrayLike, tail: tuple[int, ...], what: str) -> Array:
    array = np.asarray(value, dtype=np.float64)
    if array.shape[-len(tail) :] != tail:
        expected = ", ".join(str(n) for n in tail)
        raise ValueError(f"{what}: expected shape (..., {expected}), got {array.shape}")
    return array
