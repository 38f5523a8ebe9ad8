"""``cmpolicy data convert lerobot`` and ``to-lerobot`` as a user meets them."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cmpolicy.cli.main import main
from cmpolicy.policy.policy import ConsistencyPolicy
from cmpolicy_data import ReplayBuffer
from cmpolicy_data.catalog import cache_dir
from cmpolicy_data.convert.lerobot import hub
from cmpolicy_data.convert.lerobot.cached import as_store

pytest.importorskip("pyarrow")
pytest.importorskip("av")

SHORT = [
    *("net=tiny", "examples=8", "optim.warmup=0", "batch_size=4", "eval.episodes=0"),
    *("eval.windows=4", "log.trackers=[]", "device=cpu"),
]


@pytest.fixture
def store(tmp_path: Path) -> Path:
    buffer = ReplayBuffer.create(tmp_path / "my.zarr", attrs={"control_hz": 10})
    rng = np.random.default_rng(0)
    for length in (30, 25):
        steps = np.cumsum(rng.normal(size=(length, 4)), axis=0).astype("float32")
        frames = rng.integers(0, 256, (length, 64, 64, 3), dtype=np.uint8)
        buffer.append_episode({"state": steps, "action": steps[:, :2], "top": frames})
    return buffer.path


@pytest.fixture(autouse=True)
def _no_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The hub is a closed port of this machine, and its caches are empty."""
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    monkeypatch.delenv("HF_LEROBOT_HOME", raising=False)
    monkeypatch.chdir(tmp_path)


def run(capsys: pytest.CaptureFixture[str], *words: object) -> tuple[int, str, str]:
    status = main(["data", *map(str, words)])
    out, err = capsys.readouterr()
    assert "Traceback" not in out + err
    return status, out, err


def test_there_back_and_train(capsys: pytest.CaptureFixture[str], store: Path, tmp_path: Path):
    status, out, _ = run(capsys, "convert", "to-lerobot", store, "task=push the block")
    assert status == 0
    assert out.startswith(
        "my_lerobot: LeRobotDataset v3.0, 2 episode(s), 55 steps at 10 per second"
    )
    status, out, _ = run(capsys, "convert", "lerobot", "my_lerobot")
    assert status == 0
    assert "my_lerobot.zarr: 2 episode(s), 55 steps at 10 per second" in out
    assert "task: push the block" in out
    command = next(line for line in out.splitlines() if line.startswith("train on it with: "))
    words = command.removeprefix("train on it with: cmpolicy ").replace("'", "").split()
    assert main([*words, *SHORT, "out=run"]) == 0
    policy = ConsistencyPolicy.from_pretrained(tmp_path / "run" / "policy")
    assert policy.control_hz == 10
    steps = policy.spec.n_obs_steps
    obs = {
        "state": np.zeros((1, steps, 4)),
        "images.top": np.zeros((1, steps, 64, 64, 3), np.uint8),
    }
    assert policy.infer(obs).shape == (1, policy.spec.n_action_steps, 2)


