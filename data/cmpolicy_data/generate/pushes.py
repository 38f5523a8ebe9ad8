"""Finding pushes: candidate contacts around the block, each tried in the simulated world."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from itertools import product
from typing import NamedTuple

import numpy as np

from cmpolicy_data.generate.route import clearance, inside_walls, lengths
from cmpolicy_data.generate.tee import AGENT_RADIUS, Array, Pose, Ring, goal_distance, outline_at
from cmpolicy_data.generate.world import LAG_STEPS, STEP_SECONDS, State, World

_CONTACT = Ring(AGENT_RADIUS + 2.0)
STAND_OFF = 22.0  # px from the contact back to where a push's straight entry begins
STEP_PRICE = 0.03  # of a control step, in units of log distance to the goal
_TRAVEL_STEP, _TRAVEL_EXTRA = 11.0, 4.0  # px per step on the way, steps for stopping and turning
_MAX_PUSH = 32
_OPENINGS, _OPENING_STEPS = 16, 12
_PLACES, _HEADINGS = 48, (-0.35, 0.0, 0.35)  # contacts around the block, angles to its side, rad
_SIDES, _TURNS = ((-4.0, 0.0, 4.0), (-0.12, 0.0, 0.12)), (-0.05, 0.05)  # px, rad; rad per step
_LOW, _HIGH = 12.0, 500.0  # where targets may be, px: inside the walls


class Push(NamedTuple):
    """A push: where the agent's centre starts (px, plane), its heading, turn in rad per step."""

    x: float
    y: float
    heading: float
    turn: float

    def entry(self) -> Array:
        """Where the straight entry to the contact begins, px (2,)."""
        cos, sin = np.cos(self.heading), np.sin(self.heading)
        return np.array([self.x - STAND_OFF * cos, self.y - STAND_OFF * sin])


class Prospect(NamedTuple):
    """The best moment of a simulated push: its value (lower is better), when, and the state."""

    value: float
    steps: int
    end: State


@dataclass(frozen=True)
class Outlook:
    """What a push is worth with the way to it.

    value: lower is better; push_steps: of the push; way_steps: on the way to it; end: the state it
    ends in; opens: whether its worth is in the next push, which it makes possible.
    """

    push: Push
    value: float
    push_steps: int
    way_steps: float
    end: State
    opens: bool = False


def badness(distance: float) -> float:
    """Distance to the goal, by ratio: halving it counts the same from far and from near."""
    return math.log(distance + 1.0)


def push_speed(distance: float, fastest: float) -> float:
    """Speed of a push in px per step: slower the nearer the block is to the goal."""
    return min(max(1.4 + 0.2 * distance, 2.2), fastest)


def push_on(
    world: World, push: Push, target: Array, fastest: float, *, steps: int, price: float
) -> Prospect:
    """Push on from the world's state and the agent's `target` (2,), at `price` per step.

    Gives up early where the block only moves away from the goal.
    """
    x, y = float(target[0]), float(target[1])
    heading = push.heading
    best = Prospect(math.inf, 0, world.state())
    lowest = distance = goal_distance(best.end.block)
    since = 0
    for step in range(1, steps + 1):
        speed = push_speed(distance, fastest)
        x, y = x + speed * math.cos(heading), y + speed * math.sin(heading)
        heading += push.turn
        if not (_LOW < x < _HIGH and _LOW < y < _HIGH):
            break
        distance = goal_distance(world.step(x, y))
        value = badness(distance) + price * step
        if value < best.value:
            best = Prospect(value, step, world.state())
        since = 0 if distance < lowest - 0.01 else since + 1
        lowest = min(lowest, distance)
        if since > 6 or distance > lowest * 1.3 + 3.0:
            break
    return best


def start_push(world: World, push: Push, block: Pose, fastest: float) -> Array:
    """Put the agent at the push's start, under way; the target (2,) it is following."""
    speed = push_speed(goal_distance(block), fastest)
    cos, sin = math.cos(push.heading), math.sin(push.heading)
    per_second = speed / STEP_SECONDS
    world.set(State(push.x, push.y, per_second * cos, per_second * sin, block))
    return np.array([push.x + LAG_STEPS * speed * cos, push.y + LAG_STEPS * speed * sin])


