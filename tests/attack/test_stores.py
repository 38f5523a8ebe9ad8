"""Stores that are cut off, incomplete or impossible: nothing wrong is read as if it were right."""

from __future__ import annotations

import json
import os
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zarr
from numcodecs import Blosc

from cmpolicy_data import ReplayBuffer, validate
from cmpolicy_data.chunks import ReplayBufferError
from cmpolicy_data.pack import pack
from cmpolicy_data.seal import seal
from cmpolicy_data.summary import format_summary, summarize

RNG = np.random.default_rng(0)
ENDS = np.array([40, 100])


def write(
    path: Path,
    data: dict[str, np.ndarray],
    *,
    chunk: int = 25,
    zarr_format: Any = 2,
    empty: bool = False,
) -> Path:
    """A store of another writer; zarr 3 leaves empty chunks out unless it is told to write them."""
    with zarr.config.set({"array.write_empty_chunks": empty}):
        root = zarr.create_group(path, zarr_format=zarr_format)
        for key, values in data.items():
            array = root.create_array(
                f"data/{key}",
                shape=values.shape,
                chunks=(chunk, *values.shape[1:]),
                dtype=values.dtype,
                compressors=Blosc() if zarr_format == 2 else "auto",
            )
            array[...] = values
        root.create_array("meta/episode_ends", shape=ENDS.shape, dtype=ENDS.dtype)[...] = ENDS
    return path


def numbers() -> dict[str, np.ndarray]:
    return {
        "action": RNG.normal(size=(100, 2)).astype(np.float32),
        "state": RNG.normal(size=(100, 4)).astype(np.float32),
    }


def messages(path: Path, **settings: Any) -> str:
    return "\n".join(map(str, validate(path, **settings)))


def test_a_chunk_cut_off_at_any_length_is_noticed(tmp_path: Path) -> None:
    """Blosc, the codec of most public stores, read 61 of 91 lengths as garbage."""
    path = write(tmp_path / "s.zarr", numbers())
    file = path / "data/action/1.0"
    whole = file.read_bytes()
    for kept in range(len(whole)):
        file.write_bytes(whole[:kept])
        with pytest.raises(ReplayBufferError, match=r"1\.0 \(steps 25 to 49\) is cut off: it has"):
            ReplayBuffer.open(path).load("action")
    assert "data/action/1.0 (steps 25 to 49) is cut off" in messages(path)
    file.write_bytes(whole + b"more")
    assert f"says that it has {len(whole)}" in messages(path)
    file.write_bytes(whole)
    assert messages(path) == ""


def test_a_header_that_asks_for_more_than_the_chunk_holds(tmp_path: Path) -> None:
    path = write(tmp_path / "s.zarr", numbers())
    file = path / "data/action/1.0"
    content = bytearray(file.read_bytes())
    content[4:8] = (2**31 - 17).to_bytes(4, "little")
    file.write_bytes(content)
    assert "says that it holds 2147483631 bytes, and its numbers have 200" in messages(path)


def test_a_cut_off_chunk_in_an_archive(tmp_path: Path) -> None:
    path = write(tmp_path / "s.zarr", numbers())
    file = path / "data/action/1.0"
    file.write_bytes(file.read_bytes()[:-7])
    packed = tmp_path / "s.zip"
    with zipfile.ZipFile(packed, "w") as archive:
        for member in sorted(p for p in path.rglob("*") if p.is_file()):
            archive.write(member, member.relative_to(path))
    with pytest.raises(ReplayBufferError, match="is cut off"):
        ReplayBuffer.open(packed).load("action")


