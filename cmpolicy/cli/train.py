"""``cmpolicy-train``: train a policy, or go on with a run.

Exit status: 0 trained; 1 the run failed (its last good state is kept); 2 bad settings or data;
130 or 143 stopped by Ctrl-C or SIGTERM (the run can be resumed).
"""

from __future__ import annotations

import shlex
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import hydra
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf

from cmpolicy.cli.settings import HYDRA_VERSION_BASE, PACKAGE, apply, compose_settings, parse
from cmpolicy.cli.training import closing_words, load_run_config, train
from cmpolicy.train.checkpoint import CheckpointError
from cmpolicy.train.config import TrainConfig
from cmpolicy.train.guard import NonFiniteError
from cmpolicy.train.schema import ConfigError, unknown_key_message
from cmpolicy_eval.rollout import RolloutError

#: What may change between the parts of a run. The rest would make it another run.
RESUME_SETTINGS = (
    "samples",
    "save_every",
    "device",
    "optim.lr",
    "optim.grad_clip",
    "eval.every",
    "eval.workers",
    "log.every",
    "log.tensorboard",
    "log.progress",
)


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point of ``cmpolicy-train``; returns the exit status."""
    words = list(sys.argv[1:] if argv is None else argv)
    if any(word.startswith("-") for word in words):
        return _hydra_flags(words)
    command = shlex.join(["cmpolicy-train", *words])
    return guarded(lambda: _run_words(words, command))


def _run_words(words: Sequence[str], command: str) -> int:
    overrides = parse(words)
    resumed = [o for o in overrides if o.key_or_group == "resume"]
    if not resumed:
        settings = compose_settings("train", words)
        return _run(settings, command)
    run_dir = Path(str(resumed[-1].value())).expanduser()
    changes = [o for o in overrides if o.key_or_group != "resume"]
    for change in changes:
        if change.key_or_group not in RESUME_SETTINGS:
            raise ConfigError(
                unknown_key_message(
                    change.key_or_group,
                    RESUME_SETTINGS,
                    how=f"A resumed run keeps all else from {run_dir}; for that, start a new run.",
                )
            )
    settings = apply(load_run_config(run_dir), changes)
    return _run({**settings, "out": str(run_dir)}, command, resume=True)


def _run(settings: dict[str, Any], command: str, *, resume: bool = False) -> int:
    out = settings.pop("out", None)
    config = TrainConfig.from_mapping(settings)
    run = train(config, out, command=command, resume=resume)
    if not run.is_main:
        return 0
    if not run.outcome.finished:
        print(
            f"stopped at {run.outcome.samples} of {config.samples} samples; go on with:\n"
            f"  cmpolicy-train resume={run.run_dir}"
        )
        return 128 + (run.outcome.signum or 0)
    print(closing_words(run, config))
    return 0


def guarded(action: Callable[[], int], program: str = "cmpolicy-train") -> int:
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


def _hydra_flags(words: Sequence[str]) -> int:
    """``--help``, ``--cfg job``, ``--multirun`` and the like are Hydra's own."""
    before, sys.argv = sys.argv, ["cmpolicy-train", *words]
    try:
        _hydra_main()
    except SystemExit as end:
        return end.code if isinstance(end.code, int) else 0 if end.code is None else 2
    finally:
        sys.argv = before
    return 0


@hydra.main(config_path=f"pkg://{PACKAGE}", config_name="train", version_base=HYDRA_VERSION_BASE)
def _hydra_main(config: DictConfig) -> None:
    settings = OmegaConf.to_container(config, resolve=True)
    if not isinstance(settings, dict):
        raise ConfigError("the settings are not a mapping")
    plain = {str(key): value for key, value in settings.items()}
    words = HydraConfig.get().overrides.task
    command = shlex.join(["cmpolicy-train", *words])
    status = guarded(lambda: _run(plain, command))
    if status:
        raise SystemExit(status)


if __name__ == "__main__":
    sys.exit(main())
