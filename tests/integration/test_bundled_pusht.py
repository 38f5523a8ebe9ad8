"""The demonstrations that come with the package."""

import numpy as np
import pytest

from cmpolicy_data import ReplayBuffer
from cmpolicy_data.catalog import bundled_path
from cmpolicy_data.generate.pusht import _is_astray, demonstrate, replay
from cmpolicy_data.generate.tee import OUTLINE, Pose, to_body
from cmpolicy_data.validation import validate
from cmpolicy_envs import keypoints_from_pose
from cmpolicy_envs.pusht_states import dp_initial_state

_ASTRAY = 0.5  # share of attempts that begin where a policy has led the block


@pytest.fixture(scope="module")
def store() -> ReplayBuffer:
    return ReplayBuffer.open(bundled_path("pusht"))


def episodes(store: ReplayBuffer) -> list[slice]:
    starts = np.concatenate([[0], store.episode_ends[:-1]])
    return [slice(a, b) for a, b in zip(starts, store.episode_ends, strict=True)]


def test_size_and_contents(store: ReplayBuffer) -> None:
    assert store.path.stat().st_size <= 3_000_000
    assert store.n_episodes >= 200
    assert validate(store.path) == []
    assert store.keys() == ["action", "keypoint", "state"]
    action, state = store.load("action"), store.load("state")
    assert action.shape == (store.n_steps, 2)
    assert action.min() >= 0.0
    assert action.max() <= 512.0
    expected = keypoints_from_pose(state[:, 2:4], state[:, 4])
    np.testing.assert_allclose(store.load("keypoint"), expected, atol=1e-3)


def test_seeds_leave_evaluation_its_own(store: ReplayBuffer) -> None:
    seeds = store.attrs["seeds"]
    assert len(seeds) == store.n_episodes
    assert np.all(np.diff(seeds) > 0)
    assert 0 <= seeds[0] <= seeds[-1] < 100_000


@pytest.mark.parametrize("part", [0.0, 0.2, 0.4, 0.6, 0.8, 1.0])
def test_played_again_it_succeeds(store: ReplayBuffer, part: float) -> None:
    action, state = store.load("action"), store.load("state")
    index = round(part * (store.n_episodes - 1))
    rows, seed = episodes(store)[index], store.attrs["seeds"][index]
    if not _is_astray(seed, _ASTRAY):
        assert replay(action[rows], dp_initial_state(seed)) > 0.95
    assert replay(action[rows], state[rows.start], exact_pose=True) > 0.95


def test_the_command_that_made_it_is_noted(store: ReplayBuffer) -> None:
    assert (
        store.attrs["command"]
        == f"cmpolicy data generate pusht episodes=400 seed=0 astray={_ASTRAY} "
        "astray_by=outputs/first/policy_last"
    )


@pytest.mark.parametrize("astray", [False, True])
def test_the_generator_makes_these_episodes(store: ReplayBuffer, astray: bool) -> None:
    """The policy that led is not bundled; from where it has led all is as recorded."""
    seeds = store.attrs["seeds"]
    lengths = np.diff(store.episode_ends, prepend=0)
    same = [index for index, seed in enumerate(seeds) if _is_astray(seed, _ASTRAY) == astray]
    assert len(same) > 150
    index = min(same, key=lambda i: lengths[i])  # the quickest to make again
    rows = episodes(store)[index]
    first = store.load("state")[rows.start]
    episode = demonstrate(seeds[index], _ASTRAY, start=first if astray else None)
    assert episode is not None
    np.testing.assert_allclose(first, episode.state[0], atol=0.01)
    again = slice(rows.start, rows.start + 10)  # later, another CPU's rounding may have grown
    np.testing.assert_allclose(store.load("action")[again], episode.action[:10], atol=0.1)
    assert episode.succeeds


def test_movements_are_those_of_a_hand(store: ReplayBuffer) -> None:
    state = store.load("state")
    lengths = np.diff(store.episode_ends, prepend=0)
    assert 80 <= lengths.mean() <= 150
    assert lengths.max() <= 300
    steps = np.concatenate(
        [np.linalg.norm(np.diff(state[rows, :2], axis=0), axis=1) for rows in episodes(store)]
    )
    # The human demonstrations: median 8, 95 % below 22 px per step.
    assert 5.0 <= np.median(steps) <= 10.0
    assert 12.0 <= np.percentile(steps, 95) <= 25.0


def test_starts_and_contacts_are_diverse(store: ReplayBuffer) -> None:
    state = store.load("state").astype(np.float64)
    first = state[[rows.start for rows in episodes(store)]]
    for column, spread in enumerate([80.0, 80.0, 60.0, 60.0, 1.2]):
        assert first[:, column].std() > spread
    # Where the agent is, seen from the block's frame, while the block moves.
    contacts = []
    for rows in episodes(store):
        s = state[rows]
        moved = np.linalg.norm(np.diff(s[:, 2:4], axis=0), axis=1) > 0.5
        contacts += [to_body(Pose(*row[2:]), row[:2]) for row in s[1:][moved]]
    towards = np.array(contacts) - OUTLINE.mean(axis=0)
    sectors = np.floor((np.arctan2(towards[:, 1], towards[:, 0]) + np.pi) / (np.pi / 4)).astype(int)
    shares = np.bincount(sectors % 8, minlength=8) / len(sectors)
    assert np.all(shares > 0.02), shares
