"""Against lerobot itself, in an environment of its own: ``make test-lerobot``."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cmpolicy_data import ReplayBuffer
from cmpolicy_data.convert.lerobot.reading import read
from cmpolicy_data.convert.lerobot.writing import write

PYTHON = os.environ.get("CMPOLICY_LEROBOT_PYTHON", "")
SIDE = Path(__file__).with_name("lerobot_side.py")
CAMERAS = ("top", "wrist")

pytestmark = pytest.mark.skipif(
    not PYTHON, reason="no lerobot; name a Python that has it in CMPOLICY_LEROBOT_PYTHON"
)


@pytest.fixture(scope="module")
def theirs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Data sets that lerobot wrote: video/, image/, and their numbers."""
    folder = tmp_path_factory.mktemp("theirs")
    lerobot(folder, "write", folder)
    return folder


def lerobot(home: Path, *words: object) -> None:
    """Run the other side."""
    env = {key: value for key, value in os.environ.items() if not key.startswith("PYTHON")}
    env |= {"HF_HUB_OFFLINE": "1", "HF_HOME": str(home / "hf")}
    done = subprocess.run(
        [PYTHON, str(SIDE), *map(str, words)], env=env, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-3000:]


def loaded(folder: Path, tmp_path: Path) -> Any:
    """What lerobot reads of a data set."""
    lerobot(tmp_path, "load", folder, tmp_path / "loaded.npz")
    return np.load(tmp_path / "loaded.npz")


def frames(found: Any, name: str) -> Any:
    """lerobot's (N, 3, H, W) in [0, 1] as (N, H, W, 3) grey levels."""
    return np.rint(np.moveaxis(found[name], 1, -1) * 255).astype(int)


@pytest.mark.parametrize("mode", ["video", "image"])
def test_what_lerobot_wrote_is_read(theirs: Path, tmp_path: Path, mode: str):
    """The same numbers to the bit, and the same frames as lerobot itself reads."""
    read(theirs / mode, tmp_path / "x.zarr")
    buffer = ReplayBuffer.open(tmp_path / "x.zarr")
    found = loaded(theirs / mode, tmp_path)
    numbers = np.load(theirs / f"{mode}.npy")
    assert np.asarray(buffer["state"][:]).tobytes() == numbers[:, :4].tobytes()
    assert np.asarray(buffer["action"][:]).tobytes() == numbers[:, 4:].tobytes()
    assert buffer.episode_ends.tolist() == [13, 21, 42]
    assert buffer.attrs["tasks"] == ["push the block", "lift it", "push the block"]
    for camera in CAMERAS:
        ours = np.asarray(buffer[f"images.{camera}"][:]).astype(int)
        assert np.abs(ours - frames(found, f"observation.images.{camera}")).max() <= 2


@pytest.mark.parametrize("images", ["video", "image"])
def test_what_we_write_loads_in_lerobot(theirs: Path, tmp_path: Path, images: str):
    """Numbers to the bit, frames within the loss of the codec, tasks and statistics."""
    read(theirs / "image", tmp_path / "x.zarr")
    buffer = ReplayBuffer.open(tmp_path / "x.zarr")
    write(tmp_path / "x.zarr", tmp_path / "d", images=images)
    found = loaded(tmp_path / "d", tmp_path)
    for key, name in (("state", "observation.state"), ("action", "action")):
        assert found[name].tobytes() == np.asarray(buffer[key][:]).tobytes()
    assert (int(found["fps"]), int(found["episodes"])) == (10, 3)
    assert found["episode"].tolist() == [0] * 13 + [1] * 8 + [2] * 21
    texts = ["push the block"] * 13 + ["lift it"] * 8 + ["push the block"] * 21
    assert found["tasks"].tolist() == texts
    np.testing.assert_allclose(found["mean"], np.asarray(buffer["action"][:]).mean(0), atol=1e-6)
    for camera in CAMERAS:
        ours = np.asarray(buffer[f"images.{camera}"][:]).astype(int)
        off = np.abs(ours - frames(found, f"observation.images.{camera}"))
        assert off.mean(axis=(1, 2, 3)).max() <= (5 if images == "video" else 0)


def test_every_kind_of_numbers_loads_in_lerobot(tmp_path: Path):
    buffer = ReplayBuffer.create(tmp_path / "s.zarr")
    rng = np.random.default_rng(0)
    for length in (4, 6):
        buffer.append_episode(
            {
                "action": rng.normal(size=(length, 2)).astype(np.float32),
                "pose": rng.normal(size=(length, 7)),
                "points": rng.normal(size=(length, 9, 2)).astype(np.float32),
                "count": rng.integers(0, 9, (length, 2)),
                "open": rng.integers(0, 2, length).astype(bool),
                "one": rng.normal(size=(length, 1)).astype(np.float32),
            }
        )
    write(buffer.path, tmp_path / "d", task="go", fps=12.5)
    found = loaded(tmp_path / "d", tmp_path)
    for key in ("pose", "points", "count", "open", "one"):
        expected = np.asarray(buffer[key][:])
        there = found[f"observation.{key}"]
        # torch.tensor of lists gives float32, whatever is in the file
        np.testing.assert_array_equal(there.ravel(), expected.astype(there.dtype).ravel())
    assert float(found["fps"]) == 12.5
