"""Scaling of images, by Pillow: enlarging is bicubic, shrinking averages (antialias)."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
from PIL import Image


def resize_all(images: npt.NDArray[np.uint8], size: int | None) -> npt.NDArray[np.uint8]:
    """images (N, H, W, C) to (N, size, size, C); as they are where ``size`` is None or theirs."""
    if size is None or images.shape[1:3] == (size, size):
        return images
    resized = np.empty((len(images), size, size, images.shape[3]), np.uint8)
    for out, image in zip(resized, images, strict=True):
        out[:] = as_array(resize(as_image(image), size))
    return resized


def resize(image: Image.Image, size: int) -> Image.Image:
    """A square image to (size, size)."""
    return image.resize((size, size), Image.Resampling.BICUBIC)


def as_image(image: npt.NDArray[np.uint8]) -> Image.Image:
    """(H, W, C) to a picture of mode L or RGB."""
    return Image.fromarray(image[..., 0] if image.shape[-1] == 1 else image)


def as_array(image: Image.Image) -> npt.NDArray[np.uint8]:
    """A picture of mode L or RGB to (H, W, C)."""
    array = np.asarray(image, dtype=np.uint8)
    return array[..., None] if array.ndim == 2 else array
