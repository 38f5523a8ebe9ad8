"""``cmpolicy data``: its commands, and those that look at a store or pack it.

``validate`` has exit status 1 where it found problems. The commands that make stores are in
:mod:`cmpolicy.cli.data_sources` and :mod:`cmpolicy.cli.data_convert`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal, NamedTuple

from cmpolicy.cli import data_convert, data_sources
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
        missing_chunks: what a chunk that is not there means: auto, zero (left out) or error (lost).
        strict: what looks healthy and is not counts as a problem.
    """

    keys: tuple[str, ...] = ("action",)
    missing_chunks: Literal["auto", "zero", "error"] = "auto"
    strict: bool = False


@dataclass(frozen=True, kw_only=True)
class SealSettings:
    """Of ``seal``.

    Args:
        off: take the seal off, to append.
    """

    off: bool = False


@dataclass(frozen=True, kw_only=True)
class ViewSettings:
    """Of ``view``.

    Args:
        episodes: numbers, from 0.
        keys: to show; empty: all images, and all keys of at most 16 numbers per step.
        fps: steps per second; null: the rate that the store says, else 10 in a video.
        out: file to write instead of opening Rerun's viewer: .rrd for Rerun, .mp4 for a video.
    """

    episodes: tuple[int, ...] = (0,)
    keys: tuple[str, ...] = ()
    fps: float | None = None
    out: str | None = None

    def __post_init__(self) -> None:
        if not self.episodes:
            raise ConfigError("episodes=[] names no episode; give episodes=[0]")
        if self.out is not None and Path(self.out).suffix not in (".rrd", ".mp4"):
            raise ConfigError(f"out={self.out} must end in .rrd (for Rerun) or .mp4 (a video)")


class _Command(NamedTuple):
    arguments: tuple[str, ...]
    summary: str
    settings: type[Any]
    run: Callable[..., int]


def help_text(words: Sequence[str]) -> str:
    """Of the command among the words, or of all."""
    if words and words[0] == _CONVERT:
        return _convert_help(words[1:])
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


def _convert_help(words: Sequence[str]) -> str:
    """Of the layout among the words, or of all."""
    layouts = data_convert.LAYOUTS
    if words and words[0] in layouts:
        layouts = {words[0]: layouts[words[0]]}
    return "\n\n".join(
        describe(
            layout.settings,
            f"usage: cmpolicy data {_CONVERT} {name} {layout.argument} [key=value ...]\n\n"
            f"convert {layout.summary}",
        )
        for name, layout in layouts.items()
    )


def run(words: Sequence[str]) -> int:
    """Do as the words say; the exit status."""
    if not words:
        raise ConfigError(f"which command? Choose one of {', '.join(_COMMANDS)}")
    command = choose(_COMMANDS, words[0], "command of cmpolicy data")
    if words[0] == _CONVERT and len(words) > 1:
        layout = choose(data_convert.LAYOUTS, words[1], "layout")
        command = _Command((words[1], layout.argument), "", layout.settings, _convert)
    count = len(command.arguments)
    given = words[1 : 1 + count]
    if len(given) < count or any(_is_setting(word) for word in given):
        raise ConfigError(f"usage: cmpolicy data {words[0]} {' '.join(command.arguments)}")
    return command.run(read(command.settings, words[1 + count :]), *given)


def _is_setting(word: str) -> bool:
    return "=" in word and not Path(word).exists()


def _inspect(_: NoSettings, path: str) -> int:
    from cmpolicy_data.catalog import resolve
    from cmpolicy_data.report import table_of_store
    from cmpolicy_data.summary import format_summary, summarize

    store = resolve(path)
    print(format_summary(summarize(store)))
    print("\n".join(["", "percentiles:", *(f"  {line}" for line in table_of_store(store))]))
    return 0


