"""scikit-learn's handwritten digits: 1,797 images of 8x8 in 17 grey levels, offline anywhere.

They are the test set of the UCI "Optical Recognition of Handwritten Digits" data (Alpaydin and
Kaynak 1998), a copy of which comes with scikit-learn.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
from PIL import Image

from cmpolicy.image.datasets.data import ImageData, ImageDataConfig, ImageDataError, ImageSet
from cmpolicy.image.datasets.split import stratified_test_rows

_WHITE = 16.0  # grey levels 0 .. 16
_DEFAULT_SIZE = 16
_TEST_FRACTION = 0.2


def load_digits(config: ImageDataConfig) -> ImageData:
    """The digits, enlarged (bicubic) to ``config.image_size``.

    Raises:
        ImageDataError: scikit-learn is not installed.
    """
    try:
        from sklearn import datasets
    except ImportError as error:
        raise ImageDataError(
            f"the digits come with scikit-learn, which cannot be imported ({error}); install it "
            "with: pip install 'cmpolicy[image]'"
        ) from error
    bunch = datasets.load_digits()
    size = config.image_size or _DEFAULT_SIZE
    images = np.stack([_enlarged(image, size) for image in bunch.images])[..., None]
    labels = bunch.target.astype(np.int64)
    train, test = stratified_test_rows(labels, _TEST_FRACTION)
    return ImageData(
        name="digits",
        train=ImageSet(images[train], labels[train]),
        test=ImageSet(images[test], labels[test]),
        class_names=tuple(str(digit) for digit in range(10)),
        source=f"scikit-learn's digits, 8x8 enlarged to {size}x{size}",
        flip=config.flips,
    )


def _enlarged(image: npt.NDArray[np.float64], size: int) -> npt.NDArray[np.uint8]:
    """(8, 8) in 0..16 to (size, size) in 0..255; scaled in floats, so no level is lost."""
    picture = Image.fromarray((image * (255.0 / _WHITE)).astype(np.float32))
    if picture.size != (size, size):
        picture = picture.resize((size, size), Image.Resampling.BICUBIC)
    # bicubic overshoots at edges
    return np.asarray(picture).round().clip(0, 255).astype(np.uint8)
