"""ControlLoop: drives a robot with a policy at a fixed rate, and leaves it stopped."""

from __future__ import annotations

import logging
import math
import threading
from collections.abc import Callable
from typing import Any

from cmpolicy.robot.episode import Episode, Tick, Timestamps
from cmpolicy.robot.history import ObservationHistory
from cmpolicy.robot.metronome import clock
from cmpolicy.robot.policy import ChunkPolicy, plan_window
from cmpolicy.robot.report import LoopReport
from cmpolicy.robot.robot import Robot, RobotError, RobotLock, check_rates, check_robot, rate_of
from cmpolicy.robot.safety import PerDimension, SafetyFilter, SafetyLimits
from cmpolicy.robot.schedule import Asynchronous, Schedule, Synchronous
from cmpolicy.robot.watchdog import SignalGuard, Watchdog, raise_for
from cmpolicy.robot.worker import InlineWorker, NoiseSource, ThreadedWorker, Worker

_log = logging.getLogger(__name__)

_PATIENCE = 2.0
"""Seconds that the end of a run waits for an inference under way, and leaving for such a run."""

_SLICE = 0.05
"""Seconds between two looks whether a second signal wants no more waiting."""

_WORDS = {
    "stop": "stop the robot",
    "send_action": "send the last action",
    "disconnect": "disconnect the robot",
}


