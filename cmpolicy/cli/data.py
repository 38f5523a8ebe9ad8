"""``cmpolicy data``: inspect, validate, generate, download, convert, replay, pack demonstrations.

``validate`` has exit status 1 where it found problems.
"""

from __future__ import annotations

import shlex
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

from tqdm import tqdm

from cmpolicy.cli.parse import describe, read
from cmpolicy.schema import ConfigError, choose

_SHOWN_PROBLEMS = 50
_STORE = "STORE (directory or .zip), or pusht_scripted, pusht_human"


@dataclass(frozen=True, kw_only=True)
class NoSettings:
    """None."""


@dataclass(frozen=True, kw_only=True)
class ValidateSettings:
    """Of ``validate``.

    Args:
        keys: keys or selectors that the store must have.
    """

    keys: tuple[str, ...] = ("action",)


@dataclass(frozen=True, kw_only=True)
class GenerateSettings:
    """Of ``generate``.

    Args:
        task: of robomimic: lift, can or square.
        episodes: how many; null: 300 of pusht, 200 of robomimic.
        seed: first seed of the initial states.
        workers: simulator processes; the result does not depend on it.
        out: file to write; null: pusht_scripted.zarr.zip, or TASK.hdf5 in robomimic's layout.
    """

    task: str | None = None
    episodes: int | None = None
    seed: int = 0
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
class ConvertSettings:
    """Of ``convert``.

    Args:
        out: store to write (.zarr or .zip); null: named as the source.
        actions: delta, or absolute: target poses, 10 numbers per arm.
        obs: observation keys; empty: all that are one vector per step.
        filter: convert only the demonstrations of this mask (train, valid, ...).
        states: false leaves out what only `replay` reads, most of the bytes.
        cameras: to render at the recorded states, such as [agentview,robot0_eye_in_hand].
        camera_size: height and width of these images, px.
        workers: simulator processes that recover absolute actions.
    """

    out: str | None = None
    actions: Literal["delta", "absolute"] = "delta"
    obs: tuple[str, ...] = ()
    filter: str | None = None
    states: bool = True
    cameras: tuple[str, ...] = ()
    camera_size: int = 84
    workers: int = 1


@dataclass(frozen=True, kw_only=True)
class ReplaySettings:
    """Of ``replay``.

    Args:
        episodes: only so many, from the first on; null: all.
        workers: simulator processes.
    """

    episodes: int | None = None
    workers: int = 1


@dataclass(frozen=True, kw_only=True)
class ViewSettings:
    """Of ``view``.

    Args:
        episode: number, from 0.
        keys: to show; empty: all images, and all keys of at most 16 numbers per step.
        fps: frames per second; null: the rate that the store says, else 10.
        out: video to write, .mp4.
    """

    episode: int = 0
    keys: tuple[str, ...] = ()
    fps: float | None = None
    out: str = "outputs/episode.mp4"


class _Command(NamedTuple):
    arguments: tuple[str, ...]
    summary: str
    settings: type[Any]
    run: Callable[..., int]


def help_text(words: Sequence[str]) -> str:
    """Of the command among the words, or of all."""
    if words and words[0] in _COMMANDS:
        command = _COMMANDS[words[0]]
        usage = f"usage: cmpolicy data {words[0]} {' '.join(command.arguments)} [key=value ...]"
        return describe(command.settings, f"{usage}\n\n{command.summary}")
    lines = [
        f"  {f'{name} ' + ' '.join(a.split()[0] for a in command.arguments):<28}{command.summary}"
        for name, command in _COMMANDS.items()
    ]
    return (
        "usage: cmpolicy data COMMAND ... [key=value ...]\n\ncommands:\n"
        + "\n".join(lines)
        + "\n\n`cmpolicy data COMMAND --help` lists its settings."
    )


def run(words: Sequence[str]) -> int:
    """Do as the words say; the exit status."""
    if not words:
        raise ConfigError(f"which command? Choose one of {', '.join(_COMMANDS)}")
    command = choose(_COMMANDS, words[0], "command of cmpolicy data")
    count = len(command.arguments)
    given = words[1 : 1 + count]
    if len(given) < count or any(_is_setting(word) for word in given):
        raise ConfigError(f"usage: cmpolicy data {words[0]} {' '.join(command.arguments)}")
    return command.run(read(command.settings, words[1 + count :]), *given)


def _is_setting(word: str) -> bool:
    return "=" in word and not Path(word).exists()


@contextmanager
def _bar(total: int | None, unit: str) -> Iterator[Callable[..., None]]:
    """A progress bar on a terminal; what is yielded takes what is done and a count beside it."""
    with tqdm(total=total, unit=unit, unit_scale=unit == "B", disable=None) as bar:

        def show(done: int, other: int | None = None) -> None:
            if total is None:
                bar.total = other
            else:
                bar.set_postfix(attempted=other, refresh=False)
            bar.update(done - bar.n)

        yield show


def _inspect(_: NoSettings, path: str) -> int:
    from cmpolicy_data.catalog import resolve
    from cmpolicy_data.summary import format_summary, summarize

    print(format_summary(summarize(resolve(path))))
    return 0


def _view(settings: ViewSettings, path: str) -> int:
    from cmpolicy_data import ReplayBuffer
    from cmpolicy_data.catalog import resolve
    from cmpolicy_data.film import film_episode

    buffer = ReplayBuffer.open(resolve(path))
    rate = settings.fps or buffer.attrs.get("control_hz") or 10
    if not isinstance(rate, int | float) or not 0 < rate <= 1000:
        raise ConfigError(f"fps={rate!r} must be a number of frames per second")
    out = Path(settings.out)
    print(film_episode(buffer, settings.episode, out, keys=settings.keys, fps=float(rate)))
    return 0