def _view(settings: ViewSettings, path: str) -> int:
    from cmpolicy_data import ReplayBuffer
    from cmpolicy_data.catalog import resolve

    buffer = ReplayBuffer.open(resolve(path))
    rate = settings.fps or buffer.attrs.get("control_hz")
    if rate is not None and (not isinstance(rate, int | float) or not 0 < rate <= 1000):
        raise ConfigError(f"fps={rate!r} must be a number of steps per second")
    episodes, keys = settings.episodes, settings.keys
    out = None if settings.out is None else Path(settings.out).expanduser()
    if out is not None and out.suffix == ".mp4":
        from cmpolicy_data.film import film_episodes

        print(film_episodes(buffer, episodes, out, keys=keys, fps=float(rate or 10)))
        return 0
    from cmpolicy_data.recording import open_viewer, record_episodes

    if out is not None:
        print(record_episodes(buffer, episodes, out, keys=keys, hz=rate))
        return 0
    with TemporaryDirectory() as folder:
        file = Path(folder) / f"{buffer.path.name}.rrd"
        open_viewer(record_episodes(buffer, episodes, file, keys=keys, hz=rate))
    return 0


def _validate(settings: ValidateSettings, path: str) -> int:
    from cmpolicy_data.catalog import resolve
    from cmpolicy_data.report import examine_store
    from cmpolicy_data.validation import validate

    store = resolve(path)
    problems = validate(store, list(settings.keys), settings.missing_chunks)
    for problem in problems[:_SHOWN_PROBLEMS]:
        print(problem)
    if len(problems) > _SHOWN_PROBLEMS:
        print(f"... and {len(problems) - _SHOWN_PROBLEMS} more")
    findings = [] if problems else examine_store(store, missing_chunks=settings.missing_chunks)
    for finding in findings:
        print(finding)
    wrong = f"{len(problems)} problem(s)" if problems else "no problems"
    print(f"{store}: {wrong}" + (f", {len(findings)} warning(s)" if findings else ""))
    return 1 if problems or (findings and settings.strict) else 0


def _seal(settings: SealSettings, path: str) -> int:
    from cmpolicy_data.seal import seal

    hashes = seal(path, off=settings.off)
    print(f"{path}: not sealed" if settings.off else f"{path}: {len(hashes)} arrays are sealed")
    return 0


def _pack(_: NoSettings, source: str, target: str) -> int:
    from cmpolicy_data.pack import pack

    path = pack(source, target)
    print(f"{path}: {path.stat().st_size / 1e6:.2f} MB")
    return 0


def _convert(settings: Any, layout: str, source: str) -> int:
    return data_convert.LAYOUTS[layout].run(settings, source)


_CONVERT = "convert"
_COMMANDS: dict[str, _Command] = {
    "inspect": _Command(
        (_STORE,), "print keys, shapes, ranges and episodes of a store", NoSettings, _inspect
    ),
    "view": _Command((_STORE,), "look at episodes in Rerun, or as a video", ViewSettings, _view),
    "validate": _Command(
        (_STORE,), "list everything that is wrong with a store", ValidateSettings, _validate
    ),
    "seal": _Command(
        ("STORE (directory)",),
        "note a hash of every array, which validate and training check",
        SealSettings,
        _seal,
    ),
    "generate": _Command(
        ("pusht|robomimic",),
        "make scripted demonstrations in the simulator",
        data_sources.GenerateSettings,
        data_sources.generate,
    ),
    "download": _Command(
        ("pusht|robomimic",),
        "fetch human demonstrations",
        data_sources.DownloadSettings,
        data_sources.download,
    ),
    _CONVERT: _Command(
        (f"LAYOUT ({'|'.join(data_convert.LAYOUTS)})", "SOURCE"),
        "robomimic, ALOHA and LeRobot data to a store, a store to LeRobot data",
        NoSettings,  # each layout has its own
        _convert,
    ),
    "edit": _Command(
        (_STORE,),
        "copy a store with episodes left out, joined or cut",
        data_sources.EditSettings,
        data_sources.edit,
    ),
    "replay": _Command(
        ("robomimic", "STORE"),
        "play the actions of a converted store again: how many episodes succeed",
        data_sources.ReplaySettings,
        data_sources.replay,
    ),
    "pack": _Command(
        ("STORE", "FILE.zip"), "pack a directory store into one .zip", NoSettings, _pack
    ),
}
