"""A command that trains: its words to the settings of a new run, or of one that goes on.

Exit status: 0 trained; 1 the run failed (its last good state is kept); 2 bad settings or data;
130 or 143 stopped by Ctrl-C or SIGTERM (the run can be resumed).
"""

from __future__ import annotations

import shlex
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import hydra
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf

from cmpolicy.cli.parse import HYDRA_VERSION_BASE, PACKAGE, apply, compose_settings, parse
from cmpolicy.experiment.run import load_run_config
from cmpolicy.schema import ConfigError, unknown_key_message
from cmpolicy.train.checkpoint import CheckpointError
from cmpolicy.train.guard import NonFiniteError
from cmpolicy_eval.rollout import RolloutError

#: What may change between the parts of any run. The rest would make it another run.
RESUME_SETTINGS = (
    "examples",
    "save_every",
    "device",
    "optim.lr",
    "optim.grad_clip",
    "eval.every",
    "log.every",
    "log.tensorboard",
    "log.progress",
)


@dataclass(frozen=True, kw_only=True)
class RunCommand:
    """How the words of a training command become a run.

    Args:
        program: the command as users type it, e.g. ``cmpolicy train``.
        run: run(settings, out, command, resume) -> exit status.
        package: of the YAML files.
        config_name: of the YAML file.
        resume_settings: what may change when a run goes on.
    """

    program: str
    run: Callable[[dict[str, Any], str | None, str, bool], int]
    package: str = PACKAGE
    config_name: str = "train"
    resume_settings: Sequence[str] = RESUME_SETTINGS

    def __call__(self, words: Sequence[str]) -> int:
        """Train as ``words`` say; returns the exit status."""
        if any(word.startswith("-") for word in words):
            return self._hydra_flags(words)
        return guarded(lambda: self._run_words(words), self.program)

    def _run_words(self, words: Sequence[str]) -> int:
        command = f"{self.program} {shlex.join(words)}".rstrip()
        overrides = parse(words)
        resumed = [o for o in overrides if o.key_or_group == "resume"]
        if not resumed:
            settings = compose_settings(self.config_name, words, package=self.package)
            return self._start(settings, command)
        run_dir = Path(str(resumed[-1].value())).expanduser()
        changes = [o for o in overrides if o.key_or_group != "resume"]
        for change in changes:
            if change.key_or_group not in self.resume_settings:
                raise ConfigError(
                    unknown_key_message(
                        change.key_or_group,
                        self.resume_settings,
                        how=f"A resumed run keeps all else from {run_dir}; for that, start a new "
                        "run.",
                    )
                )
        settings = apply(load_run_config(run_dir), changes)
        return self.run(settings, str(run_dir), command, True)

    def _start(self, settings: dict[str, Any], command: str) -> int:
        out = settings.pop("out", None)
        return self.run(settings, out, command, False)

    def _hydra_flags(self, words: Sequence[str]) -> int:
        """``--help``, ``--cfg job``, ``--multirun`` and the like are Hydra's own."""

        @hydra.main(
            config_path=f"pkg://{self.package}",
            config_name=self.config_name,
            version_base=HYDRA_VERSION_BASE,
        )
        def hydra_main(config: DictConfig) -> None:
            settings = OmegaConf.to_container(config, resolve=True)
            if not isinstance(settings, dict):
                raise ConfigError("the settings are not a mapping")
            plain = {str(key): value for key, value in settings.items()}
            command = f"{self.program} {shlex.join(HydraConfig.get().overrides.task)}"
            status = guarded(lambda: self._start(plain, command), self.program)
            if status:
                raise SystemExit(status)

        before, sys.argv = sys.argv, [self.program, *words]
        try:
            hydra_main()
        except SystemExit as end:
            return end.code if isinstance(end.code, int) else 0 if end.code is None else 2
        finally:
            sys.argv = before
        return 0


def guarded(action: Callable[[], int], program: str) -> int:
    """Run ``action``; what a user can get wrong becomes one message."""
    try:
        return action()
    except (NonFiniteError, CheckpointError, RolloutError) as error:
        notes = getattr(error, "__notes__", [])
        print("\n".join([f"{program}: {error}", *notes]), file=sys.stderr)
        return 1
    except (ValueError, OSError) as error:
        print(f"{program}: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"{program}: stopped", file=sys.stderr)
        return 130


def stopped_words(program: str, run_dir: Path, examples: int, of: int) -> str:
    """How to go on with a run that was stopped."""
    return f"stopped at {examples} of {of} examples; go on with:\n  {program} resume={run_dir}"
