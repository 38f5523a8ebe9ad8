"""Put a training run of an image model together."""

from __future__ import annotations

import dataclasses
import hashlib
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, cast

import numpy as np
import torch
from torch import nn

from cmpolicy.experiment.image.config import ImageTrainConfig
from cmpolicy.experiment.model_card import changes_of, init_name, origin, without_folders
from cmpolicy.experiment.run import (
    RESUME_SETTINGS,
    RunFolder,
    RunResult,
    open_run,
    read_facts,
    resumed_settings,
    run_training,
)
from cmpolicy.flow.alarm import health_alarm
from cmpolicy.image.datasets import ImageBatch, ImageData, load_images, skipped_text
from cmpolicy.image.model import ImageFlowModel
from cmpolicy.image.net import ImageNet, build_net
from cmpolicy.image.pictures import samples_picture, save_picture
from cmpolicy.image.pipeline import ConsistencyImagePipeline
from cmpolicy.image.pixels import as_input, as_pictures
from cmpolicy.schema import ConfigError
from cmpolicy.training.checkpoint import state_path
from cmpolicy.training.curves import CURVES_FILE
from cmpolicy.training.device import make_accelerator
from cmpolicy.training.image_loader import ImageLoader
from cmpolicy.training.trainer import Scores
from cmpolicy.training.validation import HeldOutLosses, evenly, health_metrics
from cmpolicy_data.catalog import data_dir
from cmpolicy_eval.evaluate import git_commit, versions

BEST, LAST, SAMPLES = "model", "model_last", "samples"
#: Images in one call of the network; images of the health metrics (about 20 evaluations of each).
PART, HEALTH_IMAGES = 256, 128
#: Classes in the picture of samples.
SHOWN = 20
RESUMABLE = (*RESUME_SETTINGS, "dataset.path")


def train_images(
    config: ImageTrainConfig,
    out: str | Path | None = None,
    *,
    command: str = "train_images",
    until: int | None = None,
) -> RunResult:
    """Train an image model.

    Args:
        config: the settings.
        out: folder of the run; None for one named after data, objective and time.
        command: what the user typed, for the model card.
        until: stop, resumably, at this example.

    Raises:
        ValueError, OSError, NonFiniteError: see the parts.
    """
    return _train(config, out, command=command, until=until, resume=False)


def resume_images(
    run_dir: str | Path,
    changes: Mapping[str, Any] | None = None,
    *,
    command: str | None = None,
) -> RunResult:
    """Go on with a run; ``changes`` by dotted key, ``command`` what the card tells of them.

    Raises:
        ConfigError: no run there, other pictures, or a change that would make it another run.
    """
    folder = Path(run_dir).expanduser()
    settings = resumed_settings(folder, changes or {}, RESUMABLE)
    config = ImageTrainConfig.from_mapping(settings)
    change = (command or f"resume_images: {changes}") if changes else None
    return _train(config, folder, command="", resume=True, change=change)


def _train(
    config: ImageTrainConfig,
    out: str | Path | None,
    *,
    command: str,
    until: int | None = None,
    resume: bool,
    change: str | None = None,
) -> RunResult:
    accelerator = make_accelerator(config)
    if config.dataset.path is not None:  # a run can be resumed from any folder
        path = str(Path(config.dataset.path).expanduser().absolute())
        config = dataclasses.replace(config, dataset=dataclasses.replace(config.dataset, path=path))
    stem = f"{config.dataset.name}-{config.objective.name}"
    folder = open_run(
        accelerator, stem, out, command=command, resume=resume, verb="image train", change=change
    )
    with accelerator.main_process_first():  # one of them downloads
        data = load_images(config.dataset, download_dir=data_dir())
    if data.skipped and accelerator.is_main_process:
        print(skipped_text(data), file=sys.stderr)
    before = read_facts(folder.path) if resume else {}
    images = _facts(data)
    if resume:
        _check_same_images(before.get("images"), images, folder.path)
    torch.manual_seed(config.seed)
    device = accelerator.device
    model = new_model(config, data).to(device)
    start = before.get("start")
    if config.init is not None and not resume:  # a resumed run has the weights of its own
        start = start_from(model, config.init, data.class_names)
    folder = dataclasses.replace(folder, facts={"images": images, "start": start})
    if config.compile and isinstance(model.flow_map.net, nn.Module):
        model.flow_map.net.compile()  # in place: names of weights stay
    loader = ImageLoader(
        data.train,
        batch_size=config.batch_size,
        seed=config.seed,
        flip=data.flip,
        device=device,
    )
    return run_training(
        model,
        config,
        folder,
        accelerator=accelerator,
        batches=loader.batch,
        draw=model.draw,
        score=HeldOutScorer(config, data, folder.path),
        keep=ModelKeeper(config, data, folder, start=start),
        until=until,
    )


