"""The settings of any training run, as frozen dataclasses that are valid once they exist.

All lengths of a run (``examples``, ``warmup``, ``every``) count training examples, never steps or
epochs. What a policy's run has beside these is in :mod:`cmpolicy.experiment.config`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, Self

from cmpolicy.schema import (
    ConfigError,
    at_least,
    from_mapping,
    plain,
    positive,
)

Precision = Literal["auto", "fp32", "bf16"]


@dataclass(frozen=True, kw_only=True)
class OptimConfig:
    """AdamW with warm-up and a learning-rate schedule.

    Args:
        lr: highest learning rate.
        betas, eps, weight_decay: of AdamW (Loshchilov and Hutter 2019).
        warmup: examples over which the rate rises linearly from 0.
        schedule: ``cosine`` falls to 0 at the end of the run, ``constant`` stays.
        begin: examples after which warm-up and decay begin; set where a run goes on with
            ``schedule=restart``.
        grad_clip: the gradient is scaled down to this norm; null leaves it.
    """

    lr: float = 1e-3
    betas: tuple[float, ...] = (0.9, 0.999)
    eps: float = 1e-8
    weight_decay: float = 1e-6
    warmup: int = 12_800
    schedule: Literal["cosine", "constant"] = "cosine"
    begin: int = 0
    grad_clip: float | None = 1.0

    def __post_init__(self) -> None:
        positive("optim.lr", self.lr)
        positive("optim.eps", self.eps)
        at_least("optim.weight_decay", self.weight_decay, 0)
        at_least("optim.warmup", self.warmup, 0)
        at_least("optim.begin", self.begin, 0)
        if len(self.betas) != 2 or not all(0 <= b < 1 for b in self.betas):
            raise ConfigError(f"optim.betas must be two numbers in [0, 1), got {list(self.betas)}")
        positive("optim.grad_clip", self.grad_clip)


@dataclass(frozen=True, kw_only=True)
class EmaConfig:
    """Moving average of the weights, ``diffusers.training_utils.EMAModel``'s schedule.

    At step k the decay is ``1 - (1 + k / inv_gamma)^-power``, kept within [min_decay, decay].

    Args:
        decay: the longest memory, reached after the warm-up.
        min_decay: the shortest.
        inv_gamma, power: how fast the memory grows.
    """

    decay: float = 0.998
    min_decay: float = 0.0
    inv_gamma: float = 1.0
    power: float = 0.75

    def __post_init__(self) -> None:
        if not 0 <= self.min_decay <= self.decay < 1:
            raise ConfigError(
                f"ema.min_decay={self.min_decay} and ema.decay={self.decay} must be in order and "
                "in [0, 1)"
            )
        positive("ema.inv_gamma", self.inv_gamma)
        positive("ema.power", self.power)


@dataclass(frozen=True, kw_only=True)
class EvalSchedule:
    """Evaluation during training; always of the EMA weights.

    Args:
        every: examples between evaluations; one more is made at the end.
        nfe: network evaluations per generated sample; it is saved with the model. null takes the
            objective's own number: 1, and 10 for flow matching.
    """

    every: int = 128_000
    nfe: int | None = None

    def __post_init__(self) -> None:
        for name in ("every", "nfe"):
            at_least(f"eval.{name}", getattr(self, name), 1)


@dataclass(frozen=True, kw_only=True)
class EvalConfig(EvalSchedule):
    """Evaluation of a policy during training.

    Args:
        episodes: rollouts per evaluation, 0 for none; a task without a simulator makes none.
        first_seed: rollouts use the seeds first_seed, first_seed + 1, ... They are for tuning and
            for choosing the best policy, so they must not be those of the protocol.
        workers: simulator processes.
        env_timeout: seconds that a simulator has for a reset or the steps of one chunk of actions.
        windows: at most this many held-out windows are scored.
    """

    episodes: int = 20
    first_seed: int = 500_000
    workers: int = 2
    env_timeout: float = 120.0
    windows: int = 1024

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("workers", "windows"):
            at_least(f"eval.{name}", getattr(self, name), 1)
        at_least("eval.episodes", self.episodes, 0)
        positive("eval.env_timeout", self.env_timeout)
        at_least("eval.first_seed", self.first_seed, 0)


@dataclass(frozen=True, kw_only=True)
class LogConfig:
    """What is written while training. The JSON lines (``log.jsonl``) always are.

    Args:
        every: examples between entries; device numbers are read only then.
        trackers: where the numbers go beside the JSON lines: ``tensorboard``, ``wandb``; both need
            their package.
        progress: a progress bar; null shows one on a terminal only.
    """

    every: int = 12_800
    trackers: tuple[Literal["tensorboard", "wandb"], ...] = ("tensorboard",)
    progress: bool | None = None

    def __post_init__(self) -> None:
        at_least("log.every", self.every, 1)


@dataclass(frozen=True, kw_only=True)
class LoopConfig:
    """What the training loop itself needs; the same for policies and for any other model.

    Args:
        examples: training examples seen in the whole run.
        batch_size: examples per step and process; with R processes a step sees R times as many.
        seed: of weights, data order, noise and times.
        precision: ``bf16`` runs the network under autocast; ``auto`` is bf16 on GPUs
            and on CPUs with AMX (1.7 times the speed there; AVX512-BF16 alone is slower than fp32).
        device: ``auto`` takes the GPU if there is one.
        compile: torch.compile the network; takes minutes once, pays off in long runs.
        save_every: examples between training states on disk.
    """

    examples: int = 256_000
    batch_size: int = 128
    seed: int = 0
    precision: Precision = "auto"
    device: Literal["auto", "cpu", "cuda"] = "auto"
    compile: bool = False
    save_every: int = 64_000
    optim: OptimConfig = field(default_factory=OptimConfig)
    ema: EmaConfig = field(default_factory=EmaConfig)
    eval: EvalSchedule = field(default_factory=EvalSchedule)
    log: LogConfig = field(default_factory=LogConfig)

    def __post_init__(self) -> None:
        for name in ("examples", "batch_size", "save_every"):
            at_least(name, getattr(self, name), 1)
        at_least("seed", self.seed, 0)
        if self.examples < self.batch_size:
            raise ConfigError(
                f"examples={self.examples} is less than one batch (batch_size={self.batch_size}); "
                "raise examples or lower batch_size"
            )
        if self.optim.warmup >= self.examples - self.optim.begin:
            after = f" after optim.begin={self.optim.begin}" if self.optim.begin else ""
            raise ConfigError(
                f"optim.warmup={self.optim.warmup} leaves nothing of examples={self.examples}"
                f"{after}; it counts examples, not steps"
            )

    @classmethod
    def from_mapping(cls, data: Mapping[str, Any]) -> Self:
        """Read and check a whole configuration.

        Raises:
            ConfigError: with the dotted key, the value, and what to do.
        """
        return from_mapping(cls, data)

    def to_dict(self) -> dict[str, Any]:
        """Plain values; :meth:`from_mapping` is its inverse."""
        values: dict[str, Any] = plain(self)
        return values
