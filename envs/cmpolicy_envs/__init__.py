"""Gymnasium environments of cmpolicy; importing this package registers their ids.

* ``cmpolicy/PushT-v0``: Push-T with the observation of the public demonstrations
  (agent position and nine keypoints on the block). See :mod:`cmpolicy_envs.pusht`.
* ``cmpolicy/PushTImage-v0``: the same, seen by a camera (image and agent position).
* ``cmpolicy/Robomimic-Lift-v0``, ``-Can-``, ``-Square-``, ``-Transport-``, ``-ToolHang-``: the
  Robomimic tasks on robosuite, which ``pip install 'cmpolicy[robomimic]'`` brings. See
  :mod:`cmpolicy_envs.robomimic`.
"""

import gymnasium

from cmpolicy_envs.pusht_states import KEYPOINTS_LOCAL, keypoints_from_pose
from cmpolicy_envs.robomimic_tasks import TASKS

__all__ = ["KEYPOINTS_LOCAL", "PUSHT_ID", "PUSHT_IMAGE_ID", "TASKS", "keypoints_from_pose"]

PUSHT_ID = "cmpolicy/PushT-v0"
PUSHT_IMAGE_ID = "cmpolicy/PushTImage-v0"

# Entry points are strings, so that importing this package does not import simulators.
for _id, _name in ((PUSHT_ID, "PushTEnv"), (PUSHT_IMAGE_ID, "PushTImageEnv")):
    if _id not in gymnasium.registry:
        gymnasium.register(
            id=_id, entry_point=f"cmpolicy_envs.pusht:{_name}", max_episode_steps=300
        )
for _task in TASKS.values():
    if _task.gym_id not in gymnasium.registry:
        gymnasium.register(
            id=_task.gym_id,
            entry_point="cmpolicy_envs.robomimic:RobomimicEnv",
            kwargs={"task": _task.name},
            max_episode_steps=_task.max_steps,
        )
