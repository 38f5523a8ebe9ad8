"""What the metadata of a LeRobot data set says: features, episodes, and where their files are.

Both layouts that are in use are read: v3.0 (many episodes in a parquet and in an mp4 file, with
``meta/episodes/*.parquet``) and v2.1 (one file an episode, with ``meta/episodes.jsonl``).
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cmpolicy_data.convert.lerobot.errors import LeRobotError
from cmpolicy_data.convert.lerobot.metafiles import (
    Info,
    json_lines,
    place,
    read_table,
    seconds,
    whole,
)

V3, V2 = "v3.0", "v2.1"
_OBSERVATION = "observation."
KEY = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.\- ]*")
_UPGRADES = {
    "v2.0": "python -m lerobot.datasets.v21.convert_dataset_v20_to_v21 (lerobot 0.3)",
    "v1": "convert_dataset_v1_to_v2.py of lerobot 0.1, then convert_dataset_v20_to_v21 of 0.3",
}


@dataclass(frozen=True)
class Feature:
    """One column.

    Attributes:
        name: LeRobot's (``observation.state``). key: the store's (``state``).
        dtype: ``video``, ``image``, or numpy's name. shape: of one step; (H, W) of cameras.
        names: of the dimensions, empty if there are none.
    """

    name: str
    key: str
    dtype: str
    shape: tuple[int, ...]
    names: tuple[str, ...] = ()

    @property
    def is_camera(self) -> bool:
        return self.dtype in ("video", "image")


@dataclass(frozen=True)
class Span:
    """Where the frames of an episode are: from ``start`` seconds on in ``file``."""

    file: Path
    start: float
    whole: bool
    """Whether the file holds this episode alone."""


@dataclass(frozen=True)
class Episode:
    """One episode; ``ranges``: feature -> (least, greatest) values that the metadata gives."""

    number: int
    length: int
    first_row: int
    file: Path
    videos: Mapping[str, Span]
    ranges: Mapping[str, tuple[Any, Any]] = field(default_factory=dict)


@dataclass(frozen=True)
class Layout:
    """A LeRobot data set; ``left_out`` are features that no store key is made of, and why."""

    root: Path
    version: str
    fps: float
    robot_type: str | None
    features: tuple[Feature, ...]
    left_out: Mapping[str, str]
    episodes: tuple[Episode, ...]
    tasks: Mapping[int, str]

    @property
    def n_steps(self) -> int:
        """Rows over all episodes."""
        return sum(episode.length for episode in self.episodes)


def is_lerobot(path: Path) -> bool:
    """Whether a folder looks like a LeRobot data set, of any version."""
    return (path / "meta" / "info.json").is_file() or (path / "meta_data").is_dir()


def read_layout(root: Path) -> Layout:
    """Read and check the metadata; no data file is opened, but all must be there.

    Raises:
        LeRobotError: no LeRobot data set, another version, metadata that contradicts itself, or
            files that are missing.
    """
    info = check_version(root)
    version = info.text("codebase_version")
    fps = info.number("fps")
    features, left_out = _features(info)
    episodes = (_v3 if version == V3 else _v2)(root, info, fps, features)
    _check_counts(root, info, episodes)
    for episode in episodes:
        files = [episode.file, *(span.file for span in episode.videos.values())]
        missing = next((file for file in files if not file.is_file()), None)
        if missing is not None:
            raise LeRobotError(
                f"{missing} is missing, which holds episode {episode.number}. Copy or download "
                "the data set again, whole."
            )
    tasks = _tasks(root, version)
    robot = info.values.get("robot_type")
    return Layout(
        root,
        version,
        fps,
        robot if isinstance(robot, str) else None,
        features,
        left_out,
        tuple(episodes),
        tasks,
    )


def check_version(root: Path) -> Info:
    """``meta/info.json`` of a data set in a layout that is read.

    Raises:
        LeRobotError: no LeRobot data set, or another version; says how to upgrade it.
    """
    if not is_lerobot(root):
        raise LeRobotError(f"{root} is no LeRobot data set: it has no meta/info.json.")
    if not (root / "meta" / "info.json").is_file():
        raise _outdated(root, "v1")
    info = Info(root / "meta" / "info.json")
    version = info.text("codebase_version")
    if version not in (V3, V2):
        raise _outdated(root, version)
    return info


def store_key(name: str) -> str:
    """The store's name of a LeRobot feature."""
    return name.removeprefix(_OBSERVATION)


