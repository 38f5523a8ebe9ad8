"""The report of several results."""

import dataclasses
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from cmpolicy_eval.metrics import crossed_bootstrap_interval, wilson_interval
from cmpolicy_eval.report import difference_table, runs_table, table, write_report
from cmpolicy_eval.result import Origin, Result, ResultError
from cmpolicy_eval.rollout import EpisodeResult


def make(policy: str, nfe: int, share: float, *, first: int = 100_000, n: int = 200) -> Result:
    u = np.random.default_rng(0).random(n)
    episodes = [
        EpisodeResult(first + i, 1.0 if u[i] < share else 0.8, bool(u[i] < share), 150, (5.0,))
        for i in range(n)
    ]
    origin = Origin("cpu", {"numpy": "2.0"}, None, "cmpolicy eval policy=a|b", None)
    return Result.from_episodes(
        episodes, protocol="pusht-dp", policy=policy, nfe=nfe, batch_size=50, origin=origin
    )


@pytest.fixture
def results() -> list[Result]:
    return [make("one-step", 1, 0.8), make("one-step", 2, 0.85), make("flow matching", 10, 0.5)]


def test_table_is_aligned(results: list[Result]) -> None:
    lines = table(results).splitlines()
    assert len(lines) == 5
    assert len({len(line) for line in lines}) == 1
    bars = [[i for i, c in enumerate(line) if c == "|"] for line in lines]
    assert all(places == bars[0] for places in bars)
    assert "0.725 [0.659, 0.782]" in lines[2]
    assert lines[4].startswith("| flow matching | pusht-dp |      200 |          10 |")


def test_differences_are_to_the_first(results: list[Result]) -> None:
    text = difference_table(results)
    assert "one-step, 2 evaluations" in text
    row = next(line for line in text.splitlines() if "flow matching" in line)
    assert "-0.3" in row.split("|")[3]


def test_results_on_other_seeds_are_not_compared(results: list[Result]) -> None:
    assert difference_table([results[0], make("other", 1, 0.5, first=0)]) == ""


def test_a_bar_in_a_name_does_not_break_the_table() -> None:
    assert "a\\|b" in table([make("a|b", 1, 0.5)])


def test_two_protocols_are_told_apart(results: list[Result]) -> None:
    from dataclasses import replace

    both = [results[0], replace(results[0], protocol="pusht-gym")]
    assert "one-step (pusht-gym)" in table(both)


def test_report_and_figure_are_written(results: list[Result], tmp_path: Path) -> None:
    text, figure = write_report(results, tmp_path / "r")
    content = text.read_text()
    for part in ("# Evaluation report", "## Differences", "](report.png)", "## Origin"):
        assert part in content
    # results that differ in evaluations alone share a line of origin
    assert "- one-step, evaluations 1, 2: seeds 100000-100199; data not stated" in content
    with Image.open(figure) as image:
        assert image.size[0] > 800
        colours = {c for _, c in image.convert("RGB").getcolors(1 << 24) or []}
    assert {(0, 114, 178), (213, 94, 0)} <= colours  # a line for either policy


def test_training_runs_of_one_name_are_averaged(tmp_path: Path) -> None:
    shares = (0.9, 0.7, 0.5)
    runs = [make("isd", 1, share) for share in shares]
    others = [make("fm", 10, share - 0.2) for share in shares]
    rows = [[c.strip() for c in row.split("|")] for row in runs_table(runs + others).splitlines()]
    solved = np.array([[e.success for e in result.episodes] for result in runs], float)
    low, high = crossed_bootstrap_interval(solved)
    success = f"{solved.mean():.3f} [{low:.3f}, {high:.3f}]"
    each = ", ".join(f"{share:.3f}" for share in sorted(solved.mean(1)))
    assert rows[2][1:6] == ["isd", "pusht-dp", "3", "200", "1"]
    assert rows[2][7:9] == [success, each]
    assert rows[3][1:6] == ["fm", "pusht-dp", "3", "200", "10"]
    # fm of run i less isd of run i, not all against the first run
    (line,) = difference_table(runs + others, pool=True).splitlines()[2:]
    solved -= [[e.success for e in result.episodes] for result in others]
    assert f"| {-solved.mean():+.3f} [-" in line
    assert len(difference_table(runs + others).splitlines()) == 2 + 5
    text, _ = write_report(runs + others, tmp_path, pool=True)
    assert "## Over training runs" in text.read_text()
    # recipes with other numbers of runs are not paired, and no run counts twice
    assert difference_table(runs + others[:2], pool=True) == ""
    with pytest.raises(ResultError, match="'isd' with 1 evaluation are of one run"):
        runs_table([runs[0], runs[0]])


def test_runs_that_fail_everywhere_are_no_copies() -> None:
    def failed(ms: float) -> Result:
        episodes = [
            dataclasses.replace(e, score=0.0, success=False, length=300, infer_ms_p50=ms + e.seed)
            for e in make("isd", 1, 0.5).episodes
        ]
        return dataclasses.replace(make("isd", 1, 0.5), episodes=tuple(episodes))

    table = runs_table([failed(1.0), failed(1.1), failed(1.2)])
    low, high = wilson_interval(0, 200)
    assert f"0.000 [{low:.3f}, {high:.3f}]" in table
    with pytest.raises(ResultError, match="of one run"):
        runs_table([failed(1.0), failed(1.0)])


def test_no_results_no_report(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="at least one result"):
        write_report([], tmp_path)
