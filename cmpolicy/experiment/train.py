"""Train a policy: the one place that knows the trainer, the data and the simulator."""

from __future__ import annotations

import dataclasses
import json
import re
import shlex
import sys
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from cmpolicy.experiment.config import TrainConfig
from cmpolicy.experiment.data import TrainingData, load_training_data
from cmpolicy.experiment.data_checks import check_same_data
from cmpolicy.experiment.model_card import BEST, LAST, PolicyKeeper
from cmpolicy.experiment.objective import ObjectiveConfig
from cmpolicy.experiment.run import (
    RESUME_SETTINGS,
    RunResult,
    open_run,
    read_facts,
    resumed_settings,
    run_training,
)
from cmpolicy.experiment.scoring import PolicyScorer
from cmpolicy.nn.target_head import TargetHead
from cmpolicy.normalize import Normalizer
from cmpolicy.policy.policy import ConsistencyPolicy
from cmpolicy.schema import ConfigError
from cmpolicy.training.checkpoint import state_path
from cmpolicy.training.curves import CURVES_FILE
from cmpolicy.training.device import make_accelerator
from cmpolicy.training.loader import DeviceLoader
from cmpolicy.training.validation import Validator

VALIDATION_BATCH = 512
RESUMABLE = (*RESUME_SETTINGS, "eval.workers", "eval.env_timeout", "data.path", "data.changed")


class TrainResult(RunResult):
    """A training run of a policy."""

    @property
    def policy_dir(self) -> Path:
        """The bundle of the best policy, or of the last one where none was scored."""
        best = self.run_dir / BEST
        return best if best.is_dir() else self.run_dir / LAST

    def load_policy(self, device: str = "cpu") -> ConsistencyPolicy:
        """The policy in :attr:`policy_dir`."""
        return ConsistencyPolicy.from_pretrained(self.policy_dir, device)


def train(
    config: TrainConfig,
    out: str | Path | None = None,
    *,
    command: str | None = None,
    until: int | None = None,
) -> TrainResult:
    """Train a policy; what ``cmpolicy train`` does.

    Args:
        config: the settings; ``cmpolicy.compose("task=pusht")`` makes those of a command line.
        out: folder of the run; None for one in ``outputs/``, named after task, objective and time.
        command: recorded in the model card; None writes the settings that differ from the defaults.
        until: stop, resumably, at this example.

    Returns:
        The run's folder, metrics and policy.

    Raises:
        ValueError, OSError: settings, data or files that cannot be used.
        NonFiniteError: the loss became NaN or infinite; the last good state is kept.
    """
    return _train(config, out, command=command, until=until, resume=False)


def resume(
    run_dir: str | Path,
    changes: Mapping[str, Any] | None = None,
    *,
    command: str | None = None,
    until: int | None = None,
) -> TrainResult:
    """Go on with a run, bit by bit as if it had never stopped.

    Args:
        run_dir: its folder.
        changes: settings that may change meanwhile, by dotted key, such as ``{"examples": 2e6}``;
            ``schedule`` may be ``extend`` or ``restart``, see ``optim.begin``.
        command: as in :func:`train`; the card tells it if it changes anything.
        until: as in :func:`train`.

    Raises:
        ConfigError: no run there, a change that would make it another run, or other data.
    """
    folder = Path(run_dir).expanduser()
    settings = resumed_settings(folder, changes or {}, RESUMABLE)
    config = TrainConfig.from_mapping(settings)
    change = command or f"cmpolicy.resume: {changes}"
    return _train(
        config,
        folder,
        command="",
        until=until,
        resume=True,
        change=change if changes else None,
    )


