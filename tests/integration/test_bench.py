"""cmpolicy-bench: each command end to end at tiny settings, and its bad input."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from cmpolicy.cli.bench import main
from cmpolicy.cli.benchmarks.step import time_pairs
from cmpolicy.nn.unet1d import UNet1DConfig
from cmpolicy.normalize import Normalizer
from cmpolicy.policy.consistency import ConsistencyPolicy
from cmpolicy.spec import PolicySpec
from cmpolicy_data import ReplayBuffer

OBS = {"agent_pos": (2,), "keypoint": (9, 2)}


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small untrained Push-T policy."""
    torch.manual_seed(0)
    rng = np.random.default_rng(0)
    arrays = {key: rng.uniform(0, 512, (64, *shape)) for key, shape in OBS.items()}
    normalizer = Normalizer.fit({**arrays, "action": rng.uniform(0, 512, (64, 2))})
    spec = PolicySpec(OBS, action_dim=2, horizon=16, n_obs_steps=2, n_action_steps=8)
    net = UNet1DConfig((8, 16), kernel_size=3, n_groups=4, time_dim=8, obs_dim=8)
    folder = tmp_path_factory.mktemp("policy") / "bundle"
    ConsistencyPolicy(spec, net, normalizer).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three short episodes of a robot that is no simulator's."""
    path = tmp_path_factory.mktemp("store") / "robot.zarr"
    rng = np.random.default_rng(0)
    buffer = ReplayBuffer.create(path)
    for length in (30, 40, 50):
        state = rng.standard_normal((length, 3)).astype(np.float32)
        buffer.append_episode({"state": state, "action": state[:, :2]})
    return path


def _read(path: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads(path.read_text())
    assert content["device"].startswith("cpu: ")
    assert {"python", "torch", "numpy", "cmpolicy"} <= set(content["versions"])
    assert content["command"].startswith(f"cmpolicy-bench {content['benchmark']} ")
    assert "git_commit" in content
    return content


def test_latency(bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "new" / "latency.json"
    words = [f"policy={bundle}", "nfe=[1,3]", "calls=6", "threads=1", f"out={out}"]
    assert main(["latency", *words]) == 0
    content = _read(out)
    assert [row["evaluations"] for row in content["rows"]] == [1, 3]
    for row in content["rows"]:
        assert row["calls"] == 6
        assert 0 < row["p50 ms"] <= row["p99 ms"]
    summary = content["summary"]
    assert summary["ratio_3_to_1"] == pytest.approx(summary["p50_ms_nfe3"] / summary["p50_ms_nfe1"])
    printed = capsys.readouterr().out
    assert "3 evaluations cost" in printed
    assert f"written to {out}" in printed


def test_a_slow_row_ends_early_but_is_measured(bundle: Path, tmp_path: Path) -> None:
    out = tmp_path / "latency.json"
    words = [f"policy={bundle}", "nfe=[2]", "calls=1000", "seconds=0", f"out={out}"]
    assert main(["latency", *words]) == 0
    (row,) = _read(out)["rows"]
    assert row["calls"] == 20


def test_rollout(bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "rollout.json"
    words = [f"policy={bundle}", "episodes=2", "workers=1", f"out={out}"]
    assert main(["rollout", *words]) == 0
    content = _read(out)
    (row,) = content["rows"]
    assert (row["episodes"], row["processes"], row["evaluations"]) == (2, 1, 1)
    assert 0 < row["steps"] <= 600
    assert content["summary"]["seconds"] > 0
    assert 0 <= content["summary"]["score_mean"] <= 1
    assert "2 episodes in" in capsys.readouterr().out


def test_step(store: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "step.json"
    words = ["task=custom", f"data.path={store}", "data.obs=[state]", "net=tiny", "device=cpu"]
    words += ["batch_size=8", "objective.sd_share=0.25", "pairs=2", "warmup=1", f"out={out}"]
    assert main(["step", *words]) == 0
    content = _read(out)
    assert [row["what"] for row in content["rows"]] == ["fm step", "isd step", "loader"]
    assert all(row["median ms"] > 0 for row in content["rows"])
    summary = content["summary"]
    assert summary["isd_to_fm"] > 0
    assert summary["loader_share_of_fm"] == pytest.approx(summary["loader_ms"] / summary["fm_ms"])
    assert content["settings"]["train"]["objective"]["settings"]["sd_share"] == 0.25
    assert "times an fm step" in capsys.readouterr().out


def test_pairs_alternate_and_warmup_is_dropped() -> None:
    done: list[str] = []
    times = time_pairs(
        lambda: done.append("first"),
        lambda: done.append("second"),
        lambda: done.append("load"),
        pairs=2,
        warmup=1,
        device=torch.device("cpu"),
    )
    pair = ["load", "first", "second"]
    assert done == [*pair, "load", "second", "first", *pair]
    assert times.first.shape == times.second.shape == times.load.shape == (2,)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["latency"], "setting 'policy' is missing; give policy=<value>"),
        (["latency", "policy=nowhere/at/all"], "nowhere/at/all"),
        (["latency", "policy=x", "nfe=[0]"], "nfe=0 must be at least 1"),
        (["latency", "policy=x", "nfe=[]"], "nfe=[] names no number of evaluations"),
        (["latency", "policy=x", "cals=5"], "did you mean 'calls'?"),
        (["latency", "policy=x", "500"], "'500' is not a setting; settings are given as key=value"),
        (["latency", "policy=x", "nfe=[1"], "cannot read 'nfe=[1': its value is not YAML"),
        (["latency", "policy=x", "device=warp"], "device='warp' is no device; use cpu or cuda"),
        (["rollout", "policy=x", "episodes=0"], "episodes=0 must be at least 1"),
        (["step", "pairs=0"], "pairs=0 must be at least 1"),
        (["step", "objective=fm"], "leave out objective=..."),
        (["step", "batchsize=3"], "did you mean 'batch_size'?"),
        (["speed"], "unknown command 'speed'; choose one of step, latency, rollout"),
    ],
)
def test_bad_input(
    words: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = [f"out={tmp_path / 'out.json'}"] if words[0] != "speed" else []
    assert main([*words, *out]) == 2
    printed = capsys.readouterr().err
    assert message in printed
    assert "Traceback" not in printed
    assert not (tmp_path / "out.json").exists()


def test_help_lists_the_commands(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--help"]) == 0
    printed = capsys.readouterr().out
    assert all(command in printed for command in ("step", "latency", "rollout"))
    assert main([]) == 2
