"""Push-T with inference delay injected in simulated time: synchronous against asynchronous."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from cmpolicy.bench.delayed import BATCH_SIZE, delayed_rollout
from cmpolicy.bench.report import Report
from cmpolicy.policy.policy import ConsistencyPolicy
from cmpolicy.robot.schedule import Asynchronous, Schedule, Synchronous
from cmpolicy.schema import ConfigError, at_least, each_once
from cmpolicy.training.device import choose_device, describe_device
from cmpolicy_envs.realtime_pusht import PHYSICS_HZ
from cmpolicy_eval.evaluate import git_commit, versions
from cmpolicy_eval.protocol import get_protocol
from cmpolicy_eval.result import Origin, Result
from cmpolicy_eval.seeds import format_seeds, parse_seeds

Mode = Literal["sync", "async"]

_PROTOCOL = "pusht-dp"
_SCHEDULES: dict[str, Schedule] = {"sync": Synchronous(), "async": Asynchronous()}
# Of Okabe and Ito's colours, as in evaluation reports.
_STYLES = {
    "sync": {"color": "#D55E00", "marker": "s", "label": "synchronous"},
    "async": {"color": "#0072B2", "marker": "o", "label": "asynchronous"},
}


@dataclass(frozen=True, kw_only=True)
class DelaySettings:
    """Of ``delay``.

    Args:
        policy: bundle directory, bundled name or hub id.
        delays_ms: from an observation to its plan, in steps of 10 ms.
        modes: schedules of the control loop, with their default settings.
        seeds: of the episodes, as for ``cmpolicy eval``.
        nfe: network evaluations per plan; null: the policy's own.
        workers: simulator processes.
        device: where the policy runs.
        out: JSON file; the plot lies beside it, the results of every row in a folder of its name.
    """

    policy: str
    delays_ms: tuple[int, ...] = (0, 50, 100, 150, 200, 300)
    modes: tuple[Mode, ...] = ("sync", "async")
    seeds: Any = "500000-500099"
    nfe: int | None = None
    workers: int = 2
    device: str = "cpu"
    out: str = "outputs/bench/delay.json"

    def __post_init__(self) -> None:
        at_least("nfe", self.nfe, 1)
        step = 1000 // PHYSICS_HZ
        for delay in self.delays_ms:
            if delay < 0 or delay % step:
                raise ConfigError(
                    f"delays_ms: {delay} must be at least 0 and a multiple of {step}, the physics "
                    "step of Push-T"
                )
        each_once("delays_ms", self.delays_ms)
        each_once("modes", self.modes)
        at_least("workers", self.workers, 1)


@dataclass(frozen=True)
class _Row:
    mode: str
    delay_ms: int
    result: Result
    held_share: float


def measure_delay(settings: DelaySettings, command: str) -> Report:
    """One row per mode and delay; writes the plot and the result files, too.

    Raises:
        BundleError: the policy cannot be loaded.
        ConfigError: no such device.
        ValueError: seeds that cannot be read, or a policy that is not one of Push-T.
    """
    seeds = parse_seeds(settings.seeds)
    protocol = get_protocol(_PROTOCOL)
    device = choose_device(settings.device)
    policy = ConsistencyPolicy.from_pretrained(settings.policy, device=device)
    policy.nfe = settings.nfe or policy.nfe
    where = describe_device(device)
    origin = Origin(where, versions(), policy.metadata.get("data"), command, git_commit())
    out = Path(settings.out)
    rows = []
    for mode in settings.modes:
        for delay_ms in sorted(settings.delays_ms):
            played = delayed_rollout(
                policy,
                protocol,
                seeds,
                schedule=_SCHEDULES[mode],
                delay_ms=delay_ms,
                n_workers=settings.workers,
                progress=f"{mode} {delay_ms} ms",
            )
            result = Result.from_episodes(
                played.episodes,
                protocol=_PROTOCOL,
                policy=f"{settings.policy} [{mode}, {delay_ms} ms delay]",
                nfe=policy.nfe,
                batch_size=BATCH_SIZE,
                origin=origin,
            )
            result.save(out.with_suffix("") / f"{mode}_{delay_ms}ms.json")
            rows.append(_Row(mode, delay_ms, result, played.held_share))
    figure = write_plot(rows, out.with_suffix(".png"), f"{settings.policy}, {len(seeds)} episodes")
    return _report(rows, settings, seeds, where, figure)


def _report(
    rows: Sequence[_Row], settings: DelaySettings, seeds: Sequence[int], where: str, figure: Path
) -> Report:
    whole = _undelayed(rows)
    summary: dict[str, float] = {}
    lines = []
    for row in rows:
        score, success = row.result.score_mean, row.result.success_rate
        summary[f"score_{row.mode}_{row.delay_ms}ms"] = score
        summary[f"success_{row.mode}_{row.delay_ms}ms"] = success
        kept = "-"
        if whole:
            summary[f"kept_{row.mode}_{row.delay_ms}ms"] = score / whole
            kept = f"{100 * score / whole:.1f} %"
        low, high = row.result.score_ci95
        s_low, s_high = row.result.success_ci95
        lines.append(
            (
                row.mode,
                row.delay_ms,
                f"{score:.3f} [{low:.3f}, {high:.3f}]",
                f"{success:.2f} [{s_low:.2f}, {s_high:.2f}]",
                kept,
                f"{100 * row.held_share:.1f} %",
            )
        )
    return Report(
        benchmark="delay",
        title=f"{_PROTOCOL} of {settings.policy} at injected inference delay, {len(seeds)} "
        f"episodes (seeds {format_seeds(seeds)})\n  on {where}",
        columns=("loop", "delay ms", "score", "success", "of undelayed score", "ticks held"),
        rows=tuple(lines),
        summary=summary,
        closing=(f"plot: {figure}",),
        settings=asdict(settings),
        device=where,
    )


def _undelayed(rows: Sequence[_Row]) -> float | None:
    """The score that delays are compared with: of a policy whose answer is there at once."""
    scores = {row.mode: row.result.score_mean for row in rows if row.delay_ms == 0}
    return scores.get("sync", scores.get("async"))


def write_plot(rows: Sequence[_Row], path: Path, title: str) -> Path:
    """Score and success over delay, one line per mode, with 95 % intervals."""
    figure = Figure(figsize=(9.0, 3.8), layout="constrained")
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2)
    modes = list(dict.fromkeys(row.mode for row in rows))
    for index, mode in enumerate(modes):
        mine = [row for row in rows if row.mode == mode]
        # A little to the side, so that the intervals at one delay do not cover each other.
        x = [row.delay_ms + 3 * (2 * index - len(modes) + 1) for row in mine]
        for axes, name in ((left, "score"), (right, "success")):
            means, intervals = _points(mine, name)
            below = [mean - low for mean, (low, _) in zip(means, intervals, strict=True)]
            above = [high - mean for mean, (_, high) in zip(means, intervals, strict=True)]
            axes.errorbar(x, means, yerr=(below, above), capsize=3, **_STYLES[mode])
    whole = _undelayed(rows)
    if whole is not None:
        left.axhline(0.9 * whole, color="#666666", linestyle="--", linewidth=1)
        left.annotate(
            "90 % of the undelayed score",
            (max(row.delay_ms for row in rows), 0.9 * whole),
            xytext=(0, 4),
            textcoords="offset points",
            ha="right",
            fontsize=8,
            color="#666666",
        )
    for axes, label in ((left, "score"), (right, "success rate")):
        axes.set_xticks(sorted({row.delay_ms for row in rows}))
        axes.set_xlabel("inference delay, ms (one tick: 100 ms)")
        axes.set_ylabel(f"{label} (95 % interval)")
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
    right.set_ylim(-0.02, 1.02)
    figure.suptitle(f"Push-T at 10 Hz, {title}", fontsize=11)
    right.legend(frameon=False, fontsize=9, loc="lower left")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)
    return path


def _points(rows: Sequence[_Row], name: str) -> tuple[list[float], list[tuple[float, float]]]:
    if name == "score":
        return [r.result.score_mean for r in rows], [r.result.score_ci95 for r in rows]
    return [r.result.success_rate for r in rows], [r.result.success_ci95 for r in rows]
