"""LeRobot's flat dictionaries of floats, to and from the arrays of a policy."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cmpolicy.observation import ObservationError

Array = NDArray[Any]


class LeRobotAdapter:
    """A robot that names every motor (``{"shoulder.pos": 0.1, ...}``), as one of arrays.

    Example::

        joints = ["shoulder.pos", "elbow.pos", "gripper.pos"]
        robot = LeRobotAdapter(robot, observation={"state": joints}, action=joints)
        with ControlLoop(policy, robot, hz=30) as loop: ...

    Args:
        robot: with LeRobot's interface; all its other members can be reached through the adapter.
        observation: for each key of the policy the names whose values it consists of, in the order
            of training; or one name as a plain string, whose entry is taken as it is, such as a
            camera: ``{"state": joints, "images.front": "front"}``. Other entries pass through
            under their own names.
        action: names of the action's dimensions, in the order of training; None takes those of
            ``robot.action_features``.

    Raises:
        ValueError: no names for a key or for the action; a name of the action that is given twice,
            or that is none of ``robot.action_features`` (most robots ignore it in silence).
    """

    def __init__(
        self,
        robot: Any,
        *,
        observation: Mapping[str, str | Sequence[str]],
        action: Sequence[str] | None = None,
    ) -> None:
        self._robot = robot
        whole = {key: name for key, name in observation.items() if isinstance(name, str)}
        self._whole = whole
        self._observation = {k: tuple(v) for k, v in observation.items() if k not in whole}
        self._used = {name for names in self._observation.values() for name in names}
        self._used |= set(whole.values())
        features = getattr(robot, "action_features", {})
        nested = isinstance(features, Mapping) and "names" in features  # as older robots tell them
        known = features["names"] if nested else features
        self._action = tuple(str(name) for name in (known if action is None else action))
        empty = [key for key, names in observation.items() if not names]
        if empty:
            raise ValueError(f"LeRobotAdapter: no names for the observations {empty}")
        if not self._action:
            raise ValueError(
                "LeRobotAdapter: no names for the action; give action=[...] in the order of "
                "training (the robot has no action_features)"
            )
        unknown = sorted(set(self._action) - set(known)) if known else []
        if unknown or len(set(self._action)) < len(self._action):
            what = f"{unknown} are none of the robot's" if unknown else "a name is given twice"
            raise ValueError(
                f"LeRobotAdapter: action={list(self._action)}: {what}; expected each once, in the "
                f"order of training, out of {list(known) or 'those of the robot'}"
            )

    @property
    def unwrapped(self) -> Any:
        """The robot itself."""
        return self._robot

    def connect(self) -> None:
        self._robot.connect()

    def disconnect(self) -> None:
        self._robot.disconnect()

    def get_observation(self) -> dict[str, Any]:
        """One observation, (n,) float64 per key of ``observation`` that has several names.

        Raises:
            ObservationError: the robot gave no such name, or no number for it.
        """
        flat = self._robot.get_observation()
        arrays: dict[str, Any] = {k: v for k, v in flat.items() if k not in self._used}
        for key, name in self._whole.items():
            if name not in flat:
                raise self._missing(name, key, flat)
            arrays[key] = flat[name]
        for key, names in self._observation.items():
            try:
                arrays[key] = np.array([float(flat[name]) for name in names])
            except KeyError as error:
                raise self._missing(error.args[0], key, flat) from None
            except (TypeError, ValueError) as error:
                raise ObservationError(
                    f"observation {key!r} needs one number for each of {list(names)}: {error}"
                ) from error
        return arrays

    @staticmethod
    def _missing(name: str, key: str, flat: Mapping[str, Any]) -> ObservationError:
        given = sorted(map(str, flat))
        return ObservationError(
            f"the robot gave no {name!r} for observation {key!r}; it gave {given}"
        )

    def send_action(self, action: Array) -> Any:
        """Send ``action`` (A,) by name.

        Raises:
            ValueError: it has another size.
        """
        if action.shape != (len(self._action),):
            raise ValueError(
                f"LeRobotAdapter: an action of shape {action.shape} for {len(self._action)} names: "
                f"{list(self._action)}"
            )
        return self._robot.send_action(dict(zip(self._action, action.tolist(), strict=True)))

    def __getattr__(self, name: str) -> Any:
        """``stop``, ``id``, ``fps``, ``is_connected`` and what else the robot has."""
        if name == "_robot":  # not set yet, e.g. while copying
            raise AttributeError(name)
        return getattr(self._robot, name)
