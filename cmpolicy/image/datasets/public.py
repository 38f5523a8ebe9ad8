"""MNIST and CIFAR-10 through torchvision, which downloads and checks them."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np

from cmpolicy.image.datasets.data import ImageData, ImageDataConfig, ImageDataError, ImageSet
from cmpolicy.image.datasets.resize import resize_all

CLASS_NAMES: dict[str, tuple[str, ...]] = {
    "mnist": tuple(str(digit) for digit in range(10)),
    "cifar10": (
        "airplane",
        "automobile",
        "bird",
        "cat",
        "deer",
        "dog",
        "frog",
        "horse",
        "ship",
        "truck",
    ),
}
SHAPES: dict[str, tuple[int, int, int]] = {"mnist": (28, 28, 1), "cifar10": (32, 32, 3)}
"""Height, width, channels."""


def load_public(
    config: ImageDataConfig, download_dir: str | os.PathLike[str] | None = None
) -> ImageData:
    """Read what torchvision downloaded to ``config.path``, or download to ``download_dir``.

    Raises:
        ImageDataError: torchvision is missing, nothing is there, or the download fails.
    """
    try:
        from torchvision import datasets
    except ImportError as error:
        raise ImageDataError(
            f"{config.name} without an .npz file is read through torchvision, which cannot be "
            f"imported ({error}); install it with: pip install 'cmpolicy[image]', or give "
            "path=<file>.npz"
        ) from error
    reader: Any = datasets.MNIST if config.name == "mnist" else datasets.CIFAR10
    folder = Path(config.path or download_dir or "").expanduser()
    if config.path is None and download_dir is None:
        raise ImageDataError(f"{config.name} needs a path, or a folder to download to")
    if config.path is not None and not folder.is_dir():
        raise ImageDataError(
            f"there is no folder {folder}; path must be an .npz file or a folder that torchvision "
            f"downloaded {config.name} to"
        )
    parts = {}
    for part in ("train", "test"):
        try:
            stored = reader(folder, train=part == "train", download=config.path is None)
        except (RuntimeError, OSError) as error:  # URLError is an OSError
            reason = (str(error).splitlines() or [""])[0]
            what = "is not in" if config.path is not None else "could not be downloaded to"
            raise ImageDataError(
                f"{config.name} {what} {folder} ({reason}). On a machine without a network give a "
                "copy: path=<file>.npz with x_train, y_train, x_test, y_test, or choose digits"
            ) from error
        images = np.asarray(stored.data, dtype=np.uint8)
        images = images[..., None] if images.ndim == 3 else images
        labels = np.asarray(stored.targets, dtype=np.int64)
        parts[part] = ImageSet(resize_all(images, config.image_size), labels)
    return ImageData(
        name=config.name,
        train=parts["train"],
        test=parts["test"],
        class_names=CLASS_NAMES[config.name],
        source=f"{config.name} from torchvision",
        flip=config.flips,
    )
