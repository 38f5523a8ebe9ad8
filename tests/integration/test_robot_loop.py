"""ControlLoop with real little robots and policies: what they send, and how everything ends.

The policy plans "k for tick k", reading the tick from the robot's counter, so that an action tells
for which tick it was meant. A busy machine skips ticks and lets threads wait: runs are far longer
than what they have to show, and limits on misses that a run is to reach leave half a second.
"""

import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
import pytest
import torch

from cmpolicy import ConsistencyPolicy, ControlLoop
from cmpolicy.nn.unet1d import UNet1DConfig
from cmpolicy.normalize import Normalizer
from cmpolicy.robot import (
    Asynchronous,
    LeRobotAdapter,
    NonFiniteObservationError,
    ObservationError,
    RateMismatchError,
    RobotError,
    SafetyLimits,
    Synchronous,
    Tick,
    Timestamps,
)
from cmpolicy.robot.episode import HELD, PLANNED, WAITED
from cmpolicy.spec import PolicySpec

HZ = 50.0
SPEC = PolicySpec(
    {"tick": (1,)}, action_dim=2, horizon=9, n_obs_steps=2, n_action_steps=4, action_rotations=()
)
SCHEDULES = [Asynchronous(), Synchronous()]
MISSES = 25  # ticks: half a second


class CountingPolicy:
    """Plans (k, k) for tick k; ``seconds`` per call, and ``fail(call)`` may raise or spoil."""

    def __init__(
        self, seconds: float = 0.0, fail: Callable[[int, np.ndarray], np.ndarray] | None = None
    ) -> None:
        self.spec = SPEC
        self.n_obs_steps, self.n_action_steps = SPEC.n_obs_steps, SPEC.n_action_steps
        self.noise_shape = (SPEC.horizon, SPEC.action_dim)
        self.seconds = seconds
        self.calls = 0
        self.noises: list[np.ndarray] = []
        self.threads: set[str] = set()
        self._fail = fail

    def infer_plan(self, obs: Mapping[str, np.ndarray], noise: Any = None) -> np.ndarray:
        self.threads.add(threading.current_thread().name)
        self.noises.append(noise.copy())
        self.calls += 1
        if self.seconds:
            time.sleep(self.seconds)
        first = obs["tick"][0, -1, 0]
        plan = np.repeat(first + np.arange(SPEC.n_plan_steps, dtype=np.float32)[:, None], 2, axis=1)
        if self._fail is not None:
            plan = self._fail(self.calls, plan)
        return plan[None]

    def infer(self, obs: Mapping[str, np.ndarray], noise: Any = None) -> np.ndarray:
        return self.infer_plan(obs, noise)[:, : SPEC.n_action_steps]


class CountingRobot:
    """Counts its observations from the first tick on, and remembers what happens to it."""

    def __init__(self, observe: Callable[[int], Any] | None = None) -> None:
        self.log: list[str] = []
        self.sent: list[float] = []
        self.n = -1  # the warm-up's observation comes before tick 0
        self._observe = observe

    def connect(self) -> None:
        self.log.append("connect")

    def get_observation(self) -> Any:
        tick, self.n = self.n, self.n + 1
        return {"tick": [tick]} if self._observe is None else self._observe(tick)

    def send_action(self, action: np.ndarray) -> None:
        assert action.shape == (2,)
        assert action.dtype == np.float32
        self.sent.append(float(action[0]))

    def disconnect(self) -> None:
        self.log.append("disconnect")


class StoppingRobot(CountingRobot):
    """Has a stop of its own."""

    def stop(self) -> None:
        self.log.append("stop")


@pytest.fixture(autouse=True)
def _no_thread_is_left() -> Iterator[None]:
    yield
    deadline = time.monotonic() + 5
    while any(t.name == "cmpolicy-inference" for t in threading.enumerate()):
        assert time.monotonic() < deadline, "an inference thread outlives its loop"
        time.sleep(0.01)


# -- what is sent ---------------------------------------------------------------------------------


