"""A scripted demonstrator of Push-T: it looks at the table ten times a second and moves its hand.

It plans one push at a time (`pushes.Search`), walks the hand around the block to the contact, and
pushes with steering corrections. What it does next follows from what it sees, not from chance: at
each step of a push the outcomes of a few steerings are simulated from the actual state, so pushes
that go astray are corrected. Its hand is a little unsteady, so that there is something to correct:
a policy learns from that how to recover.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import product

import numpy as np

from cmpolicy_data.generate.pushes import Push, Search, badness, push_on, push_speed
from cmpolicy_data.generate.route import route
from cmpolicy_data.generate.tee import Array, goal_distance
from cmpolicy_data.generate.world import State

# What steering chooses from: a change of heading now (rad), and a turn (rad per step) from here on.
_STEERINGS = (0.0, -0.18, 0.18)
_TURNS = (0.0, -0.07, 0.07)
_LOOK_AHEAD = 12  # steps
_PATIENCE = 0.004  # price of a step while pushing: low, for a contact is costly to make
_COMMITTED = 5  # steps of a push before it may be given up: the hand lags and has to arrive

_ACCELERATION = 3.0  # px per step, per step
_BRAKING = 1.6
_SIDEWAYS = 5.0  # px per step squared, limits the speed in bends
_TRAVEL_SPEED, _PUSH_SPEED = 15.0, 7.5  # px per step


class NoPushError(RuntimeError):
    """The demonstrator sees no push that it could make: block and walls leave no room."""


@dataclass(frozen=True)
class _Approach:
    """On the way to a push: what is left of the path (M, 2) px, and the speed to arrive with."""

    path: Array
    push: Push
    end_speed: float
    planned: int | None


@dataclass(frozen=True)
class _Contact:
    """Pushing, for `steps` steps already.

    `planned`: how many steps, of a push that is made for the sake of the next one; None for one
    that brings the block nearer to the goal, which ends when it no longer does.
    """

    push: Push
    steps: int
    planned: int | None


class Demonstrator:
    """One episode's demonstrator: call `act` with each new state for the agent's next target."""

    def __init__(self, rng: np.random.Generator) -> None:
        self._rng = rng
        self._tremor = rng.uniform(0.04, 0.12)  # unsteadiness of the hand, as a share of its speed
        self._search = Search(_PUSH_SPEED)
        self._doing: _Approach | _Contact | None = None
        self._target: Array | None = None
        self._speed = 0.0
        self._wobble = np.zeros(2)

    def act(self, state: State) -> Array:
        """The agent's next target (2,) px.

        Raises:
            NoPushError: block and walls leave no room for any push.
        """
        target = np.array([state.x, state.y]) if self._target is None else self._target
        if isinstance(self._doing, _Contact):
            self._doing = self._steer(self._doing, state, target)
        doing = self._plan(state) if self._doing is None else self._doing
        if isinstance(doing, _Approach):
            self._target, self._doing = self._walk(doing, target)
        else:
            self._target, self._doing = self._shove(doing, state, target)
        return self._target

    def _plan(self, state: State) -> _Approach:
        start = np.array([state.x, state.y])
        for outlook in self._search.best(state):
            push = outlook.push
            path = route(start, push.entry(), np.array([push.x, push.y]), state.block)
            if path is not None:
                speed = push_speed(goal_distance(state.block), _PUSH_SPEED)
                return _Approach(path, push, speed, outlook.push_steps if outlook.opens else None)
        raise NoPushError(f"No push can be made from {state}.")

    def _walk(self, doing: _Approach, target: Array) -> tuple[Array, _Approach | _Contact]:
        """A step along the path: gathers speed and brakes gently, slower in bends."""
        path = doing.path
        along = np.concatenate([[0.0], np.cumsum(np.linalg.norm(np.diff(path, axis=0), axis=1))])
        self._speed = max(
            2.0,
            doing.end_speed,
            min(
                self._speed + _ACCELERATION,
                _TRAVEL_SPEED,
                float(np.sqrt(_SIDEWAYS / (_bend(path) + 1e-3))),
                float(np.sqrt(doing.end_speed**2 + 2 * _BRAKING * along[-1])),
            ),
        )
        then: _Approach | _Contact
        if along[-1] <= self._speed:
            point = path[-1]
            then = _Contact(doing.push, 0, doing.planned)
        else:
            point = np.array([np.interp(self._speed, along, path[:, axis]) for axis in (0, 1)])
            rest = path[int(np.searchsorted(along, self._speed, side="right")) :]
            then = replace(doing, path=np.concatenate([point[None], rest]))
        # After a push the target is still ahead of the hand: bring it back without a jump.
        step = point + self._tremble(0.5) - target
        reach = max(1.6 * self._speed, 12.0)
        return target + step * min(1.0, reach / (float(np.linalg.norm(step)) + 1e-9)), then

    def _shove(self, doing: _Contact, state: State, target: Array) -> tuple[Array, _Contact]:
        """A step of the push."""
        push = doing.push
        self._speed = push_speed(goal_distance(state.block), _PUSH_SPEED)
        step = self._speed * np.array([np.cos(push.heading), np.sin(push.heading)])
        turned = push._replace(heading=push.heading + push.turn)
        return target + step + self._tremble(1.0), replace(
            doing, push=turned, steps=doing.steps + 1
        )

    def _steer(self, doing: _Contact, state: State, target: Array) -> _Contact | None:
        """How to push on; None where stopping now is best."""
        if doing.planned is not None:
            # Steering looks at this push alone, so it is of no help in a push made for the next.
            return doing if doing.steps < doing.planned else None
        world, old = self._search.world, doing.push
        best, choice = np.inf, old
        for turn, steer in product((old.turn, *_TURNS), _STEERINGS):
            push = old._replace(heading=old.heading + steer, turn=turn)
            world.set(state)
            prospect = push_on(world, push, target, _PUSH_SPEED, steps=_LOOK_AHEAD, price=_PATIENCE)
            value = prospect.value + 0.004 * abs(steer)
            if value < best:
                best, choice = value, push
        world.set(state)
        for _ in range(3):  # letting go: the hand comes to rest where it is
            block = world.step(state.x, state.y)
        if doing.steps >= _COMMITTED and best >= badness(goal_distance(block)):
            return None
        return replace(doing, push=choice)

    def _tremble(self, scale: float) -> Array:
        self._wobble = 0.7 * self._wobble + self._rng.normal(0.0, self._tremor, 2)
        return scale * self._speed * self._wobble


def _bend(path: Array) -> float:
    """Curvature in 1/px of the next stretch of a path."""
    step = np.diff(path[:6], axis=0)
    if len(step) < 2:
        return 0.0
    angle = np.unwrap(np.arctan2(step[:, 1], step[:, 0]))
    return float(abs(angle[-1] - angle[0]) / (np.linalg.norm(step, axis=1).sum() + 1e-9))
