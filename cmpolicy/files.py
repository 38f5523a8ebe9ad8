"""Writing files and folders so that a reader finds the old or the new one, never a part."""

from __future__ import annotations

import ctypes
import fcntl
import glob
import itertools
import os
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

_CWD, _RENAME_EXCHANGE = -100, 2  # of Linux: AT_FDCWD, and the flag of renameat2


class WriteError(OSError):
    """A file could not be written, most often for lack of room; the message names it."""

    exit_status = 1


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


def put_aside(file: Path) -> Path:
    """Rename a file to ``<name>-before-<n>``, so that another can be written; its new path."""
    names = (file.with_name(f"{file.stem}-before-{n}{file.suffix}") for n in itertools.count(1))
    aside = next(name for name in names if not name.exists())
    file.rename(aside)
    print(f"{file} held another result, which is now in {aside}", file=sys.stderr)
    return aside


def replace_directory(target: Path, fill: Callable[[Path], None]) -> None:
    """Put a folder that ``fill`` writes in the place of ``target``; an older one stays until then.

    What the old folder holds under names that the new one lacks is in the new one too. On Linux the
    two change places in one step, so a reader always finds one of them whole. Where ``target`` is a
    link, the folder that it points to is replaced. What writers that were killed left behind is
    removed.

    Args:
        target: absolute; its parents are made.
        fill: writes the files into the empty folder it is given.

    Raises:
        OSError: the disk is full or not writable; the older folder is intact.
    """
    target = target.resolve()
    target.parent.mkdir(parents=True, exist_ok=True)
    _clear_leftovers(target)
    work = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
    with _held(work):
        try:
            new = work / "new"
            new.mkdir()
            fill(new)
            for path in sorted(new.rglob("*")):
                _fsync(path)
            if target.exists():
                _link_rest(target, new)
            _swap(new, target, aside=work / "old")
        finally:
            if target.exists() or not (work / "old").exists():
                shutil.rmtree(work, ignore_errors=True)


def write_atomically(target: Path, content: bytes) -> None:
    """Replace ``target`` by ``content``; on any failure the previous file is intact.

    Raises:
        WriteError: the disk is full or not writable.
    """
    try:
        _write_atomically(target, content)
    except OSError as error:
        raise WriteError(
            f"cannot write {target}: {error.strerror or error}; {space_note(target, len(content))}"
        ) from error


def _write_atomically(target: Path, content: bytes) -> None:
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
    """Put ``new`` in the place of ``target``, which goes to ``new``'s place, or to ``aside``."""
    if not _exchange(new, target):
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


def _exchange(one: Path, other: Path) -> bool:
    """Let two folders change places in one step; False where the system cannot, or lacks one."""
    try:
        renameat2 = ctypes.CDLL(None, use_errno=True).renameat2
    except (AttributeError, OSError):  # not Linux, or an old C library
        return False
    status = renameat2(_CWD, os.fsencode(one), _CWD, os.fsencode(other), _RENAME_EXCHANGE)
    return bool(status == 0)


def _link_rest(old: Path, new: Path) -> None:
    """Give ``new`` the entries of ``old`` that it lacks: the same files, by hard links."""

    def link(source: str, copy: str) -> str:
        try:
            os.link(source, copy, follow_symlinks=False)
        except OSError:  # a file system without hard links
            shutil.copy2(source, copy, follow_symlinks=False)
        return copy

    for entry in old.iterdir():
        place = new / entry.name
        if place.exists() or place.is_symlink():
            continue
        if entry.is_dir() and not entry.is_symlink():
            shutil.copytree(entry, place, symlinks=True, copy_function=link)
        else:
            link(str(entry), str(place))


@contextmanager
def _held(folder: Path) -> Iterator[None]:
    """Show other processes that a temporary folder is in use; ends with this process."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_CLOEXEC)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def _clear_leftovers(target: Path) -> None:
    """Remove the temporary folders for ``target`` of writers that live no more."""
    for folder in target.parent.glob(f".{glob.escape(target.name)}.*"):
        if not (folder / "new").is_dir() and not (folder / "old").is_dir():
            continue
        try:
            descriptor = os.open(folder, os.O_RDONLY | os.O_CLOEXEC)
        except FileNotFoundError:
            continue
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            old = folder / "old"
            if old.is_dir() and not target.exists():  # killed between two renames
                old.rename(target)
            shutil.rmtree(folder, ignore_errors=True)
        except OSError:  # its writer is at work
            continue
        finally:
            os.close(descriptor)


def _fsync(path: Path) -> None:
    """Bring a file's content, or a folder's renames, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
