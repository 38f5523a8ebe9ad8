"""MNIST and CIFAR-10 from one ``.npz`` file, in either of two layouts.

Pixels: ``x_train`` and ``x_test`` (N, H, W) or (N, H, W, 3) uint8, ``y_train`` and ``y_test`` (N,).
JPEG: ``jpeg_train`` (bytes, uint8) with ``offset_train`` (N + 1,): image i is
``jpeg_train[offset_train[i]:offset_train[i + 1]]``; the same with ``_test``; ``y_*`` as above.
"""

from __future__ import annotations

import io
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

from cmpolicy.image.datasets.data import ImageData, ImageDataConfig, ImageDataError, ImageSet
from cmpolicy.image.datasets.public import CLASS_NAMES, SHAPES
from cmpolicy.image.datasets.resize import as_array, resize_all

Arrays = Mapping[str, npt.NDArray[Any]]


def load_npz(config: ImageDataConfig) -> ImageData:
    """Read ``config.path``.

    Raises:
        ImageDataError: no such file, damaged, or arrays of another layout; names file and array.
    """
    path = Path(str(config.path)).expanduser()
    arrays = _read(path)
    skipped: list[str] = []
    parts = {}
    for part in ("train", "test"):
        if f"x_{part}" in arrays:
            images, labels = _pixels(arrays, part, path), _labels(arrays, part, path)
        else:
            images, labels = _jpegs(arrays, part, path, config, skipped)
        if len(images) != len(labels):
            raise ImageDataError(
                f"{path}: {len(images)} {part} images but {len(labels)} labels in 'y_{part}'"
            )
        if images.shape[1:] != SHAPES[config.name]:
            raise ImageDataError(
                f"{path}: {part} images are {images.shape[1:]} (height, width, channels), but "
                f"{config.name} has {SHAPES[config.name]}; is it another data set?"
            )
        parts[part] = ImageSet(resize_all(images, config.image_size), labels)
    return ImageData(
        name=config.name,
        train=parts["train"],
        test=parts["test"],
        class_names=CLASS_NAMES[config.name],
        source=f"{config.name} from {path.name}",
        flip=config.flips,
        skipped=tuple(skipped),
    )


def _read(path: Path) -> Arrays:
    if not path.is_file():
        raise ImageDataError(f"there is no file {path}; check path")
    try:
        with np.load(path, allow_pickle=False) as stored:
            return {name: stored[name] for name in stored.files}
    except (OSError, ValueError, EOFError, zipfile.BadZipFile) as error:
        raise ImageDataError(
            f"{path} cannot be read as .npz ({error}); it may be truncated: copy it again"
        ) from error


def _get(arrays: Arrays, name: str, path: Path) -> npt.NDArray[Any]:
    if name not in arrays:
        raise ImageDataError(
            f"{path} has no array {name!r}; expected x_train, y_train, x_test, y_test, or jpeg_*, "
            f"offset_* and y_*. It has: {', '.join(sorted(arrays)) or 'nothing'}"
        )
    return arrays[name]


def _pixels(arrays: Arrays, part: str, path: Path) -> npt.NDArray[np.uint8]:
    images = _get(arrays, f"x_{part}", path)
    if images.dtype != np.uint8 or images.ndim not in (3, 4):
        raise ImageDataError(
            f"{path}: 'x_{part}' is {images.dtype} {images.shape}; expected uint8 (N, H, W) or "
            "(N, H, W, 3)"
        )
    return images[..., None] if images.ndim == 3 else images


def _labels(arrays: Arrays, part: str, path: Path) -> npt.NDArray[np.int64]:
    labels = _get(arrays, f"y_{part}", path)
    if labels.ndim != 1 or labels.dtype.kind not in "iu":
        raise ImageDataError(
            f"{path}: 'y_{part}' is {labels.dtype} {labels.shape}; expected whole numbers (N,)"
        )
    return labels.astype(np.int64)


def _jpegs(
    arrays: Arrays, part: str, path: Path, config: ImageDataConfig, skipped: list[str]
) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.int64]]:
    data = _get(arrays, f"jpeg_{part}", path)
    offsets = _get(arrays, f"offset_{part}", path)
    labels = _labels(arrays, part, path)
    ends_fit = offsets.ndim == 1 and len(offsets) >= 2 and offsets.dtype.kind in "iu"
    if data.dtype != np.uint8 or data.ndim != 1 or not ends_fit:
        raise ImageDataError(
            f"{path}: expected bytes 'jpeg_{part}' (uint8) and their 'offset_{part}' (N + 1,), got "
            f"{data.dtype} {data.shape} and {offsets.dtype} {offsets.shape}"
        )
    offsets = offsets.astype(np.int64)
    if offsets[0] != 0 or offsets[-1] != len(data) or (np.diff(offsets) < 0).any():
        raise ImageDataError(
            f"{path}: 'offset_{part}' must rise from 0 to the {len(data)} bytes of 'jpeg_{part}'"
        )
    if len(labels) != len(offsets) - 1:
        raise ImageDataError(
            f"{path}: {len(offsets) - 1} {part} images but {len(labels)} labels in 'y_{part}'"
        )
    shape = SHAPES[config.name]
    mode = "L" if shape[2] == 1 else "RGB"
    images = np.empty((len(labels), *shape), np.uint8)
    kept = np.ones(len(labels), np.bool_)
    for i in range(len(labels)):
        try:
            picture = Image.open(io.BytesIO(data[offsets[i] : offsets[i + 1]].tobytes()))
            picture.load()
        except (OSError, ValueError, SyntaxError) as error:
            where = f"{path.name}: {part} image {i}"
            if config.broken == "refuse":
                raise ImageDataError(
                    f"{path}: {part} image {i} cannot be read ({error}); copy the file again, or "
                    "leave such images out with broken=skip"
                ) from error
            kept[i] = False
            skipped.append(where)
            continue
        if picture.mode != mode or picture.size != shape[:2]:
            raise ImageDataError(
                f"{path}: {part} image {i} is {picture.size[0]}x{picture.size[1]} {picture.mode}, "
                f"but {config.name} is {shape[0]}x{shape[1]} {mode}"
            )
        images[i] = as_array(picture)
    return images[kept], labels[kept]
