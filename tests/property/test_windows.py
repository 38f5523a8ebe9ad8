"""Windows against a plain reading of Diffusion Policy's sampler, one window and step at a time."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cmpolicy_data import split_episodes, window_index
from cmpolicy_data.windows import WindowError, min_episode_length


@st.composite
def cases(draw):
    n_obs_steps = draw(st.integers(1, 4))
    n_action_steps = draw(st.integers(1, 6))
    horizon = n_obs_steps - 1 + n_action_steps + draw(st.integers(0, 8))
    sizes = {
        "horizon": horizon,
        "n_obs_steps": n_obs_steps,
        "n_action_steps": n_action_steps,
    }
    shortest = min_episode_length(**sizes)
    lengths = draw(st.lists(st.integers(1, shortest + 12), min_size=1, max_size=5))
    return lengths, sizes


def sampled(lengths, horizon, n_obs_steps, n_action_steps):
    """(episode, obs rows, action rows, padding) of every window, by looping."""
    found = []
    begin = 0
    for episode, length in enumerate(lengths):
        first, last = -(n_obs_steps - 1), length - horizon + (n_action_steps - 1)
        # every step whose executed actions were recorded is a decision step, and each has one
        last = max(last, length - n_action_steps - (n_obs_steps - 1), first)
        for start in range(first, last + 1):
            rows, pads = [], []
            for step in range(start, start + horizon):
                rows.append(begin + min(max(step, 0), length - 1))
                pads.append(step < 0 or step >= length)
            found.append((episode, rows[:n_obs_steps], rows, pads))
        begin += length
    return found


@given(cases())
def test_equals_the_brute_force_sampler(case):
    lengths, sizes = case
    windows = window_index(np.cumsum(lengths), **sizes)
    expected = sampled(lengths, **sizes)
    assert len(windows) == len(expected)
    assert windows.episode.tolist() == [e for e, _, _, _ in expected]
    assert windows.obs.tolist() == [o for _, o, _, _ in expected]
    assert windows.action.tolist() == [a for _, _, a, _ in expected]
    assert windows.action_is_pad.tolist() == [p for _, _, _, p in expected]
    assert windows.obs.dtype == windows.action.dtype == windows.episode.dtype == np.int64
    assert windows.action_is_pad.dtype == np.bool_


@given(cases())
def test_no_window_crosses_an_episode_and_edges_repeat(case):
    lengths, sizes = case
    ends = np.cumsum(lengths)
    windows = window_index(ends, **sizes)
    first = (ends - lengths)[windows.episode][:, None]
    last = (ends - 1)[windows.episode][:, None]
    assert ((windows.action >= first) & (windows.action <= last)).all()
    steps = np.diff(windows.action, axis=1)
    assert np.isin(steps, (0, 1)).all()
    inside = ~windows.action_is_pad
    assert (steps[inside[:, 1:] & inside[:, :-1]] == 1).all()
    padded = windows.action_is_pad
    edges = (windows.action == first) | (windows.action == last)
    assert edges[padded].all()
    # The decision step itself is always a real one, and every step with recorded actions is one.
    decisions = windows.action[:, sizes["n_obs_steps"] - 1]
    assert inside[:, sizes["n_obs_steps"] - 1].all()
    for start, length in zip(ends - lengths, lengths, strict=True):
        recorded = range(start, start + length - sizes["n_action_steps"] + 1)
        assert set(recorded) <= set(decisions.tolist())


@given(cases())
def test_short_episodes_are_padded_or_skipped(case):
    lengths, sizes = case
    needed = min_episode_length(**sizes)
    padded = window_index(np.cumsum(lengths), **sizes)
    assert set(padded.episode.tolist()) == set(range(len(lengths)))
    kept = [i for i, length in enumerate(lengths) if length >= needed]
    if kept:
        skipped = window_index(np.cumsum(lengths), **sizes, short_episodes="skip")
        assert set(skipped.episode.tolist()) == set(kept)
        assert skipped.action.tolist() == padded.select(kept).action.tolist()
    else:
        with pytest.raises(WindowError, match="are shorter than the"):
            window_index(np.cumsum(lengths), **sizes, short_episodes="skip")


@given(cases(), st.data())
def test_select_keeps_the_windows_of_the_named_episodes(case, data):
    lengths, sizes = case
    windows = window_index(np.cumsum(lengths), **sizes)
    chosen = data.draw(st.sets(st.integers(0, len(lengths) - 1)))
    some = windows.select(sorted(chosen))
    keep = [i for i, e in enumerate(windows.episode.tolist()) if e in chosen]
    assert some.action.tolist() == windows.action[keep].tolist()
    assert some.obs.tolist() == windows.obs[keep].tolist()
    assert some.action_is_pad.tolist() == windows.action_is_pad[keep].tolist()


@given(st.integers(2, 50), st.floats(0, 0.5), st.integers(0, 5))
def test_a_split_is_disjoint_complete_and_repeatable(n_episodes, val_fraction, seed):
    split = split_episodes(n_episodes, val_fraction, seed)
    together = np.concatenate([split.train_ids, split.val_ids])
    assert sorted(together.tolist()) == list(range(n_episodes))
    assert len(split.train_ids) > 0
    assert (len(split.val_ids) > 0) == (val_fraction > 0)
    again = split_episodes(n_episodes, val_fraction, seed)
    assert again.train_ids.tolist() == split.train_ids.tolist()
