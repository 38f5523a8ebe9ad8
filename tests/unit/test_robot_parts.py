"""Small parts around the control loop: statistics, report, adapter, claim, ticks."""

import math
import os
import subprocess
import sys
import time
from typing import Any

import numpy as np
import pytest

from cmpolicy.observation import ObservationError
from cmpolicy.robot.adapter import LeRobotAdapter
from cmpolicy.robot.metronome import Metronome
from cmpolicy.robot.report import Histogram, LoopReport, Quantiles
from cmpolicy.robot.robot import (
    RateMismatchError,
    RobotError,
    RobotLock,
    check_rates,
    check_robot,
    lock_path,
)

# -- statistics -----------------------------------------------------------------------------------


def test_histogram_against_numpy() -> None:
    values = np.random.default_rng(0).lognormal(-6, 1.5, 5000)
    histogram = Histogram()
    for value in values:
        histogram.add(float(value))
    quantiles = histogram.quantiles()
    assert quantiles.count == 5000
    for got, share in ((quantiles.p50, 0.5), (quantiles.p99, 0.99)):
        assert got == pytest.approx(
            1e3 * np.quantile(values, share, method="inverted_cdf"), rel=0.011
        )
    assert quantiles.max == pytest.approx(1e3 * values.max())


def test_histogram_at_its_ends() -> None:
    histogram = Histogram()
    assert histogram.quantiles().count == 0
    assert math.isnan(histogram.quantiles().p50)
    for value in (-1.0, 0.0, 1e-9, 5e4):
        histogram.add(value)
    quantiles = histogram.quantiles()
    assert quantiles.p50 <= 1e-3
    assert quantiles.max == 5e7


def _report(**changes: Any) -> LoopReport:
    some = Quantiles(3, 1.0, 2.0, 3.0)
    values: dict[str, Any] = {
        "hz": 10.0,
        "schedule": "async",
        "ticks": 200,
        "missed": 3,
        "seconds": 20.0,
        "jitter": some,
        "latency": some,
        "plans": 25,
        "stale_actions": 50,
        "seams": 24,
        "waited": 2,
        "held": 1,
        "interventions": {"out of bounds": 4, "too fast": 0},
        "stopped_by": "completed",
    }
    return LoopReport(**(values | changes))


def test_report_says_everything() -> None:
    text = str(_report())
    for part in ("10 Hz", "200, missed 3 (1.50 %)", "waited 2", "held 1", "p99 2.00 ms"):
        assert part in text
    assert "24 seams blended, 50 stale actions dropped" in text
    assert "out of bounds 4" in text
    assert "too fast" not in text
    assert text.endswith("completed")
    assert _report(ticks=0).missed_share == 0
    nothing = Quantiles(0, math.nan, math.nan, math.nan)
    assert "nan" not in str(_report(latency=nothing))


# -- LeRobot's dictionaries -----------------------------------------------------------------------


class Arm:
    """A robot as LeRobot has them."""

    name = "arm"
    fps = 30

    def __init__(self) -> None:
        self.action_features = {"a.pos": float, "b.pos": float}
        self.sent: list[dict[str, float]] = []
        self.is_connected = False
        self.observation: dict[str, Any] = {"a.pos": 1.5, "b.pos": np.float32(2), "cam": "image"}

    def connect(self) -> None:
        self.is_connected = True

    def disconnect(self) -> None:
        self.is_connected = False

    def get_observation(self) -> dict[str, Any]:
        return self.observation

    def send_action(self, action: dict[str, float]) -> dict[str, float]:
        self.sent.append(action)
        return action


def test_adapter() -> None:
    arm = Arm()
    robot = LeRobotAdapter(arm, observation={"state": ["b.pos", "a.pos"]})
    robot.connect()
    assert robot.is_connected
    assert robot.fps == 30
    assert robot.unwrapped is arm
    observation = robot.get_observation()
    assert observation["state"].tolist() == [2, 1.5]
    assert observation["cam"] == "image"
    assert set(observation) == {"state", "cam"}
    robot.send_action(np.array([0.5, 0.25], np.float32))
    assert arm.sent == [{"a.pos": 0.5, "b.pos": 0.25}]
    assert all(type(value) is float for value in arm.sent[0].values())
    robot.disconnect()
    assert not arm.is_connected
    with pytest.raises(AttributeError):
        _ = robot.stop


def test_adapter_renames_a_camera() -> None:
    """Policies of LeRobot data sets know cameras as ``images.<name>``, robots as ``<name>``."""
    joints = {"state": ["a.pos", "b.pos"], "images.top": "cam"}
    observation = LeRobotAdapter(Arm(), observation=joints).get_observation()
    assert observation["images.top"] == "image"
    assert set(observation) == {"state", "images.top"}


