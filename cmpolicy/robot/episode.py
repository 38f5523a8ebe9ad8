"""One episode of a control loop: tick by tick, from the first observation to why it ended."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cmpolicy.observation import (
    NonFiniteActionError,
    NonFiniteObservationError,
    ObservationError,
)
from cmpolicy.robot import safety as kinds
from cmpolicy.robot.history import ObservationHistory
from cmpolicy.robot.metronome import Metronome, clock
from cmpolicy.robot.report import COMPLETED, Histogram, LoopReport
from cmpolicy.robot.robot import Robot
from cmpolicy.robot.safety import SafetyFilter, SafetyLimits
from cmpolicy.robot.schedule import Planner
from cmpolicy.robot.watchdog import Watchdog
from cmpolicy.robot.worker import UNAVAILABLE, InferenceResult, NoiseSource, Worker

Array = NDArray[Any]

_log = logging.getLogger(__name__)

_WARM_UP = 3
"""Inferences before the first tick: they load what a library loads late, and measure latency."""

_WRONG_CLOCK = 3600.0
"""Seconds between an observation's timestamp and now, from which on the clocks must differ."""

_AHEAD = 0.1
"""Seconds that the clock of a robot's own computer may be ahead."""

PLANNED = "planned"
WAITED = "waited"
HELD = "held"


@dataclass(frozen=True, slots=True)
class Tick:
    """What one tick did, for ``on_tick``.

    Attributes:
        index: its number; it was due ``index / hz`` seconds after the first.
        late: seconds that it began after its deadline.
        observation: as the robot gave it.
        action: (A,) as sent; None if nothing was sent.
        source: ``planned``, ``waited`` (no first plan yet) or ``held`` (no usable action).
        plan: (n, A) what is planned from this tick on, before limits; a copy.
    """

    index: int
    late: float
    observation: Mapping[str, Any]
    action: Array | None
    source: str
    plan: Array


@dataclass(frozen=True)
class Timestamps:
    """Where observations say how old they are: ``obs[key]`` in seconds of ``clock``."""

    key: str
    clock: Callable[[], float] = time.monotonic


