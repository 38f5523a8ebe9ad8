"""The Robomimic tasks as Gymnasium environments, on robosuite 1.5.

A step is one 20 Hz action, carried out by robosuite's operational space controller over 25 physics
steps of 2 ms. The physics is robosuite's; what differs is that resets are reproducible, that the
observation holds what policies of the benchmark observe, and that nothing is computed which is not
asked for.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import gymnasium
import numpy as np
from gymnasium import spaces
from numpy.typing import ArrayLike, NDArray

from cmpolicy_envs.robomimic_args import (
    EnvArgs,
    EnvArgsError,
    default_env_args,
    input_type,
    translate,
    with_absolute_actions,
)
from cmpolicy_envs.robomimic_tasks import get_task
from cmpolicy_envs.robosuite_make import make_robosuite
from cmpolicy_envs.rotations import canonical_quat, matrix_to_axis_angle, rot6d_to_matrix

Observation = dict[str, NDArray[Any]]

_DELTA, _ABSOLUTE = 7, 10  # numbers per arm
_OPTIONS = ("reset_to",)


def low_dim_keys(n_arms: int) -> tuple[str, ...]:
    """Keys that the low-dimensional policies of the benchmark observe."""
    keys = ["object"]
    for arm in range(n_arms):
        keys += [f"robot{arm}_{name}" for name in ("eef_pos", "eef_quat", "gripper_qpos")]
    return tuple(keys)


class RobomimicEnv(gymnasium.Env[Observation, NDArray[np.float32]]):
    """A task of Robomimic: Lift, Can, Square, Transport or ToolHang.

    Observation (float32): robomimic's keys, by default ``object``, ``robot0_eef_pos`` (3,) m,
    ``robot0_eef_quat`` (4,) (x, y, z, w) with the sign of
    :func:`~cmpolicy_envs.rotations.canonical_quat`, ``robot0_gripper_qpos`` (2,) m, and ``robot1_``
    likewise where there are two arms.

    Action (float32), one after the other for each arm:

    * ``"delta"`` (7,): robosuite's own in [-1, 1]: position, axis-angle, gripper (-1 opens, 1
      closes). What is outside is clipped.
    * ``"absolute"`` (10,): target position of the gripper (m, world), its 6-D rotation
      (:func:`~cmpolicy_envs.rotations.matrix_to_rot6d`, world), gripper.

    Reward: 1 on success, else 0; the episode terminates on success. Info: ``is_success``.

    ``reset(seed=k)`` gives the same state, bit for bit, in every process and whatever went before;
    without a seed the next start follows from the last seed. ``reset(options={"reset_to": state})``
    restores a state of :meth:`get_state`.

    Args:
        task: see :data:`cmpolicy_envs.robomimic_tasks.TASKS`.
        env_args: how to build it, as a data set says; the protocol's own by default.
        actions: ``"delta"`` or ``"absolute"``.
        keys: low-dimensional keys to observe instead, by robomimic's names.

    Raises:
        ModuleNotFoundError: robosuite is not installed; says how to install it.
        EnvArgsError: ``env_args`` is of another task, or cannot be carried out.
        ValueError: no such task, kind of actions or key.
    """

    metadata = {"render_modes": ["rgb_array"], "render_fps": 20}  # noqa: RUF012  # gymnasium's

    def __init__(
        self,
        task: str = "lift",
        *,
        env_args: EnvArgs | None = None,
        actions: str = "delta",
        keys: Sequence[str] | None = None,
    ) -> None:
        self.task = get_task(task)
        self.actions = actions
        self.env_args = _env_args(task, env_args, actions)
        self._env = make_robosuite(self.env_args)
        self._xml = ""
        self._env.set_xml_processor(self._keep_xml)
        self._own_model = True  # not one of a recorded state
        self.keys = tuple(keys) if keys is not None else low_dim_keys(self.task.n_arms)
        self.observation_space = self._observation_space()
        self.action_space = _action_space(actions, self.task.n_arms)

    @property
    def robosuite(self) -> Any:
        """robosuite's environment underneath."""
        return self._env

    def reset(
        self, *, seed: int | None = None, options: Mapping[str, Any] | None = None
    ) -> tuple[Observation, dict[str, Any]]:
        """Start an episode; see the class.

        Raises:
            ValueError: an unknown option, or a state of another model.
        """
        super().reset(seed=seed)
        options = options or {}
        unknown = sorted(set(options) - set(_OPTIONS))
        if unknown:
            raise ValueError(
                f"Robomimic: unknown reset option {unknown[0]!r}; known: {', '.join(_OPTIONS)}"
            )
        state = options.get("reset_to")
        if state is not None:
            if not isinstance(state, Mapping) or "states" not in state:
                raise ValueError("Robomimic: reset_to needs a mapping with 'states'")
            observation = self.reset_to(state["states"], state.get("model"))
            return observation, {"is_success": self.is_success()}
        self._reset_robosuite(int(self.np_random.integers(2**63)))
        return self.get_obs(), {"is_success": self.is_success()}

    def _reset_robosuite(self, seed: int) -> None:
        env = self._env
        # The samplers of robosuite share this one generator, so its state is set in place.
        env.rng.bit_generator.state = np.random.default_rng(seed).bit_generator.state
        env.deterministic_reset = False
        env.reset()
        self._own_model = True
        self._settle()

    def _settle(self) -> None:
        """Make what follows a function of the state alone.

        Left over from before are the solver's guess and the mass matrix of the controllers, which
        robosuite takes before it places the arm and uses for the first 2 ms.
        """
        sim = self._env.sim
        sim.data.qacc_warmstart[:] = 0
        sim.forward()
        for controller in self._controllers():
            controller.update(force=True)

    def step(self, action: ArrayLike) -> tuple[Observation, float, bool, bool, dict[str, Any]]:
        """One 20 Hz action; raises ValueError on another shape or non-finite values."""
        self._env.step(self._to_robosuite(action))
        success = self.is_success()
        return self.get_obs(), float(success), success, False, {"is_success": success}

    def _to_robosuite(self, action: ArrayLike) -> NDArray[np.float64]:
        values = np.asarray(action, dtype=np.float64)
        if values.shape != self.action_space.shape or not np.isfinite(values).all():
            (size,) = self.action_space.shape or ()
            raise ValueError(
                f"Robomimic: expected {self.actions} actions of {size} finite numbers for "
                f"{self.task.name}, got shape {values.shape}: {action!r}"
            )
        if self.actions == "delta":
            return np.clip(values, -1.0, 1.0)
        arms = values.reshape(self.task.n_arms, _ABSOLUTE)
        turned = matrix_to_axis_angle(rot6d_to_matrix(arms[:, 3:9]))
        gripper = np.clip(arms[:, 9:], -1.0, 1.0)
        return np.concatenate([arms[:, :3], turned, gripper], axis=1).reshape(-1)

    def is_success(self) -> bool:
        """Whether the task is solved in the present state."""
        return bool(self._env._check_success())

    def get_obs(self) -> Observation:
        """The observation of the present state."""
        given = self._env._get_observations(force_update=True)
        observation: Observation = {}
        for key in self.keys:
            value = np.asarray(given["object-state" if key == "object" else key])
            if key.endswith(("eef_quat", "eef_quat_site")):
                value = canonical_quat(value)
            observation[key] = value.astype(np.float32)
        return observation

    def get_state(self) -> dict[str, Any]:
        """``states`` (n,) float64, the flattened state (time, qpos, qvel), and ``model``, XML."""
        return {"states": np.asarray(self._env.sim.get_state().flatten()), "model": self._xml}

    def reset_to(self, states: ArrayLike, model: str | None = None) -> Observation:
        """Restore a recorded state.

        An episode that is replayed from its first state, whose time is 0, is the recorded one to
        the bit. From a later one it differs a little: what the controller holds beside the state
        (the posture that the episode began with, the half-closed gripper) is not recorded.

        Args:
            states: (n,) flattened state.
            model: XML of the episode's model; None keeps the present one.

        Raises:
            ValueError: the state is not of this model, or the model cannot be loaded.
        """
        env = self._env
        if model is not None:
            try:
                env.reset_from_xml_string(env.edit_model_xml(model))
            except Exception as error:
                raise ValueError(
                    f"Robomimic: the recorded model cannot be loaded for {self.task.name}: {error}"
                ) from error
            self._own_model = False
        else:
            env.deterministic_reset = True  # keeps the model, and draws nothing
            env.reset()
            env.deterministic_reset = False
        flat = np.asarray(states, dtype=np.float64)
        size = 1 + env.sim.model.nq + env.sim.model.nv
        if flat.shape != (size,) or not np.isfinite(flat).all():
            raise ValueError(
                f"Robomimic: a state of {self.task.name} is {size} finite numbers (time, qpos, "
                f"qvel), got shape {flat.shape}"
            )
        env.sim.set_state_from_flattened(flat)
        self._settle()
        if flat[0] == 0:
            for controller in self._controllers():
                controller.update_initial_joints(controller.joint_pos)
        return self.get_obs()

    def _controllers(self) -> list[Any]:
        """Controllers of arms and grippers."""
        return [part for robot in self._env.robots for part in robot.part_controllers.values()]

    def close(self) -> None:
        """Free the simulation."""
        self._env.close()

    def _keep_xml(self, xml: str) -> str:
        self._xml = xml
        return xml

    def _observation_space(self) -> spaces.Dict:
        self._env.reset()
        given = self._env._get_observations(force_update=True)
        known = ["object", *(key for key in given if key.startswith("robot"))]
        unknown = [key for key in self.keys if key not in known]
        if unknown:
            raise ValueError(
                f"Robomimic: {self.task.name} observes no {unknown[0]!r}; known: {', '.join(known)}"
            )
        shapes = {k: np.shape(given["object-state" if k == "object" else k]) for k in self.keys}
        return spaces.Dict(
            {key: spaces.Box(-np.inf, np.inf, shape, np.float32) for key, shape in shapes.items()}
        )


def _env_args(task: str, given: EnvArgs | None, actions: str) -> EnvArgs:
    if actions not in ("delta", "absolute"):
        raise ValueError(f"Robomimic: actions must be 'delta' or 'absolute', got {actions!r}")
    args = default_env_args(task) if given is None else translate(given)
    expected = get_task(task).robosuite_env
    if args.env_name != expected:
        raise EnvArgsError(
            f"env_args: env_name is {args.env_name!r}, but the task {task!r} is {expected!r}"
        )
    if actions == "absolute":
        return with_absolute_actions(args)
    if input_type(args) != "delta":
        raise EnvArgsError(
            "env_args: the controller's input_type is 'absolute', but actions='delta' was asked for"
        )
    return args


def _action_space(actions: str, n_arms: int) -> spaces.Box:
    if actions == "delta":
        return spaces.Box(-1.0, 1.0, (_DELTA * n_arms,), np.float32)
    # The workspace of the arms, with room: targets may lie beyond what is reached.
    low, high = [-3.0] * 3 + [-1.0] * 7, [3.0] * 3 + [1.0] * 7
    return spaces.Box(np.float32(low * n_arms), np.float32(high * n_arms), dtype=np.float32)
