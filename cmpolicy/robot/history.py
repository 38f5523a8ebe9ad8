"""The last To observations of a robot, checked on their way in."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cmpolicy.observation import ObservationError, read_observation
from cmpolicy.spec import PolicySpec

Array = NDArray[Any]


class ObservationHistory:
    """To observations as the policy wants them, (1, To, ...) per key, oldest first.

    float32, or uint8 for camera frames.

    After :meth:`reset` the first observation stands for all To (Diffusion Policy's padding).
    Histories are not copied: a step is written twice, To apart, so that the last To
    steps always lie side by side::

        To = 3, after five steps      buffer   3 4 2 3 4 2      view = buffer[2:5] = 2 3 4
    """

    def __init__(self, spec: PolicySpec) -> None:
        self._spec = spec
        self._shapes = dict(spec.obs)
        self._to = spec.n_obs_steps
        self._buffers = {
            key: np.zeros((2 * self._to, *shape), spec.dtype(key))
            for key, shape in spec.obs.items()
        }
        self._views = [
            {key: buffer[None, start : start + self._to] for key, buffer in self._buffers.items()}
            for start in range(self._to)
        ]
        self.frozen = dict.fromkeys(spec.images, 0)
        """Per camera: how many observations in a row brought the frame of the one before."""
        self._oldest = 0
        self._empty = True

    def reset(self) -> None:
        self._oldest = 0
        self._empty = True
        self.frozen = dict.fromkeys(self.frozen, 0)

    @property
    def obs(self) -> Mapping[str, Array]:
        """(1, To, ...) per key: views that the next :meth:`push` may change.

        Raises:
            RuntimeError: there is no observation yet.
        """
        if self._empty:
            raise RuntimeError("no observation yet: push one first")
        return self._views[self._oldest]

    def push(self, obs: Mapping[str, Any]) -> None:
        """Add one observation step, (...) per key; keys that the policy does not know are ignored,
        and logged once.

        Raises:
            ObservationError: no mapping, a missing key, a wrong shape or kind of number. The
                history is then as before.
            NonFiniteObservationError: NaN or infinite numbers; likewise.
        """
        if not isinstance(obs, Mapping):
            raise ObservationError(
                f"an observation must be a mapping from {sorted(self._shapes)} to arrays, "
                f"got {type(obs).__name__}"
            )
        if self._empty and obs.keys() != self._shapes.keys():  # once per episode is enough
            self._spec.note_ignored(obs)
        step = {key: self._read(key, obs) for key in self._shapes}
        for key in self.frozen:
            newest = self._buffers[key][(self._oldest + self._to - 1) % self._to]
            same = not self._empty and np.array_equal(newest, step[key])
            self.frozen[key] = self.frozen[key] + 1 if same else 0
        for key, value in step.items():
            buffer = self._buffers[key]
            if self._empty:
                buffer[...] = value
            else:
                buffer[self._oldest] = buffer[self._oldest + self._to] = value
        if self._empty:
            self._empty = False
        else:
            self._oldest = (self._oldest + 1) % self._to

    def _read(self, key: str, obs: Mapping[str, Any]) -> Array:
        if key not in obs:
            raise ObservationError(
                f"the observation has no {key!r}; the policy needs {sorted(self._shapes)}, "
                f"the robot gave {sorted(map(str, obs))}"
            )
        value = read_observation(self._spec, key, obs[key])
        if value.shape != self._shapes[key]:
            raise ObservationError(
                f"observation {key!r} has shape {value.shape}, expected {self._shapes[key]}: one "
                "step, without batch or time axis"
            )
        return value