class Search:
    """Looks for good pushes, one or two ahead, in its own simulated world.

    What it finds is a function of the state alone, and one that seldom jumps: the same contacts
    are tried from every state, and a step on the way has its price, so the choice that is near
    stays the best one while the hand walks to it. Demonstrations of pushes that are drawn at random
    have as many ways on as draws, which a policy cannot tell apart.
    """

    def __init__(self, fastest: float) -> None:
        self.world = World()
        self._fastest = fastest

    def best(self, state: State, *, beam: int = 4) -> list[Outlook]:
        """The pushes to make from ``state``, the best one first."""
        tried = self._try(state, _contacts(state.block, _PLACES, _HEADINGS))
        tried += self._try(state, _variations(_distinct(tried, beam)))
        now = goal_distance(state.block)
        enough = now - max(0.25, 0.04 * now)
        leaders = _distinct([o for o in tried if goal_distance(o.end.block) < enough], beam)
        if not leaders:
            leaders = self._open(state, _contacts(state.block, _OPENINGS, (0.0,)))
        for i, outlook in enumerate(leaders):
            end = outlook.end
            later = self._try(end, _contacts(end.block, _PLACES // 2, (0.0,)))
            if later:
                steps = outlook.push_steps + outlook.way_steps
                then = min(o.value for o in later) + STEP_PRICE * steps
                leaders[i] = replace(outlook, value=min(outlook.value, then))
        return sorted(leaders, key=lambda o: o.value)

    def _try(self, state: State, pushes: list[Push]) -> list[Outlook]:
        """Each push up to its best moment."""
        outlooks = []
        for push, way in self._within_reach(state, pushes):
            target = start_push(self.world, push, state.block, self._fastest)
            value, steps, end = push_on(
                self.world, push, target, self._fastest, steps=_MAX_PUSH, price=STEP_PRICE
            )
            if steps:
                outlooks.append(Outlook(push, value + STEP_PRICE * way, steps, way, end))
        return outlooks

    def _open(self, state: State, pushes: list[Push]) -> list[Outlook]:
        """A few pushes that move the block somewhere else, good or bad; of no value themselves."""
        outlooks = []
        for push, way in self._within_reach(state, pushes):
            x, y = start_push(self.world, push, state.block, self._fastest)
            for _ in range(_OPENING_STEPS):
                x += self._fastest * math.cos(push.heading)
                y += self._fastest * math.sin(push.heading)
                self.world.step(min(max(x, _LOW), _HIGH), min(max(y, _LOW), _HIGH))
            end = self.world.state()
            outlooks.append(Outlook(push, math.inf, _OPENING_STEPS, way, end, opens=True))
        return outlooks

    def _within_reach(self, state: State, pushes: list[Push]) -> list[tuple[Push, float]]:
        """The pushes that there is room for, and the steps to get there."""
        if not pushes:
            return []
        starts = np.array([(p.x, p.y) for p in pushes])
        entries = np.stack([p.entry() for p in pushes])
        free = (
            inside_walls(entries)
            & inside_walls(starts)
            & (clearance(starts, state.block) > AGENT_RADIUS + 0.5)
            & (clearance(entries, state.block) > AGENT_RADIUS + 3.0)
        )
        travel = lengths(np.array([state.x, state.y]), entries, state.block) + STAND_OFF
        steps = travel / _TRAVEL_STEP + _TRAVEL_EXTRA
        return [(pushes[i], float(steps[i])) for i in np.nonzero(free)[0]]


def _contacts(block: Pose, places: int, headings: tuple[float, ...]) -> list[Push]:
    """Straight pushes, evenly around the block."""
    along = np.repeat(np.arange(places) * (_CONTACT.length / places), len(headings))
    heading = _CONTACT.inward(along) + block.angle + np.tile(headings, places)
    points = outline_at(block, _CONTACT.at(along))
    return [Push(x, y, h, 0.0) for (x, y), h in zip(points.tolist(), heading.tolist(), strict=True)]


def _variations(outlooks: list[Outlook]) -> list[Push]:
    """Pushes a little beside these, at other angles or turning."""
    pushes = []
    for p in (outlook.push for outlook in outlooks):
        sin, cos = math.sin(p.heading), math.cos(p.heading)
        for side, angle in product(*_SIDES):
            if side or angle:
                pushes.append(Push(p.x - side * sin, p.y + side * cos, p.heading + angle, 0.0))
        pushes += [p._replace(turn=turn) for turn in _TURNS]
    return pushes


def _distinct(outlooks: list[Outlook], count: int) -> list[Outlook]:
    """The best few that start at least 15 px apart from each other, best first."""
    kept: list[Outlook] = []
    for outlook in sorted(outlooks, key=lambda o: o.value):
        p = outlook.push
        if all(np.hypot(p.x - o.push.x, p.y - o.push.y) > 15.0 for o in kept):
            kept.append(outlook)
        if len(kept) == count:
            break
    return kept
