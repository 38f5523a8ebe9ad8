"""Where a LeRobot data set is: a folder, LeRobot's own cache, or the Hugging Face hub."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cmpolicy_data.convert.lerobot.errors import LeRobotError
from cmpolicy_data.convert.lerobot.layout import check_version, is_lerobot

_TIMEOUT = 10.0
"""Seconds that the hub, or a proxy before it, may take to answer a request."""
_META = ("meta/*", "meta_data/info.json")
_FILES = (*_META, "data/*", "videos/*")


@dataclass(frozen=True)
class Found:
    """A data set on this machine; ``commit``: of the hub's repository, if it is from there."""

    root: Path
    name: str
    commit: str | None = None


def find(path_or_id: str, revision: str | None = None) -> Found:
    """A folder as it is; ``owner/name`` from LeRobot's cache, else from the hub.

    Args:
        path_or_id: a folder, or the id of a data set.
        revision: commit, tag or branch on the hub (LeRobot tags the layouts, such as ``v3.0``).
            With one, LeRobot's cache is not asked.

    Raises:
        LeRobotError: it is nowhere, or cannot be fetched.
    """
    folder = Path(path_or_id).expanduser()
    if folder.is_dir():
        return Found(folder, folder.resolve().name)
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", path_or_id):
        raise LeRobotError(
            f"There is no folder {folder}. Give the folder of a LeRobot data set (it holds "
            "meta/info.json), or an id of the hub (owner/name)."
        )
    own = lerobot_home() / path_or_id
    if revision is None and is_lerobot(own):
        return Found(own, path_or_id)
    return _fetch(path_or_id, revision, own)


def lerobot_home() -> Path:
    """Where lerobot keeps its data sets."""
    configured = os.environ.get("HF_LEROBOT_HOME")
    if configured:
        return Path(configured).expanduser()
    return Path(os.environ.get("HF_HOME") or "~/.cache/huggingface").expanduser() / "lerobot"


def _fetch(repo_id: str, revision: str | None, own: Path) -> Found:
    from huggingface_hub import HfApi, snapshot_download

    wanted: dict[str, Any] = {"repo_type": "dataset", "allow_patterns": list(_FILES)}
    try:
        # asked first, since snapshot_download's own question has no time limit
        HfApi().repo_info(repo_id, repo_type="dataset", revision=revision, timeout=_TIMEOUT)
    except Exception as error:  # the hub's own and the HTTP library's errors share no other base
        cached = _cached(repo_id, revision)
        if cached is None:
            raise _not_fetched(repo_id, revision, own, error) from error
        return Found(cached, repo_id, cached.name)
    # by the branch's name, under which it is looked for where there is no network
    wanted |= {"revision": revision, "etag_timeout": _TIMEOUT}
    try:
        first = snapshot_download(repo_id, **(wanted | {"allow_patterns": list(_META)}))
        check_version(Path(first))  # before the bulk of it
        folder = Path(snapshot_download(repo_id, **wanted))
    except LeRobotError:
        raise
    except Exception as error:
        raise _not_fetched(repo_id, revision, own, error) from error
    return Found(folder, repo_id, folder.name)


def _cached(repo_id: str, revision: str | None) -> Path | None:
    """A data set that the hub's library, or lerobot 0.5 or later, has fetched before."""
    from huggingface_hub import snapshot_download

    for cache in (None, lerobot_home() / "hub"):
        try:
            folder = snapshot_download(
                repo_id,
                repo_type="dataset",
                revision=revision,
                allow_patterns=list(_FILES),  # the library misses others that were not fetched
                local_files_only=True,
                cache_dir=cache,
            )
        except (OSError, ValueError):
            continue
        if is_lerobot(Path(folder)):
            return Path(folder)
    return None


def _not_fetched(repo_id: str, revision: str | None, own: Path, error: Exception) -> LeRobotError:
    from huggingface_hub import constants
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError

    reason = " ".join(str(error).split())
    caches = f"{constants.HF_HUB_CACHE} and {own.parents[1] / 'hub'}"
    if isinstance(error, RepositoryNotFoundError | GatedRepoError):
        how = (
            "The hub shows no such data set to you: the id is wrong, or it is private or gated. "
            "For those log in (`hf auth login`, or HF_TOKEN) with an account that may read it."
        )
    else:
        version = "" if revision is None else f" --revision {revision}"
        how = (
            "Without a network, fetch it on a machine that has one and copy the folder there: "
            f"hf download {repo_id} --repo-type dataset{version} --local-dir {own}"
        )
    return LeRobotError(
        f"There is no LeRobot data set at {Path(repo_id).absolute()}, at {own}, nor in the hub's "
        f"caches {caches}, and {repo_id!r} could not be fetched from the hub: {reason}. {how}"
    )
