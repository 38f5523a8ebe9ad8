"""Fetching robomimic's official files from the Hugging Face hub.

Release 1.5 of the data sets, which is for robosuite 1.5; files with low-dimensional observations,
no images. The hub's own client resumes, follows redirects and knows proxies, tokens and mirrors
(HF_ENDPOINT); a file appears whole or not at all.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from cmpolicy_data.catalog import data_dir
from cmpolicy_data.download import DownloadError
from cmpolicy_data.robomimic_file import RobomimicFile, RobomimicFileError, import_h5py

REPOSITORY = "robomimic/robomimic_datasets"
"""Data set repository on the hub (formerly amandlek/robomimic)."""

TYPES: Mapping[str, tuple[Sequence[str], str]] = {
    "ph": (("lift", "can", "square", "transport", "tool_hang"), "low_dim_v15.hdf5"),
    "mh": (("lift", "can", "square", "transport"), "low_dim_v15.hdf5"),
    "mg": (("lift", "can"), "low_dim_sparse_v15.hdf5"),
    "paired": (("can",), "low_dim_v15.hdf5"),
}
"""Type of demonstrations -> its tasks and the name of its files: proficient human, multi human,
machine generated, paired."""


def hub_path(task: str, type: str = "ph") -> str:
    """Where the file of a task is in the repository.

    Raises:
        DownloadError: no such file; lists those there are.
    """
    if type not in TYPES:
        raise DownloadError(
            f"There are no robomimic demonstrations of type {type!r}; types: {', '.join(TYPES)}."
        )
    tasks, name = TYPES[type]
    if task not in tasks:
        raise DownloadError(
            f"There are no {type} demonstrations of the task {task!r}; tasks: {', '.join(tasks)}."
        )
    return f"v1.5/{task}/{type}/{name}"


def download(
    task: str,
    type: str = "ph",
    out: str | Path | None = None,
    *,
    endpoint: str | None = None,
    revision: str = "main",
) -> Path:
    """Fetch the file of a task, unless it is there, and check that it can be read.

    Args:
        task: ``lift``, ``can``, ``square``, ``transport``, ``tool_hang``.
        type: see `TYPES`.
        out: folder; default CMPOLICY_DATA, else the cache (see ``catalog``). The file lies below it
            as in the repository: ``robomimic/v1.5/<task>/<type>/``.
        endpoint: address of a mirror of the hub. revision: commit, tag or branch.

    Raises:
        DownloadError: no such file, not to be had, or not readable.
        ImportError: h5py is not installed.
    """
    from huggingface_hub import hf_hub_download

    import_h5py()  # without it the file is of no use: better said before the download
    path = hub_path(task, type)
    folder = (Path(out).expanduser() if out is not None else data_dir()) / "robomimic"
    source = (
        f"{endpoint or 'https://huggingface.co'}/datasets/{REPOSITORY}/resolve/{revision}/{path}"
    )
    try:
        file = Path(
            hf_hub_download(
                REPOSITORY,
                path,
                repo_type="dataset",
                revision=revision,
                local_dir=folder,
                endpoint=endpoint,
            )
        )
    # The hub's client lets errors of its HTTP library through, which is another one in each of its
    # major releases.
    except Exception as error:
        reason = " ".join(str(error).split())
        raise DownloadError(
            f"{source} could not be downloaded ({reason}). Check the network, name a mirror of the "
            f"hub (endpoint=... or HF_ENDPOINT), or fetch the file by other means: "
            "`cmpolicy data convert robomimic FILE` takes it from anywhere. Without it: "
            f"cmpolicy data generate robomimic task={task}"
        ) from error
    try:
        with RobomimicFile.open(file) as opened:
            opened.low_dim_keys()
    except RobomimicFileError as error:
        raise DownloadError(
            f"{source} was downloaded, but: {error}. Delete {file} and download it again."
        ) from error
    return file
