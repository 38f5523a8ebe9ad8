"""``data.augment=recentre``: Push-T demonstrations whose block comes to rest exactly on its goal.

Human demonstrations stop short: the block rests a few pixels off its goal, so the last part of the
way is not in the data. Each episode is continued until everything rests (its last action is held),
and then moved rigidly (agent, block, actions, keypoints) so that the resting pose is the goal's.
Physics without walls does not change under a rigid motion, so the episode stays a true one.
"""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np
import numpy.typing as npt

from cmpolicy_data.augment import ARENA, Episodes, check_pusht
from cmpolicy_data.generate.tee import Pose
from cmpolicy_data.generate.world import STEP_SECONDS, State, World
from cmpolicy_envs.pusht_states import keypoints_from_pose

Floats = npt.NDArray[np.float64]

GOAL = Pose(256.0, 256.0, np.pi / 4)
#: Steps over which the last action is held, 0.1 s each; after them nothing moves.
SETTLE_STEPS = 6
#: The simulation starts so many steps before the end: by then the agent's velocity, which is not
#: recorded, is that of the controller, whatever it was at the start.
_LEAD_STEPS = 20


def recentre_pusht(episodes: Episodes) -> Episodes:
    """Settle every episode and move it onto the goal; see the module.

    Every episode gets :data:`SETTLE_STEPS` more steps. A warning counts the actions that end up
    outside of the arena; they are kept, since the simulator takes them.

    Raises:
        AugmentError: the data is not Push-T's, or lacks the actions.
    """
    check_pusht(episodes, "recentre")
    data, ends = episodes.data, episodes.episode_ends
    parts: dict[str, list[npt.NDArray[Any]]] = {key: [] for key in data}
    world = World()
    for start, end in zip(ends - np.diff(ends, prepend=0), ends, strict=True):
        state = data["state"][start:end].astype(np.float64)
        action = data["action"][start:end].astype(np.float64)
        more, rest = _settle(world, state, action)
        whole = {
            "state": np.concatenate([state, more]),
            "action": np.concatenate([action, np.repeat(action[-1:], SETTLE_STEPS, axis=0)]),
        }
        if "keypoint" in data:
            added = keypoints_from_pose(more[:, 2:4], more[:, 4])
            whole["keypoint"] = np.concatenate([data["keypoint"][start:end], added])
        moved = move(whole, rest, GOAL)
        for key, rows in parts.items():
            rows.append(moved[key].astype(data[key].dtype))
    joined = {key: np.concatenate(rows) for key, rows in parts.items()}
    outside = ((joined["action"] < 0) | (joined["action"] > ARENA)).any(axis=1)
    if outside.any():
        warnings.warn(
            f"recentre: {int(outside.sum())} of {len(outside)} actions are outside of the arena "
            "after the move; they are kept",
            stacklevel=2,
        )
    lengths = np.diff(ends, prepend=0) + SETTLE_STEPS
    return Episodes(joined, np.cumsum(lengths), episodes.source)


def move(data: dict[str, npt.NDArray[Any]], origin: Pose, target: Pose) -> dict[str, Floats]:
    """Rigid motion that takes the pose ``origin`` to ``target``, of state, action and keypoints."""
    turn = target.angle - origin.angle
    rotation = np.array([[np.cos(turn), -np.sin(turn)], [np.sin(turn), np.cos(turn)]])

    def points(values: npt.NDArray[Any]) -> Floats:
        moved: Floats = (values - (origin.x, origin.y)) @ rotation.T + (target.x, target.y)
        return moved

    state = data["state"]
    angle = np.mod(state[:, 4:] + turn, 2 * np.pi)
    moved = {"state": np.hstack([points(state[:, :2]), points(state[:, 2:4]), angle])}
    return moved | {key: points(data[key]) for key in ("action", "keypoint") if key in data}


def _settle(world: World, state: Floats, action: Floats) -> tuple[Floats, Pose]:
    """The states that follow the recorded ones while the last action is held, and the last pose."""
    first = max(0, len(state) - _LEAD_STEPS)
    velocity = np.zeros(2)
    if first:
        velocity = (state[first, :2] - state[first - 1, :2]) / STEP_SECONDS
    x, y, block_x, block_y, angle = state[first].tolist()
    v_x, v_y = velocity.tolist()
    world.set(State(x, y, v_x, v_y, Pose(block_x, block_y, angle)))
    for target in action[first:]:
        world.step(*target.tolist())
    rows = []
    for _ in range(SETTLE_STEPS):
        now = world.state()
        rows.append([now.x, now.y, now.block.x, now.block.y, now.block.angle % (2 * np.pi)])
        rest = world.step(*action[-1].tolist())
    return np.array(rows), rest
