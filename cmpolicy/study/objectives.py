"""Every objective on the same network, data, examples and seeds: ``cmpolicy study objectives``.

One job is one training run of one objective and one training seed, in a process of its own, and its
scores. What is done is not done again, and a run that was interrupted goes on.
"""

from __future__ import annotations

import dataclasses
import json
import multiprocessing
import resource
import signal
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any, cast

import numpy as np

from cmpolicy.experiment.config import TrainConfig
from cmpolicy.experiment.evaluate import EvalSettings, score
from cmpolicy.experiment.model_card import LAST
from cmpolicy.experiment.objective import ObjectiveConfig
from cmpolicy.experiment.train import resume, train
from cmpolicy.files import write_atomically
from cmpolicy.flow.objectives import OBJECTIVES
from cmpolicy.flow.sampler import SamplerKind, get_sampler
from cmpolicy.schema import ConfigError, at_least, choose, each_once
from cmpolicy.training.checkpoint import state_path
from cmpolicy.training.guard import NonFiniteError
from cmpolicy.training.trackers import read_log
from cmpolicy_eval.progress import progress_bar
from cmpolicy_eval.seeds import parse_seeds

VERSION = 1
#: What a study folder was made with.
STUDY_FILE = "study.json"


class StudyError(RuntimeError):
    """A run of a study failed."""

    exit_status = 1


@dataclass(frozen=True, kw_only=True)
class ObjectivesSettings:
    """What is compared. All other words are settings of `cmpolicy train`, shared by all runs.

    Args:
        objectives: names; null: all.
        seeds: training seeds, one run of each objective for each.
        nfe: network evaluations that are scored, where the objective's sampler can do them; the
            objective's own number is scored as well.
        eval_seeds: of the episodes. Those of a protocol (100000 and up for Push-T) only to report.
        workers: runs side by side, each with one simulator process.
        out: folder of the study; a study that was interrupted goes on there.
    """

    objectives: tuple[str, ...] | None = None
    seeds: tuple[int, ...] = (0, 1, 2)
    nfe: tuple[int, ...] = (1, 2, 4, 10)
    eval_seeds: Any = "500000-500099"
    workers: int = 1
    out: str = "outputs/study-objectives"

    def __post_init__(self) -> None:
        each_once("objectives", self.names)
        for name in self.names:
            choose(OBJECTIVES, name, "objective")
        parse_seeds(self.eval_seeds)
        each_once("seeds", self.seeds, 0)
        each_once("nfe", self.nfe, 1)
        at_least("workers", self.workers, 1)

    @property
    def names(self) -> tuple[str, ...]:
        """The objectives that are compared."""
        return tuple(sorted(OBJECTIVES)) if self.objectives is None else self.objectives


@dataclass(frozen=True)
class Scores:
    """One policy at one number of evaluations: an entry per episode, in the order of the seeds."""

    sampler: SamplerKind
    nfe: int
    success: tuple[bool, ...]
    score: tuple[float, ...]


@dataclass(frozen=True)
class RunScores:
    """What became of one run.

    Args:
        diverged: where the loss became NaN or infinite, in examples; None where it did not.
        grad_norm: before clipping: median over the log's entries, and the largest.
        cpu_ms_per_step: processor time of the run over its steps; loading the data and the
            evaluations of health count as well, other processes do not.
        peak_mb: memory of the process at its largest.
        health: numbers of :mod:`cmpolicy.flow.health` at the end, by name.
    """

    objective: str
    seed: int
    diverged: int | None
    grad_norm: Mapping[str, float]
    cpu_ms_per_step: float | None
    peak_mb: float
    health: Mapping[str, float]
    scores: tuple[Scores, ...]

    @classmethod
    def load(cls, path: Path) -> RunScores:
        """Read what :func:`_run_job` wrote."""
        data = json.loads(path.read_text())
        scores = tuple(
            Scores(s["sampler"], s["nfe"], tuple(s["success"]), tuple(s["score"]))
            for s in data["scores"]
        )
        return cls(**{**data, "scores": scores})


