"""A robot call that does not return, and signals: the robot comes to rest in either case.

Every call of the robot goes through :meth:`Watchdog.call`. A thread looks at the calls under way::

    call           limit without a signal       after SIGINT or SIGTERM
    connect        ``connect_limit``            1 s
    disconnect     ``limit``                    3 s, for the robot is at rest and cameras take long
    all others     ``limit``                    1 s
    the policy     none                         1 s

At its limit a call is named in the log, the robot is brought to rest from the watchdog's thread,
and the call is interrupted with :class:`HungRobotError` if it runs in the main thread and in Python
(a sleep, a socket). A call that cannot be interrupted (stuck in a driver) ends the process
5 s after the signal, with the robot stopped and disconnected from the watchdog's thread. So a
supervisor that sends SIGTERM, waits 10 s and sends SIGKILL does not leave a robot moving.
"""

from __future__ import annotations

import logging
import math
import os
import select
import signal
import threading
from collections.abc import Callable
from types import CodeType, FrameType
from typing import Any, NoReturn, TypeVar

from cmpolicy.robot.metronome import clock
from cmpolicy.robot.robot import RobotError

R = TypeVar("R")

_log = logging.getLogger(__name__)

_AFTER_SIGNAL = 1.0
"""Seconds that a call may take when a signal has asked for the end."""

_DISCONNECT_AFTER_SIGNAL = 3.0
"""The same of ``disconnect``."""

_FORCE = 5.0
"""Seconds after a signal at which a call that cannot be interrupted ends the process."""

_INTERVAL = 0.1
"""Seconds between two looks."""

_POKE = signal.SIGURG
"""Interrupts a call from the watchdog's thread: ignored by default, and used for little else."""

_ENDING = ("stop", "disconnect")
"""Calls that bring the robot to rest; a further signal does not cut them short."""


class HungRobotError(RobotError):
    """A call of the robot did not return in time; the message names it."""


class Watchdog:
    """Watches the calls of one robot.

    Args:
        limit: seconds that a call may take.
        connect_limit: seconds that ``connect`` may take.
        hung: called, in the watchdog's thread, with a text about the call.
        rest: brings the robot to rest; called in a thread of its own while another call hangs.
        disconnect: likewise, before the process is ended.
    """

    def __init__(
        self,
        *,
        limit: float,
        connect_limit: float,
        hung: Callable[[str], None],
        rest: Callable[[], object],
        disconnect: Callable[[], object],
    ) -> None:
        self._limits = {"connect": connect_limit, "policy": math.inf}
        self._limit = limit
        self._hung = hung
        self._rest = rest
        self._disconnect = disconnect
        self._calls: dict[int, tuple[str, float]] = {}  # by thread: name, and since when
        self._signalled_at = math.inf
        self._signal = 0
        self._main = threading.main_thread().ident
        self._pipe: tuple[int, int] | None = None
        self._thread: threading.Thread | None = None
        self._guard: SignalGuard | None = None

    def call(self, name: str, function: Callable[..., R], *args: Any) -> R:
        """``function(*args)``, watched.

        Args:
            name: of the call, for messages.
            function: of the robot.
            args: its arguments.

        Raises:
            HungRobotError: it did not return in time, and could be interrupted.
        """
        me = threading.get_ident()
        try:
            self._calls[me] = (name, clock())
            return function(*args)
        finally:
            self._calls.pop(me, None)

    def start(self, guard: SignalGuard) -> None:
        """Start to look; ``guard`` wakes it and interrupts calls in the main thread."""
        self._guard = guard
        self._signalled_at, self._signal = math.inf, 0
        self._calls.clear()
        self._pipe = os.pipe()
        for end in self._pipe:
            os.set_blocking(end, False)
        guard.wake_by(self._pipe[1])
        self._thread = threading.Thread(
            target=self._watch, args=(self._pipe[0],), name="cmpolicy-watchdog", daemon=True
        )
        self._thread.start()

    def close(self) -> None:
        """Stop to look."""
        pipe, self._pipe = self._pipe, None
        thread, self._thread = self._thread, None
        if pipe is None or thread is None:
            return
        if self._guard is not None:
            self._guard.wake_by(-1)
        os.write(pipe[1], b"\0")
        thread.join(_AFTER_SIGNAL)
        for end in pipe:
            os.close(end)

    def _watch(self, pipe: int) -> None:
        answered: dict[int, tuple[str, float]] = {}  # by thread: several may hang
        while True:
            ready, _, _ = select.select([pipe], [], [], _INTERVAL)
            for number in os.read(pipe, 64) if ready else b"":
                if number == 0:
                    return
                if number in SignalGuard.SIGNALS and self._signal == 0:
                    self._signal, self._signalled_at = number, clock()
                if self._guard is not None:
                    self._guard.forward(number)
            now = clock()
            for ident, call in list(self._calls.items()):
                name, since = call
                limit = self._limits.get(name, self._limit)
                taken = now - since
                after = now - max(since, self._signalled_at)
                patience = _DISCONNECT_AFTER_SIGNAL if name == "disconnect" else _AFTER_SIGNAL
                if answered.get(ident) != call and (taken > limit or after > patience):
                    answered[ident] = call
                    self._answer(ident, name, taken)
                elif after > _FORCE and ident == self._main:
                    self._end_process(name)

    def _answer(self, ident: int, name: str, taken: float) -> None:
        text = f"the robot's {name}() has not returned for {taken:.1f} s"
        if name == "policy":
            text = f"the policy has not returned for {taken:.1f} s"
        elif name == "on_tick":
            text = f"on_tick has not returned for {taken:.1f} s"
        _log.error("%s; the robot is stopped from another thread", text)
        self._hung(text)
        if name not in ("connect", *_ENDING):
            _in_thread(self._rest)
        if self._guard is not None and ident == self._main:
            self._guard.interrupt(text)

    def _end_process(self, name: str) -> None:
        _log.critical(
            "%s() cannot be interrupted; the robot is stopped and disconnected from another "
            "thread, and this process ends",
            name,
        )
        _in_thread(self._rest)
        _in_thread(self._disconnect)
        logging.shutdown()
        os._exit(128 + self._signal)


