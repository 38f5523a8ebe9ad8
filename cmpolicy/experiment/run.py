"""The folder of a training run, and the run itself: the same for policies and for images."""

from __future__ import annotations

import json
import sys
import time
import warnings
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from torch import nn

from cmpolicy.files import only_writer, write_atomically
from cmpolicy.schema import ConfigError, choose, merge
from cmpolicy.training.checkpoint import load_state, state_path
from cmpolicy.training.config import LoopConfig
from cmpolicy.training.curves import draw_curves
from cmpolicy.training.guard import NonFiniteError
from cmpolicy.training.trackers import LOG_FILE, WANDB_FILES, run_trackers
from cmpolicy.training.trainer import Batches, DrawStep, Keep, RunEnd, Score, Trainer

CONFIG_FILE, COMMAND_FILE, FACTS_FILE = "config.yaml", "command.txt", "facts.json"
#: What a run that was stopped before its first state has written; it can be started again.
_BEFORE_A_STATE = {
    ".lock",
    CONFIG_FILE,
    COMMAND_FILE,
    FACTS_FILE,
    LOG_FILE,
    "tensorboard",
    state_path(Path()).parent.name,
    *WANDB_FILES,
}
#: What may change between the parts of any run. The rest would make it another run.
RESUME_SETTINGS = (
    "examples",
    "save_every",
    "device",
    "optim.lr",
    "optim.grad_clip",
    "schedule",
    "eval.every",
    "log.every",
    "log.trackers",
    "log.progress",
)


@dataclass(frozen=True, kw_only=True)
class RunFolder:
    """Where a run is kept and what started it.

    Args:
        path: its folder.
        verb: the command that trains such models, for messages.
        command: what the user typed, as far as the run's folder knows.
        facts: what a resumed run has to find unchanged, JSON-ready; kept in ``facts.json``.
        resumed: whether the run goes on.
        change: the command by which it goes on with other settings, if it does.
        other_data: whether it goes on with other data: the best policy of before has no say then.
    """

    path: Path
    verb: str
    command: str
    facts: Mapping[str, Any] = field(default_factory=dict)
    resumed: bool = False
    change: str | None = None
    other_data: bool = False


@dataclass(frozen=True)
class RunResult:
    """A training run and how it ended.

    Attributes:
        run_dir: its folder.
        end: how it ended: examples, metrics, the signal that stopped it if one did.
        seconds: of training, evaluations not counted.
        parameters: of the model.
        is_main: false in the other processes of a distributed run.
    """

    run_dir: Path
    end: RunEnd
    seconds: float
    parameters: int
    is_main: bool

    @property
    def metrics(self) -> Mapping[str, float]:
        """The latest of every logged number."""
        return self.end.metrics

    @property
    def finished(self) -> bool:
        return self.end.finished


def open_run(
    accelerator: Accelerator,
    stem: str,
    out: str | Path | None,
    *,
    command: str,
    resume: bool,
    verb: str,
    change: str | None = None,
) -> RunFolder:
    """The folder of a run, the same in every process: ``out``, or one named after ``stem`` and now.

    Raises:
        ConfigError: ``out`` holds a run or something else already (and ``resume`` is off).
    """
    places: list[Path | None] = [None]
    if accelerator.is_main_process:
        places = [Path(str(out)) if resume else _new_folder(stem, out, verb)]
    place: Path | None = broadcast_object_list(places)[0]
    if place is None:
        raise RuntimeError("the main process named no folder for the run")
    file = place / COMMAND_FILE  # a resumed run is still that of the command that started it
    command = file.read_text().strip() if resume and file.is_file() else command
    return RunFolder(path=place, verb=verb, command=command, resumed=resume, change=change)


