"""Episodes of a policy in many environments at once.

Environments run in several processes, the policy runs here, on all of them in one batched call::

    round     0         1         2           Ta actions per round, To observations per call
    slot 0    seed a .. seed a .. seed a done -> next seed
    slot 1    seed b .. done -> seed d ..     (freed slots take seeds in order)
    slot 2    seed c .. seed c .. seed c      (no seed left: the slot stays frozen)

Every call has exactly ``batch_size`` rows (frozen and unused ones are repeated observations), and
the noise of a row comes from its seed, the plan it starts from (``policy.warm_start``) from its
episode. A network's batched arithmetic rounds by the shape of the batch, not by the place of a row
in it, so the result of an episode depends on its seed and the batch size alone: not on the number
of processes, nor on which other seeds run.
"""

import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray

from cmpolicy_eval.episode import Array, ChunkOutcome, MakeEnv
from cmpolicy_eval.policy import ActionChunkPolicy, PolicyMismatchError, check_policy_fits
from cmpolicy_eval.pool import DEFAULT_TIMEOUT, Command, EnvPool, Reset, RolloutError, Step
from cmpolicy_eval.progress import progress_bar

__all__ = ["EpisodeResult", "RolloutError", "rollout", "try_out"]


DEFAULT_BATCH_SIZE = 50
"""Rows per policy call; part of what a result is reproducible from."""


@dataclass(frozen=True)
class EpisodeResult:
    """One episode: ``score`` is the largest reward, ``length`` the number of environment steps."""

    seed: int
    score: float
    success: bool
    length: int
    infer_ms: tuple[float, ...]
    """Duration of each policy call of the episode, ms, for the whole batch it was part of."""
    chunks: Array | None = field(default=None, repr=False, compare=False)
    """(calls, Ta, A) chunks handed to the environment, if they were asked for."""
    plans: Array | None = field(default=None, repr=False, compare=False)
    """(calls, P, A) what was planned at each call, whose first Ta actions are the chunk; None where
    the chunks were not asked for or the policy has no ``infer_plan``."""

    @property
    def infer_ms_p50(self) -> float:
        """Median duration of a policy call, ms."""
        return float(np.median(self.infer_ms))


@dataclass
class _Slot:
    """The episode that occupies an environment; ``outcome`` outlives it (a frozen slot)."""

    outcome: ChunkOutcome
    position: int
    seed: int
    rng: np.random.Generator
    active: bool = True
    infer_ms: list[float] = field(default_factory=list)
    chunks: list[Array] = field(default_factory=list)
    plans: list[Array] = field(default_factory=list)
    plan: Array | None = None  # (P, A) of the newest call, if the policy tells it


