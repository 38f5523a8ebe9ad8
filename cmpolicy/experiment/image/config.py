"""The settings of an image training run, as frozen dataclasses that are valid once they exist."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any, ClassVar, Literal

from cmpolicy.experiment.objective import ObjectiveConfig
from cmpolicy.image.datasets.data import ImageDataConfig
from cmpolicy.image.guidance import USUAL_DROPOUT, Guidance
from cmpolicy.image.model import check_derivative
from cmpolicy.image.net import KINDS, ImageNetConfig
from cmpolicy.schema import ConfigError, at_least, from_mapping
from cmpolicy.training.config import EvalSchedule, LogConfig, LoopConfig, OptimConfig


@dataclass(frozen=True, kw_only=True)
class ImageEvalConfig(EvalSchedule):
    """Evaluation of an image model during training.

    Args:
        images: at most this many held-out images are scored.
        per_class: images of each class (the first 20) in the picture of samples.
    """

    every: int = 48_000
    images: int = 1024
    per_class: int = 8

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("images", "per_class"):
            at_least(f"eval.{name}", getattr(self, name), 1)


@dataclass(frozen=True, kw_only=True)
class ImageNetSettings:
    """A network by kind (``unet`` or ``dit``), and its own settings."""

    kind: str
    settings: Mapping[str, Any] = field(default_factory=dict)

    @property
    def config(self) -> ImageNetConfig:
        """The network's own configuration.

        Raises:
            ConfigError: an unknown kind or setting, or a bad value.
        """
        if self.kind not in KINDS:
            raise ConfigError(f"net.kind={self.kind!r} is not one of {', '.join(sorted(KINDS))}")
        kind: Any = KINDS[self.kind]
        config: ImageNetConfig = from_mapping(
            kind, {**self.settings, "kind": self.kind}, where="net"
        )
        return config

    def __post_init__(self) -> None:
        self.config  # noqa: B018  built here so that a wrong size is found at once

    @classmethod
    def complete(cls, data: Mapping[str, Any]) -> dict[str, Any]:
        """The network's settings are all in its YAML file."""
        return dict(data)

    @classmethod
    def from_mapping(cls, data: Mapping[str, Any], *, where: str = "net") -> ImageNetSettings:
        """``kind``; all else is a setting of the network."""
        rest = {k: v for k, v in data.items() if k not in ("kind", "settings")}
        return cls(kind=str(data.get("kind")), settings={**data.get("settings", {}), **rest})


@dataclass(frozen=True, kw_only=True)
class ImageObjectiveConfig(ObjectiveConfig):
    """As for policies, but by ``isd``, and no extra examples at t = 1 exactly.

    After a long run the images of ``psd`` vary less (image/README.md). At t = 1 L_sd of an image is
    as large as L_fm, and takes its share of the weight of the example: a quarter of them doubled
    the distance of one evaluation from the data (image/RECIPE.md).
    """

    other_defaults: ClassVar[Mapping[str, Any]] = {"one_share": 0.0}

    name: str = "isd"


@dataclass(frozen=True, kw_only=True)
class ImageTrainConfig(LoopConfig):
    """A whole training run of an image model. See the parts.

    Args:
        path: interpolant, ``linear`` or ``trigonometric``.
        guidance: weight of the guidance at training time; 1 is none.
        label_dropout: share of examples that are trained without their label; null: what guidance
            needs, 0.1, and 0 without it.
        init: an image model (a folder or a hub id) whose weights the run starts from; null starts
            from scratch.
    """

    dataset: ImageDataConfig
    net: ImageNetSettings
    objective: ImageObjectiveConfig = field(default_factory=ImageObjectiveConfig)
    path: Literal["linear", "trigonometric"] = "linear"
    guidance: float = 1.0
    label_dropout: float | None = None
    init: str | None = None
    examples: int = 96_000
    batch_size: int = 64
    save_every: int = 32_000
    optim: OptimConfig = field(default_factory=partial(OptimConfig, warmup=3200))
    eval: ImageEvalConfig = field(default_factory=ImageEvalConfig)
    log: LogConfig = field(default_factory=partial(LogConfig, every=3200))

    @property
    def nfe(self) -> int:
        """Network evaluations of the model: ``eval.nfe``, or the objective's own number."""
        return self.objective.evaluations(self.eval.nfe)

    def __post_init__(self) -> None:
        super().__post_init__()
        try:
            self.guide  # noqa: B018  likewise
            check_derivative(self.objective.build(), self.net.config)
        except ValueError as error:
            raise ConfigError(str(error)) from error
        self.objective.check_evaluations(self.eval.nfe)
        if self.guidance != 1 and not self.objective.build().learns_velocity:
            raise ConfigError(
                f"guidance={self.guidance} changes the velocity that is learned, and "
                f"objective={self.objective.name} learns none; set guidance=1"
            )

    @property
    def guide(self) -> Guidance:
        usual = USUAL_DROPOUT if self.guidance > 1 else 0.0
        dropout = usual if self.label_dropout is None else self.label_dropout
        return Guidance(self.guidance, dropout)
