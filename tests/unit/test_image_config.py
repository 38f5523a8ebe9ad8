"""Settings of ``cmpolicy image train``: what is accepted, and what a wrong one is answered with."""

from importlib.resources import files
from typing import Any

import pytest
import torch
import yaml

from cmpolicy.cli.parse import Composition
from cmpolicy.experiment.image.config import ImageTrainConfig
from cmpolicy.experiment.objective import ObjectiveConfig
from cmpolicy.experiment.run import read_yaml
from cmpolicy.image.net import DiTConfig, UNetConfig
from cmpolicy.schema import ConfigError

PACKAGE = "cmpolicy_conf.image"
COMPOSITION = Composition(ImageTrainConfig, package=PACKAGE)


def build(*words: str) -> ImageTrainConfig:
    settings = COMPOSITION.compose(words)
    settings.pop("out")
    return ImageTrainConfig.from_mapping(settings)


def choices(group: str) -> list[str]:
    return sorted(f.name.removesuffix(".yaml") for f in (files(PACKAGE) / group).iterdir())


def test_defaults_are_digits_by_isd_on_a_small_unet() -> None:
    config = build()
    assert (config.dataset.name, config.dataset.image_size) == ("digits", None)
    assert (config.objective.name, config.objective.sampler_kind) == ("isd", "flow_map")
    assert isinstance(config.net.config, UNetConfig)
    assert (config.guidance, config.nfe, config.path) == (1.0, 1, "linear")


def test_images_take_no_extra_examples_at_the_end_of_noise() -> None:
    """The objectives' own default, made for policies, doubles the distance (image/RECIPE.md)."""
    for objective in ("isd", "psd"):
        assert build(f"objective={objective}").objective.build().one_share == 0.0
    own = build("objective.one_share=0.25").objective
    assert (own.settings["one_share"], own.build().one_share) == (0.25, 0.25)
    digits = {"dataset": {"name": "digits"}, "net": {"kind": "unet"}}
    assert ImageTrainConfig.from_mapping(digits).objective.build().one_share == 0.0
    build("objective=fm").objective.build()  # which has no such setting
    assert ObjectiveConfig().build().one_share == 0.25


def test_labels_are_dropped_where_guidance_needs_it() -> None:
    assert build().guide.dropout == 0
    assert build("guidance=2").guide.dropout == 0.1
    assert build("label_dropout=0.2").guide.dropout == 0.2
    assert build("guidance=2", "label_dropout=0.3").guide.dropout == 0.3


@pytest.mark.parametrize("preset", choices("preset"))
@pytest.mark.parametrize("objective", ["isd", "fm"])
def test_every_preset_composes_with_every_objective(preset: str, objective: str) -> None:
    config = build(f"preset={preset}", f"objective={objective}", "dataset=cifar10")
    config.objective.build()
    assert config.nfe == (1 if objective == "isd" else 10)
    assert config.dataset.flips


@pytest.mark.parametrize("preset", choices("preset"))
def test_a_network_that_is_named_wins_over_the_presets(preset: str) -> None:
    assert isinstance(build(f"preset={preset}", "net=dit").net.config, DiTConfig)


@pytest.mark.parametrize("net", choices("net"))
def test_every_network_fits_every_data_set(net: str) -> None:
    config = build(f"net={net}").net.config
    assert isinstance(config, DiTConfig) == (net == "dit")
    for image_size, channels in ((16, 1), (28, 1), (32, 3)):
        with torch.device("meta"):
            assert isinstance(config.build(image_size, channels), torch.nn.Module)


def test_settings_survive_the_yaml_of_a_run(tmp_path: Any) -> None:
    config = build("net=dit", "net.depth=2", "guidance=1.5", "dataset=mnist", "dataset.path=a.npz")
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config.to_dict()))
    assert ImageTrainConfig.from_mapping(read_yaml(tmp_path / "config.yaml")) == config


def test_help_names_every_choice() -> None:
    text = COMPOSITION.help("", [])
    for group in ("dataset", "net", "preset"):
        assert f"  {group}: {', '.join(choices(group))}\n" in text


def test_the_yaml_files_hold_only_what_differs_from_the_defaults() -> None:
    for preset in choices("preset"):
        chosen = yaml.safe_load((files(PACKAGE) / "preset" / f"{preset}.yaml").read_text())
        default = COMPOSITION.compose([])
        for group in ("optim", "ema", "eval", "log"):
            for key, value in chosen.get(group, {}).items():
                assert default[group][key] != value, f"{preset}: {group}.{key}"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["dataset=imagenet"], "unknown choice dataset=imagenet"),
        (["preset=demo"], "unknown choice preset=demo"),  # one of the policies'
        (["data=custom"], "unknown setting 'data'"),
        (["guidence=2"], "did you mean 'guidance'"),
        (["guidance=0"], "guidance=0.0 makes no sense"),
        (["guidance=strong"], "guidance must be a number"),
        (["guidance=2", "label_dropout=0"], "needs samples without a label"),
        (["label_dropout=1"], "label_dropout=1.0 must be in [0, 1)"),
        (["dataset.image_size=12"], "dataset: image_size=12: digits are 8x8 and are enlarged"),
        (["net.kind=resnet"], "net.kind='resnet' is not one of dit, unet"),
        (["+net.depth=3"], "unknown setting 'net.depth'"),
        (["net.widths=[30]"], "net.widths=[30] must be at least one multiple of net.groups=8"),
        (["net.attention=flash"], "net.attention='flash' is not one of fused, plain"),
        (["path=bent"], "path='bent' is not one of linear, trigonometric"),
        (["eval.images=0"], "eval.images=0 must be at least 1"),
        (
            ["net=dit", "objective.derivative=jvp"],
            "choose objective.derivative=difference, or net.attention=plain",
        ),
        (
            ["net.attention_levels=[1]", "objective.derivative=jvp"],
            "objective.derivative=difference",
        ),
    ],
)
def test_bad_settings(words: list[str], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        build(*words)
    assert message in str(caught.value)


@pytest.mark.parametrize(
    "words",
    [[], ["net=dit", "net.attention=plain"], ["net.attention_levels=[1]", "net.attention=plain"]],
)
def test_forward_mode_where_attention_allows_it(words: list[str]) -> None:
    config = build(*words, "objective.derivative=jvp")
    assert config.net.config.differentiates_forward
