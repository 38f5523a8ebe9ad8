"""Sampling with N network evaluations: along the flow map, or as the objective asks.

Legend: x (B, ...) the state, f what the network made of it, t and s (B,) or single numbers.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from cmpolicy.flow.diffusion import STEPS, step_back
from cmpolicy.flow.flow_map import FlowMap
from cmpolicy.flow.path import Path, expand_time

#: Names of :data:`SAMPLERS`.
SamplerKind = Literal["flow_map", "diagonal", "restart", "regression", "mip", "ddpm", "ddim"]
#: Time of the second evaluation of ``mip`` (2512.01809: 0.9 of the way to the data).
MIP_TIME = 0.1


class Sampler:
    """Jumps with F(x, t, s), evenly spaced from 1 to 0: the sampler of a flow map.

    A step is one evaluation F(x, t, :meth:`second_time`) and :meth:`advance`.
    """

    #: Whether the network has a velocity F(x, t, t) and jumps F(x, t, s), whose health can be told.
    is_flow_map = True
    #: What the network's output stands for: ``velocity``, ``data`` or ``noise``.
    predicts = "velocity"
    #: Whether noise takes part; else samples begin at zero.
    is_random = True

    def grid(
        self,
        nfe: int,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
        floor: float = 0.0,
    ) -> Tensor:
        """Times t_0 > ... > t_N, (N + 1,).

        Raises:
            ValueError: a number of evaluations that the sampler cannot do, or a bad floor.
        """
        if floor and not self.is_flow_map:
            raise ValueError(
                f"time_floor={floor}: only flow_map and diagonal samplers have a floor"
            )
        return self._grid(nfe, device, dtype, floor)

    def _grid(
        self, nfe: int, device: torch.device | None, dtype: torch.dtype | None, floor: float
    ) -> Tensor:
        return time_grid(nfe, device, dtype, floor=floor)

    def n_noises(self, nfe: int) -> int:
        """How many draws of noise ``nfe`` evaluations take."""
        return 1

    def check_start(self) -> None:
        """Raise ValueError unless samples may start between data and noise."""
        if not self.is_flow_map:
            raise ValueError(
                "a warm start needs a policy that is sampled along its flow (sampler flow_map or "
                "diagonal); leave out warm_start"
            )

    def second_time(self, t: Tensor, s: Tensor) -> Tensor:
        """The network's second time in a step from t to s."""
        return s

    def advance(
        self, path: Path, x: Tensor, f: Tensor, t: Tensor, s: Tensor, noise: Tensor | None
    ) -> Tensor:
        """The state at s. ``noise`` is the next draw, None where none is left."""
        return path.jump(x, f, t, s)


class _Diagonal(Sampler):
    """Integrates the velocity F(x, t, t): Euler steps on the linear path, DDIM's on the other."""

    def second_time(self, t: Tensor, s: Tensor) -> Tensor:
        return t


class _Restart(Sampler):
    """Jumps to 0 from anywhere, and begins anew from there with fresh noise (2303.01469)."""

    is_flow_map = False

    def n_noises(self, nfe: int) -> int:
        return nfe

    def second_time(self, t: Tensor, s: Tensor) -> Tensor:
        return torch.zeros_like(s)

    def advance(
        self, path: Path, x: Tensor, f: Tensor, t: Tensor, s: Tensor, noise: Tensor | None
    ) -> Tensor:
        data = path.jump(x, f, t, torch.zeros_like(s))
        return data if noise is None else path.sample(data, noise, s).x_t


@dataclass(frozen=True)
class _Regression(Sampler):
    """The network's outputs are the data: from zero, then from what it said, at fixed times."""

    times: tuple[float, ...]

    is_flow_map = False
    predicts = "data"
    is_random = False

    def _grid(
        self, nfe: int, device: torch.device | None, dtype: torch.dtype | None, floor: float
    ) -> Tensor:
        if nfe != len(self.times) - 1:
            raise ValueError(
                f"nfe={nfe}: a policy of this kind makes exactly {len(self.times) - 1} network "
                "evaluation(s)"
            )
        return torch.tensor(self.times, device=device, dtype=dtype)

    def second_time(self, t: Tensor, s: Tensor) -> Tensor:
        return torch.zeros_like(s)

    def advance(
        self, path: Path, x: Tensor, f: Tensor, t: Tensor, s: Tensor, noise: Tensor | None
    ) -> Tensor:
        return path.sample(f, torch.zeros_like(f), s).x_t


