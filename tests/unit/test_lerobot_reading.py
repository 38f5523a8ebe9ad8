"""LeRobot data sets to stores: both layouts, and everything that is refused."""

from __future__ import annotations

import json
import shutil
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cmpolicy_data import ReplayBuffer, validate
from cmpolicy_data.convert.lerobot import errors
from cmpolicy_data.convert.lerobot.errors import LeRobotError
from cmpolicy_data.convert.lerobot.reading import read

TOP = "observation.images.top"
Write = Any  # the fixture's LeRobotWriter

pytest.importorskip("pyarrow")
pytest.importorskip("av")


def refused(root: Path, **settings: Any) -> str:
    """The message of the refusal; no store, scratch folder or thread is left."""
    out = root.parent / "out.zarr"
    with pytest.raises(LeRobotError) as caught:
        read(root, out, **settings)
    assert not list(root.parent.glob("*out.zarr*"))
    assert not [t for t in threading.enumerate() if t.name.startswith("lerobot")]
    return str(caught.value)


@pytest.mark.parametrize("version", ["v3.0", "v2.1"])
@pytest.mark.parametrize("mode", ["video", "image"])
def test_arrays_and_attributes(write_lerobot: Write, tmp_path: Path, version: str, mode: str):
    made = write_lerobot(tmp_path / "data", version, cameras=("top", "wrist"), mode=mode)
    told: list[tuple[int, int]] = []
    report = read(
        tmp_path / "data", tmp_path / "x.zarr", progress=lambda *now: told.append(now), threads=2
    )
    assert validate(tmp_path / "x.zarr", ["action", "state", "images.top", "images.wrist"]) == []
    buffer = ReplayBuffer.open(tmp_path / "x.zarr")
    assert buffer.episode_ends.tolist() == [7, 11, 20]
    for key in ("state", "action"):
        stored = np.asarray(buffer[key][:])
        assert (stored.dtype, stored.tobytes()) == (made[key].dtype, made[key].tobytes())
    for key in ("images.top", "images.wrist"):
        frames = np.asarray(buffer[key][:])
        assert (frames.shape, frames.dtype) == ((20, 64, 80, 3), np.uint8)
        seen = frames.reshape(20, -1).mean(axis=1)
        np.testing.assert_allclose(seen, made["levels"], atol=0 if mode == "image" else 2)
    attrs = buffer.attrs
    assert attrs["control_hz"] == 10
    assert attrs["tasks"] == ["push", "lift", "push"]
    assert attrs["names"] == {"state": ["a", "b", "c"], "action": ["x", "y"]}
    assert attrs["robot_type"] == "arm"
    assert attrs["source"] == {"name": "data", "layout": version, "commit": None}
    assert told == [(1, 3), (2, 3), (3, 3)]
    assert (report.episodes, report.steps, report.cameras) == (
        3, 20, ("images.top", "images.wrist"),
    )  # fmt: skip


