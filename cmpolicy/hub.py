"""The Hugging Face hub: fetch files of a repository, upload a folder."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any


class HubError(ValueError):
    """What could not be fetched from the hub, or put there, and why."""


_TIMEOUT = 10.0
"""Seconds that the hub, or a proxy before it, may take to answer a request."""


def download(repo_id: str, files: Sequence[str]) -> Path:
    """Fetch files (names or patterns) of ``owner/name`` into the hub's cache, or find them there.

    All are of one commit. A server that says nothing ends this within a minute.

    Raises:
        HubError: there is no such repository, or no network and nothing in the cache.
    """
    from huggingface_hub import HfApi, snapshot_download

    wanted: dict[str, Any] = {"allow_patterns": list(files)}
    try:
        # asked first, since snapshot_download's own question has no time limit
        HfApi().repo_info(repo_id, timeout=_TIMEOUT)
    except Exception as error:  # the hub's own and the HTTP library's errors share no other base
        try:
            return Path(snapshot_download(repo_id, local_files_only=True, **wanted))
        except (OSError, ValueError):
            raise _not_fetched(repo_id, error) from error
    try:
        # by the branch's name, under which it is looked for where there is no network
        return Path(snapshot_download(repo_id, etag_timeout=_TIMEOUT, **wanted))
    except (OSError, ValueError) as error:
        raise _not_fetched(repo_id, error) from error


def _not_fetched(repo_id: str, error: Exception) -> HubError:
    return HubError(f"{repo_id!r} could not be fetched from the hub: {error}")


def upload(directory: Path, repo_id: str, *, private: bool) -> str:
    """Upload a folder as ``owner/name``; its address.

    Raises:
        HubError: not logged in, not allowed, or no network.
    """
    from huggingface_hub import HfApi

    api = HfApi()
    try:
        address = api.create_repo(repo_id, private=private, exist_ok=True)
        api.upload_folder(
            repo_id=repo_id, folder_path=directory, commit_message="Upload cmpolicy policy"
        )
    # the hub's own errors and those of the HTTP library of the day share no other base
    except Exception as error:
        raise HubError(
            f"could not push the policy to {repo_id!r}: {error}; log in with `hf auth login` "
            "or set HF_TOKEN to a token that may write there"
        ) from error
    return str(address)
