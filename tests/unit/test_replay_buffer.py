"""Replay buffers: what they promise when all is well, and what they say when it is not."""

import json
import shutil
import zipfile
from pathlib import Path

import numpy as np
import pytest
import zarr
from zarr.storage import LocalStore

from cmpolicy_data import ReplayBuffer, ReplayBufferError, SelectorError, validate
from cmpolicy_data.chunks import read_rows
from cmpolicy_data.pack import pack
from cmpolicy_data.parts import Parts
from cmpolicy_data.seal import seal

RNG = np.random.default_rng(0)


def episode(length=10, offset=0.0):
    """Values that are nowhere 0."""
    return {
        "action": (RNG.uniform(1, 2, (length, 2)) + offset).astype(np.float32),
        "state": RNG.uniform(1, 2, (length, 5)),
    }


@pytest.fixture
def store(tmp_path: Path) -> Path:
    """A store of ours: three episodes of 10, 12 and 14 steps."""
    buffer = ReplayBuffer.create(tmp_path / "demos.zarr", attrs={"robot": "arm"})
    for length in (10, 12, 14):
        buffer.append_episode(episode(length))
    return buffer.path


@pytest.fixture(params=[2, 3])
def foreign(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """A store of another writer: 20 steps in chunks of 4, two episodes."""
    root = zarr.create_group(tmp_path / "theirs.zarr", zarr_format=request.param)
    for key, width in (("action", 2), ("state", 5)):
        array = root.create_array(
            f"data/{key}", shape=(20, width), chunks=(4, width), dtype="float32"
        )
        array[...] = RNG.uniform(1, 2, (20, width))
    ends = root.create_array("meta/episode_ends", shape=(2,), dtype="int64")
    ends[...] = [8, 20]
    return tmp_path / "theirs.zarr"


def chunk_files(store: Path, key: str) -> list[Path]:
    metadata = {"zarr.json", ".zarray", ".zattrs"}
    files = (store / "data" / key).rglob("*")
    return sorted(f for f in files if f.is_file() and f.name not in metadata)


class TestReading:
    def test_the_human_demonstrations_open_unchanged(self, pusht_human: Path):
        buffer = ReplayBuffer.open(pusht_human)
        assert buffer.keys() == ["action", "img", "keypoint", "n_contacts", "state"]
        assert (buffer.n_episodes, buffer.n_steps, buffer.zarr_format) == (206, 25650, 2)
        assert buffer.load("action").shape == (25650, 2)
        assert buffer.load("keypoint").shape == (25650, 9, 2)
        assert buffer["img"].shape == (25650, 96, 96, 3)
        assert buffer.load("state[:2]").tolist()[0] == [222.0, 97.0]

    def test_attributes_and_sizes(self, store: Path):
        buffer = ReplayBuffer.open(store)
        assert buffer.attrs == {"robot": "arm"}
        assert (buffer.n_episodes, buffer.n_steps) == (3, 36)
        assert buffer.episode_ends.tolist() == [10, 22, 36]
        assert "state" in buffer
        assert list(buffer) == ["action", "state"]
        ReplayBuffer.open(store, "r+").update_attrs({"hz": 10})
        assert ReplayBuffer.open(store).attrs == {"robot": "arm", "hz": 10}

    def test_floats_come_as_float32_and_a_vector_as_one_column(self, tmp_path: Path):
        buffer = ReplayBuffer.create(tmp_path / "x.zarr")
        buffer.append_episode({"reward": np.arange(4.0), "image": np.full((4, 2, 2), 7, np.uint8)})
        assert buffer.load("reward").tolist() == [[0], [1], [2], [3]]
        assert buffer.load("reward").dtype == np.float32
        assert buffer.load("reward[:1]").shape == (4, 1)
        assert buffer.load("image").dtype == np.uint8

    @pytest.mark.parametrize(
        ("selector", "columns"),
        [
            ("state", slice(None)),
            ("state[:]", slice(None)),
            ("state[:2]", slice(0, 2)),
            ("state[2:4]", slice(2, 4)),
            ("state[-1:]", slice(4, 5)),
            (" state[:-1] ", slice(0, 4)),
        ],
    )
    def test_selectors(self, store: Path, selector: str, columns: slice):
        buffer = ReplayBuffer.open(store)
        assert buffer.load(selector).tolist() == buffer.load("state")[:, columns].tolist()

    @pytest.mark.parametrize(
        "selector", ["", "state[", "state[2]", "state[1:2:3]", "state[a:b]", "[2:]", "a]b"]
    )
    def test_selectors_with_bad_syntax(self, store: Path, selector: str):
        with pytest.raises(SelectorError, match=r"Cannot read the selector.*state\[:2\]"):
            ReplayBuffer.open(store).load(selector)

    @pytest.mark.parametrize("selector", ["state[:6]", "state[5:]", "state[3:3]", "state[-7:]"])
    def test_selectors_out_of_range(self, store: Path, selector: str):
        with pytest.raises(SelectorError, match=r"demos.zarr.*state has 5 columns \(0 to 4\)"):
            ReplayBuffer.open(store).load(selector)

    def test_an_archive_with_the_store_in_a_folder(self, foreign: Path, tmp_path: Path):
        archive = shutil.make_archive(
            str(tmp_path / "public"), "zip", root_dir=foreign.parent, base_dir=foreign.name
        )
        expected = ReplayBuffer.open(foreign)
        found = ReplayBuffer.open(archive)
        assert found.load("action").tolist() == expected.load("action").tolist()
        assert validate(archive) == []


class TestAppending:
    def test_every_interrupted_append_leaves_the_store_as_it_was(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ):
        """Stop an append before each of its writes in turn: nothing changes, the next one works."""

        class CutError(RuntimeError):
            pass

        real_set, real_delete = LocalStore.set, LocalStore.delete
        left = 0

        async def count() -> None:
            nonlocal left
            left -= 1
            if left < 0:
                raise CutError

        async def cut_set(self, *args, **kwargs):
            await count()
            return await real_set(self, *args, **kwargs)

        async def cut_delete(self, *args, **kwargs):
            await count()
            return await real_delete(self, *args, **kwargs)

        data = [episode(length) for length in (3, 5, 4)]
        path = tmp_path / "demos.zarr"
        ReplayBuffer.create(path)
        for committed in range(3):
            for allowed in range(100):
                monkeypatch.setattr(LocalStore, "set", cut_set)
                monkeypatch.setattr(LocalStore, "delete", cut_delete)
                left = allowed
                writer = ReplayBuffer.open(path, "r+")
                interrupted = False
                try:
                    writer.append_episode(data[committed])
                except CutError:
                    interrupted = True
                monkeypatch.undo()
                n_visible = committed + (not interrupted)
                reader = ReplayBuffer.open(path)
                assert reader.n_episodes == n_visible
                if n_visible:
                    for key in ("action", "state"):
                        expected = np.concatenate([e[key] for e in data[:n_visible]])
                        assert np.array_equal(reader.load(key), expected.astype(np.float32))
                if not interrupted:
                    break
                if allowed % 3 == 0 and committed:  # leftovers are told by name
                    assert all("cut off" in str(p) for p in validate(path))
            else:
                pytest.fail("the append never went through")
            assert allowed > 4
        assert validate(path) == []

    def test_the_object_whose_append_failed_can_go_on(
        self, store: Path, monkeypatch: pytest.MonkeyPatch
    ):
        writer = ReplayBuffer.open(store, "r+")
        real_set = LocalStore.set

        async def full(self, key, value, *args, **kwargs):
            if key.startswith("data/state/c"):
                raise OSError(28, "No space left on device")
            return await real_set(self, key, value, *args, **kwargs)

        monkeypatch.setattr(LocalStore, "set", full)
        with pytest.raises(ReplayBufferError, match="No space left"):
            writer.append_episode(episode(50))
        monkeypatch.undo()
        assert writer.n_episodes == 3
        assert writer.append_episode(episode(4)) == 3
        assert ReplayBuffer.open(store).episode_ends.tolist() == [10, 22, 36, 40]
        assert validate(store) == []

    def test_leftovers_of_the_first_append_do_not_fix_the_keys(self, tmp_path: Path):
        path = tmp_path / "demos.zarr"
        ReplayBuffer.create(path)
        root = zarr.open_group(path, mode="r+")
        root.create_array("data/half", shape=(7, 2), dtype="float32")  # then the writer was killed
        ReplayBuffer.open(path, "r+").append_episode(episode(5))
        assert ReplayBuffer.open(path).keys() == ["action", "state"]

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            (
                {"extra": np.ones((10, 1))},
                r"has keys \['action', 'extra', 'state'\], the store has",
            ),
            ({"action": np.ones((9, 2))}, "same number of steps.*'action': 9, 'state': 10"),
            (
                {"action": np.ones((10, 3))},
                r"'action' has shape \(3,\) per step, the store has \(2,",
            ),
            ({"action": np.full((10, 2), "a")}, "'action' has dtype <U1; only numbers"),
            ({"action": np.ones((10, 2), complex)}, "dtype complex128"),
        ],
    )
    def test_episodes_that_do_not_fit(self, store: Path, change: dict, message: str):
        writer = ReplayBuffer.open(store, "r+")
        with pytest.raises(ReplayBufferError, match=message):
            writer.append_episode({**episode(10), **change})
        assert validate(store) == []

    def test_floats_do_not_fit_into_integers(self, tmp_path: Path):
        buffer = ReplayBuffer.create(tmp_path / "x.zarr")
        buffer.append_episode({"image": np.ones((3, 4), np.uint8)})
        with pytest.raises(
            ReplayBufferError, match="'image' has dtype float64, which does not fit"
        ):
            buffer.append_episode({"image": np.ones((3, 4))})

    def test_empty_episodes(self, store: Path):
        with pytest.raises(ReplayBufferError, match="at least 1"):
            ReplayBuffer.open(store, "r+").append_episode(episode(0))
        with pytest.raises(ReplayBufferError, match="keys"):
            ReplayBuffer.open(store, "r+").append_episode({})

    def test_reading_is_not_writing(self, store: Path, tmp_path: Path):
        with pytest.raises(ReplayBufferError, match=r"open for reading.*mode='r\+'"):
            ReplayBuffer.open(store).append_episode(episode(3))
        archive = pack(store, tmp_path / "demos.zarr.zip")
        with pytest.raises(ReplayBufferError, match=r"\.zip stores are read-only"):
            ReplayBuffer.open(archive, "r+")

    def test_create_does_not_overwrite(self, store: Path, tmp_path: Path):
        with pytest.raises(FileExistsError, match="exists already"):
            ReplayBuffer.create(store)
        with pytest.raises(ReplayBufferError, match="cannot be appended to"):
            ReplayBuffer.create(tmp_path / "x.zarr.zip")

    @pytest.mark.filterwarnings("ignore:Consolidated metadata")
    def test_consolidated_metadata_does_not_hide_what_is_appended(self, foreign: Path):
        zarr.consolidate_metadata(foreign)
        ReplayBuffer.open(foreign, "r+").append_episode(
            {"action": np.ones((3, 2), np.float32), "state": np.ones((3, 5), np.float32)}
        )
        assert ReplayBuffer.open(foreign).load("action").shape == (23, 2)
        assert validate(foreign) == []

    def test_a_damaged_foreign_store_is_not_appended_to(self, foreign: Path):
        chunk_files(foreign, "state")[1].unlink()
        with pytest.raises(ReplayBufferError, match="1 of 5 chunks of data/state are not there"):
            ReplayBuffer.open(foreign, "r+").append_episode(
                {"action": np.ones((3, 2), np.float32), "state": np.ones((3, 5), np.float32)}
            )


