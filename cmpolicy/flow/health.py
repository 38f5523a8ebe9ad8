"""How well a network satisfies the identities of a flow map: numbers to log during a run."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from cmpolicy.flow.flow_map import FlowMap, derivative_difference
from cmpolicy.flow.sampler import SamplerKind, sample


@dataclass(frozen=True)
class Health:
    """Scalars on the device, detached.

    semigroup: |X_{m->s}(X_{t->m}(x)) - X_{t->s}(x)| / |X_{t->s}(x) - x|.
    tangent: |F - F_Eulerian target| / |u|, the relative Eulerian residual.
    variance_ratio: variance over noise draws given one condition, against the data's variance; a
        collapsed generator has about 0 where the data has some.
    """

    semigroup: Tensor
    tangent: Tensor
    variance_ratio: Tensor


@torch.no_grad()
def flow_health(
    flow_map: FlowMap,
    x: Tensor,
    cond: Tensor | None,
    generator: torch.Generator | None = None,
    *,
    draws: int = 8,
    kind: SamplerKind = "flow_map",
) -> Health:
    """Measure :class:`Health` on data x (B, ...) with its conditions."""
    n, device = len(x), x.device
    z = torch.randn(x.shape, generator=generator, device=device, dtype=x.dtype)
    times = torch.rand(n, 3, generator=generator, device=device).to(x.dtype).sort(dim=1).values
    s, m, t = times.unbind(1)
    x_t = flow_map.path.sample(x, z, t).x_t
    direct = flow_map(x_t, t, s, cond)
    composed = flow_map(flow_map(x_t, t, m, cond), m, s, cond)
    semigroup = _norm(composed - direct) / _norm(direct - x_t)

    u = flow_map.velocity(x_t, t, cond)
    d = derivative_difference(flow_map, x_t, t, s, cond, u)
    f = flow_map.output(x_t, t, s, cond)
    tangent = _norm(flow_map.path.residual(f, u, d, x_t, t, s)) / _norm(u)

    repeated = None if cond is None else cond.repeat(draws, *(1,) * (cond.ndim - 1))
    noise = torch.randn((draws * n, *x.shape[1:]), generator=generator, device=device)
    chunks = sample(flow_map, noise.to(x.dtype), repeated, kind=kind)
    spread = chunks.reshape(draws, *x.shape).var(dim=0).mean()
    return Health(semigroup, tangent, spread / x.var(dim=0).mean())


def _norm(x: Tensor) -> Tensor:
    return x.square().mean().sqrt().clamp(min=torch.finfo(x.dtype).tiny)
