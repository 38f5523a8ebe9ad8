"""Labelled images in memory: uint8 arrays, a train and a test part, and what they are."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field
from functools import cached_property
from typing import Literal, TypedDict

import numpy as np
import numpy.typing as npt
from torch import Tensor

DatasetName = Literal["digits", "mnist", "cifar10", "folder"]
#: Data sets that contain images whose mirror image is an image of the same class.
_FLIPPED: dict[str, bool] = {"digits": False, "mnist": False, "cifar10": True, "folder": False}
_DIGITS_SIZES = (8, 16, 32)


class ImageDataError(ValueError):
    """Image data that is missing, damaged or not what was asked for; names the file."""


class ImageBatch(TypedDict):
    """One training batch of B images.

    images: (B, C, H, W) float32 in [-1, 1]; labels: (B,) int64.
    """

    images: Tensor
    labels: Tensor


@dataclass(frozen=True, kw_only=True)
class ImageDataConfig:
    """Which images, and how they are read.

    Args:
        name: ``digits`` (scikit-learn's bundled set, offline), ``mnist``, ``cifar10``, or
            ``folder`` (one directory per class).
        path: ``folder``: the directory. ``mnist``, ``cifar10``: an ``.npz`` file (see
            :mod:`cmpolicy.image.datasets.npz`) or a folder that torchvision has downloaded to;
            null downloads through torchvision.
        image_size: side of the square images in pixels; null: 16 for ``digits``, else as stored.
        mode: ``folder``: ``L`` (grey) or ``RGB``; null: the mode that all its images have.
        mixed: ``folder``: images of several sizes or modes, or not square, are an error
            (``refuse``) or are all scaled, cropped at the centre and turned into ``mode``
            (``convert``).
        broken: an image that cannot be read is an error (``refuse``) or is left out (``skip``).
        test_fraction: ``folder``: share of each class held out; the others come with a test part.
        flip: mirror half of the training images left to right; null: where it makes sense
            (``cifar10``).
    """

    name: DatasetName = "digits"
    path: str | None = None
    image_size: int | None = None
    mode: Literal["L", "RGB"] | None = None
    mixed: Literal["refuse", "convert"] = "refuse"
    broken: Literal["refuse", "skip"] = "refuse"
    test_fraction: float = 0.1
    flip: bool | None = None

    def __post_init__(self) -> None:
        if self.name not in _FLIPPED:
            raise ImageDataError(f"name={self.name!r} is not one of {', '.join(_FLIPPED)}")
        if self.image_size is not None and self.image_size < 4:
            raise ImageDataError(f"image_size={self.image_size} must be at least 4 pixels")
        if self.flip and self.name in ("digits", "mnist"):
            raise ImageDataError(
                f"flip=true makes no sense for {self.name}: most mirrored digits are no digits; "
                "leave it out"
            )
        if self.name == "digits":
            self._check_digits()
        if self.name == "folder":
            self._check_folder()
        else:
            for key in ("mode", "mixed", "test_fraction"):
                default = ImageDataConfig.__dataclass_fields__[key].default
                if getattr(self, key) != default:
                    raise ImageDataError(
                        f"{key}={getattr(self, key)} is for folders of images; {self.name} comes "
                        f"as it is, so leave {key} out"
                    )

    def _check_digits(self) -> None:
        if self.path is not None:
            raise ImageDataError(
                f"path={self.path}: digits come with scikit-learn and have no path; leave it out, "
                "or choose mnist, cifar10 or folder"
            )
        if self.image_size is not None and self.image_size not in _DIGITS_SIZES:
            raise ImageDataError(
                f"image_size={self.image_size}: digits are 8x8 and are enlarged to 16 or 32 "
                f"(one of {list(_DIGITS_SIZES)})"
            )

    def _check_folder(self) -> None:
        if self.path is None:
            raise ImageDataError("folder needs path=<directory with one directory per class>")
        if not 0 < self.test_fraction < 1:
            raise ImageDataError(
                f"test_fraction={self.test_fraction} must be between 0 and 1: results need images "
                "that were not trained on"
            )
        if self.mixed == "convert" and (self.image_size is None or self.mode is None):
            raise ImageDataError(
                "mixed=convert needs the size and the mode to convert to: image_size=32 mode=RGB, "
                f"say (got image_size={self.image_size}, mode={self.mode})"
            )

    @property
    def flips(self) -> bool:
        """Whether training images are mirrored, null resolved."""
        return _FLIPPED[self.name] if self.flip is None else self.flip


@dataclass(frozen=True, eq=False)
class ImageSet:
    """images (N, H, W, C) uint8, C 1 or 3, H = W; labels (N,) int64."""

    images: npt.NDArray[np.uint8]
    labels: npt.NDArray[np.int64]

    def __post_init__(self) -> None:
        shape = self.images.shape
        if self.images.dtype != np.uint8 or len(shape) != 4 or shape[3] not in (1, 3):
            raise ImageDataError(
                "images must be uint8 of shape (N, H, W, 1) or (N, H, W, 3), got "
                f"{self.images.dtype} {shape}"
            )
        if shape[1] != shape[2]:
            raise ImageDataError(f"images must be square, got {shape[1]}x{shape[2]}")
        if self.labels.shape != shape[:1] or self.labels.dtype != np.int64:
            raise ImageDataError(
                f"{shape[0]} images need as many int64 labels, got {self.labels.dtype} "
                f"{self.labels.shape}"
            )

    def __len__(self) -> int:
        return len(self.images)

    @cached_property
    def sha256(self) -> str:
        """Hash of the content (shape, pixels, labels)."""
        digest = hashlib.sha256(repr(self.images.shape).encode())
        digest.update(np.ascontiguousarray(self.images).data)
        digest.update(np.ascontiguousarray(self.labels).data)
        return digest.hexdigest()


@dataclass(frozen=True, eq=False)
class ImageData:
    """A labelled image data set.

    Attributes:
        name: of the data set. class_names: label k is ``class_names[k]``.
        train, test: disjoint parts; each has every class.
        source: where it is from, for people.
        flip: mirror training images at random.
        skipped: files left out because they could not be read, where that was asked for.
    """

    name: str
    train: ImageSet
    test: ImageSet
    class_names: tuple[str, ...]
    source: str
    flip: bool = False
    skipped: tuple[str, ...] = field(default=())

    def __post_init__(self) -> None:
        if self.train.images.shape[1:] != self.test.images.shape[1:]:
            raise ImageDataError(
                f"{self.source}: training images are {self.train.images.shape[1:]}, test images "
                f"{self.test.images.shape[1:]} (height, width, channels)"
            )
        for part, images in (("train", self.train), ("test", self.test)):
            self._check_labels(part, images.labels)

    def _check_labels(self, part: str, labels: npt.NDArray[np.int64]) -> None:
        n = self.n_classes
        outside = np.flatnonzero((labels < 0) | (labels >= n))
        if len(outside):
            first = int(outside[0])
            raise ImageDataError(
                f"{self.source}: {len(outside)} {part} labels are outside 0..{n - 1}; the first is "
                f"{int(labels[first])}, of image {first}"
            )
        empty = np.flatnonzero(np.bincount(labels, minlength=n) == 0)
        if len(empty):
            names = ", ".join(f"{int(k)} ({self.class_names[int(k)]})" for k in empty[:5])
            raise ImageDataError(
                f"{self.source}: the {part} part has no image of {len(empty)} of {n} classes: "
                f"{names}; add images, or remove these classes"
            )

    @property
    def n_classes(self) -> int:
        return len(self.class_names)

    @property
    def image_size(self) -> int:
        """Side of the square images, px."""
        return int(self.train.images.shape[1])

    @property
    def channels(self) -> int:
        """1 (grey) or 3 (RGB)."""
        return int(self.train.images.shape[3])


def skipped_text(data: ImageData) -> str:
    """How many files were left out, and the first of them."""
    rest = ", ..." if len(data.skipped) > 3 else ""
    return f"left out {len(data.skipped)} broken files: {', '.join(data.skipped[:3])}{rest}"
