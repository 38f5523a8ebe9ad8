"""Wall time of an evaluation: episodes in simulator processes, fed by one batched policy."""

from __future__ import annotations

import os
import time
from dataclasses import asdict

from cmpolicy.cli.benchmarks.latency import available_device
from cmpolicy.cli.benchmarks.report import Report, describe_device
from cmpolicy.cli.benchmarks.settings import RolloutSettings
from cmpolicy.policy.consistency import ConsistencyPolicy
from cmpolicy_eval.evaluate import evaluate


def measure_rollout(settings: RolloutSettings) -> Report:
    """Seconds of a whole evaluation, from starting the processes to the last episode's result.

    Raises:
        BundleError: the policy cannot be loaded.
        ConfigError: no such device.
        ValueError: no such protocol, or the policy does not fit its environment.
    """
    device = available_device(settings.device)
    policy = ConsistencyPolicy.from_pretrained(settings.policy, device=device)
    policy.num_steps = settings.nfe
    workers = settings.workers or os.cpu_count() or 1
    seeds = range(settings.first_seed, settings.first_seed + settings.episodes)
    start = time.perf_counter()
    evaluation = evaluate(
        policy,
        settings.protocol,
        seeds,
        nfe=settings.nfe,
        policy_name=settings.policy,
        n_workers=workers,
        progress="rollout",
    )
    seconds = time.perf_counter() - start
    episodes, result = evaluation.episodes, evaluation.result
    steps = sum(episode.length for episode in episodes)
    row = (len(episodes), workers, settings.nfe, seconds, steps, steps / seconds)
    where = describe_device(device)
    return Report(
        benchmark="rollout",
        title=f"{settings.protocol} rollouts of {settings.policy}\n  on {where}",
        columns=("episodes", "processes", "evaluations", "seconds", "steps", "steps/s"),
        rows=(row,),
        summary={
            "seconds": seconds,
            "score_mean": result.score_mean,
            "success_rate": result.success_rate,
        },
        closing=(
            f"{len(episodes)} episodes in {seconds:.1f} s "
            f"(score {result.score_mean:.3f}, success {result.success_rate:.2f})",
        ),
        settings=asdict(settings),
        device=where,
    )
