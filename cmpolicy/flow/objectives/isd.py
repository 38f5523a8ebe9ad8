"""Improved self-distillation (iSD), arXiv 2601.22679: the default objective.

Legend: x (B, ...) normalised data, v conditional velocity (or what the caller puts in its place),
u_hat the network's own velocity F(x_t, t, t), D the derivative of F along the flow, R the Eulerian
residual.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal, get_args

import torch
from torch import Tensor

from cmpolicy.flow.flow_map import Derivative, FlowMap, derivative_difference, derivative_jvp
from cmpolicy.flow.objectives.objective import (
    Draws,
    LossOutput,
    VelocityTarget,
    mean_over,
    register,
)
from cmpolicy.flow.path import expand_time
from cmpolicy.flow.sampler import SamplerKind
from cmpolicy.flow.times import TimeLaw, adaptive_weight

Tangent = Literal["self", "data", "schedule"]
TangentWeights = Literal["online", "ema"]


@register("isd")
@dataclass(frozen=True)
class Isd:
    """Improved self-distillation, arXiv 2601.22679: L = w(L_fm + L_sd), see method steps 1 to 6.

    L_fm = mean |F(x_t, t, t) - v|^2 on every example, and on a share of them
    L_sd = mean |F(x_t, t, s) - stopgrad(F + R)|^2, R the Eulerian residual with tangent ``u``; no
    gradient flows through u and D.

    Args:
        tangent: ``self`` takes u = u_hat, the network's own velocity (the paper's iSD); ``data``
            takes u = v (MeanFlow's target beside a full flow-matching term); ``schedule`` goes
            linearly from v to u_hat, from share ``tangent_begin`` to ``tangent_end`` of the run.
        tangent_weights: u_hat from the ``online`` or the ``ema`` weights.
        derivative: ``difference`` (central, step ``epsilon``) or ``jvp`` (exact).
        weight_power: p of the adaptive weight; 0 turns it off.
        sd_share: share of the batch that carries L_sd, in (0, 1]; spread evenly over the batch.
        sd_weight: factor on L_sd.
        sd_begin: share of the run before L_sd joins in; until then only L_fm is trained, so that
            the tangent u_hat means something from the start. In [0, 1).
        zero_share: share of the L_sd examples that jump all the way to s = 0, in [0, 1].
        one_share: share of all examples whose t is 1 exactly, where one-step sampling begins, in
            [0, 1].
        time_floor: below this time the flow is taken to be straight along F(x_t, t, t), in [0, 1).
            A jump to s = 0 is then the one to ``time_floor`` followed by the mean of the data given
            that point: samples without the jitter that data holds at a small scale. The health
            metrics know no floor; they count what it changes as a residual.
        time_a, time_b: t and s ~ Beta(time_a, time_b), the larger is t.
    """

    sampler: ClassVar[SamplerKind] = "flow_map"
    nfe: ClassVar[int] = 1

    tangent: Tangent = "self"
    tangent_weights: TangentWeights = "online"
    tangent_begin: float = 0.0
    tangent_end: float = 1.0
    derivative: Derivative = "difference"
    epsilon: float = 0.02  # the paper has 0.005
    weight_power: float = 1.0
    sd_share: float = 0.5  # the paper has 1
    sd_weight: float = 1.0
    sd_begin: float = 0.3  # the paper has 0
    zero_share: float = 0.5  # the paper has 0
    one_share: float = 0.25  # the paper has 0
    time_floor: float = 0.0
    time_a: float = 0.8
    time_b: float = 1.0

    def __post_init__(self) -> None:
        for name, kind in (
            ("tangent", Tangent),
            ("tangent_weights", TangentWeights),
            ("derivative", Derivative),
        ):
            if getattr(self, name) not in get_args(kind):
                raise ValueError(
                    f"isd: {name}={getattr(self, name)!r} is not one of {list(get_args(kind))}"
                )
        if not 0 < self.sd_share <= 1:
            raise ValueError(f"isd: sd_share={self.sd_share} must lie in (0, 1]; use fm for 0")
        if not 0 <= self.sd_begin < 1:
            raise ValueError(f"isd: sd_begin={self.sd_begin} must lie in [0, 1)")
        for name in ("zero_share", "one_share"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"isd: {name}={getattr(self, name)} must lie in [0, 1]")
        if not 0 <= self.time_floor < 1:
            raise ValueError(f"isd: time_floor={self.time_floor} must lie in [0, 1)")
        if not 0 <= self.tangent_begin <= self.tangent_end <= 1:
            raise ValueError(
                f"isd: tangent_begin={self.tangent_begin} and tangent_end={self.tangent_end} must "
                "be shares of the run, in order, in [0, 1]"
            )
        if not 0 < self.epsilon < 0.5:
            raise ValueError(f"isd: epsilon={self.epsilon} must lie in (0, 0.5)")
        for name in ("weight_power", "sd_weight"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"isd: {name}={getattr(self, name)} must not be negative")
        TimeLaw(self.time_a, self.time_b)

    def draw(
        self,
        batch_size: int,
        shape: tuple[int, ...],
        generator: torch.Generator | None,
        device: torch.device,
    ) -> Draws:
        """See :meth:`Objective.draw`; t and s are sorted independent draws."""
        law = TimeLaw(self.time_a, self.time_b)
        first = law.draw(batch_size, generator, device)
        second = law.draw(batch_size, generator, device)
        t, s = torch.maximum(first, second), torch.minimum(first, second)
        if self.zero_share:
            to_zero = torch.rand(batch_size, generator=generator, device=device) < self.zero_share
            s = s.masked_fill(to_zero, 0.0)
        if self.one_share:
            from_one = torch.rand(batch_size, generator=generator, device=device) < self.one_share
            t = t.masked_fill(from_one, 1.0)
        z = torch.randn(batch_size, *shape, generator=generator, device=device)
        return Draws(z, t, s)

    @property
    def needs_ema(self) -> bool:
        """Whether u_hat comes from the EMA weights."""
        return self.tangent_weights == "ema"

    def tangent_mix(self, progress: float) -> float:
        """Share of u_hat in the tangent at this progress, in [0, 1]."""
        if self.tangent == "schedule":
            span = self.tangent_end - self.tangent_begin
            if span == 0:
                return float(progress >= self.tangent_begin)
            return min(max((progress - self.tangent_begin) / span, 0.0), 1.0)
        return 1.0 if self.tangent == "self" else 0.0

    def __call__(
        self,
        flow_map: FlowMap,
        x: Tensor,
        features: Tensor | None,
        draws: Draws,
        *,
        mask: Tensor | None = None,
        progress: float = 0.0,
        ema: FlowMap | None = None,
        ema_features: Tensor | None = None,
        velocity_target: VelocityTarget | None = None,
    ) -> LossOutput:
        """See :meth:`Objective.__call__`.

        Raises:
            ValueError: EMA weights are asked for and none are given.
        """
        point = flow_map.path.sample(x, draws.z, draws.t)
        v = point.velocity if velocity_target is None else velocity_target(point, draws.t)
        if progress < self.sd_begin:
            diagonal = flow_map.velocity(point.x_t, draws.t, features)
            loss_fm = mean_over((diagonal - v).square(), mask)
            metrics = {"loss_fm": loss_fm.detach().mean(), "loss_sd": loss_fm.new_zeros(())}
            return LossOutput(adaptive_weight(loss_fm, self.weight_power), metrics)

        # The examples that carry L_sd, spread evenly: any even slice of a batch has its share.
        index = _spread(len(x), self.sd_share, x.device)
        x_t, t, s = point.x_t[index], draws.t[index], draws.s[index]
        c = None if features is None else features[index]
        # The diagonal of all and F(x_t, t, s) of these, with gradient, in one evaluation.
        both = flow_map.output(
            torch.cat([point.x_t, x_t]),
            torch.cat([draws.t, t]),
            torch.cat([draws.t, s]),
            None if features is None or c is None else torch.cat([features, c]),
        )
        diagonal, f = both.split([len(x), len(x_t)])
        loss_fm = mean_over((diagonal - v).square(), mask)

        u = self._tangent(v[index], diagonal.detach()[index], progress)
        held = None if c is None else c.detach()
        if self.needs_ema and self.tangent_mix(progress) > 0:
            if ema is None:
                raise ValueError("isd: tangent_weights=ema needs the EMA weights of the run")
            ema_c = held if ema_features is None else ema_features[index]
            with torch.no_grad():
                u = self._tangent(v[index], ema.velocity(x_t, t, ema_c), progress)
        if self.derivative == "jvp":
            d = derivative_jvp(flow_map, x_t, t, s, held, u)
        else:
            lowest = s.clamp(min=self.time_floor).minimum(t)  # F has a kink at the floor
            d = derivative_difference(flow_map, x_t, t, s, held, u, self.epsilon, lowest)
        residual = flow_map.path.residual(f.detach(), u, d, x_t, t, s)
        if self.time_floor:
            residual = torch.where(expand_time(t > self.time_floor, x), residual, u - f.detach())
        target = f.detach() + residual
        loss_sd = mean_over((f - target).square(), None if mask is None else mask[index])

        total = loss_fm.index_add(0, index, self.sd_weight * loss_sd)
        metrics = {"loss_fm": loss_fm.detach().mean(), "loss_sd": loss_sd.detach().mean()}
        return LossOutput(adaptive_weight(total, self.weight_power), metrics)

    def _tangent(self, v: Tensor, u_hat: Tensor, progress: float) -> Tensor:
        return torch.lerp(v, u_hat, self.tangent_mix(progress))


def _spread(n: int, share: float, device: torch.device) -> Tensor:
    """Indices of round(n * share) examples (at least one), evenly spread over 0..n-1."""
    count = max(1, round(n * share))
    return torch.arange(count, device=device).mul(n).div(count, rounding_mode="floor")
