"""Ctrl-C and SIGTERM reach the robot: real signals to a real process that drives one."""

import os
import signal
import subprocess
import sys
from collections.abc import Iterator

import pytest

from cmpolicy.robot.signals import SignalGuard

# A robot that tells what happens to it; {observe} and {after} are filled in.
_PROGRAM = """
import sys, time, signal
import numpy as np
from cmpolicy.robot import ControlLoop, SafetyLimits
from cmpolicy.spec import PolicySpec

class Policy:
    spec = PolicySpec({{"x": (1,)}}, action_dim=1, horizon=4, n_obs_steps=1, n_action_steps=2)
    n_obs_steps, n_action_steps, noise_shape = 1, 2, (4, 1)
    def infer_plan(self, obs, noise=None):
        return np.zeros((1, 4, 1), np.float32)
    infer = infer_plan

class Robot:
    n = 0
    def say(self, *words):
        print(*words, flush=True)
    def connect(self):
        self.say("connect")
    def get_observation(self):
        self.n += 1
        {observe}
        return {{"x": [0.0]}}
    def send_action(self, action):
        if self.n == 5:
            self.say("moving")
    def stop(self):
        {stop}
        self.say("stop")
    def disconnect(self):
        self.say("disconnect")

before = signal.getsignal(signal.SIGINT)
try:
    with ControlLoop(Policy(), Robot(), hz=50) as loop:
        report = loop.run()
        print("stopped by", report.stopped_by, flush=True)
        {after}
finally:
    print("restored", signal.getsignal(signal.SIGINT) is before, flush=True)
"""


def _start(observe: str = "", after: str = "", stop: str = "") -> subprocess.Popen[str]:
    code = _PROGRAM.format(observe=observe or "pass", after=after or "pass", stop=stop or "pass")
    return subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def _until(process: subprocess.Popen[str], word: str) -> list[str]:
    assert process.stdout is not None
    lines: list[str] = []
    for line in process.stdout:
        lines.append(line.strip())
        if lines[-1] == word:
            return lines
    raise AssertionError(f"{word!r} did not come; {lines} {process.communicate()}")


def _finish(process: subprocess.Popen[str]) -> tuple[list[str], str]:
    out, err = process.communicate(timeout=30)
    return out.split("\n")[:-1], err


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_the_first_signal_stops_the_run_in_order(number: signal.Signals) -> None:
    process = _start()
    _until(process, "moving")
    process.send_signal(number)
    lines, err = _finish(process)
    assert lines == ["stop", f"stopped by {number.name}", "disconnect", "restored True"]
    assert process.returncode == 0, err


def test_a_loop_that_was_interrupted_does_not_start_again() -> None:
    process = _start(after="loop.run()")
    _until(process, "moving")
    process.send_signal(signal.SIGINT)
    lines, err = _finish(process)
    assert lines[-2:] == ["disconnect", "restored True"]
    assert "RuntimeError: the loop was stopped by SIGINT; it does not start again" in err


@pytest.mark.parametrize(
    ("number", "status"), [(signal.SIGINT, -signal.SIGINT), (signal.SIGTERM, 143)]
)
def test_a_second_signal_interrupts_a_robot_that_hangs(number: signal.Signals, status: int) -> None:
    process = _start(observe="if self.n == 8: self.say('hangs'); time.sleep(60)")
    _until(process, "hangs")
    process.send_signal(number)  # asks; the call hangs on
    with pytest.raises(subprocess.TimeoutExpired):
        process.wait(timeout=0.5)
    process.send_signal(number)
    lines, err = _finish(process)
    assert lines == ["stop", "disconnect", "restored True"]
    assert process.returncode == status, err


def test_a_stop_that_hangs_does_not_keep_the_robot_connected() -> None:
    process = _start(stop="self.say('stopping'); time.sleep(60)")
    _until(process, "moving")
    process.send_signal(signal.SIGINT)
    _until(process, "stopping")
    process.send_signal(signal.SIGINT)
    _until(process, "stopping")  # at the exit it is tried once more
    process.send_signal(signal.SIGINT)
    lines, _ = _finish(process)
    assert lines[-2:] == ["disconnect", "restored True"]
    assert process.returncode != 0


def test_a_signal_outside_of_a_run_is_the_ordinary_one() -> None:
    process = _start(
        after="print('idle', flush=True); time.sleep(60)", observe="if self.n == 6: loop.stop()"
    )
    _until(process, "idle")
    process.send_signal(signal.SIGTERM)
    lines, err = _finish(process)
    assert lines == ["disconnect", "restored True"]
    assert process.returncode == 143, err


# -- the handlers on their own --------------------------------------------------------------------


@pytest.fixture
def asked() -> list[str]:
    return []


@pytest.fixture
def guard(asked: list[str]) -> Iterator[SignalGuard]:
    # a job in the background starts with SIGINT ignored
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    guard = SignalGuard(lambda: True, asked.append)
    guard.install()
    yield guard
    guard.restore()
    signal.signal(signal.SIGINT, before)


def test_handlers_are_put_back(guard: SignalGuard, asked: list[str]) -> None:
    os.kill(os.getpid(), signal.SIGTERM)
    assert asked == ["SIGTERM"]
    guard.restore()
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    guard.restore()
    guard.install()  # a new start: the next signal is a first one again
    os.kill(os.getpid(), signal.SIGINT)
    assert asked == ["SIGTERM", "SIGINT"]
    with pytest.raises(KeyboardInterrupt):
        os.kill(os.getpid(), signal.SIGINT)
