"""Run one job: train its networks side by side, and measure them on the way."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import Any

import numpy as np
import torch
from torch import Tensor

from cmpolicy.flow.objectives import Draws, Objective
from cmpolicy.study.jobs import Job
from cmpolicy.study.measure import Ruler
from cmpolicy.study.nets import (
    StackAdam,
    Weights,
    apply_net,
    flow_map_of,
    init_nets,
    norms,
    one_of,
)
from cmpolicy.study.probes import run_probes
from cmpolicy.study.targets import Target, get_target
from cmpolicy.study.truth import Truth

#: Decay of the averaged weights; until step n it is at most (1 + n) / (10 + n), as in training.
EMA_DECAY = 0.999
#: Time below which the constant map of a start is not followed: its output grows as 1 / t.
_CONSTANT_FLOOR = 0.05
CPU = torch.device("cpu")

#: step(stack, ema, x, z, t, s, progress) -> gradients and losses (M,)
Step = Callable[..., tuple[Weights, Tensor]]


class Source:
    """Data and draws of every model: seeds differ, learning rates of one seed see the same."""

    def __init__(self, target: Target, seeds: int, copies: int) -> None:
        self.target, self.copies = target, copies
        self._data = [np.random.default_rng([seed, 2]) for seed in range(seeds)]
        self._draws = [torch.Generator().manual_seed(1000 + seed) for seed in range(seeds)]

    def batch(self, objective: Objective, size: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """x and z (M, B, D), t and s (M, B)."""
        drawn = [objective.draw(size, (self.target.dim,), g, CPU) for g in self._draws]
        x = torch.stack([torch.as_tensor(self.target.sample(size, rng)) for rng in self._data])
        parts = [torch.stack([getattr(d, name) for d in drawn]) for name in ("z", "t", "s")]
        x, z, t, s = (p.float().repeat(self.copies, *[1] * (p.ndim - 1)) for p in (x, *parts))
        return x, z, t, s


def gradient_step(objective: Objective, progress: float) -> Step:
    """A function that gives gradients and losses of a whole stack."""

    def loss(w: Weights, ema: Weights, x: Tensor, z: Tensor, t: Tensor, s: Tensor) -> Tensor:
        averaged = flow_map_of([p.detach() for p in ema]) if objective.needs_ema else None
        output = objective(flow_map_of(w), x, None, Draws(z, t, s), progress=progress, ema=averaged)
        return output.per_example.mean()

    step: Step = torch.func.vmap(torch.func.grad_and_value(loss))
    return step


def run_job(job: Job, truth: Truth, fit_steps: int) -> dict[str, Any]:
    """Train and measure; the result as JSON holds it.

    ``metrics`` and ``gradient`` hold one list over models for every stage; models are ordered by
    rate, then seed. Gradient norms are those of the steps since the stage before.
    """
    began = time.perf_counter()
    torch.set_num_threads(1)
    objective, ruler = job.build(), Ruler(truth)
    target = get_target(job.target)
    seeds = [*range(job.seeds)] * len(job.rates)
    stack = init_nets(seeds, target.dim)
    if job.start != "fresh":
        _fit(stack, job.start, target, truth, job.seeds, len(job.rates), fit_steps)
    source = Source(target, job.seeds, len(job.rates))
    rates = torch.tensor(job.rates).repeat_interleave(job.seeds)
    adam = StackAdam(stack, rates)
    ema = [p.clone() for p in stack]

    due = sorted({round(share * job.steps) for share in job.stages})
    metrics: dict[str, list[list[float]]] = {}
    gradient: dict[str, list[list[float]]] = {"median": [], "p99": [], "largest": [], "loss": []}
    probes: list[dict[str, Any]] = []
    window: list[Tensor] = []
    losses: list[Tensor] = []
    for step in range(job.steps + 1):
        if step in due:
            _add(metrics, [ruler.measure(flow_map_of(one_of(stack, i)), objective)
                           for i in range(len(seeds))])  # fmt: skip
            _summary(gradient, window, losses, len(seeds))
            window, losses = [], []
            probes.append(run_probes(job, stack, source.target, step / max(job.steps, 1)))
        if step == job.steps:
            break
        grads, values = gradient_step(objective, step / job.steps)(
            stack, ema, *source.batch(objective, job.batch)
        )
        window.append(norms(grads))
        losses.append(values.detach())
        adam.step(grads, _schedule(step / job.steps))
        torch._foreach_lerp_(ema, stack, 1 - min(EMA_DECAY, (1 + step) / (10 + step)))
    result = {
        "job": asdict(job),
        "steps": due,
        "rates": rates.tolist(),
        "seeds": seeds,
        "metrics": metrics,
        "gradient": gradient,
        "ema": {
            str(EMA_DECAY): [
                ruler.measure(flow_map_of(one_of(ema, i)), objective)["error"]
                for i in range(len(seeds))
            ]
        },
        "probes": probes,
        "seconds": time.perf_counter() - began,
    }
    rounded: dict[str, Any] = _rounded(result)
    return rounded


def _schedule(progress: float) -> float:
    """Warm-up over 2 % of the run, then a cosine to 0."""
    return min(1.0, progress / 0.02 + 1e-2) * 0.5 * (1 + math.cos(math.pi * progress))


def _fit(
    stack: Weights, start: str, target: Target, truth: Truth, seeds: int, copies: int, steps: int
) -> None:
    """Bring fresh networks to the true flow map, or to the constant one, by regression."""
    t, s = torch.as_tensor(truth.t).float(), torch.as_tensor(truth.s).float()
    x_t, x_s, x_0 = (torch.as_tensor(getattr(truth, k)).float() for k in ("x_t", "x_s", "x_0"))
    z, end, u = (torch.as_tensor(getattr(truth, k)).float() for k in ("z", "end", "velocity"))
    one, zero = torch.ones_like(t), torch.zeros_like(t)
    x = torch.cat([x_t, x_t, z, x_t])
    late, early = torch.cat([t, t, one, t]), torch.cat([s, zero, zero, t])
    if start == "truth":
        length = (late - early).clamp(min=1e-3)[:, None]
        f = (x - torch.cat([x_s, x_0, end, x_t])) / length
        f = torch.cat([f[: -len(t)], u])
    else:
        center = end.mean(dim=0)
        f = (x - center) / (late - early).clamp(min=_CONSTANT_FLOOR)[:, None]
        keep = slice(0, 3 * len(t))  # the diagonal of a constant map is not defined
        x, late, early, f = x[keep], late[keep], early[keep], f[keep]
    # outputs of short jumps are large and matter little: the error counts as that of the map
    weight = (late - early).clamp(min=_CONSTANT_FLOOR).square()
    if start == "truth":
        weight = torch.ones_like(weight)

    def loss(w: Weights, rows: Tensor) -> Tensor:
        error = apply_net(w, x[rows], late[rows], early[rows]) - f[rows]
        return (error.square().mean(1) * weight[rows]).mean()

    adam = StackAdam(stack, torch.full((len(stack[0]),), 3e-3))
    generators = [torch.Generator().manual_seed(2000 + seed) for seed in range(seeds)]
    step_of = torch.func.vmap(torch.func.grad(loss))
    for step in range(steps):
        rows = torch.stack([torch.randint(len(x), (256,), generator=g) for g in generators])
        adam.step(step_of(stack, rows.repeat(copies, 1)), _schedule(step / steps))


def _add(metrics: dict[str, list[list[float]]], models: Sequence[dict[str, float]]) -> None:
    for name in models[0]:
        metrics.setdefault(name, []).append([model[name] for model in models])


def _summary(
    gradient: dict[str, list[list[float]]],
    window: Sequence[Tensor],
    losses: Sequence[Tensor],
    models: int,
) -> None:
    """Median, 99th percentile and largest of the gradient norms of a window, and the mean loss."""
    if not window:
        for series in gradient.values():
            series.append([math.nan] * models)
        return
    values = torch.stack(list(window))
    gradient["median"].append(values.quantile(0.5, dim=0).tolist())
    gradient["p99"].append(values.quantile(0.99, dim=0).tolist())
    gradient["largest"].append(values.amax(dim=0).tolist())
    gradient["loss"].append(torch.stack(list(losses)).mean(dim=0).tolist())


def _rounded(value: Any) -> Any:
    """Four significant digits; what is no finite number is None."""
    if isinstance(value, float):
        return float(f"{value:.4g}") if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: _rounded(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_rounded(item) for item in value]
    return value
