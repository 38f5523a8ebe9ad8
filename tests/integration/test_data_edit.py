"""Stores edited, converted from ALOHA, and named for what they are if they are none."""

from __future__ import annotations

import io
import shlex
from pathlib import Path
from typing import Literal

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

import cmpolicy
from cmpolicy.cli.main import main
from cmpolicy.experiment.data import load_training_data
from cmpolicy.experiment.train import new_policy
from cmpolicy_data import ReplayBuffer, validate
from cmpolicy_data.chunks import ReplayBufferError
from cmpolicy_data.convert import aloha
from cmpolicy_data.convert.edit import EditError, edit, plan

h5py = pytest.importorskip("h5py")
ENDS = np.array([10, 15, 35, 36])


@pytest.fixture
def store(tmp_path: Path) -> Path:
    buffer = ReplayBuffer.create(tmp_path / "s.zarr", attrs={"control_hz": 20, "demos": ["a"]})
    for start, stop in ((0, 10), (10, 15), (15, 35), (35, 36)):
        rows = np.arange(start, stop)
        frames = np.broadcast_to(rows[:, None, None, None], (stop - start, 8, 8, 3))
        buffer.append_episode(
            {"action": rows[:, None].astype("f8"), "top": frames.astype(np.uint8)}
        )
    return buffer.path


def test_drop_join_cut_and_short_ones(store: Path, tmp_path: Path) -> None:
    out = edit(store, tmp_path / "o.zarr", drop=[0], cut={2: [4, 19]}, min_steps=2)
    assert out.episode_ends.tolist() == [5, 9, 24]
    expected = [*range(10, 15), *range(15, 19), *range(19, 34)]
    assert out.load("action")[:, 0].tolist() == expected
    assert out["action"].dtype == np.float64
    assert out["top"][:, 0, 0, 0].tolist() == expected
    assert out.attrs["control_hz"] == 20
    assert "demos" not in out.attrs
    assert validate(out.path) == []
    joined = edit(store, tmp_path / "j.zip", join=[[0, 1], [2, 3]])
    assert joined.episode_ends.tolist() == [15, 36]
    assert joined.load("action")[:, 0].tolist() == list(range(36))


@given(st.data())
@settings(max_examples=60, deadline=None)
def test_what_is_not_dropped_is_there_once_and_in_order(data: st.DataObject) -> None:
    lengths = data.draw(st.lists(st.integers(1, 9), min_size=2, max_size=8))
    ends = np.cumsum(lengths)
    drop = data.draw(st.sets(st.integers(0, len(ends) - 1), max_size=len(ends) - 1))
    rest = [e for e in range(len(ends)) if e not in drop and lengths[e] > 1]
    cut = {e: [data.draw(st.integers(1, lengths[e] - 1))] for e in rest[:2]}
    episodes = plan(ends, drop=sorted(drop), cut=cut)
    rows = [row for parts in episodes for start, stop in parts for row in range(start, stop)]
    owner = np.repeat(np.arange(len(ends)), lengths)
    assert rows == [row for row in range(ends[-1]) if owner[row] not in drop]
    assert len(episodes) == len(ends) - len(drop) + len(cut)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"drop": [4]}, "there is no episode 4: the store has 0 to 3"),
        ({"drop": [1], "cut": {1: [2]}}, "episode 1 is named by more than one of"),
        ({"join": [[0, 2]]}, r"join=\[0, 2\] must be episodes that follow one another"),
        ({"cut": {1: [5]}}, r"episode 1 has 5 steps; it cannot be cut before step \[5\]"),
        ({"drop": [0, 1, 2, 3]}, "no episode is left"),
    ],
)
def test_what_cannot_be_done(changes: dict[str, object], words: str) -> None:
    with pytest.raises(EditError, match=words):
        plan(ENDS, **changes)  # type: ignore[arg-type]


