"""Close looks at networks in training: noise and bias of their targets and gradients.

Each probe is a function of a stack and gives numbers, one list over models or a table of them. No
probe draws from the generators of the training.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from cmpolicy.flow.flow_map import FlowMap, derivative_difference, derivative_jvp
from cmpolicy.flow.objectives import Draws, Objective
from cmpolicy.flow.path import LinearPath
from cmpolicy.study.jobs import Job, build_study_objective
from cmpolicy.study.measure import rms
from cmpolicy.study.nets import Weights, flow_map_of, one_of
from cmpolicy.study.one_sided import one_sided_difference
from cmpolicy.study.targets import Gaussian, Target
from cmpolicy.study.truth import flow

#: Lengths t - s at which the gradients of ESD and iSD are compared.
LENGTHS = (0.05, 0.1, 0.2, 0.4, 0.6, 0.8, 1.0)
#: Batches of a probe that asks for the spread of gradients, and their size.
BATCHES, BATCH = 16, 128
#: Points of a probe that asks for errors of a tangent.
POINTS = 2048
EPSILONS = (0.005, 0.02, 0.05)
#: Maps between the constant and the true one; times that are kept away from 0.
FAMILY = (0.0, 0.25, 0.5, 0.75, 1.0, 1.25)
FAMILY_CUT = 0.05


class Probe(Protocol):
    """A measurement of every model of a stack."""

    def __call__(self, job: Job, stack: Weights, target: Target) -> dict[str, Any]:
        """Numbers by name."""


#: At which shares of a run a probe looks; those that are not named look at every stage.
_WHEN: Mapping[str, tuple[float, ...]] = {
    "noise": (0.0,),
    "family": (0.0,),
    "derivative": (1.0,),
    "picture": (1.0,),
    "lengths": (0.0, 0.1, 1.0),
}


def run_probes(job: Job, stack: Weights, target: Target, progress: float) -> dict[str, Any]:
    """What the probes of the job say at this share of the run."""
    due = [name for name in job.probes if progress in _WHEN.get(name, (progress,))]
    return {name: PROBES[name](job, stack, target) for name in due}


def tangent(job: Job, stack: Weights, target: Target) -> dict[str, Any]:
    """Bias of u_hat against variance of v, both as squared distance to the true velocity.

    mix is the a whose (1 - a) v + a u_hat is nearest to the truth. noise_self and noise_data are
    the summed variances over batches of the gradient of L_sd by the tangents u_hat and v.
    """
    rng = np.random.default_rng(7)
    x, z = target.sample(POINTS, rng), rng.normal(size=(POINTS, target.dim))
    t = rng.beta(0.8, 1.0, size=POINTS)
    x_t = (1 - t)[:, None] * x + t[:, None] * z
    u = torch.as_tensor(target.velocity(x_t, t)).float()
    v = torch.as_tensor(z - x).float()
    points, times = torch.as_tensor(x_t).float(), torch.as_tensor(t).float()
    variance = float((v - u).square().mean())
    found: dict[str, Any] = {"bias": [], "mix": [], "nearest": []}
    for i in range(len(stack[0])):
        with torch.no_grad():
            off = flow_map_of(one_of(stack, i)).velocity(points, times) - u
        bias, cross = float(off.square().mean()), float(((v - u) * off).mean())
        mix = (variance - cross) / (variance + bias - 2 * cross)
        nearest = ((1 - mix) * (v - u) + mix * off).square().mean()
        found["bias"].append(bias)
        found["mix"].append(mix)
        found["nearest"].append(float(nearest))
    found["variance"] = variance
    for kind in ("self", "data"):
        gradient = _jump_gradient("isd", {"tangent": kind})
        norm, noise = _spread(gradient, stack, target, _sorted_times)
        found[f"noise_{kind}"] = noise
        found[f"mean_{kind}"] = norm
    return found


def lengths(job: Job, stack: Weights, target: Target) -> dict[str, Any]:
    """Norms of the gradient of L_sd of ESD and iSD by the length t - s: median and largest."""
    found: dict[str, Any] = {}
    for name in ("isd", "esd"):
        medians, largest = [], []
        for length in LENGTHS:
            each = _norms(_jump_gradient(name, {}), stack, target, _times_apart(length))
            medians.append(each.median(dim=0).values.tolist())
            largest.append(each.amax(dim=0).tolist())
        found[f"{name}_median"], found[f"{name}_largest"] = medians, largest
    return found


def noise(job: Job, stack: Weights, target: Target) -> dict[str, Any]:
    """Of the objective itself, unweighted: its loss, mean gradient and the gradient's noise."""
    settings = {**job.settings, "weight_power": 0.0}
    objective = build_study_objective(job.objective, settings)
    gradient = _gradient(objective, 0.5)
    norm, spread = _spread(gradient, stack, target, objective.draw)
    values = []
    for x, draws in _draws(target, objective.draw):
        for i in range(len(stack[0])):
            output = objective(flow_map_of(one_of(stack, i)), x, None, draws, progress=0.5)
            values.append(float(output.loss))
    loss = np.asarray(values).reshape(BATCHES, -1).mean(axis=0)
    return {"loss": loss.tolist(), "mean": norm, "noise": spread}


