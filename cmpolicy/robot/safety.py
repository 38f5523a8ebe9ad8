"""What stands between a policy and a robot: limits on actions, every intervention counted."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cmpolicy.robot.rotations import rewritten
from cmpolicy.schema import at_least, positive
from cmpolicy.spec import Rotation

Array = NDArray[Any]
PerDimension = float | Sequence[float] | Array

OUT_OF_BOUNDS = "out of bounds"
TOO_FAST = "too fast"
NON_FINITE_ACTION = "non-finite action"
NON_FINITE_OBSERVATION = "non-finite observation"
STALE_OBSERVATION = "stale observation"
NO_PLAN = "no plan"
POLICY_UNAVAILABLE = "policy unavailable"
FROZEN_CAMERA = "frozen camera"

_ROUNDED_TURN = 0.01
"""Radians by which the bounds of an angle that turns freely may fall short of a whole turn: 3.14
stands for pi."""

INTERVENTIONS = (
    OUT_OF_BOUNDS,
    TOO_FAST,
    NON_FINITE_ACTION,
    NON_FINITE_OBSERVATION,
    STALE_OBSERVATION,
    NO_PLAN,
    POLICY_UNAVAILABLE,
    FROZEN_CAMERA,
)
"""Kinds of interventions, as they are counted and reported."""


@dataclass(frozen=True)
class SafetyLimits:
    """Limits in the robot's own units; a number stands for every dimension of the action.

    Args:
        low: least value of an action, (A,); None has none.
        high: largest value of an action, (A,); None has none.
        max_rate: largest change of an action per second, (A,); None has none. The first action of
            a run is compared with where the robot stands, if ``run(start=...)`` says so. A rotation
            goes the short way round, but an angle whose bounds leave out a part of the turn has
            stops there, and goes the long way.
        rest: the action that brings the robot to rest, (A,): zeros for velocities or other relative
            commands. None re-sends the last safe action, which is right for absolute targets.
        max_observation_age: seconds. When the newest good observation is older, the robot is held.
        max_misses: so many ticks in a row may pass without a usable action; one more ends the run.
        max_frozen: so many ticks in a row may bring the very same frame of a camera; one more ends
            the run, since a camera that works has noise. None for a simulator, which has none.
        max_call_seconds: seconds that a call of the robot (or of ``on_tick``) may take. After them
            the call is named in the log, the robot is stopped from another thread, and the run ends
            with an error: see :mod:`cmpolicy.robot.watchdog`.
        max_connect_seconds: likewise for ``connect``, which may home or calibrate the robot.

    Raises:
        ValueError: limits that contradict each other or are no numbers.
    """

    low: PerDimension | None = None
    high: PerDimension | None = None
    max_rate: PerDimension | None = None
    rest: PerDimension | None = None
    max_observation_age: float = 0.5
    max_misses: int = 10
    max_frozen: int | None = 100
    max_call_seconds: float = 5.0
    max_connect_seconds: float = 120.0

    def __post_init__(self) -> None:
        at_least("max_misses", self.max_misses, 0)
        if self.max_frozen is not None and self.max_frozen < 1:
            raise ValueError(f"max_frozen={self.max_frozen} must be at least 1 tick, or None")
        for name in ("max_observation_age", "max_call_seconds", "max_connect_seconds"):
            positive(name, getattr(self, name))


class SafetyFilter:
    """Applies limits to one action after the other and remembers the last safe one.

    Args:
        limits: what is safe.
        action_dim: A.
        period: seconds between two actions.
        start: the action that the robot stands at, (A,), e.g. its joint positions; None: unknown.
        rotations: of the action, which the rate counts the short way round.

    Raises:
        ValueError: a limit of another size than the action, no number, or impossible.
    """

    def __init__(
        self,
        limits: SafetyLimits,
        action_dim: int,
        period: float,
        start: PerDimension | None = None,
        rotations: tuple[Rotation, ...] = (),
    ) -> None:
        self._low = _inward(_vector("low", limits.low, action_dim, -math.inf), math.inf)
        self._high = _inward(_vector("high", limits.high, action_dim, math.inf), -math.inf)
        rate = _vector("max_rate", limits.max_rate, action_dim, math.inf)
        if (self._low > self._high).any():
            raise ValueError(f"safety limits: low={limits.low} lies above high={limits.high}")
        if (rate <= 0).any():
            raise ValueError(f"safety limits: max_rate={limits.max_rate} must be above 0")
        self._step = rate * period
        self._rotations = tuple(r for r in rotations if not self._has_stops(r))
        self._action_dim = action_dim
        self._bounded = bool(np.isfinite(self._low).any() or np.isfinite(self._high).any())
        self._rated = bool(np.isfinite(self._step).any())
        self._safe = np.zeros(action_dim)
        self._before = np.zeros(action_dim)
        self._rest = self._known("rest", limits.rest)
        stands_at = self._known("start", start)
        self._has_last = stands_at is not None
        if stands_at is not None:
            self._safe[...] = stands_at
        self.counts = dict.fromkeys(INTERVENTIONS, 0)

    @property
    def hold(self) -> Array | None:
        """The action that keeps the robot at rest, (A,) float32; None before any is known."""
        if self._rest is not None:
            return self._rest.astype(np.float32)
        return self._safe.astype(np.float32) if self._has_last else None

    def apply(self, action: Array) -> Array | None:
        """The nearest safe action, (A,) float32, the caller's own; None for one that is refused.

        Bounds come first, then the rate: within the bounds the robot moves no faster than allowed.
        An action is counted once per limit that changed it.

        Raises:
            ValueError: the action is not of shape (A,).
        """
        if action.shape != (self._action_dim,):
            raise ValueError(
                f"the policy gave an action of shape {action.shape}, expected ({self._action_dim},)"
            )
        if not np.isfinite(action).all():
            self.counts[NON_FINITE_ACTION] += 1
            return None
        safe, before = self._safe, self._before
        before[...] = safe
        safe[...] = action
        if self._bounded:
            np.clip(safe, self._low, self._high, out=safe)
            if (safe != action).any():
                self.counts[OUT_OF_BOUNDS] += 1
        if self._rated and self._has_last:
            self._slow_down(safe, before)
        self._has_last = True
        return safe.astype(np.float32)

    def _slow_down(self, safe: Array, before: Array) -> None:
        """Bring ``safe`` within one step of ``before``."""
        wanted = safe
        if self._rotations:  # -3.1 rad are near 3.1, and -q is q
            wanted = rewritten(safe[None], before[None], self._rotations, unit=False)[0]
        low, high = before - self._step, before + self._step
        if ((wanted >= low) & (wanted <= high)).all():
            return
        self.counts[TOO_FAST] += 1
        slow = np.clip(wanted, low, high)
        if self._rotations:
            described = rewritten(slow[None], safe[None], self._rotations, unit=False)[0]
            inside = (described >= self._low) & (described <= self._high)
            for rotation in self._rotations:  # as the policy does, where the bounds allow it
                dims = list(rotation.dims)
                if inside[dims].all():
                    slow[dims] = described[dims]
            slow = np.clip(slow, self._low, self._high)
        safe[...] = slow

    def _has_stops(self, rotation: Rotation) -> bool:
        """Whether an angle cannot turn on from one of its bounds to the other within a tick."""
        if rotation.kind != "angle":
            return False
        (dim,) = rotation.dims
        left_out = 2 * np.pi - (self._high[dim] - self._low[dim])
        return bool(left_out > min(self._step[dim], _ROUNDED_TURN))

    def rested(self) -> None:
        """The robot was sent ``rest``: the next action starts from there."""
        if self._rest is not None:
            self._safe[...] = self._rest
            self._has_last = True

    def count(self, kind: str) -> None:
        """One more intervention of that kind."""
        self.counts[kind] += 1

    def _known(self, name: str, value: PerDimension | None) -> Array | None:
        """A given action, checked against the bounds."""
        if value is None:
            return None
        vector = _vector(name, value, self._action_dim, 0.0)
        if not np.isfinite(vector).all():
            raise ValueError(f"safety limits: {name}={value} must be finite")
        inside = np.clip(vector, self._low, self._high)  # which are rounded to float32, inwards
        if not np.allclose(vector, inside, rtol=1e-6, atol=0):
            raise ValueError(
                f"safety limits: {name}={value} lies outside the bounds {self._low.tolist()} to "
                f"{self._high.tolist()}"
            )
        return inside


def _inward(bound: Array, towards: float) -> Array:
    """The bound as float32, in which actions are sent, rounded to the safe side."""
    with np.errstate(over="ignore"):
        rounded = bound.astype(np.float32)
    outside = (rounded > bound) if towards < 0 else (rounded < bound)
    moved = np.nextafter(rounded, np.float32(towards))
    return np.where(outside, moved, rounded).astype(np.float64)


def _vector(name: str, value: PerDimension | None, size: int, default: float) -> Array:
    if value is None:
        return np.full(size, default)
    vector = np.asarray(value, dtype=np.float64)
    if vector.shape not in ((), (size,)):
        raise ValueError(
            f"safety limits: {name} has shape {vector.shape}; expected one number, or {size}: one "
            "per dimension of the action"
        )
    if np.isnan(vector).any():
        raise ValueError(f"safety limits: {name}={value} holds NaN")
    return np.broadcast_to(vector, (size,)).copy()
