"""States of Push-T: the nine keypoints of the block, and Diffusion Policy's initial states.

Shape legend: ``...`` any leading shape. Lengths in px of the 512 x 512 arena, angles in rad.
"""

import numpy as np
from numpy.typing import ArrayLike, NDArray

KEYPOINTS_LOCAL: NDArray[np.float64] = np.array(
    [
        [9.269786, 90.040974],
        [-60.983472, -1.186730],
        [60.912756, -1.393364],
        [-0.270504, 25.543625],
        [-14.064927, 122.815854],
        [39.002738, 32.857404],
        [-39.966415, 32.729655],
        [-16.824344, 62.863179],
        [23.541461, -1.700288],
    ]
)
"""(9, 2) keypoints in the frame of the block (origin at ``block.position`` of gym-pusht: the middle
of the top of the T; y towards its foot).

Fitted from ``data/keypoint`` against ``data/state`` of the human demonstrations, over the 12,697
steps in which the block rests; the keypoints are rigid in this frame to 3e-5 px. While the agent
overlaps the block the recording took the keypoints one physics step after the pose, so in 58 of the
25,650 steps the two disagree by more than 0.1 px (2.1 px at most).
"""
KEYPOINTS_LOCAL.setflags(write=False)


def keypoints_from_pose(block_xy: ArrayLike, angle: ArrayLike) -> NDArray[np.float64]:
    """Keypoints of the block at a pose.

    Args:
        block_xy: (..., 2) position of the block, px; columns 2:4 of ``data/state``.
        angle: (...) angle of the block, rad; column 4 of ``data/state``.

    Returns:
        (..., 9, 2) keypoints, px: ``block_xy + R(angle) @ local``.

    Raises:
        ValueError: the last axis of ``block_xy`` is not 2, or the leading shapes differ.
    """
    xy = np.asarray(block_xy, dtype=np.float64)
    theta = np.asarray(angle, dtype=np.float64)
    if xy.ndim < 1 or xy.shape[-1] != 2 or xy.shape[:-1] != theta.shape:
        raise ValueError(
            f"keypoints_from_pose: expected block_xy of shape (..., 2) and angle of shape (...), "
            f"got {xy.shape} and {theta.shape}"
        )
    cos, sin = np.cos(theta)[..., None], np.sin(theta)[..., None]
    x, y = KEYPOINTS_LOCAL[:, 0], KEYPOINTS_LOCAL[:, 1]
    return np.stack([cos * x - sin * y, sin * x + cos * y], axis=-1) + xy[..., None, :]


def dp_initial_state(seed: int) -> list[float]:
    """Diffusion Policy's test state for a seed: [agent x, agent y, block x, block y, angle].

    Passed through ``reset_to_state``, which moves the block (position first, angle second).

    Raises:
        ValueError: the seed is outside [0, 2**32), which numpy's RandomState does not take.
    """
    if not 0 <= seed < 2**32:
        raise ValueError(f"seed {seed} is outside [0, 2**32)")
    rng = np.random.RandomState(seed)  # the generator that defines the protocol
    return [
        float(rng.randint(50, 450)),
        float(rng.randint(50, 450)),
        float(rng.randint(100, 400)),
        float(rng.randint(100, 400)),
        float(rng.randn() * 2 * np.pi - np.pi),
    ]
