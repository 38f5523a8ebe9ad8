"""SIGINT and SIGTERM while a loop drives a robot: first to a stop, then out."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable
from types import FrameType
from typing import NoReturn


class SignalGuard:
    """Turns the first SIGINT or SIGTERM of a run into a request, and raises on all others.

    A handler that raised at once could cut short the very calls that stop the robot; one that only
    ever asked could not interrupt a robot that hangs. So: while ``guarded()``, the first signal
    calls ``request`` with its name. A further one, or one at another time, raises
    ``KeyboardInterrupt`` (SIGTERM: ``SystemExit(143)``) wherever the program is.

    Outside of the main thread, where Python allows no handlers, nothing is installed.
    """

    SIGNALS = (signal.SIGINT, signal.SIGTERM)

    def __init__(self, guarded: Callable[[], bool], request: Callable[[str], None]) -> None:
        self._guarded = guarded
        self._request = request
        self._requested = False
        self._before: dict[int, object] = {}
        self._owner = os.getpid()

    def install(self) -> None:
        """Set the handlers."""
        self._requested = False
        if threading.current_thread() is threading.main_thread():
            for number in self.SIGNALS:
                self._before[number] = signal.signal(number, self._handle)

    def restore(self) -> None:
        """Put back the handlers that were there; a second time does nothing."""
        for number, handler in self._before.items():
            # None: it was not set from Python, and cannot be put back from there
            signal.signal(number, signal.SIG_DFL if handler is None else handler)  # type: ignore[arg-type]
        self._before.clear()

    def _handle(self, signum: int, frame: FrameType | None) -> None:
        if os.getpid() == self._owner and self._guarded() and not self._requested:
            self._requested = True
            self._request(signal.Signals(signum).name)
        else:
            raise_for(signal.Signals(signum).name)


def raise_for(name: str) -> NoReturn:
    """What the signal does to a program that does not guard against it."""
    if name == signal.SIGTERM.name:
        raise SystemExit(128 + signal.SIGTERM)
    raise KeyboardInterrupt
