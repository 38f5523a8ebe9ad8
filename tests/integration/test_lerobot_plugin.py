"""The plug-in for lerobot, in lerobot's own commands: ``make test-lerobot``."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from cmpolicy.policy.policy import ConsistencyPolicy
from cmpolicy_data import ReplayBuffer
from cmpolicy_data.convert.lerobot.reading import read
from cmpolicy_data.convert.lerobot.writing import write

PYTHON = os.environ.get("CMPOLICY_LEROBOT_PYTHON", "")
SIDE = Path(__file__).with_name("lerobot_plugin_side.py")
ROOT = Path(__file__).resolve().parents[2]
TINY = (
    "--policy.type=cmpolicy",
    "--policy.device=cpu",
    "--policy.push_to_hub=false",
    "--policy.net=tiny",
    "--policy.down_dims=[8,16]",
    "--policy.compact.width=8",
    "--policy.psd.sd_begin=0.5",
    "--policy.ema.decay=0.9",
    "--policy.scheduler_warmup_steps=2",
    "--batch_size=4",
    "--num_workers=0",
    "--seed=1",
    "--log_freq=1",
)

pytestmark = pytest.mark.skipif(
    not PYTHON, reason="no lerobot; name a Python that has it in CMPOLICY_LEROBOT_PYTHON"
)

Run = Callable[..., str]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """Run a command of lerobot, or a script, with the plug-in and this checkout installed."""
    home = tmp_path_factory.mktemp("home")
    plugin = ROOT / "plugins" / "lerobot_policy_cmpolicy"
    install = ["install", "--quiet", "--no-deps", "--no-build-isolation", "--target"]
    subprocess.run([sys.executable, "-m", "pip", *install, home / "site", plugin], check=True)
    for name, version in (("lerobot_robot_dummy", "1.0"), ("lerobot", "0.6.1")):
        metadata = home / name / f"{name}-{version}.dist-info" / "METADATA"
        metadata.parent.mkdir(parents=True)
        metadata.write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
    robot = [home / "lerobot_robot_dummy", SIDE.parent]
    roots = [
        home / "site",
        *robot,
        ROOT,
        *(ROOT / name for name in ("envs", "data", "eval", "conf")),
    ]
    env = {key: value for key, value in os.environ.items() if not key.startswith("PYTHON")}
    env |= {"HF_HUB_OFFLINE": "1", "HF_HOME": str(home / "hf"), "MUJOCO_GL": "egl"}
    env |= {"PYTHONPATH": os.pathsep.join(map(str, roots)), "SDL_VIDEODRIVER": "dummy"}

    def run(command: str, *words: object, fails: bool = False, first: str = "") -> str:
        tool = Path(PYTHON).with_name(command)
        start = [PYTHON, str(SIDE)] if command == "side" else [PYTHON, str(tool)]
        path = os.pathsep.join([*([str(home / first)] if first else []), env["PYTHONPATH"]])
        done = subprocess.run(
            [*start, *map(str, words)],
            env=env | {"PYTHONPATH": path},
            cwd=home,
            capture_output=True,
            text=True,
        )
        assert (done.returncode != 0) == fails, done.stderr[-4000:]
        return done.stdout + done.stderr

    return run


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data set of Push-T's shapes, written by cmpolicy."""
    folder = tmp_path_factory.mktemp("data")
    buffer = ReplayBuffer.create(folder / "x.zarr")
    rng = np.random.default_rng(0)
    for length in (24, 20):
        buffer.append_episode(
            {
                "state": rng.uniform(0, 512, (length, 2)).astype(np.float32),
                "image": rng.integers(0, 256, (length, 96, 96, 3), dtype=np.uint8),
                "action": rng.uniform(0, 512, (length, 2)).astype(np.float32),
            }
        )
    write(buffer.path, folder / "set", task="push the block", fps=10, images="image")
    return folder / "set"