def test_frames_that_come_in_several_parts(
    write_lerobot: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """Parts that do not end with an episode give the same frames."""
    made = write_lerobot(tmp_path / "data", lengths=(5, 13, 1), per_file=3)
    frame = 64 * 80 * 3
    monkeypatch.setattr("cmpolicy_data.parts._PART_BYTES", 9 * frame)
    monkeypatch.setattr("cmpolicy_data.parts._CHUNK_BYTES", 4 * frame)
    read(tmp_path / "data", tmp_path / "x.zarr")
    frames = np.asarray(ReplayBuffer.open(tmp_path / "x.zarr")["images.top"][:])
    np.testing.assert_allclose(frames.mean(axis=(1, 2, 3)), made["levels"], atol=2)


def test_several_tasks_and_what_is_left_out(write_lerobot: Write, tmp_path: Path):
    root = tmp_path / "data"
    write_lerobot(root)

    def two_tasks(table: Any) -> Any:
        numbers = [1, 1, 0, 0, 0, 1, 1, *([1] * 4)]
        at = table.schema.get_field_index("task_index")
        return table.set_column(at, "task_index", [numbers])

    write_lerobot.edit(write_lerobot.data_file(root, 0), two_tasks)
    features = json.loads((root / "meta/info.json").read_text())["features"]
    features["observation.note"] = {"dtype": "string", "shape": [1], "names": None}
    depth = {"dtype": "video", "shape": [64, 80, 1], "info": {"video.is_depth_map": True}}
    features["observation.images.depth"] = depth
    write_lerobot.edit_info(root, features=features)
    report = read(root, tmp_path / "x.zarr")
    assert report.left_out == {
        "observation.note": "text",
        "observation.images.depth": "a depth map, no colours",
    }
    assert ReplayBuffer.open(report.path).attrs["tasks"] == ["lift; push", "lift", "push"]


@pytest.mark.parametrize(
    ("version", "message"),
    [
        ("v2.0", "convert_dataset_v20_to_v21 (lerobot 0.3)"),
        ("v1.6", "convert_dataset_v1_to_v2.py of lerobot 0.1"),
        ("v3.1", "A newer cmpolicy may read it"),
        ("v4.0", "A newer cmpolicy may read it"),
    ],
)
def test_other_versions(write_lerobot: Write, tmp_path: Path, version: str, message: str):
    write_lerobot(tmp_path / "data")
    write_lerobot.edit_info(tmp_path / "data", codebase_version=version)
    said = refused(tmp_path / "data")
    assert f"is a LeRobotDataset {version}; v3.0 and v2.1 are read" in said
    assert message in said


def test_version_1_and_no_data_set(tmp_path: Path):
    (tmp_path / "old" / "meta_data").mkdir(parents=True)
    assert "is a LeRobotDataset v1" in refused(tmp_path / "old")
    (tmp_path / "none").mkdir()
    assert "it has no meta/info.json" in refused(tmp_path / "none")


@pytest.mark.parametrize("version", ["v3.0", "v2.1"])
def test_missing_files(write_lerobot: Write, tmp_path: Path, version: str):
    v3 = version == "v3.0"
    write_lerobot(tmp_path / "data", version)
    for file in (
        write_lerobot.video_file(tmp_path / "data", TOP, 1, v3),
        write_lerobot.data_file(tmp_path / "data", 1, v3),
    ):
        file.unlink()
        number = 2 if v3 else 1  # two episodes in a file, or one
        assert f"{file} is missing, which holds episode {number}" in refused(tmp_path / "data")


def _drop_row(row: int) -> Callable[[Any], Any]:
    return lambda table: table.take([i for i in range(table.num_rows) if i != row])


def _set(key: str, row: int, value: float) -> Callable[[Any], Any]:
    def change(table: Any) -> Any:
        column = table[key].to_numpy().copy()
        column[row] = value
        return table.set_column(table.schema.get_field_index(key), key, [column])

    return change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_drop_row(10), "episode 1 is cut short: it has 3 rows, then the file ends"),
        (_drop_row(6), "episode 0 is cut short: it has 6 rows, then those of episode 1 follow"),
        (_set("frame_index", 8, 5), "episode 1, step 1: frame_index is 5, expected 1"),
        (_set("index", 2, 0), "episode 0, step 2: index is 0, expected 2"),
        (_set("timestamp", 3, 0.35), "episode 0, step 3: timestamp is 0.3500 s, expected 0.3000 s"),
        (_set("timestamp", 3, np.nan), "timestamp is nan s"),
        (_set("task_index", 3, 9), "episode 0: task_index is 9, which meta/tasks does not list"),
        (lambda table: table.drop(["action"]), "has no column 'action'; it has: observation.state"),
        (
            lambda table: table.set_column(1, "action", [[0.5] * table.num_rows]),
            "action does not hold 2 number(s) per row, the shape [2]",
        ),
        (
            lambda table: table.set_column(1, "action", [[None] * table.num_rows]),
            "action does not hold 2 number(s) per row",
        ),
    ],
)
def test_rows_that_are_wrong(
    write_lerobot: Write, tmp_path: Path, change: Callable[[Any], Any], message: str
):
    root = tmp_path / "data"
    write_lerobot(root)
    file = write_lerobot.data_file(root, 0)
    write_lerobot.edit(file, change)
    said = refused(root)
    assert message in said
    assert str(file) in said