def test_asynchronous_actions_are_those_of_their_tick() -> None:
    ticks: list[Tick] = []
    policy = CountingPolicy(seconds=0.03)
    robot = CountingRobot(lambda n: {"tick": [ticks[-1].index + 1 if ticks else n]})
    with ControlLoop(policy, robot, HZ, on_tick=ticks.append) as loop:
        report = loop.run(steps=100)
    planned = {t.index: float(t.action[0]) for t in ticks if t.source == PLANNED}  # type: ignore[index]
    assert len(planned) > 10
    # A tick that a busy machine skips leaves the robot's counter one behind; no action is early.
    for index, value in planned.items():
        assert index - report.missed - 1e-3 <= value <= index + 1e-3
    assert report.ticks == 100
    assert report.stopped_by == "completed"
    assert report.plans >= 3
    assert report.stale_actions >= 1  # 30 ms are more than a tick
    assert report.waited >= 1
    assert report.latency.p50 >= 30
    assert policy.threads == {"cmpolicy-inference"}
    assert robot.log == ["connect", "disconnect"]


def test_synchronous_sends_every_action_of_a_chunk_in_order() -> None:
    policy, robot = CountingPolicy(), CountingRobot()
    with ControlLoop(policy, robot, HZ, schedule=Synchronous()) as loop:
        report = loop.run(steps=20)
    # chunks of four from the observation at their start, whatever the clock says
    moving = robot.sent[:-1]  # the last one is the halt
    assert moving == [float(n) for n in range(len(moving))]
    assert robot.sent[-1] == moving[-1]
    assert report.plans == -(-len(moving) // 4)
    assert policy.threads == {threading.current_thread().name}
    assert (report.stale_actions, report.seams, report.held) == (0, 0, 0)


def test_a_slow_synchronous_policy_misses_ticks() -> None:
    policy, robot = CountingPolicy(seconds=0.05), CountingRobot()
    with ControlLoop(policy, robot, HZ, schedule=Synchronous()) as loop:
        report = loop.run(steps=30)
    assert report.missed >= 8  # 2.5 ticks per chunk of four
    assert report.ticks == 30
    assert len(robot.sent) - 1 + report.missed >= 30


def test_every_run_is_an_episode_of_its_own_with_the_same_noise() -> None:
    policy, robot = CountingPolicy(), CountingRobot()
    with ControlLoop(policy, robot, HZ, schedule=Synchronous(), seed=7) as loop:
        first = loop.run(steps=50)
        robot.n = -1
        n = len(policy.noises)
        loop.run(steps=9)
    assert first.plans >= 2
    rng = np.random.default_rng(7)
    expected = rng.standard_normal((9, 2), dtype=np.float32)
    # three calls warm up, then the episode's noise begins
    np.testing.assert_array_equal(policy.noises[3][0], expected)
    np.testing.assert_array_equal(policy.noises[n + 3][0], expected)
    assert robot.log == ["connect", "disconnect"]


def test_limits_are_applied_and_counted() -> None:
    robot = CountingRobot()
    safety = SafetyLimits(low=0, high=5, max_rate=0.5 * HZ)
    with ControlLoop(CountingPolicy(), robot, HZ, schedule=Synchronous(), safety=safety) as loop:
        report = loop.run(steps=50, start=0)
    assert max(robot.sent) == 5
    assert np.abs(np.diff([0.0, *robot.sent])).max() <= 0.5 + 1e-6
    assert report.interventions["too fast"] > 0
    assert report.interventions["out of bounds"] > 0


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_where_one_run_started_is_forgotten_in_the_next(schedule: Any) -> None:
    """The robot is elsewhere by then: sending it back to the old start would be a jump."""
    robot = CountingRobot()
    safety = SafetyLimits(max_rate=1.0 * HZ)
    with ControlLoop(CountingPolicy(), robot, HZ, schedule=schedule, safety=safety) as loop:
        loop.run(steps=50, start=0)
        left_at = robot.sent[-1]
        assert left_at > 5
        robot.sent.clear()
        loop.run(steps=10, start=left_at)
        assert np.abs(np.diff([left_at, *robot.sent])).max() <= 1 + 1e-6
        robot.sent.clear()
        loop.stop()
        loop.run(steps=10)
        assert robot.sent == []
        with pytest.raises(ValueError, match="start=nan holds NaN"):
            loop.run(steps=1, start=float("nan"))
        assert robot.sent == []


def test_the_tiny_network_drives_a_robot() -> None:
    rng = np.random.default_rng(0)
    normalizer = Normalizer.fit(
        {"tick": rng.normal(size=(32, 1)), "action": rng.normal(size=(32, 2))}
    )
    net = UNet1DConfig((8, 16), kernel_size=3, n_groups=4, time_dim=8)
    spec = PolicySpec({"tick": (1,)}, action_dim=2, horizon=8, n_obs_steps=2, n_action_steps=4)
    torch.manual_seed(0)
    policy = ConsistencyPolicy(spec, net, normalizer).eval()
    for schedule in SCHEDULES:
        robot = CountingRobot()
        with ControlLoop(policy, robot, HZ, schedule=schedule, seed=0) as loop:
            report = loop.run(seconds=1)
        assert report.ticks == 50
        assert report.plans >= 2
        assert np.isfinite(robot.sent).all()


def test_lerobots_dictionaries() -> None:
    class Motors:
        def __init__(self) -> None:
            self.action_features = {"x.pos": float, "y.pos": float}
            self.fps = int(HZ)
            self.is_connected = False
            self.sent: list[dict[str, float]] = []

        def connect(self, calibrate: bool = True) -> None:
            self.is_connected = True

        def get_observation(self) -> dict[str, Any]:
            assert self.is_connected
            return {"x.pos": 3.0, "y.pos": 4.0, "cam": np.zeros((2, 2, 3), np.uint8)}

        def send_action(self, action: dict[str, float]) -> dict[str, float]:
            self.sent.append(action)
            return action

        def disconnect(self) -> None:
            self.is_connected = False

    motors = Motors()
    motors.connect()  # LeRobot's raise when they are connected twice
    motors.connect = None  # type: ignore[assignment,method-assign]
    robot = LeRobotAdapter(motors, observation={"tick": ["x.pos"]})
    with ControlLoop(CountingPolicy(), robot, HZ, schedule=Synchronous()) as loop:
        loop.run(steps=4)
    assert motors.sent[0] == {"x.pos": 3.0, "y.pos": 3.0}
    assert not motors.is_connected


# -- how a run ends -------------------------------------------------------------------------------


def test_the_robot_is_at_rest_between_runs_and_disconnected_after() -> None:
    robot = StoppingRobot()
    with ControlLoop(CountingPolicy(), robot, HZ) as loop:
        loop.run(steps=3)
        assert robot.log == ["connect", "stop"]
        loop.run(steps=3)
    assert robot.log == ["connect", "stop", "stop", "disconnect"]


def test_relative_commands_end_with_rest() -> None:
    robot = CountingRobot()
    with ControlLoop(CountingPolicy(), robot, HZ, safety=SafetyLimits(rest=[0, 0])) as loop:
        loop.run(steps=50)
    assert robot.sent[-1] == 0
    assert max(robot.sent) > 0


def test_a_body_that_raises_leaves_the_robot_stopped() -> None:
    robot = StoppingRobot()
    with pytest.raises(KeyError), ControlLoop(CountingPolicy(), robot, HZ):
        raise KeyError("the user's own")
    assert robot.log == ["connect", "stop", "disconnect"]


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_what_the_policy_raises_surfaces(schedule: Any) -> None:
    def fail(call: int, plan: np.ndarray) -> np.ndarray:
        if call == 5:
            raise ZeroDivisionError("in the network")
        return plan

    robot = StoppingRobot()
    with ControlLoop(CountingPolicy(fail=fail), robot, HZ, schedule=schedule) as loop:
        with pytest.raises(ZeroDivisionError, match="in the network") as caught:
            loop.run(seconds=20)
        assert any("fail" in str(entry.name) for entry in caught.traceback)  # from where it was
        assert loop.report is not None
        assert loop.report.stopped_by == "ZeroDivisionError: in the network"
    assert robot.log == ["connect", "stop", "disconnect"]


def test_a_policy_that_is_gone_for_a_while_is_asked_again() -> None:
    def fail(call: int, plan: np.ndarray) -> np.ndarray:
        if 5 <= call < 8:
            raise ConnectionError("server restarts")
        return plan

    robot = CountingRobot()
    with ControlLoop(CountingPolicy(fail=fail), robot, HZ) as loop:
        report = loop.run(steps=100)
    assert report.stopped_by == "completed"
    assert report.interventions["policy unavailable"] == 3
    assert report.plans >= 3


def test_a_policy_that_stays_away_ends_the_run_with_the_robot_held() -> None:
    def fail(call: int, plan: np.ndarray) -> np.ndarray:
        if call >= 5:
            raise ConnectionError("server gone")
        return plan

    robot = StoppingRobot()
    safety = SafetyLimits(max_misses=MISSES)
    with ControlLoop(CountingPolicy(fail=fail), robot, HZ, safety=safety) as loop:
        report = loop.run(seconds=20, start=0)  # held there, if the only plan is late
    words = f"{MISSES + 1} ticks in a row without a usable action (last: no plan"
    assert report.stopped_by.startswith(words)
    assert report.held == report.interventions["no plan"] >= MISSES + 1
    assert len(set(robot.sent[-MISSES - 1 :])) == 1  # the last safe action, again and again
    assert robot.log == ["connect", "stop", "disconnect"]


def test_a_policy_that_hangs_ends_the_run_too() -> None:
    release = threading.Event()

    def fail(call: int, plan: np.ndarray) -> np.ndarray:
        if call == 5:
            release.wait(30)
        return plan

    robot = StoppingRobot()
    safety = SafetyLimits(max_misses=MISSES)
    with ControlLoop(CountingPolicy(fail=fail), robot, HZ, safety=safety) as loop:
        report = loop.run(seconds=20)
        assert "without a usable action" in report.stopped_by
        assert robot.log == ["connect", "stop"]
        with pytest.raises(RuntimeError, match="it hangs"):
            loop.run(steps=1)
        release.set()
    assert robot.log[-1] == "disconnect"


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_plans_that_are_not_finite_are_refused(schedule: Any) -> None:
    def fail(call: int, plan: np.ndarray) -> np.ndarray:
        return plan * np.nan if call in (4, 6) else plan  # call 4 is the first after warming up

    robot = CountingRobot()
    with ControlLoop(CountingPolicy(fail=fail), robot, HZ, schedule=schedule) as loop:
        report = loop.run(steps=60)
    assert report.interventions["non-finite action"] == 2
    assert report.stopped_by == "completed"
    assert np.isfinite(robot.sent).all()


def test_a_plan_of_the_wrong_shape_is_an_error() -> None:
    policy = CountingPolicy(fail=lambda call, plan: plan[:3])
    robot = StoppingRobot()
    with (
        pytest.raises(ValueError, match=r"infer_plan returned shape \(1, 3, 2\).*\(1, 8, 2\)"),
        ControlLoop(policy, robot, HZ) as loop,
    ):
        loop.run(steps=3)
    assert robot.log == ["connect", "stop", "disconnect"]


# -- the robot's side -----------------------------------------------------------------------------


def _late(tick: int, value: Any) -> Any:
    return {"tick": [tick]} if tick < 8 else value


@pytest.mark.parametrize(
    ("value", "words"),
    [
        ({"tack": [1]}, "has no 'tick'"),
        ({"tick": [1, 2]}, r"shape \(2,\), expected \(1,\)"),
        ({"tick": ["one"]}, "dtype <U3"),
        ({"tick": [None]}, "dtype object"),
        (None, "must be a mapping"),
    ],
)
@pytest.mark.parametrize("at_once", [True, False])
def test_observations_of_the_wrong_form_end_the_run(value: Any, words: str, at_once: bool) -> None:
    robot = StoppingRobot(lambda tick: value if at_once else _late(tick, value))
    with (
        ControlLoop(CountingPolicy(), robot, HZ) as loop,
        pytest.raises(ObservationError, match=words),
    ):
        loop.run(seconds=20)
    assert robot.log == ["connect", "stop", "disconnect"]


def test_a_glitch_of_a_sensor_is_survived_and_counted() -> None:
    robot = CountingRobot(lambda tick: {"tick": [np.nan if tick in (6, 7, 15) else tick]})
    with ControlLoop(CountingPolicy(), robot, HZ) as loop:
        report = loop.run(steps=75)
    assert report.interventions["non-finite observation"] == 3
    assert report.stopped_by == "completed"
    assert np.isfinite(robot.sent).all()


def test_a_broken_sensor_holds_the_robot_then_stops_it() -> None:
    robot = StoppingRobot(lambda tick: {"tick": [tick if tick < 6 else np.inf]})
    safety = SafetyLimits(max_observation_age=0.1, max_misses=MISSES)
    with ControlLoop(CountingPolicy(), robot, HZ, safety=safety) as loop:
        report = loop.run(seconds=20)
    assert "last: stale observation" in report.stopped_by
    assert report.interventions["stale observation"] >= 1
    assert report.interventions["non-finite observation"] >= 4
    assert robot.log == ["connect", "stop", "disconnect"]


def test_a_sensor_broken_from_the_start_is_an_error_before_anything_moves() -> None:
    robot = StoppingRobot(lambda tick: {"tick": [np.nan]})
    with (
        ControlLoop(CountingPolicy(), robot, HZ) as loop,
        pytest.raises(NonFiniteObservationError),
    ):
        loop.run(steps=3)
    assert robot.sent == []


def test_observations_that_stand_still_are_stale() -> None:
    frozen: list[float] = []

    def observe(tick: int) -> dict[str, Any]:
        if tick == 8:
            frozen.append(time.time())
        return {"tick": [tick], "stamp": frozen[0] if frozen else time.time()}

    robot = CountingRobot(observe)
    safety = SafetyLimits(max_observation_age=0.1, max_misses=MISSES)
    stamps = Timestamps("stamp", clock=time.time)
    with ControlLoop(CountingPolicy(), robot, HZ, safety=safety, timestamps=stamps) as loop:
        report = loop.run(seconds=20)
    assert "last: stale observation" in report.stopped_by
    assert report.interventions["stale observation"] >= MISSES + 1


@pytest.mark.parametrize(
    ("stamp", "words"),
    [
        (lambda: time.time(), "clock is not the one given"),
        (lambda: float("nan"), "clock is not the one given"),
        (lambda: time.monotonic() + 3, "clock is not the one given"),
        (lambda: "noon", "is no number"),
        (None, "has no timestamp 'stamp'"),
    ],
)
def test_timestamps_of_another_clock(stamp: Any, words: str) -> None:
    robot = StoppingRobot(
        lambda tick: {"tick": [tick]} | ({} if stamp is None else {"stamp": stamp()})
    )
    with (
        ControlLoop(CountingPolicy(), robot, HZ, timestamps=Timestamps("stamp")) as loop,
        pytest.raises(ObservationError, match=words),
    ):
        loop.run(steps=5)
    assert robot.log == ["connect", "stop", "disconnect"]


@pytest.mark.parametrize("call", ["get_observation", "send_action"])
def test_a_robot_that_raises_is_stopped_and_disconnected(call: str) -> None:
    class Faulty(StoppingRobot):
        def get_observation(self) -> Any:
            if call == "get_observation" and self.n == 9:
                raise OSError("serial port gone")
            return super().get_observation()

        def send_action(self, action: np.ndarray) -> None:
            if call == "send_action" and self.n > 5:
                raise OSError("serial port gone")
            super().send_action(action)

    robot = Faulty()
    with (
        pytest.raises(OSError, match="serial port gone"),
        ControlLoop(CountingPolicy(), robot, HZ) as loop,
    ):
        loop.run(seconds=20)
    assert robot.log == ["connect", "stop", "disconnect"]


def test_nothing_that_fails_at_the_end_keeps_the_rest_from_happening() -> None:
    class Stubborn(StoppingRobot):
        def stop(self) -> None:
            super().stop()
            raise OSError("no brakes")

        def disconnect(self) -> None:
            super().disconnect()
            raise OSError("no plug")

    robot = Stubborn()
    loop = ControlLoop(CountingPolicy(), robot, HZ)
    with (
        pytest.raises(RobotError, match=r"could not stop the robot.*no brakes") as caught,
        loop,
    ):
        loop.run(steps=50)
    assert robot.sent[-1] == robot.sent[-2]  # the last safe action stands in for the brakes
    assert "disconnect" in robot.log
    assert any("no plug" in note for note in caught.value.__notes__)
    # and the robot can be taken again
    robot.log.clear()
    with pytest.raises(RobotError, match="no plug"), loop:
        pass
    assert robot.log == ["connect", "stop", "disconnect"]


def test_a_robot_that_does_not_connect_is_let_go() -> None:
    class Absent(CountingRobot):
        def connect(self) -> None:
            super().connect()
            raise ConnectionRefusedError("arm is off")

    robot = Absent()
    loop = ControlLoop(CountingPolicy(), robot, HZ)
    for _ in range(2):
        with pytest.raises(ConnectionRefusedError, match="arm is off"), loop:
            pytest.fail("must not get here")
    assert robot.log == ["connect", "disconnect"] * 2


def test_two_loops_on_one_robot() -> None:
    robot = CountingRobot()
    with ControlLoop(CountingPolicy(), robot, HZ):
        with (
            pytest.raises(RobotError, match="another control loop already drives this"),
            ControlLoop(CountingPolicy(), robot, HZ),
        ):
            pytest.fail("must not get here")
        assert robot.log == ["connect"]  # the first loop's robot was left alone
    assert robot.log == ["connect", "disconnect"]


def test_rates_that_do_not_match() -> None:
    robot = CountingRobot()
    robot.fps = 30  # type: ignore[attr-defined]
    with pytest.raises(RateMismatchError, match="fps is 30"):
        ControlLoop(CountingPolicy(), robot, HZ)
    policy = CountingPolicy()
    policy.control_hz = 10.0  # type: ignore[attr-defined]
    with pytest.raises(RateMismatchError, match="control_hz is 10"):
        ControlLoop(policy, CountingRobot(), HZ)

    class Late(CountingRobot):
        def connect(self) -> None:
            super().connect()
            self.hz = 20.0

    late = Late()
    with (
        pytest.raises(RateMismatchError, match="hz is 20"),
        ControlLoop(policy := CountingPolicy(), late, HZ),
    ):
        pytest.fail("must not get here")
    assert policy.calls == 0
    assert late.log == ["connect", "disconnect"]


def test_the_rate_is_the_policys_where_none_is_given() -> None:
    policy, robot = CountingPolicy(), CountingRobot()
    with pytest.raises(ValueError, match="CountingPolicy does not know the rate"):
        ControlLoop(policy, robot)
    assert robot.log == []
    policy.control_hz = HZ  # type: ignore[attr-defined]
    with ControlLoop(policy, robot, schedule=Synchronous()) as loop:
        report = loop.run(steps=5)
    assert report.hz == HZ
    assert report.ticks == 5


# -- stopping -------------------------------------------------------------------------------------


def test_stop_from_on_tick_and_from_another_thread() -> None:
    robot = StoppingRobot()

    def from_five_on(tick: Tick) -> None:
        if tick.index >= 5:  # a busy machine may skip the fifth
            loop.stop("goal reached")

    with ControlLoop(CountingPolicy(), robot, HZ, on_tick=from_five_on) as loop:
        report = loop.run()
        assert report.stopped_by == "goal reached"
        assert report.ticks - report.missed <= 6
    with ControlLoop(CountingPolicy(), robot, hz=0.05) as loop:
        threading.Timer(0.3, loop.stop).start()
        begin = time.monotonic()
        report = loop.run()  # waits twenty seconds for the second tick
        assert time.monotonic() - begin < 19
        assert report.stopped_by == "stop() was called"


def test_stop_between_runs_ends_the_next_before_it_moves() -> None:
    robot = StoppingRobot()
    with ControlLoop(CountingPolicy(), robot, HZ) as loop:
        loop.stop("hand in the cell")
        report = loop.run(seconds=5)
        assert (report.ticks, report.stopped_by) == (0, "hand in the cell")
        assert robot.sent == []
        assert loop.run(steps=2).stopped_by == "completed"  # was consumed


def test_on_tick_sees_everything_and_may_raise() -> None:
    ticks: list[Tick] = []
    robot = StoppingRobot()
    with ControlLoop(CountingPolicy(seconds=0.1), robot, HZ, on_tick=ticks.append) as loop:
        report = loop.run(steps=50)
    assert [t.source for t in ticks].count(WAITED) == report.waited
    assert [t.source for t in ticks].count(HELD) == report.held
    assert ticks[0].source == WAITED
    assert ticks[0].action is None
    assert all(t.observation["tick"] is not None for t in ticks)
    assert [float(t.action[0]) for t in ticks if t.action is not None] == robot.sent
    shown = [t for t in ticks if t.source == PLANNED]
    assert all(t.plan[0, 0] == t.action[0] for t in shown)  # type: ignore[index]

    def broken(tick: Tick) -> None:
        raise LookupError("disk full")

    with (
        ControlLoop(CountingPolicy(), robot, HZ, on_tick=broken) as loop,
        pytest.raises(LookupError, match="disk full"),
    ):
        loop.run(steps=5)
    assert robot.log[-2:] == ["stop", "disconnect"]


def test_what_cannot_be_run() -> None:
    loop = ControlLoop(CountingPolicy(), CountingRobot(), HZ)
    with pytest.raises(RuntimeError, match="not connected"):
        loop.run(steps=1)
    with loop:
        for wrong in ({"seconds": 1.0, "steps": 1}, {"steps": 0}, {"seconds": 0.0}):
            with pytest.raises(ValueError, match=r"steps|seconds"):
                loop.run(**wrong)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="is no robot"):
        ControlLoop(CountingPolicy(), object(), HZ)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="cannot drive a robot"):
        ControlLoop(object(), CountingRobot(), HZ)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"schedule='async' must be Asynchronous"):
        ControlLoop(CountingPolicy(), CountingRobot(), HZ, schedule="async")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="low has shape"):
        ControlLoop(CountingPolicy(), CountingRobot(), HZ, safety=SafetyLimits(low=[0] * 7))


