"""The result file: one JSON schema for every evaluator.

Keys: protocol, policy, nfe, seeds, episodes [{seed, score, success, length, infer_ms_p50}],
score_mean, score_ci95, success_rate, success_ci95, infer_ms {p50, p99, batch_size}, device,
versions, data, command, git_commit.
"""

import json
import os
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np

from cmpolicy_eval.metrics import (
    Interval,
    PairedDifference,
    bootstrap_interval,
    paired_difference,
    wilson_interval,
)
from cmpolicy_eval.rollout import EpisodeResult


class ResultError(ValueError):
    """A result file that cannot be read, or results that cannot be compared; names the file."""


@dataclass(frozen=True)
class EpisodeScore:
    """One episode as stored."""

    seed: int
    score: float
    success: bool
    length: int
    infer_ms_p50: float


@dataclass(frozen=True)
class InferTime:
    """Duration of a policy call, ms, over the action chunks of all episodes.

    ``batch_size`` is the number of observations per call: this is the cost of scoring, the latency
    of one observation on its own is what ``cmpolicy bench`` measures.
    """

    p50: float
    p99: float
    batch_size: int


@dataclass(frozen=True)
class Origin:
    """Where a result comes from."""

    device: str
    versions: Mapping[str, str]
    data: str | None
    """Training data of the policy."""
    command: str
    git_commit: str | None


@dataclass(frozen=True)
class Result:
    """Scores of one policy at one number of evaluations (NFE) under one protocol."""

    protocol: str
    policy: str
    nfe: int
    seeds: tuple[int, ...]
    episodes: tuple[EpisodeScore, ...]
    score_mean: float
    score_ci95: Interval
    success_rate: float
    success_ci95: Interval
    infer_ms: InferTime
    device: str
    versions: Mapping[str, str]
    data: str | None
    command: str
    git_commit: str | None

    @classmethod
    def from_episodes(
        cls,
        episodes: Sequence[EpisodeResult],
        *,
        protocol: str,
        policy: str,
        nfe: int,
        batch_size: int,
        origin: Origin,
    ) -> "Result":
        """Summarise episodes: bootstrap interval of the score, Wilson's of the success rate."""
        scores = [episode.score for episode in episodes]
        successes = sum(episode.success for episode in episodes)
        times = [ms for episode in episodes for ms in episode.infer_ms]
        p50, p99 = (round(float(q), 3) for q in np.quantile(times, [0.5, 0.99]))
        return cls(
            protocol=protocol,
            policy=policy,
            nfe=nfe,
            seeds=tuple(episode.seed for episode in episodes),
            episodes=tuple(
                EpisodeScore(e.seed, e.score, e.success, e.length, round(e.infer_ms_p50, 3))
                for e in episodes
            ),
            score_mean=float(np.mean(scores)),
            score_ci95=bootstrap_interval(scores),
            success_rate=successes / len(episodes),
            success_ci95=wilson_interval(successes, len(episodes)),
            infer_ms=InferTime(p50, p99, batch_size),
            device=origin.device,
            versions=dict(origin.versions),
            data=origin.data,
            command=origin.command,
            git_commit=origin.git_commit,
        )

    def save(self, path: str | Path) -> Path:
        """Write as JSON, atomically (temporary file, fsync, rename); one episode per line."""
        target = Path(path)
        target.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(target, self._to_json())
        return target

    def _to_json(self) -> str:
        lines: list[str] = []
        for key, value in asdict(self).items():
            if key == "episodes":
                rows = ",\n".join(f"    {json.dumps(row)}" for row in value)
                lines.append(f'  "episodes": [\n{rows}\n  ]')
            else:
                lines.append(f"  {json.dumps(key)}: {json.dumps(value)}")
        return "{\n" + ",\n".join(lines) + "\n}\n"

    @classmethod
    def load(cls, path: str | Path) -> "Result":
        """Read a result file.

        Raises:
            FileNotFoundError: there is none.
            ResultError: not JSON, or not of this schema; names the path and the key.
        """
        source = Path(path)
        if not source.is_file():
            raise FileNotFoundError(f"result file {source} does not exist")
        try:
            raw = json.loads(source.read_text(encoding="utf-8"))
        except (UnicodeDecodeError, json.JSONDecodeError) as error:
            raise ResultError(f"result file {source} is not valid JSON: {error}") from None
        return _parse(raw, source)

    def minus(self, other: "Result") -> PairedDifference:
        """Difference to another result on the same protocol and seeds.

        Raises:
            ResultError: protocol or seeds differ.
        """
        if self.protocol != other.protocol:
            raise ResultError(
                f"cannot compare results of protocols {self.protocol!r} and {other.protocol!r}"
            )
        theirs = {episode.seed: episode for episode in other.episodes}
        if set(self.seeds) != set(theirs):
            raise ResultError(
                f"cannot compare {self.policy!r} ({len(self.seeds)} seeds) with {other.policy!r} "
                f"({len(other.seeds)} seeds) pairwise: the seeds differ; score both on the same"
            )
        paired = [theirs[episode.seed] for episode in self.episodes]
        return paired_difference(
            [e.score for e in self.episodes],
            [e.success for e in self.episodes],
            [e.score for e in paired],
            [e.success for e in paired],
        )


def write_atomically(target: Path, text: str) -> None:
    """Replace ``target`` by ``text``; on any failure the previous file is intact."""
    descriptor, temporary = tempfile.mkstemp(dir=target.parent, prefix=f".{target.name}.")
    try:
        with os.fdopen(descriptor, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        Path(temporary).chmod(0o644)
        Path(temporary).replace(target)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def _parse(raw: Any, source: Path) -> Result:
    names = {field.name for field in fields(Result)}
    if not isinstance(raw, dict):
        raise ResultError(f"result file {source}: expected an object, got {type(raw).__name__}")
    missing, unknown = sorted(names - set(raw)), sorted(set(raw) - names)
    if missing or unknown:
        what = f"lacks {', '.join(missing)}" if missing else f"has unknown {', '.join(unknown)}"
        raise ResultError(f"result file {source} {what}; is it a result of cmpolicy eval?")
    key = ""
    try:
        values: dict[str, Any] = dict(raw)
        key = "episodes"
        values[key] = tuple(EpisodeScore(**episode) for episode in raw[key])
        key = "seeds"
        values[key] = tuple(int(seed) for seed in raw[key])
        key = "infer_ms"
        values[key] = InferTime(**raw[key])
        for key in ("score_ci95", "success_ci95"):
            low, high = raw[key]
            values[key] = (float(low), float(high))
        for key in ("score_mean", "success_rate", "nfe"):
            if isinstance(raw[key], bool) or not isinstance(raw[key], (int, float)):
                raise TypeError(f"expected a number, got {raw[key]!r}")
    except (TypeError, ValueError) as error:
        raise ResultError(f"result file {source}: bad value of {key!r}: {error}") from None
    result = Result(**values)
    if [episode.seed for episode in result.episodes] != list(result.seeds):
        raise ResultError(f"result file {source}: 'episodes' are not those of 'seeds'")
    return result
