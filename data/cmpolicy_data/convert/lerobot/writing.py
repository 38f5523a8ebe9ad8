"""A store, written as a LeRobotDataset v3.0 that lerobot (0.4) loads.

Numbers keep their type to the bit; frames become AV1 video, as lerobot records it, or PNG pictures
inside the parquet files (``images="image"``), which lose nothing.
"""

from __future__ import annotations

import json
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from cmpolicy_data.chunks import read_rows
from cmpolicy_data.convert.lerobot import stats
from cmpolicy_data.convert.lerobot.card import data_card
from cmpolicy_data.convert.lerobot.columns import IMAGES, Column, arrow_table, columns_of
from cmpolicy_data.convert.lerobot.encoding import ENCODERS, VideoFiles
from cmpolicy_data.convert.lerobot.errors import LeRobotError, import_av, import_parquet
from cmpolicy_data.convert.lerobot.layout import V3
from cmpolicy_data.convert.writing import put_in_place
from cmpolicy_data.frames import Frames
from cmpolicy_data.replay_buffer import ReplayBuffer
from cmpolicy_data.shown import pictures

_FILES_PER_CHUNK = 1000
_DATA_MB, _VIDEO_MB = 100, 200
_MB = 1 << 20
_PART_BYTES = 8 << 20
_PLACE = "chunk-{chunk_index:03d}/file-{file_index:03d}"
_DATA = f"data/{_PLACE}.parquet"
_VIDEO = f"videos/{{video_key}}/{_PLACE}.mp4"
_EPISODES = f"meta/episodes/{_PLACE}.parquet"
_INDICES = ("frame_index", "episode_index", "index", "task_index")


@dataclass(frozen=True)
class WritingReport:
    """What was written; ``features``: LeRobot's names of the keys."""

    path: Path
    features: tuple[str, ...]
    episodes: int
    steps: int
    fps: float
    tasks: tuple[str, ...]
    seconds: float


