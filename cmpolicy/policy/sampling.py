"""How a policy's decisions are sampled: settings that may change while it is used."""

from __future__ import annotations

from dataclasses import replace

from torch import nn

from cmpolicy.flow.sampler import SamplerKind, check_sampler, get_sampler
from cmpolicy.spec import PolicySpec, check_warm_start


class SampledModule(nn.Module):
    """A module with a sampler, and a ``spec`` that says what noise the sampler takes.

    Raises:
        ValueError: an unknown sampler, or an ``nfe`` that it cannot do.
    """

    def __init__(self, spec: PolicySpec, sampler: SamplerKind, nfe: int) -> None:
        super().__init__()
        get_sampler(sampler).grid(nfe)  # raises
        self.spec = spec
        self._sampler, self._nfe = sampler, nfe
        self._fit_noise()
        self.noise_scale = 1.0
        self.time_floor = 0.0  # start of the last of several evaluations; not saved, see time_grid
        self._warm_start: float | None = None

    @property
    def n_action_steps(self) -> int:
        """Ta, actions executed before the next decision; may be set, and is part of a saved policy.

        Fewer than it was trained with answer sooner to what happens, and cost more decisions.

        Raises:
            SpecError: on setting more than the horizon holds, or less than 1.
        """
        return self.spec.n_action_steps

    @n_action_steps.setter
    def n_action_steps(self, count: int) -> None:
        self.spec = replace(self.spec, n_action_steps=count)

    @property
    def warm_start(self) -> float | None:
        """Time in (0, 1] at which decisions that are handed a ``plan`` begin; None: none is.

        The plan is noised to that time, so near 0 a decision hardly departs from it, and at 1 it
        begins from the noise alone. Part of a saved policy.

        Raises:
            ValueError: on setting another number, or with a sampler that cannot start there.
        """
        return self._warm_start

    @warm_start.setter
    def warm_start(self, value: float | None) -> None:
        if check_warm_start(value) is not None:
            get_sampler(self._sampler).check_start()
        self._warm_start = check_warm_start(value)

    @property
    def sampler(self) -> SamplerKind:
        """How noise becomes actions; may be set, and counts from the next decision on.

        Raises:
            ValueError: on setting an unknown one, one for networks that predict something else, or
                one that cannot have the :attr:`warm_start`.
        """
        return self._sampler

    @sampler.setter
    def sampler(self, kind: SamplerKind) -> None:
        check_sampler(kind, self._sampler)
        if self._warm_start is not None:
            get_sampler(kind).check_start()
        self._sampler = kind
        self._fit_noise()

    @property
    def nfe(self) -> int:
        """Network evaluations per decision; may be set, and counts from the next decision on."""
        return self._nfe

    @nfe.setter
    def nfe(self, nfe: int) -> None:
        get_sampler(self._sampler).grid(nfe)  # raises
        self._nfe = nfe
        self._fit_noise()

    def _fit_noise(self) -> None:
        n_noises = get_sampler(self._sampler).n_noises(self._nfe)
        self.spec = replace(self.spec, n_noises=n_noises)