def derivative(job: Job, stack: Weights, target: Target) -> dict[str, Any]:
    """Relative error of dF/dt by differences against the exact one, at s = 0, by t and epsilon."""
    rng = np.random.default_rng(8)
    x = torch.as_tensor(target.sample(POINTS, rng)).float()
    z = torch.as_tensor(rng.normal(size=(POINTS, target.dim))).float()
    found: dict[str, Any] = {}
    for time in (1.0, 0.9, 0.5):
        t, s = torch.full((POINTS,), time), torch.zeros(POINTS)
        for epsilon in EPSILONS:
            central, one_sided = [], []
            for i in range(len(stack[0])):
                flow_map = flow_map_of(one_of(stack, i))
                x_t = (1 - time) * x + time * z
                with torch.no_grad():
                    u = flow_map.velocity(x_t, t)
                exact = derivative_jvp(flow_map, x_t, t, s, None, u)
                passing = derivative_difference(flow_map, x_t, t, s, None, u, epsilon)
                stopping = one_sided_difference(flow_map, x_t, t, s, u, epsilon)
                central.append(rms(passing - exact) / rms(exact))
                one_sided.append(rms(stopping - exact) / rms(exact))
            found[f"central t={time} e={epsilon}"] = central
            found[f"one-sided t={time} e={epsilon}"] = one_sided
    return found


def picture(job: Job, stack: Weights, target: Target) -> dict[str, Any]:
    """X_{1->0} on evenly spaced noise z in one dimension: of every model, and the truth."""
    z = np.linspace(-2.5, 2.5, 61)[:, None]
    one = np.ones(len(z))
    noise, t = torch.as_tensor(z).float(), torch.ones(len(z))
    found = []
    for i in range(len(stack[0])):
        with torch.no_grad():
            found.append(flow_map_of(one_of(stack, i))(noise, t, 0 * t).squeeze(1).tolist())
    truth = flow(target, z, one, 0 * one).squeeze(1).tolist()
    return {"z": z.squeeze(1).tolist(), "truth": truth, "found": found}


def family(job: Job, stack: Weights, target: Target) -> dict[str, Any]:
    """Loss and gradient in a of maps between the constant (a = 0) and the truth (a = 1).

    X^a_{t->s} = c + a (X_{t->s} - c), with c the mean of X_{t->s}, is as consistent as the truth.
    Losses are unweighted, batches large, times at least :data:`FAMILY_CUT` from 0; a list over
    batches for each a.
    """
    if not isinstance(target, Gaussian):
        raise TypeError("the family of maps is in closed form for a Gaussian target alone")
    found: dict[str, Any] = {"a": list(FAMILY)}
    for name in ("ct", "dct", "isd"):
        objective = build_study_objective(name, {"weight_power": 0.0})
        losses, slopes = [], []
        for value in FAMILY:
            row = [_family_slope(objective, target, value, seed) for seed in range(job.seeds)]
            losses.append([loss for loss, _ in row])
            slopes.append([slope for _, slope in row])
        found[f"{name}_loss"], found[f"{name}_slope"] = losses, slopes
    return found


