"""``cmpolicy train`` from the words to a bundle that infers, on stores of a few episodes."""

import json
import os
import random
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import cmpolicy
from cmpolicy.cli.main import main as command
from cmpolicy.cli.train import compose
from cmpolicy.experiment.data import load_training_data
from cmpolicy.experiment.run import read_yaml
from cmpolicy.experiment.scoring import PolicyScorer
from cmpolicy.experiment.train import new_policy
from cmpolicy.policy.policy import ConsistencyPolicy
from cmpolicy.training.checkpoint import load_state
from cmpolicy.training.trackers import read_log
from cmpolicy_data import ReplayBuffer
from cmpolicy_eval.result import Result


def main(words: Sequence[str]) -> int:
    """``cmpolicy train``."""
    return command(["train", *words])


HANG = 600  # seconds after which a process is taken to hang; a busy machine needs minutes
TINY = [
    "net=tiny",
    "net.down_dims=[8,16]",
    "net.time_dim=8",
    "encoder.dim=8",
    "policy.horizon=4",
    "policy.n_action_steps=2",
    "batch_size=8",
    "examples=64",
    "optim.warmup=16",
    "log.every=16",
    "log.trackers=[]",
    "eval.every=32",
    "save_every=32",
    "device=cpu",
]


@pytest.fixture(autouse=True)
def _own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs go to outputs/ under the current folder."""
    monkeypatch.chdir(tmp_path)


def write_store(path: Path, lengths: list[int], **shapes: tuple[int, ...]) -> Path:
    rng = np.random.default_rng(0)
    buffer = ReplayBuffer.create(path)
    for length in lengths:
        episode = {k: rng.uniform(0, 100, (length, *s)) for k, s in shapes.items()}
        buffer.append_episode({k: v.astype(np.float32) for k, v in episode.items()})
    return path


@pytest.fixture
def store(tmp_path: Path) -> Path:
    return write_store(tmp_path / "my.zarr", [12, 15, 9], state=(5,), force=(3, 2), action=(3,))


def custom(store: Path, *words: str) -> list[str]:
    return ["task=custom", "control_hz=10", f"data.path={store}", "data.obs=[state]", *TINY, *words]


def test_a_store_of_ones_own_gives_a_bundle_that_infers(
    store: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [
        "task=custom",
        "control_hz=20",
        f"data.path={store}",
        "data.obs={arm: 'state[:2]', force: force}",
        *TINY,
        "out=run",
        "log.trackers=[tensorboard]",
    ]
    assert main(words) == 0
    printed = capsys.readouterr().out
    assert "run/policy" in printed
    assert "from_pretrained" in printed

    run = tmp_path / "run"
    assert (run / "curves.png").read_bytes()[:4] == b"\x89PNG"
    assert list((run / "tensorboard").iterdir())
    evaluations = [e for e in read_log(run) if e["kind"] == "eval"]
    assert [e["examples"] for e in evaluations] == [32, 64]
    health = {"health_semigroup", "health_tangent", "health_variance_ratio"}
    for entry in evaluations:
        assert entry["val_loss"] == pytest.approx(entry["val_loss_fm"] + entry["val_loss_sd"])
        assert entry["val_action_error"] > 0
        assert health <= entry.keys()
    config = read_yaml(run / "config.yaml")
    assert config["data"]["obs"] == {"arm": "state[:2]", "force": "force"}

    policy = ConsistencyPolicy.from_pretrained(run / "policy")
    assert policy.control_hz == 20
    obs = {"arm": np.zeros((4, 2, 2)), "force": np.zeros((4, 2, 3, 2))}
    chunk = policy.infer(obs)
    assert chunk.shape == (4, 2, 3)
    assert np.isfinite(chunk).all()
    card = (run / "policy" / "README.md").read_text()
    assert "task=custom" in card
    assert "val action error" in card
    metadata = json.loads((run / "policy" / "config.json").read_text())["metadata"]
    assert metadata["data"] == "my.zarr"
    assert str(tmp_path) not in json.dumps(metadata["config"])


def test_bundles_hold_the_ema_weights_and_the_best_is_kept(store: Path, tmp_path: Path) -> None:
    assert main(custom(store, "out=run")) == 0
    evaluations = [e for e in read_log(tmp_path / "run") if e["kind"] == "eval"]
    best = min(evaluations, key=lambda e: float(e["val_action_error"]))
    saved = json.loads((tmp_path / "run/policy/config.json").read_text())["metadata"]
    assert saved["examples"] == best["examples"]
    assert saved["metrics"]["val_action_error"] == best["val_action_error"]
    last = ConsistencyPolicy.from_pretrained(tmp_path / "run/policy_last")
    ema = load_state(tmp_path / "run").tensors
    for name, weight in last.named_parameters():
        assert torch.equal(weight, ema[f"ema/{name}"]), name


def test_a_run_can_be_prolonged_but_not_changed(
    store: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(custom(store, "out=run")) == 0
    assert main(["resume=run", "examples=96"]) == 0
    assert load_state(tmp_path / "run").values["examples"] == 96
    assert read_yaml(Path("run/config.yaml"))["examples"] == 96
    examples = [e["examples"] for e in read_log(tmp_path / "run") if e["kind"] == "train"]
    assert examples == [16, 32, 48, 64, 80, 96]
    capsys.readouterr()
    assert main(["resume=run", "examples=32"]) == 2
    assert "examples=32 is less than the 96 that run" in capsys.readouterr().err
    assert read_yaml(Path("run/config.yaml"))["examples"] == 96
    assert main(["resume=run", "batch_size=4"]) == 2
    assert "it keeps all but examples" in capsys.readouterr().err
    assert main(["resume=nowhere"]) == 2
    assert "there is no nowhere/config.yaml" in capsys.readouterr().err
    assert main(custom(store, "out=run")) == 2
    assert (
        "already holds a run; go on with it: cmpolicy train resume=run" in capsys.readouterr().err
    )


def test_a_run_can_start_from_a_policy(
    store: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Weights and scaling come along: a second data set has other ranges, and its own limits."""
    assert main(custom(store, "out=first")) == 0
    other = write_store(tmp_path / "other.zarr", [10, 11], state=(5,), action=(3,))
    still = ["optim.lr=1e-12", "optim.weight_decay=0", "optim.warmup=0", "init=first/policy_last"]
    assert main(custom(other, "out=second", *still)) == 0
    first = ConsistencyPolicy.from_pretrained(tmp_path / "first/policy_last")
    second = ConsistencyPolicy.from_pretrained(tmp_path / "second/policy_last")
    own = load_training_data(compose(*custom(other))).normalizer()
    torch.testing.assert_close(second.normalizer.limits("action"), own.limits("action"))
    for name, value in second.state_dict().items():
        if name.startswith(("normalizer.low", "normalizer.high")):
            continue
        torch.testing.assert_close(value, first.state_dict()[name], rtol=0, atol=1e-6, msg=name)
    assert (
        "Trained further, from `first/policy_last`"
        in (tmp_path / "second/policy_last/README.md").read_text()
    )
    card = (tmp_path / "second/policy_last/README.md").read_text()
    assert "- before that: 64 examples, `cmpolicy train task=custom" in card
    # a resumed run goes on from its own weights, wherever the first ones are now
    (tmp_path / "first").rename(tmp_path / "moved")
    assert main(["resume=second", "examples=96"]) == 0
    assert "- before that: 64 examples" in (tmp_path / "second/policy_last/README.md").read_text()
    words = ["out=fourth", "examples=16", "init=second/policy_last", "optim.warmup=0"]
    assert main(custom(store, *words)) == 0
    card = (tmp_path / "fourth/policy_last/README.md").read_text()
    assert "- from example 64 on: `cmpolicy train resume=second examples=96`" in card
    assert card.count("- before that") == 2

    # a card may be handed on: of a folder of this machine it tells the name alone
    words = ["out=third", "examples=16", f"init={tmp_path}/moved/policy_last", "optim.warmup=0"]
    assert main(custom(store, *words)) == 0
    for file in (tmp_path / "third/policy_last").glob("*.*"):
        assert str(tmp_path).encode() not in file.read_bytes()
    assert "further, from `policy_last`" in (tmp_path / "third/policy_last/README.md").read_text()

    capsys.readouterr()
    assert main(custom(store, "init=moved/policy_last", "policy.horizon=8")) == 2
    message = capsys.readouterr().err
    assert "that policy has horizon 4, this run 8; change policy.horizon" in message
    assert main(custom(store, "init=moved/policy_last", "net.down_dims=[8,8]")) == 2
    assert "that policy has network" in capsys.readouterr().err
    # the features of numbers lie side by side, in the order of the keys
    assert main(custom(store, "out=two", "data.obs={a: 'state[:2]', b: 'state[2:4]'}")) == 0
    turned = "data.obs={b: 'state[2:4]', a: 'state[:2]'}"
    assert main(custom(store, turned, "init=two/policy_last")) == 2
    assert "that policy has observations [('a', (2,))" in capsys.readouterr().err
    assert main(custom(store, "init=nowhere")) == 2
    assert "nowhere" in capsys.readouterr().err
    assert not (tmp_path / "outputs").exists()


