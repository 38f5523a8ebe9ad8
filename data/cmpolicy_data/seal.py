"""Seals: a hash of every array, kept in the store's attributes, that tells when a file changed.

Zarr stores of other people have no checksums: a flipped bit, a chunk of an older copy, or a lost
chunk that zarr reads as zeros cannot be noticed. ``cmpolicy data seal`` notes what the files hold
now; ``validate`` and every training compare.
"""

from __future__ import annotations

import hashlib
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import IO, Any, cast

import zarr
from zarr.storage import LocalStore, ZipStore

from cmpolicy_data.chunks import ReplayBufferError
from cmpolicy_data.store import array_names, only_writer, open_root

#: Root attribute of sealed stores: {array: hash of the files that describe and hold it}.
SEAL = "cmpolicy_seal"
_BLOCK = 1 << 20


def seal(path: str | Path, *, off: bool = False) -> dict[str, str]:
    """Note what every array of a directory store holds now, in place of an older seal.

    Args:
        path: of the store.
        off: take the seal off instead.

    Returns:
        The hash (BLAKE2b, 128 bits, of names and bytes of its files) by array; empty if ``off``.

    Raises:
        FileNotFoundError: there is nothing at ``path``.
        ReplayBufferError: it is no directory store, or another process appends to it.
    """
    path = Path(path).expanduser()
    open_root(path, "r+")  # raises
    with only_writer(path):
        root = open_root(path, "r+")  # nothing is appended any more
        kept = {key: value for key, value in root.attrs.asdict().items() if key != SEAL}
        names = [] if off else [f"{g}/{n}" for g in ("data", "meta") for n in array_names(root, g)]
        hashes = {name: _hash(root, name) for name in names}
        root.attrs.put(kept if off else {**kept, SEAL: hashes})
    return hashes


def broken_seal(root: zarr.Group, name: str) -> str | None:
    """What changed in an array (``data/action``) since the store was sealed.

    None if nothing did, or the store has no seal.
    """
    hashes = cast(Mapping[str, Any], root.attrs.asdict()).get(SEAL)
    if hashes is None:
        return None
    if not isinstance(hashes, dict):
        return "the seal of the store is damaged"
    if name not in hashes:
        return "was added after the store was sealed; seal it again if that is right"
    if hashes[name] != _hash(root, name):
        return (
            "has changed since the store was sealed: a file of it is damaged, lost or replaced. "
            "Copy or download it again; or, if you changed it yourself, seal it again"
        )
    return None


def broken_seals(root: zarr.Group) -> dict[str, str]:
    """What changed since the store was sealed, by array; empty if it has no seal."""
    hashes = cast(Mapping[str, Any], root.attrs.asdict()).get(SEAL)
    if hashes is None:
        return {}
    names = {f"{group}/{name}" for group in ("data", "meta") for name in array_names(root, group)}
    names.update(hashes if isinstance(hashes, dict) else ())
    found = {name: broken_seal(root, name) for name in sorted(names)}
    return {name: why for name, why in found.items() if why is not None}


def _hash(root: zarr.Group, name: str) -> str:
    digest = hashlib.blake2b(digest_size=16)
    for file, size, blocks in _files(root, name):
        digest.update(f"{len(file)} {file} {size} ".encode())
        for block in blocks:
            digest.update(block)
    return digest.hexdigest()


def _files(root: zarr.Group, name: str) -> Iterator[tuple[str, int, Iterator[bytes]]]:
    """Name in the array, size and content of every file of an array, by name."""
    store = root.store_path.store
    prefix = f"{root.store_path.path}/{name}/".lstrip("/")
    if isinstance(store, ZipStore):
        with zipfile.ZipFile(store.path) as archive:
            members = sorted(archive.infolist(), key=lambda info: info.filename)
            for member in members:
                if member.filename.startswith(prefix) and not member.is_dir():
                    with archive.open(member) as file:
                        inside = member.filename[len(prefix) :]
                        yield inside, member.file_size, _blocks(file)
        return
    folder = cast(LocalStore, store).root / prefix
    found = {p.relative_to(folder).as_posix(): p for p in folder.rglob("*") if p.is_file()}
    for inside, place in sorted(found.items()):
        if place.suffix == ".partial":
            continue
        with place.open("rb") as opened:
            yield inside, place.stat().st_size, _blocks(opened)


def _blocks(file: IO[bytes]) -> Iterator[bytes]:
    while block := file.read(_BLOCK):
        yield block


def refuse_to_append(root: zarr.Group, path: Path) -> None:
    """Keep a sealed store as it is.

    Raises:
        ReplayBufferError: the store is sealed.
    """
    if SEAL in root.attrs.asdict():
        raise ReplayBufferError(
            f"Cannot append to {path}: it is sealed. Take the seal off with `cmpolicy data seal "
            f"{path} off=true`, and seal it again afterwards."
        )
