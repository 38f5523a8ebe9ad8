"""The mirror symmetry of Push-T, on arrays."""

from pathlib import Path

import gymnasium
import numpy as np
import pytest

from cmpolicy_data import ReplayBuffer
from cmpolicy_data.augment import (
    AugmentError,
    Episodes,
    augment,
    mirror_keypoints,
    mirror_points,
    mirror_pusht,
    mirror_state,
)
from cmpolicy_data.convert.recentre import move, recentre_pusht
from cmpolicy_data.generate.tee import Pose
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


def mirror(data, ends=ENDS):
    return mirror_pusht(Episodes(data, ends, np.arange(len(ends))))


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
    once = mirror(DATA).data
    images = {key: value[50:] for key, value in once.items()}
    twice = {key: value[50:] for key, value in mirror(images).data.items()}
    for key in ("action", "keypoint"):
        assert np.abs(twice[key] - DATA[key]).max() < 1e-3
    assert np.abs(twice["state"][:, :4] - STATE[:, :4]).max() < 1e-3
    assert angle_difference(twice["state"][:, 4], STATE[:, 4]).max() < 1e-5


def test_the_originals_come_first_and_the_episodes_double():
    mirrored = mirror(DATA)
    assert mirrored.source.tolist() == [0, 1, 0, 1]
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
    mirrored = mirror(data, buffer.episode_ends).data
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
        ({"img": np.ones((50, 4, 4, 3), np.float32)}, r"knows.*got \['action', 'img'"),
        ({"state": np.ones((50, 7), np.float32)}, r"'state' as floats of shape \(50, 5\), got"),
        ({"keypoint": np.ones((50, 8, 2), np.float32)}, r"'keypoint' as floats.*not Push-T"),
        ({"action": np.ones((50, 2), np.int64)}, "'action' as floats.*int64"),
    ],
)
def test_other_data_is_refused(change, message):
    with pytest.raises(AugmentError, match=message):
        mirror({**DATA, **change})


def test_the_pose_is_needed():
    with pytest.raises(AugmentError, match="needs the Push-T key 'state'"):
        mirror({"action": DATA["action"]})


def test_unknown_augmentations():
    with pytest.raises(AugmentError, match=r"unknown augmentation 'rotate'.*recentre, mirror"):
        augment(Episodes(DATA, ENDS, np.arange(2)), "rotate")


# -- recentre -------------------------------------------------------------------------------------


def some_human(store: Path, count: int = 12) -> Episodes:
    buffer = ReplayBuffer.open(store)
    ends = buffer.episode_ends[:count]
    data = {key: buffer.load(key)[: ends[-1]] for key in ("state", "action", "keypoint")}
    return Episodes(data, ends, np.arange(count))


def test_a_rigid_motion_keeps_distances_and_takes_one_pose_to_the_other():
    origin, target = Pose(200.0, 300.0, 1.0), Pose(256.0, 256.0, np.pi / 4)
    moved = move(DATA, origin, target)
    there = move({"state": np.array([[1.0, 2.0, 200.0, 300.0, 1.0]])}, origin, target)["state"]
    assert there[0, 2:] == pytest.approx([256, 256, np.pi / 4])
    for a, b in (("state", slice(0, 2)), ("action", slice(None))):
        before = np.linalg.norm(DATA[a][:, b] - DATA["state"][:, 2:4], axis=1)
        after = np.linalg.norm(moved[a][:, b] - moved["state"][:, 2:4], axis=1)
        assert np.abs(before - after).max() < 1e-3
    pose = moved["state"]
    expected = keypoints_from_pose(pose[:, 2:4], pose[:, 4])
    assert np.abs(moved["keypoint"] - expected).max() < 1e-3
    back = move(moved, target, origin)
    assert np.abs(back["action"] - DATA["action"]).max() < 1e-3


@pytest.mark.filterwarnings("ignore:recentre")
def test_recentred_episodes_end_on_the_goal_when_replayed(pusht_human: Path):
    episodes = recentre_pusht(some_human(pusht_human))
    env = gymnasium.make("cmpolicy/PushT-v0")
    env.reset(seed=0)
    lengths = np.diff(episodes.episode_ends, prepend=0)
    for start, end in zip(episodes.episode_ends - lengths, episodes.episode_ends, strict=True):
        env.unwrapped.set_pose(episodes.data["state"][start])
        for action in episodes.data["action"][start:end]:
            info = env.step(action)[4]
        off = np.hypot(*(info["state"][2:4] - 256))
        turn = np.degrees(angle_difference(info["state"][4], np.pi / 4))
        assert off < 0.75
        assert turn < 0.25
        assert info["coverage"] > 0.95
    env.close()


@pytest.mark.filterwarnings("ignore:recentre")
def test_recentring_and_mirroring_go_in_either_order(pusht_human: Path):
    episodes = some_human(pusht_human, 3)
    first, second = (
        mirror_pusht(recentre_pusht(episodes)),
        recentre_pusht(mirror_pusht(episodes)),
    )
    assert first.episode_ends.tolist() == second.episode_ends.tolist()
    for key in ("action", "keypoint"):
        assert np.abs(first.data[key] - second.data[key]).max() < 0.5
    assert first.source.tolist() == [0, 1, 2, 0, 1, 2]
