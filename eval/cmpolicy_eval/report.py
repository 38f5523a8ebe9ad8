"""Several results side by side: an aligned table, paired differences, and a figure."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from cmpolicy_eval.metrics import Interval
from cmpolicy_eval.result import Result, ResultError, write_atomically
from cmpolicy_eval.seeds import format_seeds

_HEAD = ("policy", "protocol", "episodes", "evaluations", "score", "success", "ms per call")
# Okabe and Ito's colours: told apart by colour-blind readers, too.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#000000")
MARKERS = "osD^vPX"


def table(results: Sequence[Result]) -> str:
    """Aligned Markdown table, one row per result; also what the terminal shows."""
    names = _labels(results)
    rows = [
        (
            name,
            result.protocol,
            str(len(result.seeds)),
            str(result.nfe),
            _with_interval(result.score_mean, result.score_ci95),
            _with_interval(result.success_rate, result.success_ci95),
            f"{result.infer_ms.p50:.1f} / {result.infer_ms.p99:.1f}",
        )
        for name, result in zip(names, results, strict=True)
    ]
    return aligned(_HEAD, rows, left=2)


def difference_table(results: Sequence[Result]) -> str:
    """Every later result minus the first, on the same seeds; "" where nothing can be paired."""
    names = _labels(results)
    rows = []
    for name, result in zip(names[1:], results[1:], strict=True):
        try:
            difference = result.minus(results[0])
        except ResultError:
            continue  # other seeds or another protocol: said in the text below the table
        rows.append(
            (
                f"{name}, {_evaluations(result.nfe)}",
                _signed(difference.score, difference.score_ci95),
                _signed(difference.success, difference.success_ci95),
            )
        )
    return aligned(("minus the first", "score", "success"), rows, left=1) if rows else ""


def markdown(results: Sequence[Result], figure: str | None = None) -> str:
    """The report: table, differences, how to read them, where the numbers come from."""
    first = results[0]
    parts = ["# Evaluation report", table(results)]
    parts.append(
        "Score: mean over episodes of the largest reward (for Push-T coverage / 0.95, at most 1), "
        "95 % bootstrap interval. Success: share of episodes that reached the goal (Push-T: "
        "coverage > 0.95), 95 % Wilson interval. Evaluations: network calls per action chunk. "
        "ms per call: median / 99th percentile for a batch of "
        f"{', '.join(sorted({str(r.infer_ms.batch_size) for r in results}))} observations."
    )
    differences = difference_table(results)
    if differences:
        parts.append("## Differences on the same seeds")
        parts.append(
            f"To the first row ({_labels(results)[0]}, {_evaluations(first.nfe)}), episode by "
            "episode; an interval that leaves out 0 is a difference at the 5 % level. "
            "Score: paired bootstrap; success: Bonett and Price's paired interval. Results on "
            "other seeds or another protocol are left out."
        )
        parts.append(differences)
    if figure is not None:
        parts.append(f"![score and success against evaluations]({figure})")
    parts.append("## Origin")
    parts.append("\n".join(_origins(results)))
    return "\n\n".join(parts) + "\n"


def plot(results: Sequence[Result], path: str | Path) -> Path:
    """Score and success with intervals against evaluations, one line per policy and protocol."""
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    groups: dict[str, list[Result]] = {}
    for name, result in zip(_labels(results), results, strict=True):
        groups.setdefault(name, []).append(result)
    figure = Figure(figsize=(9.0, 3.8), layout="constrained")
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2)
    evaluations = sorted({result.nfe for result in results})
    for index, (name, group) in enumerate(groups.items()):
        group.sort(key=lambda result: result.nfe)
        # A few per cent to the side, so that intervals at one x do not cover each other.
        nudge = 1.04 ** (index - (len(groups) - 1) / 2)
        x = [result.nfe * nudge for result in group]
        style = {
            "color": COLOURS[index % len(COLOURS)],
            "marker": MARKERS[index % len(MARKERS)],
            "label": name,
        }
        _curve(left, x, [(r.score_mean, r.score_ci95) for r in group], style)
        _curve(right, x, [(r.success_rate, r.success_ci95) for r in group], style)
    for axes, label in ((left, "score"), (right, "success rate")):
        axes.set_xscale("log", base=2)
        axes.set_xticks(evaluations, [str(nfe) for nfe in evaluations])
        axes.minorticks_off()
        axes.set_xlim(evaluations[0] / 1.35, evaluations[-1] * 1.35)
        axes.set_xlabel("network evaluations per action chunk")
        axes.set_ylabel(f"{label} (95 % interval)")
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
    right.set_ylim(-0.02, 1.02)
    figure.suptitle(_title(results), fontsize=11)
    figure.legend(
        *left.get_legend_handles_labels(),
        loc="outside lower center",
        ncols=min(3, len(groups)),
        frameon=False,
        fontsize=9,
    )
    figure.savefig(target, dpi=130)
    return target


def write_report(results: Sequence[Result], folder: str | Path) -> tuple[Path, Path]:
    """Write ``report.md`` and ``report.png`` into ``folder``; returns their paths.

    Raises:
        ValueError: no results.
    """
    if not results:
        raise ValueError("a report needs at least one result")
    target = Path(folder)
    figure = plot(results, target / "report.png")
    text = target / "report.md"
    write_atomically(text, markdown(results, figure.name))
    return text, figure


def _curve(
    axes: Any, x: Sequence[float], points: Sequence[tuple[float, Interval]], style: dict[str, Any]
) -> None:
    y = [mean for mean, _ in points]
    below = [max(0.0, mean - low) for mean, (low, _) in points]
    above = [max(0.0, high - mean) for mean, (_, high) in points]
    axes.errorbar(x, y, yerr=[below, above], capsize=3, linewidth=1.6, markersize=5, **style)


def _labels(results: Sequence[Result]) -> list[str]:
    """Name of each result's policy; two protocols in one report are told apart."""
    several = len({result.protocol for result in results}) > 1
    return [f"{r.policy} ({r.protocol})" if several else r.policy for r in results]