def test_no_held_out_episodes(store: Path, tmp_path: Path) -> None:
    assert main(custom(store, "out=run", "data.val_fraction=0")) == 0
    saved = json.loads((tmp_path / "run/policy/config.json").read_text())["metadata"]
    assert saved["examples"] == 64


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["data.path=nowhere.zarr"], "nowhere.zarr"),
        (["data.path=null"], "data.path is not set"),
        (["data.obs=[stat]"], "has no key 'stat' under data/ (keys: action, force, state)"),
        (
            ["data.obs=[state]", "data.obs.arm=poses"],
            "'poses' under data/ (keys: action, force, state)",
        ),
        (["data.targets={pose: poses}"], "which data.targets names"),
        (["data.obs=[Gelenke_ä]"], "letters beyond ASCII"),
        (["data.obs=[state,'state[:9]']"], "but state has 5 columns"),
        (["data.action=force"], "have shape (3, 2) per step"),
        (
            ["policy.horizon=64", "policy.n_action_steps=20", "data.short_episodes=skip"],
            "all 3 episodes are shorter than the",
        ),
        (["data.val_fraction=0.9"], "leaves none to train on"),
        (["optim.lrr=1"], "did you mean 'optim.lr'"),
        (["out=my.zarr"], "exists and is not an empty folder"),
        (["device=cuda"], "torch sees no GPU"),
    ],
)
def test_bad_input_is_one_message(
    store: Path, capsys: pytest.CaptureFixture[str], words: list[str], message: str
) -> None:
    if words == ["device=cuda"] and torch.cuda.is_available():
        pytest.skip("there is a GPU")
    assert main(custom(store, *words)) == 2
    printed = capsys.readouterr().err
    assert printed.startswith("cmpolicy train: ")
    assert message in printed, printed
    assert "Traceback" not in printed