def _family_slope(
    objective: Objective, target: Gaussian, value: float, seed: int
) -> tuple[float, float]:
    """Loss and its derivative by a, on one large batch in float64."""
    a = torch.tensor(value, dtype=torch.float64, requires_grad=True)
    mean, width = torch.tensor(target.means[0], dtype=torch.float64), target.width

    def net(x: Tensor, t: Tensor, s: Tensor, features: Tensor | None) -> Tensor:
        late, early = t[:, None], torch.minimum(s, t - FAMILY_CUT)[:, None]  # short jumps: a limit
        before = torch.sqrt((1 - early) ** 2 * width**2 + early**2)
        after = torch.sqrt((1 - late) ** 2 * width**2 + late**2)
        moved = (1 - early) * mean + a * before / after * (x - (1 - late) * mean)
        return (x - moved) / (late - early)

    rng, generator = np.random.default_rng([seed, 3]), torch.Generator().manual_seed(seed)
    size = 16 * POINTS
    drawn = objective.draw(size, (target.dim,), generator, torch.device("cpu"))
    t = drawn.t.double().clamp(min=2 * FAMILY_CUT)
    s = (drawn.s.double()).minimum(t - FAMILY_CUT)
    draws = Draws(drawn.z.double(), t, s)
    x = torch.as_tensor(target.sample(size, rng))
    loss = objective(FlowMap(net, LinearPath()), x, None, draws, progress=0.5).loss
    (slope,) = torch.autograd.grad(loss, a)
    return float(loss.detach()), float(slope)


PROBES: Mapping[str, Probe] = {
    "picture": picture,
    "family": family,
    "tangent": tangent,
    "lengths": lengths,
    "noise": noise,
    "derivative": derivative,
}

#: draw(batch size, shape, generator, device), as an objective's
Draw = Callable[[int, tuple[int, ...], torch.Generator, torch.device], Draws]
#: gradient(stack, x, draws) -> gradients of every model, (M, number of weights)
Gradient = Callable[[Weights, Tensor, Draws], Tensor]


def _gradient(objective: Objective, progress: float) -> Gradient:
    """Gradient of a loss; all models see the same batch."""

    def loss(w: Weights, x: Tensor, z: Tensor, t: Tensor, s: Tensor) -> Tensor:
        draws = Draws(z, t, s)
        return objective(flow_map_of(w), x, None, draws, progress=progress).per_example.mean()

    many = torch.func.vmap(torch.func.grad(loss), in_dims=(0, None, None, None, None))

    def gradient(stack: Weights, x: Tensor, draws: Draws) -> Tensor:
        return _flat(many(stack, x, draws.z, draws.t, draws.s))

    return gradient


def _jump_gradient(name: str, settings: Mapping[str, Any]) -> Gradient:
    """Gradient of L_sd alone: that of the whole loss, less that of flow matching."""
    whole = _gradient(build_study_objective(name, {"weight_power": 0.0, **settings}), 1.0)
    diagonal = _gradient(build_study_objective("fm", {}), 1.0)

    def gradient(stack: Weights, x: Tensor, draws: Draws) -> Tensor:
        return whole(stack, x, draws) - diagonal(stack, x, draws)

    return gradient


def _draws(target: Target, draw: Draw) -> list[tuple[Tensor, Draws]]:
    """The same batches at every call with the same ``draw``."""
    rng, generator = np.random.default_rng(9), torch.Generator().manual_seed(9)
    return [
        (
            torch.as_tensor(target.sample(BATCH, rng)).float(),
            draw(BATCH, (target.dim,), generator, torch.device("cpu")),
        )
        for _ in range(BATCHES)
    ]


def _norms(gradient: Gradient, stack: Weights, target: Target, draw: Draw) -> Tensor:
    """Gradient norm of every batch and model, (BATCHES, M)."""
    return torch.stack([gradient(stack, x, d).norm(dim=1) for x, d in _draws(target, draw)])


def _spread(
    gradient: Gradient, stack: Weights, target: Target, draw: Draw
) -> tuple[list[float], list[float]]:
    """Norm of the mean gradient and summed variance over batches, by model."""
    each = torch.stack([gradient(stack, x, d) for x, d in _draws(target, draw)])
    return each.mean(dim=0).norm(dim=1).tolist(), each.var(dim=0).sum(dim=1).tolist()


def _sorted_times(
    n: int, shape: tuple[int, ...], generator: torch.Generator, device: torch.device
) -> Draws:
    times = torch.rand(n, 2, generator=generator).sort(dim=1).values
    return Draws(torch.randn(n, *shape, generator=generator), times[:, 1], times[:, 0])


def _times_apart(length: float) -> Draw:
    def draw(
        n: int, shape: tuple[int, ...], generator: torch.Generator, device: torch.device
    ) -> Draws:
        t = length + (1 - length) * torch.rand(n, generator=generator)
        return Draws(torch.randn(n, *shape, generator=generator), t, t - length)

    return draw


def _flat(gradients: Sequence[Tensor]) -> Tensor:
    return torch.cat([g.flatten(1) for g in gradients], dim=1).detach()
