"""What is appended is what is read: any keys, shapes, dtypes, Zarr formats and containers."""

import tempfile
from pathlib import Path

import numpy as np
import zarr
from hypothesis import example, given, settings
from hypothesis import strategies as st

from cmpolicy_data import ReplayBuffer, validate
from cmpolicy_data.pack import pack

DTYPES = ["float32", "float64", "uint8", "int64", "bool"]


@st.composite
def episodes(draw):
    """A list of episodes {key: (L, ...)} with the same keys, trailing shapes and dtypes."""
    names = st.sampled_from(["action", "state", "obs/pose", "image", "grip-per.1"])
    keys = draw(st.lists(names, min_size=1, max_size=3, unique=True))
    layout = {
        key: (
            tuple(draw(st.lists(st.integers(1, 3), max_size=2))),
            draw(st.sampled_from(DTYPES)),
        )
        for key in keys
    }
    lengths = draw(st.lists(st.integers(1, 7), min_size=1, max_size=4))
    rng = np.random.default_rng(draw(st.integers(0, 99)))
    return [
        {
            key: (rng.integers(0, 3, (length, *shape))).astype(dtype)
            for key, (shape, dtype) in layout.items()
        }
        for length in lengths
    ]


def same(buffer, data):
    """Whether ``load`` gives the episodes' values, with its promises on shape and dtype."""
    ends = np.cumsum([len(next(iter(episode.values()))) for episode in data])
    assert buffer.episode_ends.tolist() == ends.tolist()
    assert buffer.keys() == sorted(data[0])
    for key, first in data[0].items():
        expected = np.concatenate([episode[key] for episode in data])
        found = buffer.load(key)
        dtype = np.float32 if first.dtype.kind == "f" else first.dtype
        assert found.dtype == dtype
        assert found.shape == (expected[:, None].shape if expected.ndim == 1 else expected.shape)
        assert found.ravel().tolist() == expected.astype(dtype).ravel().tolist()


@settings(max_examples=10, deadline=None)
@given(episodes())
def test_appended_episodes_come_back_from_a_directory_and_an_archive(data):
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "demos.zarr"
        writer = ReplayBuffer.create(path)
        for number, episode in enumerate(data):
            assert writer.append_episode(episode) == number
            same(ReplayBuffer.open(path), data[: number + 1])
        same(writer, data)
        key = next(iter(data[0]))
        assert validate(path, [key]) == []
        archive = pack(path, Path(folder) / "demos.zarr.zip")
        same(ReplayBuffer.open(archive), data)
        assert validate(archive, [key]) == []


@example([{"x": np.full((3, 2), i)} for i in range(2)], 2, 1, False, 0)
@settings(max_examples=10, deadline=None)
@given(episodes(), st.sampled_from([2, 3]), st.integers(1, 5), st.booleans(), st.integers(0, 3))
def test_stores_of_other_writers_read_and_append(data, zarr_format, chunk, write_empty, first):
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "theirs.zarr"
        root = zarr.create_group(path, zarr_format=zarr_format)
        # Chunks of zeros that were left out are told from lost ones only where one says so.
        rule = "auto" if write_empty else "zero"
        given_episodes = 1 + first % len(data)
        for key in data[0]:
            values = np.concatenate([episode[key] for episode in data[:given_episodes]])
            array = root.create_array(
                f"data/{key}",
                shape=values.shape,
                chunks=(chunk, *values.shape[1:]),
                dtype=values.dtype,
                config={"write_empty_chunks": write_empty},
            )
            array[...] = values
        lengths = [len(next(iter(episode.values()))) for episode in data[:given_episodes]]
        ends = root.create_array("meta/episode_ends", shape=(given_episodes,), dtype="int64")
        ends[...] = np.cumsum(lengths)
        same(ReplayBuffer.open(path, missing_chunks=rule), data[:given_episodes])
        writer = ReplayBuffer.open(path, "r+", missing_chunks=rule)
        assert writer.zarr_format == zarr_format
        for episode in data[given_episodes:]:
            writer.append_episode(episode)
        same(ReplayBuffer.open(path, missing_chunks=rule), data)
