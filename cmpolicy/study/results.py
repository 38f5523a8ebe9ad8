"""Results of jobs as arrays, and intervals over seeds.

Legend: S stages, R learning rates, N seeds. Intervals hold 95 %.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy.stats import t as student

from cmpolicy.study.measure import outcome
from cmpolicy.study.run_job import EMA_DECAY
from cmpolicy.study.targets import Array
from cmpolicy_eval.metrics import wilson_interval


@dataclass(frozen=True)
class Interval:
    """A number with its 95 % interval; an end is not a number where nothing can be said."""

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.value:.3g} [{self.low:.3g}, {self.high:.3g}]"


def mean_interval(values: Sequence[float] | Sequence[Sequence[float]] | Array) -> Interval:
    """Mean and Student's interval over the last axis, the seeds; other axes are averaged first.

    Values that are not finite are left out.
    """
    table = np.asarray(values, dtype=float)
    table = table.reshape(-1, table.shape[-1])
    known = np.isfinite(table)
    count = known.sum(axis=0)
    seeds = np.where(known, table, 0.0).sum(axis=0)[count > 0] / count[count > 0]
    if len(seeds) < 2:
        return Interval(float(seeds.mean()) if len(seeds) else np.nan, np.nan, np.nan)
    mean = float(seeds.mean())
    half = float(student.ppf(0.975, len(seeds) - 1) * seeds.std(ddof=1) / np.sqrt(len(seeds)))
    return Interval(mean, mean - half, mean + half)


def ratio_interval(above: Array, below: Array) -> Interval:
    """Geometric mean of the ratios of pairs (..., seeds), and its interval over seeds."""
    with np.errstate(divide="ignore", invalid="ignore"):
        log = mean_interval(np.log(np.asarray(above, float) / np.asarray(below, float)))
    return Interval(*(float(np.exp(v)) for v in (log.value, log.low, log.high)))


def share_interval(count: int, total: int) -> Interval:
    """A share of runs, and Wilson's interval."""
    low, high = wilson_interval(count, total)
    return Interval(count / total, low, high)


@dataclass(frozen=True)
class Run:
    """One job's result."""

    raw: Mapping[str, Any]

    @property
    def job(self) -> Mapping[str, Any]:
        job: Mapping[str, Any] = self.raw["job"]
        return job

    @property
    def steps(self) -> list[int]:
        """Of the stages."""
        return list(self.raw["steps"])

    @property
    def rates(self) -> tuple[float, ...]:
        """Learning rates."""
        return tuple(self.job["rates"])

    def series(self, metric: str) -> Array:
        """(S, R, N)."""
        return self._shaped(self.raw["metrics"][metric])

    def final(self, metric: str) -> Array:
        """At the end of the run, (R, N)."""
        last: Array = self.series(metric)[-1]
        return last

    def gradient(self, name: str) -> Array:
        """``median``, ``p99``, ``largest`` (of gradient norms) or ``loss``, (S, R, N)."""
        return self._shaped(self.raw["gradient"][name])

    def ema(self) -> Array:
        """Error of the averaged weights' map, (R, N)."""
        averaged: Array = self._shaped([self.raw["ema"][str(EMA_DECAY)]])[0]
        return averaged

    def outcomes(self) -> list[str]:
        """Of every network, by rate and seed."""
        pairs = zip(self.final("error").ravel(), self.final("variance").ravel(), strict=True)
        return [outcome(error, variance) for error, variance in pairs]

    def probe(self, name: str) -> list[tuple[int, Mapping[str, Any]]]:
        """(step, numbers) of every stage at which that probe looked."""
        return [
            (step, probes[name])
            for step, probes in zip(self.steps, self.raw["probes"], strict=True)
            if name in probes
        ]

    def _shaped(self, rows: Sequence[Sequence[float | None]]) -> Array:
        values = np.array([[np.nan if v is None else v for v in row] for row in rows], dtype=float)
        return values.reshape(len(rows), len(self.rates), -1)


class Results:
    """All results of a study."""

    def __init__(self, raw: Sequence[Mapping[str, Any]]) -> None:
        self.runs = [Run(entry) for entry in raw]

    def of(self, experiment: str, **wanted: Any) -> list[Run]:
        """The runs of an experiment whose jobs have these values."""
        return [
            run
            for run in self.runs
            if run.job["experiment"] == experiment
            and all(run.job[key] == value for key, value in wanted.items())
        ]

    def named(self, experiment: str, name: str) -> Run:
        """The one run of that name.

        Raises:
            KeyError: there is none.
        """
        found = self.of(experiment, name=name)
        if not found:
            raise KeyError(f"the study has no job {experiment}-{name}")
        return found[0]

    @property
    def target(self) -> str:
        """The target that every experiment has in common."""
        return str(self.of("settings")[0].job["target"])

    def objectives(self) -> list[str]:
        """Of the grid, in the order of the registry's names."""
        return sorted({str(run.job["objective"]) for run in self.of("grid")})

    def from_scratch(self, objective: str) -> list[Run]:
        """Every run of an objective from fresh weights with its usual settings."""
        return [*self.of("grid", objective=objective), *self.of("batch", objective=objective)]
