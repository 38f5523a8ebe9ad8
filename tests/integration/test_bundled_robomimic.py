"""The Robomimic demonstrations and policies that come with the package."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from cmpolicy.cli.main import main as command
from cmpolicy_data import ReplayBuffer
from cmpolicy_data.catalog import bundled_path
from cmpolicy_data.validation import validate
from cmpolicy_eval.result import Result


def main(words: Sequence[str]) -> int:
    """``cmpolicy eval``."""
    return command(["eval", *words])


pytest.importorskip("robosuite")

EPISODES = {"lift": 200, "can": 200, "square": 400}


@pytest.mark.parametrize("task", EPISODES)
def test_demonstrations(task: str) -> None:
    path = bundled_path(task)
    assert path.stat().st_size <= 6_000_000
    assert validate(path) == []
    store = ReplayBuffer.open(path)
    assert store.n_episodes == EPISODES[task]
    assert (store.attrs["task"], store.attrs["actions"]) == (task, "delta")
    masks = store.attrs["masks"]
    assert sorted([*masks["train"], *masks["valid"]]) == list(range(store.n_episodes))
    action = store.load("action")
    assert action.shape == (store.n_steps, 7)
    assert np.abs(action).max() <= 1.0
    starts = store.load("robot0_eef_pos")[np.concatenate([[0], store.episode_ends[:-1]])]
    at_rest = np.linalg.norm(starts - np.median(starts, axis=0), axis=1) < 0.06
    least, most = (1.0, 1.0) if task == "lift" else (0.4, 0.7)
    assert least <= at_rest.mean() <= most


@pytest.mark.parametrize("task", EPISODES)
def test_policies_succeed_at_one_evaluation(task: str, tmp_path: Path) -> None:
    words = [f"policy={task}", "nfe=[1]", "seeds=500000-500003", "workers=2", f"out={tmp_path}"]
    assert main(words) == 0
    result = Result.load(tmp_path / "result_nfe1.json")
    # of four, since rounding differs between machines
    assert result.success_rate >= 0.5
