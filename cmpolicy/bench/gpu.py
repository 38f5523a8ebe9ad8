"""What a GPU makes of cmpolicy: training steps, latency of one decision, memory.

Every row stands alone: one that fails is written with its message, and the file is written after
each, so a run that is cut off leaves what it had.
"""

from __future__ import annotations

import copy
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from cmpolicy.bench.networks import diffusion_chunk
from cmpolicy.bench.report import Report
from cmpolicy.bench.step import half_way_trainers, time_pairs
from cmpolicy.experiment.config import TrainConfig
from cmpolicy.experiment.data import load_training_data
from cmpolicy.experiment.train import new_policy
from cmpolicy.policy.policy import ConsistencyPolicy
from cmpolicy.schema import ConfigError, at_least, positive
from cmpolicy.training.device import choose_device, describe_device, make_accelerator

Row = tuple[str, float, float, float, str]


@dataclass(frozen=True, kw_only=True)
class GpuSettings:
    """Of ``gpu``.

    Args:
        pairs: measured pairs of one step of fm and one of the other objective per row.
        calls: timed decisions per row.
        batches: batch sizes of the training steps.
        nets: sizes of the networks.
        minutes: instead of all that, train for so long; every setting of `cmpolicy train` can be
            given as well.
        device: cuda; cpu is for trying the benchmark itself.
        out: JSON file; with minutes, the folder of the run.
    """

    pairs: int = 20
    calls: int = 300
    batches: tuple[int, ...] = (128, 1024)
    nets: tuple[str, ...] = ("small", "base", "large")
    minutes: float | None = None
    device: str = "cuda"
    out: str = "outputs/bench/gpu.json"

    def __post_init__(self) -> None:
        at_least("pairs", self.pairs, 1)
        at_least("calls", self.calls, 1)
        if not (self.batches and self.nets):
            raise ConfigError(
                f"batches={list(self.batches)} and nets={list(self.nets)} must name something to "
                "measure"
            )
        positive("minutes", self.minutes)
        if self.minutes is not None and Path(self.out).suffix == ".json":
            raise ConfigError(
                f"minutes={self.minutes} trains, so out={self.out} must be the folder of the run, "
                "such as out=outputs/gpu/run"
            )


def measure_gpu(
    settings: GpuSettings, pairs: Sequence[tuple[str, TrainConfig, TrainConfig]], command: str
) -> Report:
    """All rows.

    Args:
        settings: of the benchmark.
        pairs: (name of the network, a run by fm, the same by another objective).
        command: recorded.
    """
    device = choose_device(settings.device)
    rows: list[Row] = []
    started = time.perf_counter()

    def report() -> Report:
        return Report(
            benchmark="gpu",
            title=f"GPU figures on {describe_device(device)}, torch {torch.__version__}",
            columns=("what", "median ms", "p99 ms, or ms of the objective", "ratio", "note"),
            rows=tuple(rows),
            summary={"seconds": time.perf_counter() - started},
            closing=(),
            settings=asdict(settings),
            device=describe_device(device),
        )

    for name, measure in _measures(settings, pairs, device):
        begin = time.perf_counter()
        try:
            rows += measure()
        except Exception as error:  # a row that fails is a finding, the others go on
            said = str(error).partition("\n")[0]  # may be empty, as of MemoryError()
            note = f"failed: {type(error).__name__}: {said[:150]}"
            rows.append((name, float("nan"), float("nan"), float("nan"), note))
        report().save(settings.out, command)
        print(f"{time.perf_counter() - begin:6.1f} s  {rows[-1]}", flush=True)
    return report()


def _measures(
    settings: GpuSettings,
    pairs: Sequence[tuple[str, TrainConfig, TrainConfig]],
    device: torch.device,
) -> Sequence[tuple[str, Callable[[], list[Row]]]]:
    found: list[tuple[str, Callable[[], list[Row]]]] = []
    for name, _, other in pairs:
        for how in ("eager", "graph"):
            label = f"decision {name} {how}"
            found.append((label, partial(_latency, settings, other, how, label, device)))
    last = settings.batches[-1]
    kinds = [(b, p, False) for b in settings.batches for p in ("fp32", "bf16")]
    for batch, precision, compiled in [*kinds, (last, "bf16", True)]:
        for name, fm, other in pairs[: 1 if compiled else None]:
            label = f"step {name} batch {batch} {precision}{' compiled' * compiled}"
            measure = partial(
                _step,
                settings,
                fm,
                other,
                label,
                batch=batch,
                precision=precision,
                compiled=compiled,
                device=device,
            )
            found.append((label, measure))
    return found


def _changed(config: TrainConfig, **changes: Any) -> TrainConfig:
    return TrainConfig.from_mapping(config.to_dict() | changes)


def _step(
    settings: GpuSettings,
    fm: TrainConfig,
    other: TrainConfig,
    label: str,
    *,
    batch: int,
    precision: str,
    compiled: bool,
    device: torch.device,
) -> list[Row]:
    changes = {
        "batch_size": batch,
        "precision": precision,
        "compile": compiled,
        "device": device.type,
    }
    fm, other = _changed(fm, **changes), _changed(other, **changes)
    accelerator = make_accelerator(other)
    data = load_training_data(other)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    with tempfile.TemporaryDirectory() as folder:
        first, second, loader = half_way_trainers(fm, other, data, accelerator, Path(folder))
        times = time_pairs(
            first.step,
            second.step,
            lambda: loader.batch(first.examples),
            pairs=settings.pairs,
            warmup=8 if compiled else 5,
            device=device,
        )
    peak = torch.cuda.max_memory_allocated(device) / 2**20 if device.type == "cuda" else 0.0
    medians = [1e3 * float(np.median(t)) for t in (times.first, times.second)]
    rate = batch / medians[1] * 1e3
    note = f"{other.objective.name} {rate:.0f} examples/s, peak of both {peak:.0f} MiB"
    return [(label, medians[0], medians[1], times.ratio, note)]


