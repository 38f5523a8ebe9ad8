"""robomimic's own loader and our windows agree on what one training sample is."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cmpolicy_data import load_demonstrations, window_index
from cmpolicy_data.convert.robomimic import convert
from cmpolicy_envs.rotations import canonical_quat

pytest.importorskip("robomimic")

OBS = ["object", "robot0_eef_pos", "robot0_eef_quat", "robot0_gripper_qpos"]


@pytest.fixture(scope="module")
def files(
    tmp_path_factory: pytest.TempPathFactory, write_robomimic: Callable[..., Path]
) -> tuple[Path, Path]:
    """A robomimic file whose demonstrations go past demo_9, and its conversion."""
    folder = tmp_path_factory.mktemp("sequences")
    lengths = [11, 20, 9, 13, 10, 12, 17, 9, 10, 11, 16, 21]
    source = write_robomimic(folder / "demos.hdf5", lengths=lengths, seed=3)
    convert(source, folder / "all.zarr")
    convert(source, folder / "train.zarr", filter_key="train")
    return source, folder


def sequences(source: Path, filter_key: str | None, **settings: Any) -> Any:
    from robomimic.utils import obs_utils
    from robomimic.utils.dataset import SequenceDataset

    obs_utils.initialize_obs_utils_with_obs_specs({"obs": {"low_dim": OBS}})
    return SequenceDataset(
        hdf5_path=str(source),
        obs_keys=OBS,
        dataset_keys=["actions", "states"],
        get_pad_mask=True,
        filter_by_attribute=filter_key,
        load_next_obs=False,
        hdf5_cache_mode=None,
        hdf5_use_swmr=False,
        **settings,
    )


@pytest.mark.parametrize("filter_key", [None, "train"])
@pytest.mark.parametrize(
    ("n_obs_steps", "horizon", "n_action_steps"),
    [(2, 16, 15), (1, 4, 4), (3, 8, 6), (1, 1, 1)],
)
def test_every_sample_is_the_same(
    files: tuple[Path, Path],
    filter_key: str | None,
    n_obs_steps: int,
    horizon: int,
    n_action_steps: int,
):
    source, folder = files
    # robomimic anchors a sample at every step of a demonstration. So do we, if all actions from
    # the anchor on are executed: T = To - 1 + Ta.
    data = sequences(
        source, filter_key, frame_stack=n_obs_steps, seq_length=horizon - n_obs_steps + 1
    )
    ours = load_demonstrations(folder / f"{filter_key or 'all'}.zarr", OBS)
    windows = window_index(
        ours.episode_ends,
        horizon=horizon,
        n_obs_steps=n_obs_steps,
        n_action_steps=n_action_steps,
    )
    assert len(data) == len(windows) > 100
    for i in range(len(windows)):
        sample = data[i]
        np.testing.assert_array_equal(
            sample["actions"].astype(np.float32), ours.action[windows.action[i]]
        )
        np.testing.assert_array_equal(~sample["pad_mask"][:, 0], windows.action_is_pad[i])
        for key in OBS:
            theirs = sample["obs"][key][:n_obs_steps]
            if key == "robot0_eef_quat":
                theirs = canonical_quat(theirs)
            np.testing.assert_array_equal(
                theirs.astype(np.float32), ours.obs[key][windows.obs[i]], err_msg=f"{key} {i}"
            )


def test_with_fewer_executed_actions_ours_are_the_first_of_each_demonstration(
    files: tuple[Path, Path],
):
    """Then the last anchors of a demonstration, of which too little is left, are no samples."""
    source, folder = files
    data = sequences(source, None, frame_stack=2, seq_length=7)
    ours = load_demonstrations(folder / "all.zarr", OBS)
    windows = window_index(ours.episode_ends, horizon=8, n_obs_steps=2, n_action_steps=4)
    starts = np.concatenate([[0], ours.episode_ends[:-1]])
    anchors = windows.obs[:, -1]  # a row, which in robomimic's order is the number of the sample
    for episode, start in enumerate(starts):
        mine = anchors[windows.episode == episode]
        np.testing.assert_array_equal(mine, start + np.arange(len(mine)))
        assert start + len(mine) == ours.episode_ends[episode] - (8 - 1 - 4)
    for i, anchor in enumerate(anchors):
        np.testing.assert_array_equal(
            data[int(anchor)]["actions"].astype(np.float32), ours.action[windows.action[i]]
        )
