"""The chunks of an array: which are lost, and reading rows without trusting what is in a file.

Zarr reads a chunk that is not there as the fill value, and the Blosc codec reads one that was cut
off as whatever lies in memory behind it. So a copy that was cut off would train on zeros or on
garbage: ``lost_chunks`` and ``read_rows`` are what every reader here goes through.
"""

from __future__ import annotations

import itertools
import math
import stat
import struct
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal, cast

import numpy as np
import numpy.typing as npt
import psutil
import zarr
from zarr.codecs import BloscCodec
from zarr.storage import LocalStore, ZipStore

Array = zarr.Array[Any]

#: What a chunk that is not there means, see :func:`lost_chunks`.
MissingChunks = Literal["auto", "zero", "error"]

#: An array is not split into more chunks than this: one of them per step is the finest there is.
MAX_CHUNKS = 4_000_000
_BLOSC_HEADER = struct.Struct("<4B3I")
# A stored chunk is not larger than its numbers but for what its codec adds.
_OVERHEAD = 1 << 20
_EXAMINED = 64


class ReplayBufferError(ValueError):
    """A store that cannot be read, or does not hold what was asked of it."""


@dataclass(frozen=True)
class Chunk:
    """One chunk of an array: its name in the store, and the rows [start, stop) that it holds."""

    name: str
    start: int
    stop: int
    columns: tuple[slice, ...]


def why_impossible(array: Array) -> str | None:
    """Why the array's description cannot be true of any data; None if it can."""
    sizes = array.shards or array.chunks
    if min(sizes, default=1) < 1:
        return f"its description is damaged: chunks of shape {tuple(sizes)}"
    if n_chunks(array) > MAX_CHUNKS:
        return (
            f"its description calls for {n_chunks(array)} chunks (shape {array.shape}, chunks of "
            f"{tuple(sizes)}), more than the {MAX_CHUNKS} that are read: it is damaged, or chunks "
            "should be larger"
        )
    row = array.dtype.itemsize * math.prod(array.shape[1:])
    if row > memory_bytes():
        return (
            f"one row of shape {array.shape[1:]} needs {_gib(row)}, and this machine has "
            f"{_gib(memory_bytes())} of memory: its description is damaged"
        )
    return None


def memory_bytes() -> int:
    """Memory of this machine, bytes."""
    return int(psutil.virtual_memory().total)