def rollout(
    make_env: MakeEnv,
    policy: ActionChunkPolicy,
    seeds: Sequence[int],
    *,
    max_steps: int,
    reset_options: Callable[[int], dict[str, Any] | None] | None = None,
    n_workers: int | None = None,
    batch_size: int = DEFAULT_BATCH_SIZE,
    keep_chunks: int = 0,
    env_timeout: float = DEFAULT_TIMEOUT,
    progress: str | None = None,
) -> list[EpisodeResult]:
    """Run one episode per seed.

    Args:
        make_env: makes one environment (Dict observations, Box actions, ``info["is_success"]``).
        policy: the policy; see :class:`ActionChunkPolicy` for the attributes that are honoured.
        seeds: of the episodes; ``env.reset(seed=seed)``, and the policy's noise, if it takes any,
            is drawn from ``numpy.random.default_rng(seed)``.
        max_steps: episodes end after so many steps.
        reset_options: options of ``env.reset`` for a seed.
        n_workers: processes for the environments (default: CPU count); 0 means this process, in
            which no time limit holds.
        batch_size: rows of every policy call, and so the largest number of episodes at a time.
        keep_chunks: keep the action chunks of the first so many seeds, for a video.
        env_timeout: seconds that an environment has for a reset or for the steps of one chunk.
        progress: label of a progress bar; None: there is none.

    Returns:
        Results in the order of ``seeds``.

    Raises:
        PolicyMismatchError: the policy does not fit the environment.
        RolloutError: an environment raised, gave no finite observation of the declared form, or
            did not answer in time, its process died, or the policy gave non-finite actions; names
            the seed.
        ValueError: no seeds, or an impossible setting.
    """
    _check_settings(seeds, max_steps=max_steps, n_workers=n_workers, batch_size=batch_size)
    n_slots = min(batch_size, len(seeds))
    options = reset_options or (lambda seed: None)
    results: dict[int, EpisodeResult] = {}
    waiting = list(range(len(seeds)))[::-1]
    bar = progress_bar(len(seeds), desc=progress, unit="episode", disable=progress is None)
    pool = EnvPool(
        make_env,
        n_envs=n_slots,
        n_workers=(os.cpu_count() or 1) if n_workers is None else n_workers,
        n_obs_steps=policy.n_obs_steps,
        max_steps=max_steps,
        timeout=env_timeout,
    )
    with bar, pool:
        keys = check_policy_fits(policy, pool.spaces.observation, pool.spaces.action)
        slots: list[_Slot | None] = [None] * n_slots
        while True:
            _refill(slots, waiting, seeds, options, pool)
            full = cast(list[_Slot], slots)
            active = [index for index, slot in enumerate(full) if slot.active]
            if not active:
                break
            is_kept = any(full[index].position < keep_chunks for index in active)
            chunks, elapsed_ms = _infer(policy, keys, full, batch_size, is_kept)
            commands: list[Command] = [Step(index, chunks[index]) for index in active]
            outcomes = pool.run(
                commands,
                [full[index].seed for index in active],
                [full[index].outcome.length for index in active],
            )
            for index, outcome in zip(active, outcomes, strict=True):
                slot = full[index]
                slot.outcome = outcome
                slot.infer_ms.append(elapsed_ms)
                if slot.position < keep_chunks:
                    slot.chunks.append(chunks[index])
                    if slot.plan is not None:
                        slot.plans.append(slot.plan)
                if outcome.done:
                    slot.active = False
                    results[slot.position] = _result(slot)
                    bar.update()
    return [results[position] for position in range(len(seeds))]


def _refill(
    slots: list[_Slot | None],
    waiting: list[int],
    seeds: Sequence[int],
    options: Callable[[int], dict[str, Any] | None],
    pool: EnvPool,
) -> None:
    """Start waiting episodes in the free slots, in order."""
    started: list[tuple[int, int]] = []
    for index, slot in enumerate(slots):
        if waiting and (slot is None or not slot.active):
            started.append((index, waiting.pop()))
    commands: list[Command] = [
        Reset(index, seeds[position], options(seeds[position])) for index, position in started
    ]
    outcomes = pool.run(commands, [seeds[position] for _, position in started])
    for (index, position), outcome in zip(started, outcomes, strict=True):
        seed = seeds[position]
        slots[index] = _Slot(outcome, position, seed, np.random.default_rng(seed))


