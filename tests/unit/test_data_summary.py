"""What ``inspect`` shows."""

from pathlib import Path

import numpy as np
import pytest
import zarr

from cmpolicy_data import ReplayBuffer, ReplayBufferError, validate
from cmpolicy_data.chunks import blocks
from cmpolicy_data.summary import format_summary, summarize


@pytest.fixture
def store(tmp_path: Path) -> Path:
    buffer = ReplayBuffer.create(tmp_path / "demos.zarr", attrs={"robot": "arm"})
    for length in (4, 6, 20):
        values = np.arange(length * 2, dtype=np.float64).reshape(length, 2)
        buffer.append_episode({"action": values, "image": np.full((length, 3, 3), 9, np.uint8)})
    return buffer.path


def test_the_numbers(store: Path):
    summary = summarize(store)
    assert summary.zarr_format == 3
    assert summary.lengths.tolist() == [4, 6, 20]
    assert summary.bytes_on_disk == sum(f.stat().st_size for f in store.rglob("*") if f.is_file())
    action, image = summary.keys
    values = ReplayBuffer.open(store).load("action")
    assert (action.key, action.shape, action.dtype) == ("action", (30, 2), "float64")
    assert (action.minimum, action.maximum) == (0, 39)
    assert action.mean == pytest.approx(values.mean())
    assert (image.minimum, image.maximum, image.mean) == (9, 9, 9)
    assert (image.chunks_stored, image.chunks_total) == (1, 1)


def test_the_text(store: Path):
    text = format_summary(summarize(store))
    assert "zarr format 3" in text
    assert "3 episodes, 30 steps" in text
    assert "action  30 x 2      float64" in text
    assert "episode lengths: 4 to 20 steps, mean 10.0" in text
    assert "robot: arm" in text
    assert text.count("#") > 0


def test_blocks_smaller_than_the_array(tmp_path: Path):
    """Large arrays are read block by block: the sums must not notice."""
    root = zarr.create_group(tmp_path / "big.zarr", zarr_format=2)
    values = np.ones((6, 1000, 800), np.float32) * np.arange(6)[:, None, None].astype(np.float32)
    array = root.create_array(
        "data/img", shape=values.shape, chunks=(3, 1000, 800), dtype="float32"
    )
    assert len(blocks(array)) == 2
    values[5, 0, 0] = np.nan
    array[...] = values
    root.create_array("meta/episode_ends", shape=(1,), dtype="int64")[...] = 6
    summary = summarize(tmp_path / "big.zarr")
    (img,) = summary.keys
    assert img.mean == pytest.approx(np.nanmean(values.astype(np.float64)), rel=1e-9)
    assert (img.minimum, img.maximum) == (np.nanmin(values), np.nanmax(values))
    assert img.n_not_finite == 1
    assert "img: 1 values are NaN or infinite" in format_summary(summary)


def test_left_out_chunks_are_counted(tmp_path: Path):
    root = zarr.create_group(tmp_path / "z.zarr")
    array = root.create_array("data/action", shape=(20, 1), chunks=(4, 1), dtype="float32")
    array[:4] = 1
    root.create_array("meta/episode_ends", shape=(1,), dtype="int64")[...] = 20
    text = format_summary(summarize(tmp_path / "z.zarr"))
    assert "1/5" in text


def test_an_empty_store(tmp_path: Path):
    ReplayBuffer.create(tmp_path / "x.zarr")
    assert "no episodes" in format_summary(summarize(tmp_path / "x.zarr"))


def test_a_damaged_store(store: Path):
    file = store / "data/action/c/0/0"
    file.write_bytes(file.read_bytes()[:9])
    with pytest.raises(ReplayBufferError, match="chunk data/action/c/0/0"):
        summarize(store)


def test_images_and_what_cannot_be_read(tmp_path: Path) -> None:
    buffer = ReplayBuffer.create(tmp_path / "cameras.zarr")
    top = np.broadcast_to(np.array([10, 20, 30], np.uint8), (5, 12, 16, 3))
    floats = np.full((5, 12, 16, 3), 0.5, np.float32)
    buffer.append_episode({"top": top, "wrist": floats, "action": np.zeros((5, 1))})
    broken = buffer.path / "data/other"
    broken.mkdir()
    (broken / "zarr.json").write_text('{"zarr_format": 3, "node_type": "array"}')
    text = format_summary(summarize(buffer.path))
    assert "top: images of 12 x 16, mean colour (10, 20, 30), 2.88 kB as uint8, codec" in text
    assert "wrist: frames in 0..1, which a training refuses; multiply by 255" in text
    assert "other: not read, its codec or its description cannot be read" in text


def test_what_steers_a_terminal_is_escaped(tmp_path: Path) -> None:
    red = "a\x1b[31mb\nc"
    buffer = ReplayBuffer.create(tmp_path / "s.zarr", attrs={red: f"{red}é"})
    buffer.append_episode({"action": np.ones((3, 1)), red.replace("\n", ""): np.full(3, np.nan)})
    text = format_summary(summarize(buffer.path))
    assert "\x1b" not in text
    assert "a\\x1b[31mb\\nc: a\\x1b[31mb c" in text
    assert "é" in text
    assert "\x1b" not in "".join(map(str, validate(buffer.path)))
