"""Put a training run together: the place that knows both the trainer and what it trains on."""

from __future__ import annotations

import json
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import broadcast_object_list
from torch import nn

from cmpolicy.cli.model_card import BEST, LAST, PolicyKeeper
from cmpolicy.cli.scoring import Scorer
from cmpolicy.cli.settings import read_yaml, write_yaml
from cmpolicy.cli.training_data import TrainingData, load_training_data
from cmpolicy.policy.consistency import ConsistencyPolicy
from cmpolicy.policy.pretrained import read_metadata
from cmpolicy.train.checkpoint import state_path
from cmpolicy.train.config import TrainConfig
from cmpolicy.train.curves import CURVES_FILE, draw_curves
from cmpolicy.train.device import make_accelerator
from cmpolicy.train.guard import NonFiniteError
from cmpolicy.train.schema import ConfigError
from cmpolicy.train.trackers import JsonLines, TensorBoard, Terminal, Tracker
from cmpolicy.train.trainer import Outcome, Trainer
from cmpolicy.train.validation import Validator

CONFIG_FILE = "config.yaml"
COMMAND_FILE = "command.txt"
START_FILE = "start.json"
VALIDATION_BATCH = 512


@dataclass(frozen=True)
class TrainingRun:
    """A run and how it ended. ``is_main`` is false in the other processes of a distributed run."""

    run_dir: Path
    outcome: Outcome
    seconds: float
    parameters: int
    is_main: bool


