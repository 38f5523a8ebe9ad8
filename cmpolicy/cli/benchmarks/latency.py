"""Latency of one action chunk: numpy observation in, numpy actions out, normalisation included."""

from __future__ import annotations

import time
from dataclasses import asdict

import numpy as np
import torch

from cmpolicy.cli.benchmarks.report import Report, describe_device
from cmpolicy.cli.benchmarks.settings import LatencySettings
from cmpolicy.policy.consistency import ConsistencyPolicy
from cmpolicy.train.schema import ConfigError

_WARMUP_CALLS = 5
_FEWEST_CALLS = 20


def measure_latency(settings: LatencySettings) -> Report:
    """p50 and p99 of ``policy.infer`` at batch size 1, one row per number of evaluations.

    Raises:
        BundleError: the policy cannot be loaded.
        ConfigError: no such device.
    """
    device = available_device(settings.device)
    policy = ConsistencyPolicy.from_pretrained(settings.policy, device=device)
    before = torch.get_num_threads()
    torch.set_num_threads(settings.threads or before)
    try:
        where = describe_device(device)
        times = {nfe: time_calls(policy, nfe, settings) for nfe in settings.nfe}
    finally:
        torch.set_num_threads(before)
    p50 = {nfe: float(np.median(ms)) for nfe, ms in times.items()}
    rows = tuple(
        (nfe, len(ms), p50[nfe], float(np.quantile(ms, 0.99)), 1e3 / p50[nfe])
        for nfe, ms in times.items()
    )
    least, most = min(p50), max(p50)
    summary = {f"p50_ms_nfe{nfe}": value for nfe, value in p50.items()}
    closing = [f"{least} evaluation(s): {p50[least]:.2f} ms per chunk (p50)"]
    if most > least:
        ratio = p50[most] / p50[least]
        summary[f"ratio_{most}_to_{least}"] = ratio
        closing.append(f"{most} evaluations cost {ratio:.1f} times as much as {least}")
    size = sum(p.numel() for p in policy.parameters()) / 1e6
    return Report(
        benchmark="latency",
        title=f"latency per action chunk of {settings.policy} ({size:.2f} M parameters, batch 1)\n"
        f"  on {where}",
        columns=("evaluations", "calls", "p50 ms", "p99 ms", "chunks/s"),
        rows=rows,
        summary=summary,
        closing=tuple(closing),
        settings=asdict(settings),
        device=where,
    )


def time_calls(policy: ConsistencyPolicy, nfe: int, settings: LatencySettings) -> list[float]:
    """Milliseconds of every call; the observations lie in the range of the training data."""
    rng = np.random.default_rng(settings.seed)
    obs = {
        key: policy.normalizer.unnormalize(
            key,
            torch.from_numpy(
                rng.uniform(-1, 1, (1, policy.n_obs_steps, *shape)).astype(np.float32)
            ).to(policy.device),
        )
        .cpu()
        .numpy()
        for key, shape in policy.spec.obs.items()
    }
    policy.num_steps = nfe
    times: list[float] = []
    begin = time.perf_counter()
    for call in range(_WARMUP_CALLS + settings.calls):
        noise = rng.standard_normal((1, *policy.noise_shape), dtype=np.float32)
        start = time.perf_counter()
        policy.infer(obs, noise=noise)  # numpy comes back, so a GPU has finished
        end = time.perf_counter()
        if call >= _WARMUP_CALLS:
            times.append((end - start) * 1e3)
        if end - begin > settings.seconds and len(times) >= min(_FEWEST_CALLS, settings.calls):
            break
    return times


def available_device(name: str) -> torch.device:
    """The device of that name.

    Raises:
        ConfigError: torch knows no such device, or sees no GPU.
    """
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ConfigError(f"device={name!r} is no device; use cpu or cuda") from error
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ConfigError(f"device={name}, but torch sees no GPU; use device=cpu")
    return device