def _title(results: Sequence[Result]) -> str:
    protocols = sorted({result.protocol for result in results})
    episodes = sorted({len(result.seeds) for result in results})
    return f"{', '.join(protocols)}, {' / '.join(map(str, episodes))} episodes"


def _origins(results: Sequence[Result]) -> list[str]:
    """Where the numbers come from; results that differ in evaluations alone share a line."""
    groups: dict[tuple[str, str], list[int]] = {}
    for result in results:
        versions = ", ".join(f"{name} {version}" for name, version in result.versions.items())
        rest = (
            f"seeds {format_seeds(result.seeds)}; data {result.data or 'not stated'}; "
            f"device {result.device}; commit {result.git_commit or 'unknown'}; "
            f"`{result.command}`; {versions}"
        )
        groups.setdefault((result.policy, rest), []).append(result.nfe)
    return [
        f"- {policy}, evaluations {', '.join(map(str, nfe))}: {rest}"
        for (policy, rest), nfe in groups.items()
    ]


def _evaluations(nfe: int) -> str:
    return "1 evaluation" if nfe == 1 else f"{nfe} evaluations"


def _with_interval(value: float, interval: Interval) -> str:
    return f"{value:.3f} [{interval[0]:.3f}, {interval[1]:.3f}]"


def _signed(value: float, interval: Interval) -> str:
    return f"{value:+.3f} [{interval[0]:+.3f}, {interval[1]:+.3f}]"


def aligned(head: Sequence[str], rows: Sequence[Sequence[str]], *, left: int) -> str:
    """Markdown table with padded cells; the first ``left`` columns left-aligned."""
    cells = [[cell.replace("|", "\\|") for cell in row] for row in (head, *rows)]
    widths = [max(len(row[column]) for row in cells) for column in range(len(head))]
    lines = [
        "| "
        + " | ".join(
            cell.ljust(width) if column < left else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        + " |"
        for row in cells
    ]
    rule = "|".join(
        "-" * (width + 2) if column < left else "-" * (width + 1) + ":"
        for column, width in enumerate(widths)
    )
    return "\n".join([lines[0], f"|{rule}|", *lines[1:]])
