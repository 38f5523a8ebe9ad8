"""Learning curves of a run as one PNG, drawn from its ``log.jsonl``."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from cmpolicy.training.trackers import read_log

CURVES_FILE = "curves.png"

Entries = Sequence[dict[str, Any]]


def draw_curves(run_dir: Path) -> Path | None:
    """Write ``curves.png`` into the run's folder; None if nothing was logged yet.

    Panels: losses, gradient norm, learning rate, and what the evaluations gave: rollouts, else
    held-out actions (the speed where there are neither), held-out losses, health. Training curves
    are drawn as logged (faint) and smoothed.
    """
    entries = read_log(run_dir)
    train = [e for e in entries if e.get("kind") == "train"]
    evals = [e for e in entries if e.get("kind") == "eval"]
    if not train:
        return None
    figure = Figure(figsize=(13, 7.5), layout="constrained")
    FigureCanvasAgg(figure)  # no pyplot: it would keep the figure and pick a window system
    axes = figure.subplots(2, 3)
    figure.suptitle(run_dir.resolve().name)

    losses = [name for name in train[-1] if name.startswith("loss_")]
    _panel(
        axes[0, 0],
        "training loss",
        "unweighted mean square",
        train,
        losses or ["loss"],
        smooth=True,
    )
    _log_scale(axes[0, 0])
    _panel(axes[0, 1], "gradient", "norm before clipping", train, ["grad_norm"], smooth=True)
    _log_scale(axes[0, 1])
    _panel(axes[0, 2], "learning rate", "learning rate", train, ["lr"])
    rollouts = [n for n in ("success", "score") if any(n in e for e in evals)]
    if rollouts:
        _panel(axes[1, 0], "rollouts while training", "share, score", evals, rollouts, marker="o")
        axes[1, 0].set_ylim(-0.03, 1.03)
    elif any("val_action_error" in e for e in evals):
        _panel(
            axes[1, 0],
            "held-out actions",
            "root mean square error",
            evals,
            ["val_action_error"],
            marker="o",
        )
    else:
        _panel(axes[1, 0], "speed", "training examples per second", train, ["examples_per_s"])
    held_out = sorted({n for e in evals for n in e if n.startswith("val_loss_")})
    _panel(axes[1, 1], "held-out loss", "unweighted mean square", evals, held_out, marker="o")
    _log_scale(axes[1, 1])
    health = sorted({name for entry in evals for name in entry if name.startswith("health_")})
    _panel(axes[1, 2], "health", "ratio", evals, health, marker="o")
    _log_scale(axes[1, 2])

    target = run_dir / CURVES_FILE
    figure.savefig(target, dpi=110)
    return target


def _panel(
    axis: Axes,
    title: str,
    unit: str,
    entries: Entries,
    names: Sequence[str],
    *,
    smooth: bool = False,
    marker: str = "",
) -> None:
    """One line per name over training examples."""
    axis.set_title(title)
    axis.set_xlabel("training examples")
    axis.set_ylabel(unit)
    axis.ticklabel_format(axis="x", style="sci", scilimits=(0, 5), useMathText=True)
    axis.grid(alpha=0.3)
    drawn = False
    for index, name in enumerate(names):
        points = [(e["examples"], e[name]) for e in entries if e.get(name) is not None]
        if not points:
            continue
        x, y = (np.array(column, dtype=float) for column in zip(*points, strict=True))
        label = name.removeprefix("health_").removeprefix("val_").replace("_", " ")
        color = f"C{index}"
        if smooth and len(y) >= 10:
            axis.plot(x, y, color=color, alpha=0.25, linewidth=1)
            y = smoothed(y)
        axis.plot(x, y, color=color, marker=marker, markersize=4, label=label)
        drawn = True
    if drawn:
        axis.set_xlim(left=0)
        axis.legend(fontsize=8)
    else:
        axis.text(0.5, 0.5, "no data", ha="center", va="center", transform=axis.transAxes)


def _log_scale(axis: Axes) -> None:
    """Logarithmic where something positive is drawn; an empty panel has no scale."""
    if any(np.any(np.asarray(line.get_ydata()) > 0) for line in axis.lines):
        axis.set_yscale("log")


def smoothed(y: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """Centred moving average over about a twentieth of the curve, shorter at its ends."""
    half = max(1, len(y) // 40)
    total = np.concatenate([[0.0], np.cumsum(y)])
    first = np.maximum(np.arange(len(y)) - half, 0)
    stop = np.minimum(np.arange(len(y)) + half + 1, len(y))
    mean: npt.NDArray[np.float64] = (total[stop] - total[first]) / (stop - first)
    return mean
