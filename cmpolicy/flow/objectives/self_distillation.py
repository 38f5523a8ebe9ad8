"""Self-distillation: flow matching on the diagonal, and a jump that agrees with it.

The family of arXiv 2505.18825 and 2601.22679. All share L = w(L_fm + L_sd), see
:class:`SelfDistillation`, and differ in the residual of the jump alone: :class:`Isd` has a file of
its own, the others are here.

Legend: v conditional velocity, u_hat = stopgrad F(x_t, t, t), D the derivative of F along the flow,
X the flow map, sg stopgrad; c features, all (B, ...) or (B,).
"""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from cmpolicy.flow.flow_map import FlowMap, exactly
from cmpolicy.flow.objectives.objective import (
    Examples,
    LossOutput,
    Objective,
    check_choice,
    check_not_negative,
    check_shares,
    mean_over,
    register,
)
from cmpolicy.flow.objectives.two_times import MIN_JUMP, Eulerian, TwoTimes
from cmpolicy.flow.path import Path, expand_time
from cmpolicy.flow.times import adaptive_weight

Weights = Literal["online", "ema"]
Middle = Literal["half", "contract"]


@dataclass(frozen=True)
class Jumps:
    """The examples that carry L_sd: x_t, t, s, c, v and u_hat, and f = F(x_t, t, s) with gradient.

    ``teacher`` and ``held`` are what gives targets and its features, without gradient.
    """

    x_t: Tensor
    t: Tensor
    s: Tensor
    c: Tensor | None
    v: Tensor
    u_hat: Tensor
    f: Tensor
    teacher: FlowMap
    held: Tensor | None
    progress: float

    def output_to(self, arrived: Tensor, path: Path) -> Tensor:
        """The output that jumps from x_t to ``arrived``, held; f itself for the shortest jumps."""
        far = self.t - self.s > MIN_JUMP
        s = torch.where(far, self.s, self.t - 1)  # any s != t: what is not far is not used
        target = path.output_of(self.x_t, arrived, self.t, s)
        return torch.where(expand_time(far, target), target, self.f.detach())


