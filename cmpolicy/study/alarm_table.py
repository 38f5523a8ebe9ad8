"""How well the alarm, and each metric alone, tells runs that fail from those that do not."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from scipy.stats import rankdata

from cmpolicy.flow import alarm
from cmpolicy.study.jobs import build_study_objective
from cmpolicy.study.measure import outcome
from cmpolicy.study.results import Results

#: Logged metrics and the bounds that :mod:`cmpolicy.flow.alarm` puts on them.
SIGNALS: Mapping[str, tuple[float, ...]] = {
    "health_variance_ratio": (alarm.MIN_VARIANCE_RATIO, alarm.MAX_VARIANCE_RATIO),
    "health_semigroup": (alarm.MAX_SEMIGROUP,),
    "health_tangent_at_1": (alarm.MAX_TANGENT_AT_1,),
    "health_map_error": (),
    "grad_norm": (),
}


@dataclass(frozen=True)
class Sample:
    """A finished run: what it logged last, whether it failed, and what the alarm said."""

    objective: str
    metrics: Mapping[str, float]
    failed: bool
    warned: bool


def alarm_samples(results: Results) -> list[Sample]:
    """Every run with a weighted loss, from whatever start."""
    samples = []
    for run in results.runs:
        if not run.steps[-1] or run.job["experiment"] == "probe":
            continue
        name = str(run.job["objective"])
        kind = build_study_objective(name, {}).sampler
        logged = {key: run.final(key).ravel() for key in SIGNALS if key.startswith("health_")}
        logged["grad_norm"] = run.gradient("median")[-1].ravel()
        errors, variances = run.final("error").ravel(), run.final("variance").ravel()
        for i, (error, variance) in enumerate(zip(errors, variances, strict=True)):
            # jumps that are not trained, as those of fm, and metrics that do not exist
            metrics = {k: float(v[i]) for k, v in logged.items() if np.isfinite(v[i])}
            if kind == "diagonal":
                metrics = {k: v for k, v in metrics.items() if k in ("health_variance_ratio",)}
            failed = outcome(error, variance) != "healthy"
            warned = not np.isfinite(error) or alarm.health_alarm(metrics, kind) is not None
            samples.append(Sample(name, metrics, failed, warned))
    return samples


def alarm_rows(results: Results) -> list[dict[str, str]]:
    """A table: each metric alone with its bound, and the alarm as a whole.

    ``ranks``: chance that a failed run has the larger value than a healthy one.
    """
    samples = alarm_samples(results)
    rows = []
    for name, bounds in SIGNALS.items():
        values = np.array([s.metrics[name] for s in samples if name in s.metrics])
        failed = np.array([s.failed for s in samples if name in s.metrics])
        beyond = np.zeros(len(values), bool)
        if bounds:
            beyond = values > bounds[-1]
        if len(bounds) == 2:
            beyond |= values < bounds[0]
        rows.append(_row(name, ", ".join(f"{b:g}" for b in bounds), failed, beyond, values))
    failed = np.array([s.failed for s in samples])
    rows.append(_row("the alarm", "", failed, np.array([s.warned for s in samples]), None))
    return rows


def _row(
    name: str,
    bounds: str,
    failed: np.typing.NDArray[np.bool_],
    beyond: np.typing.NDArray[np.bool_],
    values: np.typing.NDArray[np.float64] | None,
) -> dict[str, str]:
    bad, good = int(failed.sum()), int((~failed).sum())
    ranks = ""
    if values is not None and bad and good:
        area = (rankdata(values)[failed].sum() - bad * (bad + 1) / 2) / (bad * good)
        ranks = f"{area:.2f}"
    judged = bool(bounds) or values is None
    return {
        "metric": name,
        "bounds": bounds or "-",
        "ranks": ranks or "-",
        "failed runs caught": f"{int(beyond[failed].sum())} of {bad}" if judged else "-",
        "healthy runs warned of": f"{int(beyond[~failed].sum())} of {good}" if judged else "-",
    }
