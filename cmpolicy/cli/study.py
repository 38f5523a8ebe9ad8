"""``cmpolicy study``: the paper's claims on problems whose solution is known."""

from __future__ import annotations

import shlex
from collections.abc import Sequence

from cmpolicy.cli.parse import describe, read
from cmpolicy.schema import ConfigError, choose
from cmpolicy.study.stability import StabilitySettings, run_stability

_HEADER = """\
usage: cmpolicy study COMMAND [key=value ...]

Train small networks on problems whose solution is known, and see which claims hold.

commands:
  stability   every objective of a flow map in one and two dimensions, against the true flow:
              errors, gradients, degenerate solutions; a table of claims and a page of figures

`cmpolicy study COMMAND --help` lists its settings."""
_SETTINGS = {"stability": StabilitySettings}


def help_text(words: Sequence[str]) -> str:
    """Of the study among the words, or of all."""
    if words and words[0] in _SETTINGS:
        return describe(_SETTINGS[words[0]], f"usage: cmpolicy study {words[0]} [key=value ...]")
    return _HEADER


def run(words: Sequence[str]) -> int:
    """Run the study; the exit status."""
    if not words:
        raise ConfigError(f"which study? Choose one of {', '.join(_SETTINGS)}")
    name, *rest = words
    settings = read(choose(_SETTINGS, name, "study"), rest)
    page = run_stability(settings, shlex.join(["cmpolicy", "study", *words]))
    print(f"written to {page}")
    return 0
