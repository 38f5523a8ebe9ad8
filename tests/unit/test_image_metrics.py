"""Scores of generated images, against closed forms and sets whose scores are known."""

import dataclasses
import sys

import numpy as np
import pytest
import torch

from cmpolicy.image.datasets import ImageData, ImageSet
from cmpolicy.image.metrics import (
    ClassifierConfig,
    ClassifierFeatures,
    ContentCache,
    EfficientNetFeatures,
    ImageScorer,
    check_test_part,
    real_classifier,
)
from cmpolicy.image.metrics.cache import content_key
from cmpolicy.image.metrics.diversity import (
    diversity,
    mean_pairwise_distance,
    median_nearest,
    nearest_neighbours,
    spread_by_class,
)
from cmpolicy.image.metrics.features import MissingExtractorError
from cmpolicy.image.metrics.fidelity import WEIGHTS_FILE, FidelityError, inception_weights
from cmpolicy.image.metrics.frechet import FeatureStatistics, frechet_distance
from cmpolicy.image.metrics.manifold import precision_recall
from cmpolicy.image.metrics.subset import some

QUICK = ClassifierConfig(width=4, samples=1200, batch_size=40, lr=1e-2)


def bars(n, seed, classes=2):
    """n noisy images (n, 8, 8, 1) of a bar: class 0 lies, class 1 stands."""
    rng = np.random.default_rng(seed)
    labels = np.arange(n) % classes
    images = rng.integers(0, 60, (n, 8, 8, 1))
    for image, label, place in zip(images, labels, rng.integers(1, 6, n), strict=True):
        bar = image if label == 0 else image.transpose(1, 0, 2)
        bar[place : place + 2] += 150
    return ImageSet(images.astype(np.uint8), labels)


DATA = ImageData("bars", bars(120, 0), bars(60, 1), ("lying", "standing"), "bars")


@pytest.fixture(scope="module")
def classifier():
    return real_classifier(DATA, QUICK)


@pytest.fixture(scope="module")
def scorer(classifier):
    return ImageScorer(DATA, classifier, ClassifierFeatures(classifier), ContentCache(None))


def test_too_small_a_test_part_is_refused():
    small = dataclasses.replace(DATA, test=bars(3, 1))
    with pytest.raises(ValueError, match=r"has 3 images, at most 2 .*test_fraction"):
        check_test_part(small)
    names = tuple("abcdef")
    single = ImageData("bars", bars(120, 0, classes=6), bars(6, 1, classes=6), names, "bars")
    with pytest.raises(ValueError, match="has 6 images, at most 1 of a class"):
        check_test_part(single)
    check_test_part(DATA)


def test_data_of_copies_is_refused(classifier):
    def score(data):
        scorer = ImageScorer(data, classifier, ClassifierFeatures(classifier), ContentCache(None))
        return scorer.score_real(60)

    with pytest.raises(ValueError, match="half of the test images are among the training images"):
        score(dataclasses.replace(DATA, test=DATA.train))
    first = {k: DATA.train.images[DATA.train.labels == k][0] for k in (0, 1)}
    alike = np.stack([first[k] for k in DATA.train.labels])
    with pytest.raises(ValueError, match="all training images of class 'lying' are alike"):
        score(dataclasses.replace(DATA, train=ImageSet(alike, DATA.train.labels)))


# -- feature distance ------------------------------------------------------------------------------


def test_frechet_distance_of_commuting_gaussians():
    a = FeatureStatistics(np.zeros(3), np.diag([1.0, 4.0, 9.0]), 10)
    b = FeatureStatistics(np.array([1.0, 2.0, 2.0]), np.diag([4.0, 4.0, 1.0]), 10)
    # |m1 - m2|^2 + sum (sqrt(s1) - sqrt(s2))^2
    assert frechet_distance(a, b) == pytest.approx(9 + 1 + 0 + 4)
    assert frechet_distance(b, a) == pytest.approx(14)
    assert frechet_distance(a, a) == pytest.approx(0, abs=1e-12)


