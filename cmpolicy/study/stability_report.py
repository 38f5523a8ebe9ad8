"""What a study leaves beside its results: tables, figures, and the page that holds all of them."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from cmpolicy.files import write_atomically
from cmpolicy.study.alarm_table import alarm_rows
from cmpolicy.study.claims import all_claims
from cmpolicy.study.figures import FIGURES, draw
from cmpolicy.study.measure import COLLAPSED, DIVERGED, WRONG
from cmpolicy.study.page import Shown, make_page
from cmpolicy.study.results import Results, Run, mean_interval

PAGE = "stability.html"
#: Steps after which a run that learns at all has a map to be judged.
_LONG_ENOUGH = 500
#: Figures of more points than fit into this are shown as PNG, which is then smaller.
_LARGEST_SVG = 50_000

#: Heading and caption of each figure.
_TEXTS: Mapping[str, tuple[str, str]] = {
    "outcomes": (
        "How runs from scratch end",
        f"Diverged: not finite, or an error above {DIVERGED:g}. Collapsed: below {COLLAPSED} of "
        f"the true variance. Wrong: an error above {WRONG}. Errors are root mean squares over "
        "noise, in standard deviations of the data; a constant map has 1. Flow matching is sampled "
        "in ten steps, the others in one.",
    ),
    "grid": (
        "Every network",
        "A dot is a network; errors right of the dotted line are wrong, above 10 drawn as 10.",
    ),
    "picture": (
        "The maps themselves, in one dimension",
        "Two Gaussians, batch 32. A line is a network.",
    ),
    "family": (
        "Degenerate solutions in closed form",
        "Maps between a constant (a = 0) and the truth (a = 1) that are all exactly consistent in "
        "time: X = c + a (truth - c). Consistency training has no slope along them and its loss is "
        "least at the constant; only what happens at t = 0 tells them apart. Jumps shorter than "
        ".05 count as that long.",
    ),
    "starts": (
        "From the truth, and from the constant map",
        "Networks that were first fitted to either, then trained; mean over targets, bands over "
        "seeds.",
    ),
    "batch": ("Batch size", "Geometric means over seeds, with bands of 95 %."),
    "lengths": (
        "Gradients of ESD and iSD",
        "The gradient of L_sd alone, unweighted, of the same networks on the same batches.",
    ),
    "tangent": (
        "Bias of u_hat against variance of v",
        "While iSD trains, without adaptive weight. The best mix (1 - a) v + a u_hat is the one "
        "nearest to the true velocity.",
    ),
    "derivative": (
        "How dF/dt is taken",
        "The central difference may pass t = 1; the one-sided one stops there.",
    ),
    "settings": (
        "Single settings of iSD",
        "Base: sd_share=1, sd_begin=0, jvp, the package's defaults otherwise; batch 128, learning "
        "rate .001.",
    ),
    "alarms": (
        "What a run's own metrics tell",
        "Every run of the study, whatever its start. Lines: the bounds of the warning in training.",
    ),
}


def write_report(folder: Path, raw: Sequence[Mapping[str, Any]], command: str) -> Path:
    """Write ``runs.csv``, ``claims.json``, ``figures/`` and the page; its path.

    Raises:
        WriteError: the disk is full or not writable.
    """
    results = Results(raw)
    claims = all_claims(results)
    (folder / "figures").mkdir(exist_ok=True)
    shown = []
    for name in FIGURES:
        svg, png = draw(name, results)
        write_atomically(folder / "figures" / f"{name}.png", png)
        lines = svg.encode()
        few = len(lines) < _LARGEST_SVG
        picture = ("image/svg+xml", lines) if few else ("image/png", png)
        shown.append(Shown(name, *_TEXTS[name], *picture))
    alarms = alarm_rows(results)
    write_atomically(folder / "runs.csv", _csv([row for r in results.runs for row in _rows(r)]))
    told = {"command": command, "claims": [asdict(c) for c in claims], "alarms": alarms}
    write_atomically(folder / "claims.json", (json.dumps(told, indent=1) + "\n").encode())
    page = make_page(
        shown,
        claims,
        {"Which metrics tell a failing run": alarms},
        command=command,
        about=_about(results),
    )
    write_atomically(folder / PAGE, page.encode())
    return folder / PAGE


def _about(results: Results) -> list[str]:
    networks = sum(len(run.raw["seeds"]) for run in results.runs)
    first = results.of("grid")[0]
    minutes = sum(float(run.raw["seconds"]) for run in results.runs) / 60
    steps = first.steps[-1]
    short = (
        f"Runs of {steps} steps are short: how they end is for size=standard to say. "
        if steps < _LONG_ENOUGH
        else ""
    )
    return [
        f"{short}{networks} networks in {len(results.runs)} jobs, {minutes:.0f} minutes one after "
        "the other. Each is a multilayer perceptron of three hidden layers of 64, trained on "
        "data in one or two dimensions whose flow map is known to eight digits (velocity in closed "
        f"form, DOP853). {steps} steps of Adam with a cosine schedule and no clipping, "
        f"{first.job['seeds']} seeds, linear path; brackets are 95 % intervals over seeds, of "
        "shares over runs. Verdicts follow from the numbers by the rules in the table.",
        "All objectives share the exact derivative, the law of times and, where they have it, "
        "self-distillation on every example from the first step. What holds here need not hold "
        "for a policy: the networks are small, the runs short, and there is no observation.",
    ]


def _rows(run: Run) -> list[dict[str, object]]:
    """One row for each learning rate: means over seeds, and how the runs ended."""
    rows: list[dict[str, object]] = []
    ends = run.outcomes()
    seeds = int(run.job["seeds"])
    for k, rate in enumerate(run.rates):
        mine = ends[k * seeds : (k + 1) * seeds]
        row: dict[str, object] = {
            "experiment": run.job["experiment"],
            "name": run.job["name"],
            "target": run.job["target"],
            "objective": run.job["objective"],
            "batch": run.job["batch"],
            "rate": rate,
            "start": run.job["start"],
        }
        for metric in ("error", "error_worst", "error_any", "variance", "health_semigroup",
                       "health_tangent", "health_tangent_at_1", "health_map_error"):  # fmt: skip
            found = mean_interval(run.final(metric)[k])
            row |= {metric: f"{found.value:.4g}", f"{metric}_low": f"{found.low:.4g}",
                    f"{metric}_high": f"{found.high:.4g}"}  # fmt: skip
        for name in ("median", "p99", "largest"):
            row[f"gradient_{name}"] = f"{mean_interval(run.gradient(name)[-1][k]).value:.4g}"
        row |= {end: mine.count(end) for end in ("healthy", "wrong", "collapsed", "diverged")}
        rows.append(row)
    return rows


def _csv(rows: Sequence[Mapping[str, object]]) -> bytes:
    text = io.StringIO()
    writer = csv.DictWriter(text, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue().encode()