def chunks(array: Array, start: int = 0, stop: int | None = None) -> Iterator[Chunk]:
    """The chunks (shards, where there are shards) that hold rows [start, stop), by their rows."""
    sizes = array.shards or array.chunks
    length = array.shape[0]
    limit = length if stop is None else min(stop, length)
    grid = [range(start // sizes[0], -(-limit // sizes[0]))]
    grid += [range(-(-n // size)) for n, size in zip(array.shape[1:], sizes[1:], strict=True)]
    for place in itertools.product(*grid):
        rows, *columns = (
            slice(i * size, min((i + 1) * size, n))
            for i, size, n in zip(place, sizes, array.shape, strict=True)
        )
        name = f"{array.path}/{array.metadata.encode_chunk_key(place)}"
        yield Chunk(name, rows.start, rows.stop, tuple(columns))


def n_chunks(array: Array) -> int:
    """How many chunks the array's shape calls for."""
    sizes = array.shards or array.chunks
    return math.prod(-(-n // size) for n, size in zip(array.shape, sizes, strict=True))


def absent_chunks(array: Array, stop: int | None = None) -> list[Chunk]:
    """Chunks with rows before ``stop`` that are not there."""
    files = _Files(array)
    return [chunk for chunk in chunks(array, 0, stop) if files.size(chunk.name) is None]


def lost_chunks(
    array: Array,
    stop: int | None = None,
    *,
    rule: MissingChunks,
    ends: npt.NDArray[np.int64] | None = None,
) -> list[Chunk]:
    """Chunks with rows before ``stop`` that are not there although they should be.

    Writers may leave out chunks that hold nothing but the fill value (zarr 3 does by default). Of
    an absent chunk nobody can know; ``auto`` takes it for left out unless something speaks against:
    the array holds images, no chunk of it is there, it has chunks that are there and hold only the
    fill value, or the absent rows end where neither a chunk of one row nor an episode does, beside
    rows of other values (a run of zeros rarely ends exactly where a chunk does, a cut-off copy
    does).

    Args:
        array: of a store.
        stop: rows from here on do not matter.
        rule: ``auto``; ``zero`` takes every absent chunk for left out, ``error`` for lost.
        ends: (E,) one past the last row of each episode, where they are known.
    """
    if rule == "zero":
        return []
    absent = absent_chunks(array, stop)
    if not absent or rule == "error":
        return absent
    images = array.ndim == 4 and array.dtype.kind == "u"
    if images or len(absent) == sum(1 for _ in chunks(array, 0, stop)):
        return absent
    if _writes_fill(array, {chunk.name for chunk in absent}):
        return absent
    edges = set() if ends is None else {0, *ends.tolist()}
    return [c for run in _runs(absent) if not _may_be_fill(array, run, edges) for c in run]


def lost_message(lost: list[Chunk], array: Array) -> str:
    """What to say of chunks that are lost, for errors and problem lists."""
    first = lost[0]
    return (
        f"{len(lost)} of {n_chunks(array)} chunks of {array.path} are not there, the first is "
        f"{first.name} (steps {first.start} to {first.stop - 1}): the store is truncated. Copy or "
        "download it again; or, if the writer left them out because they hold only zeros, say so "
        "with data.missing_chunks=zero in training, missing_chunks=zero in `cmpolicy data validate`"
    )


def read_rows(array: Array, start: int, stop: int, path: Path) -> npt.NDArray[Any]:
    """Rows [start, stop) of the array.

    Raises:
        ReplayBufferError: a chunk is cut off or cannot be decoded (names it), or the rows are more
            than the memory holds.
    """
    needed = max(0, stop - start) * array.dtype.itemsize * math.prod(array.shape[1:])
    if needed > memory_bytes():
        raise ReplayBufferError(
            f"{path}: {array.path} needs {_gib(needed)} for steps {start} to {stop - 1}, and this "
            f"machine has {_gib(memory_bytes())} of memory. If this is not what the store should "
            "hold, its description is damaged."
        )
    problem = _why_cut_off(array, start, stop)
    if problem is not None:
        raise ReplayBufferError(_damaged(path, problem))
    try:
        return np.asarray(array[start:stop])
    except Exception as error:
        problem = f"{_first_broken(array, start, stop)} cannot be decoded ({reason(error)})"
        raise ReplayBufferError(_damaged(path, problem)) from error


def blocks(array: Array, n_bytes: int = 1 << 24) -> list[tuple[int, int]]:
    """Ranges of steps [start, stop), whole chunks each and about ``n_bytes`` (at least a chunk)."""
    size = (array.shards or array.chunks)[0]
    row_bytes = max(1, array.dtype.itemsize * math.prod(array.shape[1:]))
    step = size * max(1, n_bytes // (row_bytes * size))
    length = array.shape[0]
    return [(start, min(start + step, length)) for start in range(0, length, step)]


def zip_sizes(path: Path) -> dict[str, int]:
    """Uncompressed bytes of every member of an archive."""
    with zipfile.ZipFile(path) as archive:
        return {info.filename: info.file_size for info in archive.infolist()}


@lru_cache(maxsize=2)
def _archive(path: Path, size: int, changed: int) -> zipfile.ZipFile:
    """An open archive. Its list of members is read once: it is long where each frame is one."""
    del size, changed  # another archive may have taken the place of the one that is open
    return zipfile.ZipFile(path)


class _Files:
    """The files of an array's chunks, in a folder or in an archive."""

    def __init__(self, array: Array) -> None:
        store = array.store_path.store
        self._folder = None if isinstance(store, ZipStore) else cast(LocalStore, store).root
        self._archive = None
        if isinstance(store, ZipStore):
            status = store.path.stat()
            self._archive = _archive(store.path, status.st_size, status.st_mtime_ns)

    def size(self, name: str) -> int | None:
        """Bytes of a chunk; None if it is not there, -1 if it is no file."""
        if self._archive is not None:
            try:
                return self._archive.getinfo(name).file_size
            except KeyError:
                return None
        try:
            status = (cast(Path, self._folder) / name).stat()
        except (FileNotFoundError, NotADirectoryError):
            return None
        return status.st_size if stat.S_ISREG(status.st_mode) else -1

    def head(self, name: str, count: int) -> bytes:
        """The first bytes of a chunk that is there."""
        if self._archive is not None:
            with self._archive.open(name) as file:
                return file.read(count)
        with (cast(Path, self._folder) / name).open("rb") as opened:
            return opened.read(count)


def _why_cut_off(array: Array, start: int, stop: int) -> str | None:
    """What is wrong with the size of a chunk of these rows; None if nothing is."""
    blosc = _is_blosc(array)
    whole = array.dtype.itemsize * math.prod(array.shards or array.chunks)
    files = _Files(array)
    for chunk in chunks(array, start, stop):
        size = files.size(chunk.name)
        where = f"chunk {chunk.name} (steps {chunk.start} to {chunk.stop - 1})"
        if size is None:
            continue
        if size < 0:
            return f"{where} is not a regular file"
        if size > 2 * whole + _OVERHEAD:
            return f"{where} has {size} bytes, and its numbers only {whole}"
        if not blosc:
            continue
        try:
            head = files.head(chunk.name, _BLOSC_HEADER.size)
        except (OSError, zipfile.BadZipFile) as error:
            return f"{where} cannot be read ({reason(error)})"
        if len(head) < _BLOSC_HEADER.size:
            return f"{where} is cut off: it has {size} bytes"
        *_, n_bytes, _, stored = _BLOSC_HEADER.unpack(head)
        if stored != size:
            return f"{where} is cut off: it has {size} bytes and says that it has {stored}"
        if n_bytes > 2 * whole + _OVERHEAD:
            return f"{where} says that it holds {n_bytes} bytes, and its numbers have {whole}"
    return None


def _is_blosc(array: Array) -> bool:
    """Whether a stored chunk begins with Blosc's header."""
    if array.shards is not None:
        return False  # the index at a shard's end has a checksum
    metadata: Any = array.metadata
    if metadata.zarr_format == 2:
        return getattr(metadata.compressor, "codec_id", "") == "blosc"
    return isinstance(metadata.codecs[-1], BloscCodec)


def _writes_fill(array: Array, absent: set[str]) -> bool:
    """Whether some chunk is there that holds only the fill value: then none was left out.

    Such chunks are the smallest where chunks are compressed, so only the smallest are looked at.
    """
    files = _Files(array)
    there = [(files.size(c.name) or 0, c) for c in chunks(array) if c.name not in absent]
    smallest = sorted(there, key=lambda pair: pair[0])[:_EXAMINED]
    return any(_is_fill(array, (slice(c.start, c.stop), *c.columns)) for _, c in smallest)


def _runs(absent: list[Chunk]) -> list[list[Chunk]]:
    """Chunks that follow one another along the steps, together."""
    runs: dict[tuple[str, int], list[Chunk]] = {}  # (columns, where the run ends)
    for chunk in absent:  # ordered by steps
        run = runs.pop((str(chunk.columns), chunk.start), [])
        run.append(chunk)
        runs[str(chunk.columns), chunk.stop] = run
    return sorted(runs.values(), key=lambda run: run[0].start)


def _may_be_fill(array: Array, run: list[Chunk], edges: set[int]) -> bool:
    """Whether it would be no accident that these chunks hold only the fill value."""
    if (array.shards or array.chunks)[0] == 1:
        return True
    for edge, row in ((run[0].start, run[0].start - 1), (run[-1].stop, run[-1].stop)):
        inside = 0 <= row < array.shape[0] and edge not in edges
        if inside and not _is_fill(array, (slice(row, row + 1), *run[0].columns)):
            return False
    return True


def _is_fill(array: Array, place: tuple[slice, ...]) -> bool:
    """Whether all values of a part are the fill value; no if it cannot be read."""
    fill = np.asarray(0 if array.fill_value is None else array.fill_value)
    if _why_cut_off(array, place[0].start, place[0].stop) is not None:
        return False
    try:
        values = np.asarray(array[place])
    except Exception:  # of a broken chunk nothing can be told
        return False
    return np.array_equal(
        values, np.broadcast_to(fill, values.shape), equal_nan=fill.dtype.kind == "f"
    )


def _first_broken(array: Array, start: int, stop: int) -> str:
    for chunk in chunks(array, start, stop):
        try:
            array[(slice(chunk.start, chunk.stop), *chunk.columns)]
        except Exception:
            return f"chunk {chunk.name} (steps {chunk.start} to {chunk.stop - 1})"
    return f"{array.path}, steps {start} to {stop - 1}"


def _damaged(path: Path, problem: str) -> str:
    return f"{path}: {problem}: the store is cut off or damaged. Copy or download it again."


def reason(error: Exception) -> str:
    """An error of a library on one line."""
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


def printable(text: str) -> str:
    """Text of a file for a terminal: what would steer the terminal is written as an escape."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def _gib(n_bytes: int) -> str:
    return f"{n_bytes / 2**30:.3g} GiB"
