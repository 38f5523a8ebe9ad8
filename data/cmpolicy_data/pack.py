"""Pack a directory store into one .zip: easy to copy, and nothing can go missing from it."""

from __future__ import annotations

import os
import tempfile
import zipfile
from pathlib import Path

from cmpolicy_data.chunks import ReplayBufferError
from cmpolicy_data.replay_buffer import ReplayBuffer

_TIMESTAMP = (1980, 1, 1, 0, 0, 0)  # the same store packs to the same bytes


def pack(source: str | Path, target: str | Path) -> Path:
    """Write the directory store ``source`` as the archive ``target`` (.zip), atomically.

    The archive is written beside the target, read back, and only then put in its place: whatever
    happens, ``target`` is either what it was or complete. Metadata is compressed by the archive;
    chunks are compressed already and packed at the archive's best level all the same.

    Raises:
        FileNotFoundError, ReplayBufferError: ``source`` cannot be opened.
        ValueError: ``source`` is not a directory, or ``target`` does not end in .zip.
        FileExistsError: ``target`` is there and no store.
    """
    source, target = Path(source).expanduser(), Path(target).expanduser()
    keys = ReplayBuffer.open(source).keys()
    if not source.is_dir():
        raise ValueError(f"{source} is packed already: expected a directory store.")
    if target.suffix != ".zip":
        raise ValueError(f"A packed store must end in .zip (for example demos.zarr.zip): {target}")
    if target.exists():
        try:
            ReplayBuffer.open(target)
        except (ReplayBufferError, OSError, ValueError) as error:
            raise FileExistsError(
                f"{target} exists and is no store. Choose another path or remove it."
            ) from error
    target.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(prefix=f".{target.name}.", suffix=".zip", dir=target.parent)
    temporary = Path(name)
    try:
        with os.fdopen(handle, "wb") as file:
            with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED, compresslevel=9) as archive:
                for member in sorted(
                    p for p in source.rglob("*") if p.is_file() and p.name != ".lock"
                ):
                    if member.suffix == ".partial":  # of an append that was cut off
                        continue
                    info = zipfile.ZipInfo(member.relative_to(source).as_posix(), _TIMESTAMP)
                    info.compress_type = zipfile.ZIP_DEFLATED
                    info.external_attr = 0o644 << 16
                    archive.writestr(info, member.read_bytes(), compresslevel=9)
            file.flush()
            os.fsync(file.fileno())
        packed = ReplayBuffer.open(temporary)
        for key in keys:
            packed.check(key)
        temporary.chmod(0o644)  # mkstemp makes private files
        temporary.replace(target)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    return target