def train(run: Run, data: Path, out: Path, *words: str) -> Path:
    """The folder of checkpoints that lerobot-train leaves after six steps."""
    places = ("--dataset.repo_id=test/set", f"--dataset.root={data}", f"--output_dir={out}")
    log = run("lerobot-train", *TINY, *places, "--steps=6", "--save_freq=3", *words)
    assert "loss" in log
    return out / "checkpoints"


@pytest.fixture(scope="module")
def trained(run: Run, data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """From a camera and a state."""
    return train(run, data, tmp_path_factory.mktemp("run") / "run")


@pytest.fixture(scope="module")
def from_state(run: Run, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Flow matching from the state alone, one observation at a time."""
    folder = tmp_path_factory.mktemp("state")
    buffer = ReplayBuffer.create(folder / "x.zarr")
    rng = np.random.default_rng(0)
    for _ in range(2):
        numbers = rng.uniform(-1, 1, (2, 30, 2)).astype(np.float32)
        buffer.append_episode({"state": numbers[0], "action": numbers[1]})
    write(buffer.path, folder / "set", task="reach", fps=10)
    words = ("--policy.objective=fm", "--policy.n_obs_steps=1", "--policy.n_action_steps=10")
    return train(run, folder / "set", folder / "run", *words)


def test_a_checkpoint_is_a_policy_of_ours(trained: Path):
    """The bundle inside loads without lerobot, with the data's range and rate."""
    policy = ConsistencyPolicy.from_pretrained(trained / "last/pretrained_model")
    assert policy.spec.obs == {"image": (96, 96, 3), "state": (2,)}
    assert policy.spec.images == ("image",)
    assert (policy.n_obs_steps, policy.n_action_steps, policy.nfe) == (2, 8, 1)
    assert policy.control_hz == 10.0
    low, high = policy.normalizer.limits("action") or (None, None)
    assert low is not None
    assert 0 <= float(low.min()) < 60 < 450 < float(high.max()) <= 512
    action = policy.infer(policy.spec.zeros())
    assert action.shape == (1, 8, 2)
    assert (action >= low.numpy()).all()
    assert (action <= high.numpy()).all()


def test_flow_matching_from_the_state_alone(from_state: Path):
    policy = ConsistencyPolicy.from_pretrained(from_state / "last/pretrained_model/cmpolicy")
    assert (policy.sampler, policy.nfe, policy.n_obs_steps) == ("diagonal", 10, 1)
    assert policy.infer(policy.spec.zeros()).shape == (1, 10, 2)


def test_any_objective(run: Run, from_state: Path, tmp_path: Path):
    """Discrete consistency training: its own schedule, EMA targets, a sampler with new noise."""
    words = ("--policy.objective=dct", "--policy.objective_settings={weights: ema, steps_end: 20}")
    data = from_state.parents[1] / "set"
    folder = train(run, data, tmp_path / "run", *words, "--policy.nfe=2")
    policy = ConsistencyPolicy.from_pretrained(folder / "last/pretrained_model/cmpolicy")
    assert (policy.sampler, policy.nfe) == ("restart", 2)
    assert policy.spec.noise_shape == (2, 16, 2)
    assert policy.infer(policy.spec.zeros()).shape == (1, 8, 2)


def test_plugin_and_bundle_act_alike(run: Run, trained: Path, tmp_path: Path):
    checkpoint = trained / "last/pretrained_model"
    run("side", "act", checkpoint, tmp_path / "x.npz")
    found = np.load(tmp_path / "x.npz")
    policy = ConsistencyPolicy.from_pretrained(checkpoint / "cmpolicy")
    states, frames = found["states"], found["frames"]

    def chunk(*steps: int) -> np.ndarray:
        obs = {"state": states[None, steps], "image": frames[None, steps]}
        return policy.infer(obs, noise=found["noise"])[0]

    np.testing.assert_allclose(found["actions"][:8], chunk(0, 0), atol=2e-3)
    np.testing.assert_allclose(found["actions"][8], chunk(7, 8)[0], atol=2e-3)
    np.testing.assert_allclose(found["chunk"][0], chunk(7, 8), atol=2e-3)


def test_a_share_of_the_examples_forgets(run: Run, trained: Path, tmp_path: Path):
    run("side", "forget", trained / "last/pretrained_model", tmp_path / "x.npz")
    found = np.load(tmp_path / "x.npz")
    given, training = found["given"], found["training"]
    forgotten = (training[:, 0] == given[:, 1]).all(axis=1)
    assert 0.15 < forgotten.mean() < 0.35
    np.testing.assert_array_equal(training[:, 1], given[:, 1])
    np.testing.assert_array_equal(training[~forgotten, 0], given[~forgotten, 0])
    np.testing.assert_array_equal(found["scoring"], given)


def test_a_run_goes_on(run: Run, trained: Path):
    """Weights, average and optimizer; the average then moves on from where it was."""
    first = json.loads((trained / "000003/pretrained_model/cmpolicy/config.json").read_text())
    assert first["metadata"]["lerobot"]["steps"] == 3
    settings = trained / "last/pretrained_model/train_config.json"
    run("lerobot-train", f"--config_path={settings}", "--resume=true", "--steps=8")
    last = json.loads((trained / "last/pretrained_model/cmpolicy/config.json").read_text())
    assert last["metadata"]["lerobot"] == {
        "keys": {"observation.image": "image", "observation.state": "state"},
        "steps": 8,
    }


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("horizon=15", "horizon=15 is not divisible by 2"),
        ("psd.sd_share=3", "sd_share=3.0 must lie in (0, 1]"),
        ("objective=psi", "did you mean 'psd'"),
        ("forget_history=1", "forget_history=1.0 must be in [0, 1)"),
        ("objective_settings={time_a: 1}", "those of psd are a group"),
    ],
)
def test_wrong_settings_say_what_is_wrong(
    run: Run, data: Path, tmp_path: Path, setting: str, message: str
):
    words = (
        "--dataset.repo_id=test/set",
        f"--dataset.root={data}",
        f"--output_dir={tmp_path / 'o'}",
    )
    said = run("lerobot-train", *TINY, *words, f"--policy.{setting}", fails=True)
    assert message in said


