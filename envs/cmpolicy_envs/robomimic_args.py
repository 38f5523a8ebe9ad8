"""``env_args`` of robomimic data sets: read, translated to robosuite 1.5, written.

A robomimic HDF5 says in the attribute ``data.attrs["env_args"]`` how to build its environment. The
controller settings in it come in three spellings, all of which :func:`translate` brings to the
third, the only one that robosuite 1.5 carries out as it is written:

* robosuite 1.4 and before: one controller, ``{"type": "OSC_POSE", "control_delta": true,
  "damping": 1, ...}``;
* robomimic's files for robosuite 1.5: the composite form, ``{"type": "BASIC", "body_parts":
  {"right": {...}}}``, with 1.4's spellings inside, which robosuite 1.5 drops without a word;
* robosuite 1.5: the composite form with ``input_type`` and ``damping_ratio`` inside, ``body_parts``
  with or without the level ``arms``.
"""

import copy
import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from cmpolicy_envs.robomimic_tasks import get_task

ROBOSUITE_VERSION = "1.5.2"
"""Version that :func:`default_env_args` is written for."""

_ROBOSUITE_TYPE = 1  # robomimic.envs.env_base.EnvType.ROBOSUITE_TYPE
_ROBOT = "Panda"
_ARM = "right"  # robosuite's name for the arm of a robot with one arm
_CONTROLLER = "OSC_POSE"

# Spellings of robosuite 1.4 and of 1.5.
_RENAMED = {"damping": "damping_ratio", "damping_limits": "damping_ratio_limits"}
# What the operational space controller of robosuite 1.5 reads; robosuite drops anything else.
_CONTROLLER_KEYS = frozenset(
    {
        "type",
        "input_max",
        "input_min",
        "output_max",
        "output_min",
        "kp",
        "damping_ratio",
        "impedance_mode",
        "kp_limits",
        "damping_ratio_limits",
        "position_limits",
        "orientation_limits",
        "uncouple_pos_ori",
        "input_type",
        "input_ref_frame",
        "interpolation",
        "ramp_ratio",
        "gripper",
        "lite_physics",
    }
)


class EnvArgsError(ValueError):
    """``env_args`` that cannot be read or carried out; the message names the key."""


@dataclass(frozen=True)
class EnvArgs:
    """How to build an environment, as robomimic stores it."""

    env_name: str
    """robosuite's name, such as ``"Lift"``."""
    env_version: str
    """Version of robosuite that the data was recorded with."""
    type: int
    """robomimic's environment type; 1 is robosuite."""
    env_kwargs: Mapping[str, Any]
    """Arguments of ``robosuite.make``."""

    @classmethod
    def from_json(cls, text: str | bytes, where: str = "env_args") -> "EnvArgs":
        """Read the JSON of ``data.attrs["env_args"]``.

        Args:
            text: the JSON.
            where: file that it comes from, for messages.

        Raises:
            EnvArgsError: not JSON, a key is missing or of another type, or not robosuite's.
        """
        try:
            raw = json.loads(text)
        except (UnicodeDecodeError, json.JSONDecodeError) as error:
            raise EnvArgsError(f"{where}: env_args is not valid JSON: {error}") from None
        if not isinstance(raw, dict):
            raise EnvArgsError(f"{where}: env_args is {raw!r}, expected an object")
        name = _typed(raw, "env_name", str, where)
        kwargs = _typed(raw, "env_kwargs", dict, where)
        kind = raw.get("type", _ROBOSUITE_TYPE)
        if kind != _ROBOSUITE_TYPE:
            raise EnvArgsError(
                f"{where}: env_args: type is {kind!r}; expected {_ROBOSUITE_TYPE}, a robosuite "
                "environment. The data is of another simulator."
            )
        # Files of the first robomimic release state no version: recorded with robosuite 1.2.
        version = raw.get("env_version") or "1.2.0"
        return cls(name, str(version), _ROBOSUITE_TYPE, kwargs)

    def to_json(self) -> str:
        """JSON in robomimic's layout, which :meth:`from_json` reads back."""
        fields = {
            "env_name": self.env_name,
            "env_version": self.env_version,
            "type": self.type,
            "env_kwargs": self.env_kwargs,
        }
        return json.dumps(fields, indent=4)


