"""The drawn timeline, and the errors of windows that cannot be."""

import dataclasses

import numpy as np
import pytest

from cmpolicy_data import WindowError, split_episodes, window_index


def test_the_timeline_of_the_docstring():
    windows = window_index([10], horizon=8, n_obs_steps=2, n_action_steps=4)
    # The first decision is made at step 0, where the observation before it is step 0 again.
    assert windows.obs[0].tolist() == [0, 0]
    assert windows.action[0].tolist() == [0, 0, 1, 2, 3, 4, 5, 6]
    assert windows.action_is_pad[0].tolist() == [True] + [False] * 7
    # The last one is made at step 6: its four executed actions are steps 6 to 9.
    assert windows.obs[-1].tolist() == [5, 6]
    assert windows.action[-1].tolist() == [5, 6, 7, 8, 9, 9, 9, 9]
    assert windows.action_is_pad[-1].tolist() == [False] * 5 + [True] * 3
    assert len(windows) == 7


def test_a_window_index_is_frozen():
    windows = window_index([4], horizon=1, n_obs_steps=1, n_action_steps=1)
    with pytest.raises(dataclasses.FrozenInstanceError):
        windows.obs = windows.action


def test_a_long_horizon_reaches_every_decision():
    """Horizon 64, 8 executed, 60 steps: every step up to the last 8 is trained on."""
    windows = window_index([60], horizon=64, n_obs_steps=1, n_action_steps=8)
    assert windows.action[:, 0].tolist() == list(range(53))
    assert windows.action_is_pad[-1].sum() == 64 - 8


def test_one_short_episode_among_good_ones():
    sizes = {"horizon": 8, "n_obs_steps": 1, "n_action_steps": 4}
    padded = window_index([10, 13, 23], **sizes)
    assert padded.select([1]).action.tolist() == [[10, 11, 12, 12, 12, 12, 12, 12]]
    assert padded.select([1]).action_is_pad.tolist() == [[False] * 3 + [True] * 5]
    skipped = window_index([10, 13, 23], **sizes, short_episodes="skip")
    assert set(skipped.episode.tolist()) == {0, 2}


def test_an_episode_of_just_enough_steps_has_one_window():
    windows = window_index([8], horizon=16, n_obs_steps=2, n_action_steps=8)
    assert windows.action.tolist() == [[0, *range(8), *[7] * 7]]


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ((8, 2, 8), "horizon=8 is too short.*n_obs_steps=2.*n_action_steps=8.*= 9"),
        ((0, 1, 1), "horizon must be at least 1, got 0"),
        ((8, 0, 1), "n_obs_steps must be at least 1, got 0"),
        ((8, 1, -3), "n_action_steps must be at least 1, got -3"),
    ],
)
def test_sizes_that_contradict_each_other(sizes, message):
    horizon, n_obs_steps, n_action_steps = sizes
    with pytest.raises(WindowError, match=message):
        window_index([100], horizon=horizon, n_obs_steps=n_obs_steps, n_action_steps=n_action_steps)


@pytest.mark.parametrize(
    ("ends", "message"),
    [
        (np.zeros(0, np.int64), "no episodes"),
        ([5, 5], "entry 1 is 5 after 5"),
        ([0, 5], "entry 0 is 0 after 0"),
        ([9, 4, 12], "entry 1 is 4 after 9"),
        ([1.5, 2.5], "1-D array of integers.*float64"),
        ([[3, 6]], r"shape \(1, 2\)"),
    ],
)
def test_bad_episode_ends(ends, message):
    with pytest.raises(WindowError, match=message):
        window_index(ends, horizon=1, n_obs_steps=1, n_action_steps=1)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((0, 0.1, 0), "no episodes"),
        ((5, 1.0, 0), "below 1, got 1.0"),
        ((5, -0.1, 0), "at least 0"),
        ((1, 0.5, 0), "leaves none to train on"),
    ],
)
def test_splits_that_cannot_be(arguments, message):
    with pytest.raises(WindowError, match=message):
        split_episodes(*arguments)


def test_a_split_of_206_episodes():
    split = split_episodes(206, 0.05, seed=0)
    assert (len(split.train_ids), len(split.val_ids)) == (196, 10)
    assert split_episodes(206, 0.05, seed=1).val_ids.tolist() != split.val_ids.tolist()
