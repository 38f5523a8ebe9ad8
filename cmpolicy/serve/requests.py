"""What a client's messages mean, and how they are answered: no network and no policy here.

A message is a map of observation keys to arrays, in one of three forms for all keys alike:

    (...)         one step, the newest
    (To, ...)     a whole history, oldest first
    (B, To, ...)  a batch of histories

and beside them, each optional:

    step   a whole number: the control step (at the policy's rate) of the one observed step
    reset  true: a new episode begins, with this observation if there is one
    seed   a whole number: the session's noise starts again from this seed
    noise  (T, A), or (B, T, A) for a batch: standard normal, instead of the session's own;
           (K, T, A) and (B, K, T, A) where the policy's sampler takes K > 1 draws
    plan   (T, A), or (B, T, A) for a batch: the plan that a policy with a warm start starts from
           (PolicySpec.shifted), instead of the session's own; a row of NaN is none

Other keys (a prompt, images that this policy does not use) are ignored; the server logs them once
per session. Lists of numbers and plain numbers are accepted where an array is meant.

The session keeps observations that have a ``step`` and builds the history from those of the last To
steps. A missing step is taken from the nearest older one, or else the nearest newer one, so an
episode begins as in training: its first observation is repeated. A smaller ``step`` than the last
begins a new episode. One step without ``step`` stands for the whole history, because its age is
unknown (openpi's ActionChunkBroker asks once per chunk: its last observation is a whole chunk old,
and a policy that takes it for the step before would see a speed that never was).

Of a policy with a warm start the session keeps the plan that answered the last ``step``, too, and
the next one starts from it, by as many steps as passed. A new episode begins without one, and so
does whatever has no ``step``.
"""

from __future__ import annotations

import logging
import reprlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from cmpolicy.observation import ObservationError, read_noise, read_observation, read_plan
from cmpolicy.serve.wire import MAX_BYTES, pack
from cmpolicy.spec import RESERVED, PolicySpec

_logger = logging.getLogger(__name__)

_OVERHEAD = 65_536  # bytes for keys and fields

_Form = Literal["step", "history", "batch"]
_FORMS: dict[int, _Form] = {0: "step", 1: "history", 2: "batch"}


class RequestError(ValueError):
    """A message that the policy cannot answer; the text is sent to the client."""


@dataclass(frozen=True)
class Request:
    """A checked request for one decision per row.

    Attributes:
        obs: (B, To, ...) per key, float32 or uint8 (frames).
        noise: (B, T, A) float32.
        is_batch: whether the client sent a batch, and gets a batch back.
        plan: (B, T, A) to start from, NaN in rows without one; None where no row has one.
        step: of the one observed step, if the client counts them.
    """

    obs: dict[str, NDArray[Any]]
    noise: NDArray[np.float32]
    is_batch: bool
    plan: NDArray[Any] | None = None
    step: int | None = None

    @property
    def rows(self) -> int:
        """B."""
        return len(self.noise)


@dataclass(frozen=True)
class Answer:
    """The decision for one request.

    Attributes:
        plan: (B, P, A).
        infer_ms: duration of the policy call.
        queue_ms: time between the request and the start of that call.
        batch_rows: rows of that call, of all requests together.
    """

    plan: NDArray[Any]
    infer_ms: float
    queue_ms: float
    batch_rows: int


def message_bound(spec: PolicySpec, max_batch: int) -> int:
    """Default bound of a message in bytes.

    16 MiB, so that clients may send camera frames that this policy ignores, or as much as
    ``max_batch`` observations in float64 need, whichever is more.
    """
    row = spec.message_bytes()
    fields = sum(len(key.encode()) for key in spec.obs) + _OVERHEAD
    return max(MAX_BYTES, max_batch * row) + fields


def reply(
    request: Request | None, answer: Answer | None, spec: PolicySpec, previous_ms: float | None
) -> bytes:
    """The packed answer to a message.

    Args:
        request: that was answered; None for a message of ``reset`` or ``seed`` alone.
        answer: to it.
        spec: of the policy.
        previous_ms: duration of the message before, including the sending of its answer.
    """
    # Numbers only: openpi's ActionChunkBroker slices every array of an answer.
    timing: dict[str, float] = {} if previous_ms is None else {"prev_total_ms": previous_ms}
    if request is None or answer is None:
        return pack({"server_timing": timing})
    timing["infer_ms"] = answer.infer_ms
    timing["queue_ms"] = answer.queue_ms
    timing["batch_rows"] = answer.batch_rows
    plan = answer.plan if request.is_batch else answer.plan[0]
    return pack(
        {
            "actions": plan[..., : spec.n_action_steps, :],
            "plan": plan,
            "server_timing": timing,
        }
    )


@dataclass(frozen=True)
class _Seen:
    """An observation (...) per key, and at which step it was made."""

    number: int
    obs: dict[str, NDArray[Any]]


