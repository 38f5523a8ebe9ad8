"""Settings: what is accepted, and what a wrong one is answered with."""

import re
from typing import Any

import pytest

from cmpolicy.cli.parse import apply, compose_settings, parse
from cmpolicy.nn.encoders.state import StateEncoderConfig
from cmpolicy.nn.unet1d import UNet1DConfig
from cmpolicy.schema import ConfigError
from cmpolicy.training.config import TrainConfig

CUSTOM = ["task=custom", "data.path=my.zarr", "data.obs=[state]"]


def build(*words: str) -> TrainConfig:
    settings = compose_settings("train", words)
    settings.pop("out")
    return TrainConfig.from_mapping(settings)


@pytest.fixture(scope="module")
def defaults() -> dict[str, Any]:
    settings = compose_settings("train", [])
    settings.pop("out")
    return settings


def test_defaults_are_push_t_on_the_bundled_demonstrations() -> None:
    config = build()
    assert (config.task.name, config.task.protocol) == ("pusht", "pusht-dp")
    assert config.data.name == "pusht_scripted"
    assert dict(config.data.obs) == {"agent_pos": "state[:2]", "keypoint": "keypoint"}
    assert config.objective.name == "isd"
    assert config.eval.nfe == 1


@pytest.mark.parametrize("preset", ["quick", "standard", "gpu", "demo"])
@pytest.mark.parametrize("objective", ["isd", "fm"])
def test_every_preset_composes_with_every_objective(preset: str, objective: str) -> None:
    config = build(f"preset={preset}", f"objective={objective}")
    config.objective.build()
    assert config.eval.nfe == (1 if objective == "isd" else 10)


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
        ("objective.epsilom=1", r"did you mean 'objective.epsilon'"),
        ("+objective.epsilom=1", r"unknown setting 'objective.epsilom'"),
        ("preset=quik", r"unknown choice preset=quik; did you mean preset=quick"),
        ("net=huge", r"net is one of \['base', 'large', 'small', 'tiny'\]"),
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
        ("examples=100", r"examples=100 is less than one batch \(batch_size=\d+\)"),
        ("optim.warmup=9000000000", r"optim.warmup=9000000000 leaves nothing of examples="),
        ("policy.horizon=15", r"policy.horizon=15 is not divisible by 4.*horizon=12 or 16"),
        ("policy.n_action_steps=16", r"policy.horizon=16 is too short.*n_obs_steps=2.*least 17"),
        ("net.down_dims=[20]", r"down_dims=\[20\]: 20 is not a multiple of n_groups=8"),
        ("data.augment=flip", r"data.augment='flip' is not one of mirror"),
        ("data.obs=state", r"data.obs=state must be a list: data.obs=\[state\]"),
        ("data.obs=[action]", r"data.obs has the key 'action'"),
    ],
)
def test_a_wrong_value_is_explained(defaults: dict[str, Any], words: str, message: str) -> None:
    with pytest.raises(ConfigError) as error:
        TrainConfig.from_mapping(apply(defaults, parse([words])))
    assert re.search(message, str(error.value)), str(error.value)


def test_unknown_keys_list_only_their_own_group() -> None:
    with pytest.raises(ConfigError) as error:
        build("eval.episode=3")
    allowed = str(error.value).splitlines()[1]
    assert allowed.startswith("allowed under 'eval': eval.episodes")
    assert "optim" not in allowed


def test_overrides_of_finished_settings() -> None:
    changed = apply({"examples": 10, "optim": {"lr": 1.0}}, parse(["examples=20", "optim.lr=0.5"]))
    assert changed == {"examples": 20, "optim": {"lr": 0.5}}
