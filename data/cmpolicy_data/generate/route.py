"""Smooth paths for the agent around the block."""

from __future__ import annotations

import numpy as np
import shapely
from numpy.typing import NDArray

from cmpolicy_data.generate.tee import AGENT_RADIUS, OUTLINE, Array, Pose, Ring, outline_at, to_body

# Centre of the agent: it touches the block at 15 px. Paths keep _CLEAR from the outline where they
# cut corners, and follow the ring at _AROUND where they go around.
_CLEAR, _AROUND = 31.0, 38.0
_SPACING = 8.0
_LOW, _HIGH = 24.0, 487.0  # the walls are at 5 and 506

_BLOCK = shapely.Polygon(OUTLINE)
_OBSTACLE = _BLOCK.buffer(_CLEAR)
_RING = Ring(_AROUND)
shapely.prepare(_OBSTACLE)
shapely.prepare(_BLOCK)


def lengths(start: Array, goals: Array, pose: Pose) -> Array:
    """Approximate lengths (K,) in px of the routes from `start` (2,) to `goals` (K, 2)."""
    a, b = to_body(pose, start), to_body(pose, goals)
    straight = np.linalg.norm(b - a, axis=-1)
    segments = shapely.linestrings(np.stack([np.broadcast_to(a, b.shape), b], axis=1))
    ends = shapely.line_locate_point(_RING.line, shapely.points(b))
    here = _RING.locate(a)
    arc = np.abs(ends - here)
    arc = np.minimum(arc, _RING.length - arc)
    leave = np.linalg.norm(_RING.at(here) - a)
    around = leave + arc + np.linalg.norm(_RING.at(ends) - b, axis=-1)
    return np.where(shapely.intersects(_OBSTACLE, segments), around, straight)


def clearance(points: Array, pose: Pose) -> Array:
    """Distances (...) of points (..., 2) to the block's outline, 0 inside."""
    return np.asarray(shapely.distance(_BLOCK, shapely.points(to_body(pose, points))))


def inside_walls(points: Array) -> NDArray[np.bool_]:
    """Which points (..., 2) the agent's centre may visit with room to spare."""
    return np.all((points > _LOW) & (points < _HIGH), axis=-1)


def route(start: Array, entry: Array, contact: Array, pose: Pose) -> Array | None:
    """A smooth path (M, 2), a point every few px, from `start` by way of `entry` to `contact`.

    `entry` stands off the block, and the path runs straight from there to `contact`. None where
    the walls leave no way around the block.
    """
    a, b = to_body(pose, start), to_body(pose, entry)
    if not shapely.intersects(_OBSTACLE, shapely.LineString([a, b])):
        corners = np.stack([a, b])
    else:
        ways = [w for w in (_around(a, b, pose, turn) for turn in (1, -1)) if w is not None]
        if not ways:
            return None
        corners = min(ways, key=_length)
    corners = np.concatenate([corners, to_body(pose, contact)[None]])
    return outline_at(pose, _smooth(corners))


def _around(a: Array, b: Array, pose: Pose, turn: int) -> Array | None:
    """The shortest way from a to b along the ring, one way round, in the body frame."""
    here, there = _RING.locate(a), _RING.locate(b)
    arc = np.mod(turn * (there - here), _RING.length)
    points = _RING.at(here + turn * np.linspace(0.0, arc, 2 + int(arc / 10.0)))
    # Near a wall the ring is cut to what is inside; there must be room for the agent.
    world = np.clip(outline_at(pose, points), _LOW, _HIGH)
    if clearance(world, pose).min() < AGENT_RADIUS + 3.0:
        return None
    points = np.concatenate([a[None], to_body(pose, world), b[None]])
    # Take in the slack: from each corner on to the farthest one in sight.
    kept = [0, 1]
    while kept[-1] < len(points) - 2:
        i = kept[-1]
        sights = shapely.linestrings([[points[i], p] for p in points[i + 1 : -1]])
        seen = np.nonzero(~shapely.intersects(_OBSTACLE, sights))[0]
        kept.append(i + 1 + (int(seen[-1]) if len(seen) else 0))
    corners = [*points[kept], points[-1]]
    for end in (0, -1):  # drop the ring's first and last point where the one beyond is in sight
        step = 1 if end == 0 else -1
        while len(corners) > 2 and not shapely.intersects(
            _OBSTACLE, shapely.LineString([corners[end], corners[end + 2 * step]])
        ):
            corners.pop(end + step)
    return np.stack(corners)


def _smooth(corners: Array, passes: int = 14) -> Array:
    """Rounds the corners of a polyline: evenly spaced points, averaged with their neighbours."""
    line = shapely.LineString(corners)
    count = max(2, int(np.ceil(line.length / _SPACING)))
    points = shapely.get_coordinates(
        shapely.line_interpolate_point(line, np.linspace(0.0, line.length, count + 1))
    )
    for _ in range(passes):
        # The last two spacings are the entry to the contact: they stay straight.
        points[1:-3] = 0.25 * points[:-4] + 0.5 * points[1:-3] + 0.25 * points[2:-2]
    return np.asarray(points)


def _length(points: Array) -> float:
    return float(np.linalg.norm(np.diff(points, axis=0), axis=1).sum())
