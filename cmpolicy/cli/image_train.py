"""``cmpolicy image train``: train an image model, or go on with a run.

Exit status: see :mod:`cmpolicy.cli.run_command`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from cmpolicy.cli.run_command import RunCommand, stopped_words
from cmpolicy.experiment.image.config import ImageTrainConfig
from cmpolicy.experiment.image.train import PROGRAM, closing_words, train_images

PACKAGE = "cmpolicy_conf.image"


def main(words: Sequence[str]) -> int:
    """Train as ``words`` say; returns the exit status."""
    return RunCommand(program=PROGRAM, run=_run, package=PACKAGE)(words)


def _run(settings: dict[str, Any], out: str | None, command: str, resume: bool) -> int:
    config = ImageTrainConfig.from_mapping(settings)
    run = train_images(config, out, command=command, resume=resume)
    if not run.is_main:
        return 0
    if not run.outcome.finished:
        print(stopped_words(PROGRAM, run.run_dir, run.outcome.examples, config.examples))
        return 128 + (run.outcome.signum or 0)
    print(closing_words(run, config))
    return 0