def test_the_command(store: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "o.zarr"
    words = ["data", "edit", str(store), "drop=[0,3]", "join=[[1,2]]"]
    assert main(words) == 2
    assert "out is not set" in capsys.readouterr().err
    assert main([*words, f"out={store}"]) == 2
    assert "it is not known that `cmpolicy data convert`" in capsys.readouterr().err
    assert main([*words, f"out={out}"]) == 0
    assert "1 episode(s), 25 steps" in capsys.readouterr().out
    assert main(["data", "edit", str(out), "cut={0: [5]}", f"out={out}"]) == 2
    assert "is the store itself" in capsys.readouterr().err
    assert main([*words, f"out={out}"]) == 0  # it can be made again
    mine = ReplayBuffer.open(out, "r+")
    mine.append_episode({key: np.asarray(mine[key][:5]) for key in mine})
    assert main([*words, f"out={out}"]) == 2
    assert "what is in it might be lost" in capsys.readouterr().err
    assert ReplayBuffer.open(out).n_episodes == 2
    copied = ReplayBuffer.create(tmp_path / "mine.zarr", attrs=mine.attrs)
    assert main([*words, f"out={copied.path}"]) == 2  # the attributes of another store
    assert main(["data", "edit", str(out), "cut={a: [5]}", f"out={out}"]) == 2
    assert "must be steps by episode number" in capsys.readouterr().err


# -- ALOHA ----------------------------------------------------------------------------------------


def write_aloha(
    path: Path,
    n: int,
    *,
    jpeg: Literal["no", "padded", "strings"] = "no",
    seed: int = 0,
    **more: object,
) -> None:
    rng = np.random.default_rng(seed)
    with h5py.File(path, "w") as file:
        file["action"] = rng.normal(size=(n, 14))
        file["observations/qpos"] = rng.normal(size=(n, 14))
        file["observations/qvel"] = rng.normal(size=(n, 14))
        file["base_action"] = np.full((n, 2), 0.5)
        file["observations/images_depth/cam_high"] = np.zeros((n, 8, 8), np.uint16)
        file["observations/images/cam_depth"] = np.zeros((n, 8, 8, 1), np.uint16)
        frames = np.zeros((n, 24, 32, 3), np.uint8)
        frames[..., 0] = 200  # red
        frames[..., 2] = np.arange(n)[:, None, None]
        if jpeg != "no":
            coded = []
            for frame in frames:
                buffer = io.BytesIO()
                Image.fromarray(frame[..., ::-1].copy()).save(buffer, "JPEG", quality=95)
                coded.append(np.frombuffer(buffer.getvalue(), np.uint8))
        if jpeg == "strings":
            kind = h5py.vlen_dtype(np.dtype(np.uint8))
            strings = file.create_dataset("observations/images/cam_high", (n,), kind)
            for step, code in enumerate(coded):
                strings[step] = code
        elif jpeg == "padded":
            padded = np.zeros((n, max(map(len, coded))), np.uint8)
            for row, code in zip(padded, coded, strict=True):
                row[: len(code)] = code
            file["observations/images/cam_high"] = padded
        else:
            file["observations/images/cam_high"] = frames
        for key, value in more.items():
            file[key] = value


@pytest.mark.parametrize("jpeg", ["no", "padded", "strings"])
def test_aloha_episodes(
    tmp_path: Path,
    jpeg: Literal["no", "padded", "strings"],
    capsys: pytest.CaptureFixture[str],
) -> None:
    source = tmp_path / "task"
    source.mkdir()
    for number in (10, 2, 0):  # by number, not by name
        write_aloha(source / f"episode_{number}.hdf5", number + 3, jpeg=jpeg, seed=number)
    out = tmp_path / "o.zarr"
    assert main(["data", "convert", "aloha", str(source), f"out={out}"]) == 0
    said = capsys.readouterr().out
    assert "3 episode(s), 21 steps" in said
    assert [x for x in said.splitlines() if x.startswith("left out: ")] == [
        "left out: observations/images/cam_depth",
        "left out: observations/images_depth/cam_high",
    ]
    buffer = ReplayBuffer.open(out)
    assert buffer["action"].shape == (21, 16)  # the base's last, as Mobile ALOHA trains
    assert (buffer.load("action[14:]") == 0.5).all()
    assert buffer.keys() == ["action", "cam_high", "qpos", "qvel"]
    assert buffer.episode_ends.tolist() == [3, 8, 21]
    assert buffer.attrs["control_hz"] == 50
    frame = buffer["cam_high"][20]
    assert frame.shape == (24, 32, 3)
    assert abs(int(frame[0, 0, 0]) - 200) < 8
    assert abs(int(frame[0, 0, 2]) - 12) < 8
    assert validate(out) == []
    words = shlex.split(said.partition("train on it with: cmpolicy train ")[2])
    config = cmpolicy.compose(*words, "net=tiny", "data.val_fraction=0")
    assert new_policy(config, load_training_data(config)).spec.images == ("cam_high",)


def test_aloha_files_that_are_wrong(tmp_path: Path) -> None:
    source = tmp_path / "task"
    source.mkdir()
    with pytest.raises(aloha.AlohaError, match=r"holds no \.hdf5 files"):
        aloha.convert(source, tmp_path / "o.zarr")
    write_aloha(source / "episode_0.hdf5", 5)
    write_aloha(source / "episode_1.hdf5", 5, **{"observations/effort": np.ones((5, 14))})
    with pytest.raises(aloha.AlohaError, match=r"episode_1\.hdf5 has .*effort.*same keys"):
        aloha.convert(source, tmp_path / "o.zarr")
    (source / "episode_1.hdf5").write_bytes((source / "episode_0.hdf5").read_bytes()[:3000])
    with pytest.raises(aloha.AlohaError, match=r"episode_1\.hdf5 is not a whole HDF5 file"):
        aloha.convert(source, tmp_path / "o.zarr")
    assert not (tmp_path / "o.zarr").exists()
    with h5py.File(source / "episode_1.hdf5", "w") as file:
        file["data/demo_0/actions"] = np.ones((3, 2))
    with pytest.raises(aloha.AlohaError, match="`convert robomimic`"):
        aloha.convert(source, tmp_path / "o.zarr")
    (source / "episode_1.hdf5").unlink()
    write_aloha(source / "episode_1.hdf5", 5, **{"observations/effort": np.ones((4, 14))})
    with h5py.File(source / "episode_2.hdf5", "w") as file:
        file["action"] = file["observations/qpos"] = np.ones((5, 14))
        file["observations/images/cam"] = np.ones((5, 8, 8, 3), np.float32)
    with pytest.raises(aloha.AlohaError, match="dtype float32; expected uint8"):
        aloha.convert(source / "episode_2.hdf5", tmp_path / "o.zarr")
    with pytest.raises(aloha.AlohaError, match="the same number of steps"):
        aloha.convert(source / "episode_1.hdf5", tmp_path / "o.zarr")


def test_other_peoples_formats_are_named(tmp_path: Path, store: Path) -> None:
    write_aloha(tmp_path / "episode_0.hdf5", 5)
    with pytest.raises(ReplayBufferError, match=r"is an HDF5 file.*data convert aloha"):
        ReplayBuffer.open(tmp_path / "episode_0.hdf5")
    folder = tmp_path / "folder"
    folder.mkdir()
    (tmp_path / "episode_0.hdf5").rename(folder / "episode_0.hdf5")
    with pytest.raises(ReplayBufferError, match=r"holds HDF5 files and no Zarr store"):
        ReplayBuffer.open(folder)
    lerobot = tmp_path / "lerobot"
    (lerobot / "meta").mkdir(parents=True)
    (lerobot / "meta" / "info.json").write_text("{}")
    with pytest.raises(ReplayBufferError, match=r"is a LeRobot data set"):
        ReplayBuffer.open(lerobot)
    around = tmp_path / "around"
    around.mkdir()
    store.rename(around / "demo.zarr")
    with pytest.raises(ReplayBufferError, match=r"did you mean .*around/demo\.zarr\?"):
        ReplayBuffer.open(around)
