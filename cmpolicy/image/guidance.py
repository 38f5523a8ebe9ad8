"""Classifier-free guidance at training time: one evaluation is already guided.

A share of the samples loses its label and learns the velocity u_null of all classes together. For
the others, v is replaced by u_null + w (v - u_null) (arXiv 2601.22679, after Ho and Salimans 2022),
so that the network learns u_null + w (u_class - u_null) itself and sampling needs no second call.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from cmpolicy.flow.flow_map import FlowMap
from cmpolicy.flow.objectives import Draws, VelocityTarget
from cmpolicy.flow.path import PathSample, expand_time

MAX_WEIGHT = 20.0
#: Share of labels dropped by Ho and Salimans 2022 and most after them.
USUAL_DROPOUT = 0.1


@dataclass(frozen=True)
class LabelDraws(Draws):
    """All randomness of one training step on labelled data; dropped: (B,) bool."""

    dropped: Tensor

    def slice(self, start: int, stop: int) -> LabelDraws:
        part = super().slice(start, stop)
        return LabelDraws(part.z, part.t, part.s, self.dropped[start:stop])


@dataclass(frozen=True)
class Guidance:
    """How strongly a model is guided.

    Args:
        weight: w; 1 is no guidance, more makes samples more typical of their class and less
            diverse.
        dropout: share of samples whose label is dropped.

    Raises:
        ValueError: a weight or a share that makes no sense.
    """

    weight: float = 1.0
    dropout: float = USUAL_DROPOUT

    def __post_init__(self) -> None:
        if not (math.isfinite(self.weight) and 1.0 <= self.weight <= MAX_WEIGHT):
            raise ValueError(
                f"guidance={self.weight} makes no sense: 1 is no guidance, below 1 the class would "
                f"count for less than the data says; choose 1 to {MAX_WEIGHT:g} (usual: 1 to 3)"
            )
        if not 0.0 <= self.dropout < 1.0:
            raise ValueError(f"label_dropout={self.dropout} must be in [0, 1)")
        if self.weight > 1.0 and self.dropout == 0.0:
            raise ValueError(
                f"guidance={self.weight} needs samples without a label to be guided away from; "
                "set label_dropout to 0.1, say"
            )

    def draw(self, draws: Draws, generator: torch.Generator | None) -> LabelDraws:
        """Add to the draws of an objective which labels are dropped."""
        n, device = len(draws.t), draws.t.device
        dropped = torch.rand(n, generator=generator, device=device) < self.dropout
        return LabelDraws(draws.z, draws.t, draws.s, dropped)

    def target(self, flow_map: FlowMap, null: Tensor, dropped: Tensor) -> VelocityTarget | None:
        """What to train towards in place of v; None where that is v itself.

        Args:
            flow_map: gives u_null, without gradient.
            null: (B,) the "no label" condition.
            dropped: (B,) samples that learn u_null; their target is v.
        """
        if self.weight == 1.0:
            return None

        def guided(point: PathSample, t: Tensor) -> Tensor:
            with torch.no_grad(), _uncached_autocast(point.x_t.device.type):
                u_null = flow_map.velocity(point.x_t, t, null)
            weight = torch.where(dropped, 1.0, self.weight).to(u_null.dtype)
            return torch.lerp(u_null, point.velocity, expand_time(weight, u_null))

        return guided


def _uncached_autocast(device_type: str) -> torch.autocast:
    """Autocast as it is, for an evaluation without gradient before one with it.

    Autocast keeps a weight that it has cast; without gradient it would keep one that gives none
    (pytorch issue 65766).
    """
    return torch.autocast(
        device_type,
        torch.get_autocast_dtype(device_type),
        enabled=torch.is_autocast_enabled(device_type),
        cache_enabled=False,
    )
