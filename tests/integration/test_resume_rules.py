"""What may change when a run goes on, and what is said of it."""

from __future__ import annotations

import warnings
from pathlib import Path

import numpy as np
import pytest

import cmpolicy
from cmpolicy.cli.main import main
from cmpolicy.experiment.data_checks import DataWarning
from cmpolicy.experiment.run import read_facts
from cmpolicy.policy.bundle import read_bundle
from cmpolicy.schema import ConfigError
from cmpolicy.training.checkpoint import load_state
from cmpolicy.training.trackers import read_log
from cmpolicy_data import ReplayBuffer

TIMES = ("examples_per_s", "seconds")

pytestmark = pytest.mark.filterwarnings("always::UserWarning")


def append(store: Path, count: int) -> None:
    buffer = ReplayBuffer.open(store, "r+")
    for _ in range(count):
        rng = np.random.default_rng(buffer.n_episodes)
        steps = rng.normal(size=(30, 2)).astype(np.float32)
        buffer.append_episode({"state": steps, "action": steps})


@pytest.fixture
def store(tmp_path: Path) -> Path:
    path = ReplayBuffer.create(tmp_path / "data.zarr").path
    append(path, 3)
    return path


def settings(store: Path) -> list[str]:
    return [
        "task=custom",
        f"data.path={store}",
        "data.obs=[state]",
        "control_hz=10",
        "net.down_dims=[8,16]",
        "net.time_dim=8",
        "encoder.dim=8",
        "examples=192",
        "batch_size=16",
        "optim.warmup=0",
        "eval.every=96",
        "log.every=16",
        "log.trackers=[]",
    ]


def rates(run: Path) -> dict[int, float]:
    return {e["examples"]: e["lr"] for e in read_log(run) if e["kind"] == "train"}


@pytest.fixture
def run(store: Path, tmp_path: Path) -> Path:
    assert main(["train", *settings(store), f"out={tmp_path / 'run'}"]) == 0
    return tmp_path / "run"