def test_a_bundle_becomes_a_checkpoint(run: Run, trained: Path, data: Path, tmp_path: Path):
    """The same weights, networks and inputs; the same bundle inside again; and it trains on."""
    bundle = trained / "000006/pretrained_model/cmpolicy"
    run("side", "wrap", bundle, tmp_path / "wrapped")
    for name in ("wrapped", "again"):
        inside = tmp_path / name / "cmpolicy"
        for file in ("model.safetensors", "normalizer.safetensors"):
            assert (inside / file).read_bytes() == (bundle / file).read_bytes()
        before, after = (json.loads((f / "config.json").read_text()) for f in (bundle, inside))
        for key in ("spec", "net", "encoder", "path", "sampler", "nfe", "control_hz"):
            assert after[key] == before[key]
    start = [f"--policy.path={tmp_path / 'wrapped'}", *TINY[1:3], *TINY[-4:]]
    places = (
        "--dataset.repo_id=test/set",
        f"--dataset.root={data}",
        f"--output_dir={tmp_path / 'o'}",
    )
    run("lerobot-train", *start, *places, "--steps=1")
    last = tmp_path / "o/checkpoints/last/pretrained_model/cmpolicy"
    same = [(f / "normalizer.safetensors").read_bytes() for f in (bundle, last)]
    assert same[0] == same[1]


