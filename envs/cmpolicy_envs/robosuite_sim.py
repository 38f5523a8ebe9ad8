"""A robosuite environment whose every start is reproducible, and whose steps cost little."""

import xml.etree.ElementTree as ElementTree
from collections.abc import Sequence
from typing import Any

import mujoco
import numpy as np
from numpy.typing import ArrayLike, NDArray

from cmpolicy_envs.robomimic_args import EnvArgs
from cmpolicy_envs.robosuite_control import FastControl
from cmpolicy_envs.robosuite_make import make_robosuite

# What sensors of objects are computed from, beside what is asked for.
_ALWAYS_SENSED = ("eef_pos", "eef_quat")


class RobosuiteSim:
    """Starts, steps and reads one robosuite environment.

    Whatever it does next is a function of its state alone: observations and success are those of
    the state after a step (robosuite takes its own 48 ms before, and what they say of an object in
    the gripper's frame is of the step before), and a state that is restored goes on as it did.

    Args:
        args: in robosuite 1.5's terms.
        model_varies: whether robosuite's resets draw sizes of objects, not only their places.
        visible: whether it will be rendered; if not, it holds no textures.
    """

    def __init__(self, args: EnvArgs, *, model_varies: bool, visible: bool) -> None:
        self.env = make_robosuite(args)
        self._model_varies = model_varies
        self._lite = bool(self.env.lite_physics)
        self._own_model = True
        self._given = ""  # XML that the present model was restored from
        self.xml = str(self.env.edit_model_xml(self.env.model.get_xml()))
        self.env.set_xml_processor(self._keep_xml)
        if not visible:
            self.env.set_xml_processor(_without_textures)
        self.known_keys = ("object", *_sensed(self.env))
        self._after_start()

    def start(self, seed: int) -> None:
        """Reset as robosuite does, with everything random drawn from ``seed``."""
        env = self.env
        # All samplers of robosuite share this one generator, so its state is set in place.
        env.rng.bit_generator.state = np.random.default_rng(seed).bit_generator.state
        # A hard reset reads the model anew, which takes as long as twenty steps.
        env.hard_reset = self._model_varies or not self._own_model
        env.deterministic_reset = False
        env.reset()
        self._own_model, self._given = True, ""
        self._after_start()

    def restore(self, states: ArrayLike, model: str | None) -> None:
        """Put the recorded state ``states`` (n,) of ``model`` (XML; None: the present one).

        Raises:
            ValueError: the state is not of this model, or the model cannot be loaded.
        """
        env = self.env
        if model is not None and model not in (self._given, self.xml):
            try:
                env.reset_from_xml_string(model)  # which brings its paths to this machine
            except Exception as error:
                raise ValueError(
                    "Robomimic: the recorded model cannot be loaded by robosuite 1.5; was it "
                    f"recorded with an earlier one? {type(error).__name__}: {error}"
                ) from error
            self._own_model, self._given = False, model
        else:
            env.deterministic_reset = True  # keeps the model, and draws nothing
            env.reset()
            env.deterministic_reset = False
        flat = np.asarray(states, dtype=np.float64)
        size = 1 + env.sim.model.nq + env.sim.model.nv
        if flat.shape != (size,) or not np.isfinite(flat).all():
            raise ValueError(
                f"Robomimic: a state of this model is {size} finite numbers (time, qpos, qvel), "
                f"got shape {flat.shape}"
            )
        env.sim.set_state_from_flattened(flat)
        self._after_start()
        if flat[0] == 0:
            # An episode's controllers keep to the posture that it began with.
            for controller in self._controllers():
                controller.update_initial_joints(controller.joint_pos)

    def step(self, action: NDArray[np.float64]) -> None:
        """Carry out an action in robosuite's terms."""
        env = self.env
        if self._lite:
            self._control.step(action)
        else:
            for physics_step in range(int(env.control_timestep / env.model_timestep)):
                env.sim.forward()
                env._pre_action(action, physics_step == 0)
                env.sim.step()
            env.timestep += 1
            env.cur_time += env.control_timestep
        # MuJoCo leaves places and contacts one physics step behind the state.
        mujoco.mj_fwdPosition(env.sim.model._model, env.sim.data._data)

    def observe(self, keys: Sequence[str]) -> dict[str, NDArray[np.float64]]:
        """Low-dimensional observations of the present state, by robomimic's names."""
        # Not through _get_observations, which also puts together what nobody asked for.
        env, observables = self.env, self.env._observables
        env._update_observables(force=True)
        if "object" in keys:
            # robosuite senses how objects lie to the gripper before it senses where they are, and
            # so from where they were the last time.
            for name in self._objects:
                observables[name].update(env.model_timestep, env._obs_cache, force=True)
        found: dict[str, NDArray[np.float64]] = {}
        for key in keys:
            if key == "object":
                parts = [np.atleast_1d(observables[name].obs) for name in self._objects]
                found[key] = np.concatenate(parts)
                continue
            found[key] = np.atleast_1d(np.asarray(observables[key].obs, dtype=np.float64))
        return found

    def sense_only(self, keys: Sequence[str]) -> None:
        """Compute no more than ``keys`` need."""
        for name, observable in self.env._observables.items():
            robots = observable.modality != "object"
            if robots and name not in keys and not name.endswith(_ALWAYS_SENSED):
                observable.set_enabled(False)

    def sense_all(self) -> None:
        """Undo :meth:`sense_only`."""
        for observable in self.env._observables.values():
            if observable.modality != "object":
                observable.set_enabled(True)

    def is_success(self) -> bool:
        """Whether the task is solved in the present state."""
        return bool(self.env._check_success())

    def flat_state(self) -> NDArray[np.float64]:
        """(n,) time, qpos, qvel."""
        return np.asarray(self.env.sim.get_state().flatten())

    def close(self) -> None:
        if self.env.sim is not None:
            self.env.close()

    def _after_start(self) -> None:
        """Make what follows a function of the state alone.

        Left over from before are the solver's guess and the mass matrix of the controllers, which
        robosuite takes before it places the arm and uses for the first 2 ms.
        """
        sim = self.env.sim
        sim.data.qacc_warmstart[:] = 0
        sim.forward()
        for controller in self._controllers():
            controller.update(force=True)
        self._control = FastControl(self.env)
        observables = self.env._observables.items()
        # Only those of the task's own object: Square and Can carry sensors of absent ones.
        self._objects = [n for n, o in observables if o.modality == "object" and o.is_active()]
        for robot in self.env.robots:
            # A compiled copy of the robot alone, 45 MB, for controllers that plan with it.
            robot.robot_model.mujoco_model = None

    def _controllers(self) -> list[Any]:
        """Controllers of arms and grippers."""
        return [part for robot in self.env.robots for part in robot.part_controllers.values()]

    def _keep_xml(self, xml: str) -> str:
        self.xml = xml
        return xml


def _sensed(env: Any) -> list[str]:
    """Names of robosuite's observables of the robots."""
    return [name for name, one in env._observables.items() if one.modality.endswith("proprio")]


def _without_textures(xml: str) -> str:
    """``xml`` without its textures: 16 MB of memory, and a fourth of the time to load it."""
    tree = ElementTree.fromstring(xml)
    assets = tree.find("asset")
    if assets is not None:
        for texture in assets.findall("texture"):
            assets.remove(texture)
        for material in assets.findall("material"):
            material.attrib.pop("texture", None)
    return ElementTree.tostring(tree, encoding="unicode")
