"""``cmpolicy study``: the paper's claims on problems whose solution is known."""

from __future__ import annotations

import json
import shlex
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from cmpolicy.cli.parse import describe, read, split
from cmpolicy.cli.train import COMPOSITION
from cmpolicy.experiment.config import TrainConfig
from cmpolicy.schema import ConfigError, choose
from cmpolicy.study.objectives import STUDY_FILE, ObjectivesSettings, study_objectives
from cmpolicy.study.objectives_report import write_report
from cmpolicy.study.stability import StabilitySettings, run_stability

_HEADER = """\
usage: cmpolicy study COMMAND [key=value ...]

Train small networks on problems whose solution is known, and see which claims hold; or train
policies by every objective, alike in all else.

commands:
  stability   small networks in one and two dimensions by every objective of a flow map, against
              the true flow: errors, gradients, degenerate solutions; claims and a page of figures
  objectives  policies by every objective on the same network, data, examples and seeds: success by
              number of evaluations, gradient norms, time, memory. Takes every setting of
              `cmpolicy train` as well: task=lift preset=standard net=tiny

`cmpolicy study COMMAND --help` lists its settings."""
_SETTINGS = {"stability": StabilitySettings, "objectives": ObjectivesSettings}
_TRAINING = replace(COMPOSITION, extra={})


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
    choose(_SETTINGS, name, "study")
    command = shlex.join(["cmpolicy", "study", *words])
    if name == "stability":
        print(f"written to {run_stability(read(StabilitySettings, rest), command)}")
    else:
        _objectives(rest, command)
    return 0


def _objectives(words: Sequence[str], command: str) -> None:
    settings, others = split(ObjectivesSettings, words)
    for word in others:
        key = word.partition("=")[0]
        if key == "objective" or key.startswith("objective."):
            raise ConfigError(
                f"{word}: the study chooses the objective; name those to compare in "
                "objectives=[isd,fm]. Each has the settings of its YAML"
            )
        if key == "seed":
            raise ConfigError(f"{word}: training seeds are given as seeds=[0,1,2]")
        if key == "eval.episodes" and word != "eval.episodes=0":
            raise ConfigError(
                f"{word}: policies are scored at the end alone; name the episodes in "
                "eval_seeds=500000-500099"
            )
    configs = {
        name: TrainConfig.from_mapping(
            _TRAINING.compose([*others, f"objective={name}", "eval.episodes=0"])
        )
        for name in settings.names
    }
    runs = study_objectives(settings, configs, command=command)
    out = Path(settings.out).expanduser()
    commands = json.loads((out / STUDY_FILE).read_text())["commands"]
    print(write_report(runs, out, list(dict.fromkeys(commands))))
    print(f"written to {out / 'table.md'} and {out / 'objectives.png'}")
