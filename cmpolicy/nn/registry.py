"""Networks F(x, t, s, features) and observation encoders by kind.

To add one: write a frozen dataclass of its settings with what :class:`NetConfig` or
:class:`EncoderConfig` asks for, and decorate it with ``@register_net`` or ``@register_encoder``.
``net=<kind>`` then chooses it, once its module is imported (``CMPOLICY_PLUGINS``: see
cmpolicy/training/README.md); a YAML of other values than its defaults is not needed.

Legend: B batch, To observation steps, T horizon, A action size, D features.
"""

from __future__ import annotations

from collections.abc import Mapping
from importlib import import_module
from typing import Any, ClassVar, Protocol, TypeVar, cast

from torch import nn

from cmpolicy.schema import OWN, ConfigError, choose, enter, from_mapping
from cmpolicy.spec import PolicySpec


class NetConfig(Protocol):
    """Settings of a network over action trajectories."""

    kind: ClassVar[str]

    def check_horizon(self, horizon: int) -> None:
        """Raise ValueError unless the network takes trajectories of this length."""

    def build(self, *, action_dim: int, feature_dim: int) -> nn.Module:
        """A fresh network: forward(x (B, T, A), t (B,), s (B,), features (B, D)) -> (B, T, A)."""


class EncoderConfig(Protocol):
    """Settings of an observation encoder."""

    kind: ClassVar[str]

    def build(self, spec: PolicySpec) -> nn.Module:
        """A fresh encoder, with the attribute ``feature_dim``, D.

        forward(obs, augment=None) -> features (B, D). ``obs`` holds (B, To, ...) per key:
        normalised numbers, and uint8 frames of ``spec.images``. An encoder of frames also has
        ``n_augment``: so many uniform numbers per row it takes, (B, n_augment), in training.
        """


NETS: dict[str, type[NetConfig]] = {}
ENCODERS: dict[str, type[EncoderConfig]] = {}
#: The modules that register what comes with cmpolicy.
_BUILT_IN = ("cmpolicy.nn.unet1d", "cmpolicy.nn.encoders.state", "cmpolicy.nn.encoders.image")

C = TypeVar("C")


def register_net(cls: type[C]) -> type[C]:
    """Make a network's settings known under ``cls.kind``."""
    config = cast(type[NetConfig], cls)
    enter(cast(dict[str, Any], NETS), config.kind, config, "net.kind")
    return cls


def register_encoder(cls: type[C]) -> type[C]:
    """Make an encoder's settings known under ``cls.kind``."""
    config = cast(type[EncoderConfig], cls)
    enter(cast(dict[str, Any], ENCODERS), config.kind, config, "encoder.kind")
    return cls


def net_config(settings: Mapping[str, Any]) -> NetConfig:
    """A network's settings from a mapping with ``kind``, such as a bundle's or a YAML file's.

    Raises:
        ConfigError: an unknown kind or setting (with the nearest known one), or a bad value.
    """
    return cast(NetConfig, _read(cast(dict[str, type[Any]], NETS), settings, "net"))


def encoder_config(settings: Mapping[str, Any]) -> EncoderConfig:
    """As :func:`net_config`, for an encoder."""
    return cast(EncoderConfig, _read(cast(dict[str, type[Any]], ENCODERS), settings, "encoder"))


def to_mapping(config: NetConfig | EncoderConfig) -> dict[str, Any]:
    """Plain values with ``kind``: what JSON and YAML hold; the inverse of the readers above."""
    values = {name: getattr(config, name) for name in cast(Any, config).__dataclass_fields__}
    plain = {k: list(v) if isinstance(v, tuple) else v for k, v in values.items()}
    return {"kind": config.kind, **plain}


def load_built_in() -> None:
    """Import what comes with cmpolicy, which registers it."""
    for module in _BUILT_IN:
        import_module(module)


def _read(known: dict[str, type[Any]], settings: Mapping[str, Any], where: str) -> Any:
    load_built_in()
    if isinstance(settings, tuple(known.values())):
        return settings
    if not isinstance(settings, Mapping):
        raise ConfigError(f"{where} must be a group of settings with `kind`, got {settings!r}")
    if "_target_" in settings:
        raise ConfigError(
            f"{where}._target_={settings['_target_']}: nothing is built from a class's path here; "
            f"register its settings and give {where}.kind, see cmpolicy/nn/registry.py"
        )
    rest = {key: value for key, value in settings.items() if key != "kind"}
    cls = choose(known, str(settings.get("kind")), f"{where}.kind", OWN)
    return from_mapping(cls, rest, where=where)