def test_more_rows_than_episodes(write_lerobot: Write, tmp_path: Path):
    write_lerobot(tmp_path / "data")
    file = write_lerobot.data_file(tmp_path / "data", 1)
    write_lerobot.edit(file, lambda t: t.take([*range(t.num_rows), 0]))
    assert f"{file} has 10 rows, but its episodes, 2 to 2, have 9" in refused(tmp_path / "data")


@pytest.mark.parametrize("key", ["data", "video"])
def test_damaged_files(write_lerobot: Write, tmp_path: Path, key: str):
    root = tmp_path / "data"
    write_lerobot(root)
    file = write_lerobot.data_file(root, 0)
    if key == "video":
        file = write_lerobot.video_file(root, TOP, 0)
    whole = file.read_bytes()
    for damaged in (b"", b"no", whole[: len(whole) // 2], whole[4:]):
        file.write_bytes(damaged)
        said = refused(root)
        assert str(file) in said
        assert "cannot be read as parquet" in said if key == "data" else "episode 0" in said


def test_videos_that_are_wrong(write_lerobot: Write, tmp_path: Path):
    root = tmp_path / "data"
    write_lerobot(root)
    file = write_lerobot.video_file(root, TOP, 0)
    write_lerobot.video(file, 0, 9)
    assert "episode 1: the video is cut short, its frame 2 of 4 (at 0.9000 s)" in refused(root)
    write_lerobot.video(file, 0, 11, fps=30)
    assert "frame 1 should be at 0.1000 s, but the next one in the video is at 0.0333" in refused(
        root
    )
    write_lerobot.video(file, 0, 11, skip=8)
    assert "episode 1: frame 1 should be at 0.8000 s, but the next one" in refused(root)
    shutil.copy(write_lerobot.data_file(root, 0), file)
    assert f"{file}, episode 0: the video cannot be decoded" in refused(root)
    write_lerobot.video(file, 0, 11)
    features = json.loads((root / "meta/info.json").read_text())["features"]
    features[TOP]["shape"] = [32, 40, 3]
    write_lerobot.edit_info(root, features=features)
    assert "the frame is 64 x 80, but meta/info.json says 32 x 40" in refused(root)


def test_video_of_another_episode(write_lerobot: Write, tmp_path: Path):
    """In v2.1 a file has the frames of one episode: neither fewer nor more."""
    root = tmp_path / "data"
    write_lerobot(root, "v2.1")
    files = [write_lerobot.video_file(root, TOP, i, False) for i in range(3)]
    shutil.copy(files[2], files[1])
    said = refused(root)
    assert f"{files[1]}, episode 1: the video has more frames than the episode has steps" in said


def test_pictures_that_are_wrong(write_lerobot: Write, tmp_path: Path):
    root = tmp_path / "data"
    write_lerobot(root, mode="image")
    file = write_lerobot.data_file(root, 0)
    kept = file.read_bytes()
    for cell, message in (
        ({"bytes": b"no", "path": None}, "the picture is damaged"),
        ({"bytes": None, "path": "x.png"}, "the picture is not inside the parquet file"),
        (None, "the picture is not inside the parquet file"),
    ):
        file.write_bytes(kept)

        def change(table: Any, cell: Any = cell) -> Any:
            cells = table[TOP].to_pylist()
            cells[8] = cell
            at = table.schema.get_field_index(TOP)
            return table.set_column(at, TOP, [cells])

        write_lerobot.edit(file, change)
        assert f"{file}, episode 1, {TOP}, step 1: {message}" in refused(root)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"total_episodes": 4}, "total_episodes is 4, but the episodes listed in"),
        ({"total_frames": 21}, "total_frames is 21, but the episodes listed in"),
        ({"fps": 0}, "fps is 0, expected a number above 0"),
        ({"fps": "fast"}, "fps is 'fast', expected a number above 0"),
        ({"fps": 20}, "its video of observation.images.top is 0.7000 s long"),
        ({"features": {}}, "there is no feature 'action'"),
        ({"features": 3}, "features is 3, expected a mapping"),
        ({"features": {"action": {"dtype": "what", "shape": [2]}}}, "has the dtype 'what'"),
        ({"features": {"action": {"dtype": "float32", "shape": None}}}, "has the shape None"),
        ({"features": {"action": 3}}, "the feature 'action' is 3, expected a mapping"),
        ({"data_path": "../{chunk_index}"}, "data_path leads out of the data set"),
        ({"data_path": "{nothing}"}, "data_path is '{nothing}', with KeyError"),
        ({"data_path": None}, "data_path is None, expected a text"),
    ],
)
def test_metadata_that_is_wrong(
    write_lerobot: Write, tmp_path: Path, values: dict[str, Any], message: str
):
    write_lerobot(tmp_path / "data")
    write_lerobot.edit_info(tmp_path / "data", **values)
    assert message in refused(tmp_path / "data")