def test_runs_in_another_thread_without_signal_handlers() -> None:
    robot = StoppingRobot()
    reports: list[Any] = []

    def drive() -> None:
        with ControlLoop(CountingPolicy(), robot, HZ) as loop:
            reports.append(loop.run(steps=5))

    thread = threading.Thread(target=drive)
    thread.start()
    thread.join(20)
    assert reports[0].stopped_by == "completed"
    assert robot.log == ["connect", "stop", "disconnect"]


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_nothing_is_sent_once_the_watchdog_has_stopped_the_robot(schedule: Any) -> None:
    """Outside of the main thread a call that hangs is not interrupted: it may return later."""

    class Hanging(StoppingRobot):
        def send_action(self, action: np.ndarray) -> None:
            self.log.append("act")

        def stop(self) -> None:
            super().stop()
            stopped.set()

    stopped = threading.Event()

    def observe(tick: int) -> dict[str, Any]:
        if tick == 5:
            stopped.wait(20)
            robot.log.append("returned")
        return {"tick": [tick]}

    robot = Hanging(observe)
    limits = SafetyLimits(max_call_seconds=0.3, max_observation_age=60)
    reports: list[Any] = []

    def drive() -> None:
        with ControlLoop(CountingPolicy(), robot, HZ, schedule=schedule, safety=limits) as loop:
            reports.append(loop.run(seconds=60))

    thread = threading.Thread(target=drive)
    thread.start()
    thread.join(60)
    assert "get_observation() has not returned" in reports[0].stopped_by
    assert robot.log[-4:] == ["stop", "returned", "stop", "disconnect"]


