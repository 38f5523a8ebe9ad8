"""The example of cmpolicy/training/README.md: a network, an encoder and so on of one's own."""

import re
import shlex
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from cmpolicy import ConsistencyPolicy, OnnxPolicy
from cmpolicy.cli.main import main
from cmpolicy.cli.train import compose
from cmpolicy.flow.objectives import OBJECTIVES
from cmpolicy.nn.registry import ENCODERS, NETS
from cmpolicy.schema import ConfigError
from cmpolicy_data import ReplayBuffer
from cmpolicy_data.augment import AUGMENTATIONS, AugmentError, Episodes, augment

README = (Path(__file__).resolve().parents[2] / "cmpolicy/training/README.md").read_text()
README = README.partition("## Parts of your own")[2]
SHORT = ["examples=32", "batch_size=16", "optim.warmup=0", "device=cpu", "eval.windows=8"]
WORDS = ["data.path=my.zarr", "data.obs=[state]", "control_hz=10"]


@pytest.fixture
def mine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """A folder with the README's module, under the module's name, and a store; then all undone."""
    name = f"mine_{tmp_path.name}".replace("-", "_")
    (code,) = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)
    (tmp_path / f"{name}.py").write_text(code)
    buffer = ReplayBuffer.create(tmp_path / "my.zarr")
    for episode in range(3):
        steps = np.cumsum(np.random.default_rng(episode).normal(size=(30, 4)), axis=0)
        buffer.append_episode({"state": steps, "action": steps[:, :2]})
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    registries = (NETS, ENCODERS, OBJECTIVES, AUGMENTATIONS)
    before = [dict(registry) for registry in registries]  # type: ignore[call-overload]
    yield name
    for registry, entries in zip(registries, before, strict=True):
        registry.clear()
        registry.update(entries)  # type: ignore[attr-defined]


def test_the_example_of_the_readme(
    mine: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """It trains by the command of the README; without its module a bundle says what it lacks."""
    (commands,) = re.findall(r"```sh\n(.*?)```", README, flags=re.DOTALL)
    variable, train = [shlex.split(line, comments=True) for line in commands.splitlines()]
    assert variable == ["export", "CMPOLICY_PLUGINS=mine"]
    monkeypatch.setenv("CMPOLICY_PLUGINS", mine)
    assert main([*train[1:], *SHORT, "log.trackers=[]"]) == 0
    assert (
        "my.zarr: 6 episodes, 2 of them held out" in capsys.readouterr().err
    )  # an image goes along
    policy = ConsistencyPolicy.from_pretrained("outputs/mine/policy")
    assert (policy.net_config.kind, policy.encoder_config.kind) == ("per_action", "newest")
    obs = {"state": np.random.default_rng(0).normal(size=(3, 2, 4)).astype(np.float32)}
    noise = np.random.default_rng(1).normal(size=(3, 16, 2)).astype(np.float32)
    assert main(["export", "policy=outputs/mine/policy", "out=mine.onnx"]) == 0
    np.testing.assert_allclose(
        OnnxPolicy("mine.onnx").infer(obs, noise), policy.infer(obs, noise), atol=1e-4
    )
    network = type(policy.net)
    monkeypatch.setattr(network, "forward", lambda self, x, t, s, features: x[: len(x)] * 0)
    capsys.readouterr()
    assert main(["export", "policy=outputs/mine/policy", "out=mine.onnx"]) == 2
    message = capsys.readouterr().err
    assert "torch.export cannot follow net.kind=per_action" in message
    assert "not from len(tensor)" in message

    monkeypatch.delenv("CMPOLICY_PLUGINS")
    del NETS["per_action"]
    assert main(["export", "policy=outputs/mine/policy", "out=mine.onnx"]) == 2
    message = capsys.readouterr().err
    assert "unknown net.kind 'per_action'" in message
    assert "CMPOLICY_PLUGINS=<module>" in message
    assert "damaged" not in message


def test_a_module_that_is_not_there(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("CMPOLICY_PLUGINS", "no_such_module")
    assert main(["train", "--help"]) == 2
    assert "CMPOLICY_PLUGINS=no_such_module" in capsys.readouterr().err


def test_kinds_choose_their_own_settings() -> None:
    """``encoder.kind=compact`` kept the size of ``mlp``, and ``net.kind`` was refused."""
    config = compose("task=pusht_image", "encoder.kind=mlp", "net.kind=unet1d", "net.time_dim=8")
    assert config.encoder == ENCODERS["mlp"]()
    assert config.net == NETS["unet1d"](time_dim=8)  # type: ignore[call-arg]


def test_yaml_files_of_ones_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for group, text in {
        "task/arm": "# @package _global_\ndefaults: [{override /data: custom}]\ntask: {name: arm}\n"
        "data: {path: my.zarr, obs: [state]}\ncontrol_hz: 10\n",
        "net/wide": "kind: unet1d\ndown_dims: [8, 16]\nn_groups: 4\n",
        "net/hydras": "_target_: mine.PerAction\n",
    }.items():
        file = Path("conf", f"{group}.yaml")
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
    config = compose("hydra.searchpath=[conf]", "task=arm", "net=wide", "net.time_dim=8")
    assert (config.task.name, config.data.path, config.control_hz) == ("arm", "my.zarr", 10)
    assert config.net == NETS["unet1d"](down_dims=(8, 16), n_groups=4, time_dim=8)  # type: ignore[call-arg]
    with pytest.raises(ConfigError, match=r"net\._target_=mine\.PerAction.*net\.kind"):
        compose("hydra.searchpath=[conf]", "task=arm", "net=hydras")
    with pytest.raises(ConfigError, match="cnf is no folder"):
        compose("hydra.searchpath=[cnf]", "task=arm")


def test_several_runs_of_kinds_and_own_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mine: str
) -> None:
    """``-m`` sweeps over what is no YAML file of cmpolicy's, too."""
    Path("conf/net").mkdir(parents=True)
    Path("conf/net/wide.yaml").write_text("kind: unet1d\ndown_dims: [8, 16]\nn_groups: 4\n")
    monkeypatch.setenv("CMPOLICY_PLUGINS", mine)
    words = ["task=custom", *WORDS, "hydra.searchpath=[conf]", "net=wide,per_action", "out=runs"]
    assert main(["train", "-m", *words, *SHORT, "log.trackers=[]"]) == 0
    table = Path("runs/table.md").read_text()
    assert "0-net.kind=wide" in table
    assert "1-net.kind=per_action" in table
    policy = ConsistencyPolicy.from_pretrained("runs/0-net.kind=wide/policy")
    assert policy.net_config == NETS["unet1d"](down_dims=(8, 16), n_groups=4)  # type: ignore[call-arg]


def test_a_name_is_entered_once() -> None:
    class Other:
        kind = "unet1d"

    from cmpolicy.nn.registry import register_net

    with pytest.raises(ConfigError, match=r"'unet1d' is .*UNet1DConfig already.*another name"):
        register_net(Other)
    register_net(NETS["unet1d"])


def test_an_augmentation_gives_whole_episodes(monkeypatch: pytest.MonkeyPatch) -> None:
    def short(episodes: Episodes) -> Episodes:
        data = {key: value[:-1] for key, value in episodes.data.items()}
        return Episodes(data, episodes.episode_ends, episodes.source)

    monkeypatch.setitem(AUGMENTATIONS, "short", short)
    whole = Episodes({"state": np.zeros((5, 2))}, np.array([2, 5]), np.arange(2))
    with pytest.raises(AugmentError, match=r"'short' gave steps \{'state': 4\}, episode_ends to"):
        augment(whole, "short")
