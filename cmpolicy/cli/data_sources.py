"""The commands of ``cmpolicy data`` that make demonstrations: generate, download; and replay."""

from __future__ import annotations

import shlex
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cmpolicy.schema import ConfigError, choose

if TYPE_CHECKING:
    from cmpolicy.policy.policy import ConsistencyPolicy


@dataclass(frozen=True, kw_only=True)
class GenerateSettings:
    """Of ``generate``.

    Args:
        task: of robomimic: lift, can or square.
        episodes: how many; null: 300 of pusht, 200 of robomimic.
        seed: first seed of the initial states.
        astray: of pusht: share of attempts in [0, 1] that begin where random pushes have left the
            block, from which a policy learns to come back.
        astray_by: of pusht: a policy bundle that leads these attempts astray in place of random
            pushes: they begin where it has got to after some steps without success.
        workers: simulator processes; the result does not depend on it.
        out: file to write; null: pusht_scripted.zarr.zip, or TASK.hdf5 in robomimic's layout.
    """

    task: str | None = None
    episodes: int | None = None
    seed: int = 0
    astray: float = 0.0
    astray_by: str | None = None
    workers: int = 2
    out: str | None = None


@dataclass(frozen=True, kw_only=True)
class DownloadSettings:
    """Of ``download``.

    Args:
        out: folder; null: CMPOLICY_DATA, else ~/.cache/cmpolicy.
        url: of pusht: another source of the archive.
        sha256: of pusht: what the archive must hash to.
        task: of robomimic: lift, can, square, transport or tool_hang.
        type: of robomimic: ph (proficient human), mh (multi human), mg (machine), paired.
        endpoint: of robomimic: a mirror of the Hugging Face hub.
        revision: of robomimic: commit, tag or branch of the data set repository.
    """

    out: str | None = None
    url: str | None = None
    sha256: str | None = None
    task: str | None = None
    type: str = "ph"
    endpoint: str | None = None
    revision: str = "main"


@dataclass(frozen=True, kw_only=True)
class EditSettings:
    """Of ``edit``.

    Args:
        out: store to write (.zarr or .zip).
        drop: episodes to leave out, such as [3,7].
        keep: only these; null: all but those of drop.
        join: episodes that become one, such as [[3,4],[8,9]].
        cut: steps before which an episode is cut, such as {5: [20,40]}.
        min_steps: leave out what is shorter than this.
    """

    out: str | None = None
    drop: tuple[int, ...] = ()
    keep: tuple[int, ...] | None = None
    join: tuple[tuple[int, ...], ...] = ()
    cut: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    min_steps: int = 1


@dataclass(frozen=True, kw_only=True)
class ReplaySettings:
    """Of ``replay``.

    Args:
        episodes: only so many, from the first on; null: all.
        workers: simulator processes.
    """

    episodes: int | None = None
    workers: int = 1


@contextmanager
def showing(total: int | None, unit: str, other_is: str = "") -> Iterator[Callable[..., None]]:
    """Show progress; what is yielded takes how much is done and another number.

    Args:
        total: how much there is; None: unknown, or the other number.
        unit: of it.
        other_is: what the other number counts; empty: it is the total.
    """
    from cmpolicy_eval.progress import progress_bar  # gymnasium comes with it

    with progress_bar(total, unit=unit, unit_scale=unit == "B") as bar:

        def show(done: int, other: int | None = None) -> None:
            if not other_is:
                bar.total = other
            else:
                bar.set_postfix({other_is: other}, refresh=False)
            bar.update(done - bar.n)

        yield show


def generate(settings: GenerateSettings, what: str) -> int:
    """Make scripted demonstrations; the exit status."""
    choose({"pusht": 0, "robomimic": 0}, what, "task")
    if what == "robomimic":
        return _generate_robomimic(settings)
    from cmpolicy_data.generate import pusht

    lead = None
    if settings.astray_by is not None:
        if not settings.astray:
            raise ConfigError("astray_by changes attempts that begin astray; add astray=0.5, say")
        _check_lead(settings.astray_by)
        lead = pusht.Lead(settings.astray_by, partial(_start, settings.astray_by))
    episodes = 300 if settings.episodes is None else settings.episodes
    with showing(episodes, "episode", "attempted") as show:
        report = pusht.generate(
            Path(settings.out or "pusht_scripted.zarr.zip"),
            episodes=episodes,
            seed=settings.seed,
            astray=settings.astray,
            lead=lead,
            workers=settings.workers,
            progress=show,
        )
    print(
        f"{report.path}: {report.kept} episodes, {report.steps} steps "
        f"({report.attempted} attempted, {report.seconds:.0f} s)"
    )
    print(f"look at it with: cmpolicy data inspect {shlex.quote(str(report.path))}")
    return 0


