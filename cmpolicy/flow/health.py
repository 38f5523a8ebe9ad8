"""How well a network satisfies the identities of a flow map: numbers to log during a run."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from cmpolicy.flow.flow_map import FlowMap, derivative_difference
from cmpolicy.flow.sampler import SamplerKind, get_sampler, sample

#: Steps that integrate the velocity well enough to measure its spread.
DIAGONAL_STEPS = 10
#: Evaluations of the samplers that need fewer.
HEALTH_STEPS = {"flow_map": 1, "restart": 1, "regression": 1, "mip": 2}
#: Samples whose way along the flow is compared with the one jump: each costs so many evaluations.
MAP_SAMPLES = 256
#: Generated samples per example.
DRAWS = 8
#: Data that varies less than this (normalised units squared) counts as varying this much.
MIN_VARIANCE = 1e-4


@dataclass(frozen=True)
class Health:
    """Scalars on the device, detached; None where the sampler knows no velocity or other jumps.

    semigroup: |X_{m->s}(X_{t->m}(x)) - X_{t->s}(x)| / |X_{t->s}(x) - x|.
    tangent: |Eulerian residual| / |v|. The conditional velocity v of the same samples never
        vanishes; the network's own velocity does while the network is fresh.
    tangent_at_1: the same at t = 1 and s = 0, the one jump that one-step sampling makes; against
        |z - x|, which is |v| on the linear path.
    map_error: distance of the one-step map from its own flow (:data:`DIAGONAL_STEPS` steps of the
        velocity from the same noise), against the spread of its samples over noise.
    variance_ratio: variance over noise draws given the same features, against the data's variance;
        a collapsed generator has about 0 where the data has some.
    """

    semigroup: Tensor | None
    tangent: Tensor | None
    tangent_at_1: Tensor | None
    map_error: Tensor | None
    variance_ratio: Tensor


@torch.no_grad()
def flow_health(
    flow_map: FlowMap,
    x: Tensor,
    features: Tensor | None,
    generator: torch.Generator | None = None,
    *,
    kind: SamplerKind = "flow_map",
) -> Health:
    """Measure :class:`Health` on normalised data x (N, ...) with its features.

    Args:
        flow_map: what is measured.
        x: data, scaled to about [-1, 1].
        features: (N, D), one row per example, or None.
        generator: draws noise and times.
        kind: how samples are generated: by one evaluation of the flow map, or by
            :data:`DIAGONAL_STEPS` steps along the diagonal, whose single step is the data's mean;
            others by their own sampler with at most so many evaluations.
    """
    n, device = len(x), x.device
    of_data = x.var(dim=0, correction=min(1, n - 1)).mean().clamp(min=MIN_VARIANCE)
    if not get_sampler(kind).is_flow_map:
        _, samples, _ = _generate(flow_map, x, features, generator, kind)
        spread = samples.reshape(DRAWS, *x.shape).var(dim=0).mean()
        return Health(None, None, None, None, spread / of_data)
    z = torch.randn(x.shape, generator=generator, device=device, dtype=x.dtype)
    times = torch.rand(n, 3, generator=generator, device=device).to(x.dtype).sort(dim=1).values
    s, m, t = times.unbind(1)
    point = flow_map.path.sample(x, z, t)
    x_t = point.x_t
    direct = flow_map(x_t, t, s, features)
    composed = flow_map(flow_map(x_t, t, m, features), m, s, features)
    semigroup = _norm(composed - direct) / _norm(direct - x_t)

    one, zero = torch.ones_like(t), torch.zeros_like(t)
    tangent = _norm(_residual(flow_map, x_t, t, s, features)) / _norm(point.velocity)
    of_jump = _norm(_residual(flow_map, z, one, zero, features)) / _norm(z - x)

    noise, samples, repeated = _generate(flow_map, x, features, generator, kind)
    spread = samples.reshape(DRAWS, *x.shape).var(dim=0).mean()
    few = slice(0, MAP_SAMPLES)
    some = None if repeated is None else repeated[few]
    along = sample(flow_map, noise[few], some, nfe=DIAGONAL_STEPS, kind="diagonal")
    jumped = sample(flow_map, noise[few], some, nfe=1)
    map_error = _norm(jumped - along) / spread.sqrt().clamp(min=MIN_VARIANCE**0.5)
    return Health(semigroup, tangent, of_jump, map_error, spread / of_data)


def _generate(
    flow_map: FlowMap,
    x: Tensor,
    features: Tensor | None,
    generator: torch.Generator | None,
    kind: SamplerKind,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Noise, samples of every row of features one after the other, and the features."""
    sampler, steps = get_sampler(kind), HEALTH_STEPS.get(kind, DIAGONAL_STEPS)
    repeated = None if features is None else features.repeat(DRAWS, *(1,) * (features.ndim - 1))
    n_noises = sampler.n_noises(steps)
    several = () if n_noises == 1 else (n_noises,)
    shape = (DRAWS * len(x), *several, *x.shape[1:])
    noise = torch.randn(shape, generator=generator, device=x.device, dtype=x.dtype)
    return noise, sample(flow_map, noise, repeated, nfe=steps, kind=kind), repeated


def _residual(
    flow_map: FlowMap, x_t: Tensor, t: Tensor, s: Tensor, features: Tensor | None
) -> Tensor:
    """The Eulerian residual of the network with its own velocity."""
    u = flow_map.velocity(x_t, t, features)
    d = derivative_difference(flow_map, x_t, t, s, features, u)
    return flow_map.path.residual(flow_map.output(x_t, t, s, features), u, d, x_t, t, s)


def _norm(x: Tensor) -> Tensor:
    """Root mean square, never zero: a relative error of 0 / 0 is no error."""
    return x.square().mean().sqrt().clamp(min=torch.finfo(x.dtype).tiny)
