"""Lift: grasp the cube from above, raise it."""

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
    Style,
    down,
    see,
    wrapped,
    yaw_of,
)

_QUARTER = np.pi / 2
_RISE = 0.15
_CALM = 0.65  # the way is short: as slow as people are


class LiftExpert:
    """Acts in one episode; ``object`` is [cube place 3, cube turn 4, hand to cube 3]."""

    def __init__(self, style: Style, rng: np.random.Generator) -> None:
        self._style, self._hand = style, Hand(style, rng)
        self._width = 0.0

    def act(self, obs: Mapping[str, NDArray[Any]]) -> Array:
        """(7,) action for an observation."""
        scene = see(obs, self._width, slice(0, 3), slice(3, 7))
        self._width = scene.width
        grasp = scene.thing + self._style.grasp * [0.003, 0.003, 0.004]
        # Fingers on two opposite faces, those that are nearest.
        off = wrapped(yaw_of(scene.thing_turn) - scene.yaw + self._style.lean, _QUARTER)
        turn = down(scene.yaw + off)
        away = grasp - scene.hand
        aside = float(np.hypot(*away[:2]))
        within = aside < 0.012 and abs(away[2]) < 0.012 and abs(off) < 0.2
        held = scene.width < OPENED and aside < 0.02 and abs(away[2]) < 0.02
        if held and scene.holds:
            up = scene.hand + np.array([0, 0, _RISE])
            return self._hand.move(scene, up, scene.turn, CLOSE, care=_CALM)
        if within or held:
            return self._hand.move(scene, grasp, turn, CLOSE, care=0.4)
        if aside > 0.015 + 0.2 * max(0.0, -away[2] - 0.01) or abs(off) > 0.25:
            grasp[2] += max(self._style.hover, 0.5 * aside)
        return self._hand.move(scene, grasp, turn, OPEN, care=_CALM)
