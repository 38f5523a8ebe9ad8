"""Writing files and folders so that a reader finds the old or the new one, never a part."""

from __future__ import annotations

import fcntl
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path


class InUseError(OSError):
    """Another process works on the same files; the message names it."""

    exit_status = 1


@contextmanager
def only_writer(folder: Path, what: str) -> Iterator[None]:
    """Keep other processes out of ``folder`` meanwhile; the system ends this with the process.

    Raises:
        InUseError: another process is in it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(folder / ".lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            holder = os.read(descriptor, 32).decode(errors="replace").strip() or "another"
            raise InUseError(
                f"{what} {folder} is in use by process {holder}; wait until it ends, or choose "
                "another folder"
            ) from error
        os.ftruncate(descriptor, 0)
        os.write(descriptor, f"{os.getpid()}\n".encode())
        yield
    finally:
        os.close(descriptor)  # and with it the lock; the file stays, see RobotLock


def replace_directory(target: Path, fill: Callable[[Path], None]) -> None:
    """Put a folder that ``fill`` writes in the place of ``target``; an older one stays until then.

    What the old folder holds under names that the new one lacks moves on to the new one.

    Args:
        target: absolute; its parents are made.
        fill: writes the files into the empty folder it is given.

    Raises:
        OSError: the disk is full or not writable; the older folder is intact.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    work = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
    try:
        new = work / "new"
        new.mkdir()
        fill(new)
        for path in sorted(new.rglob("*")):
            _fsync(path)
        _swap(new, target, aside=work / "old")
    finally:
        if target.exists() or not (work / "old").exists():
            shutil.rmtree(work, ignore_errors=True)


def write_atomically(target: Path, content: bytes) -> None:
    """Replace ``target`` by ``content``; on any failure the previous file is intact."""
    descriptor, temporary = tempfile.mkstemp(dir=target.parent, prefix=f".{target.name}.")
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        Path(temporary).chmod(0o644)
        Path(temporary).replace(target)
        _fsync(target.parent)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def space_note(target: Path, needed: int) -> str:
    """What a message about a failed write says of room: bytes needed, and what the disk has."""
    folder = next(p for p in target.parents if p.exists())
    free = shutil.disk_usage(folder).free
    return f"it needs {needed / 1e6:.1f} MB, {folder} has {free / 1e6:.1f} MB free"


def _swap(new: Path, target: Path, aside: Path) -> None:
    """Put ``new`` in the place of ``target``, which goes to ``aside`` and comes back on failure."""
    replaced = target.exists()
    if replaced:
        target.rename(aside)
    try:
        new.rename(target)
    except BaseException:
        if replaced:
            aside.rename(target)
        raise
    _fsync(target.parent)
    if replaced:
        for entry in aside.iterdir():
            if not (target / entry.name).exists():
                entry.rename(target / entry.name)


def _fsync(path: Path) -> None:
    """Bring a file's content, or a folder's renames, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