def _outdated(root: Path, version: str) -> LeRobotError:
    if re.fullmatch(r"v?(3|[4-9]|\d\d+)(\.\d+)*", version):
        return LeRobotError(
            f"{root} is a LeRobotDataset {version}; {V3} and {V2} are read. A newer cmpolicy may "
            "read it."
        )
    how = _UPGRADES["v2.0"] if version.startswith(("v2", "2")) else _UPGRADES["v1"]
    return LeRobotError(
        f"{root} is a LeRobotDataset {version}; {V3} and {V2} are read. Upgrade it with lerobot's "
        f"own converter: {how}."
    )


def _features(info: Info) -> tuple[tuple[Feature, ...], dict[str, str]]:
    found, left_out = [], {}
    for name, description in info.mapping("features").items():
        if name != "action" and not name.startswith(_OBSERVATION):
            continue
        where = f"{info.path}: the feature {name!r}"
        if not isinstance(description, dict):
            raise LeRobotError(f"{where} is {description!r}, expected a mapping.")
        dtype, shape = description.get("dtype"), description.get("shape")
        if not isinstance(shape, list) or not all(isinstance(n, int) and n > 0 for n in shape):
            raise LeRobotError(f"{where} has the shape {shape!r}, expected numbers above 0.")
        key = store_key(name)
        if not KEY.fullmatch(key) or (key == "action") != (name == "action"):
            raise LeRobotError(f"{where} cannot be a key of a store. Rename it in the data set.")
        if dtype in ("video", "image"):
            if (description.get("info") or {}).get("video.is_depth_map"):
                left_out[name] = "a depth map, no colours"
                continue
            size = tuple(n for n in shape if n > 4)  # (H, W, C) or (C, H, W)
            if len(shape) != 3 or len(size) != 2:
                raise LeRobotError(f"{where} has the shape {shape}, expected height, width, 3.")
            found.append(Feature(name, key, dtype, size))
        elif dtype == "string":
            left_out[name] = "text"
        elif isinstance(dtype, str) and re.fullmatch(r"bool|u?int\d+|float(16|32|64)", dtype):
            names = _names(description.get("names"))
            found.append(Feature(name, key, dtype, tuple(shape), names))
        else:
            raise LeRobotError(f"{where} has the dtype {dtype!r}, which is not known.")
    if not any(feature.name == "action" for feature in found):
        raise LeRobotError(f"{info.path}: there is no feature 'action'.")
    return tuple(found), left_out


def _names(given: object) -> tuple[str, ...]:
    """Names of dimensions: a list, or a list within a mapping (``{"motors": [...]}``)."""
    if isinstance(given, dict) and len(given) == 1:
        given = next(iter(given.values()))
    if isinstance(given, list) and all(isinstance(name, str) for name in given):
        return tuple(given)
    return ()


