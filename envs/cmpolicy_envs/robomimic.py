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
from cmpolicy_envs.robomimic_signs import canonical_observation
from cmpolicy_envs.robomimic_tasks import get_task
from cmpolicy_envs.robosuite_make import import_robosuite
from cmpolicy_envs.rotations import matrix_to_axis_angle, rot6d_to_matrix

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

    Observation: robomimic's keys (float32), by default ``object``, ``robot0_eef_pos`` (3,) m,
    ``robot0_eef_quat`` (4,) (x, y, z, w) with the sign of
    :mod:`~cmpolicy_envs.robomimic_signs`, ``robot0_gripper_qpos`` (2,) m, and ``robot1_``
    likewise where there are two arms; ``<camera>_image`` (H, W, 3) uint8 for each of ``cameras``.

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
        cameras: to observe, such as ``agentview`` and ``robot0_eye_in_hand``.
        camera_size: height and width of their images, px.
        render_mode: None (no images) or ``"rgb_array"``.
        render_size: height and width of rendered images, px.
        render_camera: that :meth:`render` shows.

    Raises:
        ModuleNotFoundError: robosuite is not installed; says how to install it.
        EnvArgsError: ``env_args`` is of another task, or cannot be carried out.
        OpenGLError: images are asked for and there is no OpenGL; says which package gives it.
        ValueError: no such task, kind of actions, key or camera.
    """

    metadata = {"render_modes": ["rgb_array"], "render_fps": 20}  # noqa: RUF012  # gymnasium's

    def __init__(
        self,
        task: str = "lift",
        *,
        env_args: EnvArgs | None = None,
        actions: str = "delta",
        keys: Sequence[str] | None = None,
        cameras: Sequence[str] = (),
        camera_size: int = 84,
        render_mode: str | None = None,
        render_size: int = 256,
        render_camera: str = "agentview",
    ) -> None:
        if render_mode not in (None, "rgb_array"):
            raise ValueError(
                f"Robomimic: render_mode must be None or 'rgb_array', got {render_mode!r}"
            )
        self.task = get_task(task)
        self.actions = actions
        self.env_args = _env_args(task, env_args, actions)
        self.render_mode = render_mode
        self.render_size, self.render_camera = render_size, render_camera
        self._cameras, self._camera_size = tuple(cameras), camera_size
        import_robosuite()  # the error of a missing one, before what needs it is imported
        from cmpolicy_envs.robosuite_sim import RobosuiteSim

        visible = bool(cameras) or render_mode is not None
        self.sim = RobosuiteSim(self.env_args, model_varies=self.task.model_varies, visible=visible)
        self._renderer: Any = None
        self._rendered_model: Any = None
        self.keys = tuple(keys) if keys is not None else low_dim_keys(self.task.n_arms)
        self._check_names()
        # gymnasium types a Dict of Boxes as no space of a dict of arrays
        self.observation_space = self._observation_space()  # type: ignore[assignment]
        self.sim.sense_only(self.keys)
        self.action_space = _action_space(actions, self.task.n_arms)  # type: ignore[assignment]

    @property
    def robosuite(self) -> Any:
        """robosuite's environment underneath."""
        return self.sim.env

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
        if state is None:
            self.sim.start(int(self.np_random.integers(2**63)))
        elif isinstance(state, Mapping) and "states" in state:
            self.sim.restore(state["states"], state.get("model"))
        else:
            raise ValueError(
                "Robomimic: reset_to needs a mapping with 'states' and, if it is of another model, "
                f"'model'; got {type(state).__name__}"
            )
        return self.get_obs(), {"is_success": self.is_success()}

    def step(self, action: ArrayLike) -> tuple[Observation, float, bool, bool, dict[str, Any]]:
        """One 20 Hz action; raises ValueError on another shape or non-finite values."""
        self.sim.step(self._to_robosuite(action))
        success = self.is_success()
        return self.get_obs(), float(success), success, False, {"is_success": success}

    def is_success(self) -> bool:
        """Whether the task is solved in the present state."""
        return self.sim.is_success()

    def get_obs(self) -> Observation:
        observation: Observation = {}
        for key, value in self.sim.observe(self.keys).items():
            observation[key] = canonical_observation(key, value, self.task).astype(np.float32)
        return {**observation, **self.camera_images()}

    def camera_images(self) -> dict[str, NDArray[np.uint8]]:
        """``<camera>_image`` (H, W, 3) of each observed camera."""
        return {f"{name}_image": self.image(name, self._camera_size) for name in self._cameras}

    def get_state(self) -> dict[str, Any]:
        """``states`` (n,) float64, the flattened state (time, qpos, qvel), and ``model``, XML."""
        return {"states": self.sim.flat_state(), "model": self.sim.xml}

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
        self.sim.restore(states, model)
        return self.get_obs()

    def render(self) -> NDArray[np.uint8] | None:
        """Image (H, W, 3) of the present state; None if made without render mode."""
        if self.render_mode is None:
            return None
        return self.image(self.render_camera, self.render_size)

    def image(self, camera: str, size: int) -> NDArray[np.uint8]:
        """Image (size, size, 3) of the present state.

        Raises:
            OpenGLError: there is none; says which package gives it.
            ValueError: no such camera.
        """
        from cmpolicy_envs.offscreen import OffscreenRenderer

        model = self.robosuite.sim.model._model
        if self._rendered_model is not model:
            self._close_renderer()
            self._renderer = OffscreenRenderer(model, max(self.render_size, self._camera_size))
            self._rendered_model = model
        return self._renderer.render(self.robosuite.sim.data._data, camera, size)

    def action_pixels(self, actions: ArrayLike) -> NDArray[np.float64]:
        """Where on the rendered image a chunk of actions (T, A) leads: (T, arms, 2) x, y px.

        Absolute actions are places. Delta actions are added up from the present place, although
        the arm, which lags behind its targets, does not get as far.
        """
        from cmpolicy_envs.offscreen import project

        n_arms = self.task.n_arms
        chunk = np.asarray(actions, dtype=np.float64)
        arms = chunk.reshape(len(chunk), n_arms, -1)[..., :3]
        sim = self.robosuite.sim
        if self.actions == "delta":
            moves = []
            for arm, robot in enumerate(self.robosuite.robots):
                controller = robot.part_controllers["right"]
                moved = np.clip(arms[:, arm], -1, 1) * controller.output_max[:3]
                if controller.input_ref_frame == "base":
                    moved = moved @ controller.origin_ori.T
                start = sim.data.site_xpos[sim.model.site_name2id(controller.ref_name)]
                moves.append(start + np.cumsum(moved, axis=0))
            arms = np.stack(moves, axis=1)
        model, data = sim.model._model, sim.data._data
        return project(model, data, self.render_camera, arms, self.render_size)

    def close(self) -> None:
        self._close_renderer()
        self.sim.close()

    def _close_renderer(self) -> None:
        if self._renderer is not None:
            self._renderer.close()
        self._renderer = self._rendered_model = None

    def _to_robosuite(self, action: ArrayLike) -> NDArray[np.float64]:
        values = np.asarray(action, dtype=np.float64)
        if values.shape != self.action_space.shape or not np.isfinite(values).all():
            (size,) = self.action_space.shape or ()
            raise ValueError(
                f"Robomimic: {self.task.name} takes {self.actions} actions of {size} finite "
                f"numbers, got {action!r}"
            )
        if self.actions == "delta":
            return np.clip(values, -1.0, 1.0)
        arms = values.reshape(self.task.n_arms, _ABSOLUTE)
        turned = matrix_to_axis_angle(rot6d_to_matrix(arms[:, 3:9]))
        gripper = np.clip(arms[:, 9:], -1.0, 1.0)
        return np.concatenate([arms[:, :3], turned, gripper], axis=1).reshape(-1)

    def _check_names(self) -> None:
        known = self.sim.known_keys
        unknown = [key for key in self.keys if key not in known]
        if unknown:
            raise ValueError(
                f"Robomimic: {self.task.name} observes no {unknown[0]!r}; known: {', '.join(known)}"
            )
        shown = [*self._cameras, *([self.render_camera] if self.render_mode else [])]
        if shown:
            from cmpolicy_envs.offscreen import camera_id

            for camera in shown:
                camera_id(self.robosuite.sim.model._model, camera)

    def _observation_space(self) -> spaces.Dict:
        low_dim = self.sim.observe(self.keys)
        boxes = {k: spaces.Box(-np.inf, np.inf, v.shape, np.float32) for k, v in low_dim.items()}
        shape = (self._camera_size, self._camera_size, 3)
        images = {f"{c}_image": spaces.Box(0, 255, shape, np.uint8) for c in self._cameras}
        return spaces.Dict({**boxes, **images})


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
    high = np.tile(np.repeat([3.0, 1.0], [3, 7]), n_arms).astype(np.float32)
    return spaces.Box(-high, high, dtype=np.float32)
