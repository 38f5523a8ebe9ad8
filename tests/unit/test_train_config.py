"""Settings: what is accepted, and what a wrong one is answered with."""

import re
import shlex
from dataclasses import replace
from importlib.resources import files
from typing import Any

import pytest
import yaml

from cmpolicy.cli.parse import parse
from cmpolicy.cli.train import COMPOSITION, compose
from cmpolicy.experiment.config import DataConfig, TaskConfig, TrainConfig
from cmpolicy.experiment.objective import ObjectiveConfig
from cmpolicy.experiment.train import describe
from cmpolicy.nn.encoders.state import StateEncoderConfig
from cmpolicy.nn.unet1d import UNet1DConfig
from cmpolicy.schema import ConfigError

CUSTOM = ["task=custom", "data.path=my.zarr", "data.obs=[state]", "control_hz=10"]


build = compose


@pytest.fixture(scope="module")
def defaults() -> dict[str, Any]:
    settings = COMPOSITION.compose([])
    settings.pop("out")
    return settings


def test_defaults_are_push_t_on_the_bundled_demonstrations() -> None:
    config = build()
    assert (config.task.name, config.task.protocol) == ("pusht", "pusht-dp")
    assert config.data.name == "pusht_scripted"
    assert dict(config.data.obs) == {"agent_pos": "state[:2]", "keypoint": "keypoint"}
    assert config.objective.name == "psd"
    assert ObjectiveConfig().name == "psd"  # in Python, too
    assert config.nfe == 1


@pytest.mark.parametrize("preset", ["quick", "standard", "gpu", "demo"])
@pytest.mark.parametrize("objective", ["psd", "isd", "fm"])
def test_every_preset_composes_with_every_objective(preset: str, objective: str) -> None:
    config = build(f"preset={preset}", f"objective={objective}")
    config.objective.build()
    assert config.nfe == (10 if objective == "fm" else 1)
    assert config.objective.sampler_kind == ("diagonal" if objective == "fm" else "flow_map")


def test_what_the_user_types_wins_over_presets_and_groups() -> None:
    config = build("preset=gpu", "net=tiny", "objective=fm", "eval.nfe=3", "examples=2e6")
    assert config.net == UNet1DConfig((32, 64, 128), kernel_size=5, time_dim=64)
    assert config.encoder == StateEncoderConfig(128)
    assert config.eval.nfe == 3
    assert config.examples == 2_000_000


def test_custom_task_takes_a_list_or_a_mapping_of_observations() -> None:
    assert dict(build(*CUSTOM).data.obs) == {"state": "state"}
    mapping = build(*CUSTOM[:2], "data.obs={arm: 'state[:2]', keypoint: keypoint}")
    assert dict(mapping.data.obs) == {"arm": "state[:2]", "keypoint": "keypoint"}


def test_observations_replace_those_of_the_data_group() -> None:
    assert dict(build("task=pusht", "data.obs=[state]").data.obs) == {"state": "state"}
    mapping = build("task=pusht", "data.obs={agent_pos: 'state[:2]'}")
    assert dict(mapping.data.obs) == {"agent_pos": "state[:2]"}


def test_settings_survive_a_round_trip() -> None:
    config = build("net.down_dims=[16, 32]", "optim.grad_clip=null")
    assert TrainConfig.from_mapping(config.to_dict()) == config
    assert config.net.down_dims == (16, 32)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("optim.lrr=1", r"unknown setting 'optim.lrr'; did you mean 'optim.lr'.*\n.*weight_decay"),
        ("lr=1e-3", r"unknown setting 'lr'; did you mean 'optim.lr'"),
        ("sampels=10", r"did you mean 'examples'.*\n(.|\n)*--help"),
        ("+sampels=10", r"did you mean 'examples'"),
        ("objective.sd_shar=1", r"did you mean 'objective.sd_share'"),
        ("objective.epsilon=0.1", r"epsilon is a setting of objective=.*\|isd\|"),
        ("encoder.crop=0.9", r"crop is a setting of encoder=compact\|resnet18"),
        ("+objective.sd_shar=1", r"unknown setting 'objective.sd_shar'"),
        ("preset=quik", r"unknown choice preset=quik; did you mean preset=quick"),
        ("net=huge", r"net is one of \['base', 'large', 'small', 'tiny', 'unet1d'\](.|\n)*PLUGINS"),
        ("examples", r"'examples' is not a setting; settings are given as key=value"),
        ("data.obs=[state", r"cannot read 'data.obs=\[state'"),
        ("optim.lr=1e-3,1e-4", r"--multirun"),
        ("task=custom", r"data.obs is not set.*data.obs=\[state\]"),
    ],
)
def test_a_word_that_means_nothing_is_explained(words: str, message: str) -> None:
    with pytest.raises(ConfigError) as error:
        build(words)
    assert re.search(message, str(error.value)), str(error.value)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("optim.lr=fast", r"optim.lr must be a number, got 'fast'"),
        ("batch_size=1.5", r"batch_size must be a whole number, got 1.5"),
        ("examples=null", r"examples is not set; give examples=<a whole number>"),
        ("optim.schedule=linear", r"optim.schedule='linear' is not one of cosine, constant"),
        ("optim.lr=-1", r"optim.lr=-1.0 must be above 0"),
        ("optim.betas=[0.9]", r"optim.betas must be two numbers in \[0, 1\), got \[0.9\]"),
        ("ema.min_decay=0.9999", r"ema.min_decay=0.9999 and ema.decay=0.99\d+ must be in order"),
        ("batch_size=0", r"batch_size=0 must be at least 1"),
        ("data.forget_history=1", r"data.forget_history=1.0 must be in \[0, 1\)"),
        ("examples=100", r"examples=100 is less than one batch \(batch_size=\d+\)"),
        ("optim.warmup=9000000000", r"optim.warmup=9000000000 leaves nothing of examples="),
        ("policy.horizon=15", r"policy.horizon=15 is not divisible by 4.*horizon=12 or 16"),
        ("policy.warm_start=0", r"policy.warm_start=0.0 must be a time in \(0, 1\]"),
        ("policy.n_action_steps=16", r"policy.horizon=16 is too short.*n_obs_steps=2.*least 17"),
        ("net.down_dims=[20]", r"down_dims=\[20\]: 20 is not a multiple of n_groups=8"),
        ("data.short_episodes=drop", r"data.short_episodes='drop' is not one of pad, skip"),
        ("data.action_rotations=[euler:1]", r"cannot read 'euler:1': unknown rotation"),
        ("control_hz=0", r"control_hz=0.0 must be above 0"),
        ("log.trackers=[mlflow]", r"log.trackers\[0\]='mlflow' is not one of tensorboard, wandb"),
        ("data.obs=state", r"data.obs=state must be a list: data.obs=\[state\]"),
        ("data.obs=[action]", r"data.obs has the key 'action'"),
    ],
)
def test_a_wrong_value_is_explained(defaults: dict[str, Any], words: str, message: str) -> None:
    with pytest.raises(ConfigError) as error:
        TrainConfig.from_mapping(COMPOSITION.replace(defaults, parse([words])))
    assert re.search(message, str(error.value)), str(error.value)


