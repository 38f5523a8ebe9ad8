"""Bundles on the Hugging Face hub: fetch one, push one."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cmpolicy.policy.bundle import FILES, BundleError

if TYPE_CHECKING:
    from cmpolicy.policy.policy import ConsistencyPolicy


def download(repo_id: str) -> Path:
    """Fetch the bundle ``owner/name`` into the hub's cache, or find it there.

    Raises:
        BundleError: there is none, or no network.
    """
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(repo_id, allow_patterns=list(FILES)))
    except (OSError, ValueError) as error:  # all of the hub's: not found, offline, no such id
        raise BundleError(
            f"no policy bundle at {Path(repo_id).absolute()}, and {repo_id!r} could not be fetched "
            f"from the hub: {error}"
        ) from error


def push(policy: ConsistencyPolicy, repo_id: str, *, private: bool, **bundle: Any) -> str:
    """Save the policy as a bundle (``bundle``: card, metadata, dtype) and upload it; its address.

    Raises:
        BundleError: not logged in, not allowed, or no network.
    """
    from huggingface_hub import HfApi

    api = HfApi()
    with tempfile.TemporaryDirectory() as folder:
        directory = Path(folder) / repo_id.rpartition("/")[2]
        policy.save_pretrained(directory, **bundle)
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