@pytest.mark.parametrize("zarr_format", [2, 3])
class TestAbsentChunks:
    def lose(self, path: Path, key: str, *which: int) -> None:
        files = sorted(
            p
            for p in (path / "data" / key).rglob("*")
            if p.is_file() and p.name not in (".zarray", "zarr.json", ".zattrs")
        )
        for number in which:
            files[number].unlink()

    def test_all_of_an_array(self, tmp_path: Path, zarr_format: int) -> None:
        path = write(tmp_path / "s.zarr", numbers(), zarr_format=zarr_format)
        self.lose(path, "action", 0, 1, 2, 3)
        assert "4 of 4 chunks of data/action are not there" in messages(path)
        with pytest.raises(ReplayBufferError, match=r"data\.missing_chunks=zero"):
            ReplayBuffer.open(path).load("action")
        assert messages(path, missing_chunks="zero") == ""
        assert not ReplayBuffer.open(path, missing_chunks="zero").load("action").any()

    def test_one_between_rows_of_zeros(self, tmp_path: Path, zarr_format: int) -> None:
        """Chunks of zeros that are there show that the writer leaves none out."""
        data = numbers()
        data["action"][20:80] = 0
        path = write(tmp_path / "s.zarr", data, zarr_format=zarr_format, empty=True)
        assert messages(path) == ""
        self.lose(path, "action", 1)
        assert "1 of 4 chunks of data/action are not there" in messages(path)
        left_out = write(tmp_path / "o.zarr", data, zarr_format=zarr_format)
        assert messages(left_out) == ""
        assert ReplayBuffer.open(left_out).load("action").tolist() == data["action"].tolist()
        assert "2 of 4 chunks" in messages(left_out, missing_chunks="error")

    def test_zeros_for_a_whole_episode_or_in_chunks_of_one_step(
        self, tmp_path: Path, zarr_format: int
    ) -> None:
        data = numbers()
        data["action"][:40] = 0
        for chunk in (1, 20, 40):
            path = write(tmp_path / f"{chunk}", data, chunk=chunk, zarr_format=zarr_format)
            assert messages(path) == ""
            assert ReplayBuffer.open(path).load("action").tolist() == data["action"].tolist()

    def test_frames_are_never_black_without_a_word(self, tmp_path: Path, zarr_format: int) -> None:
        frames = RNG.integers(0, 256, (100, 8, 8, 3), dtype=np.uint8)
        path = write(tmp_path / "s", {**numbers(), "top": frames}, chunk=1, zarr_format=zarr_format)
        self.lose(path, "top", 17)
        assert "1 of 100 chunks of data/top are not there" in messages(path)


class TestImpossible:
    """Metadata that asks for more than there is: an error at once, in every reader."""

    def check(self, path: Path, text: str) -> None:
        assert text in messages(path)
        with pytest.raises(
            ReplayBufferError, match=r"data/action (cannot be opened|has 100 steps)"
        ):
            ReplayBuffer.open(path).load("action")
        assert str(path) in format_summary(summarize(path))

    def edit(self, path: Path, array: str, **changes: object) -> Path:
        file = path / array / ".zarray"
        file.write_text(json.dumps(json.loads(file.read_text()) | changes))
        return path

    @pytest.mark.parametrize(
        ("changes", "text"),
        [
            ({"shape": [10**12, 2]}, "calls for 40000000000 chunks"),
            ({"shape": [100, 10**11]}, "calls for 200000000000 chunks"),
            ({"shape": [100, 10**12], "chunks": [25, 10**12]}, "one row of shape"),
            ({"chunks": [0, 2]}, "description is damaged: chunks of shape (0, 2)"),
            ({"shape": [-5, 2]}, "cannot be read"),
        ],
    )
    def test_shapes(self, tmp_path: Path, changes: dict[str, object], text: str) -> None:
        self.check(self.edit(write(tmp_path / "s", numbers()), "data/action", **changes), text)

    def test_more_rows_than_the_memory_holds(self, tmp_path: Path) -> None:
        path = self.edit(
            write(tmp_path / "s", numbers()),
            "data/action",
            shape=[10**12, 2],
            chunks=[10**12, 2],
            compressor=None,
        )
        zarr.open_group(path, mode="r+")["meta/episode_ends"][...] = [40, 10**12]
        with pytest.raises(ReplayBufferError, match=r"data/action needs 7\.45e\+03 GiB"):
            ReplayBuffer.open(path).load("action")
        assert "of memory" in messages(path)

    def test_episode_ends(self, tmp_path: Path) -> None:
        path = write(tmp_path / "s", numbers())
        zarr.open_group(path, mode="r+")["meta/episode_ends"][...] = [40, 10**10]
        self.check(path, "wrong length: 100 steps, but the last episode ends at step 10000000000")
        path = self.edit(
            write(tmp_path / "t", numbers()), "meta/episode_ends", shape=[10**10], chunks=[2]
        )
        assert "meta/episode_ends cannot be read" in messages(path)
        with pytest.raises(ReplayBufferError, match="calls for 5000000000 chunks"):
            ReplayBuffer.open(path)

    @pytest.mark.parametrize("name", ["", "data/action/1.0", "data/action/.zarray", ".zgroup"])
    def test_pipes(self, tmp_path: Path, name: str) -> None:
        """Opening a pipe that nobody writes to waits for ever."""
        path = tmp_path / "s"
        if name:
            write(path, numbers())
            (path / name).unlink()
        os.mkfifo(path / name if name else path)
        assert "regular file" in messages(path)
        with pytest.raises(ReplayBufferError, match="regular file"):
            ReplayBuffer.open(path).load("action")

    def test_bombs(self, tmp_path: Path) -> None:
        path = write(tmp_path / "s", numbers())
        packed = pack(path, tmp_path / "s.zip")
        for name, text in (
            ("data/action/1.0", "and its numbers only 200"),
            ("data/action/.zarray", "the description of an array or group has a few hundred"),
        ):
            bomb = tmp_path / "bomb.zip"
            with (
                zipfile.ZipFile(packed) as old,
                zipfile.ZipFile(bomb, "w", zipfile.ZIP_DEFLATED) as new,
            ):
                for member in old.namelist():
                    content = old.read(member) if member != name else bytes(1 << 25)
                    new.writestr(member, content)
            with pytest.raises(ReplayBufferError, match=text):
                ReplayBuffer.open(bomb).load("action")
            assert text in messages(bomb)


