"""Push-T episodes in simulated time, with a policy whose answers take a given time.

The scheduling is the control loop's own (:mod:`cmpolicy.robot.schedule`); only the clock is
simulated. Many episodes advance in lock step, so that their inferences share batched calls.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cmpolicy.robot.policy import ChunkPolicy, plan_window, warm_plan
from cmpolicy.robot.schedule import Planner, Schedule
from cmpolicy.robot.worker import NoiseSource, ask
from cmpolicy_envs.realtime_pusht import CONTROL_HZ, SUBSTEPS, LateActions
from cmpolicy_eval.episode import ChunkOutcome
from cmpolicy_eval.policy import check_policy_fits
from cmpolicy_eval.pool import Command, EnvPool, Reset, Step
from cmpolicy_eval.progress import progress_bar
from cmpolicy_eval.protocol import EvalProtocol
from cmpolicy_eval.rollout import EpisodeResult

Array = NDArray[np.float32]

BATCH_SIZE = 50
"""Rows of every policy call, as in ``rollout``: part of what a result is reproducible from."""


@dataclass(frozen=True)
class DelayedEpisodes:
    """Results in the order of the seeds, and what became of the delay in all of them."""

    episodes: tuple[EpisodeResult, ...]
    held_share: float
    """Share of the ticks on which no new action was there, and the last one was held."""


@dataclass
class _Slot:
    seed: int
    outcome: ChunkOutcome
    planner: Planner
    noise: NoiseSource
    last: Array
    plan: Array | None = None  # under way
    taken: float = 0.0  # when it is taken, in ticks
    held: int = 0
    infer_ms: list[float] = field(default_factory=list)


def delayed_rollout(
    policy: ChunkPolicy,
    protocol: EvalProtocol,
    seeds: Sequence[int],
    *,
    schedule: Schedule,
    delay_ms: float,
    n_workers: int = 1,
    progress: str | None = None,
) -> DelayedEpisodes:
    """One Push-T episode per seed.

    Until the first action is there the agent is held where it starts. An episode's noise comes from
    its seed alone, as in ``rollout``, whose episodes these are at no delay.

    Args:
        policy: of Push-T.
        protocol: initial states and number of steps.
        seeds: of the episodes.
        schedule: what the control loop would be given.
        delay_ms: from an observation to its plan, in steps of 10 ms (the physics).
        n_workers: simulator processes; 0 means this one.
        progress: label of a progress bar.

    Raises:
        PolicyMismatchError: the policy is not one of Push-T.
        RolloutError: a simulator failed; names the seed.
    """
    keys = _checked_keys(policy, protocol)
    results: list[EpisodeResult] = []
    held = 0
    with (
        progress_bar(len(seeds), desc=progress, unit="episode", disable=progress is None) as bar,
        EnvPool(
            LateActions,
            n_envs=min(BATCH_SIZE, len(seeds)),
            n_workers=n_workers,
            n_obs_steps=policy.n_obs_steps,
            max_steps=protocol.max_steps,
        ) as pool,
    ):
        for group in _groups(seeds, BATCH_SIZE):
            slots = _start(group, policy, protocol, schedule, pool)
            _play(slots, policy, keys, delay_ms * CONTROL_HZ / 1e3, protocol.max_steps, pool)
            held += sum(slot.held for slot in slots)
            results += [_result(slot) for slot in slots]
            bar.update(len(group))
    return DelayedEpisodes(tuple(results), held / sum(result.length for result in results))


def _checked_keys(policy: ChunkPolicy, protocol: EvalProtocol) -> tuple[str, ...]:
    env = protocol.make_env()
    try:
        return check_policy_fits(policy, env.observation_space, env.action_space)
    finally:
        env.close()


def _groups(seeds: Sequence[int], size: int) -> Iterator[Sequence[int]]:
    for start in range(0, len(seeds), size):
        yield seeds[start : start + size]


def _start(
    seeds: Sequence[int],
    policy: ChunkPolicy,
    protocol: EvalProtocol,
    schedule: Schedule,
    pool: EnvPool,
) -> list[_Slot]:
    window = plan_window(policy)
    commands: list[Command] = [
        Reset(index, seed, protocol.reset_options(seed)) for index, seed in enumerate(seeds)
    ]
    outcomes = pool.run(commands, seeds)
    return [
        _Slot(
            seed,
            outcome,
            schedule.planner(window),
            NoiseSource(policy.spec.noise_shape, seed),
            last=np.array(outcome.obs["agent_pos"][-1]),
        )
        for seed, outcome in zip(seeds, outcomes, strict=True)
    ]


def _play(
    slots: Sequence[_Slot],
    policy: ChunkPolicy,
    keys: Sequence[str],
    delay: float,
    max_steps: int,
    pool: EnvPool,
) -> None:
    """All episodes to their ends; ``delay`` in ticks."""
    for tick in range(max_steps):
        active = [(index, slot) for index, slot in enumerate(slots) if not slot.outcome.done]
        if not active:
            return
        due = [slot for _, slot in active if slot.planner.due(tick)]
        if due:
            _infer(due, policy, keys, tick, delay)
        actions = [_action(slot, tick, delay) for _, slot in active]
        commands: list[Command] = [
            Step(index, action[None]) for (index, _), action in zip(active, actions, strict=True)
        ]
        outcomes = pool.run(commands, [slot.seed for _, slot in active])
        for (_, slot), outcome in zip(active, outcomes, strict=True):
            slot.outcome = outcome


def _infer(
    due: Sequence[_Slot], policy: ChunkPolicy, keys: Sequence[str], tick: int, delay: float
) -> None:
    rows = [due[min(row, len(due) - 1)] for row in range(BATCH_SIZE)]
    obs = {key: np.stack([slot.outcome.obs[key] for slot in rows]) for key in keys}
    noise = np.zeros((BATCH_SIZE, *policy.spec.noise_shape), np.float32)
    for row, slot in zip(noise, due, strict=False):
        row[...] = slot.noise.draw()[0]
    before = [warm_plan(policy, slot.planner.running(tick)) for slot in due]
    none = np.full((1, *policy.spec.noise_shape), np.nan)
    plan = np.concatenate([none if each is None else each for each in before])
    rest = none.repeat(BATCH_SIZE - len(due), 0)
    is_warm = any(each is not None for each in before)
    start = time.perf_counter()
    plans = ask(policy, obs, noise, np.concatenate([plan, rest]) if is_warm else None)
    elapsed_ms = (time.perf_counter() - start) * 1e3
    for plan, slot in zip(plans, due, strict=False):
        slot.planner.begin(tick)
        slot.plan = plan
        slot.taken = slot.planner.taken_at(tick + delay)
        slot.infer_ms.append(elapsed_ms)


def _action(slot: _Slot, tick: int, delay: float) -> Array:
    """What :class:`LateActions` is to do on this tick."""
    late = 0.0
    if slot.plan is not None and math.floor(slot.taken) <= tick:
        late = slot.taken - math.floor(slot.taken)
        slot.planner.measured(delay)
        slot.planner.arrive(tick, slot.plan)
        slot.plan = None
    before, action = slot.last, slot.planner.choose(tick)
    if action is None:
        slot.held += 1
        action = before
    slot.last = np.array(action, np.float32)
    return np.concatenate([[round(late * SUBSTEPS)], before, slot.last]).astype(np.float32)


def _result(slot: _Slot) -> EpisodeResult:
    outcome: Any = slot.outcome
    return EpisodeResult(
        slot.seed, outcome.score, outcome.success, outcome.length, tuple(slot.infer_ms)
    )
