"""What only a GPU can show; skipped where there is none."""

from pathlib import Path

import numpy as np
import pytest
import torch

from cmpolicy import ConsistencyPolicy
from cmpolicy.bench.gpu import _graphed
from cmpolicy.cli.main import main
from cmpolicy.cli.train import compose
from cmpolicy.experiment.train import resume, train
from cmpolicy.training.checkpoint import load_state

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no GPU"),
]
WORDS = [
    "net=tiny",
    "batch_size=64",
    "optim.warmup=0",
    "eval.episodes=0",
    "eval.windows=64",
    "log.trackers=[]",
    "log.every=64",
    "device=cuda",
]


def _inputs(policy: ConsistencyPolicy, batch: int = 4) -> tuple[dict[str, np.ndarray], np.ndarray]:
    rng = np.random.default_rng(0)
    obs = {
        key: (rng.random((batch, policy.n_obs_steps, *shape)) * 500).astype(np.float32)
        for key, shape in policy.spec.obs.items()
    }
    return obs, rng.standard_normal((batch, *policy.spec.noise_shape)).astype(np.float32)


@pytest.mark.parametrize("nfe", [1, 4])
def test_the_bundled_policy_gives_the_actions_of_the_cpu(nfe: int) -> None:
    on_cpu = ConsistencyPolicy.from_pretrained("pusht")
    on_gpu = ConsistencyPolicy.from_pretrained("pusht", "cuda")
    obs, noise = _inputs(on_cpu)
    expected = on_cpu.infer(obs, noise, nfe=nfe)
    np.testing.assert_allclose(on_gpu.infer(obs, noise, nfe=nfe), expected, rtol=0, atol=0.5)


def test_a_cuda_graph_gives_the_same_actions() -> None:
    policy = ConsistencyPolicy.from_pretrained("pusht", "cuda")
    obs, noise = _inputs(policy, 1)
    graphed = _graphed(policy, obs, noise, torch.device("cuda"))
    for _ in range(3):
        np.testing.assert_allclose(graphed(), policy.infer(obs, noise), rtol=0, atol=0.05)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_resumed_run_repeats_the_straight_one(tmp_path: Path, precision: str) -> None:
    config = compose(*WORDS, "examples=512", f"precision={precision}")
    train(config, tmp_path / "straight")
    train(config, tmp_path / "parts", until=256)
    resume(tmp_path / "parts")
    straight, parts = (load_state(tmp_path / name) for name in ("straight", "parts"))
    for name, value in straight.tensors.items():
        torch.testing.assert_close(parts.tensors[name], value, rtol=1e-4, atol=1e-5)


def test_steps_lower_the_loss_in_every_precision(tmp_path: Path) -> None:
    for precision in ("fp32", "bf16"):
        config = compose(*WORDS, "examples=12800", f"precision={precision}", "objective=fm")
        result = train(config, tmp_path / precision)
        assert result.metrics["loss_fm"] < 0.9


def test_training_by_the_command(tmp_path: Path) -> None:
    assert main(["train", *WORDS, "examples=128", f"out={tmp_path / 'run'}"]) == 0
    assert (tmp_path / "run" / "policy" / "config.json").is_file()
