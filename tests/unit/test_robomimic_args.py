"""``env_args`` in all the spellings of robomimic's files, and what cannot be carried out."""

import json
from typing import Any

import pytest

from cmpolicy_envs.robomimic_args import (
    EnvArgs,
    EnvArgsError,
    default_env_args,
    input_type,
    translate,
    with_absolute_actions,
)
from cmpolicy_envs.robomimic_tasks import TASKS, get_task, task_of

# As robomimic's files state it, for robosuite 1.4.1 and, nested, for 1.5.1.
OLD_CONTROLLER = {
    "type": "OSC_POSE",
    "input_max": 1,
    "input_min": -1,
    "output_max": [0.05, 0.05, 0.05, 0.5, 0.5, 0.5],
    "output_min": [-0.05, -0.05, -0.05, -0.5, -0.5, -0.5],
    "kp": 150,
    "damping": 1,
    "impedance_mode": "fixed",
    "kp_limits": [0, 300],
    "damping_limits": [0, 10],
    "position_limits": None,
    "orientation_limits": None,
    "uncouple_pos_ori": True,
    "control_delta": True,
    "interpolation": None,
    "ramp_ratio": 0.2,
}
OLD_KWARGS: dict[str, Any] = {
    "has_renderer": False,
    "has_offscreen_renderer": False,
    "ignore_done": True,
    "use_object_obs": True,
    "use_camera_obs": False,
    "control_freq": 20,
    "controller_configs": OLD_CONTROLLER,
    "robots": ["Panda"],
    "camera_depths": False,
    "camera_heights": 84,
    "camera_widths": 84,
    "reward_shaping": False,
}
NESTED = {
    "type": "BASIC",
    "body_parts": {
        "right": {**OLD_CONTROLLER, "input_ref_frame": "world", "gripper": {"type": "GRIP"}}
    },
}


def args(version: str = "1.4.1", name: str = "Lift", **kwargs: Any) -> EnvArgs:
    return EnvArgs(name, version, 1, {**OLD_KWARGS, **kwargs})


def arm(given: EnvArgs) -> dict[str, Any]:
    config = given.env_kwargs["controller_configs"]
    assert config["type"] == "BASIC"
    assert list(config["body_parts"]) == ["right"]
    right: dict[str, Any] = config["body_parts"]["right"]
    return right


def test_a_controller_of_1_4_becomes_the_protocols_own() -> None:
    new = translate(args())
    expected = default_env_args("lift").env_kwargs["controller_configs"]
    assert new.env_kwargs["controller_configs"] == expected
    assert new.env_kwargs["lite_physics"] is False  # the physics of 1.4
    assert OLD_KWARGS["controller_configs"]["damping"] == 1  # the given ones are left alone


@pytest.mark.parametrize(
    "nested", [NESTED, {"type": "BASIC", "body_parts": {"arms": NESTED["body_parts"]}}]
)
def test_the_spellings_of_robomimics_files_for_1_5(nested: dict[str, Any]) -> None:
    new = translate(args("1.5.1", controller_configs=nested, lite_physics=False))
    assert arm(new) == arm(default_env_args("lift"))


def test_translating_twice_changes_nothing() -> None:
    for given in (args(), args("1.5.1", controller_configs=NESTED), default_env_args("square")):
        once = translate(given)
        assert translate(once) == once


def test_1_5_without_a_frame_acts_in_that_of_the_base() -> None:
    part = {"type": "OSC_POSE", "kp": 150, "gripper": {"type": "GRIP"}}
    config = {"type": "BASIC", "body_parts": {"right": part}}
    assert arm(translate(args("1.5.1", controller_configs=config)))["input_ref_frame"] == "base"


def test_absolute_actions_are_recognised_and_asked_for() -> None:
    old = args(controller_configs={**OLD_CONTROLLER, "control_delta": False})
    assert input_type(translate(old)) == "absolute"
    assert input_type(translate(args())) == "delta"
    changed = with_absolute_actions(translate(args()))
    assert input_type(changed) == "absolute"
    assert arm(changed)["input_ref_frame"] == "world"


