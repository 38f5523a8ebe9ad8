"""Any store goes to a LeRobot data set and back to the bit; where rows and frames are is exact."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cmpolicy_data import ReplayBuffer
from cmpolicy_data.convert.lerobot import rows, stats, writing
from cmpolicy_data.convert.lerobot.layout import read_layout
from cmpolicy_data.convert.lerobot.reading import read
from cmpolicy_data.convert.lerobot.writing import write
from cmpolicy_data.parts import Parts, in_parts, part_sizes, rows_per_chunk

pytest.importorskip("pyarrow")

LENGTHS = st.lists(st.integers(1, 9), min_size=1, max_size=5)
DTYPES = st.sampled_from(["float32", "float64", "int64", "uint8", "int16", "bool"])
SHAPES = st.lists(st.integers(1, 3), max_size=3).map(tuple)


def numbers(rng: np.random.Generator, dtype: str, shape: tuple[int, ...]) -> Any:
    """Any bits, but no NaN, whose bits are not kept apart."""
    kind = np.dtype(dtype)
    if kind.kind == "b":
        return rng.integers(0, 2, shape).astype(bool)
    if kind.kind in "iu":
        info = np.iinfo(kind)
        return rng.integers(info.min, info.max, shape, dtype=kind, endpoint=True)
    return (rng.normal(size=shape) * 10.0 ** rng.integers(-30, 30, shape)).astype(kind)


@settings(max_examples=25)
@given(LENGTHS, DTYPES, SHAPES, st.sampled_from([5, 10, 12.5, 30, 50]), st.integers(0, 99))
def test_there_and_back(
    lengths: list[int], dtype: str, shape: tuple[int, ...], fps: float, seed: int
):
    rng = np.random.default_rng(seed)
    with tempfile.TemporaryDirectory() as folder:
        buffer = ReplayBuffer.create(Path(folder) / "s.zarr")
        for length in lengths:
            buffer.append_episode(
                {
                    "action": numbers(rng, "float32", (length, 2)),
                    "state": numbers(rng, dtype, (length, *shape)),
                }
            )
        write(buffer.path, Path(folder) / "d", task="go", fps=fps)
        read(Path(folder) / "d", Path(folder) / "b.zarr")
        back = ReplayBuffer.open(Path(folder) / "b.zarr")
        assert back.episode_ends.tolist() == np.cumsum(lengths).tolist()
        for key in ("action", "state"):
            before, after = np.asarray(buffer[key][:]), np.asarray(back[key][:])
            assert (before.dtype, before.tobytes()) == (after.dtype, after.tobytes())
            assert after.shape[1:] == (before.shape[1:] or (1,))


@settings(max_examples=15)
@given(LENGTHS, st.integers(1, 3), st.integers(1, 7))
def test_rows_of_every_episode(lengths: list[int], per_chunk: int, batch: int):
    """However episodes lie in files and batches, each gets its own rows and its own frames."""
    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        patch.setattr(writing, "_FILES_PER_CHUNK", per_chunk)
        patch.setattr(writing, "_MB", 1)
        patch.setattr(rows, "_BATCH", batch)
        patch.setattr(rows, "_IMAGES", batch)
        buffer = ReplayBuffer.create(Path(folder) / "s.zarr")
        first = 0
        for length in lengths:
            steps = np.arange(first, first + length)
            frames = np.broadcast_to(steps[:, None, None, None], (length, 8, 8, 3))
            buffer.append_episode(
                {"action": steps[:, None].astype("float32"), "cam": frames.astype("uint8")}
            )
            first += length
        write(buffer.path, Path(folder) / "d", task="go", fps=10, images="image")
        layout = read_layout(Path(folder) / "d")
        assert [e.first_row for e in layout.episodes] == [0, *np.cumsum(lengths)[:-1].tolist()]
        assert [e.length for e in layout.episodes] == lengths
        read(Path(folder) / "d", Path(folder) / "b.zarr")
        back = ReplayBuffer.open(Path(folder) / "b.zarr")
        assert np.asarray(back["action"][:, 0]).tolist() == list(range(first))
        assert np.asarray(back["images.cam"][:, 0, 0, 0]).tolist() == list(range(first))


@given(st.integers(0, 10_000_000))
def test_places(number: int):
    place = writing._place(number)
    assert place["chunk_index"] * 1000 + place["file_index"] == number
    assert 0 <= place["file_index"] < 1000


@given(st.lists(st.integers(0, 20), max_size=6), st.lists(st.integers(0, 20), max_size=6))
def test_parts_are_drawn_in_turn(first: list[int], second: list[int]):
    """Each row once and in its place, however two keys are cut."""

    def parts(sizes: list[int]) -> Parts:
        cut = np.split(np.arange(sum(sizes)), np.cumsum(sizes)[:-1]) if sizes else []
        return Parts((sum(sizes),), np.dtype(np.int64), cut)

    seen: dict[str, list[int]] = {"a": [], "b": []}
    for key, row, part in in_parts({"a": parts(first), "b": parts(second)}):
        assert row == len(seen[key])
        seen[key] += part.tolist()
    assert (seen["a"], seen["b"]) == (list(range(sum(first))), list(range(sum(second))))


@given(LENGTHS, st.integers(0, 99))
def test_merged_statistics_are_those_of_all_rows(lengths: list[int], seed: int):
    values = np.random.default_rng(seed).normal(size=(sum(lengths), 3))
    parts = np.split(values, np.cumsum(lengths)[:-1])
    merged = stats.merge([stats.of_rows(part) for part in parts])
    whole = stats.of_rows(values)
    for name in ("min", "max", "mean", "std", "count"):
        np.testing.assert_allclose(merged[name], whole[name], atol=1e-12)


@given(
    first=st.integers(0, 5000), length=st.integers(1, 5000), row_bytes=st.integers(1, 40_000_000)
)
def test_parts_end_where_chunks_do(first: int, length: int, row_bytes: int):
    """So that every chunk but an episode's first and last is written once, whole."""
    ends = np.cumsum([first, *part_sizes(first, length, row_bytes)])
    assert ends[-1] == first + length
    assert (np.diff(ends) > 0).all()
    assert (ends[1:-1] % rows_per_chunk(row_bytes) == 0).all()
    assert np.diff(ends).max() * row_bytes <= max(16 << 20, row_bytes)
