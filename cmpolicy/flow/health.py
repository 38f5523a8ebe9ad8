"""How well a network satisfies the identities of a flow map: numbers to log during a run."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from cmpolicy.flow.flow_map import FlowMap, derivative_difference
from cmpolicy.flow.sampler import SamplerKind, sample

#: Steps that integrate the velocity well enough to measure its spread.
DIAGONAL_STEPS = 10
#: Data that varies less than this (normalised units squared) counts as varying this much.
MIN_VARIANCE = 1e-4


@dataclass(frozen=True)
class Health:
    """Scalars on the device, detached.

    semigroup: |X_{m->s}(X_{t->m}(x)) - X_{t->s}(x)| / |X_{t->s}(x) - x|.
    tangent: |Eulerian residual| / |v|. The conditional velocity v of the same samples never
        vanishes; the network's own velocity does while the network is fresh.
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
    features: Tensor | None,
    generator: torch.Generator | None = None,
    *,
    draws: int = 8,
    kind: SamplerKind = "flow_map",
) -> Health:
    """Measure :class:`Health` on normalised data x (B, ...) with its conditions.

    Args:
        flow_map: what is measured.
        x: data, scaled to about [-1, 1].
        features: one condition per sample, or None.
        generator: draws noise and times.
        draws: generated samples per condition, at least 2.
        kind: how samples are generated: by one evaluation of the flow map, or by
            :data:`DIAGONAL_STEPS` steps along the diagonal, whose single step is the data's mean.
    """
    n, device = len(x), x.device
    z = torch.randn(x.shape, generator=generator, device=device, dtype=x.dtype)
    times = torch.rand(n, 3, generator=generator, device=device).to(x.dtype).sort(dim=1).values
    s, m, t = times.unbind(1)
    point = flow_map.path.sample(x, z, t)
    x_t = point.x_t
    direct = flow_map(x_t, t, s, features)
    composed = flow_map(flow_map(x_t, t, m, features), m, s, features)
    semigroup = _norm(composed - direct) / _norm(direct - x_t)

    u = flow_map.velocity(x_t, t, features)
    d = derivative_difference(flow_map, x_t, t, s, features, u)
    f = flow_map.output(x_t, t, s, features)
    tangent = _norm(flow_map.path.residual(f, u, d, x_t, t, s)) / _norm(point.velocity)

    repeated = None if features is None else features.repeat(draws, *(1,) * (features.ndim - 1))
    shape = (draws * n, *x.shape[1:])
    noise = torch.randn(shape, generator=generator, device=device, dtype=x.dtype)
    steps = 1 if kind == "flow_map" else DIAGONAL_STEPS
    samples = sample(flow_map, noise, repeated, nfe=steps, kind=kind)
    spread = samples.reshape(draws, *x.shape).var(dim=0).mean()
    of_data = x.var(dim=0, correction=min(1, n - 1)).mean()
    return Health(semigroup, tangent, spread / of_data.clamp(min=MIN_VARIANCE))


def _norm(x: Tensor) -> Tensor:
    """Root mean square, never zero: a relative error of 0 / 0 is no error."""
    return x.square().mean().sqrt().clamp(min=torch.finfo(x.dtype).tiny)
