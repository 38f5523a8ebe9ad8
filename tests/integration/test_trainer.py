"""The training loop on a tiny policy: resume, EMA, stops, disks; everything real but the size."""

import dataclasses
import json
import os
import resource
import signal
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from cmpolicy.flow import alarm
from cmpolicy.flow.objectives import build_objective
from cmpolicy.nn.encoders.state import StateEncoderConfig
from cmpolicy.nn.unet1d import UNet1DConfig
from cmpolicy.normalize import Normalizer
from cmpolicy.policy.policy import ConsistencyPolicy
from cmpolicy.spec import PolicySpec
from cmpolicy.training.checkpoint import CheckpointError, load_state, state_path
from cmpolicy.training.config import EmaConfig, EvalConfig, LogConfig, LoopConfig, OptimConfig
from cmpolicy.training.device import make_accelerator
from cmpolicy.training.guard import FiniteGuard, NonFiniteError
from cmpolicy.training.loader import Batch, DeviceLoader
from cmpolicy.training.optim import ModelEma
from cmpolicy.training.trackers import JsonLines, read_log
from cmpolicy.training.trainer import Scores, Trainer
from cmpolicy_data import window_index

BATCH = 8
STEPS = 12


def loop_config(**changes: Any) -> LoopConfig:
    settings: dict[str, Any] = {
        "examples": BATCH * STEPS,
        "batch_size": BATCH,
        "seed": 3,
        "device": "cpu",
        "precision": "fp32",
        "save_every": BATCH * 4,
        "optim": OptimConfig(lr=1e-2, warmup=BATCH * 2),
        "ema": EmaConfig(decay=0.9),
        "eval": EvalConfig(every=BATCH * 4),
        "log": LogConfig(every=BATCH * 3),
    }
    return LoopConfig(**(settings | changes))


def make_trainer(run_dir: Path, config: LoopConfig, **callables: Any) -> Trainer:
    """A policy of a few hundred weights on thirty random steps."""
    rng = np.random.default_rng(0)
    obs, action = rng.normal(size=(30, 3)), rng.normal(size=(30, 2))
    windows = window_index([14, 30], horizon=4, n_obs_steps=2, n_action_steps=2)
    loader = DeviceLoader({"state": obs}, action, windows, batch_size=BATCH, seed=config.seed)
    torch.manual_seed(config.seed)
    policy = ConsistencyPolicy(
        PolicySpec({"state": (3,)}, action_dim=2, horizon=4, n_obs_steps=2, n_action_steps=2),
        UNet1DConfig((8, 16), kernel_size=3, n_groups=4, time_dim=8),
        Normalizer.fit({"state": obs, "action": action}),
        encoder=StateEncoderConfig(8),
        objective=callables.pop("objective", None)
        or build_objective("isd", tangent_weights="ema", tangent="schedule"),
    )
    return Trainer(
        policy,
        config,
        accelerator=make_accelerator(config),
        batches=callables.pop("batches", None) or loader.batch,
        draw=policy.draw,
        run_dir=run_dir,
        **callables,
    )


def log_values(run_dir: Path) -> list[dict[str, Any]]:
    """The log without what the clock says."""
    clock = {"seconds", "examples_per_s"}
    return [{k: v for k, v in e.items() if k not in clock} for e in read_log(run_dir)]


def assert_equal_states(first: Path, second: Path) -> None:
    a, b = load_state(first), load_state(second)
    assert a.tensors.keys() == b.tensors.keys()
    for name, tensor in a.tensors.items():
        assert torch.equal(tensor, b.tensors[name]), name
    clock = {"seconds": 0.0, "window_seconds": 0.0, "metrics": {}}
    assert a.values | clock == b.values | clock


def train(
    run_dir: Path, config: LoopConfig, *, until: int | None = None, **callables: Any
) -> Trainer:
    """Train, or go on with what ``run_dir`` holds."""
    trainer = make_trainer(run_dir, config, **callables)
    if state_path(run_dir).is_file():
        trainer.resume()
    run_dir.mkdir(exist_ok=True)
    log = JsonLines(run_dir, start=trainer.examples)
    trainer.trackers = [log]
    try:
        trainer.train(until)
    finally:
        log.close()
    return trainer


def score(policy: ConsistencyPolicy, examples: int) -> Scores:
    weight = float(next(policy.parameters()).double().sum())
    return Scores({"weight": weight}, (weight,))


@pytest.mark.parametrize("until", [BATCH * 6, BATCH * 7])
def test_resume_is_bit_exact(tmp_path: Path, until: int) -> None:
    config = loop_config()
    train(tmp_path / "straight", config, score=score)
    train(tmp_path / "parts", config, until=until, score=score)
    assert load_state(tmp_path / "parts").values["examples"] == until
    train(tmp_path / "parts", config, score=score)
    assert_equal_states(tmp_path / "straight", tmp_path / "parts")
    assert log_values(tmp_path / "straight") == log_values(tmp_path / "parts")