def test_a_store_without_episodes_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(custom(ReplayBuffer.create(tmp_path / "empty.zarr").path)) == 2
    assert "empty.zarr has no episodes" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["data.obs=[state]"], "the policy observes {state: (5,)}, but the environment gives"),
        (["data.obs={agent_pos: 'state[:2]'}"], "actions of 3 numbers, but the environment takes"),
    ],
)
def test_what_the_simulator_cannot_run_is_not_trained(
    store: Path, capsys: pytest.CaptureFixture[str], words: list[str], message: str
) -> None:
    assert main([f"data.path={store}", *TINY, "eval.episodes=1", "out=run", *words]) == 2
    assert message in capsys.readouterr().err
    assert not Path("run").exists()


def test_a_store_with_nan_is_named(store: Path, capsys: pytest.CaptureFixture[str]) -> None:
    buffer = ReplayBuffer.open(store, "r+")
    state = np.zeros((12, 5), np.float32)
    state[7, 1] = np.nan
    zeros = np.zeros((12, 3, 2), np.float32)
    buffer.append_episode({"state": state, "force": zeros, "action": zeros[:, :, 0]})
    assert main(custom(store)) == 2
    printed = capsys.readouterr().err
    assert "'state' holds NaN or inf at 1 steps, the first is step 7 of episode" in printed


