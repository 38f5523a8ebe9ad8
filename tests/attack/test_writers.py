"""Several writers, flipped bits and impossible files: nothing is lost, nothing wrong is loaded."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from cmpolicy import ConsistencyPolicy
from cmpolicy.files import InUseError, only_writer
from cmpolicy.nn.unet1d import UNet1DConfig
from cmpolicy.normalize import Normalizer
from cmpolicy.observation import NonFiniteActionError
from cmpolicy.policy.bundle import BundleError
from cmpolicy.spec import PolicySpec
from cmpolicy.training.checkpoint import CheckpointError, TrainingState, load_state, save_state
from cmpolicy_data import ReplayBuffer
from cmpolicy_data.chunks import ReplayBufferError
from cmpolicy_data.store import only_writer as only_appender

_APPEND = """
import sys
import numpy as np
from cmpolicy_data import ReplayBuffer
buffer = ReplayBuffer.open(sys.argv[1], "r+")
print("open", flush=True)
sys.stdin.readline()
for k in range(int(sys.argv[3])):
    buffer.append_episode({"action": np.full((3, 1), 1000 * int(sys.argv[2]) + k, np.float32)})
"""


def test_two_appenders_lose_no_episode(tmp_path: Path, attack_scale: int) -> None:
    """Hardening: 10 of 10 lost some."""
    path = tmp_path / "store.zarr"
    first = np.full((3, 1), -1, np.float32)
    ReplayBuffer.create(path).append_episode({"action": first})
    count = 15 * min(attack_scale, 20)
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", _APPEND, str(path), str(number), str(count)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        for number in (1, 2)
    ]
    for process in processes:  # both have read the store before one writes
        assert process.stdout is not None
        assert process.stdout.readline() == "open\n"
    for process in processes:
        assert process.stdin is not None
        process.stdin.write("go\n")
        process.stdin.flush()
    assert [process.wait(timeout=300) for process in processes] == [0, 0]
    buffer = ReplayBuffer.open(path)
    found = buffer.load("action")[:, 0].reshape(-1, 3)
    assert (found == found[:, :1]).all()
    expected = {-1, *(1000 * n + k for n in (1, 2) for k in range(count))}
    assert set(found[:, 0].astype(int)) == expected
    assert buffer.n_episodes == len(expected)
    print(f"{2 * count} episodes by two appenders, none lost")


def test_a_store_that_is_being_written_names_the_writer(tmp_path: Path) -> None:
    path = ReplayBuffer.create(tmp_path / "store.zarr").path
    with only_appender(path):
        begin = pytest.raises(ReplayBufferError, match=r"Cannot append to .*: process \d+ is")
        with begin, only_appender(path, patience=0.05):
            pass
    with only_appender(path):
        pass


def test_two_processes_in_one_run_folder(tmp_path: Path) -> None:
    """Hardening: both ended well, with a doubled log (8 of 10)."""
    code = (
        "import sys, pathlib\nfrom cmpolicy.files import only_writer\n"
        "with only_writer(pathlib.Path(sys.argv[1]), 'the run in'):\n"
        "    print('in', flush=True); sys.stdin.read()"
    )
    other = subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert other.stdout is not None
    assert other.stdout.readline() == "in\n"
    with (
        pytest.raises(InUseError, match=f"the run in {tmp_path} is in use by process {other.pid}"),
        only_writer(tmp_path, "the run in"),
    ):
        pass
    other.kill()
    other.communicate()
    with only_writer(tmp_path, "the run in"):  # the system gave it back
        pass


def test_a_flipped_bit_in_the_training_state_is_found(tmp_path: Path, attack_scale: int) -> None:
    """Hardening: 22 of 25 trained on to other results."""
    rng = np.random.default_rng(0)
    tensors = {
        "model/w": torch.randn(50, 7),
        "optim/0/step": torch.tensor(3),
        "rng/cpu": torch.arange(9),
    }
    state = TrainingState(tensors, {"examples": 128, "best": None})
    file = save_state(tmp_path, state)
    assert load_state(tmp_path).values == state.values
    whole = file.read_bytes()
    header = range(8 + int.from_bytes(whole[:8], "little"))  # each of its bytes, the others at will
    others = rng.integers(len(whole), size=25 * min(attack_scale, 100))
    for at in (*header, *others.tolist()):
        broken = bytearray(whole)
        broken[at] ^= 1 << int(rng.integers(8))
        file.write_bytes(broken)
        with pytest.raises(CheckpointError):
            load_state(tmp_path)
    print(f"{len(header) + len(others)} flipped bits of a training state, all found")
    file.write_bytes(whole)
    load_state(tmp_path)


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    spec = PolicySpec({"x": (2,)}, action_dim=2, horizon=8, n_obs_steps=1, n_action_steps=4)
    data = {"x": np.random.default_rng(0).normal(size=(9, 2))}
    normalizer = Normalizer.fit({**data, "action": data["x"]})
    net = UNet1DConfig((8, 16), kernel_size=3, n_groups=4, time_dim=8)
    policy = ConsistencyPolicy(spec, net, normalizer)
    policy.control_hz = 10.0
    policy.save_pretrained(tmp_path / "bundle")
    return tmp_path / "bundle"


def _rewrite(bundle: Path, name: str, change: Any) -> None:
    """Change the tensors of a file, and its checksum with them."""
    import hashlib

    tensors = load_file(bundle / name)
    change(tensors)
    save_file(tensors, bundle / name)
    config = json.loads((bundle / "config.json").read_text())
    config["sha256"][name] = hashlib.sha256((bundle / name).read_bytes()).hexdigest()
    (bundle / "config.json").write_text(json.dumps(config))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), True])
def test_weights_that_cannot_be(bundle: Path, value: Any) -> None:
    def change(tensors: dict[str, torch.Tensor]) -> None:
        name = next(name for name in tensors if name.endswith("weight"))
        if value is True:
            tensors[name] = torch.ones(tensors[name].shape, dtype=torch.bool)
        else:
            tensors[name].view(-1)[3] = value

    _rewrite(bundle, "model.safetensors", change)
    with pytest.raises(BundleError, match=r"weight .*(not finite|bool)"):
        ConsistencyPolicy.from_pretrained(bundle)


@pytest.mark.parametrize("scale", [1e38, float("nan")])
def test_normaliser_that_cannot_be(bundle: Path, scale: float) -> None:
    _rewrite(bundle, "normalizer.safetensors", lambda t: t["action.scale"].fill_(scale))
    with pytest.raises(BundleError, match=r"normaliser entry 'action' holds (numbers|non-finite)"):
        ConsistencyPolicy.from_pretrained(bundle)


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        ("noise_scale", float("nan"), "noise_scale=nan"),
        ("noise_scale", -1, "noise_scale=-1"),
        ("control_hz", -5, "control_hz=-5"),
        ("control_hz", float("inf"), "control_hz=inf"),
        ("nfe", 0, "nfe=0"),
        ("nfe", 10**9, "nfe=1000000000"),
        ("nfe", [1], "nfe"),
        ("spec", "x", "spec"),
        ("net", None, "net"),
    ],
)
def test_settings_that_cannot_be(bundle: Path, key: str, value: Any, words: str) -> None:
    file = bundle / "config.json"
    config = json.loads(file.read_text())
    config[key] = value
    file.write_text(json.dumps(config))
    with pytest.raises(BundleError, match=words):
        ConsistencyPolicy.from_pretrained(bundle)


def test_a_giant_network_is_not_built(bundle: Path) -> None:
    """Hardening: 8.9 GB were allocated before the stored tensors were looked at."""
    file = bundle / "config.json"
    config = json.loads(file.read_text())
    config["net"]["down_dims"] = [40_000, 80_000]
    file.write_text(json.dumps(config))
    with pytest.raises(BundleError, match="do not fit together"):
        ConsistencyPolicy.from_pretrained(bundle)


def test_actions_are_finite_or_an_error(bundle: Path) -> None:
    policy = ConsistencyPolicy.from_pretrained(bundle)
    with torch.no_grad():
        for parameter in policy.net.parameters():
            parameter.fill_(1e30)
    with pytest.raises(NonFiniteActionError, match="not finite"):
        policy.infer({"x": np.ones((1, 1, 2), np.float32)})
