"""How good generated images are: recognised, close to the real ones, varied, and not copied.

None of the names is borrowed: ``feature_distance`` is not FID; FID is what :mod:`.fidelity` gives.
"""

from cmpolicy.image.metrics.cache import ContentCache
from cmpolicy.image.metrics.classifier import ClassifierConfig, ImageClassifier, real_classifier
from cmpolicy.image.metrics.features import ClassifierFeatures, EfficientNetFeatures
from cmpolicy.image.metrics.scores import ImageScorer, ImageScores, check_test_part

__all__ = [
    "ClassifierConfig",
    "ClassifierFeatures",
    "ContentCache",
    "EfficientNetFeatures",
    "ImageClassifier",
    "ImageScorer",
    "ImageScores",
    "check_test_part",
    "real_classifier",
]