class Episode:
    """State of one run; everything that grows is of fixed size.

    Args:
        robot: connected.
        watchdog: that every call of robot, policy and ``on_tick`` goes through.
        planner: new.
        worker: neither started nor closed here.
        noise: that ``worker`` draws from.
        history: of the policy's observations.
        limits: of the safety layer.
        safety: the same limits at work, new.
        hz: ticks per second.
        stopped: why the run is to end, or None.
        timestamps: of the observations; None takes the time before ``get_observation``.
        on_tick: called at the end of every tick.
    """

    def __init__(
        self,
        robot: Robot,
        *,
        watchdog: Watchdog,
        planner: Planner,
        worker: Worker,
        noise: NoiseSource,
        history: ObservationHistory,
        limits: SafetyLimits,
        safety: SafetyFilter,
        hz: float,
        stopped: Callable[[], str | None],
        timestamps: Timestamps | None,
        on_tick: Callable[[Tick], None] | None,
    ) -> None:
        self.safety = safety
        self.stopped_by = COMPLETED
        self._robot = robot
        self._call = watchdog.call
        self._planner = planner
        self._worker = worker
        self._noise = noise
        self._history = history
        self._limits = limits
        self._hz = hz
        self._stopped = stopped
        self._timestamps = timestamps
        self._on_tick = on_tick
        self._metronome = Metronome(hz)
        self._jitter, self._latency = Histogram(), Histogram()
        self._observed_at = -math.inf  # of the newest good observation, on the loop's clock
        self._begun = 0  # tick of the observation of the inference under way
        self._patience = 0  # ticks that may pass before the first plan
        self._ticks = self._missed = self._plans = self._waited = self._held = self._misses = 0
        self._seconds = 0.0

    def play(self, n_ticks: int) -> None:
        """Run ``n_ticks`` ticks, unless something ends them before.

        Raises:
            Exception: whatever the robot, the policy or ``on_tick`` raises.
        """
        if not self._warm_up():
            return
        metronome = self._metronome
        metronome.start()
        tick = 0
        try:
            while tick < n_ticks:
                if not metronome.wait(tick, self._is_stopped):
                    break
                self._tick(tick)
                elapsed = metronome.elapsed(clock())
                following = min(n_ticks, self._planner.next_tick(tick, elapsed))
                # This one if its action came too late to stand, and those that were skipped.
                self._missed += (elapsed >= tick + 1) + following - tick - 1
                tick = following
                if self.stopped_by != COMPLETED:
                    break
            if tick == n_ticks and self.stopped_by == COMPLETED:
                metronome.wait(tick, self._is_stopped)  # the last action stands for a tick, too
        finally:
            self._ticks = tick
            self._seconds = metronome.elapsed(clock()) / self._hz

    def report(self, schedule: str) -> LoopReport:
        """Of the ticks until now."""
        return LoopReport(
            hz=self._hz,
            schedule=schedule,
            ticks=self._ticks,
            missed=self._missed,
            seconds=self._seconds,
            jitter=self._jitter.quantiles(),
            latency=self._latency.quantiles(),
            plans=self._plans,
            stale_actions=self._planner.stale,
            seams=self._planner.seams,
            waited=self._waited,
            held=self._held,
            interventions=dict(self.safety.counts),
            stopped_by=self.stopped_by,
        )

    # -- before the first tick --------------------------------------------------------------------

    def _warm_up(self) -> bool:
        """Run the policy on the first observation, without moving; False if stopped meanwhile."""
        self._history.reset()
        self._history.push(self._call("get_observation", self._robot.get_observation))
        running: tuple[Array, int] | None = None
        for call in range(_WARM_UP):
            self._call("policy", self._worker.submit, self._history.obs, running)
            outcome = self._worker.poll()
            while outcome is None:
                if self._is_stopped():
                    return False
                time.sleep(0.001)
                outcome = self._worker.poll()
            if outcome.error is not None:
                raise outcome.error
            running = None if outcome.plan is None else (outcome.plan, 0)
            if call > 0:  # the first is not like the others
                self._planner.measured(outcome.seconds * self._hz)
        self._patience = self._planner.lead + 1
        self._history.reset()
        self._noise.reset()  # plan k has the seed's k-th noise, however many calls warmed up
        return not self._is_stopped()

    # -- one tick ---------------------------------------------------------------------------------

    def _tick(self, tick: int) -> None:
        begin = clock()
        late = self._metronome.lateness(tick, begin)
        self._jitter.add(late)
        observation, is_new = self._observe()
        fresh = clock() - self._observed_at <= self._limits.max_observation_age
        self._collect(tick)
        if is_new and fresh and self._planner.due(tick):
            running = self._planner.running(tick)
            self._planner.begin(tick)
            self._begun = tick
            self._call("policy", self._worker.submit, self._history.obs, running)
            self._collect(tick)  # there already, if the loop is one that waits
        plan = None if self._on_tick is None else self._planner.upcoming(tick).copy()
        action, source = self._act(tick, fresh)
        if action is not None:
            self._call("send_action", self._robot.send_action, action)
        if self._on_tick is not None and plan is not None:
            sent = None if action is None else action.copy()
            done = Tick(tick, late, observation, sent, source, plan)
            self._call("on_tick", self._on_tick, done)

    def _observe(self) -> tuple[Mapping[str, Any], bool]:
        """The robot's observation, and whether it went into the history."""
        now = clock()
        observation = self._call("get_observation", self._robot.get_observation)
        try:
            self._history.push(observation)
        except NonFiniteObservationError as error:
            self.safety.count(kinds.NON_FINITE_OBSERVATION)
            _log.warning("%s; the last good one has to do", error)
            return observation, False
        self._look_at_cameras()
        stamps = self._timestamps
        self._observed_at = now if stamps is None else clock() - self._age(observation, stamps)
        return observation, True

    def _look_at_cameras(self) -> None:
        """Count frames that are those of the tick before, and end the run if there are too many."""
        for key, ticks in self._history.frozen.items():
            if ticks:
                self.safety.count(kinds.FROZEN_CAMERA)
            if self._limits.max_frozen is not None and ticks > self._limits.max_frozen:
                self.stopped_by = (
                    f"camera {key!r} has brought the same frame for {ticks} ticks "
                    f"(max_frozen={self._limits.max_frozen})"
                )

    def _age(self, observation: Mapping[str, Any], stamps: Timestamps) -> float:
        """Seconds since the observation was made, by its own account."""
        key = stamps.key
        try:
            age = stamps.clock() - float(observation[key])
        except KeyError:
            raise ObservationError(
                f"the observation has no timestamp {key!r}; the robot gave "
                f"{sorted(map(str, observation))}"
            ) from None
        except (TypeError, ValueError) as error:
            raise ObservationError(f"the timestamp {key!r} is no number: {error}") from error
        if not -_AHEAD <= age <= _WRONG_CLOCK:
            raise ObservationError(
                f"the timestamp {key!r} = {observation[key]!r} is {age:.3f} s old: the robot's "
                "clock is not the one given. Name it: Timestamps(key, clock=time.time), or "
                "time.monotonic, time.perf_counter"
            )
        return age

    def _collect(self, tick: int) -> None:
        """Take in the plan that has arrived, if there is one."""
        outcome = self._worker.poll()
        if outcome is None:
            return
        self._latency.add(outcome.seconds)
        if outcome.plan is None:
            self._failed(outcome)
        elif not np.isfinite(outcome.plan).all():
            # As a whole: blended into the old plan it would spoil good actions.
            self._refuse_plan()
        else:
            self._plans += 1
            self._planner.measured(self._metronome.elapsed(outcome.finished) - self._begun)
            self._planner.arrive(tick, outcome.plan)

    def _refuse_plan(self) -> None:
        self.safety.count(kinds.NON_FINITE_ACTION)
        _log.warning("the policy gave a plan with NaN or infinite numbers; it is refused")
        self._planner.fail()

    def _failed(self, outcome: InferenceResult) -> None:
        error = outcome.error
        if isinstance(error, NonFiniteActionError):
            self._refuse_plan()
            return
        if not isinstance(error, UNAVAILABLE):
            raise error if error is not None else RuntimeError("an inference without outcome")
        self.safety.count(kinds.POLICY_UNAVAILABLE)
        _log.warning("no plan, the policy is unavailable: %s", error)
        self._planner.fail()

    def _act(self, tick: int, fresh: bool) -> tuple[Array | None, str]:
        """A safe action (A,), None if none is to be sent, and where it comes from."""
        if self._is_stopped():  # perhaps by the watchdog, which has brought the robot to rest
            return None, HELD
        if not fresh:
            return self._hold(kinds.STALE_OBSERVATION)
        planned = self._planner.choose(tick)
        if planned is None:
            if self._plans == 0:
                return self._wait(tick)
            return self._hold(kinds.NO_PLAN)
        action = self.safety.apply(planned)
        if action is None:
            return self._hold(kinds.NON_FINITE_ACTION, counted=True)
        self._misses = 0
        return action, PLANNED

    def _wait(self, tick: int) -> tuple[Array | None, str]:
        """Before the first plan."""
        self._waited += 1
        if tick >= self._patience:
            self._miss("no first plan")
        return self._rest(), WAITED

    def _hold(self, kind: str, *, counted: bool = False) -> tuple[Array | None, str]:
        if not counted:
            self.safety.count(kind)
        self._held += 1
        self._miss(kind)
        return self._rest(), HELD

    def _miss(self, kind: str) -> None:
        self._misses += 1
        if self._misses > self._limits.max_misses:
            self.stopped_by = (
                f"{self._misses} ticks in a row without a usable action (last: {kind}; "
                f"max_misses={self._limits.max_misses})"
            )

    def _rest(self) -> Array | None:
        action = self.safety.hold
        self.safety.rested()
        return action

    def _is_stopped(self) -> bool:
        reason = self._stopped()
        if reason is None:
            return False
        self.stopped_by = reason
        return True
