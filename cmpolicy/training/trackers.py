"""Where the numbers of a run go: JSON lines and the terminal always, TensorBoard and wandb."""

from __future__ import annotations

import json
import math
import secrets
import sys
import warnings
from collections.abc import Callable, Mapping
from contextlib import suppress
from importlib import import_module
from pathlib import Path
from typing import Any, Literal, Protocol, TextIO

from tqdm import tqdm

from cmpolicy.files import WriteError, write_atomically
from cmpolicy.training.config import LoopConfig

LOG_FILE = "log.jsonl"
WANDB_FILES = ("wandb-id.txt", "wandb")
#: ``train``: averages since the last entry; ``eval``: an evaluation.
Kind = Literal["train", "eval"]


class Tracker(Protocol):
    """Takes the numbers of a run; all of them are plain floats already."""

    def log(self, kind: Kind, examples: int, values: Mapping[str, float]) -> None:
        """Record ``values`` at this number of training examples."""

    def close(self) -> None:
        """Nothing follows."""


def run_trackers(config: LoopConfig, run_dir: Path, start: int, evaluated: int) -> list[Tracker]:
    """The trackers of a run that begins, or goes on, at example ``start``.

    ``evaluated`` is the example of its latest finished evaluation.

    Raises:
        ImportError: a package of ``log.trackers`` is missing; names the extra.
    """
    trackers: list[Tracker] = [
        JsonLines(run_dir, start=start, evaluated=evaluated),
        Terminal(config.examples, start=start, bar=config.log.progress),
    ]
    return trackers + [Accelerated(name, run_dir, start=start) for name in config.log.trackers]


class JsonLines:
    """``log.jsonl``: one object per line, ``{"kind": ..., "examples": ..., name: value, ...}``.

    A resumed run drops the lines after the example it starts from, and evaluations after the last
    one that its state knows (None: as ``start``), for it will write them again.
    """

    def __init__(self, run_dir: Path, *, start: int = 0, evaluated: int | None = None) -> None:
        path = self._path = run_dir / LOG_FILE
        evaluated = start if evaluated is None else evaluated
        if path.exists():
            lines = path.read_text().splitlines()
            kept = [line for line in lines if _is_before(line, start, evaluated)]
            write_atomically(path, "".join(f"{line}\n" for line in kept).encode())
        self._file = path.open("a")

    def log(self, kind: Kind, examples: int, values: Mapping[str, float]) -> None:
        """See :class:`Tracker`. NaN and infinities, which JSON lacks, are written as null."""
        finite = {k: v if math.isfinite(v) else None for k, v in values.items()}
        entry = {"kind": kind, "examples": examples, **finite}
        try:
            self._file.write(json.dumps(entry, allow_nan=False) + "\n")
            self._file.flush()
        except OSError as error:
            raise WriteError(f"cannot write {self._path}: {error.strerror or error}") from error

    def close(self) -> None:
        with suppress(OSError):  # of a full disk, which was reported when it was written to
            self._file.close()


def read_log(run_dir: Path) -> list[dict[str, Any]]:
    """The entries of a run's ``log.jsonl``; a line cut off by a crash is left out."""
    entries = []
    for line in (run_dir / LOG_FILE).read_text().splitlines():
        try:
            entries.append(json.loads(line))
        except ValueError:
            continue
    return entries