def test_a_diverging_run_stops_and_keeps_its_state(
    store: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(custom(store, "out=run", "optim.lr=1e36", "optim.grad_clip=null")) == 1
    printed = capsys.readouterr().err
    assert "non-finite gradient at example" in printed
    assert "gradient norm" in printed
    assert "last good state, example 0, is kept" in printed
    assert "cmpolicy train resume=run optim.lr=" in printed
    tensors = load_state(tmp_path / "run").tensors.values()
    assert all(bool(t.isfinite().all()) for t in tensors if t.is_floating_point())


def test_push_t_is_rolled_out_while_training(tmp_path: Path) -> None:
    store = write_store(tmp_path / "t.zarr", [14, 18], state=(5,), keypoint=(9, 2), action=(2,))
    words = ["data=pusht_human", f"data.path={store}", *TINY, "out=run"]
    words += ["examples=32", "eval.episodes=2", "eval.workers=1", "data.augment=mirror"]
    assert main(words) == 0
    (entry,) = [e for e in read_log(tmp_path / "run") if e["kind"] == "eval"]
    assert 0 <= entry["score"] <= 1
    result = Result.load(tmp_path / "run/result.json")
    assert result.seeds == (500_000, 500_001)
    assert result.score_mean == entry["score"]
    policy = ConsistencyPolicy.from_pretrained(tmp_path / "run/policy")
    assert policy.spec.obs == {"agent_pos": (2,), "keypoint": (9, 2)}


def test_rollouts_never_use_the_seeds_of_the_protocol(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    store = write_store(tmp_path / "t.zarr", [14, 18], state=(5,), keypoint=(9, 2), action=(2,))
    words = ["data=pusht_human", f"data.path={store}", *TINY, "eval.episodes=20"]
    assert main([*words, "eval.first_seed=99990"]) == 2
    assert "takes seeds 99990-100009, but 100000-100499 are" in capsys.readouterr().err


def test_flow_matching_needs_only_another_objective(store: Path, tmp_path: Path) -> None:
    assert main(custom(store, "objective=fm", "out=run")) == 0
    policy = ConsistencyPolicy.from_pretrained(tmp_path / "run/policy")
    assert policy.sampler == "diagonal"
    assert "loss_sd" not in read_log(tmp_path / "run")[0]


def test_multirun_makes_one_run_of_each(store: Path, tmp_path: Path) -> None:
    assert main(["--multirun", *custom(store, "examples=32", "optim.lr=1e-3,1e-4")]) == 0
    rates = {
        read_yaml(p)["optim"]["lr"]
        for p in tmp_path.rglob("config.yaml")
        if p.parent.name != ".hydra"
    }
    assert rates == {1e-3, 1e-4}


def test_multirun_takes_the_words_of_one_run(
    store: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A shell leaves the ``~`` of ``data.path=~/...`` as it is, and so does Hydra's grammar."""
    monkeypatch.setenv("HOME", str(store.parent))
    words = [*custom(store, "examples=32", "seed=0,1", "out=~/läufe"), "data.path=~/my.zarr"]
    assert main(["-m", *words]) == 0
    config = store.parent / "läufe/1-seed=1/config.yaml"
    assert read_yaml(config)["data"]["path"] == str(store)
    assert main(["-m", *words, "seed"]) == 2
    assert "'seed' is not a setting" in capsys.readouterr().err


def test_ctrl_c_stops_a_sweep_and_not_its_first_run_alone(
    store: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    ended = threading.Event()

    def stop() -> None:
        while not any(log.stat().st_size for log in Path("runs").glob("0-*/log.jsonl")):
            if ended.wait(0.02):
                return
        os.kill(os.getpid(), signal.SIGINT)

    words = custom(store, "examples=24000", "eval.every=24000", "seed=0,1", "out=runs")
    thread = threading.Thread(target=stop)
    thread.start()
    try:
        status = main(["-m", *words])
    finally:
        ended.set()
        thread.join()
    assert status == 130
    assert [path.name for path in Path("runs").glob("job-*.json")] == ["job-0.json"]
    assert "stopped at" in Path("runs/table.md").read_text()
    assert "resume=" in capsys.readouterr().out


def test_help_lists_groups_and_settings(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--help"]) == 0
    printed = capsys.readouterr().out
    assert "cmpolicy train resume=" in printed
    assert "preset: demo, gpu, quick, standard" in printed
    assert "weight_decay" in printed


def start(words: list[str], **environ: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "cmpolicy", "train", *words],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={
            **os.environ,
            "PYTHONPATH": os.pathsep.join(sys.path),
            "OMP_NUM_THREADS": "1",
            **environ,
        },
    )


def test_sigterm_leaves_a_run_that_can_be_resumed(store: Path, tmp_path: Path) -> None:
    process = start(custom(store, "out=run", "examples=10000000", "eval.every=10000000"))
    log = tmp_path / "run/log.jsonl"
    while process.poll() is None and not (log.exists() and log.stat().st_size):
        time.sleep(0.1)
    process.send_signal(signal.SIGTERM)
    out, err = process.communicate(timeout=HANG)
    assert process.returncode == 143, err
    assert "go on with:\n  cmpolicy train resume=run" in out
    examples = int(load_state(tmp_path / "run").values["examples"])
    assert main(["resume=run", f"examples={examples + 16}"]) == 0
    assert load_state(tmp_path / "run").values["examples"] == examples + 16


def free_port() -> int:
    """Below those that systems give away: it stays free until the processes have loaded torch."""
    for port in random.sample(range(20_000, 30_000), 100):
        with socket.socket() as probe, suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port
    raise AssertionError("no free port")


def test_two_processes_are_one_with_twice_the_batch(store: Path, tmp_path: Path) -> None:
    shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "WORLD_SIZE": "2"}
    words = custom(store, "objective.weights=ema", "precision=fp32")
    processes = [
        start([*words, "out=two"], RANK=str(r), LOCAL_RANK=str(r), **shared) for r in range(2)
    ]
    try:
        assert main([*words, "out=one", "batch_size=16"]) == 0
        for process in processes:
            _, err = process.communicate(timeout=HANG)
            assert process.returncode == 0, err
    finally:
        for process in processes:
            process.kill()

    one, two = (read_log(tmp_path / name) for name in ("one", "two"))
    assert [e["examples"] for e in one] == [e["examples"] for e in two]
    for a, b in zip(one, two, strict=True):
        for name in a.keys() - {"kind", "seconds", "examples_per_s", "grad_norm_max"}:
            # health is a ratio of small numbers, so the order of a sum shows in it first
            rel = 1e-2 if name.startswith("health") else 1e-3
            assert a[name] == pytest.approx(b[name], rel=rel, abs=1e-6), (a["examples"], name)
    weights: list[dict[str, Any]] = [load_state(tmp_path / n).tensors for n in ("one", "two")]
    for name in weights[0]:
        if name.startswith("model/"):
            assert torch.allclose(weights[0][name], weights[1][name], atol=1e-4), name


def test_validation_counts_every_term_before_it_joins_the_training(
    store: Path, tmp_path: Path
) -> None:
    """Else a policy from before L_sd joins would be kept as the best of the run."""
    assert main(custom(store, "objective.sd_begin=0.9", "out=run")) == 0
    entries = read_log(tmp_path / "run")
    first = next(e for e in entries if e["kind"] == "train")
    assert first["loss_sd"] == 0
    assert all(e["val_loss_sd"] > 0 for e in entries if e["kind"] == "eval")


def test_of_policies_that_score_alike_the_later_ranks_higher() -> None:
    words = ["task=pusht", *TINY, "eval.episodes=1", "eval.workers=1"]
    config = compose(*words)
    data = load_training_data(config)
    policy, scorer = new_policy(config, data), PolicyScorer(config, data, None, command="")
    ranks = [scorer(policy, examples).rank for examples in (32, 64)]
    assert ranks[0][:-1] == ranks[1][:-1]
    assert ranks[0] < ranks[1]


def test_starting_on_data_that_reach_further_says_so(store: Path, tmp_path: Path) -> None:
    assert main(custom(store, "out=first")) == 0
    wide = ReplayBuffer.create(tmp_path / "wide.zarr")
    for number in range(4):
        state = 50 * np.random.default_rng(number).normal(size=(12, 5)).astype(np.float32)
        wide.append_episode({"state": state, "action": state[:, :3]})
    words = ["init=first/policy_last", "data.normalize=gaussian", "data.clamp_actions=false"]
    with pytest.warns(UserWarning, match="data.normalize does not change") as warned:
        cmpolicy.train(compose(*custom(wide.path, *words)), tmp_path / "second")
    said = "\n".join(str(w.message) for w in warned)
    assert "init: action reaches" in said
    assert "data.normalize does not change the scaling of init" in said
    policy = ConsistencyPolicy.from_pretrained(tmp_path / "second/policy_last")
    assert policy.normalizer.limits("action") is None
