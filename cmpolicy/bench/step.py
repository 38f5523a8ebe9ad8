"""Cost of a training step: improved self-distillation against flow matching, in pairs.

Both networks, batches and optimizers are the same; only the objective differs. The steps alternate
in one process, so that whatever else the machine does hits both, and the ratio is taken per pair.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import cast

import numpy as np
import numpy.typing as npt
import torch
from accelerate import Accelerator

from cmpolicy.bench.report import Report
from cmpolicy.experiment.config import TrainConfig
from cmpolicy.experiment.data import TrainingData, load_training_data
from cmpolicy.experiment.train import new_policy, training_loader
from cmpolicy.nn.encoders.image import ImageEncoder
from cmpolicy.policy.policy import ConsistencyPolicy
from cmpolicy.schema import at_least
from cmpolicy.training.device import describe_device, make_accelerator, use_bf16
from cmpolicy.training.loader import DeviceLoader
from cmpolicy.training.trainer import Trainer

Seconds = npt.NDArray[np.float64]


@dataclass(frozen=True, kw_only=True)
class StepSettings:
    """Of ``step``; every other word is a setting of ``cmpolicy train``.

    Args:
        pairs: measured pairs of one step of the objective (psd unless said) and one fm step.
        warmup: pairs before them that are not measured.
        threads: of torch on the CPU; null leaves torch's own choice.
        out: JSON file.
    """

    pairs: int = 30
    warmup: int = 5
    threads: int | None = None
    out: str = "outputs/bench/step.json"

    def __post_init__(self) -> None:
        at_least("pairs", self.pairs, 1)
        at_least("warmup", self.warmup, 0)
        at_least("threads", self.threads or 1, 1)


@dataclass(frozen=True)
class PairedTimes:
    """Seconds of every measured pair, (P,) each."""

    first: Seconds
    second: Seconds
    load: Seconds
    """The loader alone, for the batch of that pair."""

    @property
    def ratio(self) -> float:
        """Median over the pairs of second / first."""
        return float(np.median(self.second / self.first))


def time_pairs(
    first: Callable[[], None],
    second: Callable[[], None],
    load: Callable[[], object],
    *,
    pairs: int,
    warmup: int,
    device: torch.device,
) -> PairedTimes:
    """Run ``load``, then both steps, ``warmup + pairs`` times; the order of the steps alternates.

    ``load`` fetches the batch that the two steps then fetch again, each within its own time.
    """
    times = np.zeros((3, warmup + pairs))
    steps = (first, second)
    for pair in range(warmup + pairs):
        times[2, pair] = _seconds(load, device)
        for which in (0, 1) if pair % 2 == 0 else (1, 0):
            times[which, pair] = _seconds(steps[which], device)
    kept = times[:, warmup:]
    return PairedTimes(kept[0], kept[1], kept[2])


def _seconds(run: Callable[[], object], device: torch.device) -> float:
    """Wall time until the device has finished."""
    _finish(device)
    start = time.perf_counter()
    run()
    _finish(device)
    return time.perf_counter() - start


def _finish(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def measure_step(settings: StepSettings, fm: TrainConfig, other: TrainConfig) -> Report:
    """One optimizer step of ``other`` and one of ``fm``: the trainer's own, with data and EMA.

    Args:
        settings: of the benchmark.
        fm, other: two runs that differ in nothing but their objective.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(settings.threads or before)
    try:
        return _measure(settings, fm, other)
    finally:
        torch.set_num_threads(before)


