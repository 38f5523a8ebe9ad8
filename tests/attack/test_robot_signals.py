"""Ctrl-C and SIGTERM reach the robot: real signals to a real process that drives one."""

import re
import signal
import subprocess
import sys
import threading

import pytest

WAIT = 300.0  # s: longer than anything takes, so that a hang fails instead of hanging

# A robot that tells what happens to it; {observe} and {after} are filled in.
_PROGRAM = """
import ctypes, sys, threading, time, signal
import numpy as np
from cmpolicy.robot import ControlLoop, SafetyLimits
from cmpolicy.spec import PolicySpec

def deadlock():
    # in C, where no signal ends it
    lock, mutex = ctypes.CDLL(None).pthread_mutex_lock, ctypes.create_string_buffer(64)
    lock(mutex), lock(mutex)

class Policy:
    spec = PolicySpec({{"x": (1,)}}, action_dim=1, horizon=4, n_obs_steps=1, n_action_steps=2)
    n_obs_steps, n_action_steps, noise_shape = 1, 2, (4, 1)
    def infer_plan(self, obs, noise=None):
        return np.zeros((1, 4, 1), np.float32)
    infer = infer_plan

class Robot:
    n, is_moving = 0, False
    def say(self, *words):
        print(*words, flush=True)
    def connect(self):
        self.say("connect")
    def get_observation(self):
        self.n += 1
        {observe}
        return {{"x": [0.0]}}
    def send_action(self, action):
        if self.n >= 5 and not self.is_moving:  # a late plan may miss the fifth
            self.is_moving = True
            self.say("moving")
    def stop(self):
        {stop}
        self.say("stop")
    def disconnect(self):
        {disconnect}
        self.say("disconnect")

before = signal.getsignal(signal.SIGINT)
try:
    with ControlLoop(Policy(), Robot(), hz=50, safety=SafetyLimits({limits})) as loop:
        report = loop.run()
        print("stopped by", report.stopped_by, flush=True)
        {after}
finally:
    print("restored", signal.getsignal(signal.SIGINT) is before, flush=True)
"""


