"""The parquet files: rows episode by episode, checked against what the metadata says of them."""

from __future__ import annotations

import io
from collections.abc import Iterator, Mapping, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image, UnidentifiedImageError

from cmpolicy_data.convert.lerobot.errors import LeRobotError, import_parquet
from cmpolicy_data.convert.lerobot.layout import Episode, Feature, Layout
from cmpolicy_data.frames import Frames
from cmpolicy_data.parts import part_sizes

TOLERANCE = 0.25
"""Share of a frame's duration that times may be off; lerobot itself tolerates 0.1 ms."""
INDICES = ("index", "episode_index", "frame_index", "task_index")
_TIME = "timestamp"
_BATCH = 1024
_IMAGES = 16


class Rows:
    """One parquet file, read from its beginning a few rows at a time."""

    def __init__(self, file: Path, columns: Sequence[str], batch: int = _BATCH) -> None:
        """Open the file.

        Raises:
            LeRobotError: not readable, or a column is not there.
        """
        self.file = file
        try:
            self._parquet = import_parquet().ParquetFile(file, memory_map=True)
        except (OSError, ValueError) as error:
            raise self._damaged(error) from error
        self.n_rows: int = self._parquet.metadata.num_rows
        there = self._parquet.schema_arrow.names
        missing = [column for column in columns if column not in there]
        if missing:
            raise LeRobotError(f"{file} has no column {missing[0]!r}; it has: {', '.join(there)}.")
        self._batches = self._parquet.iter_batches(batch_size=batch, columns=list(columns))
        self._rest: Any = None

    def take(self, count: int) -> dict[str, list[Any]]:
        """The next rows as Arrow arrays by column; fewer than ``count`` where the file ends.

        Raises:
            LeRobotError: damaged.
        """
        taken: list[Any] = []
        while count > 0:
            if self._rest is None or self._rest.num_rows == 0:
                try:
                    self._rest = next(self._batches, None)
                except (OSError, ValueError) as error:
                    raise self._damaged(error) from error
                if self._rest is None:
                    break
            taken.append(self._rest.slice(0, count))
            self._rest = self._rest.slice(count)
            count -= taken[-1].num_rows
        names = self._parquet.schema_arrow.names if not taken else taken[0].schema.names
        return {name: [batch.column(name) for batch in taken] for name in names}

    def _damaged(self, error: Exception) -> LeRobotError:
        reason = (str(error).splitlines() or [""])[0].rstrip(".")
        return LeRobotError(f"{self.file} cannot be read as parquet: {reason}.")


def read_episodes(
    layout: Layout, features: Sequence[Feature]
) -> Iterator[tuple[Episode, dict[str, npt.NDArray[Any]]]]:
    """Each episode with the arrays (L, ...) of its features, its times and its task numbers.

    Raises:
        LeRobotError: rows that are not those of the episode; names it and the file.
    """
    columns = [*INDICES, _TIME, *(feature.name for feature in features)]
    for file, group in groupby(layout.episodes, key=lambda episode: episode.file):
        episodes = list(group)
        rows = Rows(file, columns)
        for episode in episodes:
            taken = rows.take(episode.length)
            shapes: dict[str, tuple[int, ...]] = dict.fromkeys((*INDICES, _TIME), ())
            shapes |= {f.name: f.shape for f in features}
            where = f"{file}, episode {episode.number}"
            arrays = {key: _array(taken[key], shapes[key], f"{where}: {key}") for key in columns}
            _check_indices(episode, arrays, where)
            _check_times(arrays[_TIME], layout.fps, where)
            yield episode, arrays
        expected = sum(episode.length for episode in episodes)
        if rows.n_rows != expected:
            raise LeRobotError(
                f"{file} has {rows.n_rows} rows, but its episodes, {episodes[0].number} to "
                f"{episodes[-1].number}, have {expected} by the metadata."
            )