def test_two_robots_share_one_controller() -> None:
    both = args(
        name="TwoArmTransport", robots=["Panda", "Panda"], controller_configs=[OLD_CONTROLLER] * 2
    )
    assert arm(translate(both)) == arm(default_env_args("transport"))
    different = [OLD_CONTROLLER, {**OLD_CONTROLLER, "kp": 10}]
    with pytest.raises(EnvArgsError, match="controller_configs holds 2 different controllers"):
        translate(args(controller_configs=different))


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"robots": ["Sawyer"]}, r"env_kwargs\.robots is \['Sawyer'\].*'Panda'"),
        ({"robots": []}, r"env_kwargs\.robots is \[\]"),
        (
            {"controller_configs": {**OLD_CONTROLLER, "type": "JOINT_VELOCITY"}},
            r"env_kwargs\.controller_configs\.type is 'JOINT_VELOCITY'.*'OSC_POSE'",
        ),
        (
            {"controller_configs": {**NESTED, "type": "WHOLE_BODY_IK"}},
            r"controller_configs\.type is 'WHOLE_BODY_IK'; expected 'BASIC'",
        ),
        (
            {"controller_configs": {"type": "BASIC", "body_parts": {"left": OLD_CONTROLLER}}},
            r"controller_configs\.body_parts lacks 'right'",
        ),
        (
            {"controller_configs": {**OLD_CONTROLLER, "impedance_mode": "variable"}},
            r"impedance_mode is 'variable'; expected 'fixed'",
        ),
        (
            {"controller_configs": {**OLD_CONTROLLER, "interpolation": "linear"}},
            r"interpolation is 'linear'; expected None",
        ),
        (
            {"controller_configs": {**OLD_CONTROLLER, "velocity_limits": [-1, 1]}},
            r"controller_configs\.velocity_limits is no setting .* cannot be translated",
        ),
        (
            {"controller_configs": {**OLD_CONTROLLER, "input_type": "absolute"}},
            r"control_delta says 'delta' actions and .*input_type 'absolute'",
        ),
        ({"controller_configs": "OSC_POSE"}, r"controller_configs is 'OSC_POSE'; expected the set"),
    ],
)
def test_what_cannot_be_translated_names_the_key(kwargs: dict[str, Any], message: str) -> None:
    with pytest.raises(EnvArgsError, match=rf"demo\.hdf5: .*{message}"):
        translate(args(**kwargs), "demo.hdf5")


def test_no_controller_and_no_version() -> None:
    kwargs = {k: v for k, v in OLD_KWARGS.items() if k != "controller_configs"}
    with pytest.raises(EnvArgsError, match="env_kwargs lacks controller_configs"):
        translate(EnvArgs("Lift", "1.4.1", 1, kwargs))
    with pytest.raises(EnvArgsError, match="env_version is 'newest'"):
        translate(args("newest"))


def test_json_there_and_back() -> None:
    given = args()
    assert EnvArgs.from_json(given.to_json(), "demo.hdf5") == given
    raw = json.loads(given.to_json())
    assert list(raw) == ["env_name", "env_version", "type", "env_kwargs"]
    del raw["env_version"]  # as in robomimic's first files
    assert EnvArgs.from_json(json.dumps(raw)).env_version == "1.2.0"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "not valid JSON"),
        (b"\xff\xfe", "not valid JSON"),
        ("[]", r"env_args is \[\], expected an object"),
        ("{}", "lacks env_name"),
        ('{"env_name": "Lift"}', "lacks env_kwargs"),
        ('{"env_name": 3, "env_kwargs": {}}', "env_name is 3, expected text"),
        ('{"env_name": "Lift", "env_kwargs": 1}', "env_kwargs is 1, expected an object"),
        ('{"env_name": "PushT", "env_kwargs": {}, "type": 2}', "type is 2.*another simulator"),
    ],
)
def test_what_is_no_env_args_names_the_file(text: str | bytes, message: str) -> None:
    with pytest.raises(EnvArgsError, match=rf"demo\.hdf5: .*{message}"):
        EnvArgs.from_json(text, "demo.hdf5")


def test_tasks_by_either_name() -> None:
    assert list(TASKS) == ["lift", "can", "square", "transport", "tool_hang"]
    for task in TASKS.values():
        assert task_of(task.robosuite_env) is get_task(task.name) is task
        assert len(default_env_args(task.name).env_kwargs["robots"]) == task.n_arms
    with pytest.raises(ValueError, match=r"'toolhang'; known: lift, .*did you mean 'tool_hang'"):
        get_task("toolhang")
    with pytest.raises(ValueError, match="'Door' is no task of Robomimic; known: Lift"):
        task_of("Door")
