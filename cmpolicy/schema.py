"""Plain mappings (read from YAML, say) to frozen dataclasses, with errors meant for people.

Every error names the dotted key, what was found and what would be right.
"""

from __future__ import annotations

import difflib
import types
from collections.abc import Iterable, Mapping
from dataclasses import MISSING, fields, is_dataclass
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

T = TypeVar("T")


class ConfigError(ValueError):
    """Settings that are unknown, of the wrong kind, or that cannot go together."""


def unknown_key_message(key: str, known: Iterable[str], *, how: str = "") -> str:
    """What to tell about an unknown setting: the nearest known ones and all that are allowed.

    Args:
        key: dotted, e.g. ``optim.lrr``.
        known: the allowed dotted keys.
        how: a closing hint, a sentence.
    """
    allowed = sorted(known)
    near = difflib.get_close_matches(key, allowed, n=3, cutoff=0.6)
    last = key.rpartition(".")[2]  # `lr` alone is a common slip for `optim.lr`
    near += [k for k in allowed if k.rpartition(".")[2] == last and k not in near]
    lines = [f"unknown setting {key!r}"]
    if near:
        lines[0] += f"; did you mean {' or '.join(repr(k) for k in near[:3])}?"
    parent = key.rpartition(".")[0]
    siblings = [k for k in allowed if k.rpartition(".")[0] == parent] or allowed
    place = f"allowed under {parent!r}" if parent and siblings is not allowed else "allowed"
    lines.append(f"{place}: {', '.join(siblings)}")
    return "\n".join([*lines, how] if how else lines)


def choose(known: Mapping[str, T], name: str, what: str) -> T:
    """The entry of a registry.

    Args:
        known: the registry.
        name: of the entry.
        what: one entry of the registry, for messages, e.g. ``objective``.

    Raises:
        ConfigError: an unknown name, with the nearest known one.
    """
    if name in known:
        return known[name]
    near = difflib.get_close_matches(str(name), known, n=1)
    hint = f"; did you mean {near[0]!r}?" if near else ""
    raise ConfigError(f"unknown {what} {name!r}{hint}\nknown: {', '.join(sorted(known))}")


def from_mapping(cls: type[T], data: Mapping[str, Any], *, where: str = "") -> T:
    """Build dataclass ``cls`` from ``data``, recursively.

    A class with a ``from_mapping`` classmethod of its own is asked to read its part itself. Whole
    floats are accepted for integers (``examples=2e6``).

    Args:
        where: dotted place of ``data``, for messages.

    Raises:
        ConfigError: an unknown or missing key, a value of the wrong type, or what the dataclass
            itself objects to.
    """
    prefix = f"{where}." if where else ""
    if isinstance(data, cls):
        return data
    if not isinstance(data, Mapping):
        raise ConfigError(f"{where!r} must be a group of settings, got {data!r}")
    known = {field.name: field for field in fields(cls)}  # type: ignore[arg-type]
    for key in data:
        if key not in known:
            raise ConfigError(unknown_key_message(f"{prefix}{key}", [prefix + k for k in known]))
    hints = get_type_hints(cls)
    values: dict[str, Any] = {}
    for name, field in known.items():
        if name in data:
            values[name] = _convert(hints[name], data[name], prefix + name)
        elif field.default is MISSING and field.default_factory is MISSING:
            raise ConfigError(f"setting {prefix + name!r} is missing; give {prefix + name}=<value>")
    try:
        return cls(**values)
    except ConfigError:
        raise
    except (ValueError, TypeError) as error:  # TypeError: a comparison of different kinds
        raise ConfigError(f"{where}: {error}" if where else str(error)) from error


def _convert(kind: Any, value: Any, where: str) -> Any:
    """``value`` as ``kind``, a type hint out of the few that settings use."""
    if is_dataclass(value):
        return value  # read already
    origin, args = get_origin(kind), get_args(kind)
    if origin in (Union, types.UnionType):
        if value is None and type(None) in args:
            return None
        return _convert(next(a for a in args if a is not type(None)), value, where)
    if origin is Literal:
        if value not in args:
            raise ConfigError(f"{where}={value!r} is not one of {', '.join(map(str, args))}")
        return value
    if origin is tuple:
        if isinstance(value, str) or not isinstance(value, Iterable):
            raise ConfigError(f"{where} must be a list such as [1, 2], got {value!r}")
        return tuple(_convert(args[0], v, f"{where}[{i}]") for i, v in enumerate(value))
    if origin is not None and issubclass(origin, Mapping):
        if not isinstance(value, Mapping):
            raise ConfigError(f"{where} must be a mapping such as {{key: value}}, got {value!r}")
        return {str(k): _convert(args[1], v, f"{where}.{k}") for k, v in value.items()}
    if is_dataclass(kind):
        reader = getattr(kind, "from_mapping", None)
        return reader(value, where=where) if reader else from_mapping(kind, value, where=where)  # type: ignore[arg-type]
    return _scalar(kind, value, where)


def _scalar(kind: Any, value: Any, where: str) -> Any:
    if kind is object or kind is Any:
        return value
    if value is None:
        raise ConfigError(f"{where} is not set; give {where}=<{_NAMES.get(kind, 'value')}>")
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if kind is int and is_number and float(value).is_integer():
        return int(value)
    if kind is float and is_number:
        return float(value)
    if kind is bool and isinstance(value, bool):
        return value
    if kind is str and isinstance(value, str):
        return value
    raise ConfigError(f"{where} must be {_NAMES.get(kind, kind)}, got {value!r}")


_NAMES: dict[Any, str] = {
    int: "a whole number",
    float: "a number",
    bool: "true or false",
    str: "text",
}
