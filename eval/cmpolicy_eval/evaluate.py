"""A policy under a protocol: rollouts, then the result with where it comes from."""

import importlib.metadata
import platform
import subprocess
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from cmpolicy_eval.policy import ActionChunkPolicy
from cmpolicy_eval.pool import DEFAULT_TIMEOUT
from cmpolicy_eval.protocol import EvalProtocol, get_protocol
from cmpolicy_eval.result import Origin, Result
from cmpolicy_eval.rollout import EpisodeResult, rollout
from cmpolicy_eval.seeds import warn_if_overlapping

_DISTRIBUTIONS = (
    "cmpolicy",
    "torch",
    "numpy",
    "gymnasium",
    "gym-pusht",
    "pymunk",
    "robosuite",
    "robomimic",
    "mujoco",
)


@dataclass(frozen=True)
class ScoredEpisodes:
    """A result and the episodes behind it (with the chunks of the first ``keep_chunks``)."""

    result: Result
    episodes: tuple[EpisodeResult, ...]


def evaluate(
    policy: ActionChunkPolicy,
    protocol: EvalProtocol | str,
    seeds: Sequence[int],
    *,
    nfe: int,
    policy_name: str,
    n_workers: int | None = None,
    batch_size: int | None = None,
    keep_chunks: int = 0,
    env_timeout: float = DEFAULT_TIMEOUT,
    progress: str | None = None,
    device: str = "cpu",
    data: str | None = None,
    training_seeds: Iterable[int] | None = None,
    command: str = "",
) -> ScoredEpisodes:
    """Score a policy that is already set to ``nfe`` evaluations.

    Warns (:class:`~cmpolicy_eval.seeds.SeedOverlapWarning`) when ``seeds`` meet the
    ``training_seeds`` that the policy's ``data`` started from; where these are not known, those of
    the task's public demonstrations. ``batch_size`` None is the protocol's. Arguments and errors
    otherwise as in :func:`rollout`.
    """
    chosen = get_protocol(protocol) if isinstance(protocol, str) else protocol
    if training_seeds is not None:
        warn_if_overlapping(seeds, training_seeds, data or "the policy's data")
    elif chosen.training_seeds is not None:
        first, last = chosen.training_seeds
        warn_if_overlapping(seeds, range(first, last + 1), "the public human demonstrations")
    rows = chosen.batch_size if batch_size is None else batch_size
    episodes = rollout(
        chosen.make_env,
        policy,
        seeds,
        max_steps=chosen.max_steps,
        reset_options=chosen.reset_options,
        n_workers=n_workers,
        batch_size=rows,
        keep_chunks=keep_chunks,
        env_timeout=env_timeout,
        progress=progress,
    )
    result = Result.from_episodes(
        episodes,
        protocol=chosen.name,
        policy=policy_name,
        nfe=nfe,
        batch_size=rows,
        origin=Origin(device, versions(), data, command, git_commit()),
    )
    return ScoredEpisodes(result, tuple(episodes))


def versions(others: Iterable[str] = ()) -> dict[str, str]:
    """Versions of Python and of what can change a score, as far as installed.

    Args:
        others: further distributions to tell the version of.
    """
    found = {"python": platform.python_version()}
    for name in (*_DISTRIBUTIONS, *others):
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def git_commit() -> str | None:
    """Commit of the checkout this code runs from, ``-dirty`` if changed; None outside of one."""
    here = Path(__file__).resolve()
    # Only a checkout that tracks this file: an installed copy may lie within a foreign one.
    if _git(here.parent, "ls-files", "--error-unmatch", here.name) is None:
        return None
    commit = _git(here.parent, "rev-parse", "HEAD")
    changed = _git(here.parent, "status", "--porcelain", "--untracked-files=no")
    return None if commit is None else commit + ("-dirty" if changed else "")


def _git(folder: Path, *arguments: str) -> str | None:
    try:
        done = subprocess.run(
            ["git", "-C", str(folder), *arguments],
            capture_output=True,
            text=True,
            check=False,
            timeout=10,
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None