def _check_lead(policy: str) -> None:
    spec = _policy(policy).spec
    if not set(spec.obs) <= {"agent_pos", "keypoint"} or spec.action_dim != 2:
        raise ConfigError(
            f"astray_by={policy} sees {', '.join(spec.obs)} and gives {spec.action_dim} numbers; a "
            "policy of Push-T that sees agent_pos and keypoint is needed"
        )


@cache
def _policy(path: str) -> ConsistencyPolicy:
    """Loaded once in each process."""
    import torch

    from cmpolicy.policy.policy import ConsistencyPolicy

    torch.set_num_threads(1)  # each worker has a core
    return ConsistencyPolicy.from_pretrained(path)


def _start(path: str, seed: int) -> Callable[[Mapping[str, Any]], Any]:
    """What chooses the actions of one episode."""
    from cmpolicy.robot.chunker import ActionChunker

    return ActionChunker(_policy(path), seed=seed).select_action


def _generate_robomimic(settings: GenerateSettings) -> int:
    from cmpolicy_data.generate.robomimic import attempt, runner

    if settings.task is None:
        raise ConfigError(
            f"name the task ({', '.join(attempt.SKILLS)}), for example: "
            "cmpolicy data generate robomimic task=lift"
        )
    for name in ("astray", "astray_by"):
        if value := getattr(settings, name):
            raise ConfigError(f"{name}={value}: only pusht has it; leave it out")
    episodes = 200 if settings.episodes is None else settings.episodes
    with showing(episodes, "episode", "attempted") as show:
        report = runner.generate(
            settings.out or f"{settings.task}.hdf5",
            task=settings.task,
            episodes=episodes,
            seed=settings.seed,
            workers=settings.workers,
            progress=show,
        )
    path = shlex.quote(str(report.path))
    print(
        f"{report.path}: {report.task}, {report.kept} episodes, {report.steps} steps "
        f"({report.attempted} attempted, {report.success_rate:.1%} succeeded, "
        f"{report.seconds:.0f} s)"
    )
    print(f"convert it with: cmpolicy data convert robomimic {path} out={report.task}.zarr")
    return 0


def download(settings: DownloadSettings, what: str) -> int:
    """Fetch public demonstrations; the exit status."""
    choose({"pusht": 0, "robomimic": 0}, what, "data set")
    if what == "robomimic":
        return _download_robomimic(settings)
    from cmpolicy_data import download as pusht

    with showing(None, "B") as progress:
        path = pusht.download(
            pusht.DATASETS[what],
            settings.out,
            url=settings.url,
            sha256=settings.sha256,
            progress=progress,
        )
    print(f"{path}: verified")
    print(
        "train on it with: cmpolicy train task=pusht data=pusht_human "
        f"data.path={shlex.quote(str(path))}"
    )
    return 0


def _download_robomimic(settings: DownloadSettings) -> int:
    from cmpolicy_data import robomimic_download

    if settings.task is None:
        raise ConfigError("name the task, for example: cmpolicy data download robomimic task=lift")
    path = robomimic_download.download(
        settings.task,
        settings.type,
        settings.out,
        endpoint=settings.endpoint,
        revision=settings.revision,
    )
    print(f"{path}: readable")
    print(
        f"convert it with: cmpolicy data convert robomimic {shlex.quote(str(path))} "
        f"out={settings.task}_{settings.type}.zarr"
    )
    return 0


def edit(settings: EditSettings, source: str) -> int:
    """Copy a store with episodes left out, joined or cut; the exit status."""
    from cmpolicy_data.catalog import resolve
    from cmpolicy_data.convert import edit as editing

    if settings.out is None:
        raise ConfigError("out is not set: edit writes another store, such as out=edited.zarr")
    if not all(key.isdecimal() for key in settings.cut):
        raise ConfigError(
            f"cut={dict(settings.cut)} must be steps by episode number, such as cut={{5: [20,40]}}"
        )
    with showing(None, "episode") as show:
        buffer = editing.edit(
            resolve(source),
            settings.out,
            drop=settings.drop,
            keep=settings.keep,
            join=settings.join,
            cut={int(k): v for k, v in settings.cut.items()},
            min_steps=settings.min_steps,
            progress=show,
        )
    print(f"{settings.out}: {buffer.n_episodes} episode(s), {buffer.n_steps} steps")
    return 0


def replay(settings: ReplaySettings, layout: str, path: str) -> int:
    """Count the episodes of a store that succeed again; the exit status."""
    from cmpolicy_data.convert import replay as replaying

    choose({"robomimic": 0}, layout, "layout")
    with showing(None, "episode", "failed") as show:
        report = replaying.replay(
            path, episodes=settings.episodes, workers=settings.workers, progress=show
        )
    succeeded = report.episodes - len(report.failed)
    print(
        f"{report.path}: {succeeded} of {report.episodes} episodes succeed again with "
        f"{report.actions} actions ({report.success_rate:.1%}, {report.seconds:.0f} s)"
    )
    if report.failed:
        print(f"failed: {', '.join(map(str, report.failed))}")
    return 0