def test_frechet_distance_of_gaussians_that_do_not_commute():
    rng = np.random.default_rng(0)
    a, b = (m @ m.T for m in rng.normal(size=(2, 4, 4)))
    zero = np.zeros(4)
    values = np.linalg.eigvals(a @ b)  # the general form: tr (S1 S2)^1/2
    expected = np.trace(a + b) - 2 * np.sqrt(values).sum().real
    found = frechet_distance(FeatureStatistics(zero, a, 9), FeatureStatistics(zero, b, 9))
    assert found == pytest.approx(expected)


def test_frechet_distance_with_fewer_features_than_dimensions():
    x = np.random.default_rng(0).normal(size=(5, 20))
    statistics = FeatureStatistics.of(x)
    assert statistics.n == 5
    assert frechet_distance(statistics, statistics) == pytest.approx(0, abs=1e-6)
    shifted = FeatureStatistics.of(x + 2.0)
    assert frechet_distance(statistics, shifted) == pytest.approx(80, rel=1e-6)


@pytest.mark.parametrize(
    ("features", "message"),
    [(np.zeros((1, 3)), "at least 2 features"), (np.full((3, 3), np.nan), "not finite")],
)
def test_statistics_that_cannot_be_had(features, message):
    with pytest.raises(ValueError, match=message):
        FeatureStatistics.of(features)


def test_features_of_different_sizes():
    a, b = (FeatureStatistics.of(np.eye(d)) for d in (3, 4))
    with pytest.raises(ValueError, match="features of 3 and 4 numbers"):
        frechet_distance(a, b)


# -- precision and recall --------------------------------------------------------------------------


def test_precision_and_recall_of_known_sets():
    rng = np.random.default_rng(0)
    left, right = rng.normal(size=(2, 60, 5)) + np.array([0, 100])[:, None, None]
    both = np.concatenate([left, right])
    same = precision_recall(both, both)
    assert (same.precision, same.recall) == (1.0, 1.0)
    half = precision_recall(both, left)  # realistic, but one mode is missing
    assert (half.precision, half.recall) == (1.0, 0.5)
    wild = precision_recall(left, both)  # everything covered, half of it unreal
    assert (wild.precision, wild.recall) == (0.5, 1.0)
    other = precision_recall(left, right)
    assert (other.precision, other.recall) == (0.0, 0.0)


def test_the_radius_is_the_distance_to_the_third_neighbour():
    real = np.array([[0.0], [1.0], [2.0], [4.0]])
    # radii of the real points: 4, 3, 2, 4
    inside, outside = np.full((4, 1), 7.9), np.full((4, 1), 8.1)
    assert precision_recall(real, inside).precision == 1.0
    assert precision_recall(real, outside).precision == 0.0


@pytest.mark.parametrize(
    ("real", "generated", "message"),
    [
        (np.zeros((3, 2)), np.zeros((9, 2)), r"more than k=3 real features \(N, D\), got \(3, 2\)"),
        (np.zeros((9, 2)), np.zeros((3, 2)), "more than k=3 generated features"),
        (np.zeros((9, 2)), np.zeros((9, 3)), "differ in size: 2 and 3"),
    ],
)
def test_precision_and_recall_that_cannot_be_had(real, generated, message):
    with pytest.raises(ValueError, match=message):
        precision_recall(real, generated)


# -- variety and copies ----------------------------------------------------------------------------


def test_mean_pairwise_distance():
    images = np.zeros((3, 2, 2, 1), np.uint8)
    images[1, 0, 0], images[2] = 255, 255  # distances 1, 2 and sqrt(3)
    expected = (1 + 2 + np.sqrt(3)) / 3
    assert mean_pairwise_distance(images) == pytest.approx(expected, abs=1e-6)