def _v3(root: Path, info: Info, fps: float, features: Iterable[Feature]) -> list[Episode]:
    files = sorted((root / "meta" / "episodes").glob("*/*.parquet"))
    ranged = {
        f"stats/{f.name}/{edge}" for f in features if not f.is_camera for edge in ("min", "max")
    }
    rows: list[tuple[Path, dict[str, Any]]] = []
    for file in files:
        table = read_table(file)
        used = [n for n in table.column_names if n in ranged or not n.startswith("stats/")]
        rows += [(file, row) for row in table.select(used).to_pylist()]
    if not rows:
        raise LeRobotError(f"{root / 'meta/episodes'} holds no episodes (chunk-*/file-*.parquet).")
    cameras = [feature.name for feature in features if feature.dtype == "video"]
    episodes, first = [], 0
    for number, (file, row) in enumerate(rows):
        where = f"{file}, episode {number}"
        wanted = ("episode_index", "length", "dataset_from_index", "dataset_to_index")
        index, length, start, stop = (whole(row, key, where) for key in wanted)
        if (index, start, stop) != (number, first, first + length) or length < 1:
            raise LeRobotError(
                f"{where}: the metadata says episode_index {index}, length {length}, rows {start} "
                f"to {stop}; expected episode {number} with rows from {first} on."
            )
        videos = {}
        for name in cameras:
            begin, end = (
                seconds(row, f"videos/{name}/{edge}_timestamp", where) for edge in ("from", "to")
            )
            if abs((end - begin) * fps - length) > 0.5:
                raise LeRobotError(
                    f"{where}: its video of {name} is {end - begin:.4f} s long ({begin:.4f} to "
                    f"{end:.4f} s), but {length} steps at {fps:g} per second are "
                    f"{length / fps:.4f} s."
                )
            file_place = place(row, f"videos/{name}", where)
            videos[name] = Span(info.file("video_path", video_key=name, **file_place), begin, False)
        data = info.file("data_path", **place(row, "data", where))
        ranges = {
            f.name: (row[f"stats/{f.name}/min"], row[f"stats/{f.name}/max"])
            for f in features
            if not f.is_camera and row.get(f"stats/{f.name}/min") is not None
            if row.get(f"stats/{f.name}/max") is not None
        }
        episodes.append(Episode(number, length, first, data, videos, ranges))
        first += length
    return episodes


def _v2(root: Path, info: Info, fps: float, features: Iterable[Feature]) -> list[Episode]:
    file = root / "meta" / "episodes.jsonl"
    stats_file = root / "meta" / "episodes_stats.jsonl"
    stats = {row.get("episode_index"): row.get("stats") for row in json_lines(stats_file)}
    size = info.count("chunks_size")
    episodes, first = [], 0
    for number, row in enumerate(json_lines(file)):
        where = f"{file}, episode {number}"
        index, length = (whole(row, key, where) for key in ("episode_index", "length"))
        if index != number or length < 1:
            raise LeRobotError(
                f"{where}: the metadata says episode_index {index}, length {length}; expected "
                f"episode {number} with at least one step."
            )
        numbered = {"episode_chunk": number // max(1, size), "episode_index": number}
        videos = {
            f.name: Span(info.file("video_path", video_key=f.name, **numbered), 0.0, True)
            for f in features
            if f.dtype == "video"
        }
        own = stats.get(number) or {}
        ranges = {
            f.name: (own[f.name]["min"], own[f.name]["max"])
            for f in features
            if not f.is_camera and {"min", "max"} <= set(own.get(f.name) or ())
        }
        data = info.file("data_path", **numbered)
        episodes.append(Episode(number, length, first, data, videos, ranges))
        first += length
    if not episodes:
        raise LeRobotError(f"{file} lists no episodes.")
    return episodes


def _check_counts(root: Path, info: Info, episodes: list[Episode]) -> None:
    steps = sum(episode.length for episode in episodes)
    for key, there in (("total_episodes", len(episodes)), ("total_frames", steps)):
        said = info.count(key)
        if said != there:
            raise LeRobotError(
                f"{info.path}: {key} is {said}, but the episodes listed in {root / 'meta'} are "
                f"{there}. Part of the data set is missing: copy or download it again."
            )


def _tasks(root: Path, version: str) -> dict[int, str]:
    if version == V2:
        file = root / "meta" / "tasks.jsonl"
        rows = list(json_lines(file))
    else:
        file = root / "meta" / "tasks.parquet"
        rows = read_table(file).to_pylist()
    tasks = {}
    for row in rows:
        # pandas, which lerobot writes this file with, calls an index without a name so
        text = row.get("task", row.get("__index_level_0__"))
        number = row.get("task_index")
        if not isinstance(text, str) or not isinstance(number, int):
            raise LeRobotError(f"{file}: {row!r} is no task, expected task_index and task.")
        tasks[number] = text
    return tasks
