"""Flow matching (Lipman et al. 2023): the diagonal of a flow map, and nothing else."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

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
from cmpolicy.flow.times import TimeLaw


@register("fm")
@dataclass(frozen=True)
class FlowMatching(Objective):
    """L = mean |F(x_t, t, t) - v_t|^2. Sample it with the diagonal sampler.

    Args:
        time_a, time_b: t ~ Beta(time_a, time_b).
    """

    time_a: float = 1.0
    time_b: float = 1.0

    sampler: ClassVar[SamplerKind] = "diagonal"
    other_samplers: ClassVar[tuple[SamplerKind, ...]] = ()
    nfe: ClassVar[int] = 10

    def __post_init__(self) -> None:
        TimeLaw(self.time_a, self.time_b)

    def draw(
        self,
        batch_size: int,
        shape: tuple[int, ...],
        generator: torch.Generator | None,
        device: torch.device,
    ) -> Draws:
        """See :meth:`Objective.draw`; s = t."""
        t = TimeLaw(self.time_a, self.time_b).draw(batch_size, generator, device)
        z = torch.randn(batch_size, *shape, generator=generator, device=device)
        return Draws(z, t, t)

    def loss(self, flow_map: FlowMap, examples: Examples) -> LossOutput:
        """See :meth:`Objective.loss`; neither a schedule nor EMA weights are used."""
        point = examples.point(flow_map.path)
        f = flow_map.velocity(point.x_t, examples.draws.t, examples.features)
        loss = mean_over((f - point.velocity).square(), examples.mask)
        return LossOutput(loss, {"loss_fm": loss.detach().mean()})