def test_a_collapsed_class_shows_in_the_variety():
    real, generated = bars(120, 0), bars(60, 2)
    reference = spread_by_class(real.images, real.labels)
    whole = diversity(reference, spread_by_class(generated.images, generated.labels))
    assert whole.ratio == pytest.approx(1.0, abs=0.05)
    images = generated.images.copy()
    images[generated.labels == 1] = images[1]
    collapsed = diversity(reference, spread_by_class(images, generated.labels))
    assert collapsed.lowest == pytest.approx(0, abs=1e-4)
    assert collapsed.lowest_class == 1
    assert collapsed.ratio == pytest.approx(0.5, abs=0.05)


def test_variety_leaves_out_classes_of_one_image():
    data = bars(3, 0)
    spread = spread_by_class(data.images, data.labels)
    assert set(spread) == {0}  # there is one of class 1
    assert diversity(spread, spread).ratio == 1
    with pytest.raises(ValueError, match="needs 2 real and 2 generated images of some class"):
        diversity(spread, {1: 0.5})


def test_large_classes_are_sampled():
    data = bars(3000, 0, classes=1)
    spread = spread_by_class(data.images, data.labels)[0]
    assert spread == pytest.approx(mean_pairwise_distance(data.images), rel=0.02)
    rows = some(np.arange(3000), 1000)
    assert spread == mean_pairwise_distance(data.images[rows])
    assert len(set(rows.tolist())) == 1000
    assert (np.diff(rows) > 0).all()


def test_copies_are_found():
    train, made = bars(120, 0).images, bars(60, 2).images
    assert median_nearest(train[:50], train) == pytest.approx(0, abs=1e-6)
    assert median_nearest(made, train) > 0.5
    nearest = nearest_neighbours(train[5:9], train, k=2)
    assert nearest.rows[:, 0].tolist() == [5, 6, 7, 8]
    assert (nearest.distances[:, 1] > nearest.distances[:, 0]).all()
    others = np.delete(train, 5, axis=0).reshape(119, -1) / 255.0
    expected = np.linalg.norm(others - train[5].ravel() / 255.0, axis=1).min()
    assert nearest.distances[0, 1] == pytest.approx(expected)
    with pytest.raises(ValueError, match="k=121 neighbours among 120"):
        nearest_neighbours(made, train, k=121)


# -- classifier ------------------------------------------------------------------------------------


def test_the_classifier_learns_and_says_how_well(classifier):
    predicted = classifier.predict(DATA.test.images)
    assert classifier.accuracy == (predicted == DATA.test.labels).mean()
    assert classifier.accuracy > 0.95
    assert classifier.n_test == 60
    assert classifier.features(DATA.test.images).shape == (60, 16)


def test_the_classifier_is_cached_by_content(tmp_path, classifier):
    cache = ContentCache(tmp_path / "cache")
    calls = []

    def train(data=DATA, config=QUICK):
        calls.clear()
        return real_classifier(
            data, config, cache=cache, progress=lambda done, total: calls.append(done)
        )

    trained = train()
    assert calls[-1] == 1200
    again = train()
    assert not calls
    assert again.accuracy == trained.accuracy == classifier.accuracy
    images = DATA.test.images
    assert (again.features(images) == trained.features(images)).all()
    changed = ImageSet(DATA.train.images, DATA.train.labels[::-1].copy())
    train(ImageData("bars", changed, DATA.test, DATA.class_names, "bars"))
    assert calls  # other content, another classifier
    train(config=ClassifierConfig(width=4, samples=400, batch_size=40))
    assert calls
    file = next((tmp_path / "cache").glob(f"classifier-{trained.key[:32]}*"))
    file.write_bytes(file.read_bytes()[:100])
    assert train().accuracy == trained.accuracy  # a broken file is made anew
    assert calls


def test_training_leaves_the_global_random_state_alone():
    torch.manual_seed(5)
    state = torch.get_rng_state()
    real_classifier(DATA, ClassifierConfig(width=2, samples=40, batch_size=40))
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"width": 0}, "width and batch_size of at least 1, got width=0"),
        ({"lr": 0.0}, "lr above 0"),
        ({"shift": 0.5}, "shift in"),
        ({"samples": 3}, "samples=3 is less than one batch"),
    ],
)
def test_classifiers_that_cannot_be(settings, message):
    with pytest.raises(ValueError, match=message):
        ClassifierConfig(**settings)


