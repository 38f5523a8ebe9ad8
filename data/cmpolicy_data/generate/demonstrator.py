"""A scripted demonstrator of Push-T: it looks at the table ten times a second and moves its hand.

It plans one push at a time (`pushes.Search`), walks the hand around the block to the contact, and
pushes with steering corrections. What it does next follows from what it sees: after each push step
the outcomes of a few steerings are simulated from the actual state, so that pushes that went
astray are corrected. Its hand is a little unsteady, so corrections are needed.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from .pushes import Push, Search, advance, badness, push_speed
from .route import route
from .tee import Array, goal_distance
from .world import State

_STEERINGS = (0.0, -0.12, 0.12, -0.3, 0.3)
_TURNS = (0.0, -0.07, 0.07)
_LOOK_AHEAD = 14
_PUSH_ON_PRICE = 0.004
_COMMITTED = 5


@dataclass(frozen=True)
class Style:
    """How one episode's demonstrator moves. Speeds in px per step."""

    travel_speed: float
    push_speed: float
    tremor: float  # standard deviation of the hand's unsteadiness, as a share of its speed
    taste: float  # noise on the choice among pushes

    @classmethod
    def draw(cls, rng: np.random.Generator) -> Style:
        return cls(
            travel_speed=rng.uniform(12.0, 18.0),
            push_speed=rng.uniform(6.0, 9.0),
            tremor=rng.uniform(0.04, 0.12),
            taste=rng.uniform(0.0, 0.12),
        )


class Demonstrator:
    """Call `act` with each new state; it gives the agent's next target."""

    def __init__(self, rng: np.random.Generator) -> None:
        self._rng = rng
        self.style = Style.draw(rng)
        self._search = Search(rng, self.style.push_speed)
        self._target: Array | None = None
        self._speed = 0.0
        self._wobble = np.zeros(2)
        self._path: Array | None = None
        self._push: Push | None = None
        self._pushed = 0
        self.pushes: list[Push] = []

    def act(self, state: State) -> Array:
        """The agent's next target (2,) px."""
        if self._target is None:
            self._target = np.array([state.x, state.y])
        if self._push is not None and self._path is None and not self._steer(state):
            self._push = None
        if self._push is None:
            self._plan(state)
        self._target = self._walk() if self._path is not None else self._shove(state)
        return self._target

    def _plan(self, state: State) -> None:
        start = np.array([state.x, state.y])
        for _ in range(20):
            outlook = self._search.best(state, taste=self.style.taste)
            if outlook is None:
                continue
            push = outlook.push
            path = route(start, push.entry(), np.array([push.x, push.y]), state.block)
            if path is not None:
                self._push, self._path, self._pushed = push, path, 0
                self._end_speed = push_speed(goal_distance(state.block), self.style.push_speed)
                self.pushes.append(push)
                return
        raise RuntimeError(f"no push can be made from {state}")

    def _walk(self) -> Array:
        """A step along the path: faster and slower gently, slower in bends and at the end."""
        assert self._path is not None and self._target is not None
        ahead = np.linalg.norm(np.diff(self._path, axis=0), axis=1)
        left = float(ahead.sum())
        limit = np.sqrt(self._end_speed**2 + 2 * 1.6 * left)
        turn = _bend(self._path)
        speed = min(self._speed + 3.0, self.style.travel_speed, limit, np.sqrt(5.0 / (turn + 1e-3)))
        self._speed = max(speed, self._end_speed, 2.0)
        if left <= self._speed:
            point = self._path[-1]
            self._path = None
        else:
            along = np.concatenate([[0.0], np.cumsum(ahead)])
            point = np.array([np.interp(self._speed, along, self._path[:, i]) for i in (0, 1)])
            rest = self._path[int(np.searchsorted(along, self._speed, side="right")) :]
            self._path = np.concatenate([point[None], rest])
        # The target follows the path without jumps: after a push it is still ahead of the hand.
        step = point + self._tremble(0.5) - self._target
        reach = max(1.6 * self._speed, 12.0)
        return self._target + step * min(1.0, reach / (np.linalg.norm(step) + 1e-9))

    def _shove(self, state: State) -> Array:
        """A step of the push."""
        assert self._push is not None and self._target is not None
        self._speed = push_speed(goal_distance(state.block), self.style.push_speed)
        self._pushed += 1
        heading = self._push.heading
        step = self._speed * np.array([np.cos(heading), np.sin(heading)])
        self._push = self._push._replace(heading=heading + self._push.turn)
        return self._target + step + self._tremble(1.0)

    def _steer(self, state: State) -> bool:
        """Choose how to push on; False where stopping now is best."""
        assert self._push is not None and self._target is not None
        world = self._search.world
        target = (float(self._target[0]), float(self._target[1]))
        best, choice = np.inf, self._push
        for turn in (self._push.turn, *_TURNS):
            for steer in _STEERINGS:
                world.set(state)
                heading = self._push.heading + steer
                value, *_ = advance(
                    world, target, heading, turn, self.style.push_speed, _LOOK_AHEAD, _PUSH_ON_PRICE
                )
                value += 0.004 * abs(steer)
                if value < best:
                    best, choice = value, self._push._replace(heading=heading, turn=turn)
        world.set(state)
        for _ in range(3):  # letting go: the hand comes to rest where it is
            block = world.step(state.x, state.y)
        self._push = choice
        return self._pushed < _COMMITTED or best < badness(goal_distance(block))

    def _tremble(self, scale: float) -> Array:
        self._wobble = 0.7 * self._wobble + self._rng.normal(0.0, self.style.tremor, 2)
        return scale * self._speed * self._wobble


def _bend(path: Array) -> float:
    """Curvature in 1/px of the next stretch of a path."""
    if len(path) < 3:
        return 0.0
    step = np.diff(path[:6], axis=0)
    angle = np.unwrap(np.arctan2(step[:, 1], step[:, 0]))
    return float(abs(angle[-1] - angle[0]) / (np.linalg.norm(step, axis=1).sum() + 1e-9))
