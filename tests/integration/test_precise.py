"""Observations that single precision does not resolve: metres on a map, centimetres apart."""

from __future__ import annotations

import copy
from pathlib import Path

import numpy as np
import pytest
import torch

import cmpolicy
from cmpolicy import ConsistencyPolicy, PolicyServer, RemotePolicy
from cmpolicy.experiment.data import load_training_data
from cmpolicy.experiment.train import new_policy
from cmpolicy.export.write import export_policy
from cmpolicy_data import ReplayBuffer

FAR = np.array([5_412_345.0, 691_234.0])


def write(path: Path, origin: np.ndarray) -> Path:
    buffer = ReplayBuffer.create(path)
    for seed in range(3):
        near = np.cumsum(np.random.default_rng(seed).uniform(-0.02, 0.02, (40, 2)), axis=0)
        buffer.append_episode({"gps": origin + near, "action": near})
    return path


def settings(path: Path) -> cmpolicy.experiment.config.TrainConfig:
    return cmpolicy.compose(
        "task=custom",
        f"data.path={path}",
        "data.obs=[gps]",
        "control_hz=10",
        "net.down_dims=[8,16]",
        "net.time_dim=8",
        "encoder.dim=8",
        "examples=128",
        "batch_size=16",
        "optim.warmup=0",
        "log.trackers=[]",
        "eval.every=64",
    )


@pytest.fixture(scope="module")
def stores(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("stores")
    return write(folder / "near.zarr", np.zeros(2)), write(folder / "far.zarr", FAR)


@pytest.fixture(scope="module")
def far(stores: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> ConsistencyPolicy:
    run = tmp_path_factory.mktemp("runs") / "far"
    policy = cmpolicy.train(settings(stores[1]), run).load_policy()
    torch.manual_seed(0)
    for name, p in policy.net.named_parameters():
        if name.startswith("head"):
            torch.nn.init.normal_(p, std=0.2)
    return policy


def test_far_away_is_the_same_as_near(stores: tuple[Path, Path]) -> None:
    """What the network sees does not depend on where the origin of the map is."""
    seen = []
    for store, origin in zip(stores, (np.zeros(2), FAR), strict=True):
        config = settings(store)
        data = load_training_data(config)
        policy = new_policy(config, data)
        assert policy.spec.precise == (("gps",) if origin.any() else ())
        near = np.cumsum(np.random.default_rng(0).uniform(-0.02, 0.02, (40, 2)), axis=0)
        seen.append(policy.normalizer.normalize("gps", torch.as_tensor(origin + near)).float())
    torch.testing.assert_close(seen[0], seen[1], atol=1e-4, rtol=0)
    assert seen[0].std() > 0.1


def test_every_way_to_the_policy_keeps_the_precision(
    far: ConsistencyPolicy, tmp_path: Path
) -> None:
    rng = np.random.default_rng(0)
    obs = {"gps": FAR + rng.uniform(-0.05, 0.05, (4, 2, 2))}
    noise = rng.standard_normal((4, *far.spec.noise_shape), dtype=np.float32)
    expected = far.infer(obs, noise)
    assert np.ptp(expected, axis=0).max() > 1e-4
    moved = far.infer({"gps": obs["gps"] + 0.01}, noise)  # a centimetre
    assert np.abs(moved - expected).max() > 1e-5
    assert expected.dtype == np.float32
    with PolicyServer(far, port=0) as server, RemotePolicy(server.address) as remote:
        np.testing.assert_allclose(remote.infer(obs, noise), expected, rtol=1e-4, atol=1e-6)
    path = tmp_path / "p.onnx"
    export_policy(far, path, format="onnx")
    exported = cmpolicy.OnnxPolicy(path).infer(obs, noise)
    np.testing.assert_allclose(exported, expected, rtol=1e-4, atol=1e-5)
    far.save_pretrained(tmp_path / "again", weights_dtype=torch.float16)
    again = ConsistencyPolicy.from_pretrained(tmp_path / "again")
    assert again.spec == far.spec
    np.testing.assert_array_equal(
        again.normalizer.to_arrays()["gps.origin"], far.normalizer.to_arrays()["gps.origin"]
    )


def test_other_precisions_of_the_network_keep_the_origin(far: ConsistencyPolicy) -> None:
    origin = far.normalizer.to_arrays()["gps.origin"]
    assert origin.dtype is torch.float64
    small = copy.deepcopy(far).to(torch.bfloat16)
    assert torch.equal(small.normalizer.to_arrays()["gps.origin"], origin)


def test_a_resumed_run_keeps_the_origin(stores: tuple[Path, Path], tmp_path: Path) -> None:
    straight = cmpolicy.train(settings(stores[1]), tmp_path / "a").load_policy()
    cmpolicy.train(settings(stores[1]), tmp_path / "b", until=64)
    resumed = cmpolicy.resume(tmp_path / "b").load_policy()
    for key, value in straight.normalizer.to_arrays().items():
        assert torch.equal(resumed.normalizer.to_arrays()[key], value), key
    for name, value in straight.net.state_dict().items():
        assert torch.equal(resumed.net.state_dict()[name], value), name
