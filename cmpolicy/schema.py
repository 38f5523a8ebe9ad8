"""Plain mappings (read from YAML, say) to frozen dataclasses, with errors meant for people.

Every error names the dotted key, what was found and what would be right.
"""

from __future__ import annotations

import difflib
import types
from collections.abc import Collection, Iterable, Mapping
from dataclasses import MISSING, fields, is_dataclass
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

T = TypeVar("T")


class ConfigError(ValueError):
    """Settings that are unknown, of the wrong kind, or that cannot go together."""


class UnknownNameError(ConfigError):
    """A name that is not in a registry."""


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


#: What helps where a name may be that of a user's own code.
OWN = (
    "one of your own is known once its module is imported: CMPOLICY_PLUGINS=<module> for commands, "
    "an import in Python"
)


def choose(known: Mapping[str, T], name: str, what: str, how: str = "") -> T:
    """The entry of a registry.

    Args:
        known: the registry.
        name: of the entry.
        what: one entry of the registry, for messages, e.g. ``objective``.
        how: a closing hint.

    Raises:
        UnknownNameError: with the nearest known name.
    """
    if name in known:
        return known[name]
    near = difflib.get_close_matches(str(name), known, n=1)
    hint = f"; did you mean {near[0]!r}?" if near else ""
    lines = [f"unknown {what} {name!r}{hint}", f"known: {', '.join(sorted(known))}"]
    raise UnknownNameError("\n".join([*lines, how] if how else lines))


def enter(known: dict[str, T], name: str, entry: T, what: str) -> None:
    """Put an entry into a registry; the same code may do so again, as a cell of a notebook does.

    Raises:
        ConfigError: the name is that of another entry.
    """
    before = known.get(name, entry)
    if _origin(before) != _origin(entry):
        raise ConfigError(
            f"{what} {name!r} is {'.'.join(_origin(before))} already; give "
            f"{'.'.join(_origin(entry))} another name"
        )
    known[name] = entry


def _origin(entry: Any) -> tuple[str, str]:
    return entry.__module__, entry.__qualname__


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


def complete(cls: type[Any], data: Mapping[str, Any]) -> dict[str, Any]:
    """``data`` with the defaults of the dataclass ``cls`` for what it leaves out, recursively.

    What has no default is None, so that every setting has its place. Keys that the class does not
    know are kept, for :func:`from_mapping` to complain about. A class with a ``complete``
    classmethod of its own is asked to do its part itself.
    """
    hints = get_type_hints(cls)
    filled: dict[str, Any] = {}
    for item in fields(cls):
        kind, given = hints[item.name], data.get(item.name)
        if item.default_factory is not MISSING and is_dataclass(kind):
            base = plain(item.default_factory())
            given = merge(base, given) if isinstance(given, Mapping | None) else given
        elif item.name not in data:
            if item.default is not MISSING:
                given = item.default
            elif item.default_factory is not MISSING:
                given = item.default_factory()
        inner = next((a for a in get_args(kind) if is_dataclass(a)), None)
        if inner is not None and isinstance(given, Mapping):
            kind = inner
        if is_dataclass(kind) and isinstance(given, Mapping | None):
            reader = getattr(kind, "complete", None)
            given = reader(given or {}) if reader else complete(kind, given or {})  # type: ignore[arg-type]
        filled[item.name] = plain(given)
    return filled | {key: value for key, value in data.items() if key not in filled}


def merge(base: Mapping[str, Any], over: Mapping[str, Any] | None) -> dict[str, Any]:
    """``base`` with the values of ``over``, groups within groups."""
    merged = dict(base)
    for key, value in (over or {}).items():
        both = isinstance(value, Mapping) and isinstance(merged.get(key), Mapping)
        merged[key] = merge(merged[key], value) if both else value
    return merged


def plain(value: Any) -> Any:
    """Dataclasses and mappings to dicts, tuples to lists: what YAML and JSON hold."""
    if is_dataclass(value) and not isinstance(value, type):
        return {item.name: plain(getattr(value, item.name)) for item in fields(value)}
    if isinstance(value, Mapping):
        return {key: plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    return value


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
        if isinstance(value, int | float) and not isinstance(value, bool):
            value = [value]  # nfe=1 is what one writes for nfe=[1]
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


def at_least(name: str, value: float | None, least: float) -> None:
    """Raise ConfigError unless ``value`` of the setting ``name`` is at least that, or not given."""
    if value is not None and value < least:
        raise ConfigError(f"{name}={value} must be at least {least}")


def each_once(name: str, values: Collection[Any], least: float | None = None) -> None:
    """Raise ConfigError unless there are values, each once and, if numbers, at least that."""
    if not values or len(set(values)) != len(values):
        raise ConfigError(f"{name}={list(values)} must name something, and nothing twice")
    if least is not None:
        at_least(name, min(values), least)


def positive(name: str, value: float | None) -> None:
    """Raise ConfigError unless ``value`` is above 0, or not given."""
    if value is not None and not value > 0:
        raise ConfigError(f"{name}={value} must be above 0")
