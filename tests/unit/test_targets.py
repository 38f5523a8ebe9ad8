"""Targets: numbers of the demonstrations that features learn to tell and policies do not see."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

import cmpolicy
from cmpolicy.nn.target_head import TargetHead
from cmpolicy.schema import ConfigError
from cmpolicy.training.loader import DeviceLoader
from cmpolicy_data import ReplayBuffer, window_index
from cmpolicy_data.demonstrations import Demonstrations, load_demonstrations

N = 12


@pytest.fixture
def store(tmp_path: Path) -> Path:
    buffer = ReplayBuffer.create(tmp_path / "my.zarr")
    rng = np.random.default_rng(0)
    buffer.append_episode(
        {
            "top": rng.integers(0, 256, (N, 16, 16, 3), dtype=np.uint8),
            "state": np.arange(3 * N, dtype=np.float32).reshape(N, 3),
            "action": rng.normal(size=(N, 2)).astype(np.float32),
        }
    )
    return buffer.path


def test_loss_of_the_head_in_closed_form() -> None:
    head = TargetHead(2, (1, 3), weight=5.0)
    with torch.no_grad():
        head.read.weight.copy_(torch.tensor([[1.0, 0], [0, 1], [1, 1]]))
        head.read.bias.copy_(torch.tensor([0, 0, 1.0]))
    features = torch.tensor([[1.0, 2], [0, 0]], requires_grad=True)
    loss, error = head(features, torch.tensor([[[1.0, 0, 0]], [[0.0, 0, 1]]]))
    torch.testing.assert_close(loss, torch.tensor([5 * (0 + 2 + 4) / 3, 0]))
    torch.testing.assert_close(error, torch.tensor((4 + 16) / 6).sqrt())
    loss[0].backward()
    torch.testing.assert_close(features.grad[0], torch.tensor([5 / 3, 10 / 3]))  # type: ignore[index]


def _scaled(data: Demonstrations, rows: np.ndarray) -> np.ndarray:
    span = data.target_span(rows)
    assert span is not None
    return data.scaled_targets(span)


def test_targets_are_scaled_by_the_rows_that_train(store: Path) -> None:
    data = load_demonstrations(store, ["top"], targets={"pose": "state[1:]"})
    assert set(data.obs) == {"top"}
    assert set(data.targets) == {"pose"}
    scaled = _scaled(data, np.arange(2, 7))
    assert scaled.shape == (N, 2)
    np.testing.assert_allclose(scaled[[2, 4, 6]], [[-1, -1], [0, 0], [1, 1]])
    np.testing.assert_allclose(scaled[[7, 10]], [[1.5, 1.5], [2, 2]])  # cut
    one = _scaled(data, np.array([4]))  # a range of nothing
    np.testing.assert_allclose(one[[4, 5]], [[0, 0], [2, 2]])
    assert load_demonstrations(store, ["top"]).target_span(np.arange(3)) is None


def test_a_glitch_does_not_set_the_range_of_targets(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    state = rng.uniform(-1, 1, (500, 1)).astype(np.float32)
    state[77] = 1e6
    buffer = ReplayBuffer.create(tmp_path / "glitch.zarr")
    frames = np.zeros((500, 8, 8, 3), np.uint8)
    buffer.append_episode({"top": frames, "state": state, "action": np.zeros((500, 2), np.float32)})
    data = load_demonstrations(buffer.path, ["top"], targets=["state"])
    scaled = _scaled(data, np.arange(500))
    assert scaled[77] == 2
    others = np.arange(500) != 77
    np.testing.assert_allclose(scaled[others], state[others], atol=0.02)


def test_findings_look_at_targets(tmp_path: Path) -> None:
    """What looks healthy in a target and is not is said before training."""
    pose = np.linspace(0, 1, 500, dtype=np.float32)[:, None].copy()
    pose[77] = 1e6
    buffer = ReplayBuffer.create(tmp_path / "glitch.zarr")
    rng = np.random.default_rng(0)
    moving = {"arm": rng.normal(size=(500, 2)), "action": rng.normal(size=(500, 2))}
    buffer.append_episode({"pose": pose, **{k: v.astype(np.float32) for k, v in moving.items()}})
    config = cmpolicy.compose(
        "task=custom",
        f"data.path={buffer.path}",
        "data.obs=[arm]",
        "data.targets=[pose]",
        "data.strict=true",
        "control_hz=10",
    )
    with pytest.raises(ConfigError, match=r"pose\[0\]: .*1e\+06"):
        cmpolicy.train(config, tmp_path / "run")


def test_a_batch_has_the_targets_of_its_observations() -> None:
    windows = window_index([N], horizon=4, n_obs_steps=2, n_action_steps=2)
    targets = np.arange(N, dtype=np.float32)[:, None] * [1, 10]
    loader = DeviceLoader(
        {"step": np.arange(N, dtype=np.float32)[:, None]},
        np.zeros((N, 2), np.float32),
        windows,
        batch_size=8,
        seed=0,
        targets=targets.astype(np.float32),
    )
    batch = loader.batch(0)
    torch.testing.assert_close(batch["targets"][..., :1], batch["obs"]["step"])
    torch.testing.assert_close(batch["targets"][..., 1:], 10 * batch["obs"]["step"])


def test_mirrored_demonstrations_have_mirrored_targets(tmp_path: Path) -> None:
    buffer = ReplayBuffer.create(tmp_path / "pusht.zarr")
    state = np.tile(np.float32([100, 200, 256, 300, 0.5]), (N, 1))
    buffer.append_episode({"state": state, "action": state[:, :2]})
    data = load_demonstrations(
        buffer.path, {"agent": "state[:2]"}, augment=["mirror"], targets={"block": "state[2:4]"}
    )
    np.testing.assert_allclose(data.targets["block"][N], [512 - 300, 512 - 256])
    assert len(data.targets["block"]) == 2 * N


@pytest.mark.parametrize(
    ("targets", "message"),
    [
        (["top"], r"data.targets=\['top'\].*frames and keys of data.obs"),
        ({"arm": "state[2:]"}, r"data.targets=\['arm'\].*does not see"),
        (["pose"], "pose"),
    ],
)
def test_bad_targets(store: Path, targets: object, message: str) -> None:
    with pytest.raises((ValueError, KeyError), match=message):
        load_demonstrations(store, {"arm": "state[:2]"}, targets=targets)  # type: ignore[arg-type]


def test_targets_are_named_one_by_one_as_observations_are() -> None:
    words = ["task=custom", "data.obs.top=camera", "data.targets.pose='state[1:]'"]
    data = cmpolicy.compose(*words, "data.path=my.zarr", "control_hz=10").data
    assert (data.obs, data.targets) == ({"top": "camera"}, {"pose": "state[1:]"})
    words = ["task=lift_image", "data.path=my.zarr", "data.obs.agentview_image=front"]
    obs = cmpolicy.compose(*words).data.obs  # one name of a list replaced, the others kept
    assert obs["agentview_image"] == "front"
    assert obs["robot0_eef_pos"] == "robot0_eef_pos"


def test_bad_settings() -> None:
    words = ["task=custom", "data.path=x.zarr", "data.obs=[state]", "control_hz=10"]
    config = cmpolicy.compose(*words, "data.targets=[pose]")
    assert config.data.targets == {"pose": "pose"}
    assert cmpolicy.compose(*words, "data.targets={pose: null}").data.targets == {}
    for word, message in (
        ("data.targets=pose", r"data.targets=pose must be a list: data.targets=\[pose\]"),
        ("data.targets={pose: {kind: state}}", r"data.targets.pose=.* must be a selector"),
        ("target_weight=0", "target_weight=0 must be above 0|target_weight"),
    ):
        with pytest.raises(ConfigError, match=message):
            cmpolicy.compose(*words, word)
