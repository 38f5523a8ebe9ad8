"""The order of training data: a pure function of (seed, example counter)."""

import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st

from cmpolicy.training.loader import DeviceLoader, augment_numbers
from cmpolicy_data import window_index

ENDS = np.array([5, 12, 21])
WINDOWS = window_index(ENDS, horizon=4, n_obs_steps=2, n_action_steps=2)
OBS = {
    "pos": np.arange(42, dtype=np.float64).reshape(21, 2),
    "points": np.arange(21 * 6, dtype=np.float32).reshape(21, 3, 2),
}
ACTION = -np.arange(42, dtype=np.float32).reshape(21, 2)
W = len(WINDOWS)


def make(batch_size=6, seed=3):
    return DeviceLoader(OBS, ACTION, WINDOWS, batch_size=batch_size, seed=seed)


@given(st.integers(0, 10 * W), st.integers(1, 3 * W))
def test_a_batch_gathers_the_rows_of_its_windows(first, count):
    loader = make()
    numbers = loader.window_numbers(first, count).numpy()
    batch = loader.batch(first, count)
    assert batch["obs"]["pos"].numpy().tolist() == OBS["pos"][WINDOWS.obs[numbers]].tolist()
    assert batch["obs"]["points"].shape == (count, 2, 3, 2)
    assert batch["obs"]["points"].numpy().tolist() == OBS["points"][WINDOWS.obs[numbers]].tolist()
    assert batch["action"].numpy().tolist() == ACTION[WINDOWS.action[numbers]].tolist()
    assert batch["action_is_pad"].numpy().tolist() == WINDOWS.action_is_pad[numbers].tolist()
    assert batch["action"].dtype == batch["obs"]["pos"].dtype == torch.float32
    assert batch["action_is_pad"].dtype == torch.bool


@given(st.integers(0, 4))
def test_an_epoch_visits_every_window_once(epoch):
    numbers = make().window_numbers(epoch * W, W)
    assert sorted(numbers.tolist()) == list(range(W))


@given(st.lists(st.integers(0, 8 * W), min_size=1, max_size=6), st.integers(1, 2 * W))
def test_batches_do_not_depend_on_what_was_asked_before(firsts, size):
    walked = make(size)
    for first in firsts:
        fresh = make(size).window_numbers(first, size)
        assert walked.window_numbers(first, size).tolist() == fresh.tolist()


@given(st.integers(0, 5 * W), st.integers(1, 5), st.integers(1, 4))
def test_the_shares_of_ranks_are_the_global_batch(first, share, ranks):
    loader = make(share * ranks)
    whole = loader.batch(first)
    parts = [loader.batch(first + rank * share, share) for rank in range(ranks)]
    assert torch.equal(torch.cat([part["action"] for part in parts]), whole["action"])
    assert torch.equal(torch.cat([p["obs"]["pos"] for p in parts]), whole["obs"]["pos"])


@given(st.integers(0, 1000), st.integers(0, 1000))
def test_seeds_and_epochs_shuffle_differently(seed, epoch):
    orders = {
        tuple(make(seed=s).window_numbers(e * W, W).tolist())
        for s in (seed, seed + 1)
        for e in (epoch, epoch + 1)
    }
    assert len(orders) == 4


@given(
    seed=st.integers(0, 2**31),
    first=st.integers(0, 10**6),
    count=st.integers(1, 6),
    n=st.integers(1, 9),
)
def test_numbers_that_augment_belong_to_the_example(
    seed: int, first: int, count: int, n: int
) -> None:
    """Whatever batch an example comes in; uniform, and no two examples share any."""
    whole = augment_numbers(seed, first, count + 3, n)
    assert whole.dtype == np.float32
    assert np.array_equal(augment_numbers(seed, first + 2, count, n), whole[2 : 2 + count])
    assert ((whole >= 0) & (whole < 1)).all()
    assert len(np.unique(whole)) > 0.9 * whole.size
    assert not np.array_equal(augment_numbers(seed + 1, first, count + 3, n), whole)


def test_numbers_that_augment_are_uniform() -> None:
    numbers = augment_numbers(0, 0, 20_000, 4)
    assert np.abs(numbers.mean(axis=0) - 0.5).max() < 0.01
    assert np.abs(np.corrcoef(numbers.T) - np.eye(4)).max() < 0.03
