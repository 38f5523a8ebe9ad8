"""Averages between two log entries, and the speed of training."""

from __future__ import annotations

import time
from collections.abc import Mapping

import torch
from accelerate import Accelerator
from torch import Tensor


class Meter:
    """Sums of a step's metrics since the last log entry; they stay on the device until read."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.sums: dict[str, Tensor] = {}
        self.steps = 0
        self._counted = 0.0  # seconds up to the last pause of the clock
        self._read_at = 0.0
        self._clock: float | None = None

    def add(self, metrics: Mapping[str, Tensor], grad_norm: Tensor) -> None:
        """Add the scalars of one step."""
        values = {**metrics, "grad_norm": grad_norm.detach()}
        if self.steps == 0:
            # clones: fixed storage for the whole window, and nothing aliases the graph's outputs
            self.sums = {k: v.detach().float().clone() for k, v in values.items()}
            self.sums["grad_norm_max"] = self.sums["grad_norm"].clone()
        else:
            for name, value in values.items():
                self.sums[name] += value
            torch.maximum(
                self.sums["grad_norm_max"], values["grad_norm"], out=self.sums["grad_norm_max"]
            )
        self.steps += 1

    def reduce(self, accelerator: Accelerator) -> None:
        """Average over the processes."""
        if accelerator.num_processes > 1:
            stacked = accelerator.reduce(torch.stack(list(self.sums.values())), "mean")
            self.sums = dict(zip(self.sums, stacked.unbind(), strict=True))

    def read(self, step_examples: int) -> dict[str, float]:
        """Averages and speed of the window, which then starts anew. Waits for the device once."""
        numbers = dict(zip(self.sums, torch.stack(list(self.sums.values())).tolist(), strict=True))
        values = {k: v if k == "grad_norm_max" else v / self.steps for k, v in numbers.items()}
        values["examples_per_s"] = self.steps * step_examples / max(self.window_seconds, 1e-9)
        values["seconds"] = self._read_at = self.seconds
        self.sums, self.steps = {}, 0
        return values

    @property
    def seconds(self) -> float:
        """Training time of the whole run, evaluations not counted."""
        running = 0.0 if self._clock is None else time.perf_counter() - self._clock
        return self._counted + running

    @property
    def window_seconds(self) -> float:
        """Training time since the last reading."""
        return self.seconds - self._read_at

    def restore(
        self, sums: Mapping[str, Tensor], steps: int, seconds: float, window_seconds: float
    ) -> None:
        """Take up a saved window, which had lasted ``window_seconds`` of ``seconds``."""
        self.sums = {k: v.to(self.device) for k, v in sums.items()}
        self.steps = steps
        self._counted = seconds
        self._read_at = seconds - window_seconds

    def pause_clock(self) -> None:
        if self._clock is not None:
            self._counted += time.perf_counter() - self._clock
        self._clock = None

    def resume_clock(self) -> None:
        if self._clock is None:
            self._clock = time.perf_counter()
