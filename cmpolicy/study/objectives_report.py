"""The table and the figure of ``cmpolicy study objectives``."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from cmpolicy.experiment.objective import ObjectiveConfig
from cmpolicy.files import write_atomically
from cmpolicy.flow.alarm import health_alarm
from cmpolicy.flow.sampler import SamplerKind
from cmpolicy.study.objectives import RunScores, Scores, evaluations
from cmpolicy_eval.metrics import Estimate
from cmpolicy_eval.report import COLOURS, MARKERS, aligned

Measure = Literal["success", "score"]
#: The default objective, to which the others are compared.
_REFERENCE = "isd"


@dataclass(frozen=True)
class Row:
    """All runs of one objective at one number of evaluations.

    A run that diverged counts as no success, with a score of zero.
    """

    objective: str
    sampler: SamplerKind
    nfe: int
    success: Estimate
    score: Estimate

    def of(self, measure: Measure) -> Estimate:
        """One of the two."""
        return self.success if measure == "success" else self.score


def write_report(runs: Sequence[RunScores], out: Path, commands: Sequence[str]) -> str:
    """Write ``table.md`` and ``objectives.png`` into ``out``; the tables as text."""
    text = markdown(runs)
    shown = "".join(f"    {command}\n" for command in commands)
    content = f"# Objectives side by side\n\n{shown}\n{text}\n![success](objectives.png)\n"
    write_atomically(out / "table.md", content.encode())
    plot(runs, out / "objectives.png")
    return text


def rows(runs: Sequence[RunScores]) -> list[Row]:
    """One row per objective and number of evaluations, in the order of the runs."""
    found = []
    scored = [score for run in runs for score in run.scores]
    nothing = (0.0,) * max((len(score.success) for score in scored), default=0)
    # What an objective is scored at, none of whose runs came so far; 100 is DDPM's own number.
    asked = sorted({score.nfe for score in scored if score.sampler != "ddpm"})
    for name in dict.fromkeys(run.objective for run in runs):
        own = [run for run in runs if run.objective == name]
        kinds = next(([(s.sampler, s.nfe) for s in run.scores] for run in own if run.scores), None)
        if kinds is None:
            kinds = evaluations(ObjectiveConfig(name=name), asked) if scored else []
        for kind, nfe in kinds:
            several = [_of(run, kind, nfe) for run in own]
            success = np.array([nothing if s is None else s.success for s in several], float)
            score = np.array([nothing if s is None else s.score for s in several], float)
            found.append(Row(name, kind, nfe, Estimate.of_share(success), Estimate.over(score)))
    return found


def _of(run: RunScores, kind: str, nfe: int) -> Scores | None:
    return next((s for s in run.scores if (s.sampler, s.nfe) == (kind, nfe)), None)


def _fewest(table: Sequence[Row]) -> list[Row]:
    """Each objective at its fewest evaluations."""
    first = {}
    for row in sorted(table, key=lambda r: -r.nfe):
        first[row.objective] = row
    return [row for row in table if first[row.objective] is row]


def _against(table: Sequence[Row]) -> str:
    """A table of differences to isd at the fewest evaluations; empty where isd was not run."""
    first = _fewest(table)
    reference = next((row for row in first if row.objective == _REFERENCE), None)
    if reference is None or len({row.success.values.shape for row in first}) > 1:
        return ""
    lines = [
        [
            row.objective + (f" ({row.nfe} evaluations)" if row.nfe > 1 else ""),
            str(row.success - reference.success),
            str(row.score - reference.score),
        ]
        for row in sorted(first, key=lambda r: -r.score.mean)
        if row is not reference
    ]
    return (
        f"\nAt the fewest evaluations, less {_REFERENCE}, paired by training seed and episode:\n\n"
        + aligned(["objective", "success", "score"], lines, left=1)
        + "\n"
    )


def markdown(runs: Sequence[RunScores]) -> str:
    """Aligned tables: success by number of evaluations, against isd, and how the runs went."""
    table = rows(runs)
    numbers = sorted({row.nfe for row in table})
    head = ["objective", *(f"{n} evaluation{'s' if n > 1 else ''}" for n in numbers)]
    lines = []
    for name in dict.fromkeys(run.objective for run in runs):
        cells = {r.nfe: r for r in table if r.objective == name}
        lines.append([name, *(_cell(cells.get(n)) for n in numbers)])
    second = ["objective", "runs", "diverged", "warned of", "gradient norm: median, largest"]
    second += ["CPU ms of the run a step", "peak MB", "map error", "variance ratio"]
    return (
        "Success / score, 95 % intervals over training seeds and episodes:\n\n"
        + aligned(head, lines, left=1)
        + "\n"
        + _against(table)
        + "\nHow the runs went, medians over training seeds:\n\n"
        + aligned(
            second, [_facts(n, runs) for n in dict.fromkeys(r.objective for r in runs)], left=1
        )
        + "\n"
    )


def _cell(row: Row | None) -> str:
    if row is None:
        return "-"
    kind = f" ({row.sampler})" if row.sampler in ("ddpm", "ddim") else ""
    return f"{row.success} / {row.score}{kind}"


def _facts(name: str, runs: Sequence[RunScores]) -> list[str]:
    own = [run for run in runs if run.objective == name]

    def median(values: Sequence[float | None], form: str) -> str:
        known = [v for v in values if v is not None]
        return format(float(np.median(known)), form) if known else "-"

    return [
        name,
        str(len(own)),
        str(sum(run.diverged is not None for run in own)),
        str(sum(_warned(run) for run in own)),
        median([r.grad_norm.get("median") for r in own], ".2f")
        + ", "
        + median([r.grad_norm.get("largest") for r in own], ".3g"),
        median([r.cpu_ms_per_step for r in own], ".0f"),
        median([r.peak_mb for r in own], ".0f"),
        median([r.health.get("health_map_error") for r in own], ".2f"),
        median([r.health.get("health_variance_ratio") for r in own], ".2f"),
    ]


def _warned(run: RunScores) -> bool:
    """Whether the alarm speaks at the end of the run; the last of its samplers is its own."""
    return bool(run.scores) and health_alarm(run.health, run.scores[-1].sampler) is not None


def plot(runs: Sequence[RunScores], path: Path) -> Path:
    """Success and score: at the fewest evaluations, best first, and against their number."""
    table = rows(runs)
    figure = Figure(figsize=(11, 0.56 * len({r.objective for r in table}) + 4.4), dpi=120)
    FigureCanvasAgg(figure)
    panels = figure.subplots(2, 2)
    for (left, right), measure in zip(panels, get_args(Measure), strict=True):
        _plot_first(left, table, measure)
        _plot_evaluations(right, table, measure)
    lines, names = panels[0][1].get_legend_handles_labels()
    figure.legend(lines, names, loc="lower center", ncols=7, fontsize=8)
    figure.tight_layout(rect=(0, 0.05, 1, 1))
    figure.savefig(path)
    return path


def _plot_first(axes: Axes, table: Sequence[Row], measure: Measure) -> None:
    """Each objective at its fewest evaluations."""
    first = [(row, row.of(measure)) for row in _fewest(table)]
    first.sort(key=lambda pair: pair[1].mean)
    for i, (_, found) in enumerate(first):
        axes.plot(found.ci95, [i, i], color="#555555", lw=2, zorder=1)
        axes.scatter(found.by_seed, [i] * len(found.by_seed), s=14, color="#999999", zorder=2)
        axes.scatter([found.mean], [i], s=40, color=COLOURS[0], zorder=3)
    labels = [r.objective + (f" ({r.nfe} evaluations)" if r.nfe > 1 else "") for r, _ in first]
    axes.set_yticks(range(len(first)), labels)
    axes.set_xlabel(f"{measure} at the fewest evaluations (grey: training seeds; line: 95 %)")
    axes.grid(axis="x", alpha=0.3)


def _plot_evaluations(axes: Axes, table: Sequence[Row], measure: Measure) -> None:
    """Every objective against the number of evaluations."""
    for i, name in enumerate(dict.fromkeys(r.objective for r in table)):
        line = sorted((r for r in table if r.objective == name), key=lambda r: r.nfe)
        axes.plot(
            [r.nfe for r in line],
            [r.of(measure).mean for r in line],
            marker=MARKERS[i // len(COLOURS)],
            color=COLOURS[i % len(COLOURS)],
            label=name,
        )
    axes.set_xscale("log")
    ticks = sorted({r.nfe for r in table})
    axes.set_xticks(ticks, [str(n) for n in ticks])
    axes.minorticks_off()
    axes.set_xlabel("network evaluations per action chunk")
    axes.set_ylabel(measure)
    axes.set_ylim(bottom=0)
    axes.grid(alpha=0.3)
