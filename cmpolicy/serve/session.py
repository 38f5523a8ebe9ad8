"""What one client's messages mean: checked observations, its history and its noise.

A message is a map of observation keys to arrays, in one of three forms for all keys alike:

    (...)         one step, the newest
    (To, ...)     a whole history, oldest first
    (B, To, ...)  a batch of histories

and beside them, each optional:

    step   a whole number: at which control step, at the policy's rate, the one step was observed
    reset  true: a new episode begins, with this observation if there is one
    seed   a whole number: the session's noise starts anew from it
    noise  (T, A), or (B, T, A) for a batch: standard normal, instead of the session's own

The session remembers observations that say their ``step``, and puts the history together from
those of the last To steps; a missing one is taken from the nearest older, or else newer one, so an
episode begins as in training, with its first observation repeated. A smaller ``step`` than the last
begins a new episode. One step without ``step`` stands for the whole history: when the observation
before was made cannot be known (openpi's ActionChunkBroker asks once per chunk, so that one is a
whole chunk old; a policy that takes it for the step before sees a speed that never was).
"""

from __future__ import annotations

import reprlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from cmpolicy.spec import PolicySpec

#: Keys of a message that are no observations.
RESERVED = ("step", "reset", "seed", "noise")

_Form = Literal["step", "history", "batch"]
_FORMS: dict[int, _Form] = {0: "step", 1: "history", 2: "batch"}


class RequestError(ValueError):
    """A message that the policy cannot answer; the text is for whoever sent it."""


@dataclass(frozen=True)
class Request:
    """A checked decision to make.

    Attributes:
        obs: (B, To, ...) float32 per key.
        noise: (B, T, A) float32.
        is_batch: whether the client sent a batch, and is answered with one.
    """

    obs: dict[str, NDArray[np.float32]]
    noise: NDArray[np.float32]
    is_batch: bool

    @property
    def rows(self) -> int:
        """B."""
        return len(self.noise)


@dataclass(frozen=True)
class _Seen:
    """An observation (...) per key, and at which step it was made."""

    number: int
    obs: dict[str, NDArray[np.float32]]


