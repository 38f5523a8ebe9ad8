"""``make demo`` with a training of seconds: what it leaves, says, and does when run again."""

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path

import imageio.v2 as imageio
import numpy as np
import pytest

from cmpolicy.cli.main import main as command
from cmpolicy.experiment.run import COMMAND_FILE
from cmpolicy.policy.policy import ConsistencyPolicy
from cmpolicy.training.checkpoint import load_state, save_state
from cmpolicy.training.trackers import read_log
from cmpolicy_eval.result import Result


def main(words: Sequence[str]) -> int:
    """``cmpolicy demo``."""
    return command(["demo", *words])


SHORT = [
    "net=tiny",
    "net.down_dims=[8,16]",
    "net.time_dim=8",
    "encoder.dim=8",
    "examples=64",
    "batch_size=16",
    "optim.warmup=16",
    "log.every=16",
    "log.trackers=[]",
    "eval.every=64",
    "eval.windows=32",
    "eval.episodes=1",
    "eval.workers=1",
    "episodes=2",
    "videos=2",
]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_the_demo_leaves_a_policy_a_result_a_video_and_curves(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(SHORT) == 0
    out = folder / "outputs/demo"
    printed = capsys.readouterr().out
    for word in ("score", "success", "evaluations    1 of", "ms per action chunk"):
        assert word in printed
    for name in ("policy", "result.json", "rollouts.mp4", "curves.png"):
        assert str(Path("outputs/demo") / name) in printed
        assert (out / name).exists()

    result = Result.load(out / "result.json")
    assert result.seeds == (100_000, 100_001)
    assert (result.protocol, result.nfe) == ("pusht-dp", 1)
    assert result.data == "pusht_scripted"
    with imageio.get_reader(out / "rollouts.mp4") as video:
        frames = [np.asarray(frame) for frame in video]  # type: ignore[attr-defined]
    assert len(frames) == max(e.length for e in result.episodes) + 1
    assert frames[0].shape == (272, 512, 3)
    assert float(np.abs(frames[0].astype(int) - frames[-1]).mean()) > 0.1
    policy = ConsistencyPolicy.from_pretrained(out / "policy")
    assert policy.spec.obs == {"agent_pos": (2,), "keypoint": (9, 2)}
    assert (out / COMMAND_FILE).read_text().startswith("cmpolicy demo")

    # again: the same demo is only scored again, another one goes beside it
    log = (out / "log.jsonl").read_bytes()
    assert main([*SHORT, "episodes=1", "videos=0"]) == 0
    assert "scoring it again" in capsys.readouterr().out
    assert (out / "log.jsonl").read_bytes() == log
    assert main([*SHORT, "seed=1", "episodes=1", "videos=0"]) == 0
    assert "outputs/demo-before-1" in capsys.readouterr().out
    assert (folder / "outputs/demo-before-1/rollouts.mp4").exists()
    assert [e["examples"] for e in read_log(out) if e["kind"] == "train"] == [16, 32, 48, 64]
    assert json.loads((out / "policy/config.json").read_text())["metadata"]["config"]["seed"] == 1


def test_a_demo_that_was_stopped_in_its_last_evaluation_evaluates_first(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*SHORT, "eval.every=32", "episodes=1", "videos=0"]) == 0
    out = folder / "outputs/demo"
    state = load_state(out)  # as Ctrl-C leaves it, which reaches the simulator, too
    save_state(out, dataclasses.replace(state, values={**state.values, "evaluated_at": 32}))
    capsys.readouterr()
    assert main([*SHORT, "eval.every=32", "episodes=1", "videos=0"]) == 0
    assert "scoring it again" not in capsys.readouterr().out
    assert [e["examples"] for e in read_log(out) if e["kind"] == "eval"] == [32, 64]
    assert load_state(out).values["evaluated_at"] == 64


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["episodes=2", "videos=3"], "videos=3 between 0 and that"),
        (["sampels=3"], "did you mean 'examples'"),
        (["task=custom", "data.obs=[state]"], "the demo needs a task with a simulator"),
    ],
)
def test_wrong_words(
    folder: Path, words: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(words) == 2
    assert message in capsys.readouterr().err
    assert not (folder / "outputs").exists()
