"""Sampling with N network evaluations, along the flow map or along its diagonal."""

from __future__ import annotations

from typing import Literal, get_args

import torch
from torch import Tensor

from cmpolicy.flow.flow_map import FlowMap
from cmpolicy.flow.path import Path, expand_time

#: ``flow_map`` jumps with F(x, t, s); ``diagonal`` integrates the velocity F(x, t, t) instead:
#: Euler steps on the linear path, DDIM steps on the trigonometric one.
SamplerKind = Literal["flow_map", "diagonal"]
SAMPLERS: tuple[str, ...] = get_args(SamplerKind)


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
        raise ValueError(f"nfe (network evaluations) must be at least 1, got {nfe}")
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
    """Carry noise z (B, ...) to data in exactly ``nfe`` evaluations of the network.

    With a ``floor`` the last step starts there: see :func:`time_grid`. With ``start`` (B,) in
    (0, 1] row i of z is a point at time ``start[i]`` (:func:`start_between`), and the times of the
    grid are those shares of it.

    Raises:
        ValueError: ``nfe`` below 1, an unknown ``kind``, or a bad ``floor``.
    """
    return _states(flow_map, z, features, nfe, kind, floor, start)[-1]


def trajectory(
    flow_map: FlowMap,
    z: Tensor,
    features: Tensor | None = None,
    *,
    nfe: int = 1,
    kind: SamplerKind = "flow_map",
    floor: float = 0.0,
) -> Tensor:
    """As :func:`sample`, but all states (nfe + 1, B, ...): the noise first, the data last."""
    return torch.stack([z, *_states(flow_map, z, features, nfe, kind, floor)])


def _states(
    flow_map: FlowMap,
    z: Tensor,
    features: Tensor | None,
    nfe: int,
    kind: SamplerKind,
    floor: float,
    start: Tensor | None = None,
) -> list[Tensor]:
    """The state after each evaluation."""
    if kind not in SAMPLERS:
        raise ValueError(f"unknown sampler {kind!r}; choose one of {list(SAMPLERS)}")
    grid = time_grid(nfe, z.device, z.dtype, floor=floor)
    states: list[Tensor] = []
    x = z
    for i in range(nfe):
        t = grid[i].expand(len(z)) if start is None else grid[i] * start
        s = grid[i + 1].expand(len(z)) if start is None else grid[i + 1] * start
        if kind == "flow_map":
            x = flow_map(x, t, s, features)
        else:
            x = flow_map.path.jump(x, flow_map.velocity(x, t, features), t, s)
        states.append(x)
    return states