class Session:
    """State of one connection. A message that is refused changes nothing.

    Args:
        spec: of the policy.
        max_batch: largest batch of histories in one message.
        seed: of the noise; None takes one from the operating system.
    """

    def __init__(
        self, spec: PolicySpec, *, max_batch: int, seed: np.random.SeedSequence | None = None
    ) -> None:
        self.spec = spec
        self._max_batch = max_batch
        self._rng = np.random.default_rng(seed)
        self._seen: list[_Seen] = []  # within the last To steps, oldest first

    def read(self, message: Any) -> Request | None:
        """Check a message and take it in.

        Returns:
            The decision to make, or None for a message of ``reset`` or ``seed`` alone.

        Raises:
            RequestError: what is wrong, what was expected.
        """
        if not isinstance(message, dict):
            raise RequestError(
                f"a message is a map with the keys {sorted(self.spec.obs)}, "
                f"got {type(message).__name__}"
            )
        reset, rng = _flag(message, "reset"), _generator(message)
        controls = message.keys() & {"reset", "seed"}
        if controls and message.keys() == controls:
            self._seen = [] if reset else self._seen
            self._rng = rng or self._rng
            return None
        self._check_keys(message)
        form, steps = self._arrays(message)
        number = _whole(message, "step")
        if number is not None and form != "step":
            raise RequestError(f"step={number} belongs to one observation step, this is a {form}")
        rows = len(next(iter(steps.values()))) if form == "batch" else 1
        noise = self._noise(message, rows, is_batch=form == "batch")
        # everything is in order: from here on the session changes
        if rng is not None:
            self._rng = rng
        if reset:
            self._seen = []
        if noise is None:
            noise = self._rng.standard_normal(
                (rows, self.spec.horizon, self.spec.action_dim), dtype=np.float32
            )
        if form == "step":
            steps = self._history(number, steps)
        if form != "batch":
            steps = {key: value[None] for key, value in steps.items()}
        return Request(steps, noise, form == "batch")

    def _check_keys(self, message: Mapping[Any, Any]) -> None:
        missing = sorted(self.spec.obs.keys() - message.keys())
        unknown = sorted(str(k) for k in message.keys() - {*self.spec.obs, *RESERVED})
        if missing or unknown:
            raise RequestError(
                f"observation keys do not match the policy: missing {missing}, unknown "
                f"{reprlib.repr(unknown)}; it needs {sorted(self.spec.obs)}"
            )

    def _arrays(self, message: Mapping[str, Any]) -> tuple[_Form, dict[str, NDArray[np.float32]]]:
        """Form of the observations and the observations: float32, finite, of one form."""
        form: _Form | None = None
        first, rows = "", 0
        arrays: dict[str, NDArray[np.float32]] = {}
        for key, shape in self.spec.obs.items():
            array = _numbers(f"observation {key!r}", message[key])
            own = _FORMS.get(array.ndim - len(shape))
            history = (self.spec.n_obs_steps, *shape)
            expected = {"step": shape, "history": history, "batch": (*array.shape[:1], *history)}
            if own is None or array.shape != expected[own] or array.size == 0:
                raise RequestError(
                    f"observation {key!r} has shape {array.shape}, expected {shape} for one step, "
                    f"{history} for a history of n_obs_steps={self.spec.n_obs_steps} steps, "
                    f"oldest first, or {_with_batch(history)} for a batch of them"
                )
            if form is not None and own != form:
                raise RequestError(
                    f"observation {key!r} is a {own} and {first!r} is a {form}; send all keys alike"
                )
            if own == "batch":
                if len(array) > self._max_batch:
                    raise RequestError(
                        f"observation {key!r} is a batch of {len(array)}; this server takes at "
                        f"most {self._max_batch} in one message"
                    )
                if rows and len(array) != rows:
                    raise RequestError(
                        f"observation {key!r} has batch size {len(array)}, {first!r} has {rows}"
                    )
                rows = len(array)
            form, first = own, first or key
            arrays[key] = array
        assert form is not None  # a spec has at least one key
        return form, arrays

    def _noise(
        self, message: Mapping[str, Any], rows: int, *, is_batch: bool
    ) -> NDArray[np.float32] | None:
        value = message.get("noise")
        if value is None:
            return None
        noise = _numbers("noise", value)
        shape = (self.spec.horizon, self.spec.action_dim)
        expected = (rows, *shape) if is_batch else shape
        if noise.shape != expected:
            names = "(batch, horizon, action_dim)" if is_batch else "(horizon, action_dim)"
            raise RequestError(f"noise has shape {noise.shape}, expected {expected} {names}")
        return noise.reshape(rows, *shape)

    def _history(
        self, number: int | None, step: dict[str, NDArray[np.float32]]
    ) -> dict[str, NDArray[np.float32]]:
        """(To, ...) per key, with the observation of step ``number`` as the newest."""
        n = self.spec.n_obs_steps
        if number is None:
            return {key: np.repeat(value[None], n, axis=0) for key, value in step.items()}
        if self._seen and number < self._seen[-1].number:
            self._seen = []
        first = number - n + 1
        kept = [seen for seen in self._seen if first <= seen.number < number]
        self._seen = kept = [*kept, _Seen(number, step)]
        chosen = []  # one per step of the window
        for wanted in range(first, number + 1):
            older = [seen for seen in kept if seen.number <= wanted]
            chosen.append(older[-1] if older else kept[0])
        return {key: np.stack([seen.obs[key] for seen in chosen]) for key in step}


def _numbers(what: str, value: Any) -> NDArray[np.float32]:
    """A value of a message as float32.

    Raises:
        RequestError: no numbers, or some that are not finite in float32.
    """
    if not isinstance(value, np.ndarray | np.generic | int | float):
        raise RequestError(f"{what} is a {type(value).__name__}; send a numpy array of numbers")
    array = np.asarray(value)
    if array.dtype.kind not in "biuf":
        raise RequestError(f"{what} has dtype {array.dtype}; send numbers, best float32")
    with np.errstate(over="ignore"):  # too large for float32: infinite, and refused below
        result = array.astype(np.float32)
    bad = result.size - np.count_nonzero(np.isfinite(result))
    if bad:
        raise RequestError(
            f"{what} holds {bad} NaN or infinite numbers (as float32), expected none"
        )
    return result


def _flag(message: Mapping[Any, Any], key: str) -> bool:
    value = message.get(key, False)
    if not isinstance(value, bool | np.bool_):
        raise RequestError(f"{key} must be true or false, got {reprlib.repr(value)}")
    return bool(value)


def _generator(message: Mapping[Any, Any]) -> np.random.Generator | None:
    seed = _whole(message, "seed")
    return None if seed is None else np.random.default_rng(seed)


def _whole(message: Mapping[Any, Any], key: str) -> int | None:
    value = message.get(key)
    if value is None:
        return None
    is_whole = isinstance(value, int | np.integer) and not isinstance(value, bool)
    if not is_whole or value < 0:
        raise RequestError(f"{key} must be a whole number from 0 on, got {reprlib.repr(value)}")
    return int(value)


def _with_batch(shape: tuple[int, ...]) -> str:
    return f"({', '.join(map(str, ('B', *shape)))})"
