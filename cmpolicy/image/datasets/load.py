"""The data set that a configuration stands for."""

from __future__ import annotations

import os
from pathlib import Path

from cmpolicy.image.datasets.data import ImageData, ImageDataConfig


def load_images(
    config: ImageDataConfig, *, download_dir: str | os.PathLike[str] | None = None
) -> ImageData:
    """Read a data set into memory.

    Args:
        config: which one, and how it is read.
        download_dir: where torchvision puts ``mnist`` and ``cifar10`` if no path is given.

    Raises:
        ImageDataError: it is missing, damaged, or not as the configuration wants it.
    """
    if config.name == "digits":
        from cmpolicy.image.datasets.digits import load_digits

        return load_digits(config)
    if config.name == "folder":
        from cmpolicy.image.datasets.folder import load_folder

        return load_folder(config)
    if config.path is not None and Path(config.path).expanduser().suffix == ".npz":
        from cmpolicy.image.datasets.npz import load_npz

        return load_npz(config)
    from cmpolicy.image.datasets.public import load_public

    return load_public(config, download_dir)
