"""The Push-T simulator as a robot: a process of its own that lives in real time.

Nobody waits for anybody: the physics follows the wall clock in steps of 10 ms, the agent keeps
moving towards the last target that came, and observations are of the moment they are asked for.
Loads no torch: the robot's process imports it.
"""

from __future__ import annotations

import contextlib
import os
import select
import signal
import struct
import subprocess
import sys
import time
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cmpolicy_envs.pusht import PushTEnv
from cmpolicy_envs.pusht_states import dp_initial_state
from cmpolicy_envs.realtime_pusht import CONTROL_HZ, PHYSICS_HZ, advance

_OBSERVE, _ACT, _STOP = b"o", b"a", b"s"
_TARGET = struct.Struct("<2d")
# monotonic time, coverage, agent (2), keypoints (18), state (5)
_STATE = struct.Struct("<27d")
_START_TIMEOUT = 60.0
_REPLY_TIMEOUT = 2.0
_LOST_TIME = 0.5


class SimulatedPushT:
    """Push-T behind LeRobot's interface, at 10 Hz.

    Observations hold ``agent_pos`` (2,), ``keypoint`` (9, 2), and beside what policies know
    ``timestamp`` (seconds, ``time.monotonic``), ``coverage`` and ``state`` (5,).

    Args:
        seed: of the initial state, as in protocol ``pusht-dp``.
    """

    hz = float(CONTROL_HZ)

    def __init__(self, seed: int) -> None:
        self._seed = seed
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def is_connected(self) -> bool:
        """Whether its process runs."""
        return self._process is not None

    @property
    def start(self) -> NDArray[np.float64]:
        """The target at which the agent stands when the simulator starts, (2,) px."""
        return np.array(dp_initial_state(self._seed)[:2])

    def connect(self) -> None:
        """Start the process.

        Raises:
            ConnectionError: it did not come up.
        """
        environ = dict(os.environ)
        environ["PYTHONPATH"] = os.pathsep.join(p for p in sys.path if p)
        self._process = subprocess.Popen(
            [sys.executable, "-m", "cmpolicy_envs.simulated_robot", str(self._seed)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            bufsize=0,
            env=environ,
        )
        self._ask(_START_TIMEOUT)

    def get_observation(self) -> dict[str, Any]:
        """The present state.

        Raises:
            ConnectionError: the process is gone or does not answer.
        """
        values = self._ask(_REPLY_TIMEOUT)
        return {
            "timestamp": float(values[0]),
            "coverage": float(values[1]),
            "agent_pos": values[2:4],
            "keypoint": values[4:22].reshape(9, 2),
            "state": values[22:],
        }

    def send_action(self, action: NDArray[Any]) -> None:
        """Move towards ``action`` (2,) px from now on."""
        x, y = action.tolist()
        self._write(_ACT + _TARGET.pack(x, y))

    def stop(self) -> None:
        """Stay where the agent is."""
        self._write(_STOP)

    def disconnect(self) -> None:
        """End the process."""
        process, self._process = self._process, None
        if process is None:
            return
        for pipe in (process.stdin, process.stdout):
            if pipe is not None:
                with contextlib.suppress(BrokenPipeError):
                    pipe.close()
        try:
            process.wait(timeout=5)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()

    def _ask(self, timeout: float) -> NDArray[np.float64]:
        self._write(_OBSERVE)
        pipe = self._running().stdout
        if pipe is None:
            raise ConnectionError("the simulated robot has no pipe")
        deadline = time.monotonic() + timeout
        reply = b""
        while len(reply) < _STATE.size:
            left = max(0.0, deadline - time.monotonic())
            if not select.select([pipe], [], [], left)[0]:
                raise ConnectionError(f"the simulated robot gave no answer within {timeout:g} s")
            part = pipe.read(_STATE.size - len(reply))
            if not part:
                raise ConnectionError("the simulated robot's process has ended")
            reply += part
        return np.array(_STATE.unpack(reply))

    def _write(self, message: bytes) -> None:
        pipe = self._running().stdin
        if pipe is None:
            raise ConnectionError("the simulated robot has no pipe")
        pipe.write(message)  # a BrokenPipeError is a ConnectionError

    def _running(self) -> subprocess.Popen[bytes]:
        if self._process is None:
            raise ConnectionError("the simulated robot is not connected")
        return self._process


class _Simulator:
    """The other end: physics by the clock, requests as they come."""

    def __init__(self, seed: int) -> None:
        self._env = PushTEnv()
        self._observation, info = self._env.reset(
            seed=seed, options={"reset_to_state": dp_initial_state(seed)}
        )
        self._info: dict[str, Any] = info
        self._target = np.array(self._env.agent.position, dtype=np.float64)
        self._waiting = b""
        self._next = self._stamp = time.monotonic()

    def catch_up(self) -> float:
        """Physics up to now; seconds until the next step."""
        now = time.monotonic()
        if now - self._next > _LOST_TIME:  # suspended: what was missed is not lived through
            self._next = now
        while self._next <= now:
            self._observation, _, _, self._info = advance(self._env, self._target, 1)
            self._stamp = self._next
            self._next += 1 / PHYSICS_HZ
        return max(0.0, self._next - time.monotonic())

    def take(self, received: bytes) -> bytes:
        """Carry out what has arrived in full; the answers."""
        buffer, replies = self._waiting + received, b""
        while buffer:
            kind, size = buffer[:1], 1
            if kind == _OBSERVE:
                replies += self._state()
            elif kind == _STOP:
                self._target = np.array(self._env.agent.position, dtype=np.float64)
            elif kind == _ACT:
                size += _TARGET.size
                if len(buffer) < size:
                    break
                self._target = np.array(_TARGET.unpack(buffer[1:size]))
            else:
                raise ValueError(f"unknown message {kind!r}")
            buffer = buffer[size:]
        self._waiting = buffer
        return replies

    def _state(self) -> bytes:
        return _STATE.pack(
            self._stamp,
            self._info["coverage"],
            *self._observation["agent_pos"].tolist(),
            *self._observation["keypoint"].ravel().tolist(),
            *self._info["state"].tolist(),
        )


def main(argv: Sequence[str] | None = None) -> None:
    """The robot's process: lives until its standard input ends."""
    (seed,) = sys.argv[1:] if argv is None else argv
    # Ctrl-C goes to the whole group; the loop decides, and this process ends with its pipe.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    replies = os.dup(1)  # whatever else is printed goes to stderr
    os.dup2(2, 1)
    simulator = _Simulator(int(seed))
    with contextlib.suppress(BrokenPipeError):
        while True:
            wait = simulator.catch_up()
            if not select.select([0], [], [], wait)[0]:
                continue
            received = os.read(0, 4096)
            if not received:
                return
            simulator.catch_up()
            answer = simulator.take(received)
            if answer:
                os.write(replies, answer)


if __name__ == "__main__":
    main()