def _train(
    config: TrainConfig,
    out: str | Path | None,
    *,
    command: str | None,
    until: int | None,
    resume: bool,
    change: str | None = None,
) -> TrainResult:
    accelerator = make_accelerator(config)
    config = _with_absolute_path(config)
    folder = open_run(
        accelerator,
        f"{config.task.name}-{config.objective.name}",
        out,
        command=describe(config) if command is None else command,
        resume=resume,
        verb="train",
        change=change,
    )
    data = load_training_data(config)
    before, is_same = read_facts(folder.path) if resume else {}, True
    if resume:
        data = data.with_held_out_of(before, config.data.val_fraction, config.seed)
        accept = config.data.changed == "accept"
        is_same = check_same_data(before, data.facts, folder.path, accept=accept)
        config = dataclasses.replace(  # it was for this change alone
            config, data=dataclasses.replace(config.data, changed="refuse")
        )
    if accelerator.is_main_process:
        print(data.summary, file=sys.stderr, flush=True)
    torch.manual_seed(config.seed)
    device = accelerator.device
    policy = new_policy(config, data).to(device)
    start = before.get("start")
    if config.init is not None and not resume:  # a resumed run has the weights of its own
        start = start_from(policy, config.init)
        if any(method != "auto" for method in config.data.normalize.values()):
            warnings.warn(
                "data.normalize does not change the scaling of init=...; only the limits follow it",
                stacklevel=2,
            )
    if config.compile and isinstance(policy.flow_map.net, nn.Module):
        policy.flow_map.net.compile()  # in place: names of weights stay; the loss itself is cheap
    loader = training_loader(config, data, policy, device)
    scorer = PolicyScorer(config, data, _validator(config, data, loader), command=folder.command)
    scorer.check(policy)
    folder = dataclasses.replace(
        folder,
        facts={**data.facts, "start": start},
        other_data=not is_same,
    )
    result = run_training(
        policy,
        config,
        folder,
        accelerator=accelerator,
        batches=loader.batch,
        draw=policy.draw,
        score=scorer,
        keep=PolicyKeeper(config, data, folder, scorer, start=start),
        until=until,
    )
    return TrainResult(**{f.name: getattr(result, f.name) for f in dataclasses.fields(result)})


def new_policy(config: TrainConfig, data: TrainingData) -> ConsistencyPolicy:
    """An untrained policy of the settings, for the data."""
    policy = ConsistencyPolicy(
        data.spec(config.policy),
        config.net,
        data.normalizer(),
        encoder=config.encoder,
        path=config.policy.path,
        sampler=config.objective.sampler_kind,
        nfe=config.nfe,
        objective=config.objective.build(),
    )
    policy.control_hz, policy.warm_start = data.control_hz, config.policy.warm_start
    policy.pad_loss = data.pad_loss
    if data.targets is not None:
        policy.target_head = TargetHead(
            policy.feature_dim, (policy.n_obs_steps, data.targets.shape[1]), config.target_weight
        )
    return policy


def training_loader(
    config: TrainConfig, data: TrainingData, policy: ConsistencyPolicy, device: torch.device
) -> DeviceLoader:
    """The batches that a run trains on, with what the policy's encoder crops frames by.

    Raises:
        ConfigError: no episodes are left to train on.
    """
    loader = data.loader(
        batch_size=config.batch_size,
        seed=config.seed,
        device=device,
        n_augment=getattr(policy.encoder, "n_augment", 0),
        forget=config.data.forget_history,
    )
    if loader is None:
        raise ConfigError(
            f"data.val_fraction={config.data.val_fraction} leaves no episodes to train on; lower it"
        )
    return loader


#: Data that reach so many times as far as those of the policy that a run starts from are told of.
_FAR = 1.2


