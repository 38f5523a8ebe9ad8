"""Stores to LeRobot data sets: layout, statistics, several files, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cmpolicy_data import ReplayBuffer
from cmpolicy_data.convert.lerobot import stats, writing
from cmpolicy_data.convert.lerobot.errors import LeRobotError
from cmpolicy_data.convert.lerobot.layout import read_layout
from cmpolicy_data.convert.lerobot.reading import read
from cmpolicy_data.convert.lerobot.writing import write

pq = pytest.importorskip("pyarrow.parquet")
pytest.importorskip("av")

LENGTHS = (5, 1, 12, 4)


@pytest.fixture
def store(tmp_path: Path) -> Path:
    attrs = {
        "control_hz": 20,
        "tasks": ["push", "lift", "push", "wait"],
        "names": {"action": ["x", "y"], "state": ["too", "few"]},
        "robot_type": "arm",
    }
    buffer = ReplayBuffer.create(tmp_path / "s.zarr", attrs=attrs)
    rng = np.random.default_rng(0)
    for number, length in enumerate(LENGTHS):
        levels = 20 + 40 * number + 3 * np.arange(length)
        frames = np.broadcast_to(levels[:, None, None, None], (length, 64, 72, 3))
        buffer.append_episode(
            {
                "action": rng.normal(size=(length, 2)).astype(np.float32),
                "state": rng.normal(size=(length, 5)),
                "points": rng.normal(size=(length, 3, 2)).astype(np.float32),
                "grip": rng.integers(0, 9, length),
                "img": frames.astype(np.float32),
                "image_wrist": frames.astype(np.uint8),
                "image_first": np.moveaxis(frames, -1, 1).astype(np.uint8),
            }
        )
    return buffer.path


def arrays(path: Path, *keys: str) -> list[Any]:
    buffer = ReplayBuffer.open(path)
    return [np.asarray(buffer[key][:]) for key in keys]


@pytest.mark.parametrize("images", ["video", "image"])
def test_there_and_back(store: Path, tmp_path: Path, images: str):
    told: list[tuple[int, int]] = []
    report = write(store, tmp_path / "d", images=images, progress=lambda *now: told.append(now))
    assert told == [(1, 4), (2, 4), (3, 4), (4, 4)]
    assert report.tasks == ("push", "lift", "wait")
    assert (tmp_path / "d").stat().st_mode & 0o777 == (
        tmp_path / "d" / "meta"
    ).stat().st_mode & 0o777
    read(tmp_path / "d", tmp_path / "back.zarr")
    keys = ["action", "state", "points", "grip"]
    for key, before, after in zip(
        keys, arrays(store, *keys), arrays(tmp_path / "back.zarr", *keys), strict=True
    ):
        after = after.reshape(before.shape)
        assert (after.dtype, after.tobytes()) == (before.dtype, before.tobytes()), key
    exact = arrays(store, "img", "image_wrist", "image_wrist")
    back = arrays(tmp_path / "back.zarr", "images.img", "image_wrist", "image_first")
    for before, after in zip(exact, back, strict=True):
        assert after.dtype == np.uint8
        worst = np.abs(after.astype(float) - before).mean(axis=(1, 2, 3)).max()
        assert worst <= (0 if images == "image" else 3)
    attrs = ReplayBuffer.open(tmp_path / "back.zarr").attrs
    assert attrs["tasks"] == ["push", "lift", "push", "wait"]
    assert (attrs["control_hz"], attrs["robot_type"]) == (20, "arm")
    assert attrs["names"] == {"action": ["x", "y"]}
    again = arrays(tmp_path / "back.zarr", *keys)
    write(tmp_path / "back.zarr", tmp_path / "d2", images="image")
    read(tmp_path / "d2", tmp_path / "back2.zarr")
    for before, after in zip(again, arrays(tmp_path / "back2.zarr", *keys), strict=True):
        assert before.tobytes() == after.tobytes()


def test_metadata(store: Path, tmp_path: Path):
    write(store, tmp_path / "d")
    info = json.loads((tmp_path / "d/meta/info.json").read_text())
    assert (info["codebase_version"], info["fps"], info["total_tasks"]) == ("v3.0", 20, 3)
    assert info["splits"] == {"train": "0:4"}
    feature = info["features"]["observation.images.img"]
    assert (feature["dtype"], feature["shape"]) == ("video", [64, 72, 3])
    assert feature["info"]["video.codec"] == "av1"
    assert info["features"]["action"]["names"] == ["x", "y"]
    assert info["features"]["observation.grip"]["shape"] == [1]
    rows = pq.ParquetFile(tmp_path / "d/meta/episodes/chunk-000/file-000.parquet").read()
    rows = rows.to_pylist()
    starts = [row["videos/observation.images.img/from_timestamp"] for row in rows]
    assert starts == [0, 0.25, 0.3, 0.9]
    assert [row["dataset_to_index"] for row in rows] == [5, 6, 18, 22]
    tasks = pq.ParquetFile(tmp_path / "d/meta/tasks.parquet").read().to_pylist()
    assert [row["__index_level_0__"] for row in tasks] == ["push", "lift", "wait"]
    found = json.loads((tmp_path / "d/meta/stats.json").read_text())
    action = arrays(store, "action")[0].astype(float)
    for name, expected in (
        ("min", action.min(0)),
        ("max", action.max(0)),
        ("mean", action.mean(0)),
        ("std", action.std(0)),
        ("count", [22]),
    ):
        np.testing.assert_allclose(found["action"][name], expected, rtol=1e-6)
    picture = found["observation.images.img"]
    assert np.shape(picture["mean"]) == (3, 1, 1)
    pixels = arrays(store, "img")[0] / 255
    np.testing.assert_allclose(np.ravel(picture["mean"]), pixels.mean(), rtol=1e-6)
    np.testing.assert_allclose(np.ravel(picture["std"]), pixels.std(), rtol=1e-6)
    np.testing.assert_allclose(np.ravel(picture["max"]), pixels.max())


def test_levels_agree_with_the_pixels():
    rng = np.random.default_rng(1)
    frames = rng.integers(10, 200, (250, 20, 30, 3), dtype=np.uint8)
    levels = stats.Levels(250, (20, 30))
    for part in np.array_split(frames, 7):
        levels.add(part)
    found = levels.stats()
    chosen = frames[::2] / 255
    assert found["count"].tolist() == [125]
    for name, value in stats.of_rows(chosen.reshape(-1, 3)).items():
        if name != "count":
            np.testing.assert_allclose(found[name].ravel(), value, atol=1 / 255)


@pytest.mark.parametrize("images", ["video", "image"])
def test_several_files_and_folders(
    store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, images: str
):
    """New files once one is large, new folders once one is full; read back as one."""
    monkeypatch.setattr(writing, "_FILES_PER_CHUNK", 3)
    monkeypatch.setattr(writing, "_MB", 1)
    monkeypatch.setattr(writing, "_VIDEO_MB", 0)  # an encoder holds back a few frames
    write(store, tmp_path / "d", images=images)
    layout = read_layout(tmp_path / "d")
    files = [str(episode.file.relative_to(tmp_path / "d/data")) for episode in layout.episodes]
    assert files == [
        "chunk-000/file-000.parquet",
        "chunk-000/file-001.parquet",
        "chunk-000/file-002.parquet",
        "chunk-001/file-000.parquet",
    ]
    if images == "video":
        videos = {episode.videos["observation.images.img"].file for episode in layout.episodes}
        assert len(videos) == 4
    read(tmp_path / "d", tmp_path / "back.zarr")
    assert (
        arrays(tmp_path / "back.zarr", "action")[0].tobytes()
        == arrays(store, "action")[0].tobytes()
    )
    assert sorted(p.name for p in tmp_path.iterdir()) == ["back.zarr", "d", "s.zarr"]


def test_chosen_keys_codec_and_rate(store: Path, tmp_path: Path):
    keys = ["action", "image_wrist"]
    report = write(store, tmp_path / "d", keys=keys, codec="h264", crf=10, fps=12.5, task="go")
    assert report.features == ("action", "observation.image_wrist")
    assert (report.fps, report.tasks) == (12.5, ("go",))
    read(tmp_path / "d", tmp_path / "back.zarr")
    assert ReplayBuffer.open(tmp_path / "back.zarr").attrs["control_hz"] == 12.5


def test_what_has_to_be_said(store: Path, tmp_path: Path):
    plain = ReplayBuffer.create(tmp_path / "plain.zarr")
    plain.append_episode({"action": np.zeros((3, 2), np.float32)})
    with pytest.raises(LeRobotError, match=r"does not say what its episodes do.*Say it: task="):
        write(plain.path, tmp_path / "d")
    with pytest.raises(LeRobotError, match=r"does not say its rate.*fps=10"):
        write(plain.path, tmp_path / "d", task="go")
    write(plain.path, tmp_path / "d", task="go", fps=10)
    with pytest.raises(FileExistsError, match=r"exists already. Choose another folder"):
        write(plain.path, tmp_path / "d", task="go", fps=10)
    with pytest.raises(FileNotFoundError, match=r"is not a folder. Create it first"):
        write(plain.path, tmp_path / "no" / "d", task="go", fps=10)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"fps": 0.0}, "fps=0.0 must be a number of steps per second"),
        ({"images": "gif"}, "images must be video or image, got 'gif'"),
        ({"codec": "vp9"}, "codec must be one of av1, h264, hevc, got 'vp9'"),
        ({"keys": ["state"]}, r"the keys \['state'\] do not hold 'action'"),
        ({"keys": ["action", "pose"]}, "has no key 'pose'"),
    ],
)
def test_settings_that_are_refused(
    store: Path, tmp_path: Path, settings: dict[str, Any], message: str
):
    with pytest.raises(ValueError, match=message):
        write(store, tmp_path / "d", **settings)
    assert [path.name for path in tmp_path.iterdir()] == ["s.zarr"]


def test_frames_that_an_encoder_refuses(tmp_path: Path):
    """Odd sizes are no video; pictures take them. Nothing is left of the attempt."""
    buffer = ReplayBuffer.create(tmp_path / "s.zarr", attrs={"control_hz": 10})
    frames = np.zeros((3, 33, 35, 3), np.uint8)
    buffer.append_episode({"action": np.zeros((3, 1), np.float32), "cam": frames})
    with pytest.raises(LeRobotError, match=r"encoder failed on frames of 33 x 35.*images=image"):
        write(buffer.path, tmp_path / "d", task="go", codec="h264")
    assert [path.name for path in tmp_path.iterdir()] == ["s.zarr"]
    write(buffer.path, tmp_path / "d", task="go", images="image")


@pytest.mark.parametrize("codec", ["av1", "h264", "hevc"])
def test_frames_do_not_look_like_the_episode_before(
    tmp_path: Path, codec: str, capfd: pytest.CaptureFixture[str]
):
    """Episodes share a file; each of their frames is nearer to itself than to any other."""
    pictures = np.random.default_rng(0).integers(0, 256, (3, 8, 8, 3), dtype=np.uint8)
    buffer = ReplayBuffer.create(tmp_path / "s.zarr", attrs={"control_hz": 10})
    for picture in pictures:
        still = np.kron(picture, np.ones((8, 8, 1), np.uint8))
        frames = np.stack([np.roll(still, 8 * step, axis=1) for step in range(5)])
        buffer.append_episode({"action": np.zeros((5, 1), np.float32), "images": frames})
    write(buffer.path, tmp_path / "d", task="go", codec=codec)
    read(tmp_path / "d", tmp_path / "back.zarr")
    before, after = (
        arrays(path, "images")[0].astype(int) for path in (buffer.path, tmp_path / "back.zarr")
    )
    off = np.abs(after[:, None] - before[None]).mean(axis=(2, 3, 4))
    assert off.argmin(axis=1).tolist() == list(range(15))
    assert capfd.readouterr().err == ""


def test_keys_that_would_be_one_or_no_name(tmp_path: Path):
    frames = np.zeros((3, 32, 32, 3), np.uint8)
    action = np.zeros((3, 2), np.float32)
    both = ReplayBuffer.create(tmp_path / "both.zarr")
    both.append_episode({"action": action, "top": frames, "images.top": frames})
    with pytest.raises(LeRobotError, match=r"\['images.top', 'top'\] would both be"):
        write(both.path, tmp_path / "d", task="go", fps=10)
    write(both.path, tmp_path / "one", task="go", fps=10, keys=["action", "top"])
    nested = ReplayBuffer.create(tmp_path / "nested.zarr")
    nested.append_episode({"action": action, "observation/state": action})
    write(nested.path, tmp_path / "two", task="go", fps=10)
    read(tmp_path / "two", tmp_path / "back.zarr")
    assert ReplayBuffer.open(tmp_path / "back.zarr").keys() == ["action", "state"]
    odd = ReplayBuffer.create(tmp_path / "odd.zarr")
    odd.append_episode({"action": action, "grip\u00e9": action})
    with pytest.raises(LeRobotError, match="no name there"):
        write(odd.path, tmp_path / "three", task="go", fps=10)
