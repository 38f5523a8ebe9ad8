"""The Robomimic tasks for robomimic's own tools: its ``EnvBase`` over :class:`RobomimicEnv`.

robomimic 0.3.0 brings an environment for robosuite that imports mujoco-py and does not run on
robosuite 1.5; this one takes its place::

    metadata = robomimic.utils.file_utils.get_env_metadata_from_dataset("lift.hdf5")
    env = RobomimicEnvBase.from_metadata(metadata)
    robomimic.utils.train_utils.run_rollout(policy, env, horizon=400)
"""

import builtins
import contextlib
import io
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from cmpolicy_envs.robomimic import RobomimicEnv
from cmpolicy_envs.robomimic_args import EnvArgs
from cmpolicy_envs.robomimic_tasks import task_of
from cmpolicy_envs.robosuite_make import import_robosuite, missing_extra

try:
    # robomimic prints a box at its import when its user has written no settings file.
    with contextlib.redirect_stdout(io.StringIO()):
        from robomimic.envs.env_base import EnvBase, EnvType
except ModuleNotFoundError as _error:
    raise missing_extra(_error) from None

_Observation = dict[str, NDArray[Any]]

_NO_GOAL = (
    "the Robomimic tasks have no goal observation; train and roll out without goals: "
    "train.goal_mode null in robomimic's config"
)


