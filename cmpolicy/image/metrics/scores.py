"""All scores of a set of generated images, and the same of real images as the mark to compare with.

The mark: the test part, scored as if it had been generated. No generator is expected to do better;
a distance of 0 is not to be had from a finite set.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt

from cmpolicy.image.datasets.data import ImageData, ImageSet
from cmpolicy.image.metrics.cache import ContentCache
from cmpolicy.image.metrics.classifier import ImageClassifier
from cmpolicy.image.metrics.diversity import diversity, median_nearest, spread_by_class
from cmpolicy.image.metrics.features import FeatureExtractor, real_features
from cmpolicy.image.metrics.frechet import FeatureStatistics, frechet_distance
from cmpolicy.image.metrics.manifold import NEIGHBOURS, precision_recall
from cmpolicy.image.metrics.subset import some

_REFERENCE_SIZE = 10_000  # training images whose features are compared, at most; drawn once
_SAME = 1e-6  # one level of one number is 4e-3 away
_HELD_OUT = 2000  # test images whose nearest training image is looked for


@dataclass(frozen=True)
class ImageScores:
    """Of n generated images.

    Attributes:
        recognised: images that the classifier takes for the class they were made as.
        recognised_by_class: the same of each generated class, by its name.
        feature_distance: squared Frechet distance of the features to those of n_reference training
            images. Not FID.
        precision, recall: in these features, of as many training images as generated ones.
        diversity: mean pixel distance within a class over the training images'; diversity_lowest is
            that of the class ``diversity_lowest_class``.
        copy_ratio: median pixel distance to the nearest training image over that of test images.
    """

    n: int
    n_reference: int
    recognised: int
    recognised_by_class: Mapping[str, float]
    feature_distance: float
    precision: float
    recall: float
    diversity: float
    diversity_lowest: float
    diversity_lowest_class: str
    copy_ratio: float


def check_test_part(data: ImageData) -> None:
    """Whether the images that were held out are enough to score samples against.

    Raises:
        ValueError: too few.
    """
    n, largest = len(data.test), int(np.bincount(data.test.labels, minlength=1).max())
    if n <= NEIGHBOURS or largest < 2:
        raise ValueError(
            f"the data's test part has {n} images, at most {largest} of a class, and scores need "
            f"more than {NEIGHBOURS}, 2 of some class; give more images, or hold out more of a "
            "folder (dataset.test_fraction) and train on the others"
        )


class ImageScorer:
    """Scores images against a data set.

    Args:
        data: the real images; train is what is compared with.
        classifier: trained on ``data.train``.
        extractor: of the features.
        cache: of the real images' features.
    """

    def __init__(
        self,
        data: ImageData,
        classifier: ImageClassifier,
        extractor: FeatureExtractor,
        cache: ContentCache,
    ) -> None:
        self.data, self.classifier, self.extractor = data, classifier, extractor
        self._cache = cache

    def score(self, images: npt.NDArray[np.uint8], labels: npt.NDArray[np.int64]) -> ImageScores:
        """images (N, H, W, C) made as classes labels (N,).

        Raises:
            ValueError: too few images (more than 3, and 2 of each class), or of another shape.
        """
        generated = ImageSet(images, labels)
        train, names = self.data.train, self.data.class_names
        if images.shape[1:] != train.images.shape[1:]:
            raise ValueError(
                f"generated images are {images.shape[1:]} (height, width, channels), the data's "
                f"{train.images.shape[1:]}: is this the data that the model was trained on?"
            )
        if len(generated) <= NEIGHBOURS:
            raise ValueError(
                f"{len(generated)} images are too few to score; make more than {NEIGHBOURS}"
            )
        right = self.classifier.predict(images) == labels
        features = self.extractor(images)
        reference = real_features(self._reference(labels), self.extractor, self._cache)
        distance = frechet_distance(FeatureStatistics.of(features), FeatureStatistics.of(reference))
        # of sets of one size, since both shares depend on the sizes
        m = min(len(reference), len(features))
        shares = precision_recall(some(reference, m), some(features, m))
        variety = diversity(self._real_spread, spread_by_class(images, labels))
        return ImageScores(
            n=len(images),
            n_reference=len(reference),
            recognised=int(right.sum()),
            recognised_by_class={
                names[int(label)]: float(right[labels == label].mean())
                for label in np.unique(labels)
            },
            feature_distance=distance,
            precision=shares.precision,
            recall=shares.recall,
            diversity=variety.ratio,
            diversity_lowest=variety.lowest,
            diversity_lowest_class=names[variety.lowest_class],
            copy_ratio=median_nearest(images, train.images) / self._held_out_nearest,
        )

    @cached_property
    def _real_spread(self) -> dict[int, float]:
        spread = spread_by_class(self.data.train.images, self.data.train.labels)
        for label, distance in spread.items():
            if distance < _SAME:
                raise ValueError(
                    f"all training images of class {self.data.class_names[label]!r} are alike, so "
                    "the variety of samples has nothing to be compared with; take out the copies"
                )
        return spread

    @cached_property
    def _held_out_nearest(self) -> float:
        test = self.data.test.images
        held_out = test[some(np.arange(len(test)), _HELD_OUT)]
        distance = median_nearest(held_out, self.data.train.images)
        if distance < _SAME:
            raise ValueError(
                "at least half of the test images are among the training images, too, so copies "
                "cannot be told from new images; take out what is there twice"
            )
        return distance

    def _reference(self, labels: npt.NDArray[np.int64]) -> ImageSet:
        """Training images of the classes that were made: the others would count as not covered."""
        train = self.data.train
        rows = some(np.flatnonzero(np.isin(train.labels, labels)), _REFERENCE_SIZE)
        return ImageSet(train.images[rows], train.labels[rows])

    def score_real(self, n: int) -> ImageScores:
        """The test part, at most n images of it, scored the same way."""
        test = self.data.test
        rows = some(np.arange(len(test)), n)
        return self.score(test.images[rows], test.labels[rows])