def test_what_a_bundle_loses_is_said(run: Run, from_state: Path, tmp_path: Path):
    policy = ConsistencyPolicy.from_pretrained(from_state / "last/pretrained_model/cmpolicy")
    policy.warm_start = 0.5
    policy.save_pretrained(tmp_path / "bundle")
    said = run("side", "wrap", tmp_path / "bundle", tmp_path / "wrapped")
    assert "(warm_start=0.5), which LeRobot does not hand on" in said


def test_lerobot_asynchronous_inference(run: Run, from_state: Path, tmp_path: Path):
    """Its server and its client, with a robot that only remembers."""
    run("side", "serve", from_state / "last/pretrained_model", tmp_path / "x.npz")
    actions = np.load(tmp_path / "x.npz")["actions"]
    assert len(actions) >= 12  # more than one chunk
    assert np.ptp(actions, axis=0).min() > 0
    assert np.abs(actions).max() <= 1


def test_our_loop_drives_a_robot_of_lerobots(run: Run, from_state: Path, tmp_path: Path):
    """At the data's rate, within the limits, connected while it runs and not after."""
    run("side", "drive", from_state / "last/pretrained_model", tmp_path / "x.npz")
    found = np.load(tmp_path / "x.npz")
    assert found["hz"] == 10
    assert 20 <= int(found["ticks"]) <= 32
    assert len(found["actions"]) >= 10
    assert np.abs(found["actions"]).max() <= 0.5
    assert np.ptp(found["actions"], axis=0).min() > 0
    assert found["connected"].tolist() == [True, False]


def test_lerobot_record_with_the_policy(run: Run, from_state: Path, tmp_path: Path):
    """lerobot finds robot and policy by their names; what it records is read back."""
    run(
        "lerobot-record",
        "--robot.type=dummy",
        f"--policy.path={from_state / 'last/pretrained_model'}",
        "--policy.device=cpu",
        "--dataset.repo_id=me/eval_dummy",
        f"--dataset.root={tmp_path / 'recorded'}",
        "--dataset.single_task=reach",
        "--dataset.num_episodes=1",
        "--dataset.episode_time_s=3",
        "--dataset.reset_time_s=0",
        "--dataset.fps=10",
        "--dataset.push_to_hub=false",
        "--play_sounds=false",
    )
    read(tmp_path / "recorded", tmp_path / "x.zarr")
    buffer = ReplayBuffer.open(tmp_path / "x.zarr")
    state, action = (np.asarray(buffer[key][:]) for key in ("state", "action"))
    assert len(action) >= 11  # more than one chunk
    assert np.ptp(action, axis=0).min() > 0
    np.testing.assert_array_equal(state[1:], action[:-1])


def test_real_time_chunking_is_refused(run: Run, from_state: Path, tmp_path: Path):
    run("side", "refuse", from_state / "last/pretrained_model", tmp_path / "said.txt")
    delay, prefix, processor = (tmp_path / "said.txt").read_text().splitlines()
    assert "cmpolicy has no real-time chunking, so ['inference_delay'] cannot be used" in delay
    assert "['prev_chunk_left_over'] cannot be used" in prefix
    assert "['rtc_config'] cannot be used: switch it off (rtc.enabled=false" in processor


def test_another_lerobot_is_named(run: Run):
    """With the versions that are known, in every command."""
    said = run("lerobot-train", "--help", first="lerobot")
    assert "does not know lerobot 0.6.1; it is tested with 0.4.4." in said
    assert "does not know" not in run("lerobot-train", "--help")


def test_lerobot_eval(run: Run, trained: Path, tmp_path: Path):
    pytest.importorskip("gym_pusht")
    out = tmp_path / "eval"
    run(
        "lerobot-eval",
        f"--policy.path={trained / '000006/pretrained_model'}",
        "--policy.device=cpu",
        "--env.type=pusht",
        "--env.episode_length=20",
        "--eval.n_episodes=2",
        "--eval.batch_size=2",
        f"--output_dir={out}",
    )
    found = json.loads((out / "eval_info.json").read_text())
    assert found["overall"]["n_episodes"] == 2
