"""Consistency training from scratch: F(x_t, t, 0) alone, continuous and discrete.

Legend: v conditional velocity, D_v the derivative of F along (v, 1, 0), X the flow map, sg
stopgrad.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import ClassVar, Literal, get_args

import torch

from cmpolicy.flow.flow_map import FlowMap, exactly
from cmpolicy.flow.objectives.objective import (
    Draws,
    Examples,
    LossOutput,
    check_choice,
    check_not_negative,
    mean_over,
    register,
)
from cmpolicy.flow.objectives.two_times import Eulerian, TwoTimes
from cmpolicy.flow.sampler import SamplerKind
from cmpolicy.flow.times import adaptive_weight

Weights = Literal["online", "ema"]


@register("ct")
@dataclass(frozen=True)
class ConsistencyTraining(Eulerian):
    """Continuous consistency training (2303.01469): s = 0, and the data's velocity as tangent.

    L = w mean |F(x_t, t, 0) - sg(v - t D_v)|^2 on the linear path. ``zero_share`` is of no use
    here: s is always 0. Nothing trains jumps to other times, so more than one evaluation begins
    anew from noised data (the sampler ``restart``).

    Args:
        weight_power: p of the adaptive weight; 0 turns it off.
    """

    weight_power: float = 1.0

    sampler: ClassVar[SamplerKind] = "restart"
    other_samplers: ClassVar[tuple[SamplerKind, ...]] = ()
    learns_velocity: ClassVar[bool] = False

    def __post_init__(self) -> None:
        super().__post_init__()
        check_not_negative(self, "weight_power")

    def loss(self, flow_map: FlowMap, examples: Examples) -> LossOutput:
        point, t = examples.point(flow_map.path), examples.draws.t
        zero, v = torch.zeros_like(t), point.velocity
        f = flow_map.output(point.x_t, t, zero, examples.features)
        d = self.along(flow_map, point.x_t, t, zero, examples.held_features(), v)
        still = f.detach()
        target = still + flow_map.path.residual(still, v, d, point.x_t, t, zero)
        loss = mean_over((f - target).square(), examples.mask)
        return LossOutput(
            adaptive_weight(loss, self.weight_power), {"loss_ct": loss.detach().mean()}
        )


@register("dct")
@dataclass(frozen=True)
class DiscreteConsistencyTraining(TwoTimes):
    """Discrete consistency training (2303.01469, 2310.14189): neighbours on a line end alike.

    With t = n / N and m = (n - 1) / N on the line from x to z:
    L = w mean |X_{t->0}(x_t) - sg X_{m->0}(x_m)|^2 / (t (t - m)), whose gradient goes to that of
    ``ct`` as N grows. N doubles from ``steps_begin`` to ``steps_end`` in the course of the run.
    Autocast is left: in bfloat16 neighbours differ by little more than rounding.

    Args:
        steps_begin, steps_end: N, at least 2, the end not below the begin.
        weights: the right side by the ``online`` or the ``ema`` weights.
        weight_power: p of the adaptive weight; 0 turns it off.
    """

    steps_begin: int = 10
    steps_end: int = 160
    weights: Weights = "online"
    weight_power: float = 1.0

    sampler: ClassVar[SamplerKind] = "restart"
    other_samplers: ClassVar[tuple[SamplerKind, ...]] = ()
    learns_velocity: ClassVar[bool] = False

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice(self, "weights", get_args(Weights))
        check_not_negative(self, "weight_power")
        if not 2 <= self.steps_begin <= self.steps_end:
            raise ValueError(
                f"objective.steps_begin={self.steps_begin} must be at least 2 and not above "
                f"steps_end={self.steps_end}"
            )

    @property
    def needs_ema(self) -> bool:
        """Whether targets come from the EMA weights."""
        return self.weights == "ema"

    def steps(self, progress: float) -> int:
        """N at this progress: every number of the series has the same share of the run."""
        doublings = math.ceil(math.log2(self.steps_end / self.steps_begin))
        done = min(int(progress * (doublings + 1)), doublings)
        return min(self.steps_begin << done, self.steps_end)

    def loss(self, flow_map: FlowMap, examples: Examples) -> LossOutput:
        """See :meth:`Objective.loss`; the drawn t is rounded up to the grid."""
        n = self.steps(examples.progress)
        t = (examples.draws.t * n).ceil().clamp(min=1) / n
        m, zero = t - 1 / n, torch.zeros_like(t)
        draws = Draws(examples.draws.z, t, zero)
        point = replace(examples, draws=draws).point(flow_map.path)
        teacher, held = examples.teacher(flow_map, self.needs_ema)
        with exactly(point.x_t):
            ended = flow_map(point.x_t, t, zero, examples.features)
            with torch.no_grad():
                neighbour = flow_map.path.jump(point.x_t, point.velocity, t, m)  # on the same line
                target = teacher(neighbour, m, zero, held)
        weight = 1 / (t * (t - m))
        loss = mean_over((ended - target).square(), examples.mask) * weight
        return LossOutput(
            adaptive_weight(loss, self.weight_power), {"loss_dct": loss.detach().mean()}
        )
