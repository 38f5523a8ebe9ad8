"""Latency of one action chunk: numpy observation in, numpy actions out, normalisation included."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Literal

import numpy as np
import torch
from torch import nn

from cmpolicy.bench.floor import Floor, measure_floor
from cmpolicy.bench.networks import Array, Infer, Obs, diffusion_chunk, make_runtime
from cmpolicy.bench.report import Cell, Report
from cmpolicy.export.plan_map import example_inputs
from cmpolicy.flow.sampler import SamplerKind, get_sampler
from cmpolicy.nn.encoders.image import ImageEncoderConfig
from cmpolicy.nn.registry import EncoderConfig, NetConfig
from cmpolicy.normalize import Normalizer
from cmpolicy.policy.inputs import obs_tensors
from cmpolicy.policy.policy import ConsistencyPolicy
from cmpolicy.schema import ConfigError, at_least
from cmpolicy.spec import PolicySpec
from cmpolicy.training.device import choose_device, describe_device

#: A row that evaluates no network.
_ENCODER = "encoder"
_WARMUP_CALLS, _WARMUP_SECONDS = 5, 1.0
_FEWEST_CALLS = 20
_BLOCK_SECONDS = 0.1
#: Of a network without a policy: Push-T's, from state and by a camera.
_SPEC = PolicySpec({"agent_pos": (2,), "keypoint": (9, 2)}, 2, 16, 2, 8)
_CAMERA_SPEC = PolicySpec({"agent_pos": (2,), "image": (96, 96, 3)}, 2, 16, 2, 8, images=("image",))

#: What a one-step policy is compared with, and its evaluations: those of Diffusion Policy.
DIFFUSIONS: dict[SamplerKind, int] = {"ddpm": 100, "ddim": 10}

RuntimeName = Literal["eager", "compiled", "pt2", "onnx"]


@dataclass(frozen=True, kw_only=True)
class LatencySettings:
    """Of ``latency``.

    Args:
        policy: bundle directory, bundled name or hub id.
        net: instead of it a preset such as ``large``, with random weights on Push-T's sizes.
        encoder: with ``net``, a preset such as ``resnet18``; it sees Push-T by a camera of 96 x 96.
        runtimes: what runs it; null: eager and, on the CPU, ONNX.
        nfe: network evaluations per chunk, one row each.
        diffusion: also DDPM with 100 and DDIM with 10 evaluations of the same network.
        device: where the policy runs.
        calls: timed calls per row.
        seconds: a row ends after so long, but not before 20 calls: 100 evaluations are slow.
        threads: of torch and onnxruntime on the CPU; null leaves torch's own choice.
        seed: of the observations and the noise.
        out: JSON file.
    """

    policy: str | None = None
    net: str | None = None
    encoder: str | None = None
    runtimes: tuple[RuntimeName, ...] | None = None
    nfe: tuple[int, ...] = (1, 2, 4, 10, 100)
    diffusion: bool = True
    device: str = "cpu"
    calls: int = 500
    seconds: float = 30.0
    threads: int | None = None
    seed: int = 0
    out: str = "outputs/bench/latency.json"

    def __post_init__(self) -> None:
        if (self.policy is None) == (self.net is None):
            raise ConfigError(
                "give policy=<bundle>, or net=<preset> for a network with random weights: one of "
                f"them, got policy={self.policy} and net={self.net}"
            )
        if self.encoder is not None and self.net is None:
            raise ConfigError(
                f"encoder={self.encoder} is for net=<preset>; the policy {self.policy} has its own"
            )
        if not self.nfe:
            raise ConfigError("nfe=[] names no number of evaluations; give nfe=[1,2,4,10,100]")
        for nfe in self.nfe:
            at_least("nfe", nfe, 1)
        if self.runtimes == ():
            raise ConfigError("runtimes=[] names no runtime; give runtimes=[eager,onnx]")
        exported = sorted({"pt2", "onnx"} & set(self.runtimes or ()))
        if exported and self.device != "cpu":
            raise ConfigError(
                f"runtimes={exported} run on the CPU, not on device={self.device}; give "
                "runtimes=[eager,compiled]"
            )
        at_least("calls", self.calls, 1)
        at_least("threads", self.threads or 1, 1)
        at_least("seed", self.seed, 0)

    @property
    def chosen_runtimes(self) -> tuple[RuntimeName, ...]:
        """What :attr:`runtimes` says or leaves open; each once."""
        default: tuple[RuntimeName, ...] = ("eager", "onnx") if self.device == "cpu" else ("eager",)
        return tuple(dict.fromkeys(self.runtimes or default))


@dataclass
class Contender:
    """One row: a runtime, what it computes, and the milliseconds of its calls so far."""

    runtime: str
    method: str
    nfe: int
    infer: Infer
    n_noises: int = 1  # that a call is handed
    times: list[float] = field(default_factory=list)
    spent: float = 0.0  # seconds of all calls, those without a time among them

    @property
    def p50(self) -> float:
        """Milliseconds."""
        return float(np.median(self.times))

    @property
    def p99(self) -> float:
        """Milliseconds."""
        return float(np.quantile(self.times, 0.99))


#: Settings of the networks of a policy with random weights.
Networks = tuple[NetConfig, EncoderConfig]


def measure_latency(settings: LatencySettings, networks: Networks | None = None) -> Report:
    """p50 and p99 at batch size 1, one row per runtime, method and number of evaluations.

    Args:
        settings: of the benchmark.
        networks: of the policy with random weights, where ``settings.net`` asks for one.

    Raises:
        BundleError: the policy cannot be loaded.
        ConfigError: no such device or net, or a runtime that is not for the device.
        ImportError: a runtime's package is not installed.
    """
    device = choose_device(settings.device)
    policy = _policy(settings, networks, device)
    before = torch.get_num_threads()
    torch.set_num_threads(settings.threads or before)
    try:
        where = describe_device(device)
        contenders = make_contenders(policy, settings)
        time_calls(contenders, policy, settings)
        on_cpu = device.type == "cpu"
        floor = measure_floor(policy, min(settings.nfe)) if on_cpu else None
    finally:
        torch.set_num_threads(before)
    size = sum(p.numel() for p in policy.parameters()) / 1e6
    seeing = f" encoder={settings.encoder}" if settings.encoder else ""
    name = settings.policy or f"net={settings.net}{seeing} with random weights"
    return Report(
        benchmark="latency",
        title=f"latency per action chunk of {name} ({size:.2f} M parameters, batch 1)\n"
        f"  on {where}",
        columns=_columns(floor),
        rows=tuple(_row(contender, floor) for contender in contenders),
        summary=_summary(contenders, floor),
        closing=_closing(contenders, floor),
        settings=asdict(settings),
        device=where,
    )


def make_contenders(policy: ConsistencyPolicy, settings: LatencySettings) -> list[Contender]:
    """All rows of the table, ready to be called."""
    contenders = []
    for name in settings.chosen_runtimes:
        runtime = make_runtime(name, policy, torch.get_num_threads())
        for nfe in settings.nfe:
            n_noises = get_sampler(policy.sampler).n_noises(nfe)
            contenders.append(Contender(name, "flow map", nfe, runtime.chunk(nfe), n_noises))
        if settings.diffusion:
            network = runtime.network()
            for sampler, nfe in DIFFUSIONS.items():
                infer = diffusion_chunk(sampler, nfe, policy, network)
                contenders.append(Contender(name, sampler, nfe, infer))
        if name == "eager" and policy.spec.images:
            contenders.append(Contender(name, _ENCODER, 0, _encoder_alone(policy)))
    return contenders


def _encoder_alone(policy: ConsistencyPolicy) -> Infer:
    """Observations to features, without a network evaluation."""

    @torch.inference_mode()
    def encode(obs: Obs, noise: object) -> Array:
        tensors = obs_tensors(policy.spec, obs, policy.dtype, policy.device)
        features: Array = policy.encode(tensors).cpu().numpy()
        return features

    return encode


def time_calls(
    contenders: list[Contender], policy: ConsistencyPolicy, settings: LatencySettings
) -> None:
    """Fill in the times: short blocks of calls in turn, so that all meet the same machine.

    The first call of a block has no time: the others before it have emptied the cache, which a
    policy that runs alone finds full. A contender ends after ``calls`` times or ``seconds``.
    """
    rng = np.random.default_rng(settings.seed)
    obs, _ = example_inputs(policy, 1, settings.seed)
    arrays = {key: value.numpy() for key, value in zip(policy.spec.obs, obs, strict=True)}
    lengths = []
    for contender in contenders:
        first = [_call(contender, arrays, policy, rng)]
        while len(first) < _WARMUP_CALLS and sum(first) < _WARMUP_SECONDS:
            first.append(_call(contender, arrays, policy, rng))
        lengths.append(max(1, min(50, int(_BLOCK_SECONDS / min(first)))))
    waiting = list(zip(contenders, lengths, strict=True))
    while waiting:
        for contender, length in waiting:
            for call in range(length + 1):
                seconds = _call(contender, arrays, policy, rng)
                contender.spent += seconds
                if call > 0 or length == 1:
                    contender.times.append(seconds * 1e3)
                if _is_done(contender, settings):
                    break
        waiting = [(c, length) for c, length in waiting if not _is_done(c, settings)]


def _is_done(contender: Contender, settings: LatencySettings) -> bool:
    calls = len(contender.times)
    enough = calls >= min(_FEWEST_CALLS, settings.calls)
    return calls >= settings.calls or (enough and contender.spent > settings.seconds)


def _call(
    contender: Contender, obs: Obs, policy: ConsistencyPolicy, rng: np.random.Generator
) -> float:
    """Seconds; numpy comes back, so a GPU has finished."""
    shape = policy.spec.noise_shape_of(contender.n_noises)
    noise = rng.standard_normal((1, *shape), dtype=np.float32)
    start = time.perf_counter()
    contender.infer(obs, noise)
    return time.perf_counter() - start


def _policy(
    settings: LatencySettings, networks: Networks | None, device: torch.device
) -> ConsistencyPolicy:
    if settings.policy is not None:
        return ConsistencyPolicy.from_pretrained(settings.policy, device=device)
    if networks is None:
        raise ConfigError(f"net={settings.net} was given without the settings of its networks")
    net, encoder = networks
    spec = _CAMERA_SPEC if isinstance(encoder, ImageEncoderConfig) else _SPEC
    shapes = {**spec.states, "action": (spec.action_dim,)}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(settings.seed)
        policy = ConsistencyPolicy(spec, net, Normalizer.identity(shapes), encoder=encoder)
        for parameter in policy.parameters():  # none stays zero, which is quicker to multiply
            nn.init.normal_(parameter, std=0.02)
    policy.lay_out_for_inference()
    return policy.to(device).eval().requires_grad_(False)


def _columns(floor: Floor | None) -> tuple[str, ...]:
    names = ("runtime", "method", "evaluations", "calls", "p50 ms", "p99 ms", "chunks/s")
    return names if floor is None else (*names, "p50/floor")


def _row(contender: Contender, floor: Floor | None) -> tuple[Cell, ...]:
    c = contender
    row = (c.runtime, c.method, c.nfe, len(c.times), c.p50, c.p99, 1e3 / c.p50)
    if floor is None:
        return row
    return (*row, c.p50 / (c.nfe * floor.ms) if c.nfe else "-")


def _summary(contenders: list[Contender], floor: Floor | None) -> Mapping[str, float]:
    summary: dict[str, float] = {}
    for c in contenders:
        kind = "" if c.method == "flow map" else f"{c.method}_"
        summary[f"{c.runtime}_{kind}p50_ms_nfe{c.nfe}"] = c.p50
        summary[f"{c.runtime}_{kind}p99_ms_nfe{c.nfe}"] = c.p99
    for runtime, (least, *others) in _by_runtime(contenders).items():
        for other in others:
            kind = "" if other.method == "flow map" else f"{other.method}_"
            summary[f"{runtime}_ratio_{kind}{other.nfe}_to_{least.nfe}"] = other.p50 / least.p50
    if floor is not None:
        summary |= {
            "floor_ms": floor.ms,
            "floor_memory_ms": floor.memory_ms,
            "floor_compute_ms": floor.compute_ms,
            "weight_bytes": float(floor.bytes),
            "bandwidth_bytes_per_s": floor.bandwidth,
            "flops": float(floor.flops),
            "flop_per_s": floor.rate,
        }
    return summary


def _closing(contenders: list[Contender], floor: Floor | None) -> tuple[str, ...]:
    lines = [] if floor is None else [str(floor)]
    for runtime, (least, *others) in _by_runtime(contenders).items():
        times = f"p50 {least.p50:.2f} ms, p99 {least.p99:.2f} ms"
        above = (
            "" if floor is None else f", {least.p50 / (least.nfe * floor.ms):.1f} times its floor"
        )
        lines.append(f"{runtime}: {least.nfe} evaluation(s) {times}{above}")
        for other in others:
            ratio = other.p50 / least.p50
            what = f"{other.nfe} evaluations ({other.method}) cost {ratio:.1f}"
            if other.method == _ENCODER:
                what = f"the encoder alone costs {ratio:.2f}"
            lines.append(f"  {what} times as much as {least.nfe}")
    return tuple(lines)


def _by_runtime(contenders: list[Contender]) -> dict[str, list[Contender]]:
    """Rows of each runtime, the one of the fewest evaluations of the flow map first."""
    found: dict[str, list[Contender]] = {}
    for contender in contenders:
        found.setdefault(contender.runtime, []).append(contender)
    return {
        runtime: sorted(rows, key=lambda c: (c.method != "flow map", c.nfe))
        for runtime, rows in found.items()
    }
