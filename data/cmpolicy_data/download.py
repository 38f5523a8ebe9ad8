"""Fetching the public human Push-T demonstrations, over connections that break.

``fetch`` downloads one file: into ``<target>.part``, picked up where it stopped (HTTP Range,
guarded by If-Range, so that a file that changed on the server is never glued to an old half).
``download`` fetches the archive, unpacks it aside, compares its arrays with known hashes and only
then moves the store into place. The library for this, pooch, starts a broken download over from
its beginning; this one goes on.
"""

from __future__ import annotations

import errno
import hashlib
import http.client
import json
import os
import shutil
import stat
import tempfile
import time
import urllib.error
import urllib.request
import zipfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import numpy.typing as npt

from cmpolicy_data.catalog import HUMAN_STORE, data_dir
from cmpolicy_data.replay_buffer import ReplayBuffer

Progress = Callable[[int, int | None], None]
"""Called with bytes done and bytes in all (None if the server does not say)."""

_BLOCK = 1 << 18
_TIMEOUT_S = 30.0
_RETRY_LATER = (408, 425, 429, 500, 502, 503, 504)


class DownloadError(ValueError):
    """A download that failed for good; says what to do."""


@dataclass(frozen=True)
class RemoteDataset:
    """A data set in a public archive.

    Attributes:
        url: of the .zip. store: folder name of the Zarr store in it.
        hashes: ``array_hash`` of its arrays, by their name in the store.
    """

    url: str
    store: str
    hashes: Mapping[str, str]


PUSHT_HUMAN = RemoteDataset(
    url="https://diffusion-policy.cs.columbia.edu/data/training/pusht.zip",
    store=HUMAN_STORE,
    # The archive may be repacked by its host, so what counts is what is in it.
    hashes={
        "action": "27760b720f372e552296b67a66fb9acdb3f963a1a531d1902bedd99f924ff86f",
        "state": "29e33f42ccd00f3bf1ee442c40fd12c872d499a856445823880b01610d3b8310",
        "keypoint": "393675e728f283dc1ff6318db984927081ad8e43b7afa92ec35de9efa89cacec",
        "episode_ends": "2629361dfd6811d889e0e28344152ee948b2aa323c6db07bf1748fe5a15252e9",
    },
)

DATASETS: Mapping[str, RemoteDataset] = {"pusht": PUSHT_HUMAN}


def download(
    dataset: RemoteDataset = PUSHT_HUMAN,
    out: str | Path | None = None,
    *,
    url: str | None = None,
    sha256: str | None = None,
    progress: Progress | None = None,
    retries: int = 5,
    retry_wait_s: float = 2.0,
) -> Path:
    """Fetch, check and unpack a data set; returns the path of its store.

    Args:
        dataset: what to fetch.
        out: folder for the store; default CMPOLICY_DATA, else the cache (see ``catalog``).
        url: a mirror of the archive. sha256: hex digest that the archive must have.
        progress: called as the download goes on.
        retries: after a broken connection, with waits that double from ``retry_wait_s``.

    Raises:
        DownloadError: not to be had, damaged, or other data than expected.
    """
    folder = Path(out).expanduser() if out is not None else data_dir()
    store = folder / dataset.store
    if store.exists():
        try:
            check_content(store, dataset.hashes)
        except ValueError as error:
            raise DownloadError(
                f"{store} is there already, but it is not the data set ({error}). Delete it and "
                "download again."
            ) from error
        return store
    folder.mkdir(parents=True, exist_ok=True)
    source = url or dataset.url
    archive = folder / f"{dataset.store}.download.zip"
    fetch(
        source,
        archive,
        sha256=sha256,
        progress=progress,
        retries=retries,
        retry_wait_s=retry_wait_s,
    )
    aside = Path(tempfile.mkdtemp(prefix=f".{dataset.store}.", dir=folder))
    try:
        unpacked = _unpack_store(archive, aside, dataset.store)
        check_content(unpacked, dataset.hashes)
        unpacked.replace(store)
    except ValueError as error:
        archive.unlink(missing_ok=True)  # resuming or reusing it would fail again
        raise DownloadError(
            f"{source} was downloaded but is not the expected data: {error}. It was removed; "
            "download again, or name another source with url=..."
        ) from error
    finally:
        shutil.rmtree(aside, ignore_errors=True)
    archive.unlink()
    return store