def test_a_run_that_was_killed_goes_on_from_its_last_save(tmp_path: Path) -> None:
    config = loop_config()
    train(tmp_path / "straight", config)

    calls = 0

    def killed(first: int, count: int) -> Batch:
        nonlocal calls
        calls += 1
        if calls > 10:
            raise MemoryError("killed")
        return loader(first, count)

    trainer = make_trainer(tmp_path / "killed", config)
    loader, trainer._batches = trainer._batches, killed
    (tmp_path / "killed").mkdir()
    log = JsonLines(tmp_path / "killed")
    trainer.trackers = [log]
    with pytest.raises(MemoryError):
        trainer.train()
    log.close()
    assert read_log(tmp_path / "killed")[-1]["examples"] == BATCH * 9  # past the last save
    assert load_state(tmp_path / "killed").values["examples"] == BATCH * 8
    train(tmp_path / "killed", config)
    assert_equal_states(tmp_path / "straight", tmp_path / "killed")
    assert log_values(tmp_path / "straight") == log_values(tmp_path / "killed")


def test_ema_counter_and_schedule_survive_a_resume(tmp_path: Path) -> None:
    config = loop_config()
    train(tmp_path, config, until=BATCH * 5)
    resumed = make_trainer(tmp_path, config)
    assert resumed.ema.counter == 0
    resumed.resume()
    assert resumed.ema.counter == 5
    assert resumed.ema.decay == pytest.approx(1 - (1 + 4) ** -0.75)
    straight = make_trainer(tmp_path, config)
    for _ in range(5):
        straight.step()
    assert resumed.schedule.get_last_lr() == straight.schedule.get_last_lr()
    assert resumed.optimizer.param_groups[0]["lr"] == straight.optimizer.param_groups[0]["lr"]


def test_the_schedule_counts_examples_also_with_another_number_of_processes(
    tmp_path: Path,
) -> None:
    """A step of two processes takes as many examples as one of one process with twice the batch."""
    config = loop_config()
    train(tmp_path, config, until=BATCH * 4)
    other = dataclasses.replace(config, batch_size=BATCH // 2)
    resumed = make_trainer(tmp_path, other)
    resumed.resume()
    straight = make_trainer(tmp_path, other)
    for _ in range(8):
        straight.step()
    assert resumed.examples == straight.examples
    assert resumed.schedule.get_last_lr() == straight.schedule.get_last_lr()


def test_ema_is_the_warmed_up_average(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, loop_config())
    name, weight = next(iter(trainer.model.named_parameters()))
    average = weight.detach().clone()
    for step in range(1, 6):
        trainer.step()
        decay = 0.0 if step == 1 else min(0.9, 1 - (1 + step - 1) ** -0.75)
        average = decay * average + (1 - decay) * weight.detach()
    assert torch.allclose(trainer.ema.model.get_parameter(name), average, atol=1e-6)
    assert not any(p.requires_grad for p in trainer.ema.model.parameters())


def test_the_average_has_the_statistics_of_a_batch_norm() -> None:
    """Networks of one's own have them; with those of the start the average would be another map."""
    model = torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.BatchNorm1d(3))
    ema = ModelEma(model, EmaConfig(decay=0.0))
    for _ in range(3):
        model(torch.randn(16, 2) + 5)
        ema.step(model)
    x = torch.randn(4, 2)
    assert torch.allclose(ema.model(x), model.eval()(x))
    assert int(ema.model.get_buffer("1.num_batches_tracked")) == 3


def test_a_smaller_learning_rate_may_be_given_on_resume(tmp_path: Path) -> None:
    train(tmp_path, loop_config(), until=BATCH * 5)
    slower = make_trainer(tmp_path, loop_config(optim=OptimConfig(lr=1e-3, warmup=BATCH * 2)))
    before = make_trainer(tmp_path, loop_config())
    slower.resume()
    before.resume()
    ratio = slower.optimizer.param_groups[0]["lr"] / before.optimizer.param_groups[0]["lr"]
    assert ratio == pytest.approx(0.1)


def test_log_is_json_lines_with_the_numbers_that_matter(tmp_path: Path) -> None:
    train(tmp_path, loop_config(), score=score)
    lines = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    training = [line for line in lines if line["kind"] == "train"]
    assert [line["examples"] for line in training] == [BATCH * n for n in (3, 6, 9, 12)]
    wanted = {"loss", "loss_fm", "loss_sd", "grad_norm", "grad_norm_max", "lr", "examples_per_s"}
    for line in training:
        assert wanted <= line.keys()
        assert line["grad_norm_max"] >= line["grad_norm"]
    assert [e["examples"] for e in lines if e["kind"] == "eval"] == [BATCH * n for n in (4, 8, 12)]
    assert training[-1]["lr"] == pytest.approx(0.0)