def test_a_folder_is_trained_on_and_converted_once(
    capsys: pytest.CaptureFixture[str],
    store: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    assert run(capsys, "convert", "to-lerobot", store, "task=go")[0] == 0
    cached = cache_dir() / "lerobot"
    words = ["train", "task=custom", "data.path=my_lerobot", "data.obs=[state]", *SHORT]
    assert main([*words, "out=run"]) == 0
    (first,) = cached.glob("*.zarr")
    assert main([*words, "out=run2"]) == 0
    assert list(cached.glob("*.zarr")) == [first]
    said = (tmp_path / "run" / "policy" / "README.md").read_text()
    assert "my_lerobot" in said
    assert str(tmp_path) not in said
    (tmp_path / "my_lerobot").rename(tmp_path / "moved")
    assert as_store(tmp_path / "moved") == first
    info = tmp_path / "moved" / "meta" / "info.json"
    info.write_text(info.read_text().replace('"fps": 10', '"fps": 10.0'))
    assert as_store(tmp_path / "moved") != first
    assert len(list(cached.glob("*.zarr"))) == 2


def test_files_of_the_same_size_and_time_are_not_read_again(
    capsys: pytest.CaptureFixture[str],
    store: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
):
    """Videos of many gigabytes were hashed at each start of a training."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    assert run(capsys, "convert", "to-lerobot", store, "task=go")[0] == 0
    first = as_store(tmp_path / "my_lerobot")
    info = tmp_path / "my_lerobot" / "meta" / "info.json"
    status = info.stat()
    info.write_text(info.read_text().replace(": ", ":\t", 1))
    os.utime(info, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert as_store(tmp_path / "my_lerobot") == first
    os.utime(info, ns=(status.st_atime_ns, status.st_mtime_ns + 1))
    assert as_store(tmp_path / "my_lerobot") != first


def test_data_set_of_lerobots_own_cache(
    capsys: pytest.CaptureFixture[str],
    store: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
):
    for name, folder in (("HF_HOME", "hf/lerobot"), ("HF_LEROBOT_HOME", "own")):
        monkeypatch.setenv(name, str(tmp_path / folder.partition("/")[0]))
        place = tmp_path / folder / "me" / name.lower()
        place.parent.mkdir(parents=True)
        assert run(capsys, "convert", "to-lerobot", store, "task=go", f"out={place}")[0] == 0
        status, _, err = run(capsys, "convert", "lerobot", f"me/{place.name}")
        assert (status, err) == (0, "")
        attrs = ReplayBuffer.open(tmp_path / f"{place.name}.zarr").attrs
        assert attrs["source"]["name"] == f"me/{place.name}"


def test_data_set_of_the_hub(
    capsys: pytest.CaptureFixture[str],
    store: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
):
    """The hub is asked with a time limit, then fetched from; the commit is noted."""
    import huggingface_hub

    assert run(capsys, "convert", "to-lerobot", store, "task=go", "out=abc")[0] == 0
    asked: list[dict[str, Any]] = []

    class Api:
        def repo_info(self, repo_id: str, **settings: Any) -> Any:
            asked.append(settings)
            return type("Info", (), {"sha": "abc"})

    def fetch(repo_id: str, **settings: Any) -> str:
        asked.append(settings)
        return str(tmp_path / "abc")

    monkeypatch.setattr(huggingface_hub, "HfApi", Api)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", fetch)
    found = hub.find("me/data", "v3.0")
    assert (found.name, found.commit) == ("me/data", "abc")
    assert asked[0] == {"repo_type": "dataset", "revision": "v3.0", "timeout": 10.0}
    assert (asked[1]["revision"], asked[1]["etag_timeout"]) == ("v3.0", 10.0)
    assert run(capsys, "convert", "lerobot", "me/data", "revision=v3.0")[0] == 0
    assert ReplayBuffer.open(tmp_path / "data.zarr").attrs["source"]["commit"] == "abc"


def test_no_network_and_nothing_cached(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    from huggingface_hub import HfApi

    def refuse(*_: Any, **__: Any) -> Any:
        raise ConnectionError("no\nroute")

    monkeypatch.setattr(HfApi, "repo_info", refuse)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hf" / "hub"))
    status, _, err = run(capsys, "convert", "lerobot", "me/data")
    assert status == 2
    assert f"There is no LeRobot data set at {tmp_path / 'me/data'}" in err
    assert f"at {tmp_path / 'hf/lerobot/me/data'}, nor in the hub's caches" in err
    assert "could not be fetched from the hub: no route. Without a network" in err
    status, _, err = run(capsys, "convert", "lerobot", "no/such/folder")
    assert status == 2
    assert "There is no folder no/such/folder" in err


def test_help(capsys: pytest.CaptureFixture[str]):
    assert main(["data", "convert", "--help"]) == 0
    out = capsys.readouterr().out
    for layout in ("robomimic FILE.hdf5", "lerobot FOLDER|OWNER/NAME", "to-lerobot STORE"):
        assert f"usage: cmpolicy data convert {layout} [key=value ...]" in out
    assert main(["data", "convert", "to-lerobot", "--help"]) == 0
    out = capsys.readouterr().out
    assert "codec=av1" in out
    assert "robomimic" not in out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            ["convert"],
            "usage: cmpolicy data convert LAYOUT (robomimic|aloha|lerobot|to-lerobot) SOURCE",
        ),
        (["convert", "lerobt", "x"], "did you mean 'lerobot'?"),
        (["convert", "lerobot"], "usage: cmpolicy data convert lerobot FOLDER|OWNER/NAME"),
        (["convert", "lerobot", "x", "cameras=1"], "unknown setting 'cameras'"),
        (["convert", "to-lerobot", "my.zarr", "images=gif"], "images"),
        (["convert", "to-lerobot", "my.zarr"], "Say it: task="),
    ],
)
def test_errors(capsys: pytest.CaptureFixture[str], store: Path, words: list[str], message: str):
    status, _, err = run(capsys, *words)
    assert status == 2
    assert message in err
