"""Flow matching (Lipman et al. 2023): the diagonal of a flow map, and nothing else."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from cmpolicy.flow.flow_map import FlowMap
from cmpolicy.flow.objectives.objective import (
    Draws,
    LossOutput,
    VelocityTarget,
    mean_over,
    register,
)
from cmpolicy.flow.sampler import SamplerKind
from cmpolicy.flow.times import TimeLaw


@register("fm")
@dataclass(frozen=True)
class FlowMatching:
    """L = mean |F(x_t, t, t) - v_t|^2. Sample it with the diagonal sampler.

    Args:
        time_a, time_b: t ~ Beta(time_a, time_b).
    """

    time_a: float = 1.0
    time_b: float = 1.0

    sampler: ClassVar[SamplerKind] = "diagonal"
    nfe: ClassVar[int] = 10
    needs_ema: ClassVar[bool] = False

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
        """See :meth:`Objective.__call__`; neither a schedule nor EMA weights are used."""
        point = flow_map.path.sample(x, draws.z, draws.t)
        v = point.velocity if velocity_target is None else velocity_target(point, draws.t)
        f = flow_map.velocity(point.x_t, draws.t, features)
        loss = mean_over((f - v).square(), mask)
        return LossOutput(loss, {"loss_fm": loss.detach().mean()})
