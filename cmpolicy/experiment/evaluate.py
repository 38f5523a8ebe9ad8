"""Score a policy in simulation: results with intervals, reports, videos."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from cmpolicy.experiment.protocols import (
    open_protocol,
    read_env_args,
    require_protocol,
)
from cmpolicy.experiment.scored import ScoredPolicy, given_policy, open_policy
from cmpolicy.files import put_aside
from cmpolicy.flow.sampler import SamplerKind
from cmpolicy.schema import ConfigError, at_least, each_once, positive
from cmpolicy.spec import check_warm_start
from cmpolicy_eval import evaluate as scoring
from cmpolicy_eval.policy import ActionChunkPolicy
from cmpolicy_eval.protocol import ROBOMIMIC, EvalProtocol, check_protocol
from cmpolicy_eval.report import write_report
from cmpolicy_eval.result import Result, ResultError
from cmpolicy_eval.seeds import parse_seeds

if TYPE_CHECKING:  # it draws, which most evaluations do not
    from cmpolicy_eval.video import View

Seeds = int | str | Sequence[int] | None


@dataclass(frozen=True, kw_only=True)
class EvalSettings:
    """How a policy is scored.

    Args:
        policy: bundle directory, bundled name (pusht), hub id owner/name, or an exported .onnx.
        name: label in tables and files; null: the policy as given.
        protocol: pusht-dp, pusht-gym, pusht-image-dp, robomimic-ph, robomimic-ph-image, or
            module:PROTOCOL of your own; null: that of the policy's task.
        task: of Robomimic: lift, can, square, transport or tool_hang; null: the policy's own.
        env_args: of Robomimic: a data set whose environment to build; null: the policy's own.
        seeds: a range (both ends included), a number, or [a,b,c]; null: all of the protocol's.
        nfe: network evaluations per action chunk, one result each; null: the policy's own.
        sampler: flow_map, diagonal or restart, of a policy trained by ddpm ddpm or ddim; null: the
            policy's own.
        noise_scale: the noise is multiplied by it; null: the policy's own. Tune it on other seeds.
        time_floor: the last of several evaluations starts at this time; null: evenly spaced times.
        n_action_steps: actions executed before the next decision; null: the policy's own. Tune it
            on other seeds.
        warm_start: decisions after the first start from the plan before, at this time in (0, 1];
            null: the policy's own, if it has one. Tune it on other seeds.
        workers: simulator processes; null: one per CPU. Results do not depend on it.
        env_timeout: seconds that a simulator has for a reset or the steps of one chunk of actions.
        batch_size: observations per policy call; null: the protocol's. Results are those of one
            size.
        device: auto, cpu or cuda.
        videos: mp4 of the first so many seeds, and all of them in one GIF.
        out: folder of result_nfe<n>.json, report.md, report.png, videos/.
    """

    policy: str
    name: str | None = None
    protocol: str | None = None
    task: str | None = None
    env_args: str | None = None
    seeds: Any = None
    nfe: tuple[int, ...] | None = None
    sampler: SamplerKind | None = None
    noise_scale: float | None = None
    time_floor: float | None = None
    n_action_steps: int | None = None
    warm_start: float | None = None
    workers: int | None = None
    env_timeout: float = 120.0
    batch_size: int | None = None
    device: Literal["auto", "cpu", "cuda"] = "auto"
    videos: int = 0
    out: str = "outputs/eval"

    def __post_init__(self) -> None:
        if self.nfe is not None:
            each_once("nfe", self.nfe, 1)
        positive("noise_scale", self.noise_scale)
        at_least("n_action_steps", self.n_action_steps, 1)
        check_warm_start(self.warm_start)
        fewest = min(self.nfe or (2,))
        if self.time_floor is not None and not (0 < self.time_floor < 1 < fewest):
            raise ConfigError(
                f"time_floor={self.time_floor} must lie in (0, 1) and needs nfe of at least 2, got "
                f"nfe={list(self.nfe or ())}"
            )
        positive("env_timeout", self.env_timeout)
        at_least("batch_size", self.batch_size, 1)
        at_least("videos", self.videos, 0)
        at_least("workers", self.workers, 1)


def evaluate(
    policy: Any,
    *,
    protocol: str | EvalProtocol | None = None,
    seeds: Seeds = None,
    nfe: int | None = None,
    out: str | Path | None = None,
    videos: int = 0,
    command: str | None = None,
    **settings: Any,
) -> Result:
    """Score a policy in simulation; what ``cmpolicy eval`` does.

    Args:
        policy: a bundle's folder, a bundled name, a hub id, an exported .onnx; or a policy object
            (a ConsistencyPolicy, or any other with the ``ActionChunkPolicy`` protocol).
        protocol: a name, ``module:PROTOCOL``, or an ``EvalProtocol``; None is that of the policy's
            own task.
        seeds: of the episodes: a number, a list, or text such as ``"100000-100099"``; None takes
            all of the protocol's.
        nfe: network evaluations per action chunk; None takes the policy's own.
        out: folder for the result file, a report and videos; None writes nothing.
        videos: of the first so many seeds; needs ``out``.
        command: recorded in the result; None says that a script called this function.
        settings: see :class:`EvalSettings`.

    Returns:
        Score and success with 95 % intervals, every episode, latency, versions.

    Raises:
        ValueError, OSError: settings or files that cannot be used, a policy that does not fit.
        RolloutError: an environment failed; names the seed.
    """
    if videos and out is None:
        raise ConfigError("videos=... needs out=..., the folder to write them to")
    is_object = not isinstance(policy, str | Path)
    text = type(policy).__name__ if is_object else str(policy)
    chosen = EvalSettings(
        policy=text,
        protocol=protocol if isinstance(protocol, str) else None,
        seeds=seeds,
        nfe=None if nfe is None else (nfe,),
        out="" if out is None else str(out),
        videos=videos,
        **settings,
    )
    (result,) = score(
        chosen,
        command="cmpolicy.evaluate" if command is None else command,
        policy=policy if is_object else None,
        protocol=protocol if isinstance(protocol, EvalProtocol) else None,
    )
    if out is not None:
        write_report([result], Path(out).expanduser())
    return result


def score(
    settings: EvalSettings,
    *,
    command: str,
    policy: Any = None,
    protocol: EvalProtocol | None = None,
) -> list[Result]:
    """Score a policy with every number of evaluations that is asked for.

    Results and videos are written to ``settings.out`` unless that is empty.

    Args:
        settings: all that is asked for.
        command: recorded in the results.
        policy: an object in place of ``settings.policy``.
        protocol: in place of ``settings.protocol``.

    Raises:
        ValueError, OSError, RolloutError: see :func:`evaluate`.
    """
    # What is quick to find wrong comes before torch is loaded.
    if settings.protocol is not None:
        check_protocol(settings.protocol)
    given = None if settings.seeds is None else parse_seeds(settings.seeds)
    scored = given_policy(policy, settings) if policy is not None else open_policy(settings)
    chosen = protocol or _protocol(settings, scored)
    first, last = chosen.default_seeds
    seeds = given or list(range(first, last + 1))
    out = Path(settings.out).expanduser() if settings.out else None
    results: list[Result] = []
    for nfe in settings.nfe or (scored.nfe,):
        scored.set_nfe(nfe)
        found = scoring.evaluate(
            scored.policy,
            chosen,
            seeds,
            nfe=nfe,
            policy_name=scored.label,
            n_workers=settings.workers,
            batch_size=settings.batch_size,
            keep_chunks=settings.videos,
            env_timeout=settings.env_timeout,
            progress=f"nfe={nfe}",
            device=scored.device,
            data=scored.data,
            # one warning will do
            training_seeds=() if results else _training_seeds(scored.data),
            command=command,
        )
        results.append(found.result)
        if out is not None:
            file = out / f"result_nfe{nfe}.json"
            _keep_other(file, found.result)
            found.result.save(file)
            views = _views(scored.policy)
            try:
                _write_videos(out / "videos", chosen, found, settings.videos, views)
            except Exception as error:  # of a simulator's own: the scores are what counts
                why = str(error) or "its environment has no render()"
                warnings.warn(f"no videos of {chosen.name}: {why}", stacklevel=2)
    return results


def _keep_other(file: Path, result: Result) -> None:
    """Put a file with another result aside: it may have taken hours."""
    if not file.is_file():
        return
    try:
        if _outcomes(Result.load(file)) == _outcomes(result):
            return
    except ResultError:
        pass  # something else, which is kept as well
    put_aside(file)


def _outcomes(result: Result) -> list[tuple[int, float, bool, int]]:
    """Of the episodes, without what the clock says."""
    return [(e.seed, e.score, e.success, e.length) for e in result.episodes]


def report(
    results: Sequence[str | Path], out: str | Path, *, pool: bool = False
) -> tuple[list[Result], list[Path]]:
    """Compare result files; the results, and what was written.

    Args:
        results: the files.
        out: folder of the report.
        pool: results of one name are training runs of one recipe, and are averaged.

    Raises:
        ConfigError: no files. ResultError: a file that is no result, or one run given twice.
    """
    if not results:
        raise ConfigError("results is empty; give result files: results=[a.json,b.json]")
    loaded = [Result.load(Path(path).expanduser()) for path in results]
    return loaded, list(write_report(loaded, Path(out).expanduser(), pool=pool))


def _views(policy: ActionChunkPolicy) -> dict[str, View]:
    """What the policy sees of each camera; empty where it has none."""
    from cmpolicy_eval.video import View

    encoder, spec = getattr(policy, "encoder", None), getattr(policy, "spec", None)
    crops = getattr(encoder, "crops", None)
    if not crops or spec is None:
        return {}
    return {
        key: View(spec.obs[key][:2], crop) for key, crop in zip(spec.images, crops, strict=True)
    }


def _write_videos(
    folder: Path,
    protocol: EvalProtocol,
    scored: scoring.ScoredEpisodes,
    count: int,
    views: dict[str, View],
) -> None:
    if not count:
        return
    from cmpolicy_eval.video import write_grid, write_videos

    episodes = scored.episodes[:count]
    suffix = f"_nfe{scored.result.nfe}"
    write_videos(folder, protocol, episodes, suffix, views)
    write_grid(folder / f"grid{suffix}.gif", protocol, episodes)


def _protocol(settings: EvalSettings, scored: ScoredPolicy) -> EvalProtocol:
    """The protocol asked for, else that of the policy's own task."""
    name = require_protocol(settings.protocol or scored.protocol, settings.policy)
    if settings.env_args is not None and name not in ROBOMIMIC:
        raise ConfigError(
            f"env_args={settings.env_args} is of {' and '.join(ROBOMIMIC)}; protocol {name!r} is "
            "one environment. Leave it out"
        )
    simulator = scored.simulator
    if settings.env_args is not None:
        simulator = replace(simulator, env_args=read_env_args(settings.env_args))
    return open_protocol(name, settings.task, simulator)


def _training_seeds(source: str | None) -> Iterable[int] | None:
    """Seeds of the episodes that a policy was trained on, where the data say; else None."""
    if source != "pusht_scripted":
        return None
    from cmpolicy_data import ReplayBuffer, bundled_path

    seeds = ReplayBuffer.open(bundled_path("pusht")).attrs.get("seeds")
    return None if seeds is None else [int(seed) for seed in seeds]
