"""Denoising diffusion as in Diffusion Policy (2303.04137): the noise is predicted."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from cmpolicy.flow.diffusion import STEPS, noised
from cmpolicy.flow.flow_map import FlowMap
from cmpolicy.flow.objectives.objective import (
    Draws,
    Examples,
    LossOutput,
    Objective,
    mean_over,
    register,
)
from cmpolicy.flow.sampler import SamplerKind


@register("ddpm")
@dataclass(frozen=True)
class Ddpm(Objective):
    """L = mean |F(x_k, t, t) - z|^2 with t = k / 100, k even over 0..99.

    x_k = sqrt(a_k) x + sqrt(1 - a_k) z with the schedule ``squaredcos_cap_v2`` of 100 steps; the
    path of the flow map is not used. Sampled by ``ddpm`` (100 evaluations, each with noise of its
    own) or, with ``objective.sampler=ddim nfe=10``, by DDIM.
    """

    sampler: ClassVar[SamplerKind] = "ddpm"
    other_samplers: ClassVar[tuple[SamplerKind, ...]] = ("ddim",)
    nfe: ClassVar[int] = STEPS
    learns_velocity: ClassVar[bool] = False

    def draw(
        self,
        batch_size: int,
        shape: tuple[int, ...],
        generator: torch.Generator | None,
        device: torch.device,
    ) -> Draws:
        """See :meth:`Objective.draw`; s = t."""
        t = torch.randint(STEPS, (batch_size,), generator=generator, device=device) / STEPS
        z = torch.randn(batch_size, *shape, generator=generator, device=device)
        return Draws(z, t, t)

    def loss(self, flow_map: FlowMap, examples: Examples) -> LossOutput:
        z, t = examples.draws.z, examples.draws.t
        predicted = flow_map.output(noised(examples.x, z, t), t, t, examples.features)
        loss = mean_over((predicted - z).square(), examples.mask)
        return LossOutput(loss, {"loss_ddpm": loss.detach().mean()})