@dataclass(frozen=True)
class SelfDistillation(Objective):
    """L = w(L_fm + sd_weight L_sd): what the objectives of the family have in common.

    L_fm = mean |F(x_t, t, t) - v|^2 on every example; L_sd = mean |residual|^2 on a share of them.

    Args:
        weight_power: p of the adaptive weight; 0 turns it off.
        sd_share: share of the batch that carries L_sd, in (0, 1]; spread evenly over the batch.
        sd_weight: factor on L_sd.
        sd_begin: share of the run before L_sd joins in; until then only L_fm is trained, so that
            the tangent u_hat means something from the start. In [0, 1).
        finish_begin: share of the run from which on jumps learn where the network's own velocity
            leads in ``finish_steps`` steps, in place of what the objective says; 1: never. In
            [0, 1]. Each step costs one evaluation of the examples that carry L_sd.
        finish_steps: at least 2.
    """

    weight_power: float = 1.0
    sd_share: float = 0.5  # the paper has 1
    sd_weight: float = 1.0
    sd_begin: float = 0.3  # the paper has 0
    finish_begin: float = 1.0
    finish_steps: int = 8

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.sd_share <= 1:
            raise ValueError(f"objective.sd_share={self.sd_share} must lie in (0, 1]; use fm for 0")
        if not 0 <= self.sd_begin < 1:
            raise ValueError(f"objective.sd_begin={self.sd_begin} must lie in [0, 1)")
        check_shares(self, "finish_begin")
        if self.finish_steps < 2:
            raise ValueError(f"objective.finish_steps={self.finish_steps} must be at least 2")
        check_not_negative(self, "weight_power", "sd_weight")

    @abstractmethod
    def residual(self, flow_map: FlowMap, jumps: Jumps) -> Tensor:
        """What L_sd squares, (B', ...), with gradient."""

    def loss(self, flow_map: FlowMap, examples: Examples) -> LossOutput:
        """See :meth:`Objective.loss`.

        Raises:
            ValueError: EMA weights are needed and none are given.
        """
        x, c, draws = examples.x, examples.features, examples.draws
        point = examples.point(flow_map.path)
        if examples.progress < self.sd_begin:
            diagonal = flow_map.velocity(point.x_t, draws.t, c)
            loss_fm = mean_over((diagonal - point.velocity).square(), examples.mask)
            metrics = {"loss_fm": loss_fm.detach().mean(), "loss_sd": loss_fm.new_zeros(())}
            return LossOutput(adaptive_weight(loss_fm, self.weight_power), metrics)

        # The examples that carry L_sd, spread evenly: any even slice of a batch has its share.
        index = _spread(len(x), self.sd_share, x.device)
        x_t, t, s = point.x_t[index], draws.t[index], draws.s[index]
        # The diagonal of all and F(x_t, t, s) of these, with gradient, in one evaluation.
        both = flow_map.output(
            torch.cat([point.x_t, x_t]),
            torch.cat([draws.t, t]),
            torch.cat([draws.t, s]),
            None if c is None else torch.cat([c, c[index]]),
        )
        diagonal, f = both.split([len(x), len(x_t)])
        loss_fm = mean_over((diagonal - point.velocity).square(), examples.mask)
        teacher, held = examples.teacher(flow_map, self.needs_ema)
        jumps = Jumps(
            x_t,
            t,
            s,
            None if c is None else c[index],
            point.velocity[index],
            diagonal.detach()[index],
            f,
            teacher,
            None if held is None else held[index],
            examples.progress,
        )
        if self.finish_begin < 1 and examples.progress >= self.finish_begin:
            residual = f - jumps.output_to(self._follow(flow_map.path, jumps), flow_map.path)
        else:
            residual = self.residual(flow_map, jumps)
        mask = examples.mask
        loss_sd = mean_over(residual.square(), None if mask is None else mask[index])
        total = loss_fm.index_add(0, index, self.sd_weight * loss_sd)
        metrics = {"loss_fm": loss_fm.detach().mean(), "loss_sd": loss_sd.detach().mean()}
        return LossOutput(adaptive_weight(total, self.weight_power), metrics)

    @torch.no_grad()
    def _follow(self, path: Path, jumps: Jumps) -> Tensor:
        """Where the velocity of the teacher leads from x_t by s, (B', ...): a sampler's diagonal.

        Without EMA weights the teacher is the network itself, whose first step is u_hat.
        """
        j, x = jumps, jumps.x_t
        after = j.t
        for step in range(self.finish_steps):
            t, after = after, torch.lerp(j.t, j.s, (step + 1) / self.finish_steps)
            own = step == 0 and not self.needs_ema
            x = path.jump(x, j.u_hat if own else j.teacher.velocity(x, t, j.held), t, after)
        return x


def _spread(n: int, share: float, device: torch.device) -> Tensor:
    """Indices of round(n * share) examples (at least one), evenly spread over 0..n-1."""
    count = max(1, round(n * share))
    return torch.arange(count, device=device).mul(n).div(count, rounding_mode="floor")


@register("esd")
@dataclass(frozen=True)
class EulerianSelfDistillation(SelfDistillation, Eulerian):
    """Plain Eulerian self-distillation (2505.18825): the residual of iSD, nothing held but u_hat.

    L_sd = mean |u_hat - (t - s) D - F(x_t, t, s)|^2 on the linear path, with the gradient of D: it
    goes through the spatial Jacobian of F, which is what iSD's stop-gradient leaves out.
    """

    def residual(self, flow_map: FlowMap, jumps: Jumps) -> Tensor:
        """The Eulerian residual with the gradient of F and D."""
        j = jumps
        d = self.along(flow_map, j.x_t, j.t, j.s, j.c, j.u_hat, keep_gradient=True)
        return flow_map.path.residual(j.f, j.u_hat, d, j.x_t, j.t, j.s)


