"""Optimizer, learning-rate schedule and moving average: libraries, thinly."""

from __future__ import annotations

import copy
from collections.abc import Iterable

import torch
from diffusers.optimization import get_scheduler
from diffusers.training_utils import EMAModel
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR

from cmpolicy.training.config import EmaConfig, OptimConfig


def build_optimizer(parameters: Iterable[Tensor], config: OptimConfig) -> torch.optim.AdamW:
    """Fused AdamW: one kernel for all weights, also on the CPU, that can skip a step by itself."""
    beta1, beta2 = config.betas
    return torch.optim.AdamW(
        parameters,
        lr=config.lr,
        betas=(beta1, beta2),
        eps=config.eps,
        weight_decay=config.weight_decay,
        fused=True,
    )


def build_schedule(
    optimizer: torch.optim.Optimizer, config: OptimConfig, *, examples: int, step_examples: int
) -> LambdaLR:
    """Warm-up and decay over a run of ``examples``, ``step_examples`` of them per step."""
    name = "cosine" if config.schedule == "cosine" else "constant_with_warmup"
    schedule: LambdaLR = get_scheduler(
        name,
        optimizer,
        num_warmup_steps=-(-config.warmup // step_examples),
        num_training_steps=-(-(examples - config.begin) // step_examples),
    )
    if config.begin:
        first, rate = config.begin // step_examples, schedule.lr_lambdas[0]
        schedule.lr_lambdas = [lambda step: rate(max(0, step - first))]
    return schedule


class ModelEma:
    """A second model whose weights are the moving average of the first's.

    The averaging and its warm-up are ``diffusers``' EMAModel; the averaged weights live directly
    in :attr:`model`, which is thus ready to be evaluated, saved, or used as a teacher at any time.
    Buffers, such as the statistics of a batch norm, are the first's as they are.

    Args:
        source: begins as its own average.
        config: how fast the average follows.
        model: averaged weights to go on with, in place of a copy of ``source``.
    """

    def __init__(
        self, source: nn.Module, config: EmaConfig, model: nn.Module | None = None
    ) -> None:
        model = copy.deepcopy(source) if model is None else model
        self.model = model.eval().requires_grad_(False)
        self._average = EMAModel(
            [],
            decay=config.decay,
            min_decay=config.min_decay,
            use_ema_warmup=True,
            inv_gamma=config.inv_gamma,
            power=config.power,
            foreach=True,
        )
        self._average.shadow_params = [p.detach() for p in self.model.parameters()]

    def step(self, source: nn.Module) -> None:
        """Move the average towards ``source``'s weights of this step."""
        self._average.step(source.parameters())
        for mine, theirs in zip(self.model.buffers(), source.buffers(), strict=True):
            mine.copy_(theirs)

    @property
    def counter(self) -> int:
        """Steps so far; the warm-up depends on it, so it must survive a resume."""
        return int(self._average.optimization_step)

    @counter.setter
    def counter(self, value: int) -> None:
        self._average.optimization_step = value

    @property
    def decay(self) -> float:
        """The decay of the step ``counter``."""
        return float(self._average.get_decay(self.counter))


def jump_schedule(schedule: LambdaLR, steps: int) -> None:
    """Set a schedule to where it is after ``steps`` steps (its base rate stays the configured)."""
    schedule.last_epoch = steps
    rates = [b * f(steps) for b, f in zip(schedule.base_lrs, schedule.lr_lambdas, strict=True)]
    for group, rate in zip(schedule.optimizer.param_groups, rates, strict=True):
        group["lr"] = rate
    schedule._last_lr = rates
