"""One sign for quaternions that a gripper takes part in, for recorded and simulated observations.

A gripper that points down is a half turn from the world and from what lies on a table. robosuite
keeps w >= 0, which is next to 0 there, so that its sign is noise: in demonstrations of Square the
nut's turn in the gripper's frame jumps between q and -q twelve times per episode. Signs go by x
instead (:func:`~cmpolicy_envs.rotations.canonical_quat`), which is next to 1.
"""

import re
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cmpolicy_envs.robomimic_tasks import RobomimicTask
from cmpolicy_envs.rotations import canonical_quat

_HAND = re.compile(r"robot\d+_eef_quat(_site)?")


def canonical_observation(key: str, value: NDArray[Any], task: RobomimicTask) -> NDArray[Any]:
    """The observation ``key`` (..., n) of a task with canonical signs; a copy where one changes.

    An ``object`` of another size than the task's own, of an environment built otherwise, is left.
    """
    if _HAND.fullmatch(key) and value.shape[-1:] == (4,):
        return canonical_quat(value).astype(value.dtype)
    if key == "object" and task.quats_to_hand and value.shape[-1:] == (task.object_size,):
        value = np.array(value)
        for begin in task.quats_to_hand:
            quat = value[..., begin : begin + 4]
            value[..., begin : begin + 4] = canonical_quat(quat)
    return value