class Session:
    """State of one connection. A message that is refused changes nothing.

    Args:
        spec: of the policy.
        max_batch: largest batch of histories in one message.
        seed: of the noise; None takes one from the operating system.
        is_warm: whether the policy has a warm start.
    """

    def __init__(
        self,
        spec: PolicySpec,
        *,
        max_batch: int,
        seed: np.random.SeedSequence | None = None,
        is_warm: bool = False,
    ) -> None:
        self.spec = spec
        self._is_warm = is_warm
        self._answered: tuple[int, NDArray[Any]] | None = None  # step and its plan (P, A)
        self._max_batch = max_batch
        self._rng = np.random.default_rng(seed)
        self._seen: list[_Seen] = []  # within the last To steps, oldest first
        self._told_unknown = False

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
            if reset:
                self._begin_episode()
            self._rng = rng or self._rng
            return None
        self._check_keys(message)
        try:
            form, steps = self._arrays(message)
            rows = len(next(iter(steps.values()))) if form == "batch" else 1
            noise = message.get("noise")
            if noise is not None:
                noise = read_noise(self.spec, noise, rows if form == "batch" else None)
                noise = noise.reshape(rows, *self.spec.noise_shape)
            plan = self._given_plan(message, form, rows)
        except ObservationError as error:
            raise RequestError(str(error)) from error
        number = _whole(message, "step")
        if number is not None and form != "step":
            raise RequestError(f"step={number} belongs to one observation step, this is a {form}")
        # everything is in order: from here on the session changes
        if rng is not None:
            self._rng = rng
        if reset:
            self._begin_episode()
        if noise is None:
            noise = self._rng.standard_normal((rows, *self.spec.noise_shape), dtype=np.float32)
        if form == "step":
            steps = self._history(number, steps)
        if form != "batch":
            steps = {key: value[None] for key, value in steps.items()}
        if plan is None and number is not None and self._answered is not None:
            before, actions = self._answered
            plan = self.spec.shifted(actions, number - before)[None]
        return Request(steps, noise, form == "batch", plan, number)

    def answered(self, request: Request, answer: Answer) -> None:
        """Keep the plan, if the next request may start from it."""
        if self._is_warm and request.step is not None:
            self._answered = request.step, answer.plan[0]

    def _begin_episode(self) -> None:
        self._seen, self._answered = [], None

    def _check_keys(self, message: Mapping[Any, Any]) -> None:
        missing = sorted(self.spec.obs.keys() - message.keys())
        unknown = sorted(str(k) for k in message.keys() - {*self.spec.obs, *RESERVED})
        if missing:
            raise RequestError(
                f"the observation lacks the keys {missing}; this policy needs "
                f"{sorted(self.spec.obs)}, the message has {reprlib.repr(unknown)} beside them"
            )
        if unknown and not self._told_unknown:
            self._told_unknown = True
            _logger.info(
                "a client sends keys that this policy does not use, they are ignored: %s",
                reprlib.repr(unknown),
            )

    def _arrays(self, message: Mapping[str, Any]) -> tuple[_Form, dict[str, NDArray[Any]]]:
        """Form of the observations and the observations, checked and of one form."""
        form: _Form | None = None
        first, rows = "", 0
        arrays: dict[str, NDArray[Any]] = {}
        for key, shape in self.spec.obs.items():
            if key in self.spec.images:
                self._check_files(key, message[key])
            array = read_observation(self.spec, key, message[key])
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

    def _check_files(self, key: str, value: Any) -> None:
        """Refuse more files than frames are taken, before any is decoded."""
        found, most = _n_files(value), self._max_batch * self.spec.n_obs_steps
        if found > most:
            raise RequestError(
                f"observation {key!r} holds {found} files; this server takes at most {most} frames "
                f"of a camera in one message: {self._max_batch} histories of n_obs_steps="
                f"{self.spec.n_obs_steps}"
            )

    def _given_plan(
        self, message: Mapping[str, Any], form: _Form, rows: int
    ) -> NDArray[Any] | None:
        """(B, T, A) of the message, if it brings one."""
        if message.get("plan") is None:
            return None
        if not self._is_warm:
            raise RequestError("plan: this policy has no warm start, so it takes none")
        value = message["plan"]
        return read_plan(self.spec, value if form == "batch" else [value], rows)

    def _history(
        self, number: int | None, step: dict[str, NDArray[Any]]
    ) -> dict[str, NDArray[Any]]:
        """(To, ...) per key, with the observation of step ``number`` as the newest."""
        n = self.spec.n_obs_steps
        if number is None:
            return {key: np.repeat(value[None], n, axis=0) for key, value in step.items()}
        if self._seen and number < self._seen[-1].number:
            self._begin_episode()
        first = number - n + 1
        kept = [seen for seen in self._seen if first <= seen.number < number]
        self._seen = kept = [*kept, _Seen(number, step)]
        chosen = []  # one per step of the window
        for wanted in range(first, number + 1):
            older = [seen for seen in kept if seen.number <= wanted]
            chosen.append(older[-1] if older else kept[0])
        return {key: np.stack([seen.obs[key] for seen in chosen]) for key in step}


def _n_files(value: Any) -> int:
    return sum(map(_n_files, value)) if isinstance(value, list) else isinstance(value, bytes)


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
