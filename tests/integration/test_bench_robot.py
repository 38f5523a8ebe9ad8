"""cmpolicy bench loop and delay, and the delayed episodes behind the latter."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from cmpolicy.bench.delayed import BATCH_SIZE, delayed_rollout
from cmpolicy.cli.main import main as command
from cmpolicy.export.write import export_policy
from cmpolicy.policy.policy import ConsistencyPolicy
from cmpolicy.robot.schedule import Asynchronous, Synchronous
from cmpolicy_envs.pusht import PushTEnv
from cmpolicy_envs.realtime_pusht import SUBSTEPS, LateActions, advance
from cmpolicy_eval.protocol import get_protocol
from cmpolicy_eval.result import Result
from cmpolicy_eval.rollout import rollout


def main(words: Sequence[str]) -> int:
    """``cmpolicy bench``."""
    return command(["bench", *words])


@pytest.fixture(scope="module")
def policy(untrained_pusht: Callable[[], ConsistencyPolicy]) -> ConsistencyPolicy:
    """Untrained, but its actions differ with observation and noise."""
    return untrained_pusht()


@pytest.fixture(scope="module")
def bundle(policy: ConsistencyPolicy, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("policy") / "bundle"
    policy.save_pretrained(folder)
    return folder


# -- simulated time -------------------------------------------------------------------------------


def test_physics_steps_add_up_to_a_tick() -> None:
    target = np.array([100.0, 400.0])
    whole, parts, plain = PushTEnv(), PushTEnv(), PushTEnv()
    for env in (whole, parts, plain):
        env.reset(seed=3)
    for _ in range(5):
        plain.step(target)
        advance(whole, target, SUBSTEPS)
        for n in (1, 2, 3, 4):
            observation, reward, _, info = advance(parts, target, n)
    for env in (whole, parts):
        np.testing.assert_array_equal(env._get_info()["state"], plain._get_info()["state"])
    assert info["state"].shape == (5,)
    assert 0 <= reward <= 1
    assert observation["keypoint"].shape == (9, 2)


def test_a_late_target_moves_the_agent_late() -> None:
    ways = []
    for late in (0, 5):
        env = LateActions()
        first, _ = env.reset(seed=3)
        still = first["agent_pos"]
        env.step(np.array([late, *still, 100.0, 400.0], np.float32))
        observation, *_ = env.step(np.array([0, 100, 400, 100.0, 400.0], np.float32))
        ways.append(float(np.linalg.norm(observation["agent_pos"] - still)))
        env.close()
    assert 0 < ways[1] < ways[0]


def test_without_delay_a_synchronous_loop_is_what_evaluation_scores(
    policy: ConsistencyPolicy,
) -> None:
    protocol, seeds = get_protocol("pusht-dp"), [500_000, 500_007, 500_009]
    scored = rollout(
        protocol.make_env,
        policy,
        seeds,
        max_steps=protocol.max_steps,
        reset_options=protocol.reset_options,
        n_workers=1,
        batch_size=BATCH_SIZE,
    )
    played = delayed_rollout(policy, protocol, seeds, schedule=Synchronous(), delay_ms=0)
    assert [(e.score, e.success, e.length) for e in played.episodes] == [
        (e.score, e.success, e.length) for e in scored
    ]
    assert played.held_share == 0


def test_held_ticks_are_those_of_the_delay(policy: ConsistencyPolicy) -> None:
    protocol, seeds = get_protocol("pusht-dp"), [500_001, 500_002]

    def held(schedule: Any, delay_ms: float, n_workers: int = 1) -> Any:
        return delayed_rollout(
            policy, protocol, seeds, schedule=schedule, delay_ms=delay_ms, n_workers=n_workers
        )

    waiting = held(Synchronous(), 200)
    assert all(e.length == 300 for e in waiting.episodes)  # it is untrained
    assert waiting.held_share == pytest.approx(0.2)  # 2 ticks, then 8 actions, 30 times
    going = held(Asynchronous(), 200)
    assert going.held_share == pytest.approx(2 / 300)  # until the first plan
    two = held(Asynchronous(), 200, n_workers=2)
    assert [e.score for e in two.episodes] == [e.score for e in going.episodes]


# -- commands -------------------------------------------------------------------------------------


def test_delay(bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "new" / "delay.json"
    words = [f"policy={bundle}", "delays_ms=[0,150]", "seeds=500000-500001", "workers=1"]
    assert main(["delay", *words, f"out={out}"]) == 0
    content = json.loads(out.read_text())
    assert [(row["loop"], row["delay ms"]) for row in content["rows"]] == [
        ("sync", 0),
        ("sync", 150),
        ("async", 0),
        ("async", 150),
    ]
    summary = content["summary"]
    assert summary["kept_sync_0ms"] == 1
    assert summary["kept_async_150ms"] == pytest.approx(
        summary["score_async_150ms"] / summary["score_sync_0ms"]
    )
    result = Result.load(out.with_suffix("") / "async_150ms.json")
    assert result.score_mean == summary["score_async_150ms"]
    assert result.seeds == (500000, 500001)
    assert Image.open(out.with_suffix(".png")).size[0] > 800
    assert "of undelayed score" in capsys.readouterr().out


def test_loop(bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "loop.json"
    assert main(["loop", f"policy={bundle}", "hz=50", "seconds=1.5", f"out={out}"]) == 0
    content = json.loads(out.read_text())
    (row,) = content["rows"]
    assert row["ticks"] == 75
    assert 0 <= content["summary"]["missed_share"] <= 1
    assert content["summary"]["jitter_p99_ms"] >= 0
    assert content["settings"]["report"]["stopped_by"] == "completed"
    assert len(content["settings"]["rss_mib"]) == 2
    assert min(content["settings"]["rss_mib"]) > 10
    assert "of the ticks missed" in capsys.readouterr().out


def test_loop_of_an_exported_policy(
    untrained_pusht: Callable[[], ConsistencyPolicy],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    policy = untrained_pusht()
    policy.control_hz = 10.0  # the bench's robot stands still, so the loop may run at 50
    file = tmp_path / "policy.onnx"
    export_policy(policy, file, format="onnx")
    out = tmp_path / "loop.json"
    assert main(["loop", f"policy={file}", "hz=50", "seconds=1", f"out={out}"]) == 0
    assert json.loads(out.read_text())["rows"][0]["ticks"] == 50
    assert main(["loop", f"policy={file}", "nfe=2", f"out={out}"]) == 2
    assert "makes 1 evaluation(s) on the CPU, got nfe=2" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["delay"], "setting 'policy' is missing"),
        (["delay", "policy=x", "delays_ms=[5]"], "delays_ms: 5 must be at least 0 and a multiple"),
        (["delay", "policy=x", "delays_ms=[]"], "delays_ms=[] must name something"),
        (["delay", "policy=x", "modes=[sync,sync]"], "must name something, and nothing twice"),
        (["delay", "policy=x", "modes=[late]"], "'late' is not one of sync, async"),
        (["delay", "policy=x", "seeds=5-3"], "ends before it begins"),
        (["delay", "policy=x", "workers=0"], "workers=0 must be at least 1"),
        (["loop", "policy=x", "hz=0"], "hz=0.0 must be above 0"),
        (["loop", "policy=x", "frames=[480]"], "frames=[480] must be [height, width]"),
        (["loop", "policy=pusht", "frames=[48,64]"], "pusht has no cameras: ['agent_pos'"),
        (["loop", "policy=x", "mode=fast"], "'fast' is not one of sync, async"),
        (["loop", "policy=x", "second=3"], "did you mean 'seconds'?"),
        (["loop", "policy=nowhere/at/all"], "nowhere/at/all"),
    ],
)
def test_bad_input(
    words: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*words, f"out={tmp_path / 'out.json'}"]) == 2
    printed = capsys.readouterr().err
    assert message in printed
    assert "Traceback" not in printed
    assert not (tmp_path / "out.json").exists()
