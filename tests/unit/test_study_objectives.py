"""The table of the objectives study, and which evaluations it makes."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest

from cmpolicy.experiment.objective import ObjectiveConfig
from cmpolicy.study.objectives import RunScores, Scores, evaluations
from cmpolicy.study.objectives_report import markdown, plot, rows
from cmpolicy_eval.metrics import (
    Estimate,
    bootstrap_interval,
    crossed_bootstrap_interval,
    paired_share_interval,
    wilson_interval,
)


def _run(name: str, seed: int, success: list[bool], *, diverged: int | None = None) -> RunScores:
    scores = (Scores("flow_map", 1, tuple(success), tuple(map(float, success))),)
    return RunScores(
        name,
        seed,
        diverged,
        {"median": 1.0, "largest": 9.0},
        12.0,
        500.0,
        {"health_map_error": 0.5},
        () if diverged is not None else scores,
    )


def test_a_run_that_diverged_counts() -> None:
    good, bad = [True] * 4, [False] * 4
    (row,) = rows([_run("ct", 0, good), _run("ct", 1, bad), _run("ct", 2, good, diverged=640)])
    for found in (row.success, row.score):
        assert found.mean == pytest.approx(1 / 3)
        assert sorted(found.by_seed) == [0.0, 0.0, 1.0]
        assert found.ci95 == (0.0, 1.0)
    text = markdown([_run("ct", 0, good), _run("ct", 1, good, diverged=640)])
    line = next(line for line in text.splitlines() if line.startswith("| ct") and " 9 " in line)
    assert [cell.strip() for cell in line.split("|")][2:4] == ["2", "1"]


def test_the_table_counts_the_runs_that_the_alarm_speaks_of() -> None:
    runs = [_run("isd", seed, [True] * 4) for seed in range(3)]
    runs[1] = dataclasses.replace(runs[1], health={"health_variance_ratio": 2.0})
    line = next(x for x in markdown(runs).splitlines() if x.startswith("| isd") and " 9 " in x)
    assert [cell.strip() for cell in line.split("|")][2:5] == ["3", "0", "1"]


def test_differences_are_paired_by_training_seed_and_episode() -> None:
    """Two objectives that succeed in the same episodes differ by nothing, however these vary."""
    mixed = [[True, False, True, False], [False, False, False, True], [True] * 4]
    runs = [_run(name, seed, mixed[seed]) for name in ("fm", "isd") for seed in range(3)]
    runs.append(_run("esd", 0, [], diverged=64))  # no success at all
    runs += [_run("esd", seed, mixed[seed]) for seed in (1, 2)]
    table = markdown(runs).split("less isd, paired")[1].split("How the runs went")[0]
    lines = {line.split("|")[1].strip(): line for line in table.splitlines() if "[" in line}
    assert set(lines) == {"fm", "esd"}
    low, high = paired_share_interval([1] * 4, [1] * 4)  # four episodes make nothing certain
    assert -0.6 < low < -0.3
    assert lines["fm"].count(f"0.000 [{low:.3f}, {high:.3f}]") == 2
    assert lines["esd"].count(" -0.167 [-0.") == 2
    assert "less isd" not in markdown([_run("fm", 0, [True])])


def test_objectives_without_a_trained_run_stay_in_the_table(tmp_path: Path) -> None:
    runs = [_run("isd", 0, [True, False]), _run("esd", 0, [], diverged=128)]
    runs.append(_run("mip", 0, [], diverged=128))  # whose own number of evaluations is 2
    found = {row.objective: row for row in rows(runs)}
    assert (found["esd"].nfe, found["mip"].nfe) == (1, 2)
    for name in ("esd", "mip"):
        assert found[name].success.values.tolist() == [[0.0, 0.0]]
        assert found[name].score.mean == 0.0
    text = markdown(runs)
    against = text.split("less isd, paired")[1].split("How the runs went")[0]
    assert any(line.startswith("| esd") and "-0.500 [" in line for line in against.splitlines())
    nothing_scored = markdown([_run("esd", 0, [], diverged=128)])
    assert any(line.startswith("| esd") for line in nothing_scored.splitlines())
    assert plot(runs, tmp_path / "x.png").stat().st_size > 1000


def test_three_runs_that_all_failed_are_no_proof_of_zero() -> None:
    failed = Estimate.of_share(np.zeros((3, 100)))
    assert failed.ci95 == wilson_interval(0, 100)
    assert Estimate.of_share(np.ones((3, 100))).ci95 == wilson_interval(100, 100)
    mixed = np.zeros((3, 100))
    mixed[:, :50] = 1
    assert Estimate.of_share(mixed).ci95 == crossed_bootstrap_interval(mixed)
    solved = Estimate.of_share(np.ones((3, 100)))
    assert (failed - failed).ci95 == paired_share_interval([0] * 100, [0] * 100)
    assert (solved - failed).ci95 == paired_share_interval([1] * 100, [0] * 100)
    scores = Estimate.over(np.full((3, 5), 0.25)) - Estimate.over(np.zeros((3, 5)))
    assert scores.ci95 == (0.25, 0.25)


def test_crossed_interval_counts_both_levels() -> None:
    rng = np.random.default_rng(0)
    same = rng.random((1, 200)).repeat(3, axis=0)
    low, high = crossed_bootstrap_interval(same)
    flat = bootstrap_interval(same[0], n_resamples=4000)  # three equal runs say what one says
    assert high - low == pytest.approx(flat[1] - flat[0], rel=0.1)
    apart = np.stack([same[0] * 0, same[0] * 0 + 1, same[0] * 0 + 0.5])
    low, high = crossed_bootstrap_interval(apart)
    assert low < 0.1  # three seeds that differ say little
    assert high > 0.9
    with pytest.raises(ValueError, match="groups, n"):
        crossed_bootstrap_interval(np.zeros(4))


def test_crossed_interval_holds_the_mean_as_often_as_it_says() -> None:
    """Episodes that are hard for one training seed are hard for all."""
    rng, inside = np.random.default_rng(1), 0
    for _ in range(200):
        episodes, rest = rng.normal(size=(1, 100)), rng.normal(size=(3, 100))
        low, high = crossed_bootstrap_interval(episodes + 0.3 * rest, n_resamples=400)
        inside += low <= 0 <= high
    assert inside > 180


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("isd", [("flow_map", 1), ("flow_map", 4)]),
        ("fm", [("diagonal", 1), ("diagonal", 4), ("diagonal", 10)]),
        ("ct", [("restart", 1), ("restart", 4)]),
        ("regression", [("regression", 1)]),
        ("mip", [("mip", 2)]),
        ("ddpm", [("ddim", 1), ("ddim", 4), ("ddpm", 100)]),
    ],
)
def test_evaluations_that_the_sampler_can_do(name: str, expected: list[tuple[str, int]]) -> None:
    assert evaluations(ObjectiveConfig.from_mapping({"name": name}), (1, 4)) == expected


def test_results_read_back(tmp_path: Path) -> None:
    run = _run("isd", 3, [True, False])
    path = tmp_path / "r.json"
    path.write_text(json.dumps(dataclasses.asdict(run)))
    assert RunScores.load(path) == run
