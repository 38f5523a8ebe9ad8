"""Train on more camera frames than may be in memory; ``make attack`` takes 6.4 GiB of them."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from cmpolicy_data import ReplayBuffer

_GIB = 2**30
_SIZE = (240, 320, 3)
_CAMERAS = ("top", "wrist")


def _store(path: Path, episodes: int, steps: int) -> int:
    """Two cameras, 300 steps an episode; the bytes of the frames."""
    buffer = ReplayBuffer.create(path)
    rng = np.random.default_rng(0)
    for _ in range(episodes):
        coarse = rng.integers(0, 256, (len(_CAMERAS), steps, 30, 40, 3), dtype=np.uint8)
        frames = coarse.repeat(8, axis=2).repeat(8, axis=3)
        state = np.cumsum(rng.normal(size=(steps, 7)), axis=0).astype(np.float32)
        cameras = dict(zip(_CAMERAS, frames, strict=True))
        buffer.append_episode({**cameras, "state": state, "action": state})
    return episodes * steps * len(_CAMERAS) * int(np.prod(_SIZE))


def _own_memory(pid: int) -> int:
    """Bytes that a process holds itself; pages of a mapped file can be dropped at any time."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    found = [line for line in lines if line.startswith(("RssAnon", "RssShmem"))]
    return 1024 * sum(int(line.split()[1]) for line in found)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_training_on_frames_that_are_mapped(tmp_path: Path, attack_scale: int) -> None:
    whole = attack_scale >= 1000
    store = tmp_path / "two_cameras.zarr"
    size = _store(store, *((50, 300) if whole else (4, 150)))
    words = ["task=custom", f"data.path={store}", "control_hz=20", "encoder=compact", "net=tiny"]
    words += ["data.obs=[top,wrist,state]", f"data.image_memory={1.0 if whole else 0.01}"]
    words += [f"examples={512 if whole else 128}", "batch_size=64", "optim.warmup=0"]
    words += ["eval.windows=16", "device=cpu"]
    words += ["log.trackers=[]", f"out={tmp_path / 'run'}"]
    environment = {**os.environ, "XDG_CACHE_HOME": str(tmp_path / "cache")}
    process = subprocess.Popen([sys.executable, "-m", "cmpolicy", "train", *words], env=environment)
    peak = 0
    while process.poll() is None:
        try:
            peak = max(peak, _own_memory(process.pid))
        except FileNotFoundError:
            break
        time.sleep(0.05)
    assert process.wait() == 0
    mapped = list((tmp_path / "cache").rglob("*.npy"))
    assert sum(path.stat().st_size for path in mapped) >= size
    print(f"frames {size / _GIB:.2f} GiB, own memory of the training at most {peak / _GIB:.2f} GiB")
    assert 0.1 * _GIB < peak < 4 * _GIB
