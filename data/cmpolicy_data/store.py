"""Opening Zarr stores and reading rows of their arrays, with errors that say what is wrong.

Stores are directories or .zip archives, Zarr format 2 or 3. Zarr itself reads a chunk that is not
there as the fill value, so a copy that was cut off would train on zeros: ``missing_chunks`` and
``read_rows`` are what every reader here goes through.
"""

from __future__ import annotations

import fcntl
import itertools
import math
import os
import re
import time
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, cast

import numpy as np
import numpy.typing as npt
import zarr
from zarr.storage import LocalStore, ZipStore

Array = zarr.Array[Any]

# Root attribute of stores that `ReplayBuffer` wrote or appended to: {"format_version": 1,
# "all_chunks_written": bool}. Where it is true, a chunk that is not there is lost for certain.
MARK = "cmpolicy_data"
FORMAT_VERSION = 1

_EXPECTED = (
    "Expected a Zarr directory or .zip with arrays data/<key> (N, ...) and meta/episode_ends (E,)."
)


class ReplayBufferError(ValueError):
    """A store that cannot be read, or does not hold what was asked of it."""


@dataclass(frozen=True)
class Chunk:
    """One chunk of an array: its name in the store, and the rows [start, stop) that it holds."""

    name: str
    start: int
    stop: int
    columns: tuple[slice, ...]


def open_root(path: Path, mode: Literal["r", "r+"] = "r") -> zarr.Group:
    """The root group of the store at ``path``.

    In a .zip the store may lie in a folder (the public archives do): the one folder that holds
    meta/episode_ends is then the root. Consolidated metadata is not read: it may be older than the
    arrays.

    Raises:
        FileNotFoundError: there is nothing at ``path``.
        ReplayBufferError: it is not a Zarr store, is cut off, or is of a newer version.
    """
    _register_image_codecs()
    if not path.exists():
        raise FileNotFoundError(
            f"There is no data at {path}. {_EXPECTED} Check the path, or get data with "
            "`cmpolicy data generate pusht` or `cmpolicy data download pusht`."
        )
    if path.is_file() and mode != "r":
        raise ReplayBufferError(
            f"{path} is one file: .zip stores are read-only. Append to a directory store and pack "
            "it again."
        )
    try:
        if path.is_dir():
            store: LocalStore | ZipStore = LocalStore(path, read_only=mode == "r")
            root = zarr.open_group(store, mode=mode, use_consolidated=False)
        else:
            store = ZipStore(path, mode="r")
            prefix = _zip_prefix(path)
            root = zarr.open_group(store, mode="r", path=prefix, use_consolidated=False)
    except zipfile.BadZipFile as error:
        raise ReplayBufferError(
            f"{path} is not a whole .zip archive ({error}): it is cut off, or not a .zip at all. "
            f"{_EXPECTED} Copy or download it again."
        ) from error
    except Exception as error:  # zarr raises many kinds for unreadable metadata
        raise ReplayBufferError(
            f"{path} is not a readable Zarr store ({_reason(error)}). {_EXPECTED}"
        ) from error
    written = cast(Mapping[str, Any], root.attrs.asdict()).get(MARK)
    version = written.get("format_version") if isinstance(written, dict) else None
    if isinstance(version, int) and version > FORMAT_VERSION:
        raise ReplayBufferError(
            f"{path} was written by a newer cmpolicy (store format version {version}; this one "
            f"reads up to {FORMAT_VERSION}). Upgrade cmpolicy."
        )
    return root


@contextmanager
def only_writer(path: Path, patience: float = 10.0) -> Iterator[None]:
    """Keep other processes from appending meanwhile; the system ends this with the process.

    Raises:
        ReplayBufferError: another one is still appending after ``patience`` seconds; names it.
    """
    descriptor = os.open(path / ".lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    try:
        end = time.monotonic() + patience
        while True:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > end:
                    holder = os.pread(descriptor, 32, 0).decode(errors="replace").strip()
                    raise ReplayBufferError(
                        f"Cannot append to {path}: process {holder or '?'} is appending to it"
                    ) from None
                time.sleep(0.01)
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, f"{os.getpid()}\n".encode(), 0)
        yield
    finally:
        os.close(descriptor)  # and with it the lock


def is_marked(root: zarr.Group) -> bool:
    """Whether ``ReplayBuffer`` wrote (or appended to) this store."""
    return MARK in root.attrs.asdict()


