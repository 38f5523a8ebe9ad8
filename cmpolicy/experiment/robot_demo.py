"""Push-T as a robot in a process of its own, driven in real time and filmed."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from cmpolicy.schema import ConfigError, at_least, positive
from cmpolicy.spec import check_warm_start

if TYPE_CHECKING:
    from cmpolicy.experiment.robot_film import Recording
    from cmpolicy.robot.policy import ChunkPolicy
    from cmpolicy.robot.report import LoopReport
    from cmpolicy.spec import PolicySpec


@dataclass(frozen=True, kw_only=True)
class RobotDemoSettings:
    """Of the robot demo.

    Args:
        policy: bundle directory, bundled name or hub id.
        seed: of the initial state (protocol pusht-dp) and of the policy's noise.
        seconds: of the run; it ends when the block is on its goal.
        mode: async or sync: schedule of the loop.
        delay_ms: added to every inference, to play a slower computer.
        nfe: network evaluations per plan; null: the policy's own.
        warm_start: time in (0, 1] at which plans after the first start from the one before; null:
            the policy's own, if it has one.
        threads: of torch on the CPU.
        out: folder of the video and the plot.
    """

    policy: str = "pusht"
    seed: int = 100_003
    seconds: float = 30.0
    mode: Literal["sync", "async"] = "async"
    delay_ms: float = 0.0
    nfe: int | None = None
    warm_start: float | None = None
    threads: int = 1
    out: str = "outputs/robot-demo"

    def __post_init__(self) -> None:
        if not 0 <= self.seed < 2**32:
            raise ConfigError(f"seed={self.seed} must be in [0, 2**32)")
        positive("seconds", self.seconds)
        at_least("delay_ms", self.delay_ms, 0)
        check_warm_start(self.warm_start)
        for name in ("nfe", "threads"):
            at_least(name, getattr(self, name), 1)


class SlowPolicy:
    """A policy whose answers take ``seconds`` longer."""

    def __init__(self, policy: ChunkPolicy, seconds: float) -> None:
        self._policy = policy
        self._seconds = seconds

    @property
    def spec(self) -> PolicySpec:
        return self._policy.spec

    @property
    def n_obs_steps(self) -> int:
        return self._policy.n_obs_steps

    @property
    def n_action_steps(self) -> int:
        return self._policy.n_action_steps

    @property
    def warm_start(self) -> float | None:
        return getattr(self._policy, "warm_start", None)

    def infer(self, obs: Mapping[str, Any], noise: Any = None, **others: Any) -> Any:
        """The policy's, later."""
        time.sleep(self._seconds)
        return self._policy.infer(obs, noise, **others)

    def infer_plan(self, obs: Mapping[str, Any], noise: Any = None, **others: Any) -> Any:
        """The policy's, later."""
        time.sleep(self._seconds)
        return self._policy.infer_plan(obs, noise, **others)


def drive(settings: RobotDemoSettings) -> int:
    """Drive the simulated robot; 0, or 130 where a signal ended the run.

    Raises:
        ConnectionError: the robot's process failed. ValueError, OSError: settings or files.
    """
    # what is slow to import comes after the settings were found to be right
    import torch

    from cmpolicy.experiment.robot_film import Recording, write_plot, write_video
    from cmpolicy.policy.policy import ConsistencyPolicy
    from cmpolicy.robot.episode import Tick, Timestamps
    from cmpolicy.robot.loop import ControlLoop
    from cmpolicy.robot.safety import SafetyLimits
    from cmpolicy.robot.schedule import Asynchronous, Schedule, Synchronous
    from cmpolicy_envs.pusht import ARENA, SUCCESS_COVERAGE
    from cmpolicy_envs.simulated_robot import SimulatedPushT
    from cmpolicy_eval.policy import check_policy_fits
    from cmpolicy_eval.protocol import get_protocol

    policy = ConsistencyPolicy.from_pretrained(settings.policy)
    policy.nfe = settings.nfe or policy.nfe
    if settings.warm_start is not None:
        policy.warm_start = settings.warm_start
    env = get_protocol("pusht-dp").make_env()
    check_policy_fits(policy, env.observation_space, env.action_space)
    env.close()
    torch.set_num_threads(settings.threads)
    robot = SimulatedPushT(settings.seed)
    schedule: Schedule = Asynchronous() if settings.mode == "async" else Synchronous()
    driver: ChunkPolicy = policy
    if settings.delay_ms:
        driver = SlowPolicy(policy, settings.delay_ms / 1e3)
    ticks: list[Tick] = []

    def record(tick: Tick) -> None:
        ticks.append(tick)
        if tick.observation["coverage"] > SUCCESS_COVERAGE:
            loop.stop("the block is on its goal")

    loop = ControlLoop(
        driver,
        robot,
        hz=robot.hz,
        schedule=schedule,
        # A target jumps by less than 100 px a tick in every demonstration.
        safety=SafetyLimits(low=0.0, high=ARENA, max_rate=1000.0),
        timestamps=Timestamps("timestamp"),
        seed=settings.seed,
        on_tick=record,
    )
    try:
        with loop:
            loop.run(seconds=settings.seconds, start=robot.start)
    finally:  # also of a robot that failed, or could not be disconnected
        recording = Recording(settings.seed, robot.hz, ticks)
        if loop.report is not None:
            print(_summary(settings, recording, loop.report))
    if ticks:
        out = Path(settings.out).expanduser()
        title = f"Push-T in real time, {settings.mode}, {settings.delay_ms:g} ms added delay"
        files = {
            write_video(out / "run.mp4", recording): "the run; planned actions red, sent grey",
            write_plot(out / "ticks.png", recording, title): "targets, the agent, late ticks",
        }
        print("\n" + "\n".join(f"  {path!s:<32} {what}" for path, what in files.items()))
    return 130 if loop.report is not None and loop.report.stopped_by.startswith("SIG") else 0


def _summary(settings: RobotDemoSettings, recording: Recording, report: LoopReport) -> str:
    best = max((tick.observation["coverage"] for tick in recording.ticks), default=0.0)
    slower = f", {settings.delay_ms:g} ms added to every inference" if settings.delay_ms else ""
    return "\n".join(
        [
            f"Push-T in real time, seed {settings.seed}, policy {settings.policy}{slower}",
            "",
            str(report),
            f"{'best coverage':<15}{best:.3f}",
        ]
    )