def new_run_dir(config: TrainConfig, out: str | None) -> Path:
    """The folder of a new run.

    Raises:
        ConfigError: ``out`` holds a run or something else already.
    """
    if out is None:
        stem = f"{config.task.name}-{config.objective.name}-{time.strftime('%Y%m%d-%H%M%S')}"
        names = [stem, *(f"{stem}-{n}" for n in range(2, 1000))]
        return next(p for p in (Path("outputs") / name for name in names) if not p.exists())
    run_dir = Path(out).expanduser()
    if state_path(run_dir).is_file():
        raise ConfigError(
            f"out={out} already holds a run; go on with it: cmpolicy-train resume={out}, or choose "
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
    return read_yaml(str(path))


def train(
    config: TrainConfig,
    out: str | None,
    *,
    command: str,
    resume: bool = False,
    until: int | None = None,
) -> TrainingRun:
    """Train a policy.

    Args:
        config: the settings.
        out: folder of the run; None for one named after task, objective and time.
        command: what the user typed, for the model card.
        resume: continue the run in ``out``.
        until: stop, resumably, at this sample.

    Raises:
        ValueError, OSError, NonFiniteError: see the parts.
    """
    accelerator = make_accelerator(config)
    is_main = accelerator.is_main_process
    places = [Path(str(out)) if resume else new_run_dir(config, out)] if is_main else [None]
    place = broadcast_object_list(places)[0]
    if place is None:
        raise RuntimeError("the main process named no folder for the run")
    run_dir: Path = place

    command = _first_command(run_dir, command)
    data = load_training_data(config)
    torch.manual_seed(config.seed)
    device = accelerator.device
    policy = new_policy(config, data).to(device)
    if config.init is not None and not resume:  # a resumed run has the weights of its own
        start_from(policy, config.init)
    if config.compile and isinstance(policy.flow_map.net, nn.Module):
        policy.flow_map.net.compile()  # in place: names of weights stay; the loss itself is cheap
    loader = data.loader(train=True, batch_size=config.batch_size, seed=config.seed, device=device)
    if loader is None:
        raise ConfigError("no episodes are left to train on; lower data.val_fraction")
    scorer = Scorer(config, data, _validator(config, data, device), command=command)
    scorer.check(policy)
    start = _start(run_dir, config.init)
    keeper = PolicyKeeper(config, run_dir, scorer, source=data.source, command=command, start=start)

    trainer = Trainer(
        policy,
        config,
        accelerator=accelerator,
        batches=loader.batch,
        draw=policy.draw,
        run_dir=run_dir,
        evaluate=scorer,
        keep=keeper,
    )
    if resume:
        trainer.resume()
        if trainer.samples - config.batch_size * accelerator.num_processes >= config.samples:
            raise ConfigError(
                f"samples={config.samples} is less than the {trainer.samples} that {run_dir} has "
                "been trained on; give more to go on, or leave it out"
            )
    if is_main:
        run_dir.mkdir(parents=True, exist_ok=True)
        write_yaml(config.to_dict(), str(run_dir / CONFIG_FILE))
        (run_dir / COMMAND_FILE).write_text(command + "\n")
        if start is not None:
            (run_dir / START_FILE).write_text(json.dumps(start) + "\n")
        trainer.trackers = _trackers(config, run_dir, trainer.samples)
    try:
        outcome = trainer.train(until)
    except NonFiniteError as error:
        error.add_note(
            f"the last good state, sample {trainer.saved_at}, is kept; go on with:\n"
            f"  cmpolicy-train resume={run_dir} optim.lr={config.optim.lr / 3:.2g}"
        )
        raise
    finally:
        for tracker in trainer.trackers:
            tracker.close()
    if is_main:
        draw_curves(run_dir)
    parameters = sum(p.numel() for p in policy.parameters())
    return TrainingRun(run_dir, outcome, trainer.seconds, parameters, is_main)


def new_policy(config: TrainConfig, data: TrainingData) -> ConsistencyPolicy:
    """An untrained policy of the settings, for the data."""
    policy = ConsistencyPolicy(
        data.spec(config.policy),
        config.net.unet,
        data.normalizer(),
        path=config.policy.path,
        sampler=config.objective.sampler,
        objective=config.objective.build(),
    )
    policy.control_hz = config.task.control_hz
    return policy


def start_from(policy: ConsistencyPolicy, name_or_path: str) -> None:
    """Give ``policy`` the weights and the normaliser of a trained one, to train it further.

    The normaliser comes along because the weights mean actions in its units.

    Raises:
        BundleError: there is no such policy, or it is damaged.
        ConfigError: it eats, gives or is something else than ``policy``.
    """
    source = ConsistencyPolicy.from_pretrained(name_or_path)
    for what, setting, mine, theirs in (
        ("observations", "data.obs", policy.spec.obs, source.spec.obs),
        ("action size", "data.action", policy.spec.action_dim, source.spec.action_dim),
        ("horizon", "policy.horizon", policy.spec.horizon, source.spec.horizon),
        (
            "observation steps",
            "policy.n_obs_steps",
            policy.spec.n_obs_steps,
            source.spec.n_obs_steps,
        ),
        ("path", "policy.path", policy.path_name, source.path_name),
        ("network", "net", policy.net_config.to_dict(), source.net_config.to_dict()),
    ):
        if mine != theirs:
            raise ConfigError(
                f"init={name_or_path}: that policy has {what} {theirs}, this run {mine}; change "
                f"{setting} to match it, or train from scratch with init=null"
            )
    policy.net.load_state_dict(source.net.state_dict())
    policy.normalizer.load_state_dict(source.normalizer.state_dict())


def _first_command(run_dir: Path, command: str) -> str:
    """The command that started the run: a resumed run is still that command's."""
    file = run_dir / COMMAND_FILE
    return file.read_text().strip() if file.is_file() else command


def _start(run_dir: Path, init: str | None) -> dict[str, Any] | None:
    """How the policy was trained that the run starts from.

    Kept in the run: that policy may be another one by the time the run is resumed.
    """
    if init is None:
        return None
    file = run_dir / START_FILE
    if file.is_file():
        start: dict[str, Any] = json.loads(file.read_text())
        return start
    metadata = read_metadata(init)
    kept = ("command", "samples", "data", "git_commit", "start")
    return {key: metadata[key] for key in kept if key in metadata}


def closing_words(run: TrainingRun, config: TrainConfig) -> str:
    """What was made, where, and what to do next."""
    outcome = run.outcome
    kept = BEST if (run.run_dir / BEST).is_dir() else LAST
    numbers = [
        f"{name} {outcome.metrics[name]:.3f}"
        for name in ("success", "score", "val_loss", "val_action_error")
        if name in outcome.metrics
    ]
    lines = [
        f"trained {outcome.samples} samples in {run.seconds / 60:.1f} min "
        f"({run.parameters / 1e6:.1f}M parameters)",
        f"  last scores    {', '.join(numbers) or 'none'}",
        f"  best policy    {run.run_dir / kept}",
        f"  curves, log    {run.run_dir / CURVES_FILE}, {run.run_dir / 'log.jsonl'}",
        f"  training state {state_path(run.run_dir)}",
    ]
    if config.task.protocol is not None:
        lines.append(
            f"score it: cmpolicy-eval policy={run.run_dir / kept} protocol={config.task.protocol} "
            f"nfe=[{config.eval.nfe}] out={run.run_dir / 'eval'}"
        )
    else:
        lines.append(
            "use it: ConsistencyPolicy.from_pretrained"
            f"({str(run.run_dir / kept)!r}).predict_action_chunk(obs)"
        )
    return "\n".join(lines)


def _validator(config: TrainConfig, data: TrainingData, device: torch.device) -> Validator | None:
    """None where no episodes are held out."""
    loader = data.loader(train=False, batch_size=VALIDATION_BATCH, seed=config.seed, device=device)
    if loader is None:
        return None
    settings = config.eval
    return Validator(loader, windows=settings.windows, seed=config.seed, num_steps=settings.nfe)


def _trackers(config: TrainConfig, run_dir: Path, start: int) -> list[Tracker]:
    trackers: list[Tracker] = [
        JsonLines(run_dir, start=start),
        Terminal(config.samples, start=start, bar=config.log.progress),
    ]
    if config.log.tensorboard:
        trackers.append(TensorBoard(run_dir, start=start))
    return trackers
