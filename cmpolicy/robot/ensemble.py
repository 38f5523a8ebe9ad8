"""Temporal ensembling: the action of a tick as a weighted mean of all plans that reach it."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cmpolicy.robot.schedule import Window

Array = NDArray[Any]


class TemporalEnsemble:
    """Running weighted mean of the plans made on every tick, as in ACT (Zhao et al., RSS 2023).

    The action of a tick is ``sum_i w_i a_i / sum_i w_i`` over the plans that hold one for it,
    oldest (i = 0) first, with ``w_i = exp(-coefficient * i)``::

        plan of tick 0    a  a  a  a
        plan of tick 1       a  a  a  a           P = 4: tick 3 is the mean of four plans
        plan of tick 2          a  a  a  a
        plan of tick 3             a  a  a  a

    Above 0 the oldest plan weighs most (ACT takes 0.01), 0 is the plain mean, below 0 the newest
    weighs most. Only the mean is kept, (P, A) in float64: when a plan is the (n + 1)-th to
    reach a tick, its share of that tick's mean is ``w_n / (w_0 + ... + w_n)``.

    Args:
        window: of the policy; its rotations are averaged as rotations.
        coefficient: see above.

    Raises:
        ValueError: ``coefficient`` is not finite, or it is unknown whether actions hold rotations.
    """

    def __init__(self, window: Window, coefficient: float) -> None:
        if not math.isfinite(coefficient):
            raise ValueError(f"ensemble={coefficient} must be a finite number, e.g. 0.01 as in ACT")
        if window.rotations is None:
            raise ValueError(
                f"ensemble={coefficient} averages plans, and the policy does not say which action "
                "dimensions are rotations, which must not be averaged number by number; train it "
                "with data.action_rotations ([] where none is)"
            )
        n_plan_steps = window.n_plan_steps
        self._mean = np.zeros((n_plan_steps, window.action_dim))
        self._mix = window.mix
        # w_n / (w_0 + ... + w_n) = 1 / sum_{j <= n} exp(coefficient * j): no weight underflows
        with np.errstate(over="ignore"):
            share = 1 / np.cumsum(np.exp(coefficient * np.arange(n_plan_steps)))
        # shares[t][k]: of the newest plan in the action k ticks ahead; P - 1 - k older ones reach
        # there, as soon as so many were made.
        earlier = np.arange(n_plan_steps)[::-1]
        self._shares = [share[np.minimum(earlier, t), None] for t in range(n_plan_steps)]
        self._ticks = 0

    def reset(self) -> None:
        """Forget all plans."""
        self._ticks = 0

    def add(self, plan: Array) -> Array:
        """Take in this tick's plan (P, A); the action of this tick, (A,) float32."""
        mean = self._mean
        if self._ticks == 0:
            mean[...] = plan
        else:
            mean[:-1] = mean[1:]  # a tick has passed
            mean[...] = self._mix(mean, plan, self._shares[min(self._ticks, len(self._shares) - 1)])
            mean[-1] = plan[-1]
        self._ticks += 1
        action: Array = mean[0].astype(np.float32)
        return action
