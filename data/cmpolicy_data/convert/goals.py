"""Absolute actions: the pose that the controller was sent to, in the world frame.

A delta action is a goal relative to the pose that the gripper has when it is chosen, so the goal
follows from the recorded state and the action alone: the state is restored in the simulator, the
controller is given the action as in the recording, and its goal is read. Nothing is stepped, so no
error adds up.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from cmpolicy_data.convert.recorded_env import ABSOLUTE_ARM_DIM, ARM_DIM, RecordedEnv
from cmpolicy_data.convert.workers import map_in_order
from cmpolicy_envs.rotations import axis_angle_to_matrix, matrix_to_axis_angle, matrix_to_rot6d

Float64Array = npt.NDArray[np.float64]


class Recording(NamedTuple):
    """What goals follow from: states (L, S), actions (L, 7 per arm), XML of the scene or None."""

    states: Float64Array
    actions: Float64Array
    model: str | None


def absolute_actions(goals: npt.ArrayLike) -> Float64Array:
    """Goals (L, 7 per arm) as absolute actions (L, 10 per arm).

    Per arm position (3, m), axis times angle (3, rad), gripper (1) become position (3), the first
    two rows of the rotation matrix (6), gripper (1).
    """
    arms = np.asarray(goals, np.float64)
    arms = arms.reshape(len(arms), arms.shape[1] // ARM_DIM, ARM_DIM)
    rotation = matrix_to_rot6d(axis_angle_to_matrix(arms[..., 3:6]))
    full = np.concatenate([arms[..., :3], rotation, arms[..., 6:]], axis=-1)
    return full.reshape(len(full), arms.shape[1] * ABSOLUTE_ARM_DIM)


def recover_goals(
    env: RecordedEnv, recordings: Iterable[Recording], workers: int = 1
) -> Generator[Float64Array]:
    """The goals (L, 7 per arm) of each recording, in order, by ``workers`` simulator processes.

    Per arm: position (3, m) and axis times angle (3, rad) in the world frame, and the gripper's
    action as it was. The recordings are drawn as they are needed.

    Raises:
        ImportError: robosuite is not installed.
        ValueError: states that are not of this environment.
        ChildProcessError: a process died.
    """
    yield from map_in_order(partial(goal_reader, env), recordings, workers)


def goal_reader(env: RecordedEnv) -> Callable[[Recording], Float64Array]:
    """A function that recovers the goals of one recording; it holds one simulator.

    Raises:
        ImportError: robosuite is not installed.
    """
    from cmpolicy_envs.robomimic import RobomimicEnv

    simulator = RobomimicEnv(task=env.task.name, env_args=env.env_args, actions="delta")

    def goals_of(recording: Recording) -> Float64Array:
        simulator.reset_to(recording.states[0], recording.model)
        return _goals(simulator.robosuite, recording)

    return goals_of


def _goals(robosuite: Any, recording: Recording) -> Float64Array:
    goals = recording.actions.copy()
    for state, goal in zip(recording.states, goals, strict=True):
        robosuite.sim.set_state_from_flattened(state)
        robosuite.sim.forward()
        for i, robot in enumerate(robosuite.robots):
            arm = goal[i * ARM_DIM :][: ARM_DIM - 1]  # a view; the gripper's action stays
            controller = robot.part_controllers["right"]
            robot.composite_controller.update_state()  # where the base is
            controller.update(force=True)
            controller.set_goal(arm)
            position, rotation = controller.goal_pos, controller.goal_ori
            if controller.input_ref_frame == "base":
                position = controller.origin_pos + controller.origin_ori @ position
                rotation = controller.origin_ori @ rotation
            arm[:3], arm[3:] = position, matrix_to_axis_angle(rotation)
    return goals
