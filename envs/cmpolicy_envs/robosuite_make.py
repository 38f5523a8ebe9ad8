"""robosuite, imported without its greetings and built from ``env_args``."""

import inspect
import logging
from typing import Any

from cmpolicy_envs.robomimic_args import EnvArgs, EnvArgsError

# What this package sets itself: cameras are rendered by it, and episodes are ended by Gymnasium.
_OURS: dict[str, Any] = {
    "has_renderer": False,
    "has_offscreen_renderer": False,
    "use_camera_obs": False,
    "use_object_obs": True,
    "ignore_done": True,
    "hard_reset": True,
    # "mjviewer", the default, looks up the settings of a viewer at every reset.
    "renderer": "mujoco",
}
# Settings of robosuite's own cameras and viewers, without a meaning here. The last were arguments
# of robosuite before 1.2 and are still in files.
_IGNORED = (
    "camera_names",
    "camera_name",
    "camera_heights",
    "camera_height",
    "camera_widths",
    "camera_width",
    "camera_depths",
    "camera_depth",
    "camera_segmentations",
    "render_camera",
    "render_collision_mesh",
    "render_visual_mesh",
    "render_gpu_device_id",
    "renderer_config",
    "horizon",
    "seed",
    "gripper_visualizations",
    "gripper_visualization",
    "use_indicator_object",
)


def import_robosuite() -> Any:
    """The module ``robosuite``.

    Raises:
        ModuleNotFoundError: it is not installed; says how to install it.
    """
    logger = logging.getLogger("robosuite_logs")
    # robosuite warns at every import that its user has written no settings file and has not
    # installed further robots; its logger resets its level, so a filter it is.
    logger.addFilter(_drop)
    try:
        import robosuite
    except ModuleNotFoundError as error:
        raise missing_extra(error) from None
    finally:
        logger.removeFilter(_drop)
    return robosuite


def missing_extra(error: ModuleNotFoundError) -> ModuleNotFoundError:
    """An error that says how to install what ``error`` misses; ``error`` if that is no extra."""
    package = (error.name or "").partition(".")[0]
    if package not in ("robosuite", "robomimic", "mujoco"):
        return error
    return ModuleNotFoundError(
        f"the Robomimic tasks need {package}, which is not installed; install it with: "
        "pip install 'cmpolicy[robomimic]'",
        name=package,
    )


def make_robosuite(args: EnvArgs) -> Any:
    """robosuite's environment of ``args``, without cameras.

    Args:
        args: in robosuite 1.5's terms (:func:`cmpolicy_envs.robomimic_args.translate`).

    Raises:
        EnvArgsError: robosuite knows no such environment or argument; names the key.
        ModuleNotFoundError: robosuite is not installed.
    """
    robosuite = import_robosuite()
    known = robosuite.environments.base.REGISTERED_ENVS
    if args.env_name not in known:
        raise EnvArgsError(
            f"env_args: robosuite {robosuite.__version__} has no environment {args.env_name!r}"
        )
    kwargs = {key: value for key, value in args.env_kwargs.items() if key not in _IGNORED} | _OURS
    arguments = _arguments(known[args.env_name])
    unknown = sorted(set(kwargs) - arguments)
    if unknown:
        raise EnvArgsError(
            f"env_args: env_kwargs.{unknown[0]} is no argument of robosuite "
            f"{robosuite.__version__}'s {args.env_name} and cannot be translated"
        )
    return robosuite.make(args.env_name, **kwargs)


def _arguments(env_class: type[Any]) -> set[str]:
    """Names of what a robosuite environment and the classes it is derived from are made with."""
    names: set[str] = set()
    for cls in env_class.__mro__:
        parameters = inspect.signature(cls.__init__).parameters.values()  # type: ignore[misc]
        names |= {p.name for p in parameters if p.kind is not p.VAR_KEYWORD}
        if all(p.kind is not p.VAR_KEYWORD for p in parameters):
            break
    return names - {"self"}


def _drop(record: logging.LogRecord) -> bool:
    return record.levelno >= logging.ERROR
