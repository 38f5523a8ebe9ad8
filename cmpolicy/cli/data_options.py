"""Options of ``cmpolicy data`` commands, written key=value."""

from __future__ import annotations

import argparse


class UsageError(ValueError):
    """Arguments that make no sense."""


def read_options(arguments: argparse.Namespace, defaults: dict[str, str]) -> dict[str, str]:
    """The options of a command: ``defaults``, replaced by those that were given.

    Raises:
        UsageError: not key=value, or no key of the command.
    """
    options = dict(defaults)
    for text in arguments.options:
        key, equals, value = text.partition("=")
        if not equals or key not in defaults:
            raise UsageError(
                f"Cannot use {text!r}: options are written key=value, and the keys of this command "
                f"are {', '.join(defaults)}."
            )
        options[key] = value
    return options


def whole(options: dict[str, str], key: str) -> int:
    """The option as a whole number.

    Raises:
        UsageError: it is none.
    """
    try:
        return int(options[key])
    except ValueError:
        raise UsageError(f"{key} must be a whole number, got {options[key]!r}.") from None


def names(options: dict[str, str], key: str) -> list[str]:
    """The option as a list of names: ``[a,b]`` or ``a,b``."""
    text = options[key].removeprefix("[")
    text = text.removesuffix("]") if text != options[key] else text
    return [name.strip() for name in text.split(",") if name.strip()]


def yes(options: dict[str, str], key: str) -> bool:
    """The option as true or false.

    Raises:
        UsageError: it is neither.
    """
    if options[key] not in ("true", "false"):
        raise UsageError(f"{key} must be true or false, got {options[key]!r}.")
    return options[key] == "true"