@dataclass(frozen=True)
class _Job:
    config: TrainConfig
    settings: ObjectivesSettings
    name: str
    seed: int

    @property
    def folder(self) -> Path:
        return Path(self.settings.out).expanduser() / "runs" / f"{self.name}-{self.seed}"

    @property
    def result(self) -> Path:
        return Path(self.settings.out).expanduser() / "results" / f"{self.name}-{self.seed}.json"


def study_objectives(
    settings: ObjectivesSettings, configs: Mapping[str, TrainConfig], *, command: str
) -> list[RunScores]:
    """Run what is not done yet; all results, in the order of objectives and seeds.

    Args:
        settings: what is compared.
        configs: by objective, the settings of its runs; alike in all else.
        command: recorded in the study's folder.

    Raises:
        ConfigError: a task without a simulator, or a folder with a study of other settings or of
            another version.
    """
    for config in configs.values():
        if config.task.protocol is None:
            raise ConfigError(f"task={config.task.name} has no simulator, so nothing is scored")
    out = Path(settings.out).expanduser()
    _check_folder(out, settings, configs, command)
    # Seed by seed: a study that is cut short has whole comparisons of fewer seeds.
    jobs = [
        _Job(dataclasses.replace(configs[name], seed=seed), settings, name, seed)
        for seed in settings.seeds
        for name in settings.names
    ]
    waiting = [job for job in jobs if not job.result.exists()]
    if waiting:
        _run_all(waiting, settings.workers)
    order = {name: i for i, name in enumerate(settings.names)}
    done = [RunScores.load(job.result) for job in jobs]
    return sorted(done, key=lambda run: (order[run.objective], run.seed))


def _run_all(jobs: Sequence[_Job], workers: int) -> None:
    """Each job in a process of its own, so that its memory and time are its own.

    Raises:
        StudyError: a run failed; those beside it are stopped, to go on with later.
    """
    context = multiprocessing.get_context("spawn")
    waiting, running = list(jobs), dict[int, tuple[Any, _Job]]()
    before = signal.signal(signal.SIGTERM, _stop)
    try:
        with progress_bar(len(jobs), unit="run") as bar:
            while waiting or running:
                while waiting and len(running) < workers:
                    job = waiting.pop(0)
                    process = context.Process(target=_run_job, args=(job,))
                    process.start()
                    running[process.sentinel] = process, job
                for done in wait(list(running)):
                    process, job = running.pop(cast(int, done))
                    process.join()
                    if process.exitcode:
                        raise StudyError(
                            f"the run {job.folder} ended with exit status {process.exitcode}; what "
                            "is done is kept, and the same command goes on"
                        )
                    bar.update()
    finally:  # after Ctrl-C, SIGTERM or a run that failed: a training saves its state and ends
        for process, _ in running.values():
            process.terminate()
        for process, _ in running.values():
            process.join()
        signal.signal(signal.SIGTERM, before)


def _stop(signum: int, frame: Any) -> None:
    raise SystemExit(128 + signum)


def _run_job(job: _Job) -> None:
    """Train, score, write the result; a run that was stopped by a signal is left for next time."""
    diverged, start = None, resource.getrusage(resource.RUSAGE_SELF)
    before = _examples_done(job.folder)
    try:
        if state_path(job.folder).exists():
            result = resume(job.folder)
        else:
            result = train(job.config, job.folder, command=f"cmpolicy study: {job.name}")
        if not result.finished:
            raise SystemExit(130)  # stopped by a signal, and saved
    except NonFiniteError as error:
        diverged = error.examples
    end = resource.getrusage(resource.RUSAGE_SELF)
    entries = read_log(job.folder)
    norms = [e["grad_norm"] for e in entries if e.get("grad_norm") is not None]
    largest = [e["grad_norm_max"] for e in entries if e.get("grad_norm_max") is not None]
    steps = (job.config.examples - before) / job.config.batch_size
    spent = end.ru_utime + end.ru_stime - start.ru_utime - start.ru_stime
    found = RunScores(
        job.name,
        job.seed,
        diverged,
        {"median": float(np.median(norms)), "largest": max(largest)} if norms else {},
        1e3 * spent / steps if diverged is None and not before and steps else None,
        end.ru_maxrss / 1024,
        {} if diverged is not None else _health(entries),
        () if diverged is not None else tuple(_score(job)),
    )
    text = json.dumps(dataclasses.asdict(found)) + "\n"
    job.result.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(job.result, text.encode())


