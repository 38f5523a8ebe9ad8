"""ActionChunker: one observation in, one action out; the state of an episode lives here."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cmpolicy.robot.history import ObservationHistory
from cmpolicy.robot.policy import ChunkPolicy, plan_window, warm_plan
from cmpolicy.robot.schedule import SyncPlanner, Window
from cmpolicy.robot.worker import NoiseSource, ask

Array = NDArray[Any]


class ActionChunker:
    """Turns a policy of chunks into one of single actions, for a loop of one's own.

    Receding horizon: every Ta-th call runs the policy on the last To observations, the others take
    the next action of the chunk (To = 2, Ta = 4, T = 8)::

        call        0    1    2    3    4    5    6    7    8
        infer       x                   x                   x
        observed  o0 o0            o3  o4             o7   o8     o0 stands for what is missing
        first plan  a0   a1   a2   a3   .    .    .
        second plan                     a0   a1   a2   a3   .

    With ``ensemble`` every call runs the policy, and the action is a mean over all plans that reach
    this call: see :class:`TemporalEnsemble`. Smoother, at Ta times the
    inferences.

    Every chunk has noise of its own, drawn from ``seed``: an episode of ``ActionChunker(policy,
    seed=k)`` is the one that ``cmpolicy eval`` scores for seed k. This class knows no time; against
    latency there is :class:`~cmpolicy.robot.loop.ControlLoop`.

    Args:
        policy: see :class:`~cmpolicy.robot.policy.ChunkPolicy`.
        ensemble: coefficient of temporal ensembling, 0.01 as in ACT; None for receding horizon.
        seed: of the noise; None takes a new one for every episode.

    Raises:
        TypeError: the policy is none.
        ValueError: ``ensemble`` is not finite, or the policy does not say which dimensions of its
            actions are rotations.
    """

    def __init__(
        self, policy: ChunkPolicy, *, ensemble: float | None = None, seed: int | None = None
    ) -> None:
        window = plan_window(policy)
        self._policy = policy
        self._history = ObservationHistory(policy.spec)
        self._noise = NoiseSource(policy.spec.noise_shape, seed)
        self._ensemble = None if ensemble is None else TemporalEnsemble(window, ensemble)
        self._window = window
        self._planner = SyncPlanner(window)
        self._newest: tuple[Array, int] | None = None  # plan of the call before, if ensembling
        self._calls = 0

    def reset(self) -> None:
        """Start an episode as a new chunker would: no history, no chunk, noise from the seed on.

        Episodes of one seed therefore share their noise; take a chunker per episode, or no seed,
        where they should not.
        """
        self._history.reset()
        self._noise.reset()
        if self._ensemble is not None:
            self._ensemble.reset()
        self._planner = SyncPlanner(self._window)
        self._newest = None
        self._calls = 0

    def select_action(self, obs: Mapping[str, Any]) -> Array:
        """The action for this observation.

        Args:
            obs: one step, (...) per key of ``policy.spec.obs``; other keys are left.

        Returns:
            (A,) float32 in env units, the caller's own.

        Raises:
            ObservationError: a key, shape, kind or value that does not fit; the episode can go on
                with another observation.
        """
        self._history.push(obs)
        tick = self._calls
        if self._ensemble is not None:
            plan = self._infer(self._newest)
            self._newest = plan, 1
            self._calls += 1
            return self._ensemble.add(plan)
        if self._planner.due(tick):
            plan = self._infer(self._planner.running(tick))
            self._planner.begin(tick)
            self._planner.arrive(tick, plan)
        action = self._planner.choose(tick)
        if action is None:
            raise RuntimeError("a chunk without actions")  # Ta >= 1, so never
        self._calls += 1
        return np.array(action, np.float32)

    def _infer(self, running: tuple[Array, int] | None) -> Array:
        """A new plan (P, A)."""
        start = warm_plan(self._policy, running)
        plan: Array = ask(self._policy, self._history.obs, self._noise.draw(), start)[0]
        return plan


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
