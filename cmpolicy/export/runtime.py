"""What running an exported policy has in common, whatever runs it: checks, noise, the protocol.

No torch here. Legend: B batch, To observation steps, T horizon, Ta executed and P planned actions,
A action size.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from cmpolicy.export.facts import ExportFacts
from cmpolicy.spec import PolicySpec, SpecError

Array = npt.NDArray[Any]
Floats = npt.NDArray[np.float32]


class ExportedRuntime(ABC):
    """An exported policy: keeps the ``ChunkPolicy`` protocol, stateless, float32 at its core.

    ``facts`` is what the file says of itself. :meth:`infer` may be called from several threads.

    Args:
        facts: of the file.
        seed: of the noise of calls that bring none; None takes entropy from the system.
    """

    def __init__(self, facts: ExportFacts, seed: int | None = None) -> None:
        self.facts = facts
        self._rng = np.random.default_rng(seed)  # locks itself around every draw

    @abstractmethod
    def _run(self, obs: Sequence[Floats], noise: Floats, *, output: int) -> Floats:
        """Output 0, the actions, or 1, the plan; ``obs`` in the order of the spec."""

    @property
    def spec(self) -> PolicySpec:
        """Observation keys and shapes, A, T, To and Ta."""
        return self.facts.spec

    @property
    def n_obs_steps(self) -> int:
        """To."""
        return self.facts.spec.n_obs_steps

    @property
    def n_action_steps(self) -> int:
        """Ta."""
        return self.facts.spec.n_action_steps

    @property
    def nfe(self) -> int:
        """Network evaluations per call, fixed at export."""
        return self.facts.nfe

    @property
    def control_hz(self) -> float | None:
        """Rate of the actions, where the bundle said it."""
        return self.facts.control_hz

    def infer(
        self, obs: Mapping[str, Array], noise: Array | None = None, *, nfe: int | None = None
    ) -> Floats:
        """The actions to execute now, (B, Ta, A) in env units.

        Args:
            obs: (B, To, ...) per key, env units, oldest first, of any real dtype.
            noise: (B, T, A) standard normal; drawn here if not given.
            nfe: the file's own number of network evaluations, or None.

        Raises:
            ValueError: another ``nfe``.
            SpecError: keys, shapes or a dtype that do not fit, NaN or inf (key and count).
        """
        return self._run(*self._inputs(obs, noise, nfe), output=0)

    def infer_plan(
        self, obs: Mapping[str, Array], noise: Array | None = None, *, nfe: int | None = None
    ) -> Floats:
        """As :meth:`infer`, but every action from the newest observation on: (B, P, A)."""
        return self._run(*self._inputs(obs, noise, nfe), output=1)

    def _inputs(
        self, obs: Mapping[str, Array], noise: Array | None, nfe: int | None
    ) -> tuple[list[Floats], Floats]:
        if nfe not in (None, self.nfe):
            raise ValueError(
                f"nfe={nfe}, but this file was exported with nfe={self.nfe}; leave nfe out, or "
                f"export the policy again with nfe={nfe}"
            )
        batch = self.spec.check_obs(obs)
        arrays = [_floats(obs[key], f"observation {key!r}") for key in self.spec.obs]
        want = (batch, *self.spec.noise_shape)
        if noise is None:
            return arrays, self._rng.standard_normal(want, dtype=np.float32)
        if np.shape(noise) != want:
            raise SpecError(
                f"noise has shape {np.shape(noise)}, expected {want} (batch, horizon, action_dim)"
            )
        return arrays, _floats(noise, "noise")


def _floats(value: Array, what: str) -> Floats:
    """The values as contiguous float32, without a copy where they are that.

    Raises:
        SpecError: not real numbers, or not finite as float32.
    """
    array = np.asarray(value)
    if array.dtype.kind not in "fiub":
        raise SpecError(f"{what} holds {array.dtype} values, expected real numbers")
    with np.errstate(over="ignore"):  # counted below
        floats = np.ascontiguousarray(array, dtype=np.float32)
    bad = floats.size - np.count_nonzero(np.isfinite(floats))
    if bad:
        raise SpecError(f"{what} holds {bad} NaN or infinite numbers, expected none")
    return floats
