"""The figures of the stability study: each is a function of the results."""

from __future__ import annotations

import io
import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import NullFormatter
from PIL import Image

from cmpolicy.study.alarm_table import SIGNALS, alarm_samples
from cmpolicy.study.measure import WRONG
from cmpolicy.study.probes import EPSILONS, FAMILY, LENGTHS
from cmpolicy.study.results import Results, mean_interval, ratio_interval
from cmpolicy.study.targets import Array

_COLORS = {"ct": "#d1495b", "dct": "#edae49", "isd": "#00798c", "esd": "#8f4e9e"}
_OUTCOMES = {
    "healthy": "#00798c",
    "wrong": "#edae49",
    "collapsed": "#8d8d8d",
    "diverged": "#d1495b",
}
#: Errors above this are drawn as this.
_LARGEST = 10.0
_STYLE: dict[Any, Any] = {
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlesize": 9,
    "legend.frameon": False,
    "legend.fontsize": 8,
    "svg.hashsalt": "study",  # the same figure gives the same file
    "svg.fonttype": "none",
}


def draw(name: str, results: Results) -> tuple[str, bytes]:
    """Figure ``name`` as SVG text and as PNG."""
    with mpl.rc_context(_STYLE):
        figure = FIGURES[name](results)
        FigureCanvasAgg(figure)
        svg, png = io.StringIO(), io.BytesIO()
        figure.savefig(svg, format="svg", metadata={"Date": None})
        figure.savefig(png, format="png", dpi=100)
    # hundredths of a point, and few colours: nothing to see, and half the size
    smaller = io.BytesIO()
    Image.open(png).convert("RGB").quantize(64).save(smaller, format="png", optimize=True)
    return re.sub(r"(\d\.\d\d)\d+", r"\1", svg.getvalue()), smaller.getvalue()


def _axes(columns: int, width: float, height: float = 2.9) -> tuple[Figure, list[Axes]]:
    figure = Figure(figsize=(width, height), layout="constrained")
    made = figure.subplots(1, columns, squeeze=False)
    return figure, list(made[0])


def _band(axes: Axes, x: Sequence[float], rows: Sequence[Array], label: str, **style: Any) -> None:
    """A line of means over seeds with a band of their intervals; geometric on a log axis."""
    if axes.get_yscale() == "log":
        found = [ratio_interval(row, np.ones_like(row)) for row in rows]
    else:
        found = [mean_interval(row) for row in rows]
    line = axes.plot(x, [i.value for i in found], label=label, **style)[0]
    low, high = [i.low for i in found], [i.high for i in found]
    axes.fill_between(x, low, high, color=line.get_color(), alpha=0.15, linewidth=0)


def _log_ticks(at: Axes) -> None:
    """Plain numbers on a log axis, few enough to be read."""
    low, high = at.get_xlim()
    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    wide = math.log10(high / low) > 2.2
    ticks = [m * 10.0**d for d in decades for m in ((1,) if wide else (1, 2, 5))]
    ticks = [tick for tick in ticks if low <= tick <= high]
    at.set_xticks(ticks if len(ticks) <= 7 else ticks[::2], minor=False)
    at.xaxis.set_major_formatter(lambda v, _: f"{v:g}")
    at.xaxis.set_minor_formatter(NullFormatter())
    at.set_xlim(low, high)


def _rate(rate: float) -> str:
    return f"learning rate {rate:g}"


def grid(results: Results) -> Figure:
    """Error of the one-jump map of every network, by objective."""
    runs = results.of("grid")
    panels = sorted({(r.job["target"], r.job["batch"]) for r in runs}, key=str, reverse=True)
    figure, axes = _axes(len(panels), 1.2 + 2.9 * len(panels), 3.4)
    names = results.objectives()
    for at, (target, batch) in zip(axes, panels, strict=True):
        for run in runs:
            if (run.job["target"], run.job["batch"]) != (target, batch):
                continue
            row = names.index(run.job["objective"])
            for k, rate in enumerate(run.rates):
                # what is not finite, or off the page, is drawn at its edge
                error = np.nan_to_num(run.final("error")[k], nan=_LARGEST).clip(max=_LARGEST)
                color = ("#00798c", "#d1495b")[k]
                y = row + (0.18 if k else -0.18) + 0 * error
                at.plot(error, y, "o", color=color, markersize=3, alpha=0.7,
                        label=_rate(rate) if row == 0 else None)  # fmt: skip
        at.axvline(WRONG, color="gray", linewidth=0.8, linestyle=":")
        at.set(xscale="log", title=f"{target}, batch {batch}", xlabel="error of X(1→0)")
        _log_ticks(at)
        at.set_yticks(range(len(names)), names)
        at.invert_yaxis()
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=2)
    return figure


