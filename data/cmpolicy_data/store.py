"""Opening Zarr stores and their arrays, with errors that say what is wrong.

Stores are directories or .zip archives, Zarr format 2 or 3; nothing in them is trusted: metadata is
checked against what files and memory can hold before anything is read or allocated.
"""

from __future__ import annotations

import fcntl
import json
import os
import re
import stat
import time
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, cast

import zarr
from zarr.storage import LocalStore, ZipStore

from cmpolicy_data.chunks import (
    Array,
    MissingChunks,
    ReplayBufferError,
    reason,
    why_impossible,
    zip_sizes,
)

# Root attribute of stores that `ReplayBuffer` wrote or appended to: {"format_version": 1,
# "all_chunks_written": bool, "converted": int}. Where all chunks are written, one that is not there
# is lost for certain. A store with as many episodes as were converted has none of somebody else.
MARK = "cmpolicy_data"
FORMAT_VERSION = 1

# Descriptions of arrays and groups are text of a few hundred bytes, and stores have a few arrays.
_MAX_METADATA_BYTES = 1 << 24
_MAX_ARRAYS = 10_000
_METADATA = (".zgroup", ".zattrs", ".zarray", "zarr.json")

_EXPECTED = (
    "Expected a Zarr directory or .zip with arrays data/<key> (N, ...) and meta/episode_ends (E,)."
)


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
    if not (path.is_file() or path.is_dir()):
        raise ReplayBufferError(f"{path} is neither a folder nor a regular file. {_EXPECTED}")
    foreign = _why_foreign(path)
    if foreign:
        raise ReplayBufferError(f"{path} {foreign}")
    if path.is_file() and mode != "r":
        raise ReplayBufferError(
            f"{path} is one file: .zip stores are read-only. Append to a directory store and pack "
            "it again."
        )
    try:
        _check_metadata_files(path)
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
    except ReplayBufferError:
        raise
    except Exception as error:  # zarr raises many kinds for unreadable metadata
        raise ReplayBufferError(
            f"{path} is not a readable Zarr store ({reason(error)}). {_EXPECTED}"
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


def missing_rule(root: zarr.Group, asked: MissingChunks) -> MissingChunks:
    """The rule for absent chunks: what was asked, unless the store says that it wrote them all."""
    return "error" if writes_all_chunks(root) else asked


def mark(*, all_chunks_written: bool, converted: int | None = None) -> dict[str, Any]:
    """The root attribute that says who wrote a store; ``converted``: episodes of a converter."""
    own = {"format_version": FORMAT_VERSION, "all_chunks_written": all_chunks_written}
    return {MARK: own if converted is None else {**own, "converted": converted}}


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
    for name in array_names(root, group):
        try:
            node = root[f"{group}/{name}"]
        except Exception as error:
            broken[name] = _why_unreadable(error)
            continue
        if isinstance(node, zarr.Array):
            why = why_impossible(node) if node.ndim else None
            if why is None:
                found[name] = node
            else:
                broken[name] = why
    return found, broken


def array_names(root: zarr.Group, group: str) -> list[str]:
    """Names below ``group`` of everything that describes itself as an array."""
    store = root.store_path.store
    prefix = f"{root.store_path.path}/{group}/".lstrip("/")
    if isinstance(store, ZipStore):
        names = [n[len(prefix) :] for n in zip_sizes(store.path) if n.startswith(prefix)]
    else:
        folder = cast(LocalStore, store).root / prefix
        names = []
        for place, folders, files in os.walk(folder, followlinks=True):
            names += [(Path(place) / file).relative_to(folder).as_posix() for file in files]
            if ".zarray" in files:
                folders.clear()  # chunks
            elif "c" in folders and _is_array(Path(place)):
                folders.remove("c")  # chunks
    tails = ("/.zarray", "/zarr.json")
    found = sorted({n.rpartition("/")[0] for n in names if n.endswith(tails)})
    if len(found) > _MAX_ARRAYS:
        raise ReplayBufferError(
            f"the store has {len(found)} arrays below {group}/, more than the {_MAX_ARRAYS} that "
            f"are read. {_EXPECTED}"
        )
    return found


def _is_array(folder: Path) -> bool:
    """Whether a folder is an array of format 3, whose chunks lie in ``c``; a group may have a key
    of that name."""
    described = folder / "zarr.json"
    try:
        if described.stat().st_size > _MAX_METADATA_BYTES:
            return False
        return json.loads(described.read_bytes()).get("node_type") == "array"
    except (OSError, ValueError, AttributeError):
        return described.exists()


def _why_unreadable(error: Exception) -> str:
    """Why an array cannot be opened, and which package would help."""
    what = reason(error)
    if _IMAGE_CODEC.search(what):
        return (
            f"its images are compressed with a codec of imagecodecs ({what}): "
            "pip install 'cmpolicy[codecs]'"
        )
    if "pickle" in what or "object" in what.lower():
        return f"it holds Python objects, which are not read ({what})"
    return f"its codec or its description cannot be read ({what})"


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
            f"{path}: the metadata of {name} cannot be read ({reason(error)}): the store is cut "
            "off or damaged. Copy or download it again."
        ) from error
    if not isinstance(node, zarr.Array):
        return None
    why = why_impossible(node) if node.ndim else None
    if why is not None:
        raise ReplayBufferError(f"{path}: {name} cannot be read: {why}.")
    return node


