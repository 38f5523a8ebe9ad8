"""The result file: schema, summary, round trip, clear errors, comparisons."""

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cmpolicy_eval.evaluate import git_commit, versions
from cmpolicy_eval.metrics import bootstrap_interval, wilson_interval
from cmpolicy_eval.result import Origin, Result, ResultError, write_atomically
from cmpolicy_eval.rollout import EpisodeResult

ORIGIN = Origin("cpu", {"python": "3.11"}, "pusht_human", "cmpolicy eval policy=pusht", "abc123")
SCHEMA = {
    "protocol", "policy", "nfe", "seeds", "episodes", "score_mean", "score_ci95", "success_rate",
    "success_ci95", "infer_ms", "device", "versions", "data", "command", "git_commit",
}  # fmt: skip


def make(
    seeds: list[int] | None = None, *, protocol: str = "pusht-dp", successes: int = 2
) -> Result:
    seeds = seeds or [5, 3, 8, 9]
    rng = np.random.default_rng(0)
    episodes = [
        EpisodeResult(
            seed,
            1.0 if i < successes else float(rng.random()),
            i < successes,
            100 + i,
            (2.0, 4.0, 6.0),
        )
        for i, seed in enumerate(seeds)
    ]
    return Result.from_episodes(
        episodes, protocol=protocol, policy="pusht", nfe=1, batch_size=50, origin=ORIGIN
    )


def test_summary() -> None:
    result = make()
    scores = [episode.score for episode in result.episodes]
    assert result.score_mean == pytest.approx(np.mean(scores))
    assert result.score_ci95 == bootstrap_interval(scores)
    assert result.success_rate == 0.5
    assert result.success_ci95 == wilson_interval(2, 4)
    assert (result.infer_ms.p50, result.infer_ms.batch_size) == (4.0, 50)
    assert result.infer_ms.p99 == pytest.approx(6.0, abs=0.3)
    assert result.episodes[0].infer_ms_p50 == 4.0


def test_the_file_has_the_keys_of_the_schema(tmp_path: Path) -> None:
    raw = json.loads(make().save(tmp_path / "r.json").read_text())
    assert set(raw) == SCHEMA
    assert set(raw["episodes"][0]) == {"seed", "score", "success", "length", "infer_ms_p50"}
    assert {"p50", "p99"} <= set(raw["infer_ms"])
    assert raw["seeds"] == [5, 3, 8, 9]


def test_round_trip(tmp_path: Path) -> None:
    result = make()
    path = result.save(tmp_path / "deep" / "r.json")
    assert Result.load(path) == result
    assert [p.name for p in path.parent.iterdir()] == ["r.json"]  # no temporary file is left


def changed(**changes: Any) -> dict[str, Any]:
    raw: dict[str, Any] = {**json.loads(make()._to_json()), **changes}
    return {key: value for key, value in raw.items() if value != "absent"}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "not valid JSON"),
        ("[1]", "expected an object, got list"),
        (json.dumps({"score": 1}), "lacks .*score_mean.* is it a result of cmpolicy eval"),
        (json.dumps(changed(nfe="absent")), "lacks nfe;"),
        (json.dumps(changed(colour=1)), "unknown colour"),
        (json.dumps(changed(score_ci95=[1])), "bad value of 'score_ci95'"),
        (json.dumps(changed(score_mean="high")), "'score_mean': expected a number, got 'high'"),
        (json.dumps(changed(episodes=[{"seed": 1}])), "bad value of 'episodes'"),
        (json.dumps(changed(seeds=[1, 2, 3, 4])), "'episodes' are not those of 'seeds'"),
    ],
)
def test_bad_files_are_named(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "r.json"
    path.write_text(text)
    with pytest.raises(ResultError, match=message) as caught:
        Result.load(path)
    assert str(path) in str(caught.value)


def test_no_file_is_its_own_error(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"none\.json does not exist"):
        Result.load(tmp_path / "none.json")


def test_a_failed_write_leaves_the_previous_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = make().save(tmp_path / "r.json")
    before = path.read_bytes()

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        write_atomically(path, "{}")
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


def test_difference_pairs_by_seed_not_by_place() -> None:
    first, second = make([1, 2, 3, 4]), make([4, 3, 2, 1])
    difference = first.minus(second)
    assert difference.n == 4
    # successes on 1 and 2 against 4 and 3: every seed differs, the rates do not
    assert difference.success == 0.0
    assert difference.success_ci95[1] > 0.5
    assert first.minus(first).score_ci95 == (0.0, 0.0)


def test_only_what_is_comparable_is_compared() -> None:
    with pytest.raises(ResultError, match="'pusht-dp' and 'pusht-gym'"):
        make().minus(make(protocol="pusht-gym"))
    with pytest.raises(ResultError, match="the seeds differ"):
        make([1, 2]).minus(make([1, 3]))


def test_origin_is_found_out(repository: Path) -> None:
    assert {"python", "numpy", "gymnasium", "gym-pusht", "pymunk"} <= set(versions())
    commit = git_commit()
    if (repository / ".git").exists():
        assert commit is not None
        assert len(commit.removesuffix("-dirty")) == 40
