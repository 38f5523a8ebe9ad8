"""Wall time of an evaluation: episodes in simulator processes, fed by one batched policy."""

from __future__ import annotations

import multiprocessing
import os
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from multiprocessing.synchronize import Barrier
from statistics import mean
from typing import Any

import numpy as np

from cmpolicy.bench.report import Report
from cmpolicy.experiment.protocols import (
    Simulator,
    open_protocol,
    own_protocol,
    require_protocol,
)
from cmpolicy.policy.policy import ConsistencyPolicy
from cmpolicy.schema import at_least
from cmpolicy.training.device import choose_device, describe_device
from cmpolicy_eval.evaluate import evaluate
from cmpolicy_eval.protocol import ROBOMIMIC, EvalProtocol

_PATIENCE = 120.0  # seconds for the slowest process to build its environment


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
        nfe: network evaluations per chunk; null: the policy's own.
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
    nfe: int | None = None
    workers: int | None = None
    device: str = "cpu"
    out: str = "outputs/bench/rollout.json"

    def __post_init__(self) -> None:
        at_least("nfe", self.nfe, 1)
        at_least("episodes", self.episodes, 1)
        for name in ("first_seed", "bare_steps"):
            at_least(name, getattr(self, name), 0)
        at_least("workers", self.workers or 1, 1)


def measure_rollout(settings: RolloutSettings) -> Report:
    """Seconds of a whole evaluation, from starting the processes to the last episode's result.

    Raises:
        BundleError: the policy cannot be loaded.
        ConfigError: no such device, or nobody says which protocol.
        ValueError: no such protocol, or the policy does not fit its environment.
    """
    device = choose_device(settings.device)
    policy = ConsistencyPolicy.from_pretrained(settings.policy, device=device)
    policy.nfe = settings.nfe or policy.nfe
    protocol, bare_env = _protocol(settings, policy.metadata)
    workers = settings.workers or os.cpu_count() or 1
    seeds = range(settings.first_seed, settings.first_seed + settings.episodes)
    bare = [bare_env.steps_per_s()] if bare_env else []
    start = time.perf_counter()
    evaluation = evaluate(
        policy,
        protocol,
        seeds,
        nfe=policy.nfe,
        policy_name=settings.policy,
        n_workers=workers,
        progress="rollout",
    )
    seconds = time.perf_counter() - start
    bare += [bare_env.steps_per_s()] if bare_env else []
    episodes, result = evaluation.episodes, evaluation.result
    steps = sum(episode.length for episode in episodes)
    row = (len(episodes), workers, policy.nfe, seconds, steps, steps / seconds)
    where = describe_device(device)
    summary = {
        "seconds": seconds,
        "steps_per_s": steps / seconds,
        "score_mean": result.score_mean,
        "success_rate": result.success_rate,
    }
    closing = [
        f"{len(episodes)} episodes in {seconds:.1f} s "
        f"(score {result.score_mean:.3f}, success {result.success_rate:.2f})"
    ]
    if bare_env:
        together = sum(bare_env.at_once(workers))
        rate, made = mean(bare), steps / seconds
        summary |= {
            "bare_steps_per_s": rate,
            "share_of_bare": made / (workers * rate),
            "bare_together_steps_per_s": together,
            "share_of_bare_together": made / together,
        }
        closing += [
            f"one bare robosuite environment makes {rate:.0f} steps/s (before and after: "
            f"{', '.join(f'{one:.0f}' for one in bare)}); {workers} processes with policy and "
            f"resets make {made / (workers * rate):.0%} of {workers} times that",
            f"{workers} bare environments at once make {together:.0f} steps/s on this machine; "
            f"rollouts make {made / together:.0%} of that",
        ]
    return Report(
        benchmark="rollout",
        title=f"{protocol.name} rollouts of {settings.policy}\n  on {where}",
        columns=("episodes", "processes", "evaluations", "seconds", "steps", "steps/s"),
        rows=(row,),
        summary=summary,
        closing=tuple(closing),
        settings=asdict(settings),
        device=where,
    )


def _protocol(
    settings: RolloutSettings, metadata: Mapping[str, Any]
) -> tuple[EvalProtocol, BareEnv | None]:
    """The protocol, and its bare environment, if there is one to compare with."""
    name = require_protocol(settings.protocol or own_protocol(metadata), settings.policy)
    simulator = Simulator.from_mapping(metadata.get("simulator", {}))
    protocol = open_protocol(name, settings.task, simulator)
    task = settings.task or simulator.task
    if name not in ROBOMIMIC or task is None or not settings.bare_steps:
        return protocol, None
    return protocol, BareEnv(task, simulator.env_args, settings.bare_steps)


@dataclass(frozen=True)
class BareEnv:
    """robosuite's own environment, stepped with small random actions; resets are not counted.

    Attributes:
        task: such as ``lift``.
        env_args: robomimic's JSON; None takes the protocol's own.
        steps: that are timed.
    """

    task: str
    env_args: str | None
    steps: int

    def steps_per_s(self, ready: Callable[[], object] = lambda: None) -> float:
        """Of one environment in this process; ``ready`` is called before the clock starts."""
        from cmpolicy_envs.robomimic_args import EnvArgs, default_env_args, translate
        from cmpolicy_envs.robosuite_make import make_robosuite

        given = (
            default_env_args(self.task)
            if self.env_args is None
            else EnvArgs.from_json(self.env_args)
        )
        env = make_robosuite(translate(given))
        rng = np.random.default_rng(0)
        actions = rng.uniform(-0.3, 0.3, (self.steps + 10, len(env.action_spec[0])))
        env.reset()
        for action in actions[:10]:  # compiles what robosuite compiles
            env.step(action)
        ready()
        start = time.perf_counter()
        for action in actions[10:]:
            env.step(action)
        seconds = time.perf_counter() - start
        env.close()
        return self.steps / seconds

    def at_once(self, workers: int) -> list[float]:
        """Of each of ``workers`` processes, which begin together: what the cores really have."""
        context = multiprocessing.get_context("spawn")
        barrier = context.Barrier(workers, timeout=_PATIENCE)
        with ProcessPoolExecutor(
            workers, mp_context=context, initializer=_meet, initargs=(barrier,)
        ) as pool:
            return list(pool.map(_steps_per_s_together, [self] * workers))


_barriers: list[Barrier] = []  # of a process of `BareEnv.at_once`


def _meet(barrier: Barrier) -> None:
    _barriers[:] = [barrier]


def _steps_per_s_together(env: BareEnv) -> float:
    return env.steps_per_s(_barriers[0].wait)
