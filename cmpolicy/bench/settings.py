"""Settings of the benchmarks."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from cmpolicy.schema import ConfigError

RuntimeName = Literal["eager", "compiled", "pt2", "onnx"]


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
        _at_least("pairs", self.pairs, 1)
        _at_least("warmup", self.warmup, 0)
        _at_least("threads", self.threads or 1, 1)


@dataclass(frozen=True, kw_only=True)
class LatencySettings:
    """Of ``latency``.

    Args:
        policy: bundle directory, bundled name or hub id.
        net: instead of it a preset such as ``large``, with random weights on Push-T's sizes.
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
        if not self.nfe:
            raise ConfigError("nfe=[] names no number of evaluations; give nfe=[1,2,4,10,100]")
        for nfe in self.nfe:
            _at_least("nfe", nfe, 1)
        if self.runtimes == ():
            raise ConfigError("runtimes=[] names no runtime; give runtimes=[eager,onnx]")
        exported = sorted({"pt2", "onnx"} & set(self.runtimes or ()))
        if exported and self.device != "cpu":
            raise ConfigError(
                f"runtimes={exported} run on the CPU, not on device={self.device}; give "
                "runtimes=[eager,compiled]"
            )
        _at_least("calls", self.calls, 1)
        _at_least("threads", self.threads or 1, 1)
        _at_least("seed", self.seed, 0)

    @property
    def chosen_runtimes(self) -> tuple[RuntimeName, ...]:
        """What :attr:`runtimes` says or leaves open; each once."""
        default: tuple[RuntimeName, ...] = ("eager", "onnx") if self.device == "cpu" else ("eager",)
        return tuple(dict.fromkeys(self.runtimes or default))


@dataclass(frozen=True, kw_only=True)
class RolloutSettings:
    """Of ``rollout``.

    Args:
        policy: bundle directory, bundled name or hub id.
        protocol: of the evaluation; null takes the policy's own.
        task: of ``robomimic-ph``; null takes the policy's own.
        bare_steps: of a bare robosuite environment, timed to compare with: one before and after a
            Robomimic evaluation, then as many at once as there are workers; 0 leaves that out.
        episodes: how many, from ``first_seed`` on.
        first_seed: of the initial states; the default is not one of the protocol's own.
        nfe: network evaluations per chunk.
        workers: simulator processes; null takes one per core.
        device: where the policy runs.
        out: JSON file.
    """

    policy: str
    protocol: str | None = None
    task: str | None = None
    bare_steps: int = 200
    episodes: int = 50
    first_seed: int = 500_000
    nfe: int = 1
    workers: int | None = None
    device: str = "cpu"
    out: str = "outputs/bench/rollout.json"

    def __post_init__(self) -> None:
        for name in ("episodes", "nfe"):
            _at_least(name, getattr(self, name), 1)
        for name in ("first_seed", "bare_steps"):
            _at_least(name, getattr(self, name), 0)
        _at_least("workers", self.workers or 1, 1)


@dataclass(frozen=True, kw_only=True)
class ServerSettings:
    """Of ``server``; policy and server run on one CPU thread each.

    Args:
        policy: bundle directory, bundled name or hub id.
        nfe: network evaluations per chunk.
        pairs: measured pairs of one call here and one round trip.
        clients: at once.
        seconds: that they ask for.
        fuzz: messages that no client should send.
        seed: of observations, noise and messages.
        out: JSON file.
    """

    policy: str
    nfe: int = 1
    pairs: int = 2000
    clients: int = 16
    seconds: float = 10.0
    fuzz: int = 10_000
    seed: int = 0
    out: str = "outputs/bench/server.json"

    def __post_init__(self) -> None:
        for name in ("nfe", "pairs", "clients", "fuzz"):
            _at_least(name, getattr(self, name), 1)
        _at_least("seed", self.seed, 0)
        if not self.seconds > 0:
            raise ConfigError(f"seconds={self.seconds} must be above 0")


def _at_least(name: str, value: int, least: int) -> None:
    if value < least:
        raise ConfigError(f"{name}={value} must be at least {least}")