class ControlLoop:
    """Observes, infers and acts ``hz`` times a second::

        with ControlLoop(policy, robot) as loop:
            report = loop.run(seconds=60)
        print(report)

    Entering connects the robot; leaving stops and disconnects it, whatever happened. Every
    :meth:`run` is an episode of its own: it begins with an empty history and the seed's noise, and
    ends with the robot at rest: by ``robot.stop()`` if it has that, else by ``safety.rest``, else
    by the last safe action once more.

    Ctrl-C and SIGTERM end a run after the present tick. From then until the robot is at rest and
    disconnected, further signals are held: they interrupt a call of the robot or the policy and
    skip waiting, but never the calls that stop and disconnect. A loop that was ended so does not
    run again. Calls that do not return are interrupted: see :mod:`cmpolicy.robot.watchdog`.

    Args:
        policy: a ConsistencyPolicy, OnnxPolicy, RemotePolicy or another
            :class:`~cmpolicy.robot.policy.ChunkPolicy`.
        robot: see :class:`~cmpolicy.robot.robot.Robot`; for LeRobot's dictionaries of floats there
            is :class:`~cmpolicy.robot.adapter.LeRobotAdapter`.
        hz: actions per second; None takes the rate of the demonstrations, which the policy knows.
        schedule: ``Asynchronous(...)``, the default, or ``Synchronous()``: see
            :mod:`cmpolicy.robot.schedule`.
        safety: limits on the actions, and what to do without one; give at least ``low`` and
            ``high``, and ``rest`` if actions are velocities or other relative commands.
        seed: of the policy's noise; None takes a new one for every run.
        timestamps: the observations' own, for the watchdog; None takes the time when
            ``get_observation`` was called.
        on_tick: is called with a :class:`~cmpolicy.robot.episode.Tick` at the end of every tick, to
            record or to watch; the loop waits for it.

    Raises:
        TypeError: no policy, or no robot.
        ValueError: a limit or rate that is impossible, or no rate where the policy knows none.
        RateMismatchError: robot or policy are made for another rate.
    """

    def __init__(
        self,
        policy: ChunkPolicy,
        robot: Robot,
        hz: float | None = None,
        *,
        schedule: Schedule | None = None,
        safety: SafetyLimits | None = None,
        seed: int | None = None,
        timestamps: Timestamps | None = None,
        on_tick: Callable[[Tick], None] | None = None,
    ) -> None:
        self._window = plan_window(policy)
        check_robot(robot)
        self._hz = rate_of(policy) if hz is None else float(hz)
        check_rates(self._hz, robot, policy)
        self._policy = policy
        self._robot = robot
        self._schedule: Schedule = schedule if schedule is not None else Asynchronous()
        if not isinstance(self._schedule, Synchronous | Asynchronous):
            raise TypeError(
                f"schedule={schedule!r} must be Asynchronous(...) or Synchronous() "
                "(cmpolicy.robot.schedule)"
            )
        self._limits = safety if safety is not None else SafetyLimits()
        self._new_filter()  # says what is wrong with the limits before anything is connected
        self._history = ObservationHistory(policy.spec)
        self._noise = NoiseSource(policy.spec.noise_shape, seed)
        self._worker: Worker = (
            InlineWorker(policy, self._noise)
            if isinstance(self._schedule, Synchronous)
            else ThreadedWorker(policy, self._noise)
        )
        self._timestamps = timestamps
        self._on_tick = on_tick
        self._guard = SignalGuard(
            self,
            (
                ControlLoop.__enter__.__code__,
                ControlLoop.__exit__.__code__,
                ControlLoop.run.__code__,
            ),
            self._signalled,
        )
        self._watchdog = Watchdog(
            limit=self._limits.max_call_seconds,
            connect_limit=self._limits.max_connect_seconds,
            hung=self.stop,
            rest=self._halt_from_outside,
            disconnect=robot.disconnect,
        )
        self._lock: RobotLock | None = None
        self._run_lock = threading.Lock()
        self._at_rest = False
        self._stop_reason: str | None = None
        self._signal: str | None = None
        self._unreported: str | None = None  # a signal that nobody was told of yet
        self._hurried = False  # by a second signal
        self._safety: SafetyFilter | None = None
        self.report: LoopReport | None = None
        """Of the last run, also when it raised."""

    # -- connecting and leaving -------------------------------------------------------------------

    def __enter__(self) -> ControlLoop:
        self._guard.install()  # from here on signals are held in this method
        try:
            self._lock = RobotLock(self._robot)
        except BaseException:
            self._guard.restore()
            raise
        self._signal = self._unreported = self._stop_reason = None
        self._at_rest = self._hurried = False
        try:
            self._watchdog.start(self._guard)
            if getattr(self._robot, "is_connected", False) is not True:
                self._watchdog.call("connect", self._robot.connect)
            check_rates(self._hz, self._robot, self._policy)  # it may know its rate only now
            self._raise_held_signal()
        except BaseException as error:
            self._leave(error)
            raise
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        self._leave(error)

    def _leave(self, error: BaseException | None) -> None:
        """Stop, disconnect, and give everything back; each of it, whatever goes wrong before.

        Signals are held meanwhile: only what robot, policy or watchdog raise is to be expected.
        """
        failures: list[tuple[str, BaseException]] = []
        alone = self._end_other_run()
        if not self._at_rest:
            failures += self._halt()
        self._attempt("disconnect", self._robot.disconnect, failures)
        self._watchdog.close()
        if alone:
            self._run_lock.release()
        if self._lock is not None:
            self._lock.release()
            self._lock = None
        self._safety = None
        try:
            _raise(failures, error)
        finally:
            self._guard.restore()
        if error is None:
            self._raise_held_signal()

    def _end_other_run(self) -> bool:
        """A run that still goes on in another thread must not send actions after the last one.

        Returns:
            Whether it is over, and no other can begin (the lock is held); False if it hangs.
        """
        if self._run_lock.acquire(blocking=False):
            return True
        self.stop("the loop was left")
        deadline = clock() + 1 / self._hz + 2 * _PATIENCE
        while clock() < deadline and not self._hurried:
            if self._run_lock.acquire(timeout=_SLICE):
                return True
        _log.error("a run in another thread did not end; the robot is stopped in spite of it")
        self._at_rest = False
        return False

    # -- running ----------------------------------------------------------------------------------

    def run(
        self,
        *,
        seconds: float | None = None,
        steps: int | None = None,
        start: PerDimension | None = None,
    ) -> LoopReport:
        """One episode of so many seconds or ticks; with neither, until something ends it.

        Args:
            seconds: how long.
            steps: how many ticks, instead.
            start: the action that the robot stands at, (A,), e.g. its joint positions. It is held
                there until the first plan, and ``safety.max_rate`` counts from there. None: nothing
                is sent before the first planned action, which may be any within the bounds.

        Returns:
            What it did, and why it stopped. It may have been ended by :meth:`stop`, by a signal, or
            by too many ticks in a row without a usable action.

        Raises:
            ObservationError: the robot's observation does not fit the policy.
            RobotError: the robot could not be stopped.
            RuntimeError: outside of ``with``, after a signal, or while another run goes on.
            ValueError: a ``start`` of another size, not finite, or outside of the bounds.
            Exception: what robot, policy or ``on_tick`` raised. The robot was stopped before.
        """
        n_ticks = _n_ticks(seconds, steps, self._hz)
        if not self._run_lock.acquire(blocking=False):
            raise RuntimeError("this loop already runs, in another thread or further up")
        try:
            return self._run(n_ticks, start)
        finally:
            self._run_lock.release()

    def _run(self, n_ticks: int, start: PerDimension | None) -> LoopReport:
        self._check_may_run()
        self._safety = self._new_filter(start)
        episode = Episode(
            self._robot,
            watchdog=self._watchdog,
            planner=self._schedule.planner(self._window),
            worker=self._worker,
            noise=self._noise,
            history=self._history,
            limits=self._limits,
            safety=self._safety,
            hz=self._hz,
            stopped=self._why_stopped,
            timestamps=self._timestamps,
            on_tick=self._on_tick,
        )
        failure: BaseException | None = None
        self._at_rest = False
        try:
            self._noise.reset()
            self._worker.start()
            episode.play(n_ticks)
        except BaseException as error:
            episode.stopped_by = f"{type(error).__name__}: {error}"
            failure = error
            raise
        finally:
            # The robot first: the inference under way may take its time.
            failures = self._halt()
            self._at_rest = not failures
            self._worker.close(_PATIENCE, lambda: self._hurried)
            self.report = episode.report(self._schedule.name)
            if episode.stopped_by == self._stop_reason:  # one that came later ends the next run
                self._stop_reason = None
            if not self._hurried:
                self._unreported = None
            _raise(failures, failure)
        return self.report

    def stop(self, reason: str = "stop() was called") -> None:
        """End the run with its present tick; from any thread, or from ``on_tick``.

        An action of that tick is sent only if it is under way already.

        Between two runs it ends the next one before it moves the robot.
        """
        self._stop_reason = reason

    def _check_may_run(self) -> None:
        if self._lock is None:
            raise RuntimeError(
                "the robot is not connected: `with ControlLoop(policy, robot) as loop: loop.run()`"
            )
        signal = self._signal  # read first: one that comes later ends the run that now begins
        self._raise_held_signal()
        if signal is not None:
            raise RuntimeError(f"the loop was stopped by {signal}; it does not start again")

    def _why_stopped(self) -> str | None:
        return self._signal or self._stop_reason

    def _raise_held_signal(self) -> None:
        name, self._unreported = self._unreported, None
        if name is not None:
            raise_for(name)

    def _signalled(self, name: str) -> None:
        self._hurried = self._signal is not None
        self._signal = self._signal or name
        self._unreported = name

    def _new_filter(self, start: PerDimension | None = None) -> SafetyFilter:
        window = self._window
        rotations = window.rotations or ()
        return SafetyFilter(self._limits, window.action_dim, 1 / self._hz, start, rotations)

    def _halt(self) -> list[tuple[str, BaseException]]:
        """Bring the robot to rest; what went wrong."""
        failures: list[tuple[str, BaseException]] = []
        stop = getattr(self._robot, "stop", None)
        if callable(stop):
            self._attempt("stop", stop, failures)
            if not failures:
                return failures
        hold = None if self._safety is None else self._safety.hold
        if hold is not None:
            self._attempt("send_action", lambda: self._robot.send_action(hold), failures)
        return failures

    def _halt_from_outside(self) -> None:
        """As :meth:`_halt`, while the loop's own thread hangs in a call of the robot."""
        if getattr(self._robot, "stop_from_any_thread", True) is False:
            _log.error(
                "%s.stop_from_any_thread is False: it stops when its call returns",
                type(self._robot).__name__,
            )
            return
        self._halt()

    def _attempt(
        self, name: str, call: Callable[[], Any], failures: list[tuple[str, BaseException]]
    ) -> None:
        try:
            self._watchdog.call(name, call)
        except BaseException as error:  # nothing must skip the steps after this one
            _log.error("could not %s: %s", _WORDS[name], str(error) or type(error).__name__)
            failures.append((_WORDS[name], error))


def _n_ticks(seconds: float | None, steps: int | None, hz: float) -> int:
    if seconds is not None and steps is not None:
        raise ValueError(f"give seconds or steps, not both (seconds={seconds}, steps={steps})")
    if steps is not None:
        if steps < 1:
            raise ValueError(f"steps={steps} must be at least 1 tick")
        return steps
    if seconds is None:
        return 2**62
    if not 0 < seconds < math.inf:
        raise ValueError(f"seconds={seconds} must be above 0; leave it out to run without end")
    return max(1, round(seconds * hz))


def _raise(failures: list[tuple[str, BaseException]], cause: BaseException | None) -> None:
    """Failures of the end: as notes of the error that led there, or as an error of their own."""
    if not failures:
        return
    text = "; ".join(f"could not {what}: {error!r}" for what, error in failures)
    if cause is not None:
        cause.add_note(text)
        return
    for _, error in failures:
        if not isinstance(error, Exception):  # Ctrl-C
            raise error
    raise RobotError(text) from failures[0][1]
