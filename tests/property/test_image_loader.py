"""The order and the mirroring of training images: pure functions of (seed, example counter)."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from cmpolicy.image.datasets import ImageSet
from cmpolicy.image.pixels import as_input, as_pictures, from_uint8, to_uint8
from cmpolicy.training.image_loader import ImageLoader

N = 11
# image i: its left pixels are i, its right ones 100 + i
IMAGES = np.zeros((N, 4, 4, 3), np.uint8)
IMAGES[:, :, :2] = np.arange(N)[:, None, None, None]
IMAGES[:, :, 2:] = 100 + np.arange(N)[:, None, None, None]
DATA = ImageSet(IMAGES, np.arange(N) % 3)


def make(batch_size=4, seed=3, flip=True):
    return ImageLoader(DATA, batch_size=batch_size, seed=seed, flip=flip)


def read(batch):
    """(image, mirrored, label) of each sample."""
    pixels = to_uint8(batch["images"])
    left, right = pixels[:, 0, 0, 0].tolist(), pixels[:, 0, 0, -1].tolist()
    numbers = [min(pair) for pair in zip(left, right, strict=True)]
    mirrored = [one > other for one, other in zip(left, right, strict=True)]
    return list(zip(numbers, mirrored, batch["labels"].tolist(), strict=True))


@given(st.integers(0, 8 * N), st.integers(1, 3 * N))
def test_batches_do_not_depend_on_what_was_asked_before(first, count):
    loader = make()
    loader.batch(0, 2 * N)
    batch = loader.batch(first, count)
    assert batch["images"].shape == (count, 3, 4, 4)
    assert batch["images"].dtype == torch.float32
    assert all(label == number % 3 for number, _, label in read(batch))
    singles = [read(make().batch(n, 1))[0] for n in range(first, first + min(count, 5))]
    assert read(batch)[:5] == singles


@given(st.integers(0, 5), st.integers(0, 1000))
def test_an_epoch_shows_every_image_once_and_mirrors_half(epoch, seed):
    seen = read(make(seed=seed).batch(epoch * N, N))
    assert sorted(number for number, _, _ in seen) == list(range(N))
    assert sum(mirrored for _, mirrored, _ in seen) == N // 2


def test_mirroring_changes_from_epoch_to_epoch_and_never_without_flip():
    loader = make()
    epochs = [
        {number: mirrored for number, mirrored, _ in read(loader.batch(e * N, N))}
        for e in range(40)
    ]
    share = np.mean([[epoch[i] for epoch in epochs] for i in range(N)], axis=1)
    assert (share > 0.15).all()
    assert (share < 0.8).all()
    plain = make(flip=False).batch(0, 3 * N)
    assert not any(mirrored for _, mirrored, _ in read(plain))


@given(st.integers(0, 4 * N), st.integers(1, 5), st.integers(1, 4))
def test_the_shares_of_ranks_are_the_global_batch(first, share, ranks):
    loader = make(share * ranks)
    parts = [loader.batch(first + rank * share, share)["images"] for rank in range(ranks)]
    assert torch.equal(torch.cat(parts), loader.batch(first)["images"])


def test_bad_requests():
    with pytest.raises(ValueError, match="batch_size=0 must be at least 1"):
        make(batch_size=0)
    with pytest.raises(ValueError, match="seed must not be negative, got -1"):
        make(seed=-1)
    with pytest.raises(ValueError, match="first_example >= 0 and count >= 1"):
        make().batch(-1)
    with pytest.raises(ValueError, match="no images"):
        ImageLoader(ImageSet(IMAGES[:0], np.zeros(0, np.int64)), batch_size=1, seed=0)


def test_pixels_survive_the_way_through_the_network_s_range():
    every = torch.arange(256, dtype=torch.uint8)
    assert torch.equal(to_uint8(from_uint8(every)), every)
    assert from_uint8(every)[[0, -1]].tolist() == [-1.0, 1.0]
    assert to_uint8(torch.tensor([-3.0, 3.0])).tolist() == [0, 255]
    assert (as_pictures(as_input(IMAGES)) == IMAGES).all()