def start_from(policy: ConsistencyPolicy, name_or_path: str) -> dict[str, Any]:
    """Give ``policy`` the weights and the scaling of a trained one, to train it further.

    The scaling comes along because the weights mean actions in its units; the limits, to which
    values are cut, are those of the data that is trained on now.

    Returns:
        How the trained one came to be. Kept in the run: there may be another policy of that name by
        the time the run is resumed.

    Raises:
        BundleError: there is no such policy, or it is damaged.
        ConfigError: its inputs, outputs or networks differ from those of ``policy``.
    """
    source = ConsistencyPolicy.from_pretrained(name_or_path)
    for what, setting, mine, theirs in (
        # in this order: the features of numbers lie side by side
        ("observations", "data.obs", [*policy.spec.obs.items()], [*source.spec.obs.items()]),
        ("images", "data.obs", policy.spec.images, source.spec.images),
        ("action size", "data.action", policy.spec.action_dim, source.spec.action_dim),
        ("horizon", "policy.horizon", policy.spec.horizon, source.spec.horizon),
        ("observation steps", "policy.n_obs_steps", policy.n_obs_steps, source.n_obs_steps),
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
    policy.normalizer = _rescaled(policy.normalizer, source.normalizer).to(policy.device)
    kept = ("command", "history", "examples", "data", "git_commit", "start")
    return {key: source.metadata[key] for key in kept if key in source.metadata}


def _rescaled(own: Normalizer, source: Normalizer) -> Normalizer:
    """The scaling of ``source``, with the limits of ``own``: those of the data trained on now."""
    mine = {name: value.cpu() for name, value in own.to_arrays().items()}
    arrays = {name: value.cpu() for name, value in source.to_arrays().items()}
    for key in own.keys:
        origin = mine.get(f"{key}.origin", 0.0) - arrays.get(f"{key}.origin", torch.zeros(()))
        for kind in ("low", "high"):
            limit = mine.get(f"{key}.{kind}")
            arrays.pop(f"{key}.{kind}", None)
            if limit is not None:
                arrays[f"{key}.{kind}"] = (limit + origin).to(limit.dtype)
        scale, offset = mine[f"{key}.scale"], mine[f"{key}.offset"]
        theirs = arrays[f"{key}.scale"]
        ends = torch.stack([(side - offset) / scale for side in (-1, 1)]) + origin
        reach = (ends * theirs + arrays[f"{key}.offset"]).abs()[:, (theirs != 0) & (scale != 0)]
        said = []
        if reach.numel() and float(reach.max()) > _FAR:
            said.append(
                f"{key} reaches {float(reach.max()):.2g} times as far in this data as in that of "
                "the policy, whose scaling stays"
            )
        if bool(((theirs == 0) & (scale != 0)).any()):
            said.append(f"{key} has dimensions that never varied in the policy's data: not seen")
        for text in said:
            warnings.warn(
                f"init: {text}. Training from scratch (init=null) scales anew", stacklevel=4
            )
    return Normalizer.from_arrays(arrays)


def describe(config: TrainConfig) -> str:
    """The settings of a run that are not those of ``task=custom``, for ``cmpolicy.compose``."""
    settings = config.to_dict()
    own = settings["objective"].pop("settings")
    objective = ObjectiveConfig.complete({"name": config.objective.name})
    settings["objective"] = objective | settings["objective"] | own
    kinds = {part: {"kind": settings[part]["kind"]} for part in ("net", "encoder")}
    defaults = TrainConfig.complete({"objective": objective, **kinds})
    for part, name in _SAID_ALWAYS:
        defaults[part][name] = None
    words = [f"{key}={_word(value)}" for key, value in _differences(settings, defaults)]
    return f"cmpolicy.train: {shlex.join(['task=custom', *words])}"


#: What ``task=custom`` and the sizes of networks that come with it set otherwise than the defaults.
_SAID_ALWAYS = (
    ("data", "name"),
    ("data", "val_fraction"),
    ("task", "name"),
    ("objective", "name"),
    ("net", "kind"),
    ("encoder", "kind"),
    ("encoder", "dim"),
)
_PLAIN = re.compile(r"[A-Za-z_][\w./-]*")


def _word(value: Any) -> str:
    """A value as Hydra reads it: JSON, but for plain words."""
    return value if isinstance(value, str) and _PLAIN.fullmatch(value) else json.dumps(value)


def _differences(settings: Mapping[str, Any], defaults: Any, prefix: str = "") -> Any:
    for key, value in settings.items():
        default = defaults.get(key) if isinstance(defaults, Mapping) else None
        if isinstance(value, Mapping):
            yield from _differences(value, default, f"{prefix}{key}.")
        elif value != default and f"{prefix}{key}" != "data.path":
            yield f"{prefix}{key}", value


def _with_absolute_path(config: TrainConfig) -> TrainConfig:
    """A run can be resumed from any folder."""
    if config.data.path is None:
        return config
    path = str(Path(config.data.path).expanduser().absolute())
    return dataclasses.replace(config, data=dataclasses.replace(config.data, path=path))


def _validator(config: TrainConfig, data: TrainingData, loader: DeviceLoader) -> Validator | None:
    """None where no episodes are held out."""
    # frames of more windows than a training step takes may not fit into the memory
    size = min(VALIDATION_BATCH, config.batch_size) if data.arrays.images else VALIDATION_BATCH
    held_out = data.held_out(loader, size)
    if held_out is None:
        return None
    return Validator(held_out, windows=config.eval.windows, seed=config.seed)


def closing_text(run: TrainResult, config: TrainConfig) -> str:
    """What was made, where, and what to do next."""
    numbers = [
        f"{name} {run.metrics[name]:.3f}"
        for name in ("success", "score", "val_loss", "val_action_error", "val_action_range")
        if name in run.metrics
    ]
    lines = [
        f"trained {run.end.examples} examples in {run.seconds / 60:.1f} min "
        f"({run.parameters / 1e6:.1f}M parameters)",
        f"  last scores    {', '.join(numbers) or 'none'}",
        f"  best policy    {run.policy_dir}",
        f"  curves, log    {run.run_dir / CURVES_FILE}, {run.run_dir / 'log.jsonl'}",
        f"  training state {state_path(run.run_dir)}",
    ]
    if config.task.protocol is not None:
        lines.append(f"score it: cmpolicy eval policy={run.policy_dir} out={run.run_dir / 'eval'}")
    else:
        lines.append(
            f"use it: ConsistencyPolicy.from_pretrained({str(run.policy_dir)!r}).infer(obs)"
        )
    return "\n".join(lines)
