"""What every training objective of a flow map has in common, and the registry of objectives.

Legend: B batch, x (B, ...) normalised data, features (B, D) what the encoder made of the
observations (or labels (B,) for images), v the conditional velocity.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor

from cmpolicy.flow.flow_map import FlowMap
from cmpolicy.flow.path import PathSample
from cmpolicy.flow.sampler import SamplerKind
from cmpolicy.schema import choose, from_mapping


@dataclass(frozen=True)
class Draws:
    """All randomness of one training step: noise z (B, ...), times t >= s (B,)."""

    z: Tensor
    t: Tensor
    s: Tensor

    def slice(self, start: int, stop: int) -> Draws:
        """Examples start..stop of a global draw: what one of several processes works on."""
        return Draws(self.z[start:stop], self.t[start:stop], self.s[start:stop])


@dataclass(frozen=True)
class LossOutput:
    """What a loss gives the trainer.

    per_example (B,) weighted, with gradient; metrics are detached scalars on the device.
    """

    per_example: Tensor
    metrics: dict[str, Tensor]

    @property
    def loss(self) -> Tensor:
        """Mean over the batch, a scalar with gradient."""
        return self.per_example.mean()


#: velocity_target(point, t (B,)) -> (B, ...): takes the place of the conditional velocity
#: ``point.velocity``; its mean given x_t is the velocity that is learned.
VelocityTarget = Callable[[PathSample, Tensor], Tensor]


class Objective(Protocol):
    """What the trainer and the policy see of an objective.

    ``sampler`` and ``nfe`` are how its models are sampled unless told otherwise.
    """

    sampler: ClassVar[SamplerKind]
    nfe: ClassVar[int]

    @property
    def needs_ema(self) -> bool:
        """Whether the EMA weights of the run take part in the loss."""

    def draw(
        self,
        batch_size: int,
        shape: tuple[int, ...],
        generator: torch.Generator | None,
        device: torch.device,
    ) -> Draws:
        """Draw noise and times for ``batch_size`` examples of ``shape``."""

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
        """The loss of every example.

        Args:
            flow_map: with gradient.
            x, features: see the module.
            draws: of this batch.
            mask: which entries of x count, broadcastable to x; None counts all. Every example
                needs at least one.
            progress: share of the run that is done, in [0, 1]; drives schedules.
            ema, ema_features: the flow map with EMA weights and what the EMA encoder made of the
                observations (None: the same features); only where :attr:`needs_ema`.
            velocity_target: see :data:`VelocityTarget`.
        """


OBJECTIVES: dict[str, type[Objective]] = {}


def register(name: str) -> Callable[[type], type]:
    """Make a frozen dataclass of settings known to :func:`build_objective` under ``name``."""

    def add(cls: type) -> type:
        OBJECTIVES[name] = cls
        return cls

    return add


def build_objective(name: str, **settings: Any) -> Objective:
    """The objective of that name with its settings.

    Raises:
        ConfigError: an unknown name or setting (with the nearest known ones), or a bad value.
    """
    return from_mapping(choose(OBJECTIVES, name, "objective"), settings, where="objective")


def mean_over(x: Tensor, mask: Tensor | None) -> Tensor:
    """Mean over the entries of each example that count, (B, ...) to (B,)."""
    if mask is None:
        return x.flatten(1).mean(1)
    counted = mask.to(x.dtype).expand_as(x).flatten(1)
    return (x.flatten(1) * counted).sum(1) / counted.sum(1)