def test_adapter_and_what_it_refuses() -> None:
    arm = Arm()
    robot = LeRobotAdapter(arm, observation={"state": ["c.pos"]}, action=["a.pos"])
    with pytest.raises(ObservationError, match=r"no 'c.pos' for observation 'state'.*'a.pos'"):
        robot.get_observation()
    arm.observation["c.pos"] = "warm"
    with pytest.raises(ObservationError, match="'state' needs one number"):
        robot.get_observation()
    with pytest.raises(ValueError, match=r"shape \(2,\) for 1 names"):
        robot.send_action(np.zeros(2))
    with pytest.raises(ValueError, match=r"no names for the observations \['state'\]"):
        LeRobotAdapter(arm, observation={"state": []})
    robot = LeRobotAdapter(arm, observation={"images.top": "camera"})
    with pytest.raises(ObservationError, match=r"no 'camera' for observation 'images.top'.*'cam'"):
        robot.get_observation()
    with pytest.raises(ValueError, match="no names for the action"):
        LeRobotAdapter(object(), observation={"state": ["a"]})


# -- rates, shape, claim --------------------------------------------------------------------------


class _Rated:
    def __init__(self, **rates: Any) -> None:
        self.__dict__.update(rates)


@pytest.mark.parametrize(
    ("action", "words"),
    [
        (["a.pos", "a.pos"], "a name is given twice"),
        (["a.pos", "b"], r"\['b'\] are none of the robot's.*out of \['a.pos', 'b.pos'\]"),
        ("a.pos", "are none of the robot's"),
    ],
)
def test_adapter_refuses_names_by_which_a_motor_would_be_left_out(action: Any, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        LeRobotAdapter(Arm(), observation={"state": ["a.pos"]}, action=action)


def test_adapter_takes_names_that_are_nested() -> None:
    arm = Arm()
    arm.action_features = {"dtype": "float32", "shape": (2,), "names": {"x": 0, "y": 1}}  # type: ignore[assignment]
    robot = LeRobotAdapter(arm, observation={"state": ["a.pos"]})
    robot.send_action(np.array([1.0, 2.0], np.float32))
    assert arm.sent == [{"x": 1.0, "y": 2.0}]


def test_rates_must_match() -> None:
    check_rates(30, _Rated(fps=30), _Rated(control_hz=30.0))
    check_rates(29.97, _Rated(fps=30), _Rated())
    with pytest.raises(RateMismatchError, match=r"at 10 Hz, but _Rated.hz is 50.*hz=50"):
        check_rates(10, _Rated(hz=50), _Rated())
    with pytest.raises(RateMismatchError, match="control_hz is 20"):
        check_rates(10, _Rated(), _Rated(control_hz=20))
    for hz in (0, -1, math.inf, math.nan):
        with pytest.raises(ValueError, match="hz="):
            check_rates(hz, _Rated(), _Rated())


def test_a_robot_has_four_calls() -> None:
    check_robot(Arm())
    with pytest.raises(TypeError, match="no robot: it has no connect, get_observation"):
        check_robot(object())


def test_one_claim_per_robot() -> None:
    arm = Arm()
    claim = RobotLock(LeRobotAdapter(arm, observation={"state": ["a.pos"]}))
    with pytest.raises(RobotError, match="another control loop already drives this Arm"):
        RobotLock(arm)
    RobotLock(Arm()).release()  # another arm
    claim.release()
    claim.release()
    RobotLock(arm).release()


def test_a_named_robot_is_claimed_across_processes() -> None:
    arm = Arm()
    arm.id = f"test/{os.getpid()}"  # type: ignore[attr-defined]
    path = lock_path(f"Arm-{arm.id}")  # type: ignore[attr-defined]
    code = (
        "import fcntl, os, sys\n"
        f"file = os.open({str(path)!r}, os.O_RDWR | os.O_CREAT)\n"
        "fcntl.flock(file, fcntl.LOCK_EX)\nprint('taken', flush=True)\nsys.stdin.read()"
    )
    other = subprocess.Popen(
        [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    try:
        assert other.stdout is not None
        assert other.stdout.readline() == "taken\n"
        with pytest.raises(RobotError, match="another process already drives robot 'Arm-test/"):
            RobotLock(arm)
        with pytest.raises(RobotError, match="another process"):  # not: "another control loop"
            RobotLock(arm)
    finally:
        other.communicate()
    claim = RobotLock(arm)  # the operating system gave it back
    claim.release()
    path.unlink()


# -- ticks ----------------------------------------------------------------------------------------


def test_deadlines_are_absolute() -> None:
    metronome = Metronome(200.0)
    metronome.start()
    begin = time.monotonic()
    for tick in range(1, 21):
        assert metronome.wait(tick, lambda: False)
        now = time.monotonic()
        assert metronome.lateness(tick, now) >= 0
        assert metronome.elapsed(now) >= tick
        time.sleep(0.002)  # work of a tick, not added to the next
    # late by what the machine is late, never early
    assert time.monotonic() - begin >= 20 / 200


def test_waiting_ends_when_stopped() -> None:
    metronome = Metronome(0.001)
    metronome.start()
    asked = iter([False, False, True])
    assert not metronome.wait(1, lambda: next(asked))  # due in 1000 s
