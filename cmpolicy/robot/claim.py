"""One loop per robot: within a process by the object, across processes by the robot's ``id``."""

from __future__ import annotations

import fcntl
import os
import re
import tempfile
import threading
from pathlib import Path

from cmpolicy.robot.robot import RobotError

_lock = threading.Lock()
# The objects are kept, so that an id() cannot be given to another meanwhile.
_taken: dict[int, object] = {}


class Claim:
    """The right to drive a robot, until :meth:`release`.

    Raises:
        RobotError: another loop has it.
    """

    def __init__(self, robot: object) -> None:
        self._robot = getattr(robot, "unwrapped", robot)
        self._file: int | None = None
        with _lock:
            if id(self._robot) in _taken:
                raise RobotError(
                    f"another control loop already drives this {type(self._robot).__name__}; end "
                    "it first (leave its `with` block)"
                )
            _taken[id(self._robot)] = self._robot
        try:
            name = getattr(self._robot, "id", None)
            if isinstance(name, str) and name:
                self._file = _lock_file(f"{type(self._robot).__name__}-{name}")
        except BaseException:
            self.release()
            raise

    def release(self) -> None:
        """Give the robot back; a second time does nothing."""
        with _lock:
            _taken.pop(id(self._robot), None)
        if self._file is not None:
            os.close(self._file)  # and with it the lock
            self._file = None


def lock_path(name: str) -> Path:
    """The lock file of a robot ``<type>-<id>``."""
    plain = re.sub(r"[^A-Za-z0-9._-]", "_", name)
    return Path(tempfile.gettempdir()) / f"cmpolicy-robot-{plain}.lock"


def _lock_file(name: str) -> int:
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