@dataclass(frozen=True)
class _Diffusion(Sampler):
    """DDPM or DDIM with evenly spaced steps of :mod:`cmpolicy.flow.diffusion`."""

    fresh_noise: bool

    is_flow_map = False
    predicts = "noise"

    def _grid(
        self, nfe: int, device: torch.device | None, dtype: torch.dtype | None, floor: float
    ) -> Tensor:
        # between a half and all of them the spacing is one step, so it would start half-way
        if not (1 <= nfe <= STEPS // 2 or nfe == STEPS):
            raise ValueError(
                f"nfe={nfe}: a diffusion of {STEPS} steps makes 1 to {STEPS // 2} of them, evenly "
                f"spaced, or all {STEPS}"
            )
        steps = torch.arange(nfe - 1, -2, -1, device=device) * (STEPS // nfe)
        return steps.to(torch.get_default_dtype() if dtype is None else dtype) / STEPS

    def n_noises(self, nfe: int) -> int:
        return nfe if self.fresh_noise else 1

    def second_time(self, t: Tensor, s: Tensor) -> Tensor:
        return t

    def advance(
        self, path: Path, x: Tensor, f: Tensor, t: Tensor, s: Tensor, noise: Tensor | None
    ) -> Tensor:
        if self.fresh_noise and noise is None:  # the last step, whose variance is zero
            noise = torch.zeros_like(x)
        return step_back(x, f, t, s, noise if self.fresh_noise else None)


#: ``flow_map`` jumps with F(x, t, s); ``diagonal`` integrates the velocity F(x, t, t); ``restart``
#: is consistency training's, ``regression`` and ``mip`` have no noise; ``ddpm``, ``ddim``:
#: Diffusion Policy's.
SAMPLERS: dict[str, Sampler] = {
    "flow_map": Sampler(),
    "diagonal": _Diagonal(),
    "restart": _Restart(),
    "regression": _Regression((1.0, 0.0)),
    "mip": _Regression((1.0, MIP_TIME, 0.0)),
    "ddpm": _Diffusion(fresh_noise=True),
    "ddim": _Diffusion(fresh_noise=False),
}


def get_sampler(kind: str) -> Sampler:
    """The sampler of that name.

    Raises:
        ValueError: an unknown name, with the known ones.
    """
    if kind not in SAMPLERS:
        raise ValueError(f"unknown sampler {kind!r}; choose one of {list(SAMPLERS)}")
    return SAMPLERS[kind]


def check_sampler(kind: str, own: str) -> None:
    """Whether a network made for the sampler ``own`` can be sampled by ``kind``.

    Raises:
        ValueError: an unknown name, or one for networks that predict something else.
    """
    predicts = get_sampler(own).predicts
    fitting = [name for name, sampler in SAMPLERS.items() if sampler.predicts == predicts]
    if get_sampler(kind).predicts != predicts:
        raise ValueError(
            f"sampler={kind} is for networks that predict the {get_sampler(kind).predicts}, and "
            f"this one predicts the {predicts}; choose one of {fitting}"
        )


def time_grid(
    nfe: int,
    device: torch.device | None = None,
    dtype: torch.dtype | None = None,
    *,
    floor: float = 0.0,
) -> Tensor:
    """1 = t_0 > ... > t_N = 0, (N + 1,): evenly spaced down to 0, or to ``floor`` and then to 0.

    Raises:
        ValueError: ``nfe`` below 1, a floor outside [0, 1), or one that one step would skip.
    """
    if nfe < 1:
        raise ValueError(f"nfe={nfe}: network evaluations must be at least 1")
    if not 0 <= floor < 1:
        raise ValueError(f"the floor of the time grid must lie in [0, 1), got {floor}")
    if floor == 0.0:
        return torch.linspace(1.0, 0.0, nfe + 1, device=device, dtype=dtype)
    if nfe == 1:
        raise ValueError(
            f"one evaluation goes from 1 to 0 and cannot stop at the floor {floor}; give at least "
            "2 evaluations, or no floor"
        )
    above = torch.linspace(1.0, floor, nfe, device=device, dtype=dtype)
    return torch.cat([above, above.new_zeros(1)])


def start_between(path: Path, x: Tensor, z: Tensor, start: Tensor) -> Tensor:
    """Where sampling begins that starts at time ``start`` (B,) from data x: x_t of x and noise z.

    Rows that start at 1 are the noise itself, to the last bit, whatever their x holds.
    """
    x_t = path.sample(x, z, start).x_t
    return torch.where(expand_time(start, x) < 1, x_t, z)


def sample(
    flow_map: FlowMap,
    z: Tensor,
    features: Tensor | None = None,
    *,
    nfe: int = 1,
    kind: SamplerKind = "flow_map",
    floor: float = 0.0,
    start: Tensor | None = None,
) -> Tensor:
    """Carry noise z to data (B, ...) in exactly ``nfe`` evaluations of the network.

    With a ``floor`` the last step starts there: see :func:`time_grid`. With ``start`` (B,) in
    (0, 1] row i of z is a point at time ``start[i]`` (:func:`start_between`), and the times of the
    grid are those shares of it; only flow_map and diagonal samplers start between data and noise.

    Args:
        z: (B, ...), or (B, K, ...) for a sampler that takes K > 1 draws of noise.

    Raises:
        ValueError: an ``nfe`` that the sampler cannot do, an unknown ``kind``, a bad ``floor``, or
            a ``start`` for a sampler that has none.
    """
    if start is not None:
        get_sampler(kind).check_start()
    return _states(flow_map, z, features, nfe, kind, floor, start)[-1]


def trajectory(
    flow_map: FlowMap,
    z: Tensor,
    features: Tensor | None = None,
    *,
    nfe: int = 1,
    kind: SamplerKind = "flow_map",
) -> Tensor:
    """As :func:`sample`, but all states (nfe + 1, B, ...): the noise first, the data last."""
    return torch.stack(_states(flow_map, z, features, nfe, kind))


def _states(
    flow_map: FlowMap,
    z: Tensor,
    features: Tensor | None,
    nfe: int,
    kind: SamplerKind,
    floor: float = 0.0,
    start: Tensor | None = None,
) -> list[Tensor]:
    """Where it begins, and the state after each evaluation."""
    sampler = get_sampler(kind)
    grid = sampler.grid(nfe, z.device, z.dtype, floor)
    noises = z.unbind(1) if sampler.n_noises(nfe) > 1 else (z,)
    states = [noises[0] if sampler.is_random else torch.zeros_like(z)]
    for i in range(nfe):
        x = states[-1]
        t = grid[i].expand(len(z)) if start is None else grid[i] * start
        s = grid[i + 1].expand(len(z)) if start is None else grid[i + 1] * start
        f = flow_map.output(x, t, sampler.second_time(t, s), features)
        noise = noises[i + 1] if i + 1 < len(noises) else None
        states.append(sampler.advance(flow_map.path, x, f, t, s, noise))
    return states
