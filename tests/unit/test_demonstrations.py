"""From a store to training arrays."""

from pathlib import Path

import numpy as np
import pytest

from cmpolicy_data import (
    ReplayBuffer,
    ReplayBufferError,
    SelectorError,
    load_demonstrations,
    split_episodes,
)
from cmpolicy_data.augment import AugmentError, mirror_points


@pytest.fixture
def store(tmp_path: Path) -> Path:
    rng = np.random.default_rng(0)
    buffer = ReplayBuffer.create(tmp_path / "demos.zarr")
    for length in (4, 6, 5):
        buffer.append_episode(
            {
                "action": rng.uniform(0, 512, (length, 2)),
                "state": rng.uniform(0, 6, (length, 5)),
                "keypoint": rng.uniform(0, 512, (length, 9, 2)),
                "flag": rng.integers(0, 2, (length,)),
            }
        )
    return buffer.path


def test_policy_keys_and_selectors(store: Path):
    data = load_demonstrations(store, {"agent_pos": "state[:2]", "keypoint": "keypoint"})
    state = ReplayBuffer.open(store).load("state")
    assert data.obs["agent_pos"].tolist() == state[:, :2].tolist()
    assert data.obs["keypoint"].shape == (15, 9, 2)
    assert data.action.dtype == np.float32
    assert data.episode_ends.tolist() == [4, 10, 15]
    assert data.source_episode.tolist() == [0, 1, 2]


def test_a_plain_list_of_keys(store: Path):
    data = load_demonstrations(store, ["state", "flag"], action="state[2:]")
    assert {key: value.shape for key, value in data.obs.items()} == {
        "state": (15, 5),
        "flag": (15, 1),
    }
    assert data.action.shape == (15, 3)


def test_mirrored(store: Path):
    data = load_demonstrations(
        store, {"agent_pos": "state[:2]", "keypoint": "keypoint"}, augment=["mirror"]
    )
    assert data.action.shape == (30, 2)
    assert data.action[15:].tolist() == mirror_points(data.action[:15]).tolist()
    agent = data.obs["agent_pos"]
    assert agent[15:].tolist() == mirror_points(agent[:15]).tolist()
    assert data.episode_ends.tolist() == [4, 10, 15, 19, 25, 30]
    assert data.source_episode.tolist() == [0, 1, 2, 0, 1, 2]


def test_mirror_images_stay_on_their_side_of_a_split(store: Path):
    data = load_demonstrations(store, ["state"], augment=["mirror"])
    split = split_episodes(3, 0.34, seed=0)
    expanded = data.expand(split)
    (held_out,) = split.val_ids.tolist()
    assert expanded.val_ids.tolist() == [held_out, held_out + 3]
    assert len(expanded.train_ids) == 4


@pytest.mark.parametrize("obs", [[], {}, "state"])
def test_no_observations(store: Path, obs: object):
    with pytest.raises(ValueError, match=r"data.obs must name at least one observation.*got"):
        load_demonstrations(store, obs)  # type: ignore[arg-type]


def test_what_cannot_be_loaded(store: Path):
    with pytest.raises(ReplayBufferError, match=r"no key 'pose'.*keys: action, flag, keypoint"):
        load_demonstrations(store, ["pose"])
    with pytest.raises(SelectorError, match="state has 5 columns"):
        load_demonstrations(store, ["state[:9]"])
    with pytest.raises(SelectorError, match="state has 5 columns"):
        load_demonstrations(store, {"a": "state[:9]"}, augment=["mirror"])
    with pytest.raises(ValueError, match=r"actions \(keypoint\) have shape \(9, 2\) per step"):
        load_demonstrations(store, ["state"], action="keypoint")
    with pytest.raises(AugmentError, match=r"unknown augmentation 'rotate'.*mirror"):
        load_demonstrations(store, ["state"], augment=["rotate"])
    with pytest.raises(AugmentError, match=r"Leave out data\.augment"):
        load_demonstrations(store, ["flag"], augment=["mirror"])