@pytest.mark.parametrize("name", ["observation.action", "observation.a/b", "observation."])
def test_names_that_are_no_keys(write_lerobot: Write, tmp_path: Path, name: str):
    write_lerobot(tmp_path / "data")
    features = json.loads((tmp_path / "data/meta/info.json").read_text())["features"]
    write_lerobot.edit_info(
        tmp_path / "data", features={**features, name: features["observation.state"]}
    )
    assert f"the feature {name!r} cannot be a key of a store" in refused(tmp_path / "data")


@pytest.mark.parametrize(
    ("file", "text"),
    [("info.json", "{"), ("info.json", "[]"), ("episodes.jsonl", "[1]"), ("tasks.jsonl", "{}")],
)
def test_metadata_files_that_are_damaged(
    write_lerobot: Write, tmp_path: Path, file: str, text: str
):
    write_lerobot(tmp_path / "data", "v2.1")
    (tmp_path / "data" / "meta" / file).write_text(text)
    assert file in refused(tmp_path / "data")
    (tmp_path / "data" / "meta" / file).unlink()
    assert file in refused(tmp_path / "data") or file == "info.json"


def test_episodes_whose_metadata_is_wrong(write_lerobot: Write, tmp_path: Path):
    root = tmp_path / "data"
    write_lerobot(root)
    file = root / "meta" / "episodes" / "chunk-000" / "file-000.parquet"
    whole = file.read_bytes()
    for key, row, value, message in (
        ("length", 1, 5, "episode_index 1, length 5, rows 7 to 11"),
        ("episode_index", 1, 2, "expected episode 1 with rows from 7 on"),
        ("dataset_from_index", 2, 12, "rows 12 to 20"),
        (f"videos/{TOP}/from_timestamp", 1, 0.3, f"its video of {TOP} is 0.8000 s long"),
        (f"videos/{TOP}/from_timestamp", 1, np.nan, "is nan, expected seconds"),
    ):
        file.write_bytes(whole)
        write_lerobot.edit(file, _set(key, row, value))
        said = refused(root)
        assert message in said
        assert f"{file}, episode" in said


@pytest.mark.parametrize("version", ["v3.0", "v2.1"])
def test_statistics_that_disagree(write_lerobot: Write, tmp_path: Path, version: str):
    root = tmp_path / "data"
    v3 = version == "v3.0"
    write_lerobot(root, version)
    file = write_lerobot.data_file(root, 0, v3)

    def change(table: Any) -> Any:
        rows = table["action"].to_pylist()
        rows[2] = [50.0, -50.0]
        return table.set_column(1, "action", [rows])

    write_lerobot.edit(file, change)
    said = refused(root)
    assert f"{file}, episode 0: the min of action is [" in said
    assert "check_stats=false" in said
    report = read(root, tmp_path / "x.zarr", check_stats=False)
    assert np.asarray(ReplayBuffer.open(report.path)["action"][2]).tolist() == [50.0, -50.0]


def test_targets_and_missing_packages(
    write_lerobot: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    write_lerobot(tmp_path / "data")
    with pytest.raises(ValueError, match=r"must be the path of a store"):
        read(tmp_path / "data", tmp_path / "x.tar")
    with pytest.raises(ValueError, match="threads must be at least 1, got 0"):
        read(tmp_path / "data", tmp_path / "x.zarr", threads=0)
    for name, module in (("pyarrow", "pyarrow.parquet"), ("av", "av")):
        with monkeypatch.context() as patch:
            patch.setitem(__import__("sys").modules, module, None)
            with pytest.raises(ImportError, match=rf"{name}.*pip install 'cmpolicy\[lerobot\]'"):
                read(tmp_path / "data", tmp_path / "x.zarr")
    assert isinstance(errors.LeRobotError("x"), ValueError)
