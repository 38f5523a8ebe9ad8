"""What every training objective of a flow map has in common, and the registry of objectives.

Legend: B batch, x (B, ...) normalised data, features (B, D) what the encoder made of the
observations (or labels (B,) for images), v the conditional velocity.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from cmpolicy.flow.flow_map import FlowMap
from cmpolicy.flow.path import Path, PathSample
from cmpolicy.flow.sampler import SamplerKind, check_sampler
from cmpolicy.schema import OWN, choose, enter, from_mapping


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


@dataclass(frozen=True)
class Examples:
    """What one loss is computed on.

    Args:
        x, features: see the module.
        draws: of this batch.
        mask: which entries of x count, broadcastable to x; None counts all. Every example needs at
            least one.
        progress: share of the run that is done, in [0, 1]; drives schedules.
        ema, ema_features: the flow map with EMA weights and what the EMA encoder made of the
            observations (None: the same features); only where :attr:`Objective.needs_ema`.
        velocity_target: see :data:`VelocityTarget`.
    """

    x: Tensor
    features: Tensor | None
    draws: Draws
    mask: Tensor | None = None
    progress: float = 0.0
    ema: FlowMap | None = None
    ema_features: Tensor | None = None
    velocity_target: VelocityTarget | None = None

    def point(self, path: Path) -> PathSample:
        """x_t and its velocity, or what the caller put in the velocity's place."""
        point = path.sample(self.x, self.draws.z, self.draws.t)
        if self.velocity_target is None:
            return point
        return PathSample(point.x_t, self.velocity_target(point, self.draws.t))

    def held_features(self) -> Tensor | None:
        """The features without gradient."""
        return None if self.features is None else self.features.detach()

    def teacher(self, flow_map: FlowMap, needs_ema: bool) -> tuple[FlowMap, Tensor | None]:
        """What gives targets, and its features: the EMA flow map, or the one in training.

        Raises:
            ValueError: EMA weights are needed and none are given.
        """
        if not needs_ema:
            return flow_map, self.held_features()
        if self.ema is None:
            raise ValueError("the objective takes targets from EMA weights, and none are given")
        return self.ema, self.held_features() if self.ema_features is None else self.ema_features


class Objective(ABC):
    """What the trainer and the policy see of an objective: a frozen dataclass of settings.

    ``sampler`` and ``nfe`` are how its models are sampled unless told otherwise;
    ``other_samplers`` ask for no more than it teaches, either.
    """

    sampler: ClassVar[SamplerKind] = "flow_map"
    other_samplers: ClassVar[tuple[SamplerKind, ...]] = ("diagonal", "restart")
    nfe: ClassVar[int] = 1
    #: Whether F(x, t, t) learns the velocity, which guidance (``velocity_target``) can change.
    learns_velocity: ClassVar[bool] = True

    def __post_init__(self) -> None:  # noqa: B027  # a chain of checks ends here
        """Subclasses check their settings here and call what they extend."""

    @classmethod
    def check_sampler(cls, kind: str) -> None:
        """Whether its models can be sampled by ``kind``.

        Raises:
            ValueError: an unknown name, or a sampler that asks for what this does not teach:
                jumps of flow matching, say.
        """
        check_sampler(kind, cls.sampler)
        fitting = (cls.sampler, *cls.other_samplers)
        if kind not in fitting:
            raise ValueError(
                f"sampler={kind} asks the network for what this objective does not teach it; "
                f"choose one of {list(fitting)}"
            )

    @property
    def needs_ema(self) -> bool:
        """Whether the EMA weights of the run take part in the loss."""
        return False

    @abstractmethod
    def draw(
        self,
        batch_size: int,
        shape: tuple[int, ...],
        generator: torch.Generator | None,
        device: torch.device,
    ) -> Draws:
        """Draw noise and times for ``batch_size`` examples of ``shape``."""

    @abstractmethod
    def loss(self, flow_map: FlowMap, examples: Examples) -> LossOutput:
        """The loss of every example; ``flow_map`` with gradient."""

    def __call__(
        self,
        flow_map: FlowMap,
        x: Tensor,
        features: Tensor | None,
        draws: Draws,
        **rest: Any,
    ) -> LossOutput:
        """:meth:`loss`; the other arguments are those of :class:`Examples`.

        Raises:
            ValueError: a ``velocity_target`` for an objective that learns no velocity.
        """
        examples = Examples(x, features, draws, **rest)
        if examples.velocity_target is not None and not self.learns_velocity:
            name = type(self).__name__
            raise ValueError(f"{name} learns no velocity F(x, t, t), so it cannot be guided")
        return self.loss(flow_map, examples)


OBJECTIVES: dict[str, type[Objective]] = {}


def register(name: str) -> Callable[[type], type]:
    """Make a frozen dataclass of settings known to :func:`build_objective` under ``name``."""

    def add(cls: type) -> type:
        enter(OBJECTIVES, name, cls, "objective")
        return cls

    return add


def build_objective(name: str, **settings: Any) -> Objective:
    """The objective of that name with its settings.

    Raises:
        ConfigError: an unknown name or setting (with the nearest known ones), or a bad value.
    """
    return from_mapping(choose(OBJECTIVES, name, "objective", OWN), settings, where="objective")


def check_shares(settings: object, *names: str) -> None:
    """Raise ValueError for a setting that is no share in [0, 1]."""
    for name in names:
        value = getattr(settings, name)
        if not 0 <= value <= 1:
            raise ValueError(f"objective.{name}={value} must lie in [0, 1]")


def check_choice(settings: object, name: str, known: Sequence[str]) -> None:
    """Raise ValueError for a setting that is none of the known words."""
    value = getattr(settings, name)
    if value not in known:
        raise ValueError(f"objective.{name}={value!r} is not one of {list(known)}")


def check_not_negative(settings: object, *names: str) -> None:
    """Raise ValueError for a setting below zero, or NaN."""
    for name in names:
        value = getattr(settings, name)
        if not value >= 0:
            raise ValueError(f"objective.{name}={value} must not be negative")


def mean_over(x: Tensor, mask: Tensor | None) -> Tensor:
    """Mean over the entries of each example that count, (B, ...) to (B,)."""
    if mask is None:
        return x.flatten(1).mean(1)
    counted = mask.to(x.dtype).expand_as(x).flatten(1)
    return (x.flatten(1) * counted).sum(1) / counted.sum(1)