def test_unknown_keys_list_only_their_own_group() -> None:
    with pytest.raises(ConfigError) as error:
        build("eval.episode=3")
    allowed = str(error.value).splitlines()[1]
    assert allowed.startswith("allowed under 'eval': eval.env_timeout, eval.episodes")
    assert "optim" not in allowed


def test_overrides_of_finished_settings() -> None:
    before = {"examples": 10, "optim": {"lr": 1.0}}
    changed = COMPOSITION.replace(before, parse(["examples=20", "optim.lr=0.5"]))
    assert changed == {"examples": 20, "optim": {"lr": 0.5}}


def test_python_and_the_command_line_train_the_same_thing() -> None:
    """The dataclasses hold the default recipe; the YAML files hold only what differs from it."""
    data = DataConfig(
        name="pusht_scripted",
        obs={"agent_pos": "state[:2]", "keypoint": "keypoint"},
        action_rotations=(),
    )
    task = TaskConfig(name="pusht", protocol="pusht-dp")
    ours, composed = TrainConfig(data=data, task=task, control_hz=10), compose()
    assert ours.objective.build() == composed.objective.build()
    assert replace(ours, objective=composed.objective) == composed


@pytest.mark.parametrize("group", ["preset", "net", "encoder", "task", "data", "objective"])
def test_the_yaml_files_hold_only_what_differs_from_the_defaults(group: str) -> None:
    def repeated(chosen: dict[str, Any], default: dict[str, Any], where: str) -> list[str]:
        found = []
        for key, value in chosen.items():
            if isinstance(value, dict) and isinstance(default.get(key), dict):
                found += repeated(value, default[key], f"{where}.{key}")
            elif key in default and default[key] == value and key not in ("kind", "name"):
                found.append(f"{where}.{key}={value}")
        return found

    bare = TrainConfig.complete({})
    for file in sorted((files("cmpolicy_conf") / group).iterdir(), key=str):
        chosen = yaml.safe_load(file.read_text()) or {}
        chosen.pop("defaults", None)
        is_global = file.read_text().startswith("# @package _global_")
        default = bare if is_global or not chosen else bare[group]
        assert repeated(chosen, default, file.name) == []


@pytest.mark.parametrize("word", ["out=20240116", "out=true", "out=1e5", "out=läuft/über"])
def test_text_stays_text(word: str) -> None:
    assert COMPOSITION.compose([word])["out"] == word.partition("=")[2]
    assert compose("task=custom", "data.obs=[a]", "data.path=20240115").data.path == "20240115"


def test_a_path_may_begin_with_a_tilde() -> None:
    """No shell expands it behind ``data.path=``."""
    config = compose("task=custom", "data.path=~/x.zarr", "data.obs=[state]", "control_hz=10")
    assert config.data.path == "~/x.zarr"
    with pytest.raises(ConfigError, match=r"write batch_size=\[1,2\] for a list"):
        compose("batch_size=1,2")


@pytest.mark.parametrize(
    "words",
    [
        ["task=pusht", "preset=demo"],
        ["task=lift_image", "data.path=a.zarr", "objective=isd", "objective.epsilon=0.1"],
        ["objective=fm", "data.augment=[mirror]", "data.normalize.keypoint=minmax", "net=tiny"],
        [*CUSTOM, "data.obs={arm: 'state[:2]', top: {key: img, kind: image}}", "encoder=resnet18"],
    ],
)
def test_what_a_card_tells_of_a_run_from_python_makes_the_run_again(words: list[str]) -> None:
    config = compose(*words)
    told = describe(config)
    again = compose(*shlex.split(told.removeprefix("cmpolicy.train: ")))
    assert replace(again, data=replace(again.data, path=config.data.path)) == config
    assert "zero_share" not in told  # defaults of the objective are not told
