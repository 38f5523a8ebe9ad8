"""A LeRobot data set, converted to a store.

Every ``observation.*`` becomes a key (see the package), with the data set's own type of numbers;
frames are (H, W, 3) uint8. Attributes: ``control_hz`` (fps), ``tasks`` (a text for each episode;
several of one episode are joined by ``"; "``), ``names`` (of dimensions, by key), ``robot_type``,
``source`` (name, layout and commit).
"""

from __future__ import annotations

import os
import time
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping
from contextlib import closing
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from cmpolicy_data.convert.lerobot.ahead import Ahead
from cmpolicy_data.convert.lerobot.errors import LeRobotError, import_av, import_parquet
from cmpolicy_data.convert.lerobot.layout import Episode, Layout, read_layout
from cmpolicy_data.convert.lerobot.rows import pictures, read_episodes
from cmpolicy_data.convert.lerobot.video import frames_of
from cmpolicy_data.convert.writing import check_target, write_store
from cmpolicy_data.frames import Frames
from cmpolicy_data.parts import Parts

CONVERTER = "cmpolicy_data.convert.lerobot"
VERSION = 1


@dataclass(frozen=True)
class ReadingReport:
    """What a conversion did; ``left_out``: features that are no key, and why."""

    path: Path
    layout: str
    keys: tuple[str, ...]
    cameras: tuple[str, ...]
    episodes: int
    steps: int
    fps: float
    tasks: tuple[str, ...]
    left_out: Mapping[str, str]
    seconds: float


@dataclass(frozen=True)
class _Rows:
    """An episode as it is stored."""

    values: Mapping[str, npt.NDArray[Any] | Parts]
    model: None = None

    def arrays(self) -> Mapping[str, npt.NDArray[Any] | Parts]:
        return self.values


@dataclass
class _Reader:
    """Gives the episodes, and notes their tasks on the way."""

    layout: Layout
    check_stats: bool
    threads: int
    tasks: list[str] = field(default_factory=list)

    def episodes(self) -> Generator[_Rows]:
        layout = self.layout
        vectors = [feature for feature in layout.features if not feature.is_camera]
        cameras = [feature for feature in layout.features if feature.is_camera]
        stored = [feature for feature in cameras if feature.dtype == "image"]
        threads = max(1, self.threads // max(1, len(cameras)))  # of each camera
        waiting: deque[_Rows] = deque()
        with Ahead(max(1, len(cameras))) as ahead:
            pictured = {f.name: iter(ahead.start(partial(pictures, layout, f))) for f in stored}
            for episode, arrays in read_episodes(layout, vectors):
                self._note_task(episode, arrays["task_index"])
                if self.check_stats:
                    _check_ranges(episode, arrays)
                values: dict[str, npt.NDArray[Any] | Parts] = {
                    f.key: arrays[f.name].astype(f.dtype, copy=False) for f in vectors
                }
                frames: Iterable[Frames]
                for feature in cameras:
                    if feature.dtype == "image":
                        frames = _next_rows(pictured[feature.name], episode.length)
                    else:
                        span = episode.videos[feature.name]
                        times = arrays["timestamp"]
                        source = partial(
                            frames_of, span, feature, times, layout.fps, episode, threads
                        )
                        frames = ahead.start(source)
                    shape = (episode.length, *feature.shape, 3)
                    values[feature.key] = Parts(shape, np.dtype(np.uint8), frames)
                waiting.append(_Rows(values))
                if len(waiting) > 1:
                    yield waiting.popleft()
            yield from waiting

    def _note_task(self, episode: Episode, numbers: npt.NDArray[Any]) -> None:
        texts = []
        for number in dict.fromkeys(numbers.astype(int).tolist()):
            if number not in self.layout.tasks:
                raise LeRobotError(
                    f"{episode.file}, episode {episode.number}: task_index is {number}, which "
                    f"meta/tasks does not list (it has {sorted(self.layout.tasks)})."
                )
            texts.append(self.layout.tasks[number])
        self.tasks.append("; ".join(texts))


def read(
    root: str | Path,
    out: str | Path,
    *,
    name: str | None = None,
    commit: str | None = None,
    check_stats: bool = True,
    threads: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> ReadingReport:
    """Convert a LeRobot data set to the store ``out``, which appears whole or not at all.

    Args:
        root: folder of the data set.
        out: a path that ends in .zarr (a folder) or .zip. A store there is replaced only if a
            converter wrote it.
        name: of the data set, for the store's attributes; default the folder's. commit: likewise.
        check_stats: compare the values with the least and greatest ones of the metadata.
        threads: that decode videos; default one per core.
        progress: called with (done, all) after each episode.

    Raises:
        LeRobotError, FileNotFoundError, FileExistsError, ValueError: what is wrong, and where.
        ImportError: pyarrow or PyAV is not installed.
    """
    began = time.monotonic()
    root, out = Path(root).expanduser(), Path(out).expanduser()
    check_target(out)
    import_parquet()
    layout = read_layout(root)
    if any(feature.dtype == "video" for feature in layout.features):
        import_av()
    if threads is not None and threads < 1:
        raise ValueError(f"threads must be at least 1, got {threads}.")
    reader = _Reader(layout, check_stats, threads or _cores())

    def counted(episodes: Iterator[_Rows]) -> Iterator[_Rows]:
        for done, episode in enumerate(episodes, 1):
            yield episode
            if progress is not None:
                progress(done, len(layout.episodes))

    def attrs() -> dict[str, Any]:
        return {
            "version": VERSION,
            "control_hz": layout.fps,
            "tasks": reader.tasks,
            "names": {f.key: list(f.names) for f in layout.features if f.names},
            "robot_type": layout.robot_type,
            "source": {
                "name": name or root.resolve().name,
                "layout": layout.version,
                "commit": commit,
            },
        }

    with closing(reader.episodes()) as episodes:  # ends its threads, also after an error
        write_store(out, CONVERTER, counted(episodes), attrs)
    return ReadingReport(
        path=out,
        layout=layout.version,
        keys=tuple(feature.key for feature in layout.features),
        cameras=tuple(feature.key for feature in layout.features if feature.is_camera),
        episodes=len(layout.episodes),
        steps=layout.n_steps,
        fps=layout.fps,
        tasks=tuple(dict.fromkeys(reader.tasks)),
        left_out=layout.left_out,
        seconds=time.monotonic() - began,
    )


def _cores() -> int:
    """Cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):  # not on macOS
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _next_rows(stream: Iterator[Frames], count: int) -> Iterator[Frames]:
    """The next parts of a stream, ``count`` rows in all."""
    while count > 0:
        part = next(stream)
        count -= len(part)
        yield part


def _check_ranges(episode: Episode, arrays: Mapping[str, npt.NDArray[Any]]) -> None:
    """Compare an episode with the least and greatest values that the metadata gives."""
    for name, (low, high) in episode.ranges.items():
        rows = arrays[name].astype(np.float64)
        for what, said, there in (
            ("min", low, rows.min(axis=0)),
            ("max", high, rows.max(axis=0)),
        ):
            given = np.asarray(said, np.float64)
            if given.size == there.size and np.allclose(
                given.ravel(), there.ravel(), rtol=1e-4, atol=1e-6, equal_nan=True
            ):
                continue
            raise LeRobotError(
                f"{episode.file}, episode {episode.number}: the {what} of {name} is "
                f"{there.ravel().tolist()}, but the metadata says {given.ravel().tolist()}. The "
                "numbers or the statistics were changed later; check_stats=false reads them as "
                "they are."
            )