def fetch(
    url: str,
    target: str | Path,
    *,
    sha256: str | None = None,
    progress: Progress | None = None,
    retries: int = 5,
    retry_wait_s: float = 2.0,
) -> Path:
    """Download one file to ``target``; what an earlier attempt left is continued, not repeated.

    Raises:
        DownloadError: the server refuses, the connection keeps breaking, or the digest differs.
    """
    if not url.startswith(("http://", "https://")):
        raise DownloadError(f"{url!r} is not an http:// or https:// address.")
    target = Path(target)
    part = target.with_name(target.name + ".part")
    for attempt in range(retries + 1):
        try:
            _transfer(url, part, progress)
            break
        except urllib.error.HTTPError as error:
            error.close()
            if error.code not in _RETRY_LATER or attempt == retries:
                raise DownloadError(
                    f"{url} answered {error.code} {error.reason}. Check the address, or name "
                    "another source with url=..."
                ) from error
        except (OSError, http.client.HTTPException) as error:  # URLError is an OSError
            if getattr(error, "errno", None) in (errno.ENOSPC, errno.EACCES, errno.EROFS):
                raise  # of this machine's disk, not of the network
            if attempt == retries:
                done = part.stat().st_size if part.exists() else 0
                raise DownloadError(
                    f"{url} could not be downloaded ({error}); {done} bytes are kept in {part}. "
                    "Check the network and run the same command again: it goes on from there."
                ) from error
        time.sleep(retry_wait_s * 2**attempt)
    if sha256 is not None:
        found = _sha256(part)
        if found != sha256.lower():
            _forget(part)
            raise DownloadError(
                f"{url} has SHA-256 {found}, expected {sha256.lower()}. The download was removed; "
                "run the command again, and if this repeats, do not trust the source."
            )
    part.replace(target)
    _forget(part)
    return target


def array_hash(array: npt.NDArray[Any]) -> str:
    """SHA-256 of an array's dtype, shape and values (little-endian, C order)."""
    plain = np.ascontiguousarray(array, dtype=array.dtype.newbyteorder("<"))
    digest = hashlib.sha256(f"{plain.dtype.str} {plain.shape}".encode())
    digest.update(plain.tobytes())
    return digest.hexdigest()


def check_content(store: Path, hashes: Mapping[str, str]) -> None:
    """Compare the arrays of a store with ``hashes``.

    Raises:
        ValueError: an array that is missing, unreadable or other than expected.
    """
    buffer = ReplayBuffer.open(store)
    for key, expected in hashes.items():
        values = buffer.episode_ends if key == "episode_ends" else buffer.load(key)
        found = array_hash(values)
        if found != expected:
            raise ValueError(f"{key} in {store} has hash {found[:16]}, expected {expected[:16]}")


def _transfer(url: str, part: Path, progress: Progress | None) -> None:
    """One connection: bring ``part`` to its full length or raise."""
    done = part.stat().st_size if part.exists() else 0
    validator = _read_validator(part, url)
    request = urllib.request.Request(url, headers={"User-Agent": "cmpolicy data"})
    if done and validator:
        request.add_header("Range", f"bytes={done}-")
        request.add_header("If-Range", validator)
    try:
        response = urllib.request.urlopen(request, timeout=_TIMEOUT_S)
    except urllib.error.HTTPError as error:
        if error.code != 416:
            raise
        # Nothing after what we have: all of it, or the file on the server is another one.
        whole = error.headers.get("Content-Range", "") == f"bytes */{done}"
        error.close()
        if whole:
            return
        _forget(part)
        raise ConnectionError("the file has changed on the server; starting over") from error
    with response:
        resumed = response.status == 206
        if resumed and not response.headers.get("Content-Range", "").startswith(f"bytes {done}-"):
            _forget(part)
            raise ConnectionError("the server sent another range than asked for; starting over")
        if not resumed:
            done = 0
            _write_validator(part, url, response.headers)
        length = response.headers.get("Content-Length")
        total = done + int(length) if length is not None else None
        with part.open("ab" if resumed else "wb") as file:
            if progress is not None:
                progress(done, total)
            while block := response.read(_BLOCK):
                file.write(block)
                done += len(block)
                if progress is not None:
                    progress(done, total)
            file.flush()
            os.fsync(file.fileno())
    if total is not None and done != total:
        raise ConnectionError(f"the connection broke after {done} of {total} bytes")


def _validator_file(part: Path) -> Path:
    return part.with_name(part.name + ".json")


def _write_validator(part: Path, url: str, headers: http.client.HTTPMessage) -> None:
    """Remember what identifies this version of the file; weak tags must not guard a range."""
    tag = headers.get("ETag")
    known = tag if tag and not tag.startswith("W/") else headers.get("Last-Modified")
    _validator_file(part).write_text(json.dumps({"url": url, "validator": known}))


def _read_validator(part: Path, url: str) -> str | None:
    try:
        kept = json.loads(_validator_file(part).read_text())
    except (OSError, ValueError):
        return None
    same = isinstance(kept, dict) and kept.get("url") == url
    return kept.get("validator") if same else None


def _forget(part: Path) -> None:
    part.unlink(missing_ok=True)
    _validator_file(part).unlink(missing_ok=True)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _unpack_store(archive: Path, folder: Path, store: str) -> Path:
    """Unpack the folder ``store`` of the archive; no file can end up outside ``folder``."""
    try:
        with zipfile.ZipFile(archive) as file:
            for member in file.infolist():
                parts = PurePosixPath(member.filename.replace("\\", "/")).parts
                outside = ".." in parts or parts[:1] == ("/",) or ":" in member.filename
                if outside or stat.S_ISLNK(member.external_attr >> 16):
                    raise ValueError(f"its member {member.filename!r} points outside the archive")
                if store in parts:
                    file.extract(member, folder)
    except zipfile.BadZipFile as error:
        raise ValueError(f"it is not a whole .zip archive ({error})") from error
    found = sorted(path for path in folder.rglob(store) if path.is_dir())
    if not found:
        raise ValueError(f"there is no folder {store} in it")
    return found[0]