def writes_all_chunks(root: zarr.Group) -> bool:
    """Whether every chunk of this store was written, those of nothing but zeros too."""
    mark = cast(Mapping[str, Any], root.attrs.asdict()).get(MARK)
    return isinstance(mark, dict) and mark.get("all_chunks_written") is True


def mark(*, all_chunks_written: bool) -> dict[str, Any]:
    """The root attribute that says who wrote a store."""
    return {MARK: {"format_version": FORMAT_VERSION, "all_chunks_written": all_chunks_written}}


def arrays(root: zarr.Group, group: str, path: Path) -> tuple[dict[str, Array], dict[str, str]]:
    """The arrays below ``group`` by their name in it (nested ones as ``a/b``), sorted.

    Returns:
        Those that can be opened, and for each of the others why not: a codec that is missing or a
        damaged description of one array is no reason to refuse the others.

    Raises:
        ReplayBufferError: no such group.
    """
    if group not in root:
        raise ReplayBufferError(f"{path} has no group {group}/. {_EXPECTED}")
    found: dict[str, Array] = {}
    broken: dict[str, str] = {}
    for name in _array_names(root, group):
        try:
            node = root[f"{group}/{name}"]
        except Exception as error:
            broken[name] = _why_unreadable(error)
            continue
        if isinstance(node, zarr.Array):
            found[name] = node
    return found, broken


def _array_names(root: zarr.Group, group: str) -> list[str]:
    """Names below ``group`` of everything that describes itself as an array."""
    store = root.store_path.store
    prefix = f"{root.store_path.path}/{group}/".lstrip("/")
    if isinstance(store, ZipStore):
        names = [
            n[len(prefix) :] for n in zipfile.ZipFile(store.path).namelist() if n.startswith(prefix)
        ]
    else:
        folder = cast(LocalStore, store).root / prefix
        names = []
        for place, folders, files in os.walk(folder, followlinks=True):
            names += [(Path(place) / file).relative_to(folder).as_posix() for file in files]
            if ".zarray" in files:
                folders.clear()  # chunks
            elif "zarr.json" in files and "c" in folders:
                folders.remove("c")
    tails = ("/.zarray", "/zarr.json")
    return sorted({n.rpartition("/")[0] for n in names if n.endswith(tails)})


def _why_unreadable(error: Exception) -> str:
    """Why an array cannot be opened, and which package would help."""
    reason = _reason(error)
    if _IMAGE_CODEC.search(reason):
        return (
            f"its images are compressed with a codec of imagecodecs ({reason}): "
            "pip install 'cmpolicy[codecs]'"
        )
    if "pickle" in reason or "object" in reason.lower():
        return f"it holds Python objects, which are not read ({reason})"
    return f"its codec or its description cannot be read ({reason})"


_IMAGE_CODEC = re.compile(r"imagecodecs|jpeg|jxl|webp|avif|png", re.IGNORECASE)


def _register_image_codecs() -> None:
    """Let Zarr read images in JPEG 2000, JPEG XL and the like, where imagecodecs is installed."""
    try:
        from imagecodecs.numcodecs import register_codecs
    except ImportError:
        return
    register_codecs(verbose=False)


def get_array(root: zarr.Group, name: str, path: Path) -> Array | None:
    """The array ``name`` (``data/action``), or None if there is none of that name.

    Raises:
        ReplayBufferError: its metadata cannot be read.
    """
    try:
        node = root.get(name)
    except Exception as error:
        raise ReplayBufferError(
            f"{path}: the metadata of {name} cannot be read ({_reason(error)}): the store is cut "
            "off or damaged. Copy or download it again."
        ) from error
    return node if isinstance(node, zarr.Array) else None