class RobomimicEnvBase(EnvBase):  # type: ignore[misc]  # robomimic has no types
    """A task of Robomimic in robomimic's terms.

    Observations are float64 and hold every low-dimensional key of the robots beside ``object``, as
    robosuite gives them; images are (H, W, 3) uint8, or what robomimic makes of them with
    ``postprocess_visual_obs``.

    Args:
        env_name: robosuite's name, such as ``Lift``.
        render: must be False; there is no window.
        render_offscreen: whether :meth:`render` will be called.
        use_image_obs: whether images of ``camera_names`` are observed.
        postprocess_visual_obs: whether images are made ready for robomimic's networks.
        env_version: of robosuite, that the data was recorded with.
        env_kwargs: as in a data set's ``env_args``.

    Raises:
        ValueError: no task of that name, ``env_kwargs`` that cannot be carried out, or a window.
        ModuleNotFoundError: robosuite is not installed; says how to install it.
        OpenGLError: images are asked for and there is no OpenGL; says which package gives it.
    """

    def __init__(
        self,
        env_name: str,
        render: bool = False,
        render_offscreen: bool = False,
        use_image_obs: bool = False,
        postprocess_visual_obs: bool = True,
        *,
        env_version: str | None = None,
        **env_kwargs: Any,
    ) -> None:
        if render:
            raise ValueError(
                "RobomimicEnvBase: there is no window; give render_offscreen=True, and "
                "mode='rgb_array' to render"
            )
        version = env_version or _version_of(env_kwargs)
        self._args = EnvArgs(env_name, version, EnvType.ROBOSUITE_TYPE, dict(env_kwargs))
        self.postprocess_visual_obs = postprocess_visual_obs
        cameras, size = _cameras(env_kwargs) if use_image_obs else ((), 84)
        self.env = RobomimicEnv(
            task_of(env_name).name,
            env_args=self._args,
            cameras=cameras,
            camera_size=size,
            render_mode="rgb_array" if render_offscreen else None,
        )
        self._keys = self.env.sim.known_keys
        self.env.sim.sense_all()

    @classmethod
    def from_metadata(cls, env_meta: Mapping[str, Any], **options: Any) -> "RobomimicEnvBase":
        """From ``env_args`` of a data set; ``options`` are arguments of the class."""
        version = env_meta.get("env_version")
        kwargs = {**env_meta["env_kwargs"], **options}
        return cls(env_meta["env_name"], env_version=version, **kwargs)

    @classmethod
    def create_for_data_processing(
        cls,
        env_name: str,
        camera_names: Sequence[str],
        camera_height: int,
        camera_width: int,
        reward_shaping: bool,
        **kwargs: Any,
    ) -> "RobomimicEnvBase":
        """Environment that observations and rewards of recorded states are taken from."""
        kwargs |= {
            "camera_names": list(camera_names),
            "camera_heights": camera_height,
            "camera_widths": camera_width,
            "reward_shaping": reward_shaping,
        }
        images = {"use_image_obs": bool(camera_names), "postprocess_visual_obs": False}
        return cls(env_name, **(kwargs | images))

    def step(self, action: ArrayLike) -> tuple[_Observation, float, bool, dict[str, Any]]:
        """Observation, robosuite's reward, False (episodes end by their length) and info."""
        self.env.sim.step(np.clip(np.asarray(action, dtype=np.float64), -1.0, 1.0))
        return self.get_observation(), self.get_reward(), self.is_done(), {}

    def reset(self, seed: int | None = None) -> _Observation:
        """Start an episode, reproducible where a seed is given."""
        self.env.reset(seed=seed)
        return self.get_observation()

    def reset_to(self, state: Mapping[str, Any]) -> _Observation | None:
        """Restore ``states`` (and ``model``) of a recorded episode.

        Raises:
            ValueError: the state is not of the model, or the model cannot be loaded.
        """
        if "states" not in state:
            if "model" in state:
                raise ValueError("RobomimicEnvBase: reset_to needs 'states' beside 'model'")
            return None
        self.env.sim.restore(state["states"], state.get("model"))
        return self.get_observation()

    def render(
        self,
        mode: str = "human",
        height: int | None = None,
        width: int | None = None,
        camera_name: str | None = None,
    ) -> NDArray[np.uint8]:
        """Image (H, W, 3) of the present state; H and W are equal.

        Raises:
            ValueError: another mode than ``rgb_array``, or a shape that is not square.
            OpenGLError: there is none; says which package gives it.
        """
        if mode != "rgb_array":
            raise ValueError(f"RobomimicEnvBase: mode is {mode!r}; only 'rgb_array' is supported")
        sizes = {size for size in (height, width) if size is not None} or {self.env.render_size}
        if len(sizes) != 1:
            raise ValueError(f"RobomimicEnvBase: images are square, got {height} x {width}")
        return self.env.image(camera_name or self.env.render_camera, sizes.pop())

    def get_observation(self, di: object = None) -> _Observation:
        """Observation of the present state."""
        observation: _Observation = dict(self.env.sim.observe(self._keys))
        for key, image in self.env.camera_images().items():
            if self.postprocess_visual_obs:
                from robomimic.utils import obs_utils

                image = obs_utils.process_obs(obs=image, obs_modality="rgb")
            observation[key] = image
        return observation

    def get_state(self) -> dict[str, Any]:
        """``states`` and ``model``; see :meth:`reset_to`."""
        return self.env.get_state()

    def get_reward(self) -> float:
        """robosuite's reward of the present state."""
        return float(self.env.robosuite.reward())

    def get_goal(self) -> _Observation:
        """Not supported: the tasks have no goal observation."""
        raise NotImplementedError(_NO_GOAL)

    def set_goal(self, **kwargs: Any) -> None:
        """Not supported: the tasks have no goal observation."""
        raise NotImplementedError(_NO_GOAL)

    def is_done(self) -> bool:
        """False: episodes of robomimic end by their length."""
        return False

    def is_success(self) -> dict[str, bool]:
        """``{"task": whether it is solved}``."""
        return {"task": self.env.is_success()}

    @property
    def action_dimension(self) -> int:
        """Numbers of an action."""
        return int(np.prod(self.env.action_space.shape or ()))

    @property
    def name(self) -> str:
        """robosuite's name of the environment."""
        return self._args.env_name

    @property
    def type(self) -> int:
        """robomimic's number for environments of robosuite."""
        return int(EnvType.ROBOSUITE_TYPE)

    @property
    def version(self) -> str:
        """Version of robosuite that runs."""
        return str(import_robosuite().__version__)

    def serialize(self) -> dict[str, Any]:
        """``env_args`` of this environment, in robosuite 1.5's terms."""
        args = self.env.env_args
        return {
            "env_name": args.env_name,
            "env_version": self.version,
            "type": self.type,
            "env_kwargs": dict(args.env_kwargs),
        }

    @property
    def rollout_exceptions(self) -> tuple[builtins.type[Exception], ...]:  # `type` is EnvBase's
        """What an unstable simulation raises."""
        import mujoco

        return (mujoco.FatalError,)

    def close(self) -> None:
        self.env.close()

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self._args.to_json()})"


def _version_of(env_kwargs: Mapping[str, Any]) -> str:
    """A version that writes controllers so, where none is stated."""
    config = env_kwargs.get("controller_configs")
    return "1.5.0" if isinstance(config, Mapping) and "body_parts" in config else "1.4.1"


def _cameras(env_kwargs: Mapping[str, Any]) -> tuple[tuple[str, ...], int]:
    names = env_kwargs.get("camera_names") or ["agentview"]
    sides: set[Any] = set()
    for key in ("camera_heights", "camera_widths"):
        value = env_kwargs.get(key, 84)  # one number, or one for each camera
        sides |= set(value) if isinstance(value, Sequence) else {value}
    if len(sides) != 1 or not isinstance(side := sides.pop(), int):
        raise ValueError("RobomimicEnvBase: images are square and of one size for all cameras")
    return ((names,) if isinstance(names, str) else tuple(names)), side