# -- all together ----------------------------------------------------------------------------------


def test_scores_of_good_and_bad_images(scorer):
    good = bars(60, 2)
    scores = scorer.score(good.images, good.labels)
    assert scores.n == 60
    assert scores.n_reference == 120
    assert scores.recognised > 57
    assert set(scores.recognised_by_class) == {"lying", "standing"}
    assert scores.precision > 0.7
    assert scores.recall > 0.7
    assert scores.copy_ratio == pytest.approx(1, abs=0.15)
    wrong = scorer.score(good.images, 1 - good.labels)
    assert wrong.recognised == 60 - scores.recognised
    noise = np.random.default_rng(0).integers(0, 256, good.images.shape, np.uint8)
    bad = scorer.score(noise, good.labels)
    assert bad.feature_distance > 10 * scores.feature_distance
    assert bad.precision < 0.3
    copies = scorer.score(DATA.train.images[:60], DATA.train.labels[:60])
    assert copies.copy_ratio < 1e-4


def test_real_images_are_the_mark(scorer):
    mark = scorer.score_real(1000)
    assert mark.n == 60
    assert mark.copy_ratio == 1
    assert scorer.score_real(20).n == 20


def test_classes_that_were_not_made_do_not_count(scorer):
    lying = DATA.test.images[DATA.test.labels == 0]
    scores = scorer.score(lying, np.zeros(len(lying), np.int64))
    assert scores.n_reference == 60
    assert scores.recall > 0.7


def test_images_that_cannot_be_scored(scorer):
    with pytest.raises(ValueError, match=r"generated images are \(4, 4, 1\).*\(8, 8, 1\)"):
        scorer.score(np.zeros((9, 4, 4, 1), np.uint8), np.zeros(9, np.int64))
    with pytest.raises(ValueError, match="3 images are too few"):
        scorer.score(np.zeros((3, 8, 8, 1), np.uint8), np.zeros(3, np.int64))


def test_features_of_real_images_are_cached(tmp_path, classifier):
    calls = []

    class Counting:
        title, key = "counting", content_key("counting")

        def __call__(self, images):
            calls.append(len(images))
            return classifier.features(images)

    for _ in range(2):
        scorer = ImageScorer(DATA, classifier, Counting(), ContentCache(tmp_path))
        scorer.score_real(60)
    assert calls == [60, 120, 60]  # the 120 training images once


# -- networks that come from elsewhere -------------------------------------------------------------


def test_efficientnet_features():
    extractor = EfficientNetFeatures(side=32)
    images = bars(6, 0).images
    features = extractor(images)
    assert features.shape == (6, 1280)
    assert features.dtype == np.float32
    np.testing.assert_allclose(extractor(images[2:3]), features[2:3], rtol=1e-3, atol=1e-4)
    colour = extractor(images.repeat(3, axis=-1))  # grey stays grey
    np.testing.assert_allclose(colour, features, rtol=1e-3, atol=1e-4)
    assert EfficientNetFeatures(side=64).key != extractor.key


def test_missing_packages_are_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "efficientnet_lite_pytorch", None)
    with pytest.raises(MissingExtractorError, match=r"pip install 'cmpolicy\[image\]'"):
        EfficientNetFeatures()
    monkeypatch.setitem(sys.modules, "torch_fidelity", None)
    with pytest.raises(FidelityError, match=r"pip install 'cmpolicy\[image\]'"):
        inception_weights()


def test_fid_without_its_weights_is_refused(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    with pytest.raises(FidelityError, match=rf"{tmp_path}.*does not exist. Download.*fid=false"):
        inception_weights()
    other = tmp_path / WEIGHTS_FILE
    other.write_bytes(b"other weights")
    with pytest.raises(FidelityError, match=r"its SHA-256 starts with .*, not 6726825d"):
        inception_weights(other)
