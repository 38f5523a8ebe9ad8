"""``cmpolicy train``: train a policy, or go on with a run.

Exit status: see :mod:`cmpolicy.cli.run_command`.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

from cmpolicy.cli.run_command import RESUME_SETTINGS, RunCommand, stopped_words
from cmpolicy.experiment.train import PROGRAM, closing_words, train
from cmpolicy.train.config import TrainConfig


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point of ``cmpolicy train``; returns the exit status."""
    words = list(sys.argv[1:] if argv is None else argv)
    command = RunCommand(
        program=PROGRAM, run=_run, resume_settings=(*RESUME_SETTINGS, "eval.workers")
    )
    return command(words)


def _run(settings: dict[str, Any], out: str | None, command: str, resume: bool) -> int:
    config = TrainConfig.from_mapping(settings)
    run = train(config, out, command=command, resume=resume)
    if not run.is_main:
        return 0
    if not run.outcome.finished:
        print(stopped_words(PROGRAM, run.run_dir, run.outcome.examples, config.examples))
        return 128 + (run.outcome.signum or 0)
    print(closing_words(run, config))
    return 0


if __name__ == "__main__":
    sys.exit(main())
