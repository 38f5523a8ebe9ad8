"""The folder of a training run, and the run itself: the same for policies and for images."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import yaml
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from torch import nn

from cmpolicy.files import write_atomically
from cmpolicy.schema import ConfigError
from cmpolicy.train.checkpoint import state_path
from cmpolicy.train.config import LoopConfig
from cmpolicy.train.curves import draw_curves
from cmpolicy.train.guard import NonFiniteError
from cmpolicy.train.trackers import JsonLines, TensorBoard, Terminal, Tracker
from cmpolicy.train.trainer import Batches, DrawStep, Evaluate, Keep, Outcome, Trainer

CONFIG_FILE = "config.yaml"
COMMAND_FILE = "command.txt"


@dataclass(frozen=True)
class TrainingRun:
    """A run and how it ended. ``is_main`` is false in the other processes of a distributed run."""

    run_dir: Path
    outcome: Outcome
    seconds: float
    parameters: int
    is_main: bool


@dataclass(frozen=True, kw_only=True)
class RunPlace:
    """Where a run is kept and what started it.

    Args:
        run_dir: its folder.
        program: the command that trains such models, for messages.
        command: what the user typed, as far as the run's folder knows.
        files: further small texts to keep in the folder, by name.
    """

    run_dir: Path
    program: str
    command: str
    files: Mapping[str, str] = field(default_factory=dict)


def choose_run_dir(
    accelerator: Accelerator, stem: str, out: str | None, *, resume: bool, program: str
) -> Path:
    """The folder of a run, the same in every process: ``out``, or one named after ``stem`` and now.

    Raises:
        ConfigError: ``out`` holds a run or something else already (and ``resume`` is off).
    """
    places: list[Path | None] = [None]
    if accelerator.is_main_process:
        places = [Path(str(out)) if resume else _new_run_dir(stem, out, program)]
    place: Path | None = broadcast_object_list(places)[0]
    if place is None:
        raise RuntimeError("the main process named no folder for the run")
    return place


def _new_run_dir(stem: str, out: str | None, program: str) -> Path:
    if out is None:
        dated = f"{stem}-{time.strftime('%Y%m%d-%H%M%S')}"
        names = [dated, *(f"{dated}-{n}" for n in range(2, 1000))]
        return next(p for p in (Path("outputs") / name for name in names) if not p.exists())
    run_dir = Path(out).expanduser()
    if state_path(run_dir).is_file():
        raise ConfigError(
            f"out={out} already holds a run; go on with it: {program} resume={out}, or choose "
            "another out"
        )
    if run_dir.is_file() or (run_dir.is_dir() and any(run_dir.iterdir())):
        raise ConfigError(f"out={out} exists and is not an empty folder; choose another out")
    return run_dir


def load_run_config(run_dir: Path) -> dict[str, object]:
    """The settings that a run was started with.

    Raises:
        ConfigError: ``run_dir`` is not the folder of a run.
    """
    path = run_dir / CONFIG_FILE
    if not path.is_file():
        raise ConfigError(
            f"resume={run_dir}: there is no {path}; give the folder of a run, such as outputs/<run>"
        )
    return read_yaml(path)


def read_yaml(path: Path) -> dict[str, object]:
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


def first_command(run_dir: Path, command: str) -> str:
    """The command that started the run: a resumed run is still that command's."""
    file = run_dir / COMMAND_FILE
    return file.read_text().strip() if file.is_file() else command


def run_training(
    model: nn.Module,
    config: LoopConfig,
    place: RunPlace,
    *,
    accelerator: Accelerator,
    batches: Batches,
    draw: DrawStep,
    evaluate: Evaluate | None,
    keep: Keep | None,
    resume: bool = False,
    until: int | None = None,
) -> TrainingRun:
    """Train ``model``, log, and draw the curves.

    Args:
        model, config, accelerator, batches, draw, evaluate, keep: see :class:`Trainer`.
        place: where the run is kept.
        resume: continue the run in ``place.run_dir``.
        until: stop, resumably, at this example.

    Raises:
        ConfigError: a run to resume that is longer than it should become.
        OSError, ValueError, NonFiniteError: see :class:`Trainer`.
    """
    run_dir, is_main = place.run_dir, accelerator.is_main_process
    trainer = Trainer(
        model,
        config,
        accelerator=accelerator,
        batches=batches,
        draw=draw,
        run_dir=run_dir,
        evaluate=evaluate,
        keep=keep,
    )
    if resume:
        trainer.resume()
        if trainer.examples - config.batch_size * accelerator.num_processes >= config.examples:
            raise ConfigError(
                f"examples={config.examples} is less than the {trainer.examples} that {run_dir} "
                "has been trained on; give more to go on, or leave it out"
            )
    if is_main:
        run_dir.mkdir(parents=True, exist_ok=True)
        text = yaml.safe_dump(config.to_dict(), sort_keys=False)
        write_atomically(run_dir / CONFIG_FILE, text.encode())
        for name, text in {COMMAND_FILE: place.command, **place.files}.items():
            (run_dir / name).write_text(text + "\n")
        trainer.trackers = _trackers(config, run_dir, trainer.examples)
    try:
        outcome = trainer.train(until)
    except NonFiniteError as error:
        error.add_note(
            f"the last good state, example {trainer.saved_at}, is kept; go on with:\n"
            f"  {place.program} resume={run_dir} optim.lr={config.optim.lr / 3:.2g}"
        )
        raise
    finally:
        for tracker in trainer.trackers:
            tracker.close()
    if is_main:
        draw_curves(run_dir)
    parameters = sum(p.numel() for p in model.parameters())
    return TrainingRun(run_dir, outcome, trainer.seconds, parameters, is_main)


def _trackers(config: LoopConfig, run_dir: Path, start: int) -> list[Tracker]:
    trackers: list[Tracker] = [
        JsonLines(run_dir, start=start),
        Terminal(config.examples, start=start, bar=config.log.progress),
    ]
    if config.log.tensorboard:
        trackers.append(TensorBoard(run_dir, start=start))
    return trackers
