"""The control loop on this machine: missed ticks, jitter, and memory over time."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

import numpy as np
import psutil
import torch
from numpy.typing import NDArray

from cmpolicy.bench.report import Report
from cmpolicy.export.runtime import is_exported, open_exported
from cmpolicy.policy.policy import ConsistencyPolicy
from cmpolicy.robot.episode import Tick
from cmpolicy.robot.loop import ControlLoop
from cmpolicy.robot.policy import ChunkPolicy
from cmpolicy.robot.schedule import Asynchronous, Schedule, Synchronous
from cmpolicy.schema import ConfigError, at_least, positive
from cmpolicy.training.device import choose_device, describe_device

_FRAMES = 4  # of every camera, in turn
_SETTLED = 5
"""Seconds after which memory is compared: until then libraries fill their caches."""


@dataclass(frozen=True, kw_only=True)
class LoopSettings:
    """Of ``loop``.

    Args:
        policy: bundle directory, bundled name, hub id, or an exported .onnx or .pt2.
        hz: ticks per second.
        seconds: of the run.
        mode: schedule of the loop, with its default settings.
        nfe: network evaluations per plan; null: the policy's own.
        frames: [height, width] of the frames that the cameras deliver; null: as the policy sees
            them. Other sizes are resized in the loop.
        threads: of torch on the CPU.
        device: where the policy runs.
        out: JSON file.
    """

    policy: str
    hz: float = 100.0
    seconds: float = 60.0
    mode: Literal["sync", "async"] = "async"
    nfe: int | None = None
    frames: tuple[int, int] | None = None
    threads: int = 1
    device: str = "cpu"
    out: str = "outputs/bench/loop.json"

    def __post_init__(self) -> None:
        at_least("nfe", self.nfe, 1)
        for name in ("hz", "seconds"):
            positive(name, getattr(self, name))
        at_least("threads", self.threads, 1)
        if self.frames is not None and not (len(self.frames) == 2 and min(self.frames) >= 1):
            raise ConfigError(f"frames={list(self.frames)} must be [height, width] in pixels")


class StillRobot:
    """A robot that costs nothing: the same numbers every time, actions go nowhere.

    Its cameras hand over a new array of noise each time, of a few that take turns.
    """

    def __init__(self, observation: Mapping[str, NDArray[Any]]) -> None:
        rng = np.random.default_rng(0)
        self._observation = observation
        self._frames = {
            key: rng.integers(0, 256, (_FRAMES, *value.shape), dtype=np.uint8)
            for key, value in observation.items()
            if value.dtype == np.uint8
        }
        self._count = 0

    def connect(self) -> None:
        """Nothing to connect."""

    def get_observation(self) -> Mapping[str, NDArray[Any]]:
        self._count = (self._count + 1) % _FRAMES
        frames = {key: frames[self._count].copy() for key, frames in self._frames.items()}
        return {**self._observation, **frames}

    def send_action(self, action: NDArray[Any]) -> None:
        """Ignore the action."""

    def disconnect(self) -> None:
        """Nothing to disconnect."""


class MemoryLog:
    """Resident memory of this process, MiB, once a second; of fixed size."""

    def __init__(self, hz: float, seconds: float) -> None:
        self._every = max(1, round(hz))
        self._mib = np.zeros(int(hz * seconds) // self._every + 1)
        self._count = 0
        self._process = psutil.Process()

    def __call__(self, tick: Tick) -> None:
        """Take a measurement if a second has passed."""
        index = tick.index // self._every
        if index >= self._count and self._count < len(self._mib):
            self._mib[self._count] = self._process.memory_info().rss / 2**20
            self._count += 1

    @property
    def mib(self) -> NDArray[np.float64]:
        """(n,) so far."""
        return self._mib[: self._count]

    def growth(self) -> float:
        """Last minus first, MiB, leaving out the seconds in which libraries fill their caches."""
        settled = self.mib[min(_SETTLED, self._count - 1) :]
        return float(settled[-1] - settled[0])


def _open(settings: LoopSettings, device: torch.device) -> ChunkPolicy:
    """The policy, at any rate: the robot stands still."""
    if is_exported(settings.policy):
        exported = open_exported(settings.policy, settings.threads)
        if settings.nfe not in (None, exported.facts.nfe) or device.type != "cpu":
            raise ConfigError(
                f"{settings.policy} makes {exported.facts.nfe} evaluation(s) on the CPU, got "
                f"nfe={settings.nfe} and device={settings.device}"
            )
        if settings.frames is not None:
            raise ConfigError(f"frames={list(settings.frames)} needs a policy that is not exported")
        exported.facts = replace(exported.facts, control_hz=None)
        return exported
    policy = ConsistencyPolicy.from_pretrained(settings.policy, device=device)
    policy.nfe = settings.nfe or policy.nfe
    policy.control_hz = None
    if settings.frames is not None:
        if not policy.spec.images:
            raise ConfigError(
                f"frames={list(settings.frames)}, but {settings.policy} has no cameras: "
                f"{sorted(policy.spec.obs)}"
            )
        policy.spec = replace(policy.spec, resize=True)
    return policy


def measure_loop(settings: LoopSettings) -> Report:
    """Run the loop with a robot that costs nothing.

    Raises:
        BundleError: the policy cannot be loaded.
        ConfigError: no such device.
    """
    device = choose_device(settings.device)
    policy = _open(settings, device)
    schedule: Schedule = Asynchronous() if settings.mode == "async" else Synchronous()
    observation = {k: v[0, 0] for k, v in policy.spec.zeros().items()}
    if settings.frames is not None:
        frame = np.zeros((*settings.frames, 3), np.uint8)
        observation |= dict.fromkeys(policy.spec.images, frame)
    robot = StillRobot(observation)
    memory = MemoryLog(settings.hz, settings.seconds)
    before = torch.get_num_threads()
    torch.set_num_threads(settings.threads)
    try:
        where = describe_device(device)
        with ControlLoop(
            policy, robot, settings.hz, schedule=schedule, seed=0, on_tick=memory
        ) as loop:
            run = loop.run(seconds=settings.seconds)
    finally:
        torch.set_num_threads(before)
    growth = memory.growth()
    return Report(
        benchmark="loop",
        title=f"control loop with {settings.policy}: {settings.mode}, {settings.hz:g} Hz\n"
        f"  on {where}",
        columns=(
            "seconds",
            "ticks",
            "missed",
            "jitter p50 ms",
            "p99 ms",
            "max ms",
            "inference p50 ms",
            "inference p99 ms",
            "MiB",
            "MiB grown",
        ),
        rows=(
            (
                run.seconds,
                run.ticks,
                run.missed,
                run.jitter.p50,
                run.jitter.p99,
                run.jitter.max,
                run.latency.p50,
                run.latency.p99,
                float(memory.mib[-1]),
                growth,
            ),
        ),
        summary={
            "missed_share": run.missed_share,
            "jitter_p99_ms": run.jitter.p99,
            "held": run.held,
            "rss_growth_mib": growth,
        },
        closing=(
            f"{100 * run.missed_share:.3f} % of the ticks missed, jitter p99 {run.jitter.p99:.3f} "
            f"ms, memory grew by {growth:.2f} MiB after the first {_SETTLED} s",
            f"stopped by: {run.stopped_by}",
        ),
        settings=asdict(settings)
        | {"report": run.to_dict(), "rss_mib": [round(float(m), 3) for m in memory.mib]},
        device=where,
    )