def _examples_done(folder: Path) -> int:
    if not state_path(folder).exists():
        return 0
    return max((int(entry["examples"]) for entry in read_log(folder)), default=0)


def _health(entries: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    last: dict[str, float] = {}
    for entry in entries:
        last |= {k: v for k, v in entry.items() if k.startswith("health_") and v is not None}
    return last


def evaluations(objective: ObjectiveConfig, nfe: Sequence[int]) -> list[tuple[SamplerKind, int]]:
    """Sampler and number of evaluations that are scored: those that the sampler can do.

    A diffusion takes few steps by DDIM; its own 100 are DDPM's.
    """
    own = objective.sampler_kind
    few: SamplerKind = "ddim" if own == "ddpm" else own
    pairs = [(few, n) for n in nfe] + [(own, objective.evaluations(None))]
    possible: list[tuple[SamplerKind, int]] = []
    for kind, n in dict.fromkeys(pairs):
        try:
            get_sampler(kind).grid(n)
        except ValueError:
            continue
        possible.append((kind, n))
    return possible


def _score(job: _Job) -> list[Scores]:
    found = []
    for kind, nfe in evaluations(job.config.objective, job.settings.nfe):
        settings = EvalSettings(
            policy=str(job.folder / LAST),
            seeds=job.settings.eval_seeds,
            nfe=(nfe,),
            sampler=kind,
            workers=1,
            out="",
        )
        (result,) = score(settings, command="cmpolicy study")
        found.append(
            Scores(
                kind,
                nfe,
                tuple(bool(e.success) for e in result.episodes),
                tuple(float(e.score) for e in result.episodes),
            )
        )
    return found


def _check_folder(
    out: Path, settings: ObjectivesSettings, configs: Mapping[str, TrainConfig], command: str
) -> None:
    """Write what the study is made with, or compare it with what is there.

    Objectives and seeds may be added later; what is shared may not change.
    """
    facts = _plain(
        {
            "version": VERSION,
            "nfe": settings.nfe,
            "eval_seeds": settings.eval_seeds,
            "training": _shared(next(iter(configs.values())).to_dict()),
            "objectives": {name: c.to_dict()["objective"] for name, c in configs.items()},
        }
    )
    path = out / STUDY_FILE
    if path.exists():
        try:
            there = json.loads(path.read_text())
            there["objectives"].items()
            # settings that a newer version added had their defaults then
            there["training"] = _plain(_shared(TrainConfig.complete(there["training"])))
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ConfigError(f"{path} is damaged ({error!r}); choose another out=...") from error
        for key in ("version", "nfe", "eval_seeds", "training"):
            if there.get(key) != facts[key]:
                raise ConfigError(
                    f"{out} holds a study with another {key}: "
                    f"{_difference(there.get(key), facts[key])}; give its settings again to go on "
                    "with it, or another out=..."
                )
        for name, own in facts["objectives"].items():
            if there["objectives"].setdefault(name, own) != own:
                raise ConfigError(
                    f"{out} holds a study with other settings of objective {name}: "
                    f"{_difference(there['objectives'][name], own)}; choose another out=..."
                )
        facts["objectives"] = there["objectives"]
        facts["commands"] = [*there.get("commands", []), command]
    else:
        facts["commands"] = [command]
    out.mkdir(parents=True, exist_ok=True)
    write_atomically(path, (json.dumps(facts, indent=1) + "\n").encode())


def _shared(training: dict[str, Any]) -> dict[str, Any]:
    """What all runs of a study have in common."""
    return {key: value for key, value in training.items() if key not in ("objective", "seed")}


def _plain(values: dict[str, Any]) -> Any:
    """As it reads back from JSON: tuples have become lists."""
    return json.loads(json.dumps(values))


def _difference(there: Any, here: Any, prefix: str = "") -> str:
    """The first setting that differs, with both values."""
    if isinstance(there, Mapping) and isinstance(here, Mapping):
        for key in [*there, *(k for k in here if k not in there)]:
            if there.get(key) != here.get(key):
                return _difference(there.get(key), here.get(key), f"{prefix}{key}.")
    return f"{prefix.rstrip('.') or 'value'} is {there!r} there and {here!r} here"
