"""From a store to a policy's scaling: glitches, methods by key, what is cut; and what is said."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import cmpolicy
from cmpolicy.experiment.data import TrainingData, load_training_data
from cmpolicy.experiment.data_checks import DataWarning
from cmpolicy.experiment.train import new_policy
from cmpolicy.schema import ConfigError
from cmpolicy_data import ReplayBuffer


def write(path: Path, *, glitch: bool = False) -> Path:
    rng = np.random.default_rng(0)
    buffer = ReplayBuffer.create(path)
    for episode in range(20):
        state = np.cumsum(rng.normal(0, 0.1, (60, 4)), axis=0).clip(-1, 1)
        action = np.roll(state[:, :2], -1, axis=0)
        action[0], action[1] = -1, 1
        state[0], state[1] = -1, 1
        if glitch and episode == 7:
            action[30, 0], state[40, 1] = 5000, -3000
        buffer.append_episode({"state": state, "action": action})
    return path


def words(store: Path, **data: Any) -> list[str]:
    base = [f"data.path={store}", "data.obs=[state]", "control_hz=10", "task=custom"]
    return [*base, *(f"data.{key}={value}" for key, value in data.items())]


def load(store: Path, **data: Any) -> TrainingData:
    return load_training_data(cmpolicy.compose(*words(store, val_fraction=0, **data)))


def test_a_glitch_changes_nothing_but_is_told(tmp_path: Path) -> None:
    """The error of actions was 333 of a range of 2, and nothing was said."""
    clean = load(write(tmp_path / "clean.zarr")).normalizer()
    store = write(tmp_path / "glitch.zarr", glitch=True)
    with pytest.warns(DataWarning) as told:
        data = load(store)
    text = str(told[0].message)
    assert "action[0]: 5000 in episode 7, step 30, is out of all bounds" in text
    assert "state[1]: -3000 in episode 7, step 40" in text
    glitch = data.normalizer()
    for key in ("action", "state"):
        for kind in ("scale", "offset"):
            name = f"{key}.{kind}"
            torch.testing.assert_close(glitch.to_arrays()[name], clean.to_arrays()[name])
    seen = glitch.normalize("action", torch.as_tensor(data.arrays.action))
    assert seen.abs().max() == 1
    assert glitch.normalize("state", torch.tensor([0.0, -3000.0, 0.0, 0.0]))[1] == -1
    assert clean.normalize("state", torch.tensor([0.0, -3.0, 0.0, 0.0]))[1] == -3  # not cut


def test_strict_makes_it_an_error(tmp_path: Path) -> None:
    store = write(tmp_path / "glitch.zarr", glitch=True)
    with pytest.raises(ConfigError, match=r"out of all bounds[\s\S]*leave out data\.strict"):
        load(store, strict="true")


def test_methods_by_key(tmp_path: Path) -> None:
    store = write(tmp_path / "s.zarr", glitch=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DataWarning)
        every = load(store, normalize="gaussian").normalizer()
        one = load(store, **{"normalize.action": "minmax"}).normalizer()
        quantile = load(store, normalize="quantile", clamp_actions="false").normalizer()
    action = ReplayBuffer.open(store).load("action")
    state = ReplayBuffer.open(store).load("state")
    plain = state[:, 2:]  # without a glitch
    found = every.normalize("state", torch.as_tensor(state))[:, 2:].numpy()
    np.testing.assert_allclose(found, (plain - plain.mean(0)) / plain.std(0), rtol=1e-4, atol=1e-4)
    assert one.limits("action")[1][0] == 5000
    assert float(one.normalize("action", torch.tensor([5000.0, 0.0]))[0]) == pytest.approx(1)
    for robust in (every, quantile):  # a glitch is no target, however the rest is scaled
        glitch = robust.normalize("action", torch.tensor([5000.0, 0.0]))[0]
        assert glitch == robust.normalize("action", torch.tensor([1.0, 0.0]))[0]
    low, high = map(float, np.percentile(action[:, 1], (1, 99)))
    ends = quantile.normalize("action", torch.tensor([[0.0, low], [0.0, high]]))[:, 1]
    torch.testing.assert_close(ends, torch.tensor([-1.0, 1.0]), atol=1e-5, rtol=0)


def test_actions_stay_in_the_range_that_was_seen(tmp_path: Path) -> None:
    store = write(tmp_path / "s.zarr")
    for clamp in (True, False):
        config = cmpolicy.compose(*words(store, clamp_actions=str(clamp).lower()), "net=tiny")
        policy = new_policy(config, load_training_data(config))
        actions = policy.infer({"state": np.zeros((64, 2, 4), np.float32)})
        assert (np.abs(actions).max() <= 1) == clamp


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("data.normalize=robust", "robust"),
        ("data.normalize.action=none", "none"),
        ("data.normalize.pose=minmax", "pose"),
    ],
)
def test_settings_that_cannot_be(tmp_path: Path, setting: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        cmpolicy.compose(*words(tmp_path), setting)


def test_the_summary_of_a_run(tmp_path: Path) -> None:
    data = load(write(tmp_path / "s.zarr"))
    assert data.summary == (
        "s.zarr: 20 episodes, 0 of them held out; training decides at 1060 of 1200 steps (88%), "
        "not at the last 7 of each episode, whose actions were not recorded"
    )


def test_episodes_of_several_tasks_are_told(tmp_path: Path) -> None:
    """A data set of two tasks trained one policy for both without a word."""
    store = write(tmp_path / "tasks.zarr")
    ReplayBuffer.open(store, "r+").update_attrs({"tasks": ["push", "lift it", "push", "push"] * 5})
    with pytest.warns(DataWarning, match=r"2 different things \('push' in 15, 'lift it' in 5\)"):
        load(store)
    with warnings.catch_warnings():
        warnings.simplefilter("error", DataWarning)
        load(store, episodes="[1,5,9]")
