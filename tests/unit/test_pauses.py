"""``data.max_pause``: what is left of pauses."""

from __future__ import annotations

import warnings
from pathlib import Path

import numpy as np
import pytest

import cmpolicy
from cmpolicy.experiment.data import load_training_data
from cmpolicy.experiment.data_checks import DataWarning
from cmpolicy.schema import ConfigError
from cmpolicy_data import ReplayBuffer
from cmpolicy_data.demonstrations import Demonstrations


def _moves(position: list[float], ends: list[int]) -> Demonstrations:
    x = np.asarray(position, np.float32)[:, None]
    return Demonstrations(
        {"x": x, "seen": np.arange(len(x), dtype=np.uint8)[:, None]},
        x + 1,
        np.asarray(ends),
        np.arange(len(ends)),
        images=("seen",),
    )


@pytest.mark.parametrize(
    ("longest", "left"), [(1, [0, 1, 4, 5, 8, 9]), (2, [0, 1, 2, 4, 5, 6, 8, 9]), (9, None)]
)
def test_steps_beyond_the_first_of_a_pause_go(longest: int, left: list[int] | None) -> None:
    """Two episodes; the second begins where the first one rests, which is no pause of it."""
    data = _moves([0, 0, 0, 0, 5, 5, 5, 5, 5, 7], [8, 10])
    found = data.without_pauses(longest)
    steps = list(range(10)) if left is None else left
    assert found.obs["seen"][:, 0].tolist() == steps
    assert found.action[:, 0].tolist() == data.action[steps, 0].tolist()
    assert found.episode_ends.tolist() == [sum(s < 8 for s in steps), len(steps)]
    assert np.array_equal(found.source_episode, data.source_episode)


def test_slow_motion_is_no_pause() -> None:
    """Steps too small to count add up; only those within reach of where it stood still go."""
    creeping = [*np.linspace(0, 0.01, 101), *np.linspace(0.03, 1, 50)]
    found = _moves(creeping, [151]).without_pauses(1)
    left = found.obs["x"][found.obs["x"] < 0.02]
    assert np.diff(left).max() < 0.0012
    assert 20 <= len(left) <= 30
    assert (found.obs["x"] > 0.02).sum() == 50


def test_one_glitch_does_not_make_every_motion_a_pause() -> None:
    moving = np.sin(np.arange(2000) / 20)
    moving[700] = -9999
    assert len(_moves(moving.tolist(), [2000]).without_pauses(3).action) == 2000


def test_pulses_of_a_button_are_no_noise() -> None:
    moving = np.r_[np.arange(40), np.full(100, 40)].astype(np.float32)
    button = np.zeros(140, np.float32)
    button[50:140:6] = 1
    state = np.stack([moving, button], axis=1)
    data = Demonstrations({"x": state}, state, np.array([140]), np.array([0]))
    assert data.without_pauses(2).action[:, 1].sum() == button.sum()


def test_a_joint_that_only_jitters_hides_no_pause() -> None:
    moving = np.r_[np.arange(40), np.full(60, 40), np.arange(40, 80)].astype(np.float32)
    noise = 1e-5 * np.random.default_rng(0).normal(size=140).astype(np.float32)
    state = np.stack([moving, noise], axis=1)
    data = Demonstrations({"x": state}, state, np.array([140]), np.array([0]))
    assert len(data.without_pauses(3).action) == 83
    only = Demonstrations({"x": state[:, 1:]}, state[:, 1:], np.array([140]), np.array([0]))
    assert len(only.without_pauses(3).action) > 100  # noise alone may be what is recorded


def test_a_goal_that_stays_is_no_pause_of_what_only_cameras_see(tmp_path: Path) -> None:
    """The arm travels to its goal: without its state, the frames alone tell of the motion."""
    steps = np.arange(40)
    frames = np.broadcast_to(steps[:, None, None, None], (40, 8, 8, 3)).astype(np.uint8)
    joint = steps[:, None].astype(np.float32)
    buffer = ReplayBuffer.create(tmp_path / "a.zarr")
    for _ in range(2):
        goal = np.repeat([[20.0], [40.0]], 20, axis=0).astype(np.float32)
        buffer.append_episode({"top": frames, "joint": joint, "action": goal})
    words = ["task=custom", f"data.path={buffer.path}", "control_hz=10", "encoder=compact"]
    blind = [*words, "data.obs=[top]"]
    with warnings.catch_warnings():
        warnings.simplefilter("error", DataWarning)
        load_training_data(cmpolicy.compose(*blind))
    with pytest.raises(ValueError, match=r"data.max_pause=3 needs numbers .*\(top\)"):
        load_training_data(cmpolicy.compose(*blind, "data.max_pause=3"))
    for more in ("data.obs=[top,joint]", "data.targets=[joint]"):
        config = cmpolicy.compose(*blind, "data.max_pause=3", more)
        assert load_training_data(config).arrays.episode_ends.tolist() == [40, 80]


def test_training_data_without_pauses(tmp_path: Path) -> None:
    buffer = ReplayBuffer.create(tmp_path / "a.zarr")
    moving = np.arange(40, dtype=np.float32)[:, None]
    resting = np.r_[moving[:20], np.repeat(moving[20:21], 30, axis=0), moving[20:]]
    for _ in range(2):
        buffer.append_episode({"state": resting, "action": resting})
    words = ["task=custom", f"data.path={buffer.path}", "data.obs=[state]", "control_hz=10"]
    ends = {
        pause: load_training_data(cmpolicy.compose(*words, *more)).arrays.episode_ends.tolist()
        for pause, more in ((None, []), (3, ["data.max_pause=3"]))
    }
    assert ends == {None: [70, 140], 3: [43, 86]}
    with pytest.raises(ConfigError, match=r"data.max_pause=0 must be at least 1"):
        cmpolicy.compose(*words, "data.max_pause=0")
