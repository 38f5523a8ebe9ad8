"""Ticks by the monotonic clock, at absolute deadlines: a late tick does not delay the next."""

from __future__ import annotations

import time
from collections.abc import Callable

clock = time.monotonic
"""Seconds; never goes back, and is the same for all processes of a machine."""

_SPIN = 0.0005
"""Seconds before a deadline that are spent looking at the clock: a sleep overshoots by ~0.1 ms."""

_SLICE = 0.02
"""Longest sleep, seconds: so soon a request to stop is noticed."""


class Metronome:
    """Deadline k lies k / hz seconds after :meth:`start`."""

    def __init__(self, hz: float) -> None:
        self._period = 1 / hz
        self._begin = 0.0

    def start(self) -> None:
        """Tick 0 is now."""
        self._begin = clock()

    def elapsed(self, now: float) -> float:
        """Ticks since tick 0."""
        return (now - self._begin) / self._period

    def lateness(self, tick: int, now: float) -> float:
        """Seconds since the deadline of ``tick``."""
        return now - (self._begin + tick * self._period)

    def wait(self, tick: int, stopped: Callable[[], bool]) -> bool:
        """Return at the deadline of ``tick``, True; or soon after ``stopped()``, False."""
        deadline = self._begin + tick * self._period
        while True:
            if stopped():
                return False
            left = deadline - clock() - _SPIN
            if left <= 0:
                break
            time.sleep(min(left, _SLICE))
        while clock() < deadline:
            pass
        return True
