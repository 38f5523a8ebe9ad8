"""ActionChunker: one observation in, one action out; the state of an episode lives here."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cmpolicy.robot.ensemble import TemporalEnsemble
from cmpolicy.robot.history import ObservationHistory
from cmpolicy.robot.noise import NoiseSource
from cmpolicy.robot.policy import ChunkPolicy, plan_window
from cmpolicy.robot.schedule import SyncPlanner

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
    this call: see :class:`~cmpolicy.robot.ensemble.TemporalEnsemble`. Smoother, at Ta times the
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
            plan = self._policy.infer_plan(self._history.obs, self._noise.draw())[0]
            self._calls += 1
            return self._ensemble.add(plan)
        if self._planner.due(tick):
            chunk = self._policy.infer(self._history.obs, self._noise.draw())[0]
            self._planner.begin(tick)
            self._planner.arrive(tick, chunk)
        action = self._planner.choose(tick)
        if action is None:
            raise RuntimeError("a chunk without actions")  # Ta >= 1, so never
        self._calls += 1
        return np.array(action, np.float32)