def test_extending_says_what_the_learning_rate_does(
    run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert rates(run)[192] == pytest.approx(0, abs=1e-9)
    capsys.readouterr()
    assert main(["train", f"resume={run}", "examples=384"]) == 0
    err = capsys.readouterr().err
    assert "goes on from 192 to 384 examples (before: 192); its learning rate is 0.0005 now" in err
    assert "schedule=restart begins a new one" in err
    assert rates(run)[384] == pytest.approx(0, abs=1e-9)
    card = (run / "policy_last" / "README.md").read_text()
    assert f"- from example 192 on: `cmpolicy train resume={run.name} examples=384`" in card


def test_a_schedule_that_begins_anew(run: Path) -> None:
    assert main(["train", f"resume={run}", "examples=384", "schedule=restart"]) == 0
    found = rates(run)
    assert found[208] == pytest.approx(1e-3, rel=0.02)
    assert found[288] == pytest.approx(5e-4, rel=0.02)
    assert found[384] == pytest.approx(0, abs=1e-9)
    assert main(["train", f"resume={run}", "examples=400"]) == 0  # keeps that beginning
    assert "optim.begin" not in str(read_facts(run))
    assert len(read_facts(run)["history"]) == 2


def test_a_restart_that_is_cut_off_goes_on_bit_by_bit(run: Path, tmp_path: Path) -> None:
    import shutil

    shutil.copytree(run, tmp_path / "other")
    change = {"examples": 384, "schedule": "restart"}
    cmpolicy.resume(run, change)
    cmpolicy.resume(tmp_path / "other", change, until=288)
    cmpolicy.resume(tmp_path / "other")
    for a, b in zip(read_log(run), read_log(tmp_path / "other"), strict=True):
        assert {k: v for k, v in a.items() if k not in TIMES} == {
            k: v for k, v in b.items() if k not in TIMES
        }


def test_a_restart_that_is_queued_again_goes_on(run: Path, tmp_path: Path) -> None:
    change = {"examples": 384, "schedule": "restart"}
    cmpolicy.resume(run, change, until=288)
    cmpolicy.resume(run, change)
    assert rates(run)[288] == pytest.approx(5e-4, rel=0.02)
    assert rates(run)[304] < rates(run)[288]
    assert rates(run)[384] == pytest.approx(0, abs=1e-9)


def test_a_run_on_an_episode_that_is_there_twice_goes_on(store: Path, tmp_path: Path) -> None:
    append(store, 9)
    buffer = ReplayBuffer.open(store, "r+")
    ends = [0, *buffer.episode_ends.tolist()]
    for number in (3, 5, 8):
        rows = slice(ends[number], ends[number + 1])
        buffer.append_episode({key: np.asarray(buffer[key][rows]) for key in buffer})
    config = cmpolicy.compose(*settings(store), "data.val_fraction=0.3")
    cmpolicy.train(config, tmp_path / "run", until=96)
    assert cmpolicy.resume(tmp_path / "run").finished


def test_other_data_has_its_own_best_policy_and_the_old_held_out_episodes(
    store: Path, tmp_path: Path
) -> None:
    """Errors on other episodes are no measure for the policy of before."""
    append(store, 9)
    config = cmpolicy.compose(*settings(store), "data.val_fraction=0.25")
    run = tmp_path / "run"
    cmpolicy.train(config, run)
    held_out = read_facts(run)["val_episodes"]
    wide = ReplayBuffer.open(store, "r+")
    for number in range(8):
        steps = 50 * np.random.default_rng(100 + number).normal(size=(30, 2)).astype(np.float32)
        wide.append_episode({"state": steps, "action": steps})
    cmpolicy.resume(run, {"data.changed": "accept", "examples": 384})
    now = read_facts(run)["val_episodes"]
    assert set(held_out) < set(now)
    assert all(episode >= 12 for episode in set(now) - set(held_out))
    assert read_bundle(run / "policy").metadata["examples"] > 192


def test_other_data_is_not_forgotten_by_a_run_that_is_cut_off(run: Path, store: Path) -> None:
    """The score of before is gone from the state as soon as the run takes the data for its own."""
    append(store, 2)
    log = run / "log.jsonl"
    log.rename(run / "kept.jsonl")
    log.mkdir()  # the run ends before its first step
    with pytest.raises(OSError, match="directory"):
        cmpolicy.resume(run, {"data.changed": "accept", "examples": 384})
    assert len(read_facts(run)["data"]["episodes"]) == 5
    assert load_state(run).values["best"] is None


def test_an_unknown_schedule(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", f"resume={run}", "schedule=again"]) == 2
    assert "schedule" in capsys.readouterr().err


def test_grown_data_is_accepted_only_when_asked(store: Path, tmp_path: Path) -> None:
    config = cmpolicy.compose(*settings(store))
    cmpolicy.train(config, tmp_path / "run", until=96)
    before = set(read_facts(tmp_path / "run")["val_episodes"])
    append(store, 2)
    with pytest.raises(ConfigError, match=r"2 episodes were added.*data\.changed=accept"):
        cmpolicy.resume(tmp_path / "run")
    with pytest.warns(DataWarning, match="goes on with other data: 2 episodes were added"):
        cmpolicy.resume(tmp_path / "run", {"data.changed": "accept"}, until=128)
    assert set(read_facts(tmp_path / "run")["val_episodes"]) >= before
    with warnings.catch_warnings():
        warnings.simplefilter("error", DataWarning)
        cmpolicy.resume(tmp_path / "run")  # this is its data now
    append(store, 1)
    with pytest.raises(ConfigError, match="1 episodes were added"):
        cmpolicy.resume(tmp_path / "run")


@pytest.mark.parametrize("name", ["20240116", "true", "2024_01", "1e3", "null_", "démo é"])
def test_names_that_look_like_something_else(
    store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.chdir(tmp_path)
    words = [*settings(store)[:1], *settings(store)[2:], "examples=32", "eval.every=32"]
    store.rename(tmp_path / name)
    quoted = f"'{name}'" if " " in name else name
    assert main(["train", *words, f"data.path={quoted}", f"out='{name}-run'"]) == 0
    (tmp_path / name).rename(tmp_path / "data")
    Path(f"{name}-run").rename(name)
    (tmp_path / "data").rename(tmp_path / "5")
    assert main(["train", f"resume={quoted}", "examples=64", "data.path=5"]) == 0
    assert main(["data", "validate", "5"]) == 0
