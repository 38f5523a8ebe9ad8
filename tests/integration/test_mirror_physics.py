"""The simulator has the symmetry that the mirror augmentation claims."""

from collections.abc import Iterator
from pathlib import Path

import gymnasium
import numpy as np
import pytest

import cmpolicy_envs  # noqa: F401  (registers the environments)
from cmpolicy_data import ReplayBuffer
from cmpolicy_data.augment import Episodes, mirror_points, mirror_pusht, mirror_state


@pytest.fixture
def env() -> Iterator[gymnasium.Env]:
    made = gymnasium.make("cmpolicy/PushT-v0")
    yield made
    made.close()


def replay(env: gymnasium.Env, state: np.ndarray, actions: np.ndarray):
    """States and coverages after each action, from rest at ``state``."""
    env.reset(seed=0)
    env.unwrapped.set_pose(state)  # type: ignore[attr-defined]
    infos = [env.step(action)[4] for action in actions]
    return np.array([i["state"] for i in infos]), np.array([i["coverage"] for i in infos])


def test_pushes_and_their_mirror_images_go_alike(env: gymnasium.Env):
    rng = np.random.default_rng(0)
    moved = 0.0
    for _ in range(5):
        # In the middle: the walls, 5 px and 6 px inside the arena, are no mirror images.
        start = np.append(rng.uniform(170, 340, 4), rng.uniform(0, 2 * np.pi))
        through = np.clip(2 * start[2:4] - start[:2], 150, 360)  # beyond the block
        actions = np.linspace(start[:2], through, 25) + rng.normal(0, 5, (25, 2))
        states, coverages = replay(env, start, actions)
        images, image_coverages = replay(env, mirror_state(start), mirror_points(actions))
        expected = mirror_state(states)
        assert np.abs(images[:, :4] - expected[:, :4]).max() < 0.01
        assert np.abs(np.sin(images[:, 4] - expected[:, 4])).max() < 1e-3
        assert np.abs(image_coverages - coverages).max() < 1e-3
        moved = max(moved, np.abs(states[-1, 2:4] - start[2:4]).max())
    assert moved > 30


def test_mirrored_human_demonstrations_reach_the_same_coverage(
    env: gymnasium.Env, pusht_human: Path
):
    buffer = ReplayBuffer.open(pusht_human)
    data = {key: buffer.load(key) for key in ("state", "action")}
    mirrored = mirror_pusht(Episodes(data, buffer.episode_ends, np.arange(buffer.n_episodes)))
    begins = mirrored.episode_ends - np.diff(mirrored.episode_ends, prepend=0)
    for episode in (0, 6, 41, 137):
        best = []
        for number in (episode, episode + buffer.n_episodes):
            rows = slice(begins[number], mirrored.episode_ends[number])
            state = mirrored.data["state"][rows][0]
            best.append(replay(env, state, mirrored.data["action"][rows])[1].max())
        assert best[0] > 0.8
        assert abs(best[0] - best[1]) < 0.01
