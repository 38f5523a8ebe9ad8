"""Improved self-distillation (iSD), arXiv 2601.22679: the default objective of images.

Legend: x (B, ...) normalised data, v conditional velocity (or what the caller puts in its place),
u_hat the network's own velocity F(x_t, t, t), D the derivative of F along the flow, R the Eulerian
residual.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from cmpolicy.flow.flow_map import FlowMap
from cmpolicy.flow.objectives.objective import check_choice, register
from cmpolicy.flow.objectives.self_distillation import Jumps, SelfDistillation, Weights
from cmpolicy.flow.objectives.two_times import Eulerian
from cmpolicy.flow.path import expand_time

Tangent = Literal["self", "data", "schedule"]


@register("isd")
@dataclass(frozen=True)
class Isd(SelfDistillation, Eulerian):
    """Improved self-distillation, arXiv 2601.22679: L = w(L_fm + L_sd), see method steps 1 to 6.

    L_fm = mean |F(x_t, t, t) - v|^2 on every example, and on a share of them
    L_sd = mean |F(x_t, t, s) - stopgrad(F + R)|^2, R the Eulerian residual with tangent ``u``; no
    gradient flows through u and D. The settings of every objective with two times are described in
    :class:`SelfDistillation` and :class:`Eulerian`.

    Args:
        tangent: ``self`` takes u = u_hat, the network's own velocity (the paper's iSD); ``data``
            takes u = v (MeanFlow's target beside a full flow-matching term); ``schedule`` goes
            linearly from v to u_hat, from share ``tangent_begin`` to ``tangent_end`` of the run.
        tangent_weights: u_hat from the ``online`` or the ``ema`` weights.
        time_floor: below this time the flow is taken to be straight along F(x_t, t, t), in [0, 1).
            A jump to s = 0 is then the one to ``time_floor`` followed by the mean of the data given
            that point: samples without the jitter that data holds at a small scale. The health
            metrics know no floor; they count what it changes as a residual.
    """

    tangent: Tangent = "self"
    tangent_weights: Weights = "online"
    tangent_begin: float = 0.0
    tangent_end: float = 1.0
    time_floor: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice(self, "tangent", get_args(Tangent))
        check_choice(self, "tangent_weights", get_args(Weights))
        if not 0 <= self.time_floor < 1:
            raise ValueError(f"objective.time_floor={self.time_floor} must lie in [0, 1)")
        if self.time_floor and self.finish_begin < 1:
            raise ValueError(
                f"objective.time_floor={self.time_floor} and finish_begin={self.finish_begin}: the "
                "finish follows the velocity all the way and knows no floor; set one of them"
            )
        if not 0 <= self.tangent_begin <= self.tangent_end <= 1:
            raise ValueError(
                f"objective.tangent_begin={self.tangent_begin} and tangent_end={self.tangent_end} "
                "must be shares of the run, in order, in [0, 1]"
            )

    @property
    def needs_ema(self) -> bool:
        """Whether u_hat comes from the EMA weights."""
        return self.tangent_weights == "ema" and self.tangent != "data"

    def tangent_mix(self, progress: float) -> float:
        """Share of u_hat in the tangent at this progress, in [0, 1]."""
        if self.tangent == "schedule":
            span = self.tangent_end - self.tangent_begin
            if span == 0:
                return float(progress >= self.tangent_begin)
            return min(max((progress - self.tangent_begin) / span, 0.0), 1.0)
        return 1.0 if self.tangent == "self" else 0.0

    def residual(self, flow_map: FlowMap, jumps: Jumps) -> Tensor:
        """F minus its target, which is held."""
        j, mix = jumps, self.tangent_mix(jumps.progress)
        u_hat = j.u_hat
        if self.needs_ema and mix > 0:
            with torch.no_grad():
                u_hat = j.teacher.velocity(j.x_t, j.t, j.held)
        u, still = torch.lerp(j.v, u_hat, mix), j.f.detach()
        c = None if j.c is None else j.c.detach()
        lowest = j.s.clamp(min=self.time_floor).minimum(j.t)  # F has a kink at the floor
        d = self.along(flow_map, j.x_t, j.t, j.s, c, u, lowest=lowest)
        change = flow_map.path.residual(still, u, d, j.x_t, j.t, j.s)
        if self.time_floor:
            change = torch.where(expand_time(j.t > self.time_floor, u), change, u - still)
        return j.f - (still + change)
