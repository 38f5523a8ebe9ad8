"""What the loader refuses, and how it keeps dtypes."""

import numpy as np
import pytest
import torch

from cmpolicy.training.loader import DeviceLoader
from cmpolicy_data import window_index

WINDOWS = window_index([6, 12], horizon=4, n_obs_steps=2, n_action_steps=2)
OBS = {"state": np.zeros((12, 3), np.float32)}
ACTION = np.zeros((12, 2), np.float32)


def make(obs=None, action=ACTION, windows=WINDOWS, **settings):
    settings = {"batch_size": 4, "seed": 0, **settings}
    return DeviceLoader(OBS if obs is None else obs, action, windows, **settings)


def test_images_stay_uint8_and_other_numbers_become_float32():
    obs = {
        "image": np.arange(12, dtype=np.uint8).reshape(12, 1, 1, 1),
        "gripper": np.arange(12, dtype=np.int64)[:, None],
        "open": np.ones((12, 1), dtype=np.bool_),
    }
    batch = make(obs, ACTION.astype(np.float64)).batch(0)
    dtypes = {key: value.dtype for key, value in batch["obs"].items()}
    assert dtypes == {"image": torch.uint8, "gripper": torch.float32, "open": torch.float32}
    assert batch["action"].dtype == torch.float32


def test_the_data_is_a_copy():
    state = np.zeros((12, 3), np.float32)
    loader = make({"state": state})
    state[:] = 7
    assert loader.batch(0)["obs"]["state"].abs().max() == 0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"batch_size": 0}, "batch_size=0 must be at least 1"),
        ({"seed": -1}, "must not be negative, got -1"),
        ({"obs": {}}, "no observations"),
        ({"obs": {"state": np.zeros((11, 3))}}, "'state' has 11 steps but 'action' has 12"),
        ({"windows": WINDOWS.select([])}, "no training windows"),
        (
            {"obs": {"state": np.zeros((9, 3))}, "action": np.zeros((9, 2))},
            "refers to row 11, but the data has only 9 rows",
        ),
    ],
)
def test_bad_arguments(change, message):
    with pytest.raises(ValueError, match=message):
        make(**change)


def test_bad_requests():
    with pytest.raises(ValueError, match="first_example >= 0 and count >= 1, got -1 and 4"):
        make().batch(-1)
    with pytest.raises(ValueError, match="got 0 and 0"):
        make().batch(0, 0)


def test_other_windows_of_the_same_data_leave_it_where_it_is():
    """Validation put all frames onto the device a second time."""
    loader = make(n_augment=4)
    other = loader.of(WINDOWS.select([1]), batch_size=2)
    assert other._obs["state"] is loader._obs["state"]
    assert (loader.batch_size, loader.n_windows) == (4, len(WINDOWS))
    assert "augment" not in other.batch(0)
    alone = make(windows=WINDOWS.select([1]), batch_size=2).batch(0)
    assert torch.equal(other.batch(0)["action_is_pad"], alone["action_is_pad"])


def test_a_share_of_each_epoch_sees_the_newest_observation_alone() -> None:
    state = np.arange(12, dtype=np.float32)[:, None]
    plain = make({"state": state})
    loader = make({"state": state}, forget=0.25)
    n = len(WINDOWS)
    moving = forgotten = 0
    for epoch in range(6):
        seen = loader.batch(epoch * n, n)["obs"]["state"][..., 0]
        usual = plain.batch(epoch * n, n)["obs"]["state"][..., 0]
        forgets = (seen != usual).any(dim=1)
        assert torch.equal(seen[:, -1], usual[:, -1])
        assert (seen[forgets] == usual[forgets, -1:]).all()
        assert forgets.sum() <= -(-n // 4)  # those at an episode's start see no other to forget
        moving += int((usual[:, 0] != usual[:, 1]).sum())
        forgotten += int(forgets.sum())
    assert 0.1 < forgotten / moving < 0.4
    again = [loader.batch(at, 2)["obs"]["state"] for at in range(0, 8, 2)]
    assert torch.equal(torch.cat(again), loader.batch(0, 8)["obs"]["state"])  # resumed, or shared
    held_out = loader.of(WINDOWS, batch_size=n).batch(0)["obs"]["state"]
    assert torch.equal(held_out, plain.batch(0, n)["obs"]["state"])
