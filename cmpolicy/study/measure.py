"""How far a network's flow map is from the true one, and the health that a run logs."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from cmpolicy.flow.flow_map import FlowMap
from cmpolicy.flow.health import flow_health
from cmpolicy.flow.objectives import Objective
from cmpolicy.flow.sampler import get_sampler, sample
from cmpolicy.study.truth import Truth

#: A run whose map is this far off (root mean square, in standard deviations of the data) has
#: diverged; a constant map is 1 off, noise left as it is about 1.5.
DIVERGED = 3.0
#: A run with less than this share of the true variance has collapsed.
COLLAPSED = 0.25
#: A run whose map is this far off, in the same measure, has settled on a wrong one.
WRONG = 0.5

HEALTH = ("semigroup", "tangent", "tangent_at_1", "map_error", "variance_ratio")


class Ruler:
    """The true flow as float32 tensors, and data for the health metrics."""

    def __init__(self, truth: Truth) -> None:
        def tensor(name: str) -> Tensor:
            return torch.as_tensor(getattr(truth, name), dtype=torch.float32)

        self.z, self.end, self.x_t, self.t, self.s = map(tensor, ("z", "end", "x_t", "t", "s"))
        self.x_s, self.x_0, self.velocity = map(tensor, ("x_s", "x_0", "velocity"))
        self.spread = truth.spread

    @torch.no_grad()
    def measure(self, flow_map: FlowMap, objective: Objective) -> dict[str, float]:
        """Numbers of one model; not a number where the objective has no such thing.

        error, error_worst: of X_{1->0}, root mean square and largest over noise, in standard
        deviations of the data. error_any: of X_{t->s} at random times (X_{t->0} where an objective
        has no other jumps). variance: of X_{1->0} over noise, against the truth's. health_*: see
        :func:`flow_health`, without knowledge of the truth.
        """
        kind = objective.sampler
        found = sample(flow_map, self.z, nfe=objective.nfe, kind=kind)
        distance = (found - self.end).square().mean(1).sqrt() / self.spread
        variance = found.var(dim=0).mean() / self.end.var(dim=0).mean()
        if kind == "diagonal":
            error_any = math.nan
        else:
            restart = kind == "restart"
            s, x_s = (torch.zeros_like(self.s), self.x_0) if restart else (self.s, self.x_s)
            error_any = rms(flow_map(self.x_t, self.t, s) - x_s) / self.spread
        values = {
            "error": rms(found - self.end) / self.spread,
            "error_worst": float(distance.max()),
            "error_any": error_any,
            "variance": float(variance),
        }
        health = flow_health(
            flow_map, self.end[:256], None, torch.Generator().manual_seed(0), kind=kind
        )
        for name in HEALTH:
            value = getattr(health, name)
            values[f"health_{name}"] = math.nan if value is None else float(value)
        if get_sampler(kind).is_flow_map:
            u_hat = flow_map.velocity(self.x_t, self.t)
            values["error_velocity"] = rms(u_hat - self.velocity) / rms(self.velocity)
        else:
            values["error_velocity"] = math.nan
        return values


def rms(x: Tensor) -> float:
    """Root mean square."""
    return float(x.square().mean().sqrt())


def outcome(error: float, variance: float) -> str:
    """``diverged``, ``collapsed``, ``wrong`` or ``healthy``, by the stated thresholds."""
    if not (math.isfinite(error) and math.isfinite(variance)) or error > DIVERGED:
        return "diverged"
    if variance < COLLAPSED:
        return "collapsed"
    return "wrong" if error > WRONG else "healthy"
