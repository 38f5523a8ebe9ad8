"""Stopping a run between two steps when the user or the machine asks for it."""

from __future__ import annotations

import os
import signal
import threading
from types import FrameType


class StopRequest:
    """Within ``with``, SIGINT and SIGTERM only set :attr:`signum`; a second one stops at once.

    Outside the main thread, where Python allows no handlers, it does nothing. Worker processes that
    are forked meanwhile leave Ctrl-C to the run, and end on SIGTERM as usual.
    """

    SIGNALS = (signal.SIGINT, signal.SIGTERM)

    def __init__(self) -> None:
        self.signum: int | None = None
        self._before: dict[int, object] = {}
        self._owner = os.getpid()

    def __enter__(self) -> StopRequest:
        if threading.current_thread() is threading.main_thread():
            for number in self.SIGNALS:
                self._before[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)  # type: ignore[arg-type]
        self._before.clear()

    def _handle(self, signum: int, frame: FrameType | None) -> None:
        if os.getpid() != self._owner:
            if signum == signal.SIGTERM:
                signal.signal(signum, signal.SIG_DFL)
                os.kill(os.getpid(), signum)
            return
        if self.signum is not None:
            raise KeyboardInterrupt
        self.signum = signum