class TestSeal:
    def test_every_change_is_noticed(self, tmp_path: Path, attack_scale: int) -> None:
        path = write(tmp_path / "s", numbers())
        assert set(seal(path)) == {"data/action", "data/state", "meta/episode_ends"}
        assert messages(path) == ""
        files = sorted(p for g in ("data", "meta") for p in (path / g).rglob("*.*[0-9y]"))
        for _ in range(40 * min(attack_scale, 250)):
            file = files[RNG.integers(len(files))]
            before = file.read_bytes()
            kind = RNG.integers(3)
            if kind == 0:
                file.unlink()
            elif kind == 1:
                content = bytearray(before)
                content[RNG.integers(len(content))] ^= 1 << RNG.integers(8)
                file.write_bytes(content)
            else:
                file.write_bytes(before[: RNG.integers(len(before))])
            assert f"{file.parent.parent.name}/{file.parent.name}" in messages(path)
            assert "has changed since the store was sealed" in messages(path)
            with pytest.raises(ReplayBufferError):  # of whatever is wrong with it first
                ReplayBuffer.open(path).load(file.parent.name.replace("episode_ends", "action"))
            file.write_bytes(before)
        print(f"{40 * min(attack_scale, 250)} changes of a sealed store, all noticed")
        assert messages(path) == ""

    def test_a_packed_store_keeps_its_seal(self, tmp_path: Path) -> None:
        path = write(tmp_path / "s", numbers())
        seal(path)
        packed = pack(path, tmp_path / "s.zip")
        assert messages(packed) == ""
        with zipfile.ZipFile(packed) as old, zipfile.ZipFile(tmp_path / "t.zip", "w") as new:
            for name in old.namelist():
                if name != "data/action/1.0":
                    new.writestr(name, old.read(name))
        assert "has changed since the store was sealed" in messages(tmp_path / "t.zip")
        with pytest.raises(ReplayBufferError, match=r"\.zip stores are read-only"):
            seal(packed)

    def test_arrays_that_were_added_and_appends(self, tmp_path: Path) -> None:
        path = ReplayBuffer.create(tmp_path / "s").path
        episode = {"action": np.ones((5, 2), np.float32)}
        ReplayBuffer.open(path, "r+").append_episode(episode)
        seal(path)
        with pytest.raises(ReplayBufferError, match=r"it is sealed. Take the seal off with"):
            ReplayBuffer.open(path, "r+").append_episode(episode)
        assert seal(path, off=True) == {}
        ReplayBuffer.open(path, "r+").append_episode(episode)
        assert "cmpolicy_seal" not in ReplayBuffer.open(path).attrs
        seal(path)
        root = zarr.open_group(path, mode="r+")
        root.create_array("data/new", shape=(10, 1), dtype="float32")[...] = 1
        assert "was added after the store was sealed" in messages(path)