def _facts(data: ImageData) -> dict[str, Any]:
    """What tells whether other data is the same; JSON-ready."""
    hashes = {}
    for name, part in (("train", data.train), ("test", data.test)):
        digest = hashlib.blake2b(part.labels.tobytes(), digest_size=16)
        digest.update(np.ascontiguousarray(part.images).tobytes())
        hashes[name] = {"images": len(part), "hash": digest.hexdigest()}
    return {"classes": list(data.class_names), **hashes}


def _check_same_images(before: Any, now: Mapping[str, Any], run_dir: Path) -> None:
    """Refuse other pictures: labels may mean other classes, and what was held out may train."""
    if before in (None, now):
        return
    what = "other pictures"
    if before.get("classes") != now["classes"]:
        what = f"its classes were {before.get('classes')}, they are {now['classes']}"
    elif before["train"]["images"] != now["train"]["images"]:
        what = f"it had {before['train']['images']} to train on, there are {now['train']['images']}"
    raise ConfigError(
        f"the pictures are not those that {run_dir} was started on ({what}); give the old ones "
        "back, or start a new run on these"
    )


def new_model(config: ImageTrainConfig, data: ImageData) -> ImageFlowModel:
    """An untrained model of the settings, for the data."""
    net = build_net(
        config.net.config,
        image_size=data.image_size,
        channels=data.channels,
        n_classes=data.n_classes,
    )
    return ImageFlowModel(
        net,
        path=config.path,
        sampler=config.objective.sampler_kind,
        objective=config.objective.build(),
        guidance=config.guide,
    )


def start_from(
    model: ImageFlowModel, name_or_path: str, class_names: Sequence[str]
) -> dict[str, Any]:
    """Give ``model`` the weights of a trained one, to train it further.

    Returns:
        How the trained one came to be.

    Raises:
        ImageModelError: there is no such model, or it is damaged.
        ConfigError: its pictures, classes, path or network differ from those of ``model``.
    """
    source = ConsistencyImagePipeline.from_pretrained(name_or_path)
    theirs = cast(ImageNet, source.net)
    for what, setting, mine, other in (
        ("pictures", "dataset.image_size", model.net.image_shape, theirs.image_shape),
        ("classes", "dataset", tuple(class_names), source.class_names),
        ("path", "path", model.path_name, source.config.path),
        ("network", "net", model.net.net_config, theirs.net_config),
    ):
        if mine != other:
            raise ConfigError(
                f"init={name_or_path}: that model has {what} {other}, this run {mine}; change "
                f"{setting} to match it, or train from scratch with init=null"
            )
    model.net.load_state_dict(theirs.state_dict())
    kept = ("command", "history", "examples", "source", "git_commit", "start")
    return {key: source.metadata[key] for key in kept if key in source.metadata}


class HeldOutScorer:
    """Loss and health on held-out images, and a picture of samples; always with the same noise.

    None of these numbers says which of two models makes the better pictures, so the model evaluated
    last counts as the best; ``cmpolicy image eval`` compares models.
    """

    def __init__(self, config: ImageTrainConfig, data: ImageData, run_dir: Path) -> None:
        self._config, self._data, self._run_dir = config, data, run_dir
        self._rows = evenly(len(data.test), config.eval.images)
        self._labels = np.repeat(np.arange(min(data.n_classes, SHOWN)), config.eval.per_class)

    @torch.no_grad()
    def __call__(self, model: ImageFlowModel, examples: int) -> Scores:
        """Score ``model`` after ``examples`` training examples, by the objective as at the end."""
        generator = torch.Generator(model.device).manual_seed(self._config.seed)
        losses = HeldOutLosses()
        for start in range(0, len(self._rows), PART):
            batch = self._batch(self._rows[start : start + PART], model.device)
            draws = model.draw(len(batch["labels"]), generator)
            losses.add(model(batch, draws=draws, progress=1.0, ema=model), len(batch["labels"]))
        some = self._rows[evenly(len(self._rows), HEALTH_IMAGES)]
        health = model.health(self._batch(some, model.device), generator)
        self._draw_samples(model, examples)
        metrics = losses.read() | health_metrics(health)
        return Scores(metrics, (float(examples),), health_alarm(metrics, model.sampler))

    def _batch(self, rows: np.ndarray[Any, Any], device: torch.device) -> ImageBatch:
        images = as_input(self._data.test.images[rows]).to(device)
        labels = torch.from_numpy(self._data.test.labels[rows]).to(device)
        return {"images": images, "labels": labels}

    def _draw_samples(self, model: ImageFlowModel, examples: int) -> None:
        noise = torch.Generator().manual_seed(self._config.seed)
        nfe = self._config.nfe
        parts = torch.from_numpy(self._labels).split(PART)
        images = torch.cat([model.generate(part, nfe=nfe, generator=noise) for part in parts])
        title = f"{nfe} evaluation{'s' * (nfe > 1)}, after {examples} training examples"
        picture = samples_picture(as_pictures(images), self._labels, self._data.class_names, title)
        save_picture(picture, self._run_dir / SAMPLES / f"{examples:09d}.png")