def outcomes(results: Results) -> Figure:
    """How all runs from scratch ended, by objective and learning rate."""
    names = results.objectives()
    rates = results.of("grid")[0].rates
    figure, axes = _axes(len(rates), 7.5, 3.2)
    for k, at in enumerate(axes):
        left = np.zeros(len(names))
        for end, color in _OUTCOMES.items():
            shares = []
            for name in names:
                ends = [o for run in results.from_scratch(name)
                        for o in np.reshape(run.outcomes(), (len(rates), -1))[k]]  # fmt: skip
                shares.append(ends.count(end) / len(ends))
            at.barh(names, shares, left=left, color=color, label=end)
            left += shares
        at.set(xlim=(0, 1), title=_rate(rates[k]), xlabel="share of runs")
        at.invert_yaxis()
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=4)
    return figure


def picture(results: Results) -> Figure:
    """The one-jump maps themselves, in one dimension: every seed against the truth."""
    runs = sorted(results.of("picture"), key=lambda r: str(r.job["objective"]))
    figure, axes = _axes(len(runs), 9.0, 3.1)
    for at, run in zip(axes, runs, strict=True):
        found = run.probe("picture")[-1][1]
        seeds = run.final("error").shape[1]
        for i, values in enumerate(found["found"]):
            late = i >= seeds
            at.plot(found["z"], [np.nan if v is None else v for v in values], linewidth=0.8,
                    color="#d1495b" if late else "#00798c", alpha=0.8,
                    label=_rate(run.rates[i // seeds]) if i % seeds == 0 else None)  # fmt: skip
        at.plot(found["z"], found["truth"], color="black", linewidth=1.6, label="true map")
        at.set(title=run.job["objective"], xlabel="noise z", ylim=(-2.5, 2.5))
    axes[0].set_ylabel("X(1→0)(z)")
    axes[0].legend(loc="upper left")
    return figure


def family(results: Results) -> Figure:
    """Loss and gradient of exactly consistent maps between a constant and the truth."""
    found = results.of("family")[0].probe("family")[0][1]
    figure, axes = _axes(2, 7.5)
    for name in ("ct", "dct", "isd"):
        for at, kind in zip(axes, ("loss", "slope"), strict=True):
            rows = [np.array(v) for v in found[f"{name}_{kind}"]]
            _band(at, FAMILY, rows, name, color=_COLORS[name], marker="o", markersize=3)
    for at in axes:
        at.axvline(1, color="black", linewidth=0.8)
        at.axvline(0, color="gray", linewidth=0.8, linestyle=":")
        at.set_xlabel("a: 0 constant map, 1 truth")
        at.set_yscale("symlog", linthresh=0.02)
    axes[0].set(title="loss (not weighted)", ylim=(-0.005, None))
    axes[1].set_title("its gradient by a")
    axes[1].axhline(0, color="gray", linewidth=0.6)
    axes[0].legend()
    return figure


def starts(results: Results) -> Figure:
    """Error over training of networks that start at the truth, or at the constant map."""
    runs = results.of("start")
    rates = runs[0].rates
    figure, axes = _axes(2 * len(rates), 11.0)
    panels = [(start, k) for start in ("truth", "constant") for k in range(len(rates))]
    for at, (start, k) in zip(axes, panels, strict=True):
        for name in ("ct", "dct", "meanflow", "isd"):
            chosen = [r for r in runs if r.job["start"] == start and r.job["objective"] == name]
            # over targets first, so that the interval is over seeds
            rows = np.mean([r.series("error")[:, k] for r in chosen], axis=0)
            _band(at, chosen[0].steps, list(rows), name, color=_COLORS.get(name, "#555555"))
        at.axhline(WRONG, color="gray", linewidth=0.8, linestyle=":")
        at.set(title=f"from the {start}, rate {rates[k]:g}", xlabel="step", ylim=(0, 2.5))
    axes[0].set_ylabel("error of X(1→0)")
    axes[0].legend()
    return figure


def batch(results: Results) -> Figure:
    """Error of consistency training and of iSD by batch size."""
    rates = results.of("batch")[0].rates
    figure, axes = _axes(len(rates), 7.5)
    for k, at in enumerate(axes):
        at.set(xscale="log", yscale="log", title=_rate(rates[k]), xlabel="batch size")
        for name in ("ct", "dct", "isd"):
            runs = [r for r in results.from_scratch(name) if r.job["target"] == results.target]
            runs.sort(key=lambda r: int(r.job["batch"]))
            sizes = [float(r.job["batch"]) for r in runs]
            _band(at, sizes, [r.final("error")[k] for r in runs], name, color=_COLORS[name],
                  marker="o", markersize=3)  # fmt: skip
        at.axhline(WRONG, color="gray", linewidth=0.8, linestyle=":")
        at.set_xticks(sizes, [f"{s:g}" for s in sizes])
        at.minorticks_off()
    axes[0].set_ylabel("error of X(1→0)")
    axes[0].legend()
    return figure


def lengths(results: Results) -> Figure:
    """Gradient norm of L_sd by ESD and iSD against t - s, on the same networks and batches."""
    runs = results.of("probe", objective="isd")
    stages = [runs[0].probe("lengths")[i][0] for i in (0, -1)]
    figure, axes = _axes(3, 9.5)
    for at, stage, step in zip(axes, (0, -1), stages, strict=False):
        at.set(yscale="log", title=f"step {step}", xlabel="t - s")
        for name in ("isd", "esd"):
            tables = [r.probe("lengths")[stage][1][f"{name}_median"] for r in runs]
            rows = list(np.mean(np.array(tables, dtype=float), axis=0))
            _band(at, LENGTHS, rows, name, color=_COLORS[name], marker="o", markersize=3)
    for at in axes[:2]:
        at.set_ylabel("gradient norm of L_sd")
    for stage, step in zip((0, -1), stages, strict=True):
        pairs = [r.probe("lengths")[stage][1] for r in runs]
        found = []
        for i in range(len(LENGTHS)):
            esd, isd = (np.array([p[f"{n}_median"][i] for p in pairs]) for n in ("esd", "isd"))
            found.append(ratio_interval(esd, isd))
        axes[2].plot(
            LENGTHS, [f.value for f in found], marker="o", markersize=3, label=f"step {step}"
        )
        axes[2].fill_between(LENGTHS, [f.low for f in found], [f.high for f in found], alpha=0.15)
    axes[2].axhline(1, color="gray", linewidth=0.8)
    axes[2].set(title="esd over isd", xlabel="t - s")
    axes[0].legend()
    axes[2].legend()
    return figure


def tangent(results: Results) -> Figure:
    """Bias of u_hat, variance of v, their best mix, and the noise of gradients, over training."""
    runs = results.of("probe", objective="isd")
    figure, axes = _axes(3, 9.5)
    steps = [max(step, 1) for step, _ in runs[0].probe("tangent")]

    def rows(key: str) -> list[Array]:
        tables = [[p[key] for _, p in run.probe("tangent")] for run in runs]
        return list(np.mean(np.array(tables, dtype=float), axis=0))

    axes[0].set(title="distance² to the true velocity", yscale="log")
    axes[2].set(title="variance of the gradient of L_sd", yscale="log")
    _band(axes[0], steps, rows("bias"), "bias² of u_hat", color="#00798c")
    _band(axes[0], steps, rows("nearest"), "best mix", color="#555555")
    variance = float(np.mean([run.probe("tangent")[0][1]["variance"] for run in runs]))
    axes[0].axhline(variance, color="#d1495b", label="variance of v")
    _band(axes[1], steps, rows("mix"), "share", color="#00798c")
    axes[1].axhline(0.5, color="gray", linewidth=0.8, linestyle=":")
    axes[1].set(title="share of u_hat in the best mix", ylim=(0, 1.02))
    _band(axes[2], steps, rows("noise_self"), "tangent u_hat", color="#00798c")
    _band(axes[2], steps, rows("noise_data"), "tangent v", color="#d1495b")
    for at in axes:
        at.set(xscale="log", xlabel="step (0 drawn at 1)")
    axes[0].legend()
    axes[2].legend()
    return figure


def derivative(results: Results) -> Figure:
    """Error of dF/dt by the difference, and of the map that training with it gives."""
    exact = results.named("derivative", "jvp")
    found = exact.probe("derivative")[-1][1]
    figure, axes = _axes(2, 8.5)
    axes[0].set(xscale="log", yscale="log", xlabel="step e", title="relative error of dF/dt, s = 0")
    for kind, style in (("central", "-"), ("one-sided", "--")):
        for time, color in ((1.0, "#d1495b"), (0.5, "#00798c")):
            rows = [np.array(found[f"{kind} t={time} e={e}"]) for e in EPSILONS]
            _band(axes[0], EPSILONS, rows, f"{kind}, t = {time:g}", color=color, linestyle=style)
    axes[0].set_xticks(EPSILONS, [str(e) for e in EPSILONS])
    axes[0].minorticks_off()
    axes[0].legend()
    names = [str(r.job["name"]) for r in results.of("derivative")]
    names = ["jvp", *sorted(n for n in names if n != "jvp")]
    _dots(axes[1], {n: results.named("derivative", n).final("error")[0] for n in names})
    axes[1].set(title="the map at t = 1", xlabel="error of X(1→0)")
    return figure


def settings(results: Results) -> Figure:
    """Error of the one-jump map by single settings of iSD, and by EMA."""
    runs = results.of("settings")
    base = results.named("settings", "base")
    figure, axes = _axes(2, 9.5, 3.6)
    _dots(axes[0], {str(r.job["name"]): r.final("error")[0] for r in runs})
    axes[0].axvline(mean_interval(base.final("error")).value, color="gray", linewidth=0.8)
    axes[0].set(title="one setting at a time", xlabel="error of X(1→0)")
    kinds: dict[str, Array] = {"the weights": np.mean([r.final("error")[0] for r in runs], axis=0)}
    kinds["their EMA"] = np.mean([r.ema()[0] for r in runs], axis=0)
    _dots(axes[1], kinds)
    axes[1].set(title="averaged weights, mean of all of these", xlabel="error of X(1→0)")
    return figure


def _dots(at: Axes, groups: Mapping[str, Array]) -> None:
    """One row a group: its values, their mean and interval."""
    for row, values in enumerate(groups.values()):
        found = mean_interval(values)
        at.plot(values, row + 0 * values, "o", color="#00798c", markersize=3, alpha=0.5)
        at.plot([found.low, found.high], [row, row], color="black", linewidth=1)
        at.plot(found.value, row, "|", color="black", markersize=9)
    at.set_yticks(range(len(groups)), list(groups))
    at.invert_yaxis()


def alarms(results: Results) -> Figure:
    """The metrics that every run logs, of runs that end well and of those that do not."""
    figure, axes = _axes(len(SIGNALS), 11.0)
    samples = alarm_samples(results)
    rng = np.random.default_rng(0)
    for at, (name, signal) in zip(axes, SIGNALS.items(), strict=True):
        for row, bad in enumerate((False, True)):
            values = [s.metrics[name] for s in samples if s.failed is bad and name in s.metrics]
            color = _OUTCOMES["diverged" if bad else "healthy"]
            at.plot(values, row + rng.uniform(-0.3, 0.3, len(values)), "o", color=color,
                    markersize=2, alpha=0.4, rasterized=True)  # fmt: skip
            at.set_yticks([0, 1], ["healthy", "failed"])
        for bound in signal:
            at.axvline(bound, color="black", linewidth=0.8)
        at.set(xscale="log", title=name.removeprefix("health_"), ylim=(-0.6, 1.6))
        _log_ticks(at)
        at.label_outer()
    return figure


FIGURES: Mapping[str, Callable[[Results], Figure]] = {
    "outcomes": outcomes,
    "grid": grid,
    "picture": picture,
    "family": family,
    "starts": starts,
    "batch": batch,
    "lengths": lengths,
    "tangent": tangent,
    "derivative": derivative,
    "settings": settings,
    "alarms": alarms,
}