def test_leaving_ends_a_run_in_another_thread_first() -> None:
    robot = StoppingRobot()
    reports: list[Any] = []
    with ControlLoop(CountingPolicy(), robot, HZ) as loop:
        thread = threading.Thread(target=lambda: reports.append(loop.run(seconds=60)))
        thread.start()
        while not robot.sent:
            assert thread.is_alive()
            time.sleep(0.01)
        with pytest.raises(RuntimeError, match="already runs"):
            loop.run(steps=1)
    n = len(robot.sent)
    thread.join(20)
    assert reports[0].stopped_by == "the loop was left"
    assert len(robot.sent) == n
    assert robot.log == ["connect", "stop", "disconnect"]


def test_a_stop_that_comes_too_late_for_a_run_ends_the_next() -> None:
    class Braking(StoppingRobot):
        def stop(self) -> None:
            super().stop()
            if self.log.count("stop") == 1:
                loop.stop("emergency")

    robot = Braking()
    with ControlLoop(CountingPolicy(), robot, HZ) as loop:
        assert loop.run(steps=3).stopped_by == "completed"
        n = len(robot.sent)
        assert loop.run(steps=3).stopped_by == "emergency"
        assert len(robot.sent) == n


def test_an_asynchronous_loop_gives_the_interpreter_back_as_it_was() -> None:
    before = sys.getswitchinterval()
    within: list[float] = []
    policy, robot = CountingPolicy(), CountingRobot()
    with ControlLoop(
        policy, robot, HZ, on_tick=lambda tick: within.append(sys.getswitchinterval())
    ) as loop:
        loop.run(seconds=0.1)
    assert max(within) < 0.001
    assert sys.getswitchinterval() == before