def write(
    store: str | Path,
    out: str | Path,
    *,
    task: str | None = None,
    fps: float | None = None,
    keys: Sequence[str] = (),
    images: str = "video",
    codec: str = "av1",
    crf: int = 30,
    robot_type: str | None = None,
    license: str | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> WritingReport:
    """Write a store as the LeRobot data set ``out``, which appears whole or not at all.

    Args:
        store: the store. out: a folder that is not there yet.
        task: what the episodes do, as a text; default the store's attribute ``tasks``.
        fps: steps per second; default the store's attribute ``control_hz``.
        keys: to write; default all. images: ``"video"`` or ``"image"``, see the module.
        codec: of videos: av1, h264 or hevc. crf: its quality, smaller is better.
        robot_type: default the store's attribute. license: for the card, such as ``mit``.
        progress: called with (done, all) after each episode.

    Raises:
        LeRobotError, ReplayBufferError, FileNotFoundError, FileExistsError, ValueError: what is
            wrong and what to do.
        ImportError: pyarrow or PyAV is not installed.
    """
    began = time.monotonic()
    out = Path(out).expanduser()
    if images not in IMAGES:
        raise ValueError(f"images must be {' or '.join(IMAGES)}, got {images!r}.")
    if codec not in ENCODERS:
        raise ValueError(f"codec must be one of {', '.join(ENCODERS)}, got {codec!r}.")
    if out.exists() or out.is_symlink():
        raise FileExistsError(f"{out} exists already. Choose another folder or remove it.")
    if not out.parent.is_dir():
        raise FileNotFoundError(f"{out.parent} is not a folder. Create it first.")
    import_parquet()
    buffer = ReplayBuffer.open(store)
    columns = columns_of(buffer, keys, images)
    if any(column.dtype == "video" for column in columns):
        import_av()
    tasks = _tasks(buffer, task)
    rate = _fps(buffer, fps)
    robot = robot_type if robot_type is not None else buffer.attrs.get("robot_type")
    scratch = Path(tempfile.mkdtemp(prefix=f".{out.name}.", dir=out.parent))
    try:
        new = scratch / "dataset"
        writer = _Writer(new, buffer, columns, tasks, rate, codec, crf)
        writer.write(progress)
        info = writer.write_metadata(robot if isinstance(robot, str) else None)
        card = data_card(info, tuple(dict.fromkeys(tasks)), license)
        (new / "README.md").write_text(card, encoding="utf-8")
        put_in_place(new, out, aside=scratch / "old")
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    return WritingReport(
        path=out,
        features=tuple(column.name for column in columns),
        episodes=buffer.n_episodes,
        steps=buffer.n_steps,
        fps=rate,
        tasks=tuple(dict.fromkeys(tasks)),
        seconds=time.monotonic() - began,
    )


class _Writer:
    """Writes episode by episode; holds the numbers of one, and a few frames."""

    def __init__(
        self,
        root: Path,
        buffer: ReplayBuffer,
        columns: Sequence[Column],
        tasks: Sequence[str],
        fps: float,
        codec: str,
        crf: int,
    ) -> None:
        self._root, self._buffer, self._tasks, self._fps = root, buffer, tasks, fps
        self._codec = codec
        self._columns = columns
        self._task_numbers = {text: i for i, text in enumerate(dict.fromkeys(tasks))}
        self._episodes: list[dict[str, Any]] = []
        self._stats: list[dict[str, stats.Stats]] = []
        self._data: Any = None
        self._data_file = -1

        def files_of(column: Column) -> VideoFiles:
            def place(number: int) -> Path:
                return root / _VIDEO.format(video_key=column.name, **_place(number))

            rate = Fraction(fps).limit_denominator(1001)
            size = (column.shape[0], column.shape[1])
            limit = _VIDEO_MB * _MB
            return VideoFiles(place, size, rate, codec=codec, crf=crf, limit=limit)

        self._videos = {c.name: files_of(c) for c in columns if c.dtype == "video"}

    def write(self, progress: Callable[[int, int], None] | None) -> None:
        ends = self._buffer.episode_ends
        try:
            for number, (start, end) in enumerate(
                zip((ends - np.diff(ends, prepend=0)).tolist(), ends.tolist(), strict=True)
            ):
                self._episode(number, start, end)
                if progress is not None:
                    progress(number + 1, len(ends))
        finally:
            if self._data is not None:
                self._data.close()
            for video in self._videos.values():
                video.close()

    def _episode(self, number: int, start: int, end: int) -> None:
        length = end - start
        numbers = _indices(number, start, length, self._fps)
        numbers["task_index"] = np.full(length, self._task_numbers[self._tasks[number]])
        for column in self._columns:
            if not column.is_camera:
                numbers[column.name] = read_rows(
                    self._buffer[column.key], start, end, self._buffer.path
                )
        found = {name: stats.of_rows(rows) for name, rows in numbers.items()}
        levels = {
            c.name: stats.Levels(length, (c.shape[0], c.shape[1]))
            for c in self._columns
            if c.is_camera
        }
        for column in self._columns:
            if column.dtype == "video":
                for _, frames in self._frames(column, start, end):
                    levels[column.name].add(frames)
                    self._videos[column.name].add(frames)
        stored = [column for column in self._columns if column.dtype == "image"]
        step = max(1, min([length, *(_part_rows(column) for column in stored)]))
        for first in range(0, length, step):
            stop = min(first + step, length)
            pictures = {}
            for column in stored:
                frames = self._read(column, start + first, start + stop)
                levels[column.name].add(frames)
                pictures[column.name] = frames
            self._write_rows({k: v[first:stop] for k, v in numbers.items()}, pictures)
        found |= {name: level.stats() for name, level in levels.items()}
        row: dict[str, Any] = {
            "episode_index": number,
            "tasks": [self._tasks[number]],
            "length": length,
            **{f"data/{key}": value for key, value in _place(self._data_file).items()},
            "dataset_from_index": start,
            "dataset_to_index": end,
        }
        for name, video in self._videos.items():
            file, begin, until = video.end_episode()
            row |= {f"videos/{name}/{key}": value for key, value in _place(file).items()}
            row |= {f"videos/{name}/from_timestamp": begin, f"videos/{name}/to_timestamp": until}
        for name, values in found.items():
            row |= {f"stats/{name}/{key}": value.tolist() for key, value in values.items()}
        row |= {f"meta/episodes/{key}": value for key, value in _place(0).items()}
        self._episodes.append(row)
        self._stats.append(found)
        self._end_data_file()

    def _frames(self, column: Column, start: int, end: int) -> Iterator[tuple[int, Frames]]:
        step = _part_rows(column)
        for first in range(start, end, step):
            yield first, self._read(column, first, min(first + step, end))

    def _read(self, column: Column, start: int, end: int) -> Frames:
        return pictures(self._buffer, column.key, start, end)

    def _write_rows(
        self, numbers: Mapping[str, npt.NDArray[Any]], pictures: Mapping[str, Frames]
    ) -> None:
        table = arrow_table(numbers, pictures)
        if self._data is None:
            self._data_file += 1
            path = self._root / _DATA.format(**_place(self._data_file))
            path.parent.mkdir(parents=True, exist_ok=True)
            self._data = import_parquet().ParquetWriter(path, table.schema)
            self._data_path = path
        self._data.write_table(table)

    def _end_data_file(self) -> None:
        """Complete the data file once it is large enough."""
        if self._data_path.stat().st_size >= _DATA_MB * _MB:
            self._data.close()
            self._data = None

    def write_metadata(self, robot_type: str | None) -> dict[str, Any]:
        """Everything in meta/, after the episodes; what is in ``meta/info.json``."""
        import pyarrow

        parquet = import_parquet()
        features = {
            **{c.name: c.describe(self._fps, self._codec) for c in self._columns},
            "timestamp": {"dtype": "float32", "shape": [1], "names": None},
            **{name: {"dtype": "int64", "shape": [1], "names": None} for name in _INDICES},
        }
        info = {
            "codebase_version": V3,
            "robot_type": robot_type,
            "total_episodes": len(self._episodes),
            "total_frames": self._buffer.n_steps,
            "total_tasks": len(self._task_numbers),
            "chunks_size": _FILES_PER_CHUNK,
            "data_files_size_in_mb": _DATA_MB,
            "video_files_size_in_mb": _VIDEO_MB,
            "fps": self._fps,
            "splits": {"train": f"0:{len(self._episodes)}"},
            "data_path": _DATA,
            "video_path": _VIDEO if self._videos else None,
            "features": features,
        }
        merged = {
            name: {
                key: value.tolist()
                for key, value in stats.merge([found[name] for found in self._stats]).items()
            }
            for name in self._stats[0]
        }
        episodes = self._root / _EPISODES.format(**_place(0))
        episodes.parent.mkdir(parents=True)
        parquet.write_table(pyarrow.Table.from_pylist(self._episodes), episodes)
        (self._root / "meta" / "info.json").write_text(json.dumps(info, indent=4))
        (self._root / "meta" / "stats.json").write_text(json.dumps(merged, indent=4))
        tasks = pyarrow.table(
            {
                "task_index": pyarrow.array(list(self._task_numbers.values()), pyarrow.int64()),
                "__index_level_0__": list(self._task_numbers),
            }
        )
        # lerobot reads it with pandas and looks tasks up in the index
        pandas = {
            "index_columns": ["__index_level_0__"],
            "column_indexes": [],
            "columns": [
                _pandas_column("task_index", "int64"),
                _pandas_column("__index_level_0__", "unicode"),
            ],
        }
        tasks = tasks.replace_schema_metadata({"pandas": json.dumps(pandas)})
        parquet.write_table(tasks, self._root / "meta" / "tasks.parquet")
        return info


def _tasks(buffer: ReplayBuffer, task: str | None) -> list[str]:
    if task is not None:
        return [task] * buffer.n_episodes
    stored = buffer.attrs.get("tasks")
    if (
        isinstance(stored, list)
        and len(stored) == buffer.n_episodes
        and all(isinstance(text, str) for text in stored)
    ):
        return stored
    raise LeRobotError(
        f"{buffer.path} does not say what its episodes do (an attribute tasks, one text for each). "
        'Say it: task="push the block onto the target".'
    )


def _fps(buffer: ReplayBuffer, fps: float | None) -> float:
    rate = buffer.attrs.get("control_hz") if fps is None else fps
    if rate is None:
        raise LeRobotError(
            f"{buffer.path} does not say its rate (an attribute control_hz). Give the steps per "
            "second of the recording: fps=10."
        )
    if isinstance(rate, bool) or not isinstance(rate, int | float) or not 0 < rate <= 1000:
        raise LeRobotError(f"fps={rate!r} must be a number of steps per second, above 0.")
    return int(rate) if rate == int(rate) else float(rate)


def _indices(episode: int, start: int, length: int, fps: float) -> dict[str, npt.NDArray[Any]]:
    steps = np.arange(length)
    return {
        "timestamp": (steps / fps).astype(np.float32),
        "frame_index": steps,
        "episode_index": np.full(length, episode),
        "index": steps + start,
    }


def _place(number: int) -> dict[str, int]:
    return {"chunk_index": number // _FILES_PER_CHUNK, "file_index": number % _FILES_PER_CHUNK}


def _part_rows(column: Column) -> int:
    return max(1, _PART_BYTES // int(np.prod(column.shape)))


def _pandas_column(name: str, kind: str) -> dict[str, Any]:
    is_index = name == "__index_level_0__"
    return {
        "name": None if is_index else name,
        "field_name": name,
        "pandas_type": kind,
        "numpy_type": "object" if is_index else kind,
        "metadata": None,
    }
