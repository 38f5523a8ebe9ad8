"""Rotations have several descriptions: which of them is meant when two are compared or mixed."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from cmpolicy.spec import Rotation

Array = NDArray[Any]


def rewritten(
    actions: Array, like: Array, rotations: tuple[Rotation, ...], *, unit: bool = True
) -> Array:
    """The same rotations (n, A), each in its description that is nearest to that in ``like``.

    ``unit``: bring quaternions to length one.
    """
    if all(rotation.kind == "rotation_6d" for rotation in rotations):
        return actions
    actions = actions.copy()
    for rotation in rotations:
        dims = list(rotation.dims)
        part, target = actions[:, dims], like[:, dims]
        if rotation.kind == "angle":
            turns = np.round((target - part) / (2 * np.pi))
            actions[:, dims] = part + 2 * np.pi * turns
        elif rotation.kind == "quaternion":  # q and -q are one rotation
            sign = np.where((part * target).sum(1, keepdims=True) < 0, -1, 1)
            length = np.linalg.norm(part, axis=1, keepdims=True) if unit else np.ones(1)
            actions[:, dims] = sign * part / np.where(length > 0, length, 1)
        elif rotation.kind == "axis_angle":  # a turn more about the same axis changes nothing
            angle = np.linalg.norm(part, axis=1, keepdims=True)
            axis = part / np.where(angle > 0, angle, 1)
            turns = np.round(((target * axis).sum(1, keepdims=True) - angle) / (2 * np.pi))
            actions[:, dims] = part + 2 * np.pi * turns * axis
    return actions
