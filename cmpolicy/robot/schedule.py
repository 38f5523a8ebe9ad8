"""When to infer and which action to send: pure logic in ticks, without clock or threads.

A control loop sends one action per tick. An inference that starts on the observation of tick k
plans P actions, for ticks k to k + P - 1, and arrives d ticks later. Two ways to go on::

    tick           0    1    2    3    4    5    6    7    8    9    10   11

    Synchronous    o..........a0   a1   a2   a3   o.........a0   a1   a2        the loop waits
    Asynchronous   o..........a2   a3   a4   a5 + a6                            first plan
                                        o........(b2 + b3)  b4   b5 + b6        second plan
                                                            o.........(c2 ...   third plan

with Ta = 4, P = 7, d = 2.

``Synchronous`` is what a plain ``while True: act(infer(observe()))`` does: nothing is sent while
the network runs, and then actions that were meant for d ticks earlier. ``Asynchronous`` starts the
next inference while the present plan still holds actions, and takes an arriving plan by its
timestamps: a0 and a1 were for ticks that are over, so they are dropped.

The seam (+ above). Two plans disagree where they overlap: the newer one has seen more, and it was
drawn from other noise. A switch in one tick is a jerk, so the first ``blend`` ticks of the new plan
are mixed with what the old plan had for the same ticks, with weights rising linearly. Samplers of
many steps can instead be guided, step by step, to agree with the actions already committed
(inpainting, real-time chunking); a one-step map has no denoising loop to guide.

What a one-step map allows instead was tried on Push-T at 200 ms (150 tuning seeds; score .980
without a seam): keeping one noise for all plans of an episode (.85 to .88: a bad noise stays bad),
shifting the noise along with time (.978), and drawing eight plans in one batch to take the one
nearest to what is committed (.966 to .978, at several times the work). None scores above fresh
noise with a blend (.979), nor do blends of 1, 2 or 5 ticks differ from it by more than chance
(standard error .007). What the blend is for is smoothness: it takes 30 % off the second differences
of the actions (root mean square).
"""

from __future__ import annotations

import logging
import math
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from cmpolicy.robot.rotations import rewritten
from cmpolicy.schema import at_least
from cmpolicy.spec import Rotation

Array = NDArray[Any]

_log = logging.getLogger(__name__)

LATENCY_WINDOW = 64
"""Latest latencies that the estimate looks at."""


@dataclass(frozen=True)
class Window:
    """What a schedule has to know: P planned actions, Ta of them executed, A numbers each.

    ``rotations`` are those of the action (:attr:`~cmpolicy.spec.PolicySpec.action_rotations`); None
    where nothing is known about it.
    """

    n_plan_steps: int
    n_action_steps: int
    action_dim: int
    rotations: tuple[Rotation, ...] | None = ()

    def mix(self, old: Array, new: Array, share: Array) -> Array:
        """Actions between those of two plans: ``old`` where ``share`` is 0, ``new`` where it is 1.

        Numbers are mixed linearly. A rotation has several descriptions, so the new one is first
        written in the way that is nearest to the old one, and the result in the way of the new one:
        3.13 and -3.13 rad meet at pi, not at 0. 6D rotations need no such care; the two columns are
        made orthonormal by whoever reads them.

        Args:
            old: (n, A).
            new: (n, A).
            share: (n, 1) or a number, in [0, 1].

        Returns:
            (n, A).
        """
        near = rewritten(new, old, self.rotations or ())
        return rewritten(old + share * (near - old), new, self.rotations or ())


