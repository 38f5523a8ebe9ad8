"""The least time that a processor needs for a network: its weights read once, its products done."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch.utils.flop_counter import FlopCounterMode

from cmpolicy.export.plan_map import PlanMap, example_inputs, example_warm_inputs
from cmpolicy.policy.policy import ConsistencyPolicy

_REPETITIONS = 30
_MATRIX = 1024


@dataclass(frozen=True)
class Floor:
    """Of one evaluation at batch 1, float32.

    Attributes:
        bytes: of the weights that one evaluation reads, once the known times are folded away.
        flops: multiplications and additions of its products.
        bandwidth: bytes/s of a read of so many bytes, again and again: a small net stays in the
            cache, here as there.
        rate: flop/s of a product of square matrices.
    """

    bytes: int
    flops: int
    bandwidth: float
    rate: float

    @property
    def memory_ms(self) -> float:
        """To read the weights."""
        return self.bytes / self.bandwidth * 1e3

    @property
    def compute_ms(self) -> float:
        """To do the products."""
        return self.flops / self.rate * 1e3

    @property
    def ms(self) -> float:
        """The larger of both."""
        return max(self.memory_ms, self.compute_ms)

    def __str__(self) -> str:
        return (
            f"floor of one evaluation: {self.ms:.2f} ms, the larger of {self.memory_ms:.2f} ms "
            f"({self.bytes / 1e6:.1f} MB of weights at {self.bandwidth / 1e9:.1f} GB/s) and "
            f"{self.compute_ms:.2f} ms ({self.flops / 1e6:.0f} MFLOP at "
            f"{self.rate / 1e9:.0f} GFLOP/s)"
        )


def measure_floor(policy: ConsistencyPolicy, nfe: int) -> Floor:
    """Of the policy's network, with torch's present number of threads on the CPU.

    Counted on a chunk of ``nfe`` evaluations; give the fewest that the policy makes.
    """
    policy = copy.copy(policy)  # the weights stay shared
    policy.nfe = nfe  # and so the draws of noise among the inputs
    plan_map = PlanMap(policy)
    size = sum(p.numel() for p in (*plan_map.parameters(), *plan_map.buffers()))
    counter = FlopCounterMode(display=False)
    with torch.inference_mode(), counter:
        plan_map(*example_inputs(policy, 1), *example_warm_inputs(policy, 1))
    stream = torch.ones(size)
    square = torch.ones(_MATRIX, _MATRIX)
    return Floor(
        bytes=4 * size,
        flops=counter.get_total_flops() // nfe,
        bandwidth=4 * size / _seconds(stream.sum),
        rate=2 * _MATRIX**3 / _seconds(lambda: square @ square),
    )


def _seconds(work: Callable[[], object]) -> float:
    """Median, after the first calls."""
    times = []
    for call in range(_REPETITIONS + 3):
        start = time.perf_counter()
        work()
        if call >= 3:
            times.append(time.perf_counter() - start)
    return float(np.median(times))