def default_env_args(task: str) -> EnvArgs:
    """Protocol ``robomimic-ph``: Panda, operational space control with pose deltas at 20 Hz.

    Raises:
        ValueError: no such task.
    """
    known = get_task(task)
    controller: dict[str, Any] = {
        "type": _CONTROLLER,
        "input_max": 1,
        "input_min": -1,
        "output_max": [0.05, 0.05, 0.05, 0.5, 0.5, 0.5],
        "output_min": [-0.05, -0.05, -0.05, -0.5, -0.5, -0.5],
        "kp": 150,
        "damping_ratio": 1,
        "impedance_mode": "fixed",
        "kp_limits": [0, 300],
        "damping_ratio_limits": [0, 10],
        "position_limits": None,
        "orientation_limits": None,
        "uncouple_pos_ori": True,
        "input_type": "delta",
        # As in all of robomimic's data. Only where two robots face each other it differs from
        # "base", the default of robosuite 1.5.
        "input_ref_frame": "world",
        "interpolation": None,
        "ramp_ratio": 0.2,
        "gripper": {"type": "GRIP"},
    }
    kwargs: dict[str, Any] = {
        "robots": [_ROBOT] * known.n_arms,
        "controller_configs": {"type": "BASIC", "body_parts": {_ARM: controller}},
        "control_freq": 20,
        "lite_physics": True,
        "ignore_done": True,
        "reward_shaping": False,
        "use_object_obs": True,
        "use_camera_obs": False,
        "has_renderer": False,
        "has_offscreen_renderer": False,
    }
    if known.n_arms == 2:
        kwargs["env_configuration"] = "opposed"
    return EnvArgs(known.robosuite_env, ROBOSUITE_VERSION, _ROBOSUITE_TYPE, kwargs)


def translate(args: EnvArgs, where: str = "env_args") -> EnvArgs:
    """The same environment in the terms of robosuite 1.5; translating twice changes nothing.

    Controllers of robosuite 1.4 and before act in the world frame, and their physics is that of
    ``lite_physics=False``: both is stated in the result.

    Args:
        args: from a file of any version.
        where: file that they come from, for messages.

    Raises:
        EnvArgsError: a robot other than Panda, a controller other than OSC_POSE, or a setting that
            robosuite 1.5 does not know; names the key.
    """
    kwargs = copy.deepcopy(dict(args.env_kwargs))
    kwargs["robots"] = _robots(kwargs, where)
    if "controller_configs" not in kwargs:
        raise EnvArgsError(f"{where}: env_kwargs lacks controller_configs")
    kwargs["controller_configs"] = _composite(kwargs["controller_configs"], where)
    if _major_minor(args.env_version, where) < (1, 5):
        kwargs.setdefault("lite_physics", False)
    return replace(args, env_kwargs=kwargs)


def with_absolute_actions(args: EnvArgs) -> EnvArgs:
    """The same environment whose actions are target poses in the world frame.

    Args:
        args: in robosuite 1.5's terms, as from :func:`translate`.
    """
    kwargs = copy.deepcopy(dict(args.env_kwargs))
    arm = kwargs["controller_configs"]["body_parts"][_ARM]
    arm["input_type"], arm["input_ref_frame"] = "absolute", "world"
    return replace(args, env_kwargs=kwargs)


def input_type(args: EnvArgs) -> str:
    """``"delta"`` or ``"absolute"``: what the actions of a translated environment are."""
    return str(args.env_kwargs["controller_configs"]["body_parts"][_ARM]["input_type"])


def _robots(kwargs: Mapping[str, Any], where: str) -> list[str]:
    robots = kwargs.get("robots")
    names = [robots] if isinstance(robots, str) else robots
    if not isinstance(names, list) or not names or any(name != _ROBOT for name in names):
        raise EnvArgsError(
            f"{where}: env_kwargs.robots is {robots!r}; the Robomimic tasks are those of the robot "
            f"{_ROBOT!r}"
        )
    return list(names)


