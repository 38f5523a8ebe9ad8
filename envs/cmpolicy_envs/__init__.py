"""Gymnasium environments of cmpolicy; importing this package registers their ids.

* ``cmpolicy/PushT-v0``: Push-T with the observation of the public demonstrations
  (agent position and nine keypoints on the block). See :mod:`cmpolicy_envs.pusht`.
"""

import gymnasium

from cmpolicy_envs.keypoints import KEYPOINTS_LOCAL, keypoints_from_pose

__all__ = ["KEYPOINTS_LOCAL", "PUSHT_ID", "keypoints_from_pose"]

PUSHT_ID = "cmpolicy/PushT-v0"

if PUSHT_ID not in gymnasium.registry:
    gymnasium.register(
        id=PUSHT_ID,
        # A string, so that importing this package does not import pymunk and pygame.
        entry_point="cmpolicy_envs.pusht:PushTEnv",
        max_episode_steps=300,
    )