class Accelerated:
    """One of accelerate's trackers: ``tensorboard`` or ``wandb``. The axis counts examples.

    TensorBoard's files go to ``tensorboard/`` in the run's folder, wandb's to ``wandb/``; a resumed
    run goes on in the same place (wandb: the run's id is the folder's name and its first state's).

    Raises:
        ImportError: the tracker's package is not installed.
        ValueError: it cannot start, such as wandb without a login.
    """

    def __init__(self, name: str, run_dir: Path, *, start: int = 0) -> None:
        self._name, self._failed = name, False
        # imported here: they take a second, which runs without them need not wait for
        from accelerate.tracking import TensorBoardTracker, WandBTracker

        try:
            if name == "tensorboard":
                # what follows the state that the run goes on from is written again
                self._tracker: Any = TensorBoardTracker(
                    "tensorboard", run_dir, purge_step=start + 1
                )
            else:
                import_module("wandb")
                self._tracker = WandBTracker(
                    "cmpolicy", dir=str(run_dir), name=run_dir.name, resume="allow", id=_id(run_dir)
                )
            self._tracker.start()
        except ImportError as error:
            raise ImportError(
                f"log.trackers={name} needs the package {error.name or name}: "
                f"pip install 'cmpolicy[{name}]'"
            ) from error
        except Exception as error:  # of wandb's own kinds: no login, no network
            raise ValueError(
                f"log.trackers={name} cannot start: {error}. Mend that (`wandb login`, or "
                "WANDB_MODE=offline), or leave it out of log.trackers"
            ) from error

    def log(self, kind: Kind, examples: int, values: Mapping[str, float]) -> None:
        named = {f"{kind}/{key}": value for key, value in values.items()}
        self._attempt(lambda: self._tracker.log(named, step=examples))

    def close(self) -> None:
        self._attempt(self._tracker.finish)

    def _attempt(self, do: Callable[[], None]) -> None:
        """A tracker whose disk is full or whose network is gone is no reason to end a run."""
        if self._failed:
            return
        try:
            do()
        except OSError as error:
            self._failed = True
            warnings.warn(
                f"{self._name} fails ({error}); the run goes on without it, and {LOG_FILE} has all "
                "of its numbers",
                stacklevel=3,
            )


def _id(run_dir: Path) -> str:
    """The same for every part of a run: made up once, kept in the run's folder."""
    file = run_dir / WANDB_FILES[0]
    if not file.is_file():
        write_atomically(file, secrets.token_hex(8).encode())
    return file.read_text().strip()


class Terminal:
    """A progress bar on a terminal; elsewhere, a line per evaluation and about ten for training."""

    def __init__(
        self, total: int, *, start: int = 0, bar: bool | None = None, stream: TextIO | None = None
    ) -> None:
        self._stream = sys.stderr if stream is None else stream
        self._total = total
        self._start = self._last_line = start
        show = self._stream.isatty() if bar is None else bar
        self._bar = (
            tqdm(total=total, initial=start, unit=" examples", unit_scale=True, file=self._stream)
            if show
            else None
        )

    def log(self, kind: Kind, examples: int, values: Mapping[str, float]) -> None:
        text = "  ".join(f"{k} {_short(v)}" for k, v in values.items() if _is_shown(k))
        if kind == "train":
            if self._bar is not None:
                self._bar.set_postfix_str(text, refresh=False)
                self._bar.update(examples - self._bar.n)
                return
            first = self._last_line == self._start
            near = examples - self._last_line < self._total / 10
            if near and not first and examples < self._total:
                return
            self._last_line = examples
        self._line(f"{examples / self._total:4.0%} {_count(examples):>7} examples  {text}")

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()

    def _line(self, text: str) -> None:
        if self._bar is not None:
            self._bar.write(text, file=self._stream)
        else:
            print(text, file=self._stream, flush=True)


def _is_shown(name: str) -> bool:
    """Whether a number is worth a place on the terminal."""
    return name.startswith("loss") or name in _SHOWN


_SHOWN = (
    "grad_norm",
    "examples_per_s",
    "success",
    "score",
    "val_loss",
    "val_action_error",
    "val_action_range",
)


def _short(value: float) -> str:
    return f"{value:.3g}" if value < 1000 else f"{value:.0f}"


def _count(n: int) -> str:
    return f"{n / 1e6:.2f}M" if n >= 1e6 else f"{n / 1e3:.1f}k"


def _is_before(line: str, start: int, evaluated: int) -> bool:
    try:
        entry = json.loads(line)
        return bool(entry["examples"] <= (evaluated if entry["kind"] == "eval" else start))
    except (ValueError, KeyError):
        return False
