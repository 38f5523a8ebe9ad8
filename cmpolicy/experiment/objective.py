"""The settings of what is trained: an objective of policies, or of images, and its sampler."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

from cmpolicy.flow.objectives import OBJECTIVES, Objective, build_objective
from cmpolicy.flow.sampler import SamplerKind, get_sampler
from cmpolicy.schema import OWN, ConfigError, choose, complete, from_mapping, merge


@dataclass(frozen=True, kw_only=True)
class ObjectiveConfig:
    """An objective by name, how its policies are sampled, and the objective's own settings.

    ``sampler`` null takes the objective's own.
    """

    other_defaults: ClassVar[Mapping[str, Any]] = {}
    """Defaults of the objectives' settings that differ from their own, where they have these."""

    name: str = "psd"
    sampler: SamplerKind | None = None
    settings: Mapping[str, Any] = field(default_factory=dict)

    def build(self) -> Objective:
        return build_objective(self.name, **{**self._others(self.name), **self.settings})

    @classmethod
    def _others(cls, name: str) -> dict[str, Any]:
        kind = choose(OBJECTIVES, name, "objective", OWN)
        return {key: value for key, value in cls.other_defaults.items() if hasattr(kind, key)}

    @property
    def sampler_kind(self) -> SamplerKind:
        """How policies of this objective are sampled."""
        return self.sampler or choose(OBJECTIVES, self.name, "objective").sampler

    def __post_init__(self) -> None:
        try:
            self.build().check_sampler(self.sampler_kind)
        except (ValueError, TypeError) as error:
            raise ConfigError(str(error)) from error

    def evaluations(self, nfe: int | None) -> int:
        """``nfe``, or the objective's own number of network evaluations."""
        return choose(OBJECTIVES, self.name, "objective").nfe if nfe is None else nfe

    def check_evaluations(self, nfe: int | None) -> None:
        """Raise ConfigError for a number of evaluations that the sampler cannot do."""
        try:
            get_sampler(self.sampler_kind).grid(self.evaluations(nfe))
        except ValueError as error:
            raise ConfigError(
                f"eval.nfe={nfe} does not go with objective={self.name}, whose sampler is "
                f"{self.sampler_kind}: {error}"
            ) from error

    @classmethod
    def from_mapping(cls, data: Mapping[str, Any], *, where: str = "objective") -> ObjectiveConfig:
        """``name`` and ``sampler``; all else is a setting of the objective."""
        own = {k: v for k, v in data.items() if k in ("name", "sampler")}
        rest = {k: v for k, v in data.items() if k not in ("name", "sampler", "settings")}
        settings = {**data.get("settings", {}), **rest}
        return from_mapping(cls, {**own, "settings": settings}, where=where)

    @classmethod
    def complete(cls, data: Mapping[str, Any]) -> dict[str, Any]:
        """The settings with the defaults of the objective, side by side."""
        name = str(data.get("name") or cls.name)
        own = complete(choose(OBJECTIVES, name, "objective", OWN), {}) | cls._others(name)
        rest = {k: v for k, v in data.items() if k not in ("name", "sampler", "settings")}
        given = {**data.get("settings", {}), **rest}
        return {"name": name, "sampler": data.get("sampler"), **merge(own, given)}
