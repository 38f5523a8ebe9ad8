"""Geometry of the Push-T block: outline, goal, distance to the goal, rings around the block.

Poses are (x, y, angle) of the block's body frame as gym-pusht reports them (`block.position`,
`block.angle`): pixels, radians, y down. Points of the plane are (..., 2) arrays in pixels.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import shapely
from numpy.typing import NDArray

Array = NDArray[np.float64]

AGENT_RADIUS = 15.0
# The outline of gym-pusht's `add_tee` (scale 30): a 120 x 30 bar and a 30 x 90 stem, body frame.
OUTLINE: Array = np.array(
    [(-60, 0), (60, 0), (60, 30), (15, 30), (15, 120), (-15, 120), (-15, 30), (-60, 30)], float
)


class Pose(NamedTuple):
    """Pose of the block."""

    x: float
    y: float
    angle: float


GOAL = Pose(256.0, 256.0, np.pi / 4)
_CORNERS = OUTLINE[:, 0] + 1j * OUTLINE[:, 1]
_GOAL_CORNERS = _CORNERS * np.exp(1j * GOAL.angle) + complex(GOAL.x, GOAL.y)


def outline_at(pose: Pose, points: Array = OUTLINE) -> Array:
    """Body-frame points (..., 2) at a pose, in the plane."""
    cos, sin = np.cos(pose.angle), np.sin(pose.angle)
    return points @ np.array([[cos, sin], [-sin, cos]]) + (pose.x, pose.y)


def goal_distance(pose: Pose) -> float:
    """Mean distance in px of the block's eight corners to where they should be."""
    corners = _CORNERS * np.exp(1j * pose.angle) + complex(pose.x, pose.y)
    return float(np.abs(corners - _GOAL_CORNERS).mean())


class Ring:
    """The closed curve at a fixed distance around the block, in the body frame, by arc length."""

    def __init__(self, distance: float) -> None:
        polygon = shapely.Polygon(OUTLINE).buffer(distance, quad_segs=8)
        self.line = polygon.exterior
        self.length = float(self.line.length)

    def at(self, position: Array | float) -> Array:
        """Points (..., 2) at arc lengths, which wrap around."""
        points = shapely.line_interpolate_point(self.line, np.mod(position, self.length))
        return np.asarray(shapely.get_coordinates(points)).reshape((*np.shape(position), 2))

    def locate(self, point: Array) -> float:
        """Arc length of the ring's point nearest to `point` (2,)."""
        return float(self.line.project(shapely.Point(point)))

    def inward(self, position: Array) -> Array:
        """Angle (...) of the direction to the block, square to the ring."""
        tangent = self.at(position + 2.0) - self.at(position - 2.0)
        # shapely's exterior rings of a buffer run clockwise (y up): the inside is on the right.
        sign = 1.0 if self.line.is_ccw else -1.0
        return np.arctan2(sign * tangent[..., 0], -sign * tangent[..., 1])


def to_body(pose: Pose, points: Array) -> Array:
    """Points of the plane (..., 2) in the block's frame."""
    cos, sin = np.cos(pose.angle), np.sin(pose.angle)
    return (np.asarray(points) - (pose.x, pose.y)) @ np.array([[cos, -sin], [sin, cos]])
