"""Share of the Push-T goal that the block covers, in closed form.

gym-pusht intersects polygons with GEOS, whose result differs in the last bit from one process to
the next and takes as long as half a simulation step. Block and goal are two rectangles each, so the
overlap is the sum of four convex clips: deterministic, and equal to GEOS to rounding.
"""

import math

Point = tuple[float, float]
Rectangle = tuple[float, float, float, float]

BAR: Rectangle = (-60.0, 0.0, 60.0, 30.0)
STEM: Rectangle = (-15.0, 30.0, 15.0, 120.0)
"""The T in its own frame, px: (x min, y min, x max, y max) of gym-pusht's two rectangles."""

T_AREA = 120.0 * 30.0 + 30.0 * 90.0
GOAL_POSE = (256.0, 256.0, math.pi / 4)
"""Goal x, y (px) and angle (rad)."""
# Farthest point of the T from the origin of its frame: the foot of the stem.
_REACH = math.hypot(15.0, 120.0)


def coverage(x: float, y: float, angle: float, goal: tuple[float, float, float]) -> float:
    """Area of (block at pose x, y, angle) within (T at pose ``goal``), over the area of the T."""
    goal_x, goal_y, goal_angle = goal
    d_x, d_y = x - goal_x, y - goal_y
    if math.hypot(d_x, d_y) >= 2 * _REACH:
        return 0.0
    # The pose of the block in the frame of the goal, whose rectangles are axis-aligned there.
    cos_g, sin_g = math.cos(goal_angle), math.sin(goal_angle)
    o_x, o_y = cos_g * d_x + sin_g * d_y, -sin_g * d_x + cos_g * d_y
    cos, sin = math.cos(angle - goal_angle), math.sin(angle - goal_angle)
    area = 0.0
    for x_0, y_0, x_1, y_1 in (BAR, STEM):
        corners = [
            (o_x + cos * u - sin * v, o_y + sin * u + cos * v)
            for u, v in ((x_0, y_0), (x_1, y_0), (x_1, y_1), (x_0, y_1))
        ]
        for rectangle in (BAR, STEM):
            area += _overlap(corners, rectangle)
    return area / T_AREA


def _overlap(corners: list[Point], rectangle: Rectangle) -> float:
    """Area of a convex polygon within an axis-aligned rectangle (Sutherland-Hodgman, shoelace)."""
    x_0, y_0, x_1, y_1 = rectangle
    polygon = corners
    for axis, bound, sign in ((0, x_0, 1.0), (0, x_1, -1.0), (1, y_0, 1.0), (1, y_1, -1.0)):
        depths = [sign * (p[axis] - bound) for p in polygon]
        if min(depths) >= 0.0:
            continue
        if max(depths) <= 0.0:
            return 0.0
        clipped: list[Point] = []
        previous, before = polygon[-1], depths[-1]
        for point, depth in zip(polygon, depths, strict=True):
            if (depth > 0.0) != (before > 0.0):
                share = before / (before - depth)
                clipped.append(
                    (
                        previous[0] + share * (point[0] - previous[0]),
                        previous[1] + share * (point[1] - previous[1]),
                    )
                )
            if depth > 0.0:
                clipped.append(point)
            previous, before = point, depth
        polygon = clipped
    twice = 0.0
    p_x, p_y = polygon[-1]
    for q_x, q_y in polygon:
        twice += p_x * q_y - q_x * p_y
        p_x, p_y = q_x, q_y
    return 0.5 * abs(twice)