def chunks(array: Array) -> list[Chunk]:
    """Every chunk (shard, where there are shards) that the array's shape calls for."""
    sizes = array.shards or array.chunks
    grid = [range(-(-length // size)) for length, size in zip(array.shape, sizes, strict=True)]
    found = []
    for place in itertools.product(*grid):
        rows, *columns = (
            slice(i * size, min((i + 1) * size, length))
            for i, size, length in zip(place, sizes, array.shape, strict=True)
        )
        name = f"{array.path}/{array.metadata.encode_chunk_key(place)}"
        found.append(Chunk(name, rows.start, rows.stop, tuple(columns)))
    return found


def missing_chunks(array: Array, stop: int | None = None, *, strict: bool) -> list[Chunk]:
    """Chunks with rows before ``stop`` that are lost.

    Writers may leave out chunks that hold nothing but the fill value (zarr 3 does by default).
    Unless ``strict``, a chunk that is not there counts as such when the rows next to it hold the
    fill value too: a run of zeros rarely ends exactly where a chunk does, a cut-off copy does.
    """
    store = array.store_path.store
    if isinstance(store, ZipStore):
        names = set(zipfile.ZipFile(store.path).namelist())
        absent = [chunk for chunk in chunks(array) if chunk.name not in names]
    else:
        folder = cast(LocalStore, store).root
        absent = [chunk for chunk in chunks(array) if not (folder / chunk.name).is_file()]
    limit = array.shape[0] if stop is None else stop
    absent = [chunk for chunk in absent if chunk.start < limit]
    return (
        absent
        if strict
        else [c for run in _runs(absent) if not _may_be_fill(array, run) for c in run]
    )


def read_rows(array: Array, start: int, stop: int, path: Path) -> npt.NDArray[Any]:
    """Rows [start, stop) of the array.

    Raises:
        ReplayBufferError: a chunk cannot be decoded; names it.
    """
    try:
        return np.asarray(array[start:stop])
    except Exception as error:
        raise ReplayBufferError(
            f"{path}: {_first_broken(array, start, stop)} cannot be decoded ({_reason(error)}): "
            "the store is cut off or damaged. Copy or download it again."
        ) from error


def blocks(array: Array, n_bytes: int = 1 << 24) -> list[tuple[int, int]]:
    """Ranges of steps [start, stop), whole chunks each and about ``n_bytes`` (at least a chunk)."""
    size = (array.shards or array.chunks)[0]
    row_bytes = max(1, array.dtype.itemsize * math.prod(array.shape[1:]))
    step = size * max(1, n_bytes // (row_bytes * size))
    length = array.shape[0]
    return [(start, min(start + step, length)) for start in range(0, length, step)]


def size_on_disk(path: Path) -> int:
    """Bytes of all files of a store."""
    if path.is_file():
        return path.stat().st_size
    return sum(file.stat().st_size for file in path.rglob("*") if file.is_file())


def missing_message(missing: list[Chunk], array: Array) -> str:
    """One sentence on chunks that are lost, for errors and problem lists."""
    first = missing[0]
    return (
        f"{len(missing)} of {len(chunks(array))} chunks of {array.path} are not there, the first "
        f"is {first.name} (steps {first.start} to {first.stop - 1}): the store is truncated. "
        "Copy or download it again (or, if these are zeros that the writer left out, write it with "
        "zarr's write_empty_chunks=True)"
    )


def _zip_prefix(path: Path) -> str:
    """The folder inside the archive that holds the store ("" for its top)."""
    with zipfile.ZipFile(path) as archive:
        found = {
            name[: -len(tail)].rstrip("/")
            for name in archive.namelist()
            for tail in ("meta/episode_ends/.zarray", "meta/episode_ends/zarr.json")
            if name == tail or name.endswith("/" + tail)
        }
    if len(found) > 1:
        raise ValueError(f"it holds several stores: {', '.join(sorted(found))}; unpack it first")
    return found.pop() if found else ""


def _runs(absent: list[Chunk]) -> list[list[Chunk]]:
    """Chunks that follow one another along the steps, together."""
    runs: dict[tuple[str, int], list[Chunk]] = {}  # (columns, where the run ends)
    for chunk in absent:  # ordered by steps
        run = runs.pop((str(chunk.columns), chunk.start), [])
        runs[str(chunk.columns), chunk.stop] = [*run, chunk]
    return sorted(runs.values(), key=lambda run: run[0].start)


def _may_be_fill(array: Array, run: list[Chunk]) -> bool:
    fill = np.asarray(0 if array.fill_value is None else array.fill_value)
    for row in (run[0].start - 1, run[-1].stop):
        if 0 <= row < array.shape[0]:
            try:
                beside = np.asarray(array[(slice(row, row + 1), *run[0].columns)])
            except Exception:  # beside a broken chunk nothing can be told: count it as lost
                return False
            if not np.array_equal(beside, np.broadcast_to(fill, beside.shape)):
                return False
    return True


def _first_broken(array: Array, start: int, stop: int) -> str:
    for chunk in chunks(array):
        if chunk.start < stop and chunk.stop > start:
            try:
                array[(slice(chunk.start, chunk.stop), *chunk.columns)]
            except Exception:
                return f"chunk {chunk.name} (steps {chunk.start} to {chunk.stop - 1})"
    return f"{array.path}, steps {start} to {stop - 1}"


def _reason(error: Exception) -> str:
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text}" if text else type(error).__name__
