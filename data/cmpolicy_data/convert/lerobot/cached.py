"""A LeRobot data set as the store to train on: converted once, kept in the cache by content."""

from __future__ import annotations

import hashlib
import os
import shutil
from pathlib import Path

from tqdm import tqdm

from cmpolicy_data.catalog import cache_dir
from cmpolicy_data.convert.lerobot.layout import is_lerobot
from cmpolicy_data.convert.lerobot.reading import VERSION, read

_CONTENT = ("meta", "data", "videos")


def as_store(path: Path, name: str | None = None, commit: str | None = None) -> Path:
    """A store as it is; of a LeRobot data set, its store in the cache, made at the first use.

    ``name`` and ``commit`` are noted in a store that is made.

    Raises:
        LeRobotError, ImportError: see :func:`read`.
    """
    if not is_lerobot(path):
        return path
    target = cache_dir() / "lerobot" / f"{_digest(path)}.zarr"
    if target.is_dir():
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    # other processes of the run may convert at the same time: the first that is ready counts
    own = target.with_name(f"{target.stem}.{os.getpid()}.zarr")
    what = f"converting {name or path.name}"
    with tqdm(desc=what, unit="episode", disable=None, leave=False) as bar:

        def show(done: int, total: int) -> None:
            bar.total = total
            bar.update(done - bar.n)

        read(path, own, name=name, commit=commit, progress=show)
    try:
        own.rename(target)
    except OSError:
        shutil.rmtree(own)
        if not target.is_dir():
            raise
    return target


def _digest(root: Path) -> str:
    """Of everything that is read of a data set, and of how.

    Videos may be many gigabytes, so what was found is noted, and files that have kept their size
    and time are not read again.
    """
    state = hashlib.blake2b(f"{VERSION} {root.resolve()}".encode(), digest_size=16)
    files = [
        path for folder in _CONTENT for path in sorted((root / folder).rglob("*")) if path.is_file()
    ]
    for file in files:
        status = file.stat()
        state.update(f"{file.relative_to(root)} {status.st_size} {status.st_mtime_ns}\n".encode())
    note = cache_dir() / "lerobot" / f"{state.hexdigest()}.digest"
    if note.is_file():
        return note.read_text()
    digest = hashlib.blake2b(f"{VERSION}".encode(), digest_size=16)
    for file in files:
        with file.open("rb") as opened:
            content = hashlib.file_digest(opened, "blake2b").hexdigest()
        digest.update(f"{file.relative_to(root)} {content}\n".encode())
    note.parent.mkdir(parents=True, exist_ok=True)
    own = note.with_suffix(f".{os.getpid()}")
    own.write_text(digest.hexdigest())
    own.replace(note)
    return digest.hexdigest()
