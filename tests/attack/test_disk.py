"""Writers that are killed, readers beside them, and full disks: what was saved stays whole."""

from __future__ import annotations

import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

import cmpolicy
from cmpolicy import ConsistencyPolicy
from cmpolicy.cli.main import main
from cmpolicy.nn.unet1d import UNet1DConfig
from cmpolicy.normalize import Normalizer
from cmpolicy.spec import PolicySpec
from cmpolicy.training.trackers import read_log
from cmpolicy_data import ReplayBuffer
from cmpolicy_data.chunks import ReplayBufferError

_WRITER = """
import sys
from pathlib import Path
from cmpolicy import ConsistencyPolicy
policy = ConsistencyPolicy.from_pretrained(sys.argv[1])
print("ready", flush=True)
while True:
    policy.save_pretrained(sys.argv[2])
"""


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    spec = PolicySpec({"x": (2,)}, action_dim=2, horizon=8, n_obs_steps=1, n_action_steps=4)
    data = {"x": np.random.default_rng(0).normal(size=(9, 2))}
    normalizer = Normalizer.fit({**data, "action": data["x"]})
    net = UNet1DConfig((8, 16), kernel_size=3, n_groups=4, time_dim=8)
    ConsistencyPolicy(spec, net, normalizer).save_pretrained(tmp_path / "bundle")
    return tmp_path / "bundle"


Start = Callable[..., "subprocess.Popen[str]"]


@pytest.fixture
def start() -> Iterator[Start]:
    """Start writers that save a policy again and again; they end with the test."""
    running: list[subprocess.Popen[str]] = []

    def begin(source: Path, target: Path) -> subprocess.Popen[str]:
        process = subprocess.Popen(
            [sys.executable, "-c", _WRITER, str(source), str(target)],
            stdout=subprocess.PIPE,
            text=True,
        )
        running.append(process)
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        return process

    yield begin
    for process in running:
        process.kill()
        process.communicate()


def test_a_bundle_that_is_replaced_is_never_absent(
    bundle: Path, tmp_path: Path, start: Start, attack_scale: int
) -> None:
    """Hardening: 4 of 695 reads failed."""
    target = tmp_path / "policy"
    ConsistencyPolicy.from_pretrained(bundle).save_pretrained(target)
    writers = [start(bundle, target) for _ in range(2)]
    identities = set()
    for _ in range(150 * min(attack_scale, 100)):
        ConsistencyPolicy.from_pretrained(target)
        identities.add(target.stat().st_ino)
    print(f"{150 * min(attack_scale, 100)} reads of a bundle that was replaced meanwhile")
    assert len(identities) > 2, "nobody wrote meanwhile"
    assert all(writer.poll() is None for writer in writers), "writers do not race"


def test_killed_writers_leave_a_whole_bundle_and_all_other_files(
    bundle: Path, tmp_path: Path, start: Start, attack_scale: int
) -> None:
    target = tmp_path / "deep" / "policy"
    policy = ConsistencyPolicy.from_pretrained(bundle)
    policy.save_pretrained(target)
    (target / "notes.txt").write_text("mine")
    (target / "runs").mkdir()
    (target / "runs" / "a.txt").write_text("also mine")
    (target / "elsewhere").symlink_to(tmp_path)
    choose = random.Random(0)
    for _ in range(4 * min(attack_scale, 125)):
        writer = start(bundle, target)
        time.sleep(choose.uniform(0.0, 0.1))
        writer.send_signal(signal.SIGKILL)
        writer.wait()
        ConsistencyPolicy.from_pretrained(target)
        assert (target / "notes.txt").read_text() == "mine"
        assert (target / "runs" / "a.txt").read_text() == "also mine"
        assert (target / "elsewhere").readlink() == tmp_path
    print(f"{4 * min(attack_scale, 125)} writers of a bundle killed")
    policy.save_pretrained(target)
    assert [p.name for p in target.parent.iterdir()] == ["policy"], "leftovers are cleared"


def test_a_link_to_a_bundle_stays_a_link(bundle: Path, tmp_path: Path) -> None:
    link = tmp_path / "current"
    link.symlink_to(bundle, target_is_directory=True)
    before = bundle.stat().st_ino
    ConsistencyPolicy.from_pretrained(bundle).save_pretrained(link)
    assert link.is_symlink()
    assert bundle.stat().st_ino != before


# -- runs ---------------------------------------------------------------------------------------


@pytest.fixture
def store(tmp_path: Path) -> Path:
    buffer = ReplayBuffer.create(tmp_path / "data.zarr")
    for k in range(3):
        steps = np.random.default_rng(k).normal(size=(30, 2)).astype(np.float32)
        buffer.append_episode({"state": steps, "action": steps})
    return buffer.path


