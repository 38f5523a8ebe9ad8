"""What a robot is to the control loop: the calls of LeRobot's ``Robot``, with arrays.

Optional members that are honoured when present:

* ``stop()``: brings the robot to rest; called when a run ends, for whatever reason. While another
  call hangs it is called from another thread; a robot that cannot take that says
  ``stop_from_any_thread = False``;
* ``hz`` or ``fps``: the rate the robot is made for; another rate of the loop is an error;
* ``id``: its name on this machine; a second process cannot take the same robot meanwhile;
* ``is_connected``: where true, ``connect()`` is not called again.
"""

from __future__ import annotations

import fcntl
import math
import os
import re
import tempfile
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

from numpy.typing import NDArray

Array = NDArray[Any]


class RobotError(RuntimeError):
    """A robot that could not be taken, stopped or disconnected."""

    exit_status = 1


class RateMismatchError(ValueError):
    """Loop, robot and policy are made for different rates."""


class Robot(Protocol):
    """A robot, or a simulator in its place."""

    def connect(self) -> Any:
        """Open the connection."""
        ...

    def get_observation(self) -> Mapping[str, Any]:
        """The present observation: one step, (...) per key; may hold keys no policy wants."""
        ...

    def send_action(self, action: Array) -> Any:
        """Execute ``action`` (A,) float32 until the next one; returns at once."""
        ...

    def disconnect(self) -> Any:
        """Close the connection."""
        ...


def check_robot(robot: object) -> None:
    """Whether the object has the four calls.

    Raises:
        TypeError: names what it lacks.
    """
    names = ("connect", "get_observation", "send_action", "disconnect")
    missing = [name for name in names if not callable(getattr(robot, name, None))]
    if missing:
        raise TypeError(
            f"{type(robot).__name__} is no robot: it has no {', '.join(missing)}; expected "
            f"{', '.join(names)}, as LeRobot's Robot"
        )


def rate_of(policy: object) -> float:
    """Actions per second of the demonstrations that the policy was trained on.

    Raises:
        ValueError: the policy does not know it.
    """
    rate: float | None = getattr(policy, "control_hz", None)
    if rate is None:
        raise ValueError(
            f"{type(policy).__name__} does not know the rate of its demonstrations (control_hz): "
            "give the loop hz=, in actions per second"
        )
    return float(rate)


def check_rates(hz: float, robot: object, policy: object) -> None:
    """That the loop runs at the rate of robot (``hz``, ``fps``) and policy (``control_hz``).

    Raises:
        ValueError: ``hz`` is no rate.
        RateMismatchError: they differ by more than 1 %.
    """
    if not 0 < hz < math.inf:
        raise ValueError(f"hz={hz} must be a number above 0: actions per second")
    for owner, name in ((robot, "hz"), (robot, "fps"), (policy, "control_hz")):
        rate = getattr(owner, name, None)
        if rate is None or callable(rate):
            continue
        if not math.isclose(float(rate), hz, rel_tol=0.01):
            raise RateMismatchError(
                f"the loop would run at {hz:g} Hz, but {type(owner).__name__}.{name} is {rate:g}: "
                "the actions of a plan would be executed too fast or too slowly. Give the loop "
                f"hz={rate:g}, or a policy that was trained at the robot's rate"
            )


_registry_lock = threading.Lock()
# The objects are kept, so that an id() cannot be given to another meanwhile.
_taken: dict[int, object] = {}


class RobotLock:
    """The right to drive a robot, until :meth:`release`.

    Raises:
        RobotError: another loop has it.
    """

    def __init__(self, robot: object) -> None:
        self._robot = getattr(robot, "unwrapped", robot)
        self._file: int | None = None
        with _registry_lock:
            if id(self._robot) in _taken:
                raise RobotError(
                    f"another control loop already drives this {type(self._robot).__name__}; end "
                    "it first (leave its `with` block)"
                )
            _taken[id(self._robot)] = self._robot
        try:
            name = getattr(self._robot, "id", None)
            if isinstance(name, str) and name:
                self._file = _lock_by_name(f"{type(self._robot).__name__}-{name}")
        except BaseException:
            self.release()
            raise

    def release(self) -> None:
        """Give the robot back; a second time does nothing."""
        with _registry_lock:
            _taken.pop(id(self._robot), None)
        if self._file is not None:
            os.close(self._file)  # and with it the lock
            self._file = None


def lock_path(name: str) -> Path:
    """The lock file of a robot ``<type>-<id>``."""
    plain = re.sub(r"[^A-Za-z0-9._-]", "_", name)
    return Path(tempfile.gettempdir()) / f"cmpolicy-robot-{plain}.lock"


def _lock_by_name(name: str) -> int:
    """Take the lock that the operating system gives back when this process ends, however it does.

    The file stays: to remove it would let two processes lock two files of one name.
    """
    path = lock_path(name)
    try:
        file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o666)
    except PermissionError:  # another user's; reading is enough to lock
        file = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        os.close(file)
        raise RobotError(
            f"another process already drives robot {name!r} (it holds {path}); end it first"
        ) from error
    return file