def _validate(settings: ValidateSettings, path: str) -> int:
    from cmpolicy_data.catalog import resolve
    from cmpolicy_data.validation import validate

    store = resolve(path)
    problems = validate(store, list(settings.keys))
    for problem in problems[:_SHOWN_PROBLEMS]:
        print(problem)
    if len(problems) > _SHOWN_PROBLEMS:
        print(f"... and {len(problems) - _SHOWN_PROBLEMS} more")
    print(f"{store}: {len(problems)} problem(s)" if problems else f"{store}: no problems")
    return 1 if problems else 0


def _generate(settings: GenerateSettings, what: str) -> int:
    choose({"pusht": 0, "robomimic": 0}, what, "task")
    if what == "robomimic":
        return _generate_robomimic(settings)
    from cmpolicy_data.generate.pusht import generate

    episodes = 300 if settings.episodes is None else settings.episodes
    with _bar(episodes, "episode") as show:
        report = generate(
            Path(settings.out or "pusht_scripted.zarr.zip"),
            episodes=episodes,
            seed=settings.seed,
            workers=settings.workers,
            progress=show,
        )
    print(
        f"{report.path}: {report.kept} episodes, {report.steps} steps "
        f"({report.attempted} attempted, {report.seconds:.0f} s)"
    )
    print(f"look at it with: cmpolicy data inspect {shlex.quote(str(report.path))}")
    return 0


def _generate_robomimic(settings: GenerateSettings) -> int:
    from cmpolicy_data.generate.robomimic import attempt, runner

    if settings.task is None:
        raise ConfigError(
            f"name the task ({', '.join(attempt.SKILLS)}), for example: "
            "cmpolicy data generate robomimic task=lift"
        )
    episodes = 200 if settings.episodes is None else settings.episodes
    with _bar(episodes, "episode") as show:
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


def _download(settings: DownloadSettings, what: str) -> int:
    choose({"pusht": 0, "robomimic": 0}, what, "data set")
    if what == "robomimic":
        return _download_robomimic(settings)
    from cmpolicy_data.download import DATASETS, download

    with _bar(None, "B") as progress:
        path = download(
            DATASETS[what],
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
    from cmpolicy_data.robomimic_download import download

    if settings.task is None:
        raise ConfigError("name the task, for example: cmpolicy data download robomimic task=lift")
    path = download(
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


def _convert(settings: ConvertSettings, layout: str, source: str) -> int:
    from cmpolicy_data.convert import robomimic

    choose({"robomimic": 0}, layout, "layout")
    suffix = "_abs.zarr" if settings.actions == "absolute" else ".zarr"
    with _bar(None, "episode") as show:
        report = robomimic.convert(
            Path(source),
            settings.out or f"{Path(source).stem}{suffix}",
            actions=settings.actions,
            keys=list(settings.obs) or None,
            filter_key=settings.filter,
            states=settings.states,
            cameras=settings.cameras,
            camera_size=settings.camera_size,
            workers=settings.workers,
            progress=show,
        )
    shown = shlex.quote(str(report.path))
    print(
        f"{report.path}: {report.task}, {report.episodes} episode(s), {report.steps} steps, "
        f"{report.actions} actions ({report.seconds:.0f} s)"
    )
    if report.goals_from_file:
        print(f"absolute actions of {report.goals_from_file} episode(s): the file's actions_abs")
    for name, count in report.masks.items():
        print(f"mask {name}: {count} episode(s)")
    print(f"check it with: cmpolicy data replay robomimic {shown}")
    print(f"train on it with: cmpolicy train task={report.task} data=robomimic data.path={shown}")
    return 0


def _replay(settings: ReplaySettings, layout: str, path: str) -> int:
    from cmpolicy_data.convert import replay

    choose({"robomimic": 0}, layout, "layout")
    with tqdm(unit="episode", disable=None) as bar:

        def show(done: int, failed: int) -> None:
            bar.set_postfix(failed=failed, refresh=False)
            bar.update(done - bar.n)

        report = replay.replay(
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


def _pack(_: NoSettings, source: str, target: str) -> int:
    from cmpolicy_data.pack import pack

    path = pack(source, target)
    print(f"{path}: {path.stat().st_size / 1e6:.2f} MB")
    return 0


_COMMANDS: dict[str, _Command] = {
    "inspect": _Command(
        (_STORE,), "print keys, shapes, ranges and episodes of a store", NoSettings, _inspect
    ),
    "view": _Command(
        (_STORE,), "write a video of an episode: cameras, numbers", ViewSettings, _view
    ),
    "validate": _Command(
        (_STORE,), "list everything that is wrong with a store", ValidateSettings, _validate
    ),
    "generate": _Command(
        ("pusht|robomimic",),
        "make scripted demonstrations in the simulator",
        GenerateSettings,
        _generate,
    ),
    "download": _Command(
        ("pusht|robomimic",), "fetch human demonstrations", DownloadSettings, _download
    ),
    "convert": _Command(
        ("robomimic", "FILE.hdf5"),
        "convert demonstrations of another layout to a store",
        ConvertSettings,
        _convert,
    ),
    "replay": _Command(
        ("robomimic", "STORE"),
        "play the actions of a converted store again: how many episodes succeed",
        ReplaySettings,
        _replay,
    ),
    "pack": _Command(
        ("STORE", "FILE.zip"), "pack a directory store into one .zip", NoSettings, _pack
    ),
}