def _measure(settings: StepSettings, fm: TrainConfig, other: TrainConfig) -> Report:
    accelerator = make_accelerator(other)
    data = load_training_data(other)
    with TemporaryDirectory() as folder:
        first, second, loader = half_way_trainers(fm, other, data, accelerator, Path(folder))
        times = time_pairs(
            first.step,
            second.step,
            lambda: loader.batch(first.examples),
            pairs=settings.pairs,
            warmup=settings.warmup,
            device=accelerator.device,
        )
        frames = None
        encoder = second.model.encoder
        if isinstance(encoder, ImageEncoder):
            bf16 = use_bf16(other, accelerator.device)
            frames = _time_frames(second, encoder, loader, settings, bf16=bf16)
    size = sum(p.numel() for p in second.model.parameters()) / 1e6
    where = describe_device(accelerator.device)
    precision = "bf16" if use_bf16(other, accelerator.device) else "fp32"
    name = other.objective.name
    medians = {"fm": float(np.median(times.first)), name: float(np.median(times.second))}
    rows = [
        (f"{which} step", seconds * 1e3, other.batch_size / seconds)
        for which, seconds in medians.items()
    ]
    load = float(np.median(times.load))
    rows.append(("loader", load * 1e3, other.batch_size / load))
    closing = [
        f"one {name} step costs {times.ratio:.2f} times an fm step (median over the pairs)",
        f"the loader takes {load / medians['fm']:.2%} of an fm step, "
        f"{load / medians[name]:.2%} of {name}'s",
    ]
    if frames is not None:
        for what, seconds in (
            ("cameras' networks", frames.first),
            ("all of frames", frames.second),
        ):
            median = float(np.median(seconds))
            rows.append((what, median * 1e3, other.batch_size / median))
        closing.append(
            f"frames cost {frames.ratio:.2f} times the forward and backward passes of the cameras' "
            "networks: the rest is loading, cropping and scaling them"
        )
    return Report(
        benchmark="step",
        title=f"training step: {size:.2f} M parameters, batch {other.batch_size}, {precision}, "
        f"{settings.pairs} pairs\n  on {where}",
        columns=("what", "median ms", "examples/s"),
        rows=tuple(rows),
        summary={
            "fm_ms": medians["fm"] * 1e3,
            f"{name}_ms": medians[name] * 1e3,
            "loader_ms": load * 1e3,
            f"{name}_to_fm": times.ratio,
            "loader_share_of_fm": load / medians["fm"],
            f"loader_share_of_{name}": load / medians[name],
            **({} if frames is None else {"frames_to_networks": frames.ratio}),
        },
        closing=tuple(closing),
        settings={**asdict(settings), "train": other.to_dict()},
        device=where,
    )


def _time_frames(
    trainer: Trainer,
    encoder: ImageEncoder,
    loader: DeviceLoader,
    settings: StepSettings,
    *,
    bf16: bool,
) -> PairedTimes:
    """Forward and backward of the cameras' networks on ready crops, and all that frames cost."""
    policy = cast(ConsistencyPolicy, trainer.model)
    batch = loader.batch(0)
    views = encoder.views(batch["obs"], batch["augment"])

    def networks() -> None:
        with torch.autocast(trainer.device.type, torch.bfloat16, enabled=bf16):
            features = encoder.look(views)
        torch.cat(features, dim=-1).sum().backward()

    def whole() -> None:
        batch = loader.batch(trainer.examples)
        with torch.autocast(trainer.device.type, torch.bfloat16, enabled=bf16):
            features = policy.encode(batch["obs"], batch["augment"])
        features.sum().backward()

    times = time_pairs(
        networks,
        whole,
        lambda: loader.batch(trainer.examples),
        pairs=settings.pairs,
        warmup=settings.warmup,
        device=trainer.device,
    )
    policy.zero_grad()
    return times


def half_way_trainers(
    fm: TrainConfig, other: TrainConfig, data: TrainingData, accelerator: Accelerator, folder: Path
) -> tuple[Trainer, Trainer, DeviceLoader]:
    """Trainers of both runs, half-way through, where schedules of objectives are under way.

    Both take the batches of the loader that comes third: those that training takes.
    """
    policies = []
    for config in (fm, other):
        torch.manual_seed(config.seed)
        policies.append(new_policy(config, data).to(accelerator.device))
        if config.compile:
            policies[-1].net.compile()
    loader = training_loader(other, data, policies[-1], accelerator.device)
    trainers = [
        Trainer(
            policy,
            config,
            accelerator=accelerator,
            batches=loader.batch,
            draw=policy.draw,
            run_dir=folder / config.objective.name,
        )
        for policy, config in zip(policies, (fm, other), strict=True)
    ]
    for trainer, config in zip(trainers, (fm, other), strict=True):
        trainer.examples = config.examples // 2
    return trainers[0], trainers[1], loader