def pictures(layout: Layout, feature: Feature) -> Iterator[Frames]:
    """The frames of a camera in image mode: PNG or JPEG inside the parquet files.

    All episodes in order, a few frames of one episode at a time.

    Raises:
        LeRobotError: a picture that is missing, damaged or of another size.
    """
    row_bytes = feature.shape[0] * feature.shape[1] * 3
    for file, episodes in groupby(layout.episodes, key=lambda episode: episode.file):
        rows = Rows(file, [feature.name], _IMAGES)
        for episode in episodes:
            where = f"{file}, episode {episode.number}, {feature.name}"
            first = 0
            for size in part_sizes(episode.first_row, episode.length, row_bytes):
                batches = rows.take(size)[feature.name]
                cells = [cell for batch in batches for cell in batch.to_pylist()]
                yield np.stack(
                    [
                        _picture(cell, feature, f"{where}, step {first + i}")
                        for i, cell in enumerate(cells)
                    ]
                )
                first += size


def _picture(cell: object, feature: Feature, where: str) -> Frames:
    data = cell.get("bytes") if isinstance(cell, dict) else None
    if not data:
        raise LeRobotError(f"{where}: the picture is not inside the parquet file.")
    try:
        with Image.open(io.BytesIO(data)) as image:
            if image.mode[0] in "IF":
                raise LeRobotError(f"{where}: the picture has the mode {image.mode}, not RGB.")
            frame = np.asarray(image.convert("RGB"))
    except (UnidentifiedImageError, OSError) as error:
        raise LeRobotError(f"{where}: the picture is damaged ({error}).") from error
    check_size(frame, feature, where)
    return frame


def check_size(frame: Frames, feature: Feature, where: str) -> None:
    """Refuse a frame that has not the size that the metadata says.

    Raises:
        LeRobotError: another size.
    """
    if frame.shape[:2] != feature.shape:
        height, width = feature.shape
        raise LeRobotError(
            f"{where}: the frame is {frame.shape[0]} x {frame.shape[1]}, but meta/info.json says "
            f"{height} x {width} (height x width)."
        )


def _array(batches: list[Any], shape: tuple[int, ...], where: str) -> npt.NDArray[Any]:
    """Arrow arrays as one (L, *shape): plain, or lists in lists, of fixed size or not."""
    parts = []
    for batch in batches:
        length, values = len(batch), batch
        nulls = values.null_count
        while hasattr(values, "storage"):  # an extension type, such as that of `datasets`
            values = values.storage
        while hasattr(values, "flatten") and hasattr(values.type, "value_type"):
            values = values.flatten()
            nulls += values.null_count
        numbers = values.to_numpy(zero_copy_only=False)
        size = int(np.prod(shape, dtype=np.int64))
        if nulls or numbers.dtype.kind not in "biuf" or numbers.size != length * size:
            raise LeRobotError(
                f"{where} does not hold {size} number(s) per row, the shape {list(shape)} of "
                "meta/info.json."
            )
        parts.append(numbers.reshape(length, *shape))
    return np.concatenate(parts) if parts else np.zeros((0, *shape))


def _check_indices(episode: Episode, arrays: Mapping[str, npt.NDArray[Any]], where: str) -> None:
    numbers = arrays["episode_index"]
    other = np.flatnonzero(numbers != episode.number)
    there = int(other[0]) if other.size else len(numbers)
    if there < episode.length:
        follows = (
            f"then those of episode {int(numbers[there])} follow"
            if other.size
            else ("then the file ends")
        )
        raise LeRobotError(
            f"{where} is cut short: it has {there} rows, {follows}; the metadata says "
            f"{episode.length}."
        )
    for key, first in (("frame_index", 0), ("index", episode.first_row)):
        expected = np.arange(first, first + episode.length)
        wrong = np.flatnonzero(arrays[key] != expected)
        if wrong.size:
            row = int(wrong[0])
            raise LeRobotError(
                f"{where}, step {row}: {key} is {arrays[key][row]}, expected {expected[row]}. "
                "Steps are missing, repeated or out of order."
            )


def _check_times(times: npt.NDArray[Any], fps: float, where: str) -> None:
    expected = np.arange(len(times)) / fps
    wrong = np.flatnonzero(~(np.abs(times - expected) * fps <= TOLERANCE))
    if wrong.size:
        step = int(wrong[0])
        raise LeRobotError(
            f"{where}, step {step}: timestamp is {float(times[step]):.4f} s, expected "
            f"{expected[step]:.4f} s at fps {fps:g}. Steps are missing, or fps in meta/info.json "
            "is not that of the recording."
        )