@pytest.mark.parametrize("until", [BATCH * 7, BATCH * 8])
def test_the_speed_of_a_window_cut_by_a_resume_counts_all_of_its_time(
    tmp_path: Path, until: int
) -> None:
    train(tmp_path, loop_config(), until=until)
    train(tmp_path, loop_config())
    entries = [e for e in read_log(tmp_path) if e["kind"] == "train"]
    for before, after in pairwise(entries):
        assert after["examples_per_s"] * (after["seconds"] - before["seconds"]) == pytest.approx(
            after["examples"] - before["examples"], rel=0.05
        )


def test_grad_norm_is_logged_before_clipping(tmp_path: Path) -> None:
    config = loop_config(optim=OptimConfig(lr=1e-2, warmup=0, grad_clip=1e-4))
    train(tmp_path, config)
    assert min(e["grad_norm"] for e in read_log(tmp_path) if "grad_norm" in e) > 1e-3


def test_best_policy_is_the_highest_ranked_not_the_last(tmp_path: Path) -> None:
    ranks = {BATCH * 4: (0.5, 0.1), BATCH * 8: (0.5, 0.3), BATCH * 12: (0.5, 0.2)}
    kept: list[tuple[str, int, float | None]] = []
    trainer = train(
        tmp_path,
        loop_config(),
        score=lambda policy, examples: Scores({"success": examples}, ranks[examples]),
        keep=lambda kind, policy, examples, evaluation: kept.append(
            (kind, examples, evaluation and evaluation.metrics["success"])
        ),
    )
    # each with the numbers of its own weights; the last one also before it has any
    assert kept == [
        ("last", BATCH * 4, None),
        ("best", BATCH * 4, BATCH * 4),
        ("last", BATCH * 8, None),
        ("best", BATCH * 8, BATCH * 8),
        ("last", BATCH * 12, None),
        ("last", BATCH * 12, BATCH * 12),
    ]
    assert trainer.best == (0.5, 0.3)
    assert load_state(tmp_path).values["best"] == [0.5, 0.3]


def test_an_alarm_is_passed_on_once_and_not_before_half_of_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(alarm, "ALARM_EXAMPLES", 0)
    seen: list[int] = []

    def bad(policy: ConsistencyPolicy, examples: int) -> Scores:
        seen.append(examples)
        return Scores({}, (0.0,), alarm=f"bad at {examples}")

    with pytest.warns(UserWarning, match="bad at") as caught:
        train(tmp_path, loop_config(), score=bad)
    assert seen == [BATCH * 4, BATCH * 8, BATCH * 12]
    (warning,) = caught
    assert f"bad at {BATCH * 8}" in str(warning.message)


def test_the_last_policy_of_a_run_that_was_cut_has_no_numbers_of_others(tmp_path: Path) -> None:
    kept: list[tuple[str, int, Scores | None]] = []
    train(
        tmp_path,
        loop_config(),
        until=BATCH * 6,
        score=score,
        keep=lambda kind, policy, examples, evaluation: kept.append((kind, examples, evaluation)),
    )
    assert kept[-1] == ("last", BATCH * 6, None)


def test_non_finite_gradient_stops_with_the_last_good_state(tmp_path: Path) -> None:
    good = make_trainer(tmp_path, loop_config())._batches

    def poisoned(first: int, count: int) -> Batch:
        batch = good(first, count)
        if first == BATCH * 6:
            batch["action"] = torch.full_like(batch["action"], float("nan"))
        return batch

    with pytest.raises(NonFiniteError, match=r"at example 48: gradient norm nan") as error:
        train(tmp_path, loop_config(), batches=poisoned)
    assert error.value.examples == BATCH * 6
    state = load_state(tmp_path)
    assert state.values["examples"] == BATCH * 4
    floats = [t for t in state.tensors.values() if t.is_floating_point()]
    assert all(bool(torch.isfinite(t).all()) for t in floats)
    assert read_log(tmp_path)[-1]["examples"] == BATCH * 6


