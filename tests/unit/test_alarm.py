from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

from cmpolicy.flow.alarm import ALARM_EXAMPLES, alarm_counts, health_alarm
from cmpolicy.flow.sampler import SamplerKind
from cmpolicy.study.alarm_table import alarm_samples
from cmpolicy.study.results import Results

RESULTS = Path(__file__).parents[2] / "eval/results"
HEALTHY = {
    "health_variance_ratio": 0.9,
    "health_semigroup": 0.05,
    "health_tangent_at_1": 0.1,
    "health_map_error": 0.8,
}


def test_healthy_runs_and_missing_metrics_are_left_alone() -> None:
    assert health_alarm(HEALTHY, "flow_map") is None
    assert health_alarm({}, "flow_map") is None
    assert health_alarm({"health_variance_ratio": 0.02}, "restart") is None


@pytest.mark.parametrize(
    ("name", "value", "word"),
    [
        ("health_variance_ratio", 3.0, "vary"),
        ("health_variance_ratio", math.nan, "vary"),
        ("health_variance_ratio", 1e-5, "collapsed"),
        ("health_semigroup", 0.9, "two jumps"),
        ("health_tangent_at_1", 2.0, "flow"),
    ],
)
def test_one_warning_names_metric_value_and_setting(name: str, value: float, word: str) -> None:
    text = health_alarm({**HEALTHY, name: value}, "flow_map")
    assert text is not None
    assert word in text
    assert name in text
    assert "optim.lr" in text


@pytest.mark.parametrize("kind", ["diagonal", "restart", "ddpm", "ddim"])
def test_jumps_are_judged_only_where_they_are_sampled_with(kind: Any) -> None:
    """Flow matching does not train them: whatever they are, its samples may be fine."""
    assert health_alarm({**HEALTHY, "health_semigroup": 5.0}, kind) is None
    assert health_alarm({**HEALTHY, "health_variance_ratio": 5.0}, kind) is not None


@pytest.mark.parametrize("kind", ["regression", "mip"])
def test_one_answer_is_what_some_are_meant_to_give(kind: Any) -> None:
    assert health_alarm({"health_variance_ratio": 0.0}, kind) is None


def test_early_and_short_runs_say_nothing() -> None:
    assert not alarm_counts(ALARM_EXAMPLES - 1, ALARM_EXAMPLES)
    assert alarm_counts(ALARM_EXAMPLES, ALARM_EXAMPLES)
    assert not alarm_counts(400_000, 1_000_000)
    assert alarm_counts(500_000, 1_000_000)


def test_published_runs_would_not_have_warned() -> None:
    """But one, whose one evaluation is off: twice as far from MNIST as 50 of flow matching."""
    warned, n = set(), 0
    for log in sorted(RESULTS.glob("**/*training*.jsonl")):
        lines = [json.loads(line) for line in log.read_text().splitlines()]
        scored = [line for line in lines if line["kind"] == "eval"]
        kind: SamplerKind = "diagonal" if "fm_" in log.name else "flow_map"
        late = [health_alarm(line, kind) for line in scored[len(scored) // 2 :]]
        n += bool(late)
        if any(late):
            warned.add(str(log.relative_to(RESULTS)))
    assert n > 40
    assert warned == {"image/mnist/psd_training.jsonl"}


def test_runs_of_the_study() -> None:
    """Where the true map is known: most that fail are caught, few that are healthy are not."""
    jobs = sorted((RESULTS / "study/standard/jobs").glob("*.json"))
    results = Results([json.loads(path.read_text()) for path in jobs])
    samples = alarm_samples(results)
    failed, healthy = ([s for s in samples if s.failed is end] for end in (True, False))
    assert len(failed) > 50
    assert len(healthy) > 200
    assert sum(s.warned for s in failed) > 0.75 * len(failed)
    assert sum(s.warned for s in healthy) < 0.05 * len(healthy)
    # consistency training degenerates, and is caught; self-distillation mostly does neither
    consistency = [s for s in failed if s.objective in ("ct", "dct")]
    assert sum(s.warned for s in consistency) > 0.8 * len(consistency) > 50
    assert not any(s.warned for s in healthy if s.objective in ("esd", "lsd", "psd", "fm"))