class ModelKeeper:
    """Writes the model evaluated last to ``model/``, and the latest to ``model_last/``."""

    def __init__(
        self,
        config: ImageTrainConfig,
        data: ImageData,
        folder: RunFolder,
        *,
        start: Mapping[str, Any] | None = None,
    ) -> None:
        self._config, self._data, self._folder = config, data, folder
        self._start = start  # metadata of the model that the run starts from

    def __call__(
        self,
        kind: Literal["best", "last"],
        model: ImageFlowModel,
        examples: int,
        scores: Scores | None,
    ) -> None:
        config = self._config.to_dict()
        config["dataset"]["path"] = None  # a folder of this machine
        config["init"] = init_name(config["init"])
        metadata = {
            "dataset": config["dataset"],
            "source": self._data.source,
            "command": without_folders(self._folder.command),
            "examples": examples,
            "nfe": self._config.nfe,
            "metrics": dict(scores.metrics) if scores is not None else {},
            "versions": versions(),
            "git_commit": git_commit(),
            "config": config,
        }
        if self._start is not None:
            metadata["start"] = self._start
        if history := changes_of(self._folder):
            metadata["history"] = history
        pipe = ConsistencyImagePipeline(
            model.net,
            path=model.path_name,
            sampler=model.sampler,
            class_names=list(self._data.class_names),
            metadata=metadata,
        )
        folder = self._folder.path / (BEST if kind == "best" else LAST)
        pipe.save(folder, card=image_card(pipe, metadata))


def image_card(pipe: ConsistencyImagePipeline, metadata: Mapping[str, Any]) -> str:
    """README.md of an image model: what it is, how it was made, how it did, how to use it."""
    config = metadata["config"]
    parameters = sum(p.numel() for p in pipe.net.parameters())
    names = ", ".join(f"`{name}`" for name in pipe.class_names)
    start, stages = origin(config.get("init"), metadata)
    weight = config["guidance"]
    guidance = "no guidance" if weight == 1 else f"guidance {weight:g} in training"
    rows = "\n".join(
        f"| {name.replace('_', ' ')} | {value:.4g} |" for name, value in metadata["metrics"].items()
    )
    scores = (
        f"| on held-out images | |\n|---|---|\n{rows}\n\n"
        "They tell how training went, not how good the pictures are: see `cmpolicy image eval`.\n"
        if rows
        else "Not scored while training.\n"
    )
    return f"""# A cmpolicy image model for {metadata["dataset"]["name"]}

Trained {start} on {metadata["source"]} by `{config["objective"]["name"]}`:
{parameters / 1e6:.1f}M parameters, {config["path"]} path, sampler `{pipe.sampler}`, {guidance}.

- images: {pipe.image_size}x{pipe.image_size}, {"grey" if pipe.channels == 1 else "colour"}
- classes: {names}
- training examples: {metadata["examples"]}
- command: `{metadata["command"]}`
{stages}
{scores}
```python
from cmpolicy.image.pipeline import ConsistencyImagePipeline

pipe = ConsistencyImagePipeline.from_pretrained("<this folder>")
images = pipe(class_labels=[0, 1], num_inference_steps={metadata["nfe"]}).images
```
"""


def closing_text(run: RunResult, config: ImageTrainConfig) -> str:
    """What was made, where, and what to do next."""
    kept = run.run_dir / (BEST if (run.run_dir / BEST).is_dir() else LAST)
    numbers = [f"{name} {run.metrics[name]:.3f}" for name in ("val_loss",) if name in run.metrics]
    nfe = config.nfe
    return "\n".join(
        [
            f"trained {run.end.examples} examples in {run.seconds / 60:.1f} min "
            f"({run.parameters / 1e6:.1f}M parameters)",
            f"  last scores    {', '.join(numbers) or 'none'}",
            f"  model          {kept}",
            f"  samples         {run.run_dir / SAMPLES}",
            f"  curves, log    {run.run_dir / CURVES_FILE}, {run.run_dir / 'log.jsonl'}",
            f"  training state {state_path(run.run_dir)}",
            f"look at it: cmpolicy image sample model={kept} nfe={nfe} out={run.run_dir}/grid.png",
            f"score it:   cmpolicy image eval model={kept} nfe=[{nfe}] out={run.run_dir}/eval",
        ]
    )
