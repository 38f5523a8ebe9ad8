"""Put a training run together: the place that knows both the trainer and what it trains on."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import nn

from cmpolicy.experiment.data import TrainingData, load_training_data
from cmpolicy.experiment.model_card import BEST, LAST, PolicyKeeper
from cmpolicy.experiment.run import (
    RunPlace,
    TrainingRun,
    choose_run_dir,
    first_command,
    run_training,
)
from cmpolicy.experiment.scoring import Scorer
from cmpolicy.policy.bundle import read_metadata
from cmpolicy.policy.policy import ConsistencyPolicy
from cmpolicy.schema import ConfigError
from cmpolicy.train.checkpoint import state_path
from cmpolicy.train.config import TrainConfig
from cmpolicy.train.curves import CURVES_FILE
from cmpolicy.train.device import make_accelerator
from cmpolicy.train.validation import Validator

PROGRAM = "cmpolicy train"
START_FILE = "start.json"
VALIDATION_BATCH = 512


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
        until: stop, resumably, at this example.

    Raises:
        ValueError, OSError, NonFiniteError: see the parts.
    """
    accelerator = make_accelerator(config)
    stem = f"{config.task.name}-{config.objective.name}"
    run_dir = choose_run_dir(accelerator, stem, out, resume=resume, program=PROGRAM)
    command = first_command(run_dir, command)
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
    keeper = PolicyKeeper(
        config,
        run_dir,
        scorer,
        source=data.source,
        simulator=data.simulator,
        command=command,
        start=start,
    )

    files = {} if start is None else {START_FILE: json.dumps(start)}
    return run_training(
        policy,
        config,
        RunPlace(run_dir=run_dir, program=PROGRAM, command=command, files=files),
        accelerator=accelerator,
        batches=loader.batch,
        draw=policy.draw,
        evaluate=scorer,
        keep=keeper,
        resume=resume,
        until=until,
    )


def new_policy(config: TrainConfig, data: TrainingData) -> ConsistencyPolicy:
    """An untrained policy of the settings, for the data."""
    policy = ConsistencyPolicy(
        data.spec(config.policy),
        config.net,
        data.normalizer(),
        encoder=config.encoder,
        path=config.policy.path,
        sampler=config.objective.sampler,
        nfe=config.eval.nfe,
        objective=config.objective.build(),
    )
    policy.control_hz = config.task.control_hz
    return policy


def start_from(policy: ConsistencyPolicy, name_or_path: str) -> None:
    """Give ``policy`` the weights and the normaliser of a trained one, to train it further.

    The normaliser comes along because the weights mean actions in its units.

    Raises:
        BundleError: there is no such policy, or it is damaged.
        ConfigError: its inputs, outputs or networks differ from those of ``policy``.
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
        ("network", "net", policy.net_config, source.net_config),
        ("encoder", "encoder", policy.encoder_config, source.encoder_config),
    ):
        if mine != theirs:
            raise ConfigError(
                f"init={name_or_path}: that policy has {what} {theirs}, this run {mine}; change "
                f"{setting} to match it, or train from scratch with init=null"
            )
    policy.net.load_state_dict(source.net.state_dict())
    policy.encoder.load_state_dict(source.encoder.state_dict())
    policy.normalizer.load_state_dict(source.normalizer.state_dict())


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
    kept = ("command", "examples", "data", "git_commit", "start")
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
        f"trained {outcome.examples} examples in {run.seconds / 60:.1f} min "
        f"({run.parameters / 1e6:.1f}M parameters)",
        f"  last scores    {', '.join(numbers) or 'none'}",
        f"  best policy    {run.run_dir / kept}",
        f"  curves, log    {run.run_dir / CURVES_FILE}, {run.run_dir / 'log.jsonl'}",
        f"  training state {state_path(run.run_dir)}",
    ]
    if config.task.protocol is not None:
        lines.append(
            f"score it: cmpolicy eval policy={run.run_dir / kept} "
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
    return Validator(loader, windows=settings.windows, seed=config.seed, nfe=settings.nfe)
