"""Can: take the can from its bin, carry it over the wall, let it go above its place."""

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cmpolicy_data.generate.robomimic.motion import (
    CLOSE,
    OPEN,
    OPENED,
    Array,
    Hand,
    Scene,
    Style,
    down,
    see,
)

# The quarter of the second bin that takes the can, and the part of it that the arm reaches well.
_MIDDLE, _HALF = np.array([0.1975, 0.4025]), np.array([0.0975, 0.1225])
_GOAL, _ROOM = np.array([0.14, 0.36]), np.array([0.015, 0.035])
_CLEAR = 1.03  # a hand this high carries a can over the wall
_LET_GO = 0.96  # height of the can
_THIN = 0.03  # fingers nearer than this have closed on nothing
_FREE = 0.056  # fingers further apart have let go of a can


class CanExpert:
    """Acts in one episode; ``object`` is [can in the hand's frame 7, can place 3, can turn 4]."""

    def __init__(self, style: Style, rng: np.random.Generator) -> None:
        self._style, self._hand = style, Hand(style, rng)
        self._goal = _GOAL + rng.uniform(-1, 1, 2) * _ROOM
        self._yaw = rng.normal(0.0, 0.3)  # a can has no sides
        self._width = 0.0

    def act(self, obs: Mapping[str, NDArray[Any]]) -> Array:
        """(7,) action for an observation."""
        scene = see(obs, self._width, slice(7, 10), slice(10, 14))
        self._width = scene.width
        turn = down(self._yaw)
        placed = bool((np.abs(scene.thing[:2] - _MIDDLE) < _HALF).all())
        if placed and scene.thing[2] < _LET_GO:
            # While it is let go it is still lowered, lest it be lifted out of its place again.
            height = scene.hand[2] - 0.02 if scene.width < _FREE else _CLEAR
            target = np.array([*scene.hand[:2], height])
            return self._hand.move(scene, target, turn, OPEN)
        grasp = scene.thing + self._style.grasp * [0.004, 0.004, 0.006] + [0, 0, 0.02]
        away = grasp - scene.hand
        aside = float(np.hypot(*away[:2]))
        missed = scene.width < _THIN or scene.opening
        within = aside < 0.015 and abs(away[2]) < 0.015 and not missed
        held = scene.width < OPENED and aside < 0.04 and abs(away[2]) < 0.04 and not missed
        if held and scene.holds:
            return self._carry(scene, turn)
        if within or held:
            return self._hand.move(scene, grasp, turn, CLOSE, care=0.5)
        if aside > 0.02 + 0.2 * max(0.0, -away[2] - 0.01):
            grasp[2] += max(self._style.hover, 0.5 * aside)
        return self._hand.move(scene, grasp, turn, OPEN)

    def _carry(self, scene: Scene, turn: Array) -> Array:
        """Up, across, down."""
        height = _CLEAR + self._style.carry
        aside = float(np.hypot(*(self._goal - scene.hand[:2])))
        if aside < 0.02:
            target = np.array([*self._goal, scene.hand[2] - 0.1])
        elif scene.hand[2] < _CLEAR - 0.04:
            target = np.array([*scene.hand[:2], height])
        else:
            target = np.array([*self._goal, height])
        return self._hand.move(scene, target, turn, CLOSE)