class Planner(Protocol):
    """State of a schedule during one episode. Ticks never decrease from call to call."""

    stale: int
    """Actions dropped because their tick was over."""
    seams: int
    """Plans blended into a predecessor."""

    @property
    def lead(self) -> int:
        """Ticks reserved for one inference."""
        ...

    def measured(self, latency: float) -> None:
        """An inference took ``latency`` ticks, from its observation to its plan."""
        ...

    def due(self, tick: int) -> bool:
        """Whether an inference has to start on the observation of this tick."""
        ...

    def begin(self, tick: int) -> None:
        """An inference starts on the observation of ``tick``."""
        ...

    def arrive(self, tick: int, plan: Array) -> None:
        """At ``tick``, before its action is chosen, the plan (P, A) that was begun is there."""
        ...

    def fail(self) -> None:
        """The inference under way ended without a plan."""
        ...

    def choose(self, tick: int) -> Array | None:
        """The action (A,) of this tick, a view; None where no plan reaches."""
        ...

    def upcoming(self, tick: int) -> Array:
        """What is planned from this tick on, (n, A), a view."""
        ...

    def running(self, tick: int) -> tuple[Array, int] | None:
        """The newest plan (P, A), a view, and how many of its steps are over; None before one."""
        ...

    def taken_at(self, ready: float) -> float:
        """When the loop takes a plan that is there at ``ready``; both in ticks since tick 0."""
        ...

    def next_tick(self, tick: int, elapsed: float) -> int:
        """The tick after ``tick`` to run, when ``elapsed`` ticks have passed since tick 0."""
        ...


@dataclass(frozen=True)
class Synchronous:
    """The loop waits for every plan and executes its first Ta actions."""

    name = "sync"

    def planner(self, window: Window) -> SyncPlanner:
        """State for one episode."""
        return SyncPlanner(window)


@dataclass(frozen=True)
class Asynchronous:
    """The loop never waits: see the module.

    Args:
        every: ticks between the observations of two plans; None takes the policy's Ta. It is
            shortened where the latency would otherwise leave a gap.
        blend: ticks of a seam over which the new plan fades in; 0 switches at once.
        quantile: of the latest latencies, in (0, 1], which an inference is expected to take.
        margin: ticks added to it.

    Raises:
        ValueError: a number outside its range.
    """

    every: int | None = None
    blend: int = 3
    quantile: float = 0.99
    margin: float = 0.5

    name = "async"

    def __post_init__(self) -> None:
        at_least("every", self.every, 1)
        at_least("blend", self.blend, 0)
        if not 0 < self.quantile <= 1:
            raise ValueError(f"quantile={self.quantile} must be in (0, 1]")
        if not 0 <= self.margin < math.inf:
            raise ValueError(f"margin={self.margin} must be a number of ticks, at least 0")

    def planner(self, window: Window) -> AsyncPlanner:
        """State for one episode."""
        return AsyncPlanner(self, window)


Schedule = Synchronous | Asynchronous


class SyncPlanner:
    """Executes Ta actions in their order, from whenever the plan arrived."""

    def __init__(self, window: Window) -> None:
        self.stale = self.seams = 0
        self._plan = np.zeros((window.n_plan_steps, window.action_dim), np.float32)
        self._actions = self._plan[: window.n_action_steps]
        self._cursor = len(self._actions)
        self._is_first = True
        self._busy = False

    @property
    def lead(self) -> int:
        """Nothing is reserved: the loop waits."""
        return 0

    def measured(self, latency: float) -> None:
        """Of no use here."""

    def due(self, tick: int) -> bool:
        """When the last action of the plan has been sent."""
        return not self._busy and self._cursor >= len(self._actions)

    def begin(self, tick: int) -> None:
        self._busy = True

    def arrive(self, tick: int, plan: Array) -> None:
        """Start the plan at its first action; what is beyond Ta is left."""
        self._busy = self._is_first = False
        self._plan[...] = plan
        self._cursor = 0

    def fail(self) -> None:
        self._busy = False

    def choose(self, tick: int) -> Array | None:
        if self._cursor >= len(self._actions):
            return None
        action: Array = self._actions[self._cursor]
        self._cursor += 1
        return action

    def upcoming(self, tick: int) -> Array:
        """Actions not sent yet."""
        return self._actions[self._cursor :]

    def running(self, tick: int) -> tuple[Array, int] | None:
        """Its steps pass when they are sent, not while the loop waits."""
        return None if self._is_first else (self._plan, self._cursor)

    def taken_at(self, ready: float) -> float:
        """At once, also between two ticks."""
        return ready

    def next_tick(self, tick: int, elapsed: float) -> int:
        """The first one that is not over: an action stands for a whole tick at least."""
        return max(tick + 1, math.floor(elapsed) + 1)


