"""Push-T for LeRobot from states: the human demonstrations as gym-pusht sees them.

``python pusht_data.py STORE OUT`` writes the store ``OUT.zarr`` and the LeRobot data set ``OUT``:
``state`` is the agent's position (2), ``environment_state`` the block's corners (16), both in
pixels, as gym-pusht's ``environment_state_agent_pos`` gives them.
"""

from __future__ import annotations

import sys
from pathlib import Path

import gym_pusht  # noqa: F401
import gymnasium
import numpy as np
import numpy.typing as npt

from cmpolicy_data import ReplayBuffer
from cmpolicy_data.convert.lerobot.writing import write


def corners(poses: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """(N, 16) of the block's poses (N, 3): x, y in pixels and the angle in radians."""
    env = gymnasium.make("gym_pusht/PushT-v0", obs_type="environment_state_agent_pos").unwrapped
    env.reset(seed=0)
    local = np.array([v for shape in env._block_shapes for v in shape.get_vertices()])  # (8, 2)
    cos, sin = np.cos(poses[:, 2]), np.sin(poses[:, 2])
    turn = np.stack([np.stack([cos, -sin], -1), np.stack([sin, cos], -1)], 1)  # (N, 2, 2)
    return (np.einsum("nij,kj->nki", turn, local) + poses[:, None, :2]).reshape(len(poses), 16)


def main(store: Path, out: Path) -> None:
    """Write both."""
    whole = ReplayBuffer.open(store)
    states = np.asarray(whole["state"][:], np.float64)
    actions = np.asarray(whole["action"][:], np.float32)
    block = corners(states[:, 2:5]).astype(np.float32)
    attrs = {"control_hz": 10, "tasks": ["push the T onto its outline"] * whole.n_episodes}
    target = ReplayBuffer.create(out.with_suffix(".zarr"), attrs=attrs)
    start = 0
    for end in whole.episode_ends.tolist():
        rows = slice(start, end)
        agent = states[rows, :2].astype(np.float32)
        target.append_episode(
            {"state": agent, "environment_state": block[rows], "action": actions[rows]}
        )
        start = end
    write(target.path, out)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
