"""What the experts share: the scene as they see it, an episode's style, and moving the hand.

Lengths in m, angles in rad, in the world frame. A hand that points down with yaw a has its fingers
closing along (-sin a, cos a).
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cmpolicy_envs.rotations import axis_angle_to_matrix, matrix_to_axis_angle, quat_to_matrix

Array = NDArray[np.float64]

OPEN, CLOSE = -1.0, 1.0
WIDE = 0.07  # fingers further apart than this hold nothing
OPENED = 0.0775  # fingers closer than this have begun to close
_STILL = 3e-3  # fingers that move less per step have closed on something
_OPENS = 1e-3  # fingers that part by more per step are on their way
# What a full action of OSC_POSE asks for in one step.
_STEP, _TURN = 0.05, 0.5
_FASTEST_TURN = 0.5  # of a full action


@dataclass(frozen=True)
class Scene:
    """What is seen of hand and object."""

    hand: Array
    """(3,) between the finger tips."""
    turn: Array
    """(3, 3) of the hand."""
    width: float
    """Distance of the fingers."""
    still: bool
    """The fingers do not move."""
    opening: bool
    """The fingers move apart."""
    thing: Array
    """(3,) place of the object."""
    thing_turn: Array
    """(3, 3) of the object."""

    @property
    def yaw(self) -> float:
        """Of the hand."""
        return yaw_of(self.turn)

    @property
    def holds(self) -> bool:
        """The fingers stopped before they met, or before they opened."""
        return self.width < WIDE and self.still


def see(
    obs: Mapping[str, NDArray[Any]], last_width: float, thing: slice, thing_quat: slice
) -> Scene:
    """The scene of an observation; ``thing`` and ``thing_quat`` index the key ``object``."""
    fingers = obs["robot0_gripper_qpos"].astype(np.float64)
    width = float(fingers[0] - fingers[1])
    things = obs["object"].astype(np.float64)
    return Scene(
        hand=obs["robot0_eef_pos"].astype(np.float64),
        turn=quat_to_matrix(obs["robot0_eef_quat"].astype(np.float64)),
        width=width,
        still=abs(width - last_width) < _STILL,
        opening=width - last_width > _OPENS,
        thing=things[thing],
        thing_turn=quat_to_matrix(things[thing_quat]),
    )


@dataclass(frozen=True)
class Style:
    """How one episode is done."""

    hover: float
    """Height above the object from which the hand goes down."""
    carry: float
    """Height above the least one at which an object is carried."""
    gain: float
    """Share of the way to a target that is asked for, in steps of the controller."""
    speed: float
    """Largest action along an axis, in (0, 1]."""
    grasp: Array
    """(3,) displacement of the grasp from its usual place."""
    lean: float
    """Displacement of the hand's yaw in a grasp."""
    noise: float
    """Standard deviation of an action's unsteadiness."""

    @classmethod
    def draw(cls, rng: np.random.Generator) -> "Style":
        return cls(
            hover=rng.uniform(0.05, 0.1),
            carry=rng.uniform(0.0, 0.04),
            gain=rng.uniform(1.4, 2.0),
            speed=rng.uniform(0.6, 1.0),
            grasp=rng.normal(0.0, 1.0, 3),
            lean=rng.normal(0.0, 0.05),
            noise=rng.uniform(0.0, 0.12),
        )


class Hand:
    """Turns a target of the hand into an action, in a style."""

    def __init__(self, style: Style, rng: np.random.Generator) -> None:
        self._style, self._rng = style, rng

    def move(
        self, scene: Scene, target: Array, turn: Array, fingers: float, *, care: float = 1.0
    ) -> Array:
        """(7,) action to ``target`` (3,) and ``turn`` (3, 3); ``care`` < 1 is slow and calm."""
        style = self._style
        action = np.empty(7)
        shift = style.gain * (target - scene.hand) / _STEP
        action[:3] = _limited(shift, style.speed * care)
        angle = matrix_to_axis_angle(turn @ scene.turn.T)
        action[3:6] = _limited(style.gain * angle / _TURN, _FASTEST_TURN)
        action[:6] += self._rng.normal(0.0, style.noise * care, 6) * [1, 1, 1, 0.3, 0.3, 0.3]
        action[6] = fingers
        return np.clip(action, -1.0, 1.0)


@dataclass(frozen=True)
class Strays:
    """Where the hand is when some of the episodes begin, as if something had gone wrong before.

    It goes there, to within what the steps allow, before the recording begins.
    """

    share: float
    """Of the episodes."""
    low: tuple[float, float, float]
    high: tuple[float, float, float]
    """Corners of the box, m."""

    def acts(
        self, rng: np.random.Generator
    ) -> Iterator[Callable[[Mapping[str, NDArray[Any]]], Array]]:
        """What to do with each observation before an episode; nothing if it does not stray."""
        if rng.random() >= self.share:
            return
        hand = Hand(Style.draw(rng), rng)
        target, turn = rng.uniform(self.low, self.high), down(rng.uniform(-0.8, 0.8))
        fingers = CLOSE if rng.random() < 0.5 else OPEN
        nothing = slice(0, 3), slice(3, 7)  # the objects do not matter
        for _ in range(rng.integers(5, 30)):
            yield lambda obs: hand.move(see(obs, 0.0, *nothing), target, turn, fingers)


def down(yaw: float) -> Array:
    """(3, 3) of a hand that points down."""
    return axis_angle_to_matrix(np.array([0.0, 0.0, yaw])) @ np.diag([1.0, -1.0, -1.0])


def yaw_of(turn: Array) -> float:
    """Angle of the first axis about the vertical."""
    return float(np.arctan2(turn[1, 0], turn[0, 0]))


def rotated(vector: Array, angle: float) -> Array:
    """(3,) turned about the vertical."""
    return np.asarray(axis_angle_to_matrix(np.array([0.0, 0.0, angle])) @ vector)


def wrapped(angle: float, period: float = 2 * np.pi) -> float:
    """The angle in [-period / 2, period / 2] that differs by whole periods."""
    return float(angle - np.round(angle / period) * period)


def _limited(vector: Array, most: float) -> Array:
    """Shortened, in its direction, so that no entry is larger than ``most``."""
    return np.asarray(vector * min(1.0, most / max(float(np.abs(vector).max()), 1e-9)))