def _infer(
    policy: ActionChunkPolicy,
    keys: tuple[str, ...],
    slots: Sequence[_Slot],
    batch_size: int,
    is_kept: bool,
) -> tuple[NDArray[np.float32], float]:
    """Chunks (B, Ta, A), the first rows for the slots, and the duration of the call in ms.

    The slots get the whole plans where the policy starts from them or a video shows them.
    """
    rows = [slots[row] if row < len(slots) else slots[0] for row in range(batch_size)]
    obs = {key: np.stack([slot.outcome.obs[key] for slot in rows]) for key in keys}
    kwargs: dict[str, Any] = {}
    noise_shape = getattr(getattr(policy, "spec", None), "noise_shape", None)
    if noise_shape is not None:
        noise = np.zeros((batch_size, *noise_shape), dtype=np.float32)
        for row, slot in zip(noise, slots, strict=False):
            if slot.active:
                row[...] = slot.rng.standard_normal(noise_shape, dtype=np.float32)
        kwargs["noise"] = noise
    is_warm = getattr(policy, "warm_start", None) is not None
    has_plan = is_warm or (is_kept and hasattr(policy, "infer_plan"))
    infer: Callable[..., Any] = cast(Any, policy).infer_plan if has_plan else policy.infer
    if is_warm:
        kwargs["plan"] = _running_plans(policy, slots, batch_size)
    start = time.perf_counter()
    chunks = np.asarray(infer(obs, **kwargs))
    elapsed_ms = (time.perf_counter() - start) * 1e3
    if has_plan:
        for slot, plan in zip(slots, chunks, strict=False):
            slot.plan = plan
        chunks = chunks[:, : policy.n_action_steps]
    if chunks.ndim != 3 or chunks.shape[:2] != (batch_size, policy.n_action_steps):
        raise PolicyMismatchError(
            f"policy.infer returned shape {chunks.shape} for {batch_size} observations; expected "
            f"(B, Ta, A) = ({batch_size}, {policy.n_action_steps}, action size)"
        )
    for slot, chunk in zip(slots, chunks, strict=False):
        if slot.active and not np.isfinite(chunk).all():
            raise RolloutError(
                f"episode of seed {slot.seed}: the policy gave a non-finite action at step "
                f"{slot.outcome.length}; the weights or the normaliser are broken"
            )
    return chunks, elapsed_ms


def _running_plans(
    policy: ActionChunkPolicy, slots: Sequence[_Slot], batch_size: int
) -> NDArray[np.float64]:
    """(B, T, A): what the call before planned for now; NaN where there was none."""
    spec: Any = cast(Any, policy).spec
    plans = np.full((batch_size, *spec.noise_shape), np.nan)
    for row, slot in zip(plans, slots, strict=False):
        if slot.active and slot.plan is not None:
            row[...] = spec.shifted(slot.plan, policy.n_action_steps)
    return plans


def _result(slot: _Slot) -> EpisodeResult:
    outcome = slot.outcome
    return EpisodeResult(
        seed=slot.seed,
        score=outcome.score,
        success=outcome.success,
        length=outcome.length,
        infer_ms=tuple(slot.infer_ms),
        chunks=np.stack(slot.chunks) if slot.chunks else None,
        plans=np.stack(slot.plans) if slot.plans else None,
    )


def try_out(
    make_env: MakeEnv,
    policy: ActionChunkPolicy,
    seed: int,
    options: dict[str, Any] | None,
    *,
    timeout: float = DEFAULT_TIMEOUT,
) -> None:
    """Make an environment, reset it, and take one step, in the middle of its actions.

    Raises:
        PolicyMismatchError: the policy does not fit; names what it wants and what there is.
        RolloutError: the environment raises, hangs, or gives what is no observation.
    """
    with EnvPool(
        make_env, n_envs=1, n_workers=1, n_obs_steps=1, max_steps=1, timeout=timeout
    ) as pool:
        space = pool.spaces.action
        check_policy_fits(policy, pool.spaces.observation, space)
        pool.run([Reset(0, seed, options)], [seed])
        middle = np.clip(np.zeros(space.shape, np.float32), space.low, space.high)
        pool.run([Step(0, middle[None])], [seed], [0])


def _check_settings(
    seeds: Sequence[int], *, max_steps: int, n_workers: int | None, batch_size: int
) -> None:
    if not seeds:
        raise ValueError("rollout needs at least one seed")
    if len(set(seeds)) != len(seeds):
        repeated = next(seed for seed in seeds if list(seeds).count(seed) > 1)
        raise ValueError(f"rollout: seed {repeated} is given more than once")
    for name, value in (("max_steps", max_steps), ("batch_size", batch_size)):
        if value < 1:
            raise ValueError(f"rollout: {name} must be at least 1, got {value}")
    if n_workers is not None and n_workers < 0:
        raise ValueError(f"rollout: n_workers must be at least 0, got {n_workers}")
