"""Pictures of a run of the simulated robot: a video with the plans, and a plot of the ticks."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import imageio.v2 as imageio
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from numpy.typing import NDArray

from cmpolicy.robot.episode import HELD, WAITED, Tick
from cmpolicy_envs.pusht import SUCCESS_COVERAGE, PushTEnv
from cmpolicy_eval.video import Moment, annotate

_TRAIL = 8
"""Sent actions that stay visible in the video."""


@dataclass(frozen=True)
class Recording:
    """The ticks of a run with :class:`~cmpolicy_envs.simulated_robot.SimulatedPushT`."""

    seed: int
    hz: float
    ticks: Sequence[Tick]

    def column(self, key: str) -> NDArray[np.float64]:
        """An entry of the observations, over the ticks."""
        return np.array([tick.observation[key] for tick in self.ticks], dtype=np.float64)

    def actions(self) -> NDArray[np.float64]:
        """(n, 2) what was sent; NaN where nothing was."""
        nothing = np.full(2, np.nan)
        return np.array([nothing if t.action is None else t.action for t in self.ticks])


def write_video(path: Path, recording: Recording) -> Path:
    """An mp4 in real time: the plan red, the last actions sent grey."""
    env = PushTEnv(render_mode="rgb_array")
    sent = recording.actions()
    path.parent.mkdir(parents=True, exist_ok=True)
    writer: Any = imageio.get_writer(
        path,
        fps=recording.hz,
        codec="libx264",
        quality=7,
        pixelformat="yuv420p",
        macro_block_size=16,
    )
    with closing(env), closing(writer):
        for index, tick in enumerate(recording.ticks):
            env.set_pose(tick.observation["state"])
            trail = sent[max(0, index - _TRAIL) : index]
            trail = trail[np.isfinite(trail).all(axis=1)]
            coverage = tick.observation["coverage"]
            moment = Moment(
                image=np.asarray(env.render(), dtype=np.uint8),
                step=tick.index,
                coverage=coverage,
                success=coverage > SUCCESS_COVERAGE,
                plan=env.action_pixels(np.concatenate([trail, tick.plan])),
                n_executed=len(trail),
            )
            writer.append_data(annotate(moment, recording.seed))
    return path


def write_plot(path: Path, recording: Recording, title: str) -> Path:
    """Targets against the agent's way, ticks without a new action, and how late ticks began."""
    figure = Figure(figsize=(10.0, 6.0), layout="constrained")
    FigureCanvasAgg(figure)
    above, below = figure.subplots(2, 1, sharex=True, height_ratios=(3, 1))
    seconds = np.array([tick.index for tick in recording.ticks]) / recording.hz
    sent, agent = recording.actions(), recording.column("agent_pos")
    for axis, (name, colour) in enumerate((("x", "#0072B2"), ("y", "#D55E00"))):
        above.plot(seconds, agent[:, axis], color=colour, linewidth=1.2, label=f"agent {name}")
        above.step(
            seconds,
            sent[:, axis],
            where="post",
            color=colour,
            linewidth=1,
            alpha=0.5,
            label=f"target {name}",
        )
    for source, colour in ((WAITED, "#56B4E9"), (HELD, "#CC79A7")):
        at = [s for s, tick in zip(seconds, recording.ticks, strict=True) if tick.source == source]
        for index, start in enumerate(at):
            label = f"{source}, no new action" if index == 0 else None
            above.axvspan(start, start + 1 / recording.hz, color=colour, alpha=0.4, label=label)
    above.set_ylabel("px")
    above.legend(fontsize=8, ncols=3, frameon=False, loc="upper right")
    late = np.array([tick.late for tick in recording.ticks]) * 1e3
    below.plot(seconds, late, ".", color="#000000", markersize=3)
    below.set_ylabel("tick late, ms")
    below.set_xlabel("time, s")
    for axes in (above, below):
        _plain(axes)
    figure.suptitle(title, fontsize=11)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
    return path


def _plain(axes: Axes) -> None:
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
