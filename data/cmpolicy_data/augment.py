"""Transformations of demonstrations before they are trained on (``data.augment``).

``mirror`` doubles Push-T demonstrations by the symmetry of the task; ``recentre`` is in
:mod:`cmpolicy_data.convert.recentre`, for it needs the simulator.

The T and its goal pose (256, 256, pi/4) are symmetric about the line x + y = 512. Reflecting a
demonstration across it, (x, y) -> (512 - y, 512 - x), gives another valid demonstration. A pose of
the block goes to the reflected position and the angle pi/2 - angle; the keypoints do not lie
symmetrically on the block, so they are carried along from the pose to its mirror image as a rigid
body, which gives what the simulator would report there.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

FloatArray = npt.NDArray[np.floating[Any]]

ARENA = 512.0
_SHAPES = {"state": (5,), "action": (2,), "keypoint": (9, 2)}


class AugmentError(ValueError):
    """An unknown augmentation, or data that it cannot work on."""


@dataclass(frozen=True)
class Episodes:
    """Whole demonstrations, as an augmentation takes and gives them.

    Attributes:
        data: key -> (N, ...).
        episode_ends: (E,) int64.
        source: (E,) int64, the stored episode that each one comes from.
    """

    data: dict[str, npt.NDArray[Any]]
    episode_ends: npt.NDArray[np.int64]
    source: npt.NDArray[np.int64]


Augmentation = Callable[[Episodes], Episodes]

AUGMENTATIONS: dict[str, Augmentation] = {}


def register_augmentation(name: str) -> Callable[[Augmentation], Augmentation]:
    """Make an augmentation known to ``data.augment`` under ``name``; it gets numbers, no frames."""

    def add(function: Augmentation) -> Augmentation:
        AUGMENTATIONS[name] = function
        return function

    return add


def augment(episodes: Episodes, name: str) -> Episodes:
    """The episodes as the augmentation of that name gives them.

    Raises:
        AugmentError: an unknown name, data that it cannot work on, or episodes that do not fit
            together afterwards.
    """
    if name not in AUGMENTATIONS:
        raise AugmentError(
            f"unknown augmentation {name!r} (data.augment); known: {', '.join(AUGMENTATIONS)}; one "
            "of your own is known once its module is imported: CMPOLICY_PLUGINS=<module> for "
            "commands, an import in Python"
        )
    changed = AUGMENTATIONS[name](episodes)
    steps, ends = {key: len(value) for key, value in changed.data.items()}, changed.episode_ends
    if (
        steps.keys() != episodes.data.keys()
        or {*steps.values()} != {int(ends[-1])}
        or (np.diff(ends, prepend=0) < 1).any()
        or len(changed.source) != len(ends)
        or not np.isin(changed.source, episodes.source).all()
    ):
        raise AugmentError(
            f"the augmentation {name!r} gave steps {steps}, episode_ends to {ends[-1:]} and "
            f"{len(changed.source)} sources of {len(ends)} episodes; expected the keys "
            f"{sorted(episodes.data)}, each with as many steps as the last of rising episode_ends, "
            "and for every episode the stored one that it comes from"
        )
    return changed


@register_augmentation("recentre")
def _recentre(episodes: Episodes) -> Episodes:
    from cmpolicy_data.convert.recentre import recentre_pusht  # needs the simulator

    return recentre_pusht(episodes)


def mirror_points(points: FloatArray) -> FloatArray:
    """Reflect points (..., 2) in px: (x, y) -> (512 - y, 512 - x)."""
    return np.asarray(ARENA - points[..., ::-1], dtype=points.dtype)


def mirror_state(state: FloatArray) -> FloatArray:
    """Reflect states (..., 5): agent xy, block xy (px), block angle (rad, kept in [0, 2 pi))."""
    angle = np.mod(np.pi / 2 - state[..., 4:].astype(np.float64), 2 * np.pi)
    agent, block = mirror_points(state[..., :2]), mirror_points(state[..., 2:4])
    return np.concatenate([agent, block, angle.astype(state.dtype)], axis=-1)


def mirror_keypoints(keypoint: FloatArray, state: FloatArray) -> FloatArray:
    """Keypoints (..., 9, 2) of the mirrored block, from those at ``state`` (..., 5)."""
    mirrored = mirror_state(state.astype(np.float64))
    # From the block's frame at angle a to that at pi/2 - a is one rotation by pi/2 - 2 a.
    turn = (np.pi / 2 - 2 * state[..., 4].astype(np.float64))[..., None]
    offset = keypoint.astype(np.float64) - state[..., None, 2:4].astype(np.float64)
    x, y = offset[..., 0], offset[..., 1]
    turned = np.stack(
        [np.cos(turn) * x - np.sin(turn) * y, np.sin(turn) * x + np.cos(turn) * y], axis=-1
    )
    return np.asarray(mirrored[..., None, 2:4] + turned, dtype=keypoint.dtype)


@register_augmentation("mirror")
def mirror_pusht(episodes: Episodes) -> Episodes:
    """The demonstrations and, after them, their mirror images.

    Raises:
        AugmentError: keys that are missing or cannot be mirrored, or shapes that are not Push-T's.
    """
    check_pusht(episodes, "mirror")
    data, ends = episodes.data, episodes.episode_ends
    images = {"state": mirror_state(data["state"])}
    if "action" in data:
        images["action"] = mirror_points(data["action"])
    if "keypoint" in data:
        images["keypoint"] = mirror_keypoints(data["keypoint"], data["state"])
    doubled = {key: np.concatenate([data[key], images[key]]) for key in data}
    both = np.concatenate([ends, ends + len(data["state"])])
    return Episodes(doubled, both, np.tile(episodes.source, 2))


def check_pusht(episodes: Episodes, name: str) -> None:
    """Whether these are Push-T demonstrations that the augmentation ``name`` can work on.

    Raises:
        AugmentError: names the key, its shape and what was expected.
    """
    data = episodes.data
    unknown = sorted(set(data) - set(_SHAPES))
    if unknown or "state" not in data:
        raise AugmentError(
            f"The augmentation {name!r} needs the Push-T key 'state' and knows {list(_SHAPES)}; "
            f"got {sorted(data)}. Leave out data.augment for other data."
        )
    n_steps = data["state"].shape[0]
    for key, value in data.items():
        if value.shape != (n_steps, *_SHAPES[key]) or value.dtype.kind != "f":
            raise AugmentError(
                f"The augmentation {name!r} expects {key!r} as floats of shape "
                f"({n_steps}, {', '.join(map(str, _SHAPES[key]))}), got {value.shape} "
                f"{value.dtype}: this is not Push-T data. Leave out data.augment."
            )