def _in_thread(function: Callable[[], object]) -> None:
    """Call it in a thread that nobody waits for longer than a second: it may hang, too."""

    def run() -> None:
        try:
            function()
        except BaseException as error:
            _log.error("it failed: %r", error)

    thread = threading.Thread(target=run, name="cmpolicy-stop", daemon=True)
    thread.start()
    thread.join(_AFTER_SIGNAL)


class SignalGuard:
    """Holds SIGINT and SIGTERM while a loop connects, runs or leaves, and counts them.

    A handler that raised there could cut short the very calls that stop the robot. So a signal
    inside of the methods ``guarded`` of ``owner`` calls ``request`` with its name and nothing else;
    a further one also interrupts a call of the robot or the policy, but never ``stop`` and
    ``disconnect``. In the user's own code between two runs a signal has its usual effect, and the
    ``with`` block is left by it. Outside of the main thread, where Python allows no handlers,
    nothing is installed.

    Args:
        owner: whose methods are guarded.
        guarded: their code.
        request: called with the name of a signal.
    """

    SIGNALS = (signal.SIGINT, signal.SIGTERM)

    def __init__(
        self, owner: object, guarded: tuple[CodeType, ...], request: Callable[[str], None]
    ) -> None:
        self._owner = owner
        self._guarded = guarded
        self._request = request
        self._count = 0
        self._name = ""
        self._hung: str | None = None
        self._before: dict[int, Any] = {}
        self._is_active = False
        self._wakeup = -1  # of others, forwarded to
        self._woken = False
        self._pid = os.getpid()

    def install(self) -> None:
        self._count, self._hung, self._name = 0, None, ""
        self._pid = os.getpid()
        if threading.current_thread() is not threading.main_thread():
            return
        self._is_active = True
        for number in (*self.SIGNALS, _POKE):
            self._before[number] = signal.getsignal(number)
            signal.signal(number, self._handle)

    def restore(self) -> None:
        """Put back the handlers that were there; a second time does nothing."""
        # Held until the last of them: then a signal has the effect it had before.
        try:
            self._put_back(_POKE)
        finally:
            try:
                self._put_back(signal.SIGTERM)
            finally:
                self._put_back(signal.SIGINT)
                self._is_active = False

    def _put_back(self, number: int) -> None:
        if number in self._before:
            handler = self._before[number]
            # None: it was not set from Python, and cannot be put back from there
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
            del self._before[number]

    def wake_by(self, file: int) -> None:
        """Let every signal write its number into ``file`` at once; -1 gives that up.

        Python's own handlers wait for the main thread, which may be stuck in a driver.
        """
        if not self._is_active:
            return
        if file >= 0:
            self._wakeup = signal.set_wakeup_fd(file, warn_on_full_buffer=False)
            self._woken = True
        elif self._woken:
            signal.set_wakeup_fd(self._wakeup)
            self._wakeup, self._woken = -1, False

    def forward(self, number: int) -> None:
        """Hand a signal's number on to who was woken before (asyncio, for one)."""
        if self._wakeup >= 0:
            try:
                os.write(self._wakeup, bytes([number]))
            except OSError:
                _log.debug("nobody waits for signals any more")

    def interrupt(self, text: str) -> None:
        """Interrupt the call under way in the main thread."""
        main = threading.main_thread().ident
        if self._is_active and main is not None:
            self._hung = text
            signal.pthread_kill(main, _POKE)

    def _handle(self, signum: int, frame: FrameType | None) -> None:
        if not self._is_active or os.getpid() != self._pid:
            self._as_before(signum, frame)
            return
        if signum == _POKE:
            text, self._hung = self._hung, None
            if text is None or self._call(frame) is None:
                return
            if self._name:
                raise_for(self._name)
            raise HungRobotError(text)
        name = signal.Signals(signum).name
        if not self._is_guarded(frame):
            raise_for(name)
        self._count += 1
        self._name = name
        self._request(name)
        if self._count > 1 and self._call(frame) not in (None, *_ENDING):
            raise_for(name)

    def _as_before(self, signum: int, frame: FrameType | None) -> None:
        before = self._before.get(signum)
        if callable(before):
            before(signum, frame)
        elif signum != _POKE and before != signal.SIG_IGN:
            raise_for(signal.Signals(signum).name)

    def _is_guarded(self, frame: FrameType | None) -> bool:
        """Whether the program is inside of the guarded methods.

        The stack says so itself: a flag would be set and cleared a line too late.
        """
        while frame is not None:
            if frame.f_code in self._guarded and frame.f_locals.get("self") is self._owner:
                return True
            frame = frame.f_back
        return False

    def _call(self, frame: FrameType | None) -> str | None:
        """Name of the watched call under way in this thread, if there is one."""
        while frame is not None:
            if frame.f_code is Watchdog.call.__code__:
                name = frame.f_locals.get("name")
                return name if isinstance(name, str) else None
            frame = frame.f_back
        return None


def raise_for(name: str) -> NoReturn:
    """What the signal does to a program that does not guard against it."""
    if name == signal.SIGTERM.name:
        raise SystemExit(128 + signal.SIGTERM)
    raise KeyboardInterrupt
