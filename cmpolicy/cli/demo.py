"""``cmpolicy demo``: train a one-step policy in minutes, score it and film it."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from dataclasses import replace

from cmpolicy.cli.parse import describe, split
from cmpolicy.cli.train import COMPOSITION
from cmpolicy.experiment.config import TrainConfig
from cmpolicy.experiment.demo import DemoSettings, run_demo

_HEADER = """\
usage: cmpolicy demo [key=value ...]

Train a one-step policy on the bundled Push-T demonstrations, score it on the protocol's seeds and
film it. Every setting of `cmpolicy train` can be given as well."""


def help_text(words: Sequence[str]) -> str:
    """The demo's own settings."""
    return describe(DemoSettings, _HEADER)


def run(words: Sequence[str]) -> int:
    """Run the demo; the exit status."""
    demo, rest = split(DemoSettings, words)
    chosen = ["task=pusht", "preset=demo", "data.augment=[mirror]"]
    if not any(word.startswith("objective=") for word in rest):
        # cheap steps, so more of them; and decisions that stay with their plan
        chosen += ["objective.sd_share=0.25", "policy.warm_start=0.5"]
    settings = replace(COMPOSITION, extra={}).compose([*chosen, *rest])
    command = shlex.join(["cmpolicy", "demo", *words])
    return run_demo(demo, TrainConfig.from_mapping(settings), command=command)
