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

import numpy as np
import numpy.typing as npt
import torch
from accelerate import Accelerator

from cmpolicy.bench.report import Report
from cmpolicy.experiment.config import TrainConfig
from cmpolicy.experiment.data import TrainingData, load_training_data
from cmpolicy.experiment.train import new_policy
from cmpolicy.schema import ConfigError, at_least
from cmpolicy.training.device import describe_device, make_accelerator, use_bf16
from cmpolicy.training.loader import DeviceLoader
from cmpolicy.training.trainer import Trainer

Seconds = npt.NDArray[np.float64]


@dataclass(frozen=True, kw_only=True)
class StepSettings:
    """Of ``step``; every other word is a setting of ``cmpolicy train``.

    Args:
        pairs: measured pairs of one isd and one fm step.
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


def measure_step(settings: StepSettings, fm: TrainConfig, isd: TrainConfig) -> Report:
    """One optimizer step of ``isd`` and one of ``fm``: the trainer's own, with data and EMA.

    Args:
        settings: of the benchmark.
        fm, isd: two runs that differ in nothing but their objective.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(settings.threads or before)
    try:
        return _measure(settings, {"fm": fm, "isd": isd})
    finally:
        torch.set_num_threads(before)


def _measure(settings: StepSettings, configs: dict[str, TrainConfig]) -> Report:
    isd = configs["isd"]
    accelerator = make_accelerator(isd)
    data = load_training_data(isd)
    loader = data.loader(
        train=True, batch_size=isd.batch_size, seed=isd.seed, device=accelerator.device
    )
    if loader is None:
        raise ConfigError(f"data.val_fraction={isd.data.val_fraction} leaves no training episodes")
    with TemporaryDirectory() as folder:
        trainers = {
            name: _trainer(config, data, loader, accelerator, Path(folder) / name)
            for name, config in configs.items()
        }
        times = time_pairs(
            trainers["fm"].step,
            trainers["isd"].step,
            lambda: loader.batch(trainers["fm"].examples),
            pairs=settings.pairs,
            warmup=settings.warmup,
            device=accelerator.device,
        )
    size = sum(p.numel() for p in trainers["isd"].model.parameters()) / 1e6
    where = describe_device(accelerator.device)
    precision = "bf16" if use_bf16(isd, accelerator.device) else "fp32"
    medians = {"fm": float(np.median(times.first)), "isd": float(np.median(times.second))}
    rows = [
        (f"{name} step", seconds * 1e3, isd.batch_size / seconds)
        for name, seconds in medians.items()
    ]
    load = float(np.median(times.load))
    return Report(
        benchmark="step",
        title=f"training step: {size:.2f} M parameters, batch {isd.batch_size}, {precision}, "
        f"{settings.pairs} pairs\n  on {where}",
        columns=("what", "median ms", "examples/s"),
        rows=(*rows, ("loader", load * 1e3, isd.batch_size / load)),
        summary={
            "fm_ms": medians["fm"] * 1e3,
            "isd_ms": medians["isd"] * 1e3,
            "loader_ms": load * 1e3,
            "isd_to_fm": times.ratio,
            "loader_share_of_fm": load / medians["fm"],
            "loader_share_of_isd": load / medians["isd"],
        },
        closing=(
            f"an isd step costs {times.ratio:.2f} times an fm step (median over the pairs)",
            f"the loader takes {load / medians['fm']:.2%} of an fm step, "
            f"{load / medians['isd']:.2%} of an isd step",
        ),
        settings={**asdict(settings), "train": isd.to_dict()},
        device=where,
    )


def _trainer(
    config: TrainConfig,
    data: TrainingData,
    loader: DeviceLoader,
    accelerator: Accelerator,
    run_dir: Path,
) -> Trainer:
    """A trainer half-way through its run, where schedules of the objective are under way."""
    torch.manual_seed(config.seed)
    policy = new_policy(config, data)
    trainer = Trainer(
        policy,
        config,
        accelerator=accelerator,
        batches=loader.batch,
        draw=policy.draw,
        run_dir=run_dir,
    )
    trainer.examples = config.examples // 2
    return trainer
