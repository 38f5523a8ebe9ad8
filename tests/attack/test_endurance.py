"""Kill a training again and again, damage bundles at random, run a loop for long.

The suite does little of each; ``make attack`` kills 500 times, damages 10,000 bundles and runs for
an hour.
"""

from __future__ import annotations

import json
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import numpy as np
import psutil
import torch

from cmpolicy.bench.loop import LoopSettings, measure_loop
from cmpolicy.nn.unet1d import UNet1DConfig
from cmpolicy.normalize import Normalizer
from cmpolicy.observation import NonFiniteActionError
from cmpolicy.policy.bundle import BundleError
from cmpolicy.policy.policy import ConsistencyPolicy
from cmpolicy.spec import PolicySpec
from cmpolicy.training.trackers import read_log
from cmpolicy_data import ReplayBuffer

_EXAMPLES_PER_KILL = 128
_GROWTH = 5.0  # MiB of resident memory in a loop that has settled


def _tiny(shape: tuple[int, ...] = (2,)) -> ConsistencyPolicy:
    torch.manual_seed(0)
    spec = PolicySpec({"x": shape}, action_dim=2, horizon=8, n_obs_steps=1, n_action_steps=4)
    data = {"x": np.random.default_rng(0).normal(size=(9, *shape))}
    actions = np.random.default_rng(1).normal(size=(9, 2))
    normalizer = Normalizer.fit({**data, "action": actions})
    net = UNet1DConfig((8, 16), kernel_size=3, n_groups=4, time_dim=8)
    return ConsistencyPolicy(spec, net, normalizer).eval()


def _damage(content: bytes, rng: np.random.Generator) -> bytes:
    """One of: a flipped bit, a cut, a run of zeros, bytes put in."""
    if not content:
        return b"\0"
    at = int(rng.integers(len(content)))
    kind = int(rng.integers(4))
    if kind == 0:
        return content[:at] + bytes([content[at] ^ (1 << int(rng.integers(8)))]) + content[at + 1 :]
    if kind == 1:
        return content[:at]
    if kind == 2:
        length = int(rng.integers(1, 64))
        return content[:at] + bytes(min(length, len(content) - at)) + content[at + length :]
    return content[:at] + rng.bytes(int(rng.integers(1, 16))) + content[at:]


def test_damaged_bundles_are_refused_or_right(tmp_path: Path, attack_scale: int) -> None:
    """Never another error, never other weights, never actions that are not finite."""
    rng, policy = np.random.default_rng(0), _tiny()
    folder = tmp_path / "bundle"
    policy.save_pretrained(folder)
    files = [folder / n for n in ("config.json", "model.safetensors", "normalizer.safetensors")]
    obs, noise = {"x": np.zeros((2, 1, 2), np.float32)}, np.ones((2, 8, 2), np.float32)
    outcomes: Counter[str] = Counter()
    process = psutil.Process()
    before = process.memory_info().rss
    for _ in range(10 * attack_scale):
        file = files[int(rng.choice(3, p=[0.8, 0.1, 0.1]))]
        whole = file.read_bytes()
        file.write_bytes(_damage(whole, rng))
        try:
            loaded = ConsistencyPolicy.from_pretrained(folder)
            for name, value in policy.state_dict().items():
                assert torch.equal(loaded.state_dict()[name], value), name
            if loaded.spec == policy.spec:
                assert np.isfinite(loaded.infer(obs, noise)).all()
            outcomes["loaded"] += 1
        except BundleError:
            outcomes["refused"] += 1
        except NonFiniteActionError:
            outcomes["not finite"] += 1
        file.write_bytes(whole)
    growth = (process.memory_info().rss - before) / 2**20
    print(f"{outcomes.total()} damaged bundles: {dict(outcomes)}, memory grew by {growth:.0f} MiB")
    assert outcomes["refused"] > outcomes["loaded"]
    assert growth < 500
    assert json.loads((folder / "config.json").read_text())


def test_killed_trainings_end_as_if_never_killed(tmp_path: Path, attack_scale: int) -> None:
    """SIGKILL at random moments; then the log, and the weights to the bit, of a whole run."""
    kills = 2 * min(attack_scale, 250)
    buffer = ReplayBuffer.create(tmp_path / "data.zarr")
    for k in range(3):
        steps = np.random.default_rng(k).normal(size=(30, 2)).astype(np.float32)
        buffer.append_episode({"state": steps, "action": steps})
    words = ["task=custom", f"data.path={buffer.path}", "data.obs=[state]", "control_hz=10"]
    words += ["net.down_dims=[8,16]", "net.time_dim=8", "encoder.dim=8", "batch_size=16"]
    words += ["optim.warmup=0", "log.trackers=[]", "log.every=32", "save_every=64"]
    total = _EXAMPLES_PER_KILL * kills
    words += [f"examples={total}", f"eval.every={total}"]

    def command(run: Path) -> list[str]:
        goes_on = (run / "training_state" / "state.safetensors").exists()
        own = [f"resume={run}"] if goes_on else [*words, f"out={run}"]
        return [sys.executable, "-m", "cmpolicy", "train", *own]

    choose, killed, run = random.Random(0), 0, tmp_path / "killed"
    while killed < kills:
        size = _log_size(run)
        process = subprocess.Popen(
            command(run), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
        )
        while _log_size(run) <= size and process.poll() is None:
            time.sleep(0.01)
        time.sleep(choose.uniform(0.0, 0.3))
        if process.poll() is not None:
            assert process.returncode == 0, process.stderr and process.stderr.read()
            break
        process.send_signal(signal.SIGKILL)
        process.communicate()
        killed += 1
    subprocess.run(command(run), check=True, stdout=subprocess.DEVNULL)
    whole = tmp_path / "whole"
    subprocess.run(command(whole), check=True, stdout=subprocess.DEVNULL)
    print(f"{killed} kills of one training")
    assert killed > 0
    timing = ("seconds", "examples_per_s")
    logs = [
        [{k: v for k, v in entry.items() if k not in timing} for entry in read_log(folder)]
        for folder in (run, whole)
    ]
    assert logs[0] == logs[1]
    weights = [
        ConsistencyPolicy.from_pretrained(folder / "policy_last").state_dict()
        for folder in (run, whole)
    ]
    for name, value in weights[0].items():
        assert torch.equal(value, weights[1][name]), name


def _log_size(run: Path) -> int:
    log = run / "log.jsonl"
    return log.stat().st_size if log.exists() else 0


def test_a_long_session_does_not_grow(tmp_path: Path, attack_scale: int) -> None:
    """A control loop of 100 Hz: three seconds and a half here, an hour in ``make attack``.

    Synchronous, so that a machine with other work is late but never without an action.
    """
    _tiny().save_pretrained(tmp_path / "policy")
    seconds = 3.6 * min(attack_scale, 1000)
    settings = LoopSettings(policy=str(tmp_path / "policy"), mode="sync", hz=100, seconds=seconds)
    report = measure_loop(settings)
    growth = report.summary["rss_growth_mib"]
    print(f"{seconds:.0f} s at 100 Hz: {report.table()}")
    assert "stopped by: completed" in report.closing
    assert growth < _GROWTH