def _start(
    observe: str = "pass",
    after: str = "pass",
    stop: str = "pass",
    disconnect: str = "pass",
    limits: str = "",
) -> subprocess.Popen[str]:
    code = _PROGRAM.format(
        observe=observe, after=after, stop=stop, disconnect=disconnect, limits=limits
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    watchdog = threading.Timer(WAIT, process.kill)
    watchdog.daemon = True
    watchdog.start()
    return process


def _until(process: subprocess.Popen[str], word: str) -> list[str]:
    assert process.stdout is not None
    lines: list[str] = []
    for line in process.stdout:
        lines.append(line.strip())
        if lines[-1] == word:
            return lines
    raise AssertionError(f"{word!r} did not come; {lines} {process.communicate()}")


def _finish(process: subprocess.Popen[str]) -> tuple[list[str], str]:
    """The lines that are left; communicate() would skip those that were read ahead."""
    assert process.stdout is not None
    assert process.stderr is not None
    out, err = process.stdout.read(), process.stderr.read()
    process.wait(WAIT)
    return out.split("\n")[:-1], err


@pytest.mark.parametrize(
    ("number", "disconnect"),
    [
        (signal.SIGINT, "pass"),
        (signal.SIGTERM, "pass"),
        (signal.SIGTERM, "time.sleep(2)"),  # the robot is at rest, and cameras take long to close
    ],
)
def test_the_first_signal_stops_the_run_in_order(number: signal.Signals, disconnect: str) -> None:
    process = _start(disconnect=disconnect)
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
    process = _start(
        observe="""if self.n == 8:
            self.say("hangs")
            while loop._signal is None: time.sleep(0.01)
            self.say("hangs on")
            time.sleep(60)"""
    )
    _until(process, "hangs")
    process.send_signal(number)  # asks; the call hangs on
    _until(process, "hangs on")
    process.send_signal(number)  # before the watchdog comes, a second after the first
    lines, err = _finish(process)
    assert lines == ["stop", "disconnect", "restored True"]
    assert process.returncode == status, err


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_one_signal_is_enough_for_a_robot_that_hangs(number: signal.Signals) -> None:
    """The watchdog stops the robot from outside, and interrupts the call after a second."""
    process = _start(observe="if self.n == 8: self.say('hangs'); time.sleep(60)")
    _until(process, "hangs")
    process.send_signal(number)
    lines, err = _finish(process)
    assert lines == ["stop", "stop", "disconnect", "restored True"]
    assert process.returncode == (143 if number == signal.SIGTERM else -signal.SIGINT), err
    found = re.search(r"get_observation\(\) has not returned for ([\d.]+) s", err)
    assert found, err
    assert float(found[1]) >= 1


def test_a_robot_stuck_in_a_driver_is_stopped_and_the_process_ended() -> None:
    """Neither signals nor exceptions reach a thread that is stuck in C."""
    process = _start(observe="if self.n == 8: self.say('hangs'); deadlock()")
    _until(process, "hangs")
    process.send_signal(signal.SIGTERM)
    lines, err = _finish(process)
    assert lines == ["stop", "stop", "disconnect"]  # at once, and again before the end
    assert process.returncode == 143, err
    assert "get_observation() cannot be interrupted" in err


def test_a_hanging_call_without_any_signal_is_named_and_ended() -> None:
    process = _start(
        observe="if self.n == 8: self.say('hangs'); time.sleep(60)", limits="max_call_seconds=0.3"
    )
    lines, err = _finish(process)
    assert lines[lines.index("hangs") + 1 :] == ["stop", "stop", "disconnect", "restored True"]
    assert process.returncode == 1
    assert "HungRobotError: the robot's get_observation() has not returned for" in err


def test_a_robot_can_refuse_to_be_stopped_from_another_thread() -> None:
    process = _start(
        observe="self.stop_from_any_thread = False\n        if self.n == 8: time.sleep(60)",
        limits="max_call_seconds=0.3",
    )
    lines, err = _finish(process)
    assert lines[-3:] == ["stop", "disconnect", "restored True"]
    assert "stop" not in lines[:-3]
    assert "Robot.stop_from_any_thread is False" in err


def test_a_stop_that_hangs_does_not_keep_the_robot_connected() -> None:
    process = _start(stop="self.say('stopping'); time.sleep(60)")
    _until(process, "moving")
    process.send_signal(signal.SIGINT)
    _until(process, "stopping")
    process.send_signal(signal.SIGINT)  # held: a stop is not cut short by the user
    lines, _ = _finish(process)
    assert lines[-2:] == ["disconnect", "restored True"]
    assert lines.count("stopping") == 1  # when leaving it is tried once more
    assert process.returncode != 0


def test_a_disconnect_that_hangs_is_named() -> None:
    process = _start(disconnect="time.sleep(60)")
    _until(process, "moving")
    process.send_signal(signal.SIGINT)
    lines, err = _finish(process)
    assert lines == ["stop", "stopped by SIGINT", "restored True"]
    assert "disconnect() has not returned for 3." in err
    assert "could not disconnect the robot: KeyboardInterrupt" in err
    assert process.returncode == -signal.SIGINT, err


def test_two_signals_while_leaving_a_run_that_hangs_in_another_thread() -> None:
    """The robot is stopped and disconnected all the same (hardening: 6 of 6 did not)."""
    process = _start(
        observe="if threading.current_thread().name == 'runner': self.say('hangs'); time.sleep(60)",
        after="""threading.Thread(target=loop.run, name="runner", daemon=True).start()
        time.sleep(0.3)
        print("leaving", flush=True)""",
    )
    lines = _until(process, "moving")
    process.send_signal(signal.SIGINT)
    assert "hangs" not in lines
    lines, err = _finish(process)
    assert "stop" in lines, err


def test_a_signal_outside_of_a_run_is_the_ordinary_one() -> None:
    process = _start(
        after="print('idle', flush=True); time.sleep(60)", observe="if self.n == 6: loop.stop()"
    )
    _until(process, "idle")
    process.send_signal(signal.SIGTERM)
    lines, err = _finish(process)
    assert lines == ["disconnect", "restored True"]
    assert process.returncode == 143, err


# -- an interruption at every line --------------------------------------------------------------

_ATTACK = """
import os, random, signal, sys, threading
import numpy as np
from cmpolicy.robot import ControlLoop, Synchronous, SafetyLimits
from cmpolicy.spec import PolicySpec
import cmpolicy.robot as package

FOLDER = os.path.dirname(package.__file__)
HERE = os.getpid()

class Policy:
    spec = PolicySpec({"x": (1,)}, action_dim=1, horizon=4, n_obs_steps=1, n_action_steps=2)
    n_obs_steps, n_action_steps, noise_shape = 1, 2, (4, 1)
    def infer_plan(self, obs, noise=None):
        return np.zeros((1, 4, 1), np.float32)
    infer = infer_plan

class Robot:
    id = f"attack-{HERE}"
    connected = moving = False
    def connect(self):
        self.connected = True
    def get_observation(self):
        return {"x": [0.0]}
    def send_action(self, action):
        self.moving = True
    def stop(self):
        self.moving = False
    def disconnect(self):
        self.connected = False

def session(at):
    '''One run with a signal at the given lines (of this thread, in cmpolicy.robot).'''
    robot, count, hits = Robot(), 0, {}

    def trace(frame, event, arg):
        nonlocal count
        if not frame.f_code.co_filename.startswith(FOLDER):
            return None
        where = (frame.f_code, frame.f_lineno)
        hits[where] = hits.get(where, 0) + 1
        if event == "line" and hits[where] <= 3:  # loops: the first three times
            count += 1
            if count in at:
                os.kill(HERE, signal.SIGINT)
                for _ in range(3): pass  # the handler runs here, as at this line
        return trace

    before = [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM, signal.SIGURG)]
    loop = ControlLoop(Policy(), robot, hz=1e6, schedule=Synchronous(), seed=0)
    sys.settrace(trace)
    try:
        with loop:
            loop.run(steps=3)
    except KeyboardInterrupt:
        pass
    finally:
        sys.settrace(None)
    after = [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM, signal.SIGURG)]
    wrong = []
    if robot.moving: wrong.append("moving")
    if robot.connected: wrong.append("connected")
    if before != after: wrong.append("handlers")
    try:
        with ControlLoop(Policy(), robot, hz=1e6):
            pass
    except Exception as error:
        wrong.append(f"lock: {error}")
    if any(t.name.startswith("cmpolicy") for t in threading.enumerate()): wrong.append("threads")
    return count, wrong

signal.signal(signal.SIGINT, signal.default_int_handler)
lines, wrong = session(())
assert not wrong, wrong
failures = 0
plans = [(k,) for k in range(1, lines + 1)]
rng = random.Random(0)
plans += [tuple(sorted(rng.sample(range(1, lines + 1), 2))) for _ in range(PAIRS)]
for plan in plans:
    count, wrong = session(plan)
    if wrong:
        failures += 1
        print(plan, wrong)
print(f"{lines} lines, {len(plans)} sessions, {failures} failures", flush=True)
"""


def test_an_interruption_at_every_line_ends_at_rest(attack_scale: int) -> None:
    """One signal at every line of a session, and two at random lines: stopped, disconnected, the
    handlers, the robot's lock and the threads given back.
    """
    pairs = 300 * min(attack_scale, 100)
    done = subprocess.run(
        [sys.executable, "-c", _ATTACK.replace("PAIRS", str(pairs))],
        capture_output=True,
        text=True,
        timeout=600 * attack_scale,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    last = done.stdout.splitlines()[-1]
    print(last)
    assert last.endswith(" 0 failures"), done.stdout
    assert int(last.split()[0]) > 150
