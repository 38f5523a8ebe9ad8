"""What needs no flow: regression of the data, in one pass or two.

The network's output is the data itself here, not a velocity.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal, get_args

import torch

from cmpolicy.flow.flow_map import FlowMap
from cmpolicy.flow.objectives.objective import (
    Draws,
    Examples,
    LossOutput,
    Objective,
    check_choice,
    mean_over,
    register,
)
from cmpolicy.flow.sampler import MIP_TIME, SamplerKind

Norm = Literal["l1", "l2"]


@register("regression")
@dataclass(frozen=True)
class Regression(Objective):
    """L = mean |F(0, 1, 0) - x| or its square: behaviour cloning with the same network.

    Args:
        norm: ``l2`` learns the mean of the data, ``l1`` its median.
    """

    norm: Norm = "l2"

    sampler: ClassVar[SamplerKind] = "regression"
    other_samplers: ClassVar[tuple[SamplerKind, ...]] = ()
    learns_velocity: ClassVar[bool] = False

    def __post_init__(self) -> None:
        check_choice(self, "norm", get_args(Norm))

    def draw(
        self,
        batch_size: int,
        shape: tuple[int, ...],
        generator: torch.Generator | None,
        device: torch.device,
    ) -> Draws:
        """See :meth:`Objective.draw`; the noise is not used."""
        one = torch.ones(batch_size, device=device)
        z = torch.randn(batch_size, *shape, generator=generator, device=device)
        return Draws(z, one, torch.zeros_like(one))

    def loss(self, flow_map: FlowMap, examples: Examples) -> LossOutput:
        x, t, s = examples.x, examples.draws.t, examples.draws.s
        error = flow_map.output(torch.zeros_like(x), t, s, examples.features) - x
        loss = mean_over(error.abs() if self.norm == "l1" else error.square(), examples.mask)
        return LossOutput(loss, {"loss_regression": loss.detach().mean()})


@register("mip")
@dataclass(frozen=True)
class MinimalIterativePolicy(Regression):
    """Minimal iterative policy (2512.01809): regression, then once more from close to the answer.

    L = mean |F(0, 1, 0) - x|^2 + mean |F(x_t, t, 0) - x|^2 with t = 0.1. Its sampler ``mip`` puts
    the first answer, brought to t without noise, through the network again: two evaluations.
    """

    sampler: ClassVar[SamplerKind] = "mip"
    other_samplers: ClassVar[tuple[SamplerKind, ...]] = ("regression",)
    nfe: ClassVar[int] = 2

    def loss(self, flow_map: FlowMap, examples: Examples) -> LossOutput:
        """See :meth:`Objective.loss`; both passes in one evaluation."""
        x, c, draws = examples.x, examples.features, examples.draws
        near = torch.full_like(draws.t, MIP_TIME)
        x_t = flow_map.path.sample(x, draws.z, near).x_t
        both = flow_map.output(
            torch.cat([torch.zeros_like(x), x_t]),
            torch.cat([draws.t, near]),
            torch.cat([draws.s, draws.s]),
            None if c is None else torch.cat([c, c]),
        )
        first, second = (
            mean_over((f - x).abs() if self.norm == "l1" else (f - x).square(), examples.mask)
            for f in both.chunk(2)
        )
        metrics = {
            "loss_first": first.detach().mean(),
            "loss_second": second.detach().mean(),
        }
        return LossOutput(first + second, metrics)
