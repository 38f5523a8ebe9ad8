"""The mirror symmetry of Push-T, on arrays."""

from pathlib import Path

import numpy as np
import pytest

from cmpolicy_data import ReplayBuffer
from cmpolicy_data.augment import (
    AugmentError,
    mirror_keypoints,
    mirror_points,
    mirror_pusht,
    mirror_state,
)
from cmpolicy_envs import keypoints_from_pose

RNG = np.random.default_rng(0)
STATE = np.column_stack([RNG.uniform(20, 490, (50, 4)), RNG.uniform(0, 2 * np.pi, 50)]).astype(
    np.float32
)
DATA = {
    "state": STATE,
    "action": RNG.uniform(0, 512, (50, 2)).astype(np.float32),
    "keypoint": keypoints_from_pose(STATE[:, 2:4], STATE[:, 4]).astype(np.float32),
}
ENDS = np.array([20, 50])


def angle_difference(a, b):
    return np.abs((a - b + np.pi) % (2 * np.pi) - np.pi)


def test_points_reflect_across_the_line_through_the_goal():
    points = np.array([[100.0, 30.0], [256.0, 256.0], [0.0, 512.0]])
    assert mirror_points(points).tolist() == [[482, 412], [256, 256], [0, 512]]


def test_the_goal_is_its_own_mirror_image():
    goal = np.array([10.0, 502.0, 256.0, 256.0, np.pi / 4])
    assert mirror_state(goal) == pytest.approx(goal)


def test_keypoints_are_those_of_the_mirrored_pose():
    image = mirror_state(STATE)
    expected = keypoints_from_pose(image[:, 2:4], image[:, 4])
    assert np.abs(mirror_keypoints(DATA["keypoint"], STATE) - expected).max() < 1e-3


def test_mirroring_twice_changes_nothing():
    once = mirror_pusht(DATA, ENDS).data
    images = {key: value[50:] for key, value in once.items()}
    twice = {key: value[50:] for key, value in mirror_pusht(images, ENDS).data.items()}
    for key in ("action", "keypoint"):
        assert np.abs(twice[key] - DATA[key]).max() < 1e-3
    assert np.abs(twice["state"][:, :4] - STATE[:, :4]).max() < 1e-3
    assert angle_difference(twice["state"][:, 4], STATE[:, 4]).max() < 1e-5


def test_the_originals_come_first_and_the_episodes_double():
    mirrored = mirror_pusht(DATA, ENDS)
    assert mirrored.episode_ends.tolist() == [20, 50, 70, 100]
    for key, value in DATA.items():
        assert mirrored.data[key].shape == (100, *value.shape[1:])
        assert mirrored.data[key].dtype == np.float32
        assert mirrored.data[key][:50].tolist() == value.tolist()
    angles = mirrored.data["state"][:, 4]
    assert ((angles >= 0) & (angles <= 2 * np.pi + 1e-6)).all()


def test_the_human_demonstrations_mirror_to_what_the_environment_reports(pusht_human: Path):
    buffer = ReplayBuffer.open(pusht_human)
    data = {key: buffer.load(key) for key in ("state", "keypoint")}
    n_steps = buffer.n_steps
    mirrored = mirror_pusht(data, buffer.episode_ends).data
    state, keypoint = mirrored["state"][n_steps:], mirrored["keypoint"][n_steps:]
    error = np.abs(keypoint - keypoints_from_pose(state[:, 2:4], state[:, 4])).max(axis=(1, 2))
    recorded = np.abs(
        data["keypoint"] - keypoints_from_pose(data["state"][:, 2:4], data["state"][:, 4])
    ).max(axis=(1, 2))
    # As good as the recording itself, whose keypoints in a few steps lag the pose by up to 2 px.
    assert (error <= 1.5 * recorded + 1e-3).all()
    assert np.median(error) < 1e-3


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"img": np.ones((50, 4, 4, 3), np.float32)}, r"can mirror.*got \['action', 'img'"),
        ({"state": np.ones((50, 7), np.float32)}, r"'state' as floats of shape \(50, 5\), got"),
        ({"keypoint": np.ones((50, 8, 2), np.float32)}, r"'keypoint' as floats.*not Push-T"),
        ({"action": np.ones((50, 2), np.int64)}, "'action' as floats.*int64"),
    ],
)
def test_other_data_is_refused(change, message):
    with pytest.raises(AugmentError, match=message):
        mirror_pusht({**DATA, **change}, ENDS)


def test_the_pose_is_needed():
    with pytest.raises(AugmentError, match="needs the Push-T key 'state'"):
        mirror_pusht({"action": DATA["action"]}, ENDS)
