"""The Hugging Face hub: fetch the files of a bundle, upload a folder."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path


class BundleError(ValueError):
    """A policy bundle that cannot be loaded, written, fetched or uploaded."""


def download(repo_id: str, files: Sequence[str]) -> Path:
    """Fetch these files of ``owner/name`` into the hub's cache, or find them there.

    Raises:
        BundleError: there is no such repository, or no network.
    """
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(repo_id, allow_patterns=list(files)))
    except (OSError, ValueError) as error:  # all of the hub's: not found, offline, no such id
        raise BundleError(
            f"no policy bundle at {Path(repo_id).absolute()}, and {repo_id!r} could not be fetched "
            f"from the hub: {error}"
        ) from error


def upload(directory: Path, repo_id: str, *, private: bool) -> str:
    """Upload a bundle's folder as ``owner/name``; its address.

    Raises:
        BundleError: not logged in, not allowed, or no network.
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
        raise BundleError(
            f"could not push the policy to {repo_id!r}: {error}; log in with `hf auth login` "
            "or set HF_TOKEN to a token that may write there"
        ) from error
    return str(address)