def test_a_device_that_is_read_late_changes_no_weight_after_the_bad_step(tmp_path: Path) -> None:
    """As on a GPU, where the guard is asked only at log intervals: AdamW skips by itself."""
    trainer = make_trainer(tmp_path, loop_config())
    trainer.step()
    guard = FiniteGuard(torch.device("cpu"))
    trainer._guard = guard
    guard.check = lambda: None  # type: ignore[method-assign]  # the device is not asked
    good = trainer._batches
    trainer._batches = lambda first, count: (
        good(first, count)
        | {  # type: ignore[return-value]
            "action": torch.full((BATCH, 4, 2), float("inf"))
        }
    )
    before = {k: v.clone() for k, v in trainer.model.state_dict().items()}
    trainer.step()
    trainer._batches = good
    trainer.step()
    for name, value in trainer.model.state_dict().items():
        assert torch.equal(value, before[name]), name
    moments: list[Tensor] = [s["exp_avg"] for s in trainer.optimizer.state.values()]
    assert all(bool(torch.isfinite(m).all()) for m in moments)
    with pytest.raises(NonFiniteError, match=f"at example {BATCH}"):
        FiniteGuard.check(guard)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_finishes_the_step_and_saves(tmp_path: Path, number: signal.Signals) -> None:
    config = loop_config()
    train(tmp_path / "straight", config)
    handlers = [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)]
    trainer = make_trainer(tmp_path / "stopped", config)
    good = trainer._batches

    def interrupted(first: int, count: int) -> Batch:
        if first == BATCH * 5:
            os.kill(os.getpid(), number)
        return good(first, count)

    trainer._batches = interrupted
    outcome = trainer.train()
    assert outcome.signum == number
    assert outcome.examples == BATCH * 6 == load_state(tmp_path / "stopped").values["examples"]
    assert [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)] == handlers
    train(tmp_path / "stopped", config)
    assert_equal_states(tmp_path / "straight", tmp_path / "stopped")


def test_stop_during_an_evaluation_that_dies_with_it_evaluates_again(tmp_path: Path) -> None:
    def dying(policy: ConsistencyPolicy, examples: int) -> Scores:
        os.kill(os.getpid(), signal.SIGTERM)
        raise RuntimeError("the simulator process died")

    config = loop_config()
    trainer = make_trainer(tmp_path, config, score=dying)
    assert trainer.train().examples == BATCH * 4
    seen: list[int] = []

    def fine(policy: ConsistencyPolicy, examples: int) -> Scores:
        seen.append(examples)
        return Scores({}, (0.0,))

    train(tmp_path, config, score=fine)
    assert seen == [BATCH * 4, BATCH * 8, BATCH * 12]


@contextmanager
def largest_file(size: int) -> Iterator[None]:
    """Files of this process cannot grow past ``size``: how a full disk looks to it."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_disk_full_leaves_the_previous_state_and_says_so(tmp_path: Path) -> None:
    trainer = train(tmp_path, loop_config(), until=BATCH * 4)
    before = state_path(tmp_path).read_bytes()
    trainer.step()
    with largest_file(4096), pytest.raises(CheckpointError) as error:
        trainer.save()
    message = str(error.value)
    assert str(state_path(tmp_path)) in message
    assert "MB free" in message
    assert "the previous one is intact" in message
    assert state_path(tmp_path).read_bytes() == before
    assert list(state_path(tmp_path).parent.iterdir()) == [state_path(tmp_path)]
    trainer.save()
    assert load_state(tmp_path).values["examples"] == BATCH * 5


@pytest.mark.skipif(os.geteuid() != 0, reason="mounting a small disk needs root")
def test_a_disk_that_is_really_full(tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=1m", "none", str(disk)]
    if subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("this system does not let tests mount a small disk")
    try:
        trainer = train(disk, loop_config(), until=BATCH * 4)
        before = state_path(disk).read_bytes()
        free = os.statvfs(disk)
        (disk / "ballast").write_bytes(b"x" * (free.f_bavail * free.f_frsize - 8192))
        with pytest.raises(CheckpointError, match=r"No space left on device.*0\.0 MB free"):
            trainer.save()
        assert state_path(disk).read_bytes() == before
        (disk / "ballast").unlink()
        trainer.save()
    finally:
        subprocess.run(["umount", str(disk)], check=True)


def test_a_damaged_or_missing_state_is_named(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, loop_config())
    with pytest.raises(CheckpointError, match="holds no training state"):
        trainer.resume()
    train(tmp_path, loop_config(), until=BATCH)
    path = state_path(tmp_path)
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(CheckpointError, match="is damaged"):
        make_trainer(tmp_path, loop_config()).resume()


@pytest.mark.parametrize("name", ["psd", "isd"])
def test_bf16_autocast_keeps_weights_in_fp32(tmp_path: Path, name: str) -> None:
    objective = build_objective(name, sd_begin=0.0)
    trainer = train(tmp_path / "bf16", loop_config(precision="bf16"), objective=objective)
    assert all(p.dtype == torch.float32 for p in trainer.model.parameters())
    train(tmp_path / "fp32", loop_config(), objective=objective)
    losses, exact = (
        np.array([[e["loss_fm"], e["loss_sd"]] for e in read_log(tmp_path / p)])
        for p in ("bf16", "fp32")
    )
    assert (losses != exact).any()
    # bf16 has eight bits: of L_sd, which begins near 0, its rounding is seen
    np.testing.assert_allclose(losses, exact, rtol=0.02, atol=1e-4)