def _new_folder(stem: str, out: str | Path | None, verb: str) -> Path:
    if out is None:
        dated = f"{stem}-{time.strftime('%Y%m%d-%H%M%S')}"
        names = [dated, *(f"{dated}-{n}" for n in range(2, 1000))]
        return next(p for p in (Path("outputs") / name for name in names) if not p.exists())
    run_dir = Path(out).expanduser()
    if state_path(run_dir).is_file():
        raise ConfigError(
            f"out={out} already holds a run; go on with it: cmpolicy {verb} resume={out}, or "
            "choose another out"
        )
    there = {path.name for path in run_dir.iterdir()} if run_dir.is_dir() else set()
    if run_dir.is_file() or there - _BEFORE_A_STATE:
        raise ConfigError(f"out={out} exists and is not an empty folder; choose another out")
    return run_dir


def resumed_settings(run_dir: Path, changes: Mapping[str, Any], known: tuple[str, ...]) -> Any:
    """The settings of a run that goes on, with ``changes`` by dotted key.

    Raises:
        ConfigError: ``run_dir`` is not the folder of a run, or a change that would make it another.
    """
    path = run_dir / CONFIG_FILE
    if not path.is_file():
        raise ConfigError(
            f"resume={run_dir}: there is no {path}; give the folder of a run, such as outputs/<run>"
        )
    settings = read_yaml(path)
    changes = dict(changes)
    restart = changes.pop("schedule", "extend")
    choose({"extend": 0, "restart": 0}, str(restart), "schedule")
    if restart == "restart":
        done = int(load_state(run_dir).values["examples"])
        begun = settings.get("optim", {}).get("begin", 0)
        same = all(_at(settings, key) == value for key, value in changes.items())
        if not (same and 0 < begun < done < settings["examples"]):  # else it was interrupted
            changes["optim.begin"] = done
            known = (*known, "optim.begin")
    for key, value in changes.items():
        if key not in known:
            raise ConfigError(
                f"{key} cannot change when a run goes on; it keeps all but {', '.join(known)} from "
                f"{run_dir}. For that, start a new run."
            )
        for part in reversed(key.split(".")):
            value = {part: value}
        settings = merge(settings, value)
    return settings


def _at(settings: Any, key: str) -> Any:
    for part in key.split("."):
        settings = settings.get(part) if isinstance(settings, Mapping) else None
    return settings


def read_yaml(path: Path) -> dict[str, Any]:
    """A YAML file of plain settings: no tags, no interpolation.

    Raises:
        ConfigError: it cannot be read or holds something else.
    """
    try:
        settings = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise ConfigError(f"cannot read the settings in {path}: {error}") from error
    if not isinstance(settings, dict):
        raise ConfigError(f"{path} does not hold settings of a run")
    return settings


def read_facts(run_dir: Path) -> dict[str, Any]:
    """What a run noted at its start; empty if nothing."""
    file = run_dir / FACTS_FILE
    facts: dict[str, Any] = json.loads(file.read_text()) if file.is_file() else {}
    return facts


