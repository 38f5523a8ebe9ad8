"""Square: take the nut by its handle, turn it to the peg, put it over."""

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cmpolicy_data.generate.robomimic.motion import (
    CLOSE,
    OPEN,
    OPENED,
    WIDE,
    Array,
    Hand,
    Scene,
    Style,
    down,
    rotated,
    see,
    wrapped,
    yaw_of,
)

_PEG = np.array([0.23, 0.10])
# Where the handle is grasped, from the middle of the nut along its first axis: it sticks out from
# 0.044 to 0.079, and the fingers, 0.02 wide, must not close on the nut's corners.
_HANDLE = 0.06
_INWARD = 0.005  # so much nearer to the nut will do
_TIP = 0.965  # a nut higher than this is above the peg
_CARRY = 0.995
_DOWN = 0.865  # a nut lower than this is around the peg
_QUARTER = np.pi / 2


class SquareExpert:
    """Acts in one episode; ``object`` is [nut in the hand's frame 7, nut place 3, nut turn 4]."""

    def __init__(self, style: Style, rng: np.random.Generator) -> None:
        self._style, self._hand = style, Hand(style, rng)
        jitter = 0.002 * np.clip(style.grasp, -1.5, 1.5)
        self._handle = np.array([_HANDLE + jitter[0], 0.0, jitter[2]])
        self._width = 0.0

    def act(self, obs: Mapping[str, NDArray[Any]]) -> Array:
        """(7,) action for an observation."""
        scene = see(obs, self._width, slice(7, 10), slice(10, 14))
        self._width = scene.width
        over_peg = float(np.hypot(*(_PEG - scene.thing[:2]))) < 0.015
        if over_peg and scene.thing[2] < _DOWN:
            rise = [0, 0, 0.0 if scene.width < WIDE else 0.1]
            return self._hand.move(scene, scene.hand + np.array(rise), scene.turn, OPEN, care=0.3)
        handle = scene.thing + scene.thing_turn @ self._handle
        nut_yaw = yaw_of(scene.thing_turn)
        # The fingers close across the handle, with either of them on either side.
        off = wrapped(nut_yaw - scene.yaw + self._style.lean, np.pi)
        yaw = scene.yaw + off
        if abs(yaw) > 0.55 * np.pi:  # not further round than the wrist can go
            yaw -= np.sign(yaw) * np.pi
        off = yaw - scene.yaw
        away = handle - scene.hand
        aside = float(np.hypot(*away[:2]))
        inward = float(scene.thing_turn[:, 0] @ away) > _INWARD
        within = aside < 0.012 and abs(away[2]) < 0.015 and abs(off) < 0.12 and not inward
        at_handle = float(np.linalg.norm(away)) < 0.025 and not inward
        if at_handle and scene.width < 0.055 and scene.still:
            return self._put(scene, nut_yaw)
        if within or (at_handle and scene.width < OPENED):
            return self._hand.move(scene, handle, down(yaw), CLOSE, care=0.5)
        if aside > 0.012 + 0.2 * max(0.0, -away[2] - 0.01) or abs(off) > 0.2:
            handle[2] += max(self._style.hover, 0.5 * aside)
        return self._hand.move(scene, handle, down(yaw), OPEN)

    def _put(self, scene: Scene, nut_yaw: float) -> Array:
        """Up, across while turning to the nearest side of the peg, down, let go."""
        to_peg = _PEG - scene.thing[:2]
        aside = float(np.hypot(*to_peg))
        turn_left = -wrapped(nut_yaw, _QUARTER)
        if abs(nut_yaw + turn_left) < 0.1:  # beyond the peg the hand would be out of reach
            turn_left += np.copysign(_QUARTER, nut_yaw)
        turn = down(scene.yaw + turn_left)
        around = scene.thing[2] < _TIP
        # Where the hand is once the nut, turned, is over the peg; the arm stops short of targets.
        arm = rotated(scene.hand - scene.thing, turn_left)
        target = np.array([*_PEG, 0.0]) + arm
        target[:2] += 0.8 * to_peg
        if aside < (0.013 if around else 0.006) and abs(turn_left) < (0.12 if around else 0.06):
            target[2] = 0.83 + arm[2]
            return self._hand.move(scene, target, turn, CLOSE, care=0.5)
        target[2] = _CARRY + self._style.carry + arm[2]
        if scene.thing[2] < _TIP + 0.005 and (aside < 0.04 or scene.thing[2] < _TIP - 0.06):
            target[:2] = scene.hand[:2]  # first free of the table, or of the peg's tip
            turn = scene.turn
        return self._hand.move(scene, target, turn, CLOSE, care=0.6 if aside < 0.04 else 1.0)
