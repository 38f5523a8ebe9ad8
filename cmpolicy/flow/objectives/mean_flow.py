"""MeanFlow and what came after it: F(x_t, t, s) regressed on one target, with no term of its own.

Legend: v conditional velocity, u_hat = sg F(x_t, t, t), D_w the derivative of F along (w, 1, 0),
sg stopgrad. Formulas are those of the linear path.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from contextlib import nullcontext
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from cmpolicy.flow.flow_map import FlowMap, exactly
from cmpolicy.flow.objectives.objective import (
    Draws,
    Examples,
    LossOutput,
    check_not_negative,
    check_shares,
    mean_over,
    register,
)
from cmpolicy.flow.objectives.two_times import MIN_JUMP, Eulerian
from cmpolicy.flow.path import PathSample, expand_time


@dataclass(frozen=True)
class _MeanFlowFamily(Eulerian):
    """L = w mean |F(x_t, t, s) - target|^2 at any s, a share of the examples at s = t.

    Args:
        same_share: share of the examples with s = t, where the target is v, in [0, 1].
        weight_power: p of the adaptive weight; 0 turns it off.
    """

    same_share: float = 0.5
    weight_power: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_shares(self, "same_share")
        check_not_negative(self, "weight_power")

    def draw(
        self,
        batch_size: int,
        shape: tuple[int, ...],
        generator: torch.Generator | None,
        device: torch.device,
    ) -> Draws:
        draws = super().draw(batch_size, shape, generator, device)
        same = torch.rand(batch_size, generator=generator, device=device) < self.same_share
        return replace(draws, s=torch.where(same, draws.t, draws.s))

    @abstractmethod
    def step(self, flow_map: FlowMap, examples: Examples, point: PathSample, f: Tensor) -> Tensor:
        """How far f = F(x_t, t, s), held, is to move, (B, ...)."""

    def scale(self, progress: float) -> float:
        """The step is measured in units of this."""
        return 1.0

    def loss(self, flow_map: FlowMap, examples: Examples) -> LossOutput:
        point, draws = examples.point(flow_map.path), examples.draws
        f = flow_map.output(point.x_t, draws.t, draws.s, examples.features)
        target = f.detach() + self.step(flow_map, examples, point, f.detach())
        error = mean_over((f - target).square(), examples.mask)
        scale = self.scale(examples.progress)
        weight = (error.detach() / scale**2 + 0.01).pow(-self.weight_power)
        return LossOutput(error / scale * weight, {"loss_jump": error.detach().mean()})

    def eulerian(
        self, flow_map: FlowMap, examples: Examples, point: PathSample, f: Tensor, tangent: Tensor
    ) -> Tensor:
        """v - (t - s) D_tangent - F, without gradient."""
        t, s, c = examples.draws.t, examples.draws.s, examples.held_features()
        d = self.along(flow_map, point.x_t, t, s, c, tangent)
        return flow_map.path.residual(f, point.velocity, d, point.x_t, t, s)


@register("meanflow")
@dataclass(frozen=True)
class MeanFlow(_MeanFlowFamily):
    """MeanFlow (2505.13447): the target is v - (t - s) D_v."""

    def step(self, flow_map: FlowMap, examples: Examples, point: PathSample, f: Tensor) -> Tensor:
        """The Eulerian residual, D along v."""
        return self.eulerian(flow_map, examples, point, f, point.velocity)


@register("imf")
@dataclass(frozen=True)
class ImprovedMeanFlow(_MeanFlowFamily):
    """Improved MeanFlow (2512.02012): F + (t - s) sg D is regressed on v, D along u_hat.

    The derivative sees the network's own velocity, which has no variance; the regression the
    conditional one, which has no bias.
    """

    def step(self, flow_map: FlowMap, examples: Examples, point: PathSample, f: Tensor) -> Tensor:
        """The Eulerian residual, D along u_hat."""
        with torch.no_grad():
            u_hat = flow_map.velocity(point.x_t, examples.draws.t, examples.held_features())
        return self.eulerian(flow_map, examples, point, f, u_hat)


@register("alphaflow")
@dataclass(frozen=True)
class AlphaFlow(_MeanFlowFamily):
    """alpha-Flow (2510.20771): from flow matching along whole lines to MeanFlow.

    With m = t - alpha (t - s) on the line along v, the target is the output that jumps where
    X_{m->s}(x_m) arrives: alpha v + (1 - alpha) sg F(x_m, m, s). L = w mean |F - target|^2 / alpha.
    alpha falls from 1 to 0 along a sigmoid in the course of the run; below ``alpha_min`` it is 0
    and the objective is ``meanflow``. Between its ends autocast is left: F and its target differ
    by a share alpha of the step to v, which bfloat16 cannot tell from rounding.

    Args:
        alpha_begin, alpha_end: shares of the run between which alpha falls, in order, in [0, 1].
        alpha_min: alpha within this of its ends is at the end, in (0, 0.5).
    """

    alpha_begin: float = 0.0
    alpha_end: float = 0.8
    alpha_min: float = 0.005

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.alpha_begin < self.alpha_end <= 1:
            raise ValueError(
                f"objective.alpha_begin={self.alpha_begin} and alpha_end={self.alpha_end} must be "
                "shares of the run, in order, in [0, 1]"
            )
        if not 0 < self.alpha_min < 0.5:
            raise ValueError(f"objective.alpha_min={self.alpha_min} must lie in (0, 0.5)")

    def alpha(self, progress: float) -> float:
        """alpha at this progress, in [0, 1]: a sigmoid that goes over +-12.5 between the ends."""
        middle = (self.alpha_begin + self.alpha_end) / 2
        slope = 25 / (self.alpha_end - self.alpha_begin)
        alpha = 1 / (1 + math.exp(slope * (progress - middle)))
        if alpha < self.alpha_min:
            return 0.0
        return 1.0 if alpha > 1 - self.alpha_min else alpha

    def loss(self, flow_map: FlowMap, examples: Examples) -> LossOutput:
        """See :meth:`Objective.loss`."""
        between = 0.0 < self.alpha(examples.progress) < 1.0
        with exactly(examples.draws.z) if between else nullcontext():
            return super().loss(flow_map, examples)

    def scale(self, progress: float) -> float:
        """alpha; 1 once it is 0."""
        return self.alpha(progress) or 1.0

    def step(self, flow_map: FlowMap, examples: Examples, point: PathSample, f: Tensor) -> Tensor:
        """Target minus f."""
        alpha, path, v = self.alpha(examples.progress), flow_map.path, point.velocity
        if alpha == 0.0:
            return self.eulerian(flow_map, examples, point, f, v)
        t, s = examples.draws.t, examples.draws.s
        if alpha == 1.0:
            return v - f
        with torch.no_grad():
            m = t - alpha * (t - s)
            c = examples.held_features()
            arrived = flow_map(path.jump(point.x_t, v, t, m), m, s, c)
            far = t - s > MIN_JUMP
            target = path.output_of(point.x_t, arrived, t, torch.where(far, s, t - 1))
            return torch.where(expand_time(far, f), target, v) - f