def run_training(
    model: nn.Module,
    config: LoopConfig,
    folder: RunFolder,
    *,
    accelerator: Accelerator,
    batches: Batches,
    draw: DrawStep,
    score: Score | None,
    keep: Keep | None,
    until: int | None = None,
) -> RunResult:
    """Train ``model``, log, and draw the curves.

    Args:
        model, config, accelerator, batches, draw, score, keep: see :class:`Trainer`.
        folder: where the run is kept.
        until: stop, resumably, at this example.

    Raises:
        ConfigError: a run to resume that is longer than it should become.
        InUseError: another process trains in the folder.
        OSError, ValueError, NonFiniteError: see :class:`Trainer`.
    """
    run_dir, is_main = folder.path, accelerator.is_main_process
    with only_writer(run_dir, "the run in") if is_main else nullcontext():
        trainer = Trainer(
            model,
            config,
            accelerator=accelerator,
            batches=batches,
            draw=draw,
            run_dir=run_dir,
            score=score,
            keep=keep,
        )
        if folder.resumed:
            trainer.resume()
            if trainer.examples - config.batch_size * accelerator.num_processes >= config.examples:
                raise ConfigError(
                    f"examples={config.examples} is less than the {trainer.examples} that "
                    f"{run_dir} has been trained on; give more to go on, or leave it out"
                )
            if trainer.end().finished:
                warnings.warn(
                    f"the run in {run_dir} has had all of its {trainer.examples} examples; there "
                    "is nothing to do. Give examples=<more> to go on",
                    stacklevel=2,
                )
                return _result(trainer, folder, is_main)
        try:
            if folder.other_data:
                trainer.best = None
                trainer.save()  # before facts.json says that this data is the run's own
            if is_main:
                facts = dict(folder.facts)
                if folder.resumed:
                    facts["history"] = _history(trainer, config, folder)
                texts = {
                    CONFIG_FILE: yaml.safe_dump(config.to_dict(), sort_keys=False),
                    COMMAND_FILE: folder.command + "\n",
                    FACTS_FILE: json.dumps(facts) + "\n",
                }
                for name, text in texts.items():
                    write_atomically(run_dir / name, text.encode())
                trainer.trackers = run_trackers(
                    config, run_dir, trainer.examples, trainer.evaluated_at
                )
            trainer.train(until)
        except NonFiniteError as error:
            error.add_note(
                f"the last good state, example {trainer.saved_at}, is kept; go on with:\n"
                f"  cmpolicy {folder.verb} resume={run_dir} optim.lr={config.optim.lr / 3:.2g}"
            )
            raise
        except (OSError, RuntimeError) as error:  # a full disk, a simulator
            error.add_note(_how_to_go_on(trainer, folder))
            raise
        finally:
            for tracker in trainer.trackers:
                tracker.close()
        if is_main:
            try:
                draw_curves(run_dir)
            except OSError as error:  # all else is there
                warnings.warn(f"cannot draw the curves in {run_dir}: {error}", stacklevel=2)
        return _result(trainer, folder, is_main)


def _history(trainer: Trainer, config: LoopConfig, folder: RunFolder) -> list[dict[str, Any]]:
    """The changes with which the run went on, this one included; says what this one does."""
    history: list[dict[str, Any]] = list(read_facts(folder.path).get("history", []))
    if folder.change is None:
        return history
    before = read_yaml(folder.path / CONFIG_FILE).get("examples")
    if before != config.examples:
        (rate,) = trainer.schedule.get_last_lr()
        print(
            f"the run goes on from {trainer.examples} to {config.examples} examples (before: "
            f"{before}); its learning rate is {rate:.2g} now, and its schedule ends there. "
            "schedule=restart begins a new one, with its warm-up; schedule=extend (the default) "
            "is where it would be had the run been that long from the start",
            file=sys.stderr,
        )
    if history and history[-1] == {"examples": trainer.examples, "command": folder.change}:
        return history
    return [*history, {"examples": trainer.examples, "command": folder.change}]


def _result(trainer: Trainer, folder: RunFolder, is_main: bool) -> RunResult:
    parameters = sum(p.numel() for p in trainer.model.parameters())
    return RunResult(folder.path, trainer.end(), trainer.seconds, parameters, is_main)


def _how_to_go_on(trainer: Trainer, folder: RunFolder) -> str:
    """What is safe, and how to go on."""
    if not state_path(folder.path).is_file():
        return (
            f"no state of the run in {folder.path} was saved yet: start it again; the same out= "
            "will do"
        )
    return (
        f"the state of example {trainer.saved_at} is safe; go on with:\n"
        f"  cmpolicy {folder.verb} resume={folder.path}"
    )


def stopped_text(result: RunResult, verb: str, of: int) -> str:
    """How to go on with a run that was stopped."""
    return (
        f"stopped at {result.end.examples} of {of} examples; go on with:\n"
        f"  cmpolicy {verb} resume={result.run_dir}"
    )
