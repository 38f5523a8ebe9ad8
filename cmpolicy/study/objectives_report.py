"""The table and the figure of ``cmpolicy study objectives``."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from cmpolicy.files import write_atomically
from cmpolicy.study.objectives import RunScores, Scores
from cmpolicy_eval.metrics import Interval, nested_bootstrap_interval
from cmpolicy_eval.report import COLOURS, MARKERS, aligned


@dataclass(frozen=True)
class Row:
    """All runs of one objective at one number of evaluations: means and intervals of 95 %.

    Intervals are over training seeds and episodes. A run that diverged counts as no success.
    """

    objective: str
    sampler: str
    nfe: int
    success: float
    success_ci95: Interval
    by_seed: tuple[float, ...]
    score: float
    score_ci95: Interval


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
    for name in dict.fromkeys(run.objective for run in runs):
        own = [run for run in runs if run.objective == name]
        trained = [run for run in own if run.scores]
        kinds = [(s.sampler, s.nfe) for run in trained[:1] for s in run.scores]
        for kind, nfe in kinds:
            several = [_of(run, kind, nfe) for run in trained]
            length = len(several[0].success)
            nothing = [[0.0] * length] * (len(own) - len(trained))
            success = np.array([*(s.success for s in several), *nothing], float)
            score = np.array([*(s.score for s in several), *nothing], float)
            found.append(
                Row(
                    name,
                    kind,
                    nfe,
                    float(success.mean()),
                    nested_bootstrap_interval(success),
                    tuple(float(v) for v in success.mean(1)),
                    float(score.mean()),
                    nested_bootstrap_interval(score),
                )
            )
    return found


def _of(run: RunScores, kind: str, nfe: int) -> Scores:
    return next(s for s in run.scores if (s.sampler, s.nfe) == (kind, nfe))


def markdown(runs: Sequence[RunScores]) -> str:
    """Two aligned tables: success by number of evaluations, and how the runs went."""
    table = rows(runs)
    numbers = sorted({row.nfe for row in table})
    head = ["objective", *(f"{n} evaluation{'s' if n > 1 else ''}" for n in numbers)]
    lines = []
    for name in dict.fromkeys(run.objective for run in runs):
        cells = {r.nfe: r for r in table if r.objective == name}
        lines.append([name, *(_cell(cells.get(n)) for n in numbers)])
    second = ["objective", "runs", "diverged", "gradient norm: median, largest", "CPU ms a step"]
    second += ["peak MB", "map error", "variance ratio"]
    return (
        "Success / score, 95 % intervals of the success over training seeds and episodes:\n\n"
        + aligned(head, lines, left=1)
        + "\n\nHow the runs went, medians over training seeds:\n\n"
        + aligned(
            second, [_facts(n, runs) for n in dict.fromkeys(r.objective for r in runs)], left=1
        )
        + "\n"
    )


def _cell(row: Row | None) -> str:
    if row is None:
        return "-"
    low, high = row.success_ci95
    kind = f" ({row.sampler})" if row.sampler in ("ddpm", "ddim") else ""
    return f"{row.success:.3f} [{low:.3f}, {high:.3f}] / {row.score:.3f}{kind}"


def _facts(name: str, runs: Sequence[RunScores]) -> list[str]:
    own = [run for run in runs if run.objective == name]

    def median(values: Sequence[float | None], form: str) -> str:
        known = [v for v in values if v is not None]
        return format(float(np.median(known)), form) if known else "-"

    return [
        name,
        str(len(own)),
        str(sum(run.diverged is not None for run in own)),
        median([r.grad_norm.get("median") for r in own], ".2f")
        + ", "
        + median([r.grad_norm.get("largest") for r in own], ".3g"),
        median([r.cpu_ms_per_step for r in own], ".0f"),
        median([r.peak_mb for r in own], ".0f"),
        median([r.health.get("health_map_error") for r in own], ".2f"),
        median([r.health.get("health_variance_ratio") for r in own], ".2f"),
    ]


def plot(runs: Sequence[RunScores], path: Path) -> Path:
    """Success at one evaluation, best first, and success against the number of evaluations."""
    table = rows(runs)
    figure = Figure(figsize=(11, 0.32 * len({r.objective for r in table}) + 2.6), dpi=120)
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2)
    fewest = {r.objective: min(q.nfe for q in table if q.objective == r.objective) for r in table}
    first = sorted((r for r in table if r.nfe == fewest[r.objective]), key=lambda r: r.success)
    for i, row in enumerate(first):
        low, high = row.success_ci95
        left.plot([low, high], [i, i], color="#555555", lw=2, zorder=1)
        left.scatter(row.by_seed, [i] * len(row.by_seed), s=14, color="#999999", zorder=2)
        left.scatter([row.success], [i], s=40, color=COLOURS[0], zorder=3)
    labels = [r.objective + (f" ({r.nfe} evaluations)" if r.nfe > 1 else "") for r in first]
    left.set_yticks(range(len(first)), labels)
    left.set_xlabel("success at the fewest evaluations (grey: training seeds; line: 95 %)")
    left.set_xlim(0, 1)
    left.grid(axis="x", alpha=0.3)
    several = list(dict.fromkeys(r.objective for r in table))
    for i, name in enumerate(several):
        line = sorted((r for r in table if r.objective == name), key=lambda r: r.nfe)
        right.plot(
            [r.nfe for r in line],
            [r.success for r in line],
            marker=MARKERS[i // len(COLOURS)],
            color=COLOURS[i % len(COLOURS)],
            label=name,
        )
    right.set_xscale("log")
    ticks = sorted({r.nfe for r in table})
    right.set_xticks(ticks, [str(n) for n in ticks])
    right.minorticks_off()
    right.set_xlabel("network evaluations per action chunk")
    right.set_ylabel("success")
    right.set_ylim(0, 1)
    right.grid(alpha=0.3)
    right.legend(fontsize=8, ncols=2)
    figure.tight_layout()
    figure.savefig(path)
    return path