def words(store: Path, out: Path, *more: str) -> list[str]:
    return [
        "train",
        "task=custom",
        f"data.path={store}",
        "data.obs=[state]",
        "control_hz=10",
        "net.down_dims=[8,16]",
        "net.time_dim=8",
        "encoder.dim=8",
        "examples=192",
        "batch_size=16",
        "optim.warmup=0",
        "eval.every=64",
        "log.every=16",
        "log.trackers=[]",
        f"out={out}",
        *more,
    ]


def test_a_run_killed_before_its_first_state_can_be_started_again(
    store: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    assert main(words(store, run)) == 0
    (run / "training_state" / "state.safetensors").unlink()
    for path in (run / "policy", run / "policy_last"):
        for file in path.iterdir():
            file.unlink()
        path.rmdir()
    (run / "curves.png").unlink()
    assert main(words(store, run)) == 0
    assert (run / "policy").is_dir()


@pytest.mark.filterwarnings("always:the run in:UserWarning")
def test_to_resume_a_finished_run_changes_nothing(
    store: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    assert main(words(store, run)) == 0
    before = {p: (p.read_bytes(), p.stat().st_mtime_ns) for p in run.rglob("*") if p.is_file()}
    assert "val_loss" in (run / "policy_last" / "README.md").read_text().replace(" ", "_")
    before = {p: v for p, v in before.items() if p.name != ".lock"}
    assert main(["train", f"resume={run}"]) == 0
    assert "there is nothing to do" in capsys.readouterr().err
    assert {p: (p.read_bytes(), p.stat().st_mtime_ns) for p in before} == before


def test_a_run_stopped_at_an_evaluation_keeps_its_scores(store: Path, tmp_path: Path) -> None:
    config = cmpolicy.compose(*words(store, tmp_path)[1:-1])
    cmpolicy.train(config, tmp_path / "run", until=64)
    last = tmp_path / "run" / "policy_last" / "README.md"
    card = last.read_text()
    assert "Not scored" not in card
    cmpolicy.resume(tmp_path / "run", until=64)
    assert last.read_text() == card


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 4 MB."""
    place = tmp_path / "disk"
    place.mkdir()
    done = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", str(place)], capture_output=True
    )
    if done.returncode:
        pytest.skip("mounting a small file system needs root")
    yield place
    subprocess.run(["umount", "-l", str(place)], check=True)


def fill_up(place: Path, spare: int = 0) -> None:
    with (place / "fill").open("wb", buffering=0) as file:
        try:
            while True:
                file.write(bytes(4096))
        except OSError:
            pass
        file.truncate(max(0, file.tell() // 4096 * 4096 - spare))


def test_a_disk_that_is_full_from_the_start(
    store: Path, small_disk: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    fill_up(small_disk, spare=40 * 1024)
    assert main(words(store, small_disk / "run")) == 1
    message = capsys.readouterr().err
    assert f"cannot write {small_disk / 'run/training_state/state.safetensors'}" in message
    assert "there is no older one" in message
    assert "start it again; the same out= will do" in message
    assert "resume" not in message
    (small_disk / "fill").unlink()
    assert main(words(store, small_disk / "run")) == 0


def test_a_disk_that_fills_up_meanwhile(
    store: Path, small_disk: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = small_disk / "run"
    config = cmpolicy.compose(*words(store, run)[1:-1])
    cmpolicy.train(config, run, until=96)
    log = read_log(run)
    fill_up(small_disk)
    capsys.readouterr()
    assert main(["train", f"resume={run}"]) == 1
    message = capsys.readouterr().err
    assert f"cannot write {run}" in message
    assert f"the state of example 96 is safe; go on with:\n  cmpolicy train resume={run}" in message
    (small_disk / "fill").unlink()
    assert read_log(run)[: len(log)] == log
    assert main(["train", f"resume={run}"]) == 0
    assert [e["examples"] for e in read_log(run) if e["kind"] == "train"] == [*range(16, 193, 16)]


def test_an_append_to_a_full_disk(small_disk: Path) -> None:
    buffer = ReplayBuffer.create(small_disk / "data.zarr")
    values = np.random.default_rng(0).normal(size=(40_000, 4))
    buffer.append_episode({"action": values})
    fill_up(small_disk)
    with pytest.raises(ReplayBufferError, match=r"No space left on device. The 1 episodes that it"):
        buffer.append_episode({"action": values})
    (small_disk / "fill").unlink()
    again = ReplayBuffer.open(buffer.path, "r+")
    assert again.n_episodes == 1
    again.append_episode({"action": values[:10]})
    assert np.array_equal(again.load("action"), np.vstack([values, values[:10]]).astype("f4"))
