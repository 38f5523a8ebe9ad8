"""Images with classes: scikit-learn's digits, MNIST, CIFAR-10, or a folder of one's own."""

from cmpolicy.image.datasets.data import (
    DatasetName,
    ImageBatch,
    ImageData,
    ImageDataConfig,
    ImageDataError,
    ImageSet,
    skipped_text,
)
from cmpolicy.image.datasets.load import load_images

__all__ = [
    "DatasetName",
    "ImageBatch",
    "ImageData",
    "ImageDataConfig",
    "ImageDataError",
    "ImageSet",
    "load_images",
    "skipped_text",
]
