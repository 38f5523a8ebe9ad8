"""Several results side by side: an aligned table, paired differences, and a figure."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from cmpolicy_eval.metrics import Estimate, Interval
from cmpolicy_eval.result import EpisodeScore, Result, ResultError, write_atomically
from cmpolicy_eval.seeds import format_seeds

_RUNS_HEAD = ("policy", "protocol", "runs", "episodes", "evaluations", "score", "success", "each")
_HEAD = ("policy", "protocol", "episodes", "evaluations", "score", "success", "ms per call")
# Okabe and Ito's colours: told apart by colour-blind readers, too.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#000000")
MARKERS = "osD^vPX"
_Point = tuple[float, Interval]


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


def runs_table(results: Sequence[Result]) -> str:
    """A row for every recipe of several training runs: means over them, with intervals."""
    rows = [
        (
            group.name,
            group.results[0].protocol,
            str(len(group.results)),
            str(len(group.results[0].seeds)),
            str(group.results[0].nfe),
            str(group.score),
            str(group.success),
            ", ".join(f"{share:.3f}" for share in sorted(group.success.by_seed)),
        )
        for group in _groups(results, pool=True)
    ]
    return aligned(_RUNS_HEAD, rows, left=2)


def difference_table(results: Sequence[Result], *, pool: bool = False) -> str:
    """Every later result minus the first, on the same seeds; "" where nothing can be paired.

    With ``pool`` results of one name are training runs of one recipe and make one row; two recipes
    are paired run by run, in the order given, and episode by episode.
    """
    first, *others = _groups(results, pool)
    rows = []
    for group in others:
        found = group.minus(first)
        if found is None:
            continue  # other seeds or another protocol: said in the text below the table
        name = f"{group.name}, {_evaluations(group.results[0].nfe)}"
        rows.append((name, *(_signed(value, interval) for value, interval in found)))
    return aligned(("minus the first", "score", "success"), rows, left=1) if rows else ""


def markdown(results: Sequence[Result], figure: str | None = None, *, pool: bool = False) -> str:
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
    if pool:
        parts.append("## Over training runs")
        parts.append(
            "Results of one name, on the same episodes at the same number of evaluations, are "
            "training runs of one recipe. 95 % intervals over runs and episodes (both resampled; "
            "from few runs they are too narrow), and the success of each run."
        )
        parts.append(runs_table(results))
    differences = difference_table(results, pool=pool)
    if differences:
        parts.append("## Differences on the same seeds")
        parts.append(
            f"To the first row ({_labels(results)[0]}, {_evaluations(first.nfe)}), episode by "
            "episode; an interval that leaves out 0 is a difference at the 5 % level. "
            "Score: paired bootstrap; success: Bonett and Price's paired interval; of several "
            "training runs both by the bootstrap over runs and episodes. Results on other seeds, "
            "another protocol or another number of runs are left out."
        )
        parts.append(differences)
    if figure is not None:
        parts.append(f"![score and success against evaluations]({figure})")
    parts.append("## Origin")
    parts.append("\n".join(_origins(results)))
    return "\n\n".join(parts) + "\n"


def plot(results: Sequence[Result], path: str | Path, *, pool: bool = False) -> Path:
    """Score and success with intervals against evaluations, one line per policy and protocol."""
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    lines: dict[str, list[_Group]] = {}
    for group in _groups(results, pool):
        lines.setdefault(group.name, []).append(group)
    figure = Figure(figsize=(9.0, 3.8), layout="constrained")
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2)
    evaluations = sorted({result.nfe for result in results})
    for index, (name, line) in enumerate(lines.items()):
        line.sort(key=lambda group: group.results[0].nfe)
        # A few per cent to the side, so that intervals at one x do not cover each other.
        nudge = 1.04 ** (index - (len(lines) - 1) / 2)
        x = [group.results[0].nfe * nudge for group in line]
        style = {
            "color": COLOURS[index % len(COLOURS)],
            "marker": MARKERS[index % len(MARKERS)],
            "label": name,
        }
        for axes, points in zip(
            (left, right), zip(*(g.points for g in line), strict=True), strict=True
        ):
            _curve(axes, x, points, style)
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
        ncols=min(3, len(lines)),
        frameon=False,
        fontsize=9,
    )
    figure.savefig(target, dpi=130)
    return target


def write_report(
    results: Sequence[Result], folder: str | Path, *, pool: bool = False
) -> tuple[Path, Path]:
    """Write ``report.md`` and ``report.png`` into ``folder``; returns their paths.

    With ``pool`` results of one name, protocol, number of evaluations and seeds are training runs
    of one recipe, and are averaged.

    Raises:
        ValueError: no results.
    """
    if not results:
        raise ValueError("a report needs at least one result")
    target = Path(folder)
    figure = plot(results, target / "report.png", pool=pool)
    text = target / "report.md"
    write_atomically(text, markdown(results, figure.name, pool=pool))
    return text, figure


@dataclass(frozen=True)
class _Group:
    """The training runs of one recipe that were scored alike; mostly one."""

    name: str
    results: tuple[Result, ...]

    @cached_property
    def score(self) -> Estimate:
        return Estimate.over(self._table(lambda episode: episode.score))

    @cached_property
    def success(self) -> Estimate:
        return Estimate.of_share(self._table(lambda episode: float(episode.success)))

    @property
    def points(self) -> list[_Point]:
        """Score and success with intervals, of one run its own."""
        if len(self.results) == 1:
            (only,) = self.results
            return [(only.score_mean, only.score_ci95), (only.success_rate, only.success_ci95)]
        return [(found.mean, found.ci95) for found in (self.score, self.success)]

    def minus(self, other: "_Group") -> list[_Point] | None:
        """Differences of score and success with intervals; None where they cannot be paired."""
        if len(self.results) != len(other.results):
            return None
        mine, theirs = self.results[0], other.results[0]
        try:
            found = mine.minus(theirs)
        except ResultError:
            return None
        if len(self.results) == 1:
            return [(found.score, found.score_ci95), (found.success, found.success_ci95)]
        both = (self.score - other.score, self.success - other.success)
        return [(difference.mean, difference.ci95) for difference in both]

    def _table(self, value: Callable[[EpisodeScore], float]) -> list[list[float]]:
        """(training runs, episodes)."""
        return [
            [value(episode) for episode in sorted(result.episodes, key=lambda e: e.seed)]
            for result in self.results
        ]


def _groups(results: Sequence[Result], pool: bool) -> list[_Group]:
    """With ``pool`` results of one name, protocol, evaluations and seeds; else each by itself."""
    found: dict[Any, list[Result]] = {}
    for index, (name, result) in enumerate(zip(_labels(results), results, strict=True)):
        alike = tuple(sorted(result.seeds)) if pool else index
        found.setdefault((name, result.nfe, alike), []).append(result)
    for (name, nfe, _), group in found.items():
        if len({_known_by(result) for result in group}) < len(group):
            raise ResultError(
                f"two results of {name!r} with {_evaluations(nfe)} are of one run, so they cannot "
                "be pooled: give the result of each training run once"
            )
    return [_Group(key[0], tuple(group)) for key, group in found.items()]


def _known_by(result: Result) -> tuple[Any, ...]:
    """What two scorings of one run share, and two runs hardly do.

    Where all episodes went alike (none succeeded, say) only their times tell two runs apart.
    """
    outcomes = tuple((e.seed, e.score, e.length) for e in result.episodes)
    alike = len({(score, length) for _, score, length in outcomes}) == 1
    return (*outcomes, *(e.infer_ms_p50 for e in result.episodes if alike))


def _curve(axes: Any, x: Sequence[float], points: Sequence[_Point], style: dict[str, Any]) -> None:
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