@register("lsd")
@dataclass(frozen=True)
class LagrangianSelfDistillation(SelfDistillation, Eulerian):
    """Lagrangian self-distillation (2505.18825): d/ds X_{t->s}(x_t) = u(X_{t->s}(x_t), s).

    L_sd = mean |d/ds X_{t->s}(x_t) - sg F(X_{t->s}(x_t), s, s)|^2: no spatial Jacobian at all.
    ``derivative`` and ``epsilon`` are by s here.
    """

    def residual(self, flow_map: FlowMap, jumps: Jumps) -> Tensor:
        """The Lagrangian residual, with the gradient of d/ds X."""
        j, path = jumps, flow_map.path
        with torch.no_grad():
            arrived = path.jump(j.x_t, j.f, j.t, j.s)
            velocity = flow_map.velocity(arrived, j.s, j.held)
        by_s: Tensor
        with exactly(j.x_t):
            if self.derivative == "jvp":
                ones = torch.ones_like(j.s)
                by_s = torch.func.jvp(lambda s: flow_map(j.x_t, j.t, s, j.c), (j.s,), (ones,))[1]
                return by_s / path.rate - velocity
            above, below = (j.s + self.epsilon).minimum(j.t), (j.s - self.epsilon).clamp(min=0)
            above = above.maximum(below + self.epsilon)  # at s = t = 0 the upper point passes t
            twice = (torch.cat([v, v]) for v in (j.x_t, j.t))
            c = None if j.c is None else torch.cat([j.c, j.c])
            x_t, t = twice
            x_above, x_below = flow_map(x_t, t, torch.cat([above, below]), c).chunk(2)
            by_s = (x_above - x_below) / expand_time((above - below) * path.rate, x_above)
        return by_s - velocity


@register("psd")
@dataclass(frozen=True)
class ProgressiveSelfDistillation(SelfDistillation, TwoTimes):
    """Semigroup (progressive) self-distillation: X_{t->s}(x_t) = X_{m->s}(X_{t->m}(x_t)), sg right.

    L_sd = mean |F(x_t, t, s) - the output that jumps to the right side|^2.

    Args:
        middle: where m lies between s and t. ``half``: in the middle (shortcut models, 2410.12557);
            ``contract``: m goes to t in the course of the run, from a share ``middle_begin`` of the
            way from t to s to a share ``middle_end`` (One-Step Flow Policy, 2603.12480).
        weights: the right side by the ``online`` or the ``ema`` weights.
        middle_begin, middle_end: see ``middle``; in (0, 1).
    """

    middle: Middle = "half"
    weights: Weights = "online"
    middle_begin: float = 0.5
    middle_end: float = 0.05

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.middle_end <= self.middle_begin < 1:
            raise ValueError(
                f"objective.middle_begin={self.middle_begin} and middle_end={self.middle_end} must "
                "lie in (0, 1), the end not above the begin"
            )
        for name, kind in (("middle", Middle), ("weights", Weights)):
            check_choice(self, name, get_args(kind))

    @property
    def needs_ema(self) -> bool:
        """Whether targets come from the EMA weights."""
        return self.weights == "ema"

    def residual(self, flow_map: FlowMap, jumps: Jumps) -> Tensor:
        """F minus what two jumps of the teacher make of x_t."""
        j = jumps
        with torch.no_grad():
            share = 0.5
            if self.middle == "contract":
                share = self.middle_begin + (self.middle_end - self.middle_begin) * j.progress
            m = j.t - share * (j.t - j.s)
            arrived = j.teacher(j.teacher(j.x_t, j.t, m, j.held), m, j.s, j.held)
        return j.f - j.output_to(arrived, flow_map.path)
