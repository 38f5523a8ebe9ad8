"""Pictures of images: pixels where they belong, and labels that fit."""

import numpy as np
import pytest
import torch
from PIL import Image

from cmpolicy.image.datasets import ImageSet
from cmpolicy.image.metrics.diversity import nearest_neighbours
from cmpolicy.image.pictures import (
    Column,
    neighbours_picture,
    paths_picture,
    samples_picture,
    save_picture,
    table,
)


def flat(*values, size=16, channels=3):
    """Images of one colour each."""
    values = np.array(values, np.uint8).reshape(len(values), 1, 1, -1)
    return np.broadcast_to(values, (len(values), size, size, channels)).copy()


def area(picture, colour):
    """Pixels of exactly this colour."""
    return int((np.asarray(picture) == np.array(colour)).all(axis=-1).sum())


RED, GREEN, BLUE = (250, 10, 10), (10, 250, 10), (10, 10, 250)


def test_samples_are_enlarged_whole_in_rows_of_their_class():
    images = flat(RED, GREEN, RED, GREEN, GREEN)
    picture = samples_picture(images, np.array([4, 7, 4, 7, 7]), list("abcdefgh"), "title")
    assert area(picture, RED) == 2 * 48 * 48
    assert area(picture, GREEN) == 2 * 48 * 48  # as many as of the rarest class
    pixels = np.asarray(picture)
    rows = [np.flatnonzero((pixels == np.array(c)).all(-1).any(1)) for c in (RED, GREEN)]
    assert rows[0].max() < rows[1].min()


def test_grey_images_and_large_ones():
    grey = table([Column(flat(77, size=64, channels=1))], ["row"], "title")
    assert 64 * 64 <= area(grey, (77,) * 3) < 64 * 64 + 50  # some edges of letters are as grey


def test_paths_show_every_state_once():
    def constant(value):
        return torch.full((2, 1, 16, 16), value)

    trajectories = {
        2: torch.stack([constant(-0.9), constant(0.0), constant(0.5)]),
        1: torch.stack([constant(-0.9), constant(7.0)]),
    }
    picture = paths_picture(trajectories, ["a", "b"], "title")
    for grey in (13, 128, 191):  # -0.9, 0 and 0.5 once per row: the noise is shared
        found = area(picture, (grey,) * 3)
        assert 2 * 48 * 48 <= found < 2 * 48 * 48 + 100  # some edges of letters are as grey
    assert picture.width > 4 * 48


def test_nearest_training_images_stand_beside_each_image():
    training = ImageSet(flat(RED, GREEN, BLUE), np.array([0, 1, 1]))
    made = flat((240, 20, 20), (20, 20, 240))
    nearest = nearest_neighbours(made, training.images, k=1)
    picture = neighbours_picture(made, nearest, training, ["x", "y"], ["red", "other"], "title")
    assert area(picture, RED) == area(picture, BLUE) == 48 * 48
    assert area(picture, GREEN) == 0


def test_long_names_widen_the_picture():
    short, long = (table([Column(flat(RED))], [name], "t").width for name in ("a", "a" * 60))
    assert long > short + 200


@pytest.mark.parametrize(
    ("columns", "names"),
    [([], ["a"]), ([Column(flat(RED))], []), ([Column(flat(RED))], ["a", "b"])],
)
def test_tables_that_do_not_fit(columns, names):
    with pytest.raises(ValueError, match="need"):
        table(columns, names, "title")


def test_pictures_are_png(tmp_path):
    picture = table([Column(flat(RED))], ["a"], "title")
    path = save_picture(picture, tmp_path / "new" / "a.png")
    assert Image.open(path).size == picture.size
    assert [p.name for p in path.parent.iterdir()] == ["a.png"]
    with pytest.raises(ValueError, match=r"give a path ending in .png"):
        save_picture(picture, tmp_path / "a.jpg")