class AsyncPlanner:
    """Keeps a timeline of actions by tick, into which plans are merged as they arrive."""

    def __init__(self, settings: Asynchronous, window: Window) -> None:
        self.stale = self.seams = 0
        self._every = settings.every or window.n_action_steps
        self._margin = settings.margin
        self._size = window.n_plan_steps
        self._latency = LatencyQuantile(settings.quantile)
        # fade[n] (n, 1): weight of the new plan on the n ticks of a seam
        self._fade = [
            (np.arange(1, n + 1, dtype=np.float32) / (n + 1))[:, None]
            for n in range(settings.blend + 1)
        ]
        if window.rotations is None and settings.blend:
            self._fade = self._fade[:1]
            _log.info(
                "plans are not blended: the policy does not say which action dimensions are "
                "rotations, which must not be averaged (data.action_rotations, [] where none is)"
            )
        self._mix = window.mix
        self._actions = np.zeros((self._size, window.action_dim), np.float32)
        self._spare = np.zeros_like(self._actions)
        self._origin = 0  # tick of row 0
        self._end = 0  # first tick after the last row; nothing is planned yet
        self._begun: int | None = None  # tick of the observation of the newest plan
        self._busy = False

    @property
    def lead(self) -> int:
        """Ticks that the next inference is expected to take at most."""
        return math.ceil(self._latency.value + self._margin)

    def measured(self, latency: float) -> None:
        self._latency.add(latency)

    def due(self, tick: int) -> bool:
        """``every`` ticks after the last observation, or sooner to be there in time."""
        if self._busy:
            return False
        if self._begun is None or tick >= self._end:
            return True
        # The plan reaches from begun to begun + P - 1; the next must arrive by begun + P.
        return tick - self._begun >= min(self._every, self._size - self.lead)

    def begin(self, tick: int) -> None:
        self._busy = True
        self._begun = tick

    def arrive(self, tick: int, plan: Array) -> None:
        """Merge the plan: what is stale is dropped, the seam is blended."""
        if self._begun is None:
            raise RuntimeError("a plan arrived that was never begun")
        self._busy = False
        passed = min(tick - self._begun, self._size)
        self.stale += passed
        if passed == self._size:
            return
        merged = self._spare
        merged[...] = plan
        n = min(self._end - tick, len(self._fade) - 1, self._size - passed)
        if n > 0:
            new = merged[passed : passed + n]
            old = self._actions[tick - self._origin : tick - self._origin + n]
            new[...] = self._mix(old, new, self._fade[n])
            self.seams += 1
        self._spare, self._actions = self._actions, merged
        self._origin, self._end = self._begun, self._begun + self._size

    def fail(self) -> None:
        """The next tick tries again."""
        self._busy = False
        self._begun = None

    def choose(self, tick: int) -> Array | None:
        """The action that was planned for this very tick."""
        return self._actions[tick - self._origin] if self._reaches(tick) else None

    def upcoming(self, tick: int) -> Array:
        """Rows from this tick on."""
        start = tick - self._origin if self._reaches(tick) else self._size
        return self._actions[start:]

    def running(self, tick: int) -> tuple[Array, int] | None:
        """As blended: what the robot really follows."""
        return None if self._end == 0 else (self._actions, tick - self._origin)

    def taken_at(self, ready: float) -> float:
        """On the next tick."""
        return math.ceil(ready)

    def next_tick(self, tick: int, elapsed: float) -> int:
        """The nearest one: a little late is run late, an action half over is skipped."""
        return max(tick + 1, math.floor(elapsed + 0.5))

    def _reaches(self, tick: int) -> bool:
        return self._origin <= tick < self._end


class LatencyQuantile:
    """High quantile of the latest ``LATENCY_WINDOW`` latencies (rounded up to one of them)."""

    def __init__(self, quantile: float) -> None:
        self._quantile = quantile
        self._ring = [0.0] * LATENCY_WINDOW
        self._count = 0
        self.value = 0.0
        """In the unit of what was added; 0 before the first."""

    def add(self, latency: float) -> None:
        """Take one measurement in.

        Raises:
            ValueError: it is negative or not finite.
        """
        if not 0 <= latency < math.inf:
            raise ValueError(f"a latency must be a finite number of at least 0, got {latency}")
        self._ring[self._count % LATENCY_WINDOW] = latency
        self._count += 1
        kept = sorted(self._ring[: self._count])
        self.value = kept[math.ceil(self._quantile * len(kept)) - 1]