def _composite(config: Any, where: str) -> dict[str, Any]:
    """``controller_configs`` in the composite form of robosuite 1.5, one arm per robot."""
    key = "env_kwargs.controller_configs"
    if isinstance(config, list):  # one per robot; robosuite 1.5 takes one for all
        if not config or any(item != config[0] for item in config):
            raise EnvArgsError(
                f"{where}: {key} holds {len(config)} different controllers; expected one, which "
                "all robots share"
            )
        config = config[0]
    if not isinstance(config, dict):
        raise EnvArgsError(f"{where}: {key} is {config!r}; expected the settings of a controller")
    if "body_parts" not in config:
        arm = _arm(config, where, key, frame="world")
        return {"type": "BASIC", "body_parts": {_ARM: arm}}
    if config.get("type") != "BASIC":
        raise EnvArgsError(
            f"{where}: {key}.type is {config.get('type')!r}; expected 'BASIC', the composite "
            "controller of a fixed arm"
        )
    parts = config["body_parts"]
    key += ".body_parts"
    if isinstance(parts, dict) and "arms" in parts:
        parts = parts["arms"]
        key += ".arms"
    if not isinstance(parts, dict) or _ARM not in parts:
        raise EnvArgsError(f"{where}: {key} lacks {_ARM!r}, the arm of a {_ROBOT}")
    # Other parts (left arm, torso, base) are settings of robots that have them.
    arm = _arm(parts[_ARM], where, f"{key}.{_ARM}", frame="base")
    return {"type": "BASIC", "body_parts": {_ARM: arm}}


def _arm(config: Any, where: str, key: str, *, frame: str) -> dict[str, Any]:
    """Settings of one arm's controller in the spellings of robosuite 1.5.

    ``frame`` is that of the actions unless ``config`` says another: 1.4 knows only that of the
    world, 1.5 takes that of the robot's base.
    """
    if not isinstance(config, dict):
        raise EnvArgsError(f"{where}: {key} is {config!r}; expected the settings of a controller")
    if config.get("type") != _CONTROLLER:
        raise EnvArgsError(
            f"{where}: {key}.type is {config.get('type')!r}; the Robomimic tasks are controlled by "
            f"{_CONTROLLER!r}, the pose of the gripper"
        )
    arm: dict[str, Any] = {str(_RENAMED.get(name, name)): value for name, value in config.items()}
    if "control_delta" in arm:
        kind = "delta" if arm.pop("control_delta") else "absolute"
        if arm.setdefault("input_type", kind) != kind:
            raise EnvArgsError(
                f"{where}: {key}.control_delta says {kind!r} actions and {key}.input_type "
                f"{arm['input_type']!r}"
            )
    arm.pop("control_ori", None)  # what OSC_POSE means
    arm.setdefault("input_type", "delta")
    arm.setdefault("input_ref_frame", frame)
    arm.setdefault("gripper", {"type": "GRIP"})
    arm.setdefault("interpolation", None)  # robosuite looks it up without asking
    _check_arm(arm, where, key)
    return arm


def _check_arm(arm: Mapping[str, Any], where: str, key: str) -> None:
    unknown = sorted(set(arm) - _CONTROLLER_KEYS)
    if unknown:
        raise EnvArgsError(
            f"{where}: {key}.{unknown[0]} is no setting of robosuite 1.5's {_CONTROLLER} "
            "controller and cannot be translated"
        )
    choices = {
        "input_type": ("delta", "absolute"),
        "input_ref_frame": ("world", "base"),
        "impedance_mode": ("fixed",),  # the others take stiffness among the actions
        "interpolation": (None,),  # would act on top of chunks of actions
        "position_limits": (None,),  # not implemented by robosuite 1.5
        "orientation_limits": (None,),
    }
    for name, allowed in choices.items():
        if name in arm and arm[name] not in allowed:
            expected = " or ".join(repr(value) for value in allowed)
            raise EnvArgsError(f"{where}: {key}.{name} is {arm[name]!r}; expected {expected}")


def _typed(raw: Mapping[str, Any], key: str, kind: type[Any], where: str) -> Any:
    if key not in raw:
        raise EnvArgsError(f"{where}: env_args lacks {key}")
    if not isinstance(raw[key], kind):
        expected = "an object" if kind is dict else "text"
        raise EnvArgsError(f"{where}: env_args: {key} is {raw[key]!r}, expected {expected}")
    return raw[key]


def _major_minor(version: str, where: str) -> tuple[int, int]:
    try:
        major, minor = version.split(".")[:2]
        return int(major), int(minor)
    except ValueError:
        raise EnvArgsError(
            f"{where}: env_args: env_version is {version!r}, expected such as '1.5.1'"
        ) from None