class TestBadStores:
    def test_nothing_there(self, tmp_path: Path):
        with pytest.raises(FileNotFoundError, match=r"no data at .*nope.zarr.*cmpolicy data"):
            ReplayBuffer.open(tmp_path / "nope.zarr")

    def test_not_a_store(self, tmp_path: Path):
        with pytest.raises(ReplayBufferError, match=r"not a readable Zarr store.*data/<key>"):
            ReplayBuffer.open(tmp_path)
        (tmp_path / "file.zarr").write_text("hello")
        with pytest.raises(ReplayBufferError, match=r"not a whole \.zip archive"):
            ReplayBuffer.open(tmp_path / "file.zarr")

    def test_a_missing_chunk_is_an_error_and_not_zeros(self, foreign: Path):
        chunk_files(foreign, "action")[2].unlink()
        with pytest.raises(ReplayBufferError, match=r"1 of 5 chunks.*steps 8 to 11.*truncated"):
            ReplayBuffer.open(foreign).load("action")
        assert ReplayBuffer.open(foreign).load("state").shape == (20, 5)

    def test_missing_last_chunks(self, foreign: Path):
        for file in chunk_files(foreign, "action")[3:]:
            file.unlink()
        with pytest.raises(ReplayBufferError, match=r"2 of 5 chunks.*steps 12 to 15"):
            ReplayBuffer.open(foreign).load("action")

    def test_zeros_that_a_writer_left_out_are_zeros(self, tmp_path: Path):
        root = zarr.create_group(tmp_path / "z.zarr")
        values = np.ones((20, 1), np.float32)
        values[3:13] = 0
        array = root.create_array("data/action", shape=(20, 1), chunks=(4, 1), dtype="float32")
        array[...] = values
        ends = root.create_array("meta/episode_ends", shape=(1,), dtype="int64")
        ends[...] = 20
        assert len(chunk_files(tmp_path / "z.zarr", "action")) == 3
        buffer = ReplayBuffer.open(tmp_path / "z.zarr")
        assert buffer.load("action").tolist() == values.tolist()

    def test_in_our_own_stores_no_chunk_may_be_missing(self, tmp_path: Path):
        buffer = ReplayBuffer.create(tmp_path / "x.zarr")
        buffer.append_episode({"action": np.zeros((5, 2))})
        (file,) = chunk_files(buffer.path, "action")
        file.unlink()
        with pytest.raises(ReplayBufferError, match="1 of 1 chunks of data/action are not there"):
            ReplayBuffer.open(buffer.path).load("action")

    @pytest.mark.parametrize("kept", [0, 10])
    def test_a_cut_off_chunk(self, foreign: Path, store: Path, kept: int):
        for path, where in ((foreign, "steps 4 to 7"), (store, "steps 0 to 35")):
            files = chunk_files(path, "action")
            file = files[1 if len(files) > 1 else 0]
            file.write_bytes(file.read_bytes()[:kept])
            with pytest.raises(
                ReplayBufferError, match=rf"{where}\) (is cut off|cannot be decoded)"
            ):
                ReplayBuffer.open(path).load("action")

    def test_a_flipped_bit_in_our_own_store(self, store: Path):
        (file,) = chunk_files(store, "action")
        content = bytearray(file.read_bytes())
        content[len(content) // 2] ^= 1
        file.write_bytes(content)
        with pytest.raises(ReplayBufferError, match="cannot be decoded"):
            ReplayBuffer.open(store).load("action")

    def test_unreadable_metadata(self, foreign: Path):
        name = ".zarray" if (foreign / ".zgroup").exists() else "zarr.json"
        file = foreign / "data" / "action" / name
        file.write_text(file.read_text()[:40])
        buffer = ReplayBuffer.open(foreign)  # the other arrays can be used
        assert list(buffer.unreadable) == ["action"]
        with pytest.raises(ReplayBufferError, match=r"data/action cannot be opened: .*description"):
            buffer.load("action")

    def test_unreadable_episode_ends(self, foreign: Path):
        name = ".zarray" if (foreign / ".zgroup").exists() else "zarr.json"
        (foreign / "meta" / "episode_ends" / name).write_text("{")
        with pytest.raises(ReplayBufferError, match="metadata of meta/episode_ends cannot be read"):
            ReplayBuffer.open(foreign)

    def test_missing_groups(self, foreign: Path):
        shutil.rmtree(foreign / "meta")
        with pytest.raises(ReplayBufferError, match=r"has no meta/episode_ends: \(E,\) integers"):
            ReplayBuffer.open(foreign)
        shutil.rmtree(foreign / "data")
        with pytest.raises(ReplayBufferError, match=r"has no group data/"):
            ReplayBuffer.open(foreign)

    @pytest.mark.parametrize("share", [0.3, 0.9, 0.999])
    def test_a_cut_off_archive(self, store: Path, tmp_path: Path, share: float):
        archive = pack(store, tmp_path / "demos.zarr.zip")
        content = archive.read_bytes()
        archive.write_bytes(content[: int(len(content) * share)])
        with pytest.raises(ReplayBufferError, match=r"not a whole \.zip archive.*cut off"):
            ReplayBuffer.open(archive)

    def test_an_archive_that_lacks_a_chunk(self, store: Path, tmp_path: Path):
        with zipfile.ZipFile(tmp_path / "x.zip", "w") as archive:
            for file in sorted(p for p in store.rglob("*") if p.is_file()):
                if file not in chunk_files(store, "state"):
                    archive.write(file, file.relative_to(store))
        with pytest.raises(ReplayBufferError, match="chunks of data/state are not there"):
            ReplayBuffer.open(tmp_path / "x.zip").load("state")

    def test_no_episodes(self, tmp_path: Path):
        ReplayBuffer.create(tmp_path / "x.zarr")
        buffer = ReplayBuffer.open(tmp_path / "x.zarr")
        assert (buffer.n_episodes, buffer.n_steps, buffer.keys()) == (0, 0, [])
        with pytest.raises(ReplayBufferError, match="no episodes"):
            buffer.load("action")
        root = zarr.open_group(tmp_path / "x.zarr", mode="r+")
        root.create_array("data/action", shape=(0, 2), dtype="float32")
        with pytest.raises(ReplayBufferError, match="no episodes"):
            ReplayBuffer.open(tmp_path / "x.zarr").load("action")

    def test_missing_key(self, store: Path):
        with pytest.raises(ReplayBufferError, match=r"no key 'pose'.*keys: action, state"):
            ReplayBuffer.open(store).load("pose")

    def test_wrong_lengths(self, foreign: Path):
        root = zarr.open_group(foreign, mode="r+")
        root["data/action"].resize((19, 2))
        with pytest.raises(ReplayBufferError, match=r"data/action has 19 steps.*end at step 20"):
            ReplayBuffer.open(foreign).load("action")
        root["data/state"].resize((24, 5))
        with pytest.raises(ReplayBufferError, match="data/state has 24 steps"):
            ReplayBuffer.open(foreign).load("state")

    def test_ends_that_do_not_increase(self, foreign: Path):
        zarr.open_group(foreign, mode="r+")["meta/episode_ends"][...] = [20, 8]
        with pytest.raises(ReplayBufferError, match=r"theirs.zarr: .*entry 1 is 8 after 20"):
            ReplayBuffer.open(foreign)

    def test_lost_ends(self, foreign: Path):
        root = zarr.open_group(foreign, mode="r+")
        del root["meta/episode_ends"]
        root.create_array("meta/episode_ends", shape=(2,), dtype="int64")
        with pytest.raises(ReplayBufferError, match="chunks of meta/episode_ends are not there"):
            ReplayBuffer.open(foreign)

    def test_ends_of_the_wrong_kind(self, foreign: Path):
        root = zarr.open_group(foreign, mode="r+")
        del root["meta/episode_ends"]
        root.create_array("meta/episode_ends", shape=(2, 1), dtype="float32")
        with pytest.raises(ReplayBufferError, match=r"must be 1-D integers, got shape \(2, 1\)"):
            ReplayBuffer.open(foreign)

    @pytest.mark.filterwarnings("ignore:.*does not have a Zarr V3 specification")
    @pytest.mark.parametrize("dtype", ["<U5", "complex64"])
    def test_wrong_dtypes(self, store: Path, dtype: str):
        root = zarr.open_group(store, mode="r+")
        array = root.create_array("data/words", shape=(36,), dtype=dtype)
        array[...] = np.ones(36).astype(dtype)
        with pytest.raises(ReplayBufferError, match=r"data/words has dtype.*only numbers"):
            ReplayBuffer.open(store).load("words")

    def test_objects(self, tmp_path: Path):
        """Pickled objects, as zarr 2 wrote them, are refused unread."""
        path = tmp_path / "x.zarr"
        root = zarr.create_group(path, zarr_format=2)
        root.create_array("data/action", shape=(4, 1), dtype="float32")[...] = 1.0
        root.create_array("meta/episode_ends", shape=(1,), dtype="int64")[...] = 4
        things = path / "data" / "things"
        things.mkdir()
        metadata = json.loads((path / "data" / "action" / ".zarray").read_text())
        metadata |= {
            "dtype": "|O",
            "filters": [{"id": "pickle", "protocol": 5}],
            "fill_value": None,
        }
        (things / ".zarray").write_text(json.dumps(metadata))
        with pytest.raises(ReplayBufferError):
            ReplayBuffer.open(path).load("things")

    def test_a_store_from_a_newer_version(self, store: Path):
        root = zarr.open_group(store, mode="r+")
        root.attrs.update({"cmpolicy_data": {"format_version": 99}})
        with pytest.raises(ReplayBufferError, match=r"newer cmpolicy.*version 99.*up to 1"):
            ReplayBuffer.open(store)


class TestPacking:
    def test_packing_is_repeatable_and_small(self, store: Path, tmp_path: Path):
        one = pack(store, tmp_path / "a.zarr.zip").read_bytes()
        assert pack(store, tmp_path / "b.zarr.zip").read_bytes() == one
        buffer = ReplayBuffer.open(tmp_path / "a.zarr.zip")
        assert buffer.attrs == {"robot": "arm"}
        assert buffer.load("state").tolist() == ReplayBuffer.open(store).load("state").tolist()

    def test_a_damaged_store_is_not_packed(self, store: Path, tmp_path: Path):
        target = pack(store, tmp_path / "a.zarr.zip")
        before = target.read_bytes()
        chunk_files(store, "state")[0].unlink()
        with pytest.raises(ReplayBufferError, match="data/state are not there"):
            pack(store, target)
        assert target.read_bytes() == before
        assert [p.name for p in tmp_path.iterdir() if p.is_file()] == ["a.zarr.zip"]

    def test_wrong_names(self, store: Path, tmp_path: Path):
        with pytest.raises(ValueError, match=r"must end in \.zip"):
            pack(store, tmp_path / "a.tar")
        archive = pack(store, tmp_path / "a.zip")
        with pytest.raises(ValueError, match="packed already"):
            pack(archive, tmp_path / "b.zip")


@pytest.mark.parametrize("sizes", [(2, 1), (2, 3), ()])
def test_parts_that_are_not_the_rows_promised(tmp_path: Path, sizes: tuple[int, ...]):
    """Nothing is appended, and the next append is whole."""
    buffer = ReplayBuffer.create(tmp_path / "s.zarr")
    action = np.zeros((4, 2), np.float32)
    frames = np.arange(4 * 8 * 8 * 3, dtype=np.uint8).reshape(4, 8, 8, 3)
    buffer.append_episode({"action": action, "top": Parts(frames.shape, frames.dtype, [frames])})
    wrong = Parts(frames.shape, frames.dtype, [np.zeros((n, 8, 8, 3), np.uint8) for n in sizes])
    with pytest.raises(ValueError, match=r"top: (a part of shape|the parts have)"):
        buffer.append_episode({"action": action, "top": wrong})
    halves = Parts(frames.shape, frames.dtype, [frames[:1], frames[1:]])
    buffer.append_episode({"action": action, "top": halves})
    again = ReplayBuffer.open(tmp_path / "s.zarr")
    assert again.episode_ends.tolist() == [4, 8]
    assert np.asarray(again["top"][:]).tolist() == np.concatenate([frames, frames]).tolist()


@pytest.mark.parametrize("flat", [True, False])
def test_parts_are_compressed_where_that_makes_them_smaller(tmp_path: Path, flat: bool):
    """What a camera sees does not get smaller, and is stored as it is, with its checksum."""
    rng = np.random.default_rng(0)
    frames = rng.integers(0, 256, (9, 64, 64, 3), dtype=np.uint8)
    if flat:
        frames[:] = frames[:, :1, :1]
    buffer = ReplayBuffer.create(tmp_path / "x.zarr")
    action = np.zeros((9, 2), np.float32)
    buffer.append_episode({"action": action, "top": Parts(frames.shape, frames.dtype, [frames])})
    np.testing.assert_array_equal(ReplayBuffer.open(buffer.path)["top"][:], frames)
    size = sum(f.stat().st_size for f in (buffer.path / "data/top/c").rglob("*") if f.is_file())
    assert (size < frames.nbytes / 2) == flat


class TestAttributesAndNames:
    def test_what_others_wrote_meanwhile_stays(self, store: Path):
        first, second = (ReplayBuffer.open(store, "r+") for _ in range(2))
        second.update_attrs({"control_hz": 10})
        first.update_attrs({"note": "x"})
        found = ReplayBuffer.open(store).attrs
        assert found == {"robot": "arm", "control_hz": 10, "note": "x"}
        seal(store)
        first.update_attrs({"note": "y"})
        with pytest.raises(ReplayBufferError, match="seal"):
            first.append_episode(episode())  # opened before it was sealed
        assert ReplayBuffer.open(store).n_episodes == 3
        with pytest.raises(ReplayBufferError, match="cmpolicy's own"):
            first.update_attrs({"cmpolicy_seal": {}})

    def test_of_a_store_of_another_writer(self, foreign: Path):
        ReplayBuffer.open(foreign, "r+").update_attrs({"control_hz": 10})
        assert ReplayBuffer.open(foreign).attrs["control_hz"] == 10
        assert validate(foreign) == []

    def test_attributes_that_are_no_json_leave_nothing_behind(self, tmp_path: Path):
        with pytest.raises(ReplayBufferError, match="attrs must be JSON values"):
            ReplayBuffer.create(tmp_path / "a.zarr", attrs={"control_hz": np.float32(10)})
        assert not (tmp_path / "a.zarr").exists()

    def test_a_key_may_be_named_as_the_folder_of_chunks(self, tmp_path: Path):
        buffer = ReplayBuffer.create(tmp_path / "a.zarr")
        for _ in range(2):
            buffer.append_episode({**episode(), "c": np.ones((10, 1)), "x/c": np.ones((10, 3))})
        again = ReplayBuffer.open(buffer.path)
        assert again.keys() == ["action", "c", "state", "x/c"]
        assert again.load("x/c").shape == (20, 3)

    @pytest.mark.parametrize(
        ("first", "then"),
        [
            (np.zeros(3, np.int8), [300]),
            (np.zeros(3, np.uint8), np.array([256], np.uint16)),
            (np.zeros(3, "f2"), [1e6]),
        ],
    )
    def test_numbers_do_not_wrap(self, tmp_path: Path, first: np.ndarray, then: list[float]):
        buffer = ReplayBuffer.create(tmp_path / "a.zarr")
        buffer.append_episode({"x": first})
        with pytest.raises(ReplayBufferError, match=r"'x' holds .* more than the store's"):
            buffer.append_episode({"x": then})
        buffer.append_episode({"x": np.array([1, 2], np.asarray(then).dtype)})
        assert ReplayBuffer.open(buffer.path).load("x").tolist() == [[0], [0], [0], [1], [2]]

    def test_a_key_that_holds_nothing(self, tmp_path: Path):
        buffer = ReplayBuffer.create(tmp_path / "a.zarr")
        with pytest.raises(ReplayBufferError, match=r"'x' has shape \(0,\) per step"):
            buffer.append_episode({"x": np.zeros((4, 0))})

    def test_packing_replaces_stores_alone(self, store: Path, tmp_path: Path):
        target = tmp_path / "photos.zip"
        with zipfile.ZipFile(target, "w") as archive:
            archive.writestr("a.jpg", "a")
        before = target.read_bytes()
        with pytest.raises(FileExistsError, match="exists and is no store"):
            pack(store, target)
        assert target.read_bytes() == before


def test_the_members_of_an_archive_are_listed_once(
    foreign: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They were for every few frames that were read: hours, where each frame is a member."""
    listed = []
    opened = zipfile.ZipFile.__init__

    def noted(self, *args, **settings):
        listed.append(args)
        opened(self, *args, **settings)

    buffer = ReplayBuffer.open(pack(foreign, tmp_path / "theirs.zarr.zip"))
    buffer.check("action")
    monkeypatch.setattr(zipfile.ZipFile, "__init__", noted)
    for start in range(0, 20, 2):
        read_rows(buffer["action"], start, start + 2, buffer.path)
    assert not listed


def test_an_archive_that_took_the_place_of_another_is_read(store: Path, tmp_path: Path) -> None:
    packed = tmp_path / "s.zip"
    before = ReplayBuffer.open(pack(store, packed)).load("action")
    ReplayBuffer.open(store, "r+").append_episode(episode(3))
    packed.unlink()
    after = ReplayBuffer.open(pack(store, packed)).load("action")
    np.testing.assert_array_equal(after[:-3], before)
    assert len(after) == len(before) + 3