def _latency(
    settings: GpuSettings, config: TrainConfig, how: str, label: str, device: torch.device
) -> list[Row]:
    """One decision at batch 1, numpy in and numpy out, in fp32 and bf16; beside it DDPM-100."""
    data = load_training_data(config)
    torch.manual_seed(0)
    policy = new_policy(config, data).to(device).eval().requires_grad_(False)
    spec = policy.spec
    rng = np.random.default_rng(0)
    obs = {k: data.arrays.obs[k][: spec.n_obs_steps][None].astype(np.float32) for k in spec.obs}
    noise = rng.standard_normal((1, *spec.noise_shape), dtype=np.float32)
    rows: list[Row] = []
    for precision in (torch.float32, torch.bfloat16):
        cast = copy.deepcopy(policy).to(precision)
        infer = (
            partial(cast.infer, obs, noise)
            if how == "eager"
            else _graphed(cast, obs, noise, device)
        )
        name = f"{label} {str(precision).removeprefix('torch.')}"
        rows.append(_timed(name, infer, settings.calls))
    if how == "eager":
        ddpm = diffusion_chunk("ddpm", 100, policy, policy.net)
        rows.append(
            _timed(f"{label} ddpm-100", lambda: ddpm(obs, noise), max(3, settings.calls // 30))
        )
        many = {k: np.repeat(v, 64, axis=0) for k, v in obs.items()}
        rows.append(
            _timed(f"{label} batch 64", lambda: policy.infer(many), settings.calls // 3 + 1)
        )
    return rows


def _timed(name: str, infer: Callable[[], Any], calls: int) -> Row:
    for _ in range(min(20, calls)):
        infer()
    times = []
    for _ in range(calls):
        start = time.perf_counter()
        infer()
        times.append(1e3 * (time.perf_counter() - start))
    middle, high = statistics.median(times), float(np.quantile(times, 0.99))
    return (name, middle, high, high / middle, f"{calls} calls, host to host")


def _graphed(
    policy: ConsistencyPolicy, obs: dict[str, Any], noise: Any, device: torch.device
) -> Callable[[], Any]:
    """The decision as one CUDA graph, with the copies from and to the host around it.

    Raises:
        RuntimeError: not a GPU.
    """
    if device.type != "cuda":
        raise RuntimeError("a CUDA graph needs a GPU")
    here: Any = {"device": device, "dtype": policy.dtype}
    static = {key: torch.as_tensor(value, **here) for key, value in obs.items()}
    z = torch.as_tensor(noise, **here)
    pinned = {k: torch.as_tensor(v, dtype=policy.dtype).pin_memory() for k, v in obs.items()}
    pinned_noise = torch.as_tensor(noise, dtype=policy.dtype).pin_memory()
    side = torch.cuda.Stream(device)
    side.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(side):
        for _ in range(3):
            policy.predict_action_chunk(static, noise=z)
    torch.cuda.current_stream(device).wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = policy.predict_action_chunk(static, noise=z)

    def infer() -> Any:
        for key, value in pinned.items():
            static[key].copy_(value, non_blocking=True)
        z.copy_(pinned_noise, non_blocking=True)
        graph.replay()
        return out.float().cpu().numpy()

    return infer


def train_for(config: TrainConfig, minutes: float, out: str, command: str) -> str:
    """Train for about so many minutes of wall time, all of the learning-rate schedule within them.

    Args:
        config: the run; its number of examples is replaced.
        minutes: of training, the measuring of its speed included.
        out: folder of the run.
        command: recorded in the model card.

    Returns:
        What came of it, in a line.

    Raises:
        KeyboardInterrupt: a signal stopped the trial that measures the speed.
    """
    from cmpolicy.experiment.run import stopped_text
    from cmpolicy.experiment.train import train

    device = choose_device(config.device)
    begin = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        short = _changed(
            config,
            examples=120 * config.batch_size,
            optim=asdict(config.optim) | {"warmup": 0},
            objective=config.to_dict()["objective"],
            eval=asdict(config.eval) | {"episodes": 0, "every": 10**12},
            log=asdict(config.log) | {"trackers": [], "every": 40 * config.batch_size},
        )
        trial = train(short, Path(folder) / "speed", command=command)
    if not trial.finished:
        raise KeyboardInterrupt(trial.end.signum)
    rate = trial.metrics["examples_per_s"]
    left = 60 * minutes - (time.perf_counter() - begin) - 20  # for the start and the end of the run
    # the rate is that of the last third, with L_sd; steps before it joins in are quicker
    examples = max(config.batch_size, int(rate * left) // config.batch_size * config.batch_size)
    warmup = min(config.optim.warmup, examples // 10)
    final = _changed(config, examples=examples, optim=asdict(config.optim) | {"warmup": warmup})
    result = train(final, out, command=command)
    if not result.finished:
        return stopped_text(result, "train", examples)
    numbers = ", ".join(f"{k} {v:.4g}" for k, v in result.metrics.items())
    return f"{examples} examples at {rate:.0f}/s on {describe_device(device)}: {numbers}"
