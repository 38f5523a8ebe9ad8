"""A control step of robosuite without what nobody reads: observables and histories at 500 Hz.

robosuite spends more than half of a step in Python: it samples all observables, keeps histories of
forces and accelerations, and computes each Jacobian of the arm three times, in every one of the 25
physics steps of an action. Here an action runs the same arithmetic once, in the same order, so
states are robosuite's to the bit (the tests compare them).

The controller is robosuite's operational space control (Khatib 1987) with fixed gains on a robot
whose base does not move::

    F   = kp (x_goal - x) - kd v                        3-D force
    T   = kp e(R_goal, R) - kd w                        3-D torque
    tau = J^T [Lambda_x F; Lambda_r T] + g + N^T M (10 (q_0 - q) - 2 sqrt(10) q')
"""

from typing import Any

import mujoco
import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]


class _Arm:
    """Torques of one arm towards the goal of its controller."""

    def __init__(self, sim: Any, controller: Any, actuators: Any) -> None:
        from robosuite.utils import control_utils

        self._math = control_utils
        self._model, self._data = sim.model._model, sim.data._data
        self._controller = controller
        self._actuators = np.asarray(actuators)
        self._low, self._high = self._model.actuator_ctrlrange[self._actuators].T
        self._site = sim.model.site_name2id(controller.ref_name)
        n_v = self._model.nv
        self._jac_pos, self._jac_ori = np.zeros((3, n_v)), np.zeros((3, n_v))
        self._jac = np.zeros((6, len(controller.qvel_index)))
        self._mass = np.zeros((n_v, n_v))

    def apply(self) -> None:
        """Write the torques of the present state."""
        data, controller, math = self._data, self._controller, self._math
        mujoco.mj_jacSite(self._model, data, self._jac_pos, self._jac_ori, self._site)
        mujoco.mj_fullM(self._model, self._mass, data.qM)
        columns = controller.qvel_index
        jac = self._jac
        jac[:3], jac[3:] = self._jac_pos[:, columns], self._jac_ori[:, columns]
        mass = self._mass[columns, :][:, columns]
        place = data.site_xpos[self._site]
        rotation = data.site_xmat[self._site].reshape(3, 3).copy()
        goal_place, goal_rotation = controller.goal_pos, controller.goal_ori
        if controller.input_ref_frame == "base":
            goal_place = controller.origin_pos + np.dot(controller.origin_ori, goal_place)
            goal_rotation = np.dot(controller.origin_ori, goal_rotation)
        turn = math.orientation_error(goal_rotation, rotation)
        k_p, k_d = controller.kp, controller.kd
        speed, spin = np.dot(self._jac_pos, data.qvel), np.dot(self._jac_ori, data.qvel)
        force = (goal_place - place) * k_p[:3] + -speed * k_d[:3]
        torque = turn * k_p[3:6] + -spin * k_d[3:6]
        full, by_place, by_turn, nullspace = math.opspace_matrices(mass, jac, jac[:3], jac[3:])
        if controller.uncoupling:
            wrench = np.concatenate([np.dot(by_place, force), np.dot(by_turn, torque)])
        else:
            wrench = np.dot(full, np.concatenate([force, torque]))
        joints, rates = data.qpos[controller.qpos_index], data.qvel[columns]
        torques = np.dot(jac.T, wrench) + data.qfrc_bias[columns]
        torques += math.nullspace_torques(mass, nullspace, controller.initial_joint, joints, rates)
        data.ctrl[self._actuators] = np.clip(torques, self._low, self._high)


class _Robot:
    def __init__(self, sim: Any, robot: Any) -> None:
        self._sim, self._robot = sim, robot
        self._parts = robot.part_controllers
        self._actuators = robot._ref_actuators_indexes_dict
        self._arms = [_Arm(sim, self._parts[arm], self._actuators[arm]) for arm in robot.arms]

    def start(self, action: Array) -> None:
        """Set the goals of the controllers."""
        for controller in self._parts.values():
            controller.new_update = True  # the state has moved on since it was read
        self._robot.composite_controller.set_goal(action)
        model, data = self._sim.model, self._sim.data
        for name, controller in self._parts.items():
            if name not in self._robot.arms:  # a gripper keeps its command all along
                chosen = self._actuators[name]
                low, high = model.actuator_ctrlrange[chosen].T
                data.ctrl[chosen] = np.clip(controller.run_controller(), low, high)

    def apply(self) -> None:
        for arm in self._arms:
            arm.apply()


class FastControl:
    """Steps of a robosuite environment whose ``lite_physics`` is on; made anew after a reset."""

    def __init__(self, env: Any) -> None:
        self._env = env
        self._robots = [_Robot(env.sim, robot) for robot in env.robots]
        self._n_steps = int(env.control_timestep / env.model_timestep)

    def step(self, action: Array) -> None:
        """Carry out one action (A,) in robosuite's terms; neither observes nor rewards."""
        env = self._env
        model, data = env.sim.model._model, env.sim.data._data
        begin = 0
        for physics_step in range(self._n_steps):
            mujoco.mj_step1(model, data)
            for robot, control in zip(env.robots, self._robots, strict=True):
                if physics_step == 0:
                    control.start(action[begin : begin + robot.action_dim])
                    begin += robot.action_dim
                control.apply()
            mujoco.mj_step2(model, data)
        env.timestep += 1
        env.cur_time += env.control_timestep