def size_on_disk(path: Path) -> int:
    """Bytes of all files of a store."""
    if path.is_file():
        return path.stat().st_size
    return sum(file.stat().st_size for file in path.rglob("*") if file.is_file())


def _why_foreign(path: Path) -> str | None:
    """What a path is that people have in the place of a store, and what to do; None if nothing."""
    if path.is_file():
        with path.open("rb") as file:
            if file.read(len(_HDF5)) != _HDF5:
                return None
        return (
            "is an HDF5 file, not a Zarr store. robomimic's layout (data/demo_0/...): `cmpolicy "
            f"data convert robomimic {path} out=my.zarr`; ALOHA's (observations/qpos): `cmpolicy "
            f"data convert aloha {path.parent} out=my.zarr`"
        )
    if any((path / name).exists() for name in (".zgroup", "zarr.json", "meta/episode_ends")):
        return None
    if (path / "meta" / "info.json").is_file():
        return (
            "is a LeRobot data set, not a Zarr store: `cmpolicy data convert lerobot "
            f"{path} out=my.zarr`"
        )
    if any(path.glob("*.hdf5")):
        return (
            "holds HDF5 files and no Zarr store. Episodes of ALOHA: `cmpolicy data convert aloha "
            f"{path} out=my.zarr`; a file of robomimic: `cmpolicy data convert robomimic FILE`"
        )
    inside = [p for p in sorted(path.iterdir()) if _is_group(p)]
    if inside:
        return f"is a folder around a store: did you mean {inside[0]}?"
    return None


_HDF5 = b"\x89HDF\r\n\x1a\n"


def _is_group(path: Path) -> bool:
    return path.suffix == ".zip" or any((path / n).is_file() for n in (".zgroup", "zarr.json"))


def _check_metadata_files(path: Path) -> None:
    """Refuse descriptions that are no regular files, or too large to be what they should be."""
    if path.is_file():
        sizes = zip_sizes(path)
    else:
        sizes = {}
        for place, folders, files in os.walk(path):
            if ".zarray" in files:
                folders.clear()  # chunks
            elif "c" in folders and _is_array(Path(place)):
                folders.remove("c")  # chunks
            for name in set(files).intersection(_METADATA):
                status = (Path(place) / name).stat()
                sizes[f"{place}/{name}"] = status.st_size if stat.S_ISREG(status.st_mode) else -1
    for name, size in sizes.items():
        if name.rpartition("/")[2] not in _METADATA:
            continue
        if size < 0:
            raise ReplayBufferError(f"{path}: {name} is not a regular file.")
        if size > _MAX_METADATA_BYTES:
            raise ReplayBufferError(
                f"{path}: {name} has {size} bytes; the description of an array or group has a few "
                "hundred. The store is damaged, or made to do harm."
            )


def _zip_prefix(path: Path) -> str:
    """The folder inside the archive that holds the store ("" for its top)."""
    found = {
        name[: -len(tail)].rstrip("/")
        for name in zip_sizes(path)
        for tail in ("meta/episode_ends/.zarray", "meta/episode_ends/zarr.json")
        if name == tail or name.endswith("/" + tail)
    }
    if len(found) > 1:
        raise ValueError(f"it holds several stores: {', '.join(sorted(found))}; unpack it first")
    return found.pop() if found else ""
