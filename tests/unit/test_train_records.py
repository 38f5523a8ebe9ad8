"""What a run writes down: JSON lines, TensorBoard, the terminal, curves, training states."""

import io
import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from cmpolicy.experiment.model_card import without_folders
from cmpolicy.training.checkpoint import CheckpointError, TrainingState, load_state, save_state
from cmpolicy.training.curves import draw_curves, smoothed
from cmpolicy.training.trackers import Accelerated, JsonLines, Terminal, read_log


def test_json_lines_hold_kind_samples_and_null_for_nan(tmp_path: Path) -> None:
    log = JsonLines(tmp_path)
    log.log("train", 10, {"loss": 0.5, "grad_norm": float("nan")})
    log.close()
    entry = json.loads((tmp_path / "log.jsonl").read_text())
    assert entry == {"kind": "train", "examples": 10, "loss": 0.5, "grad_norm": None}


def test_a_resumed_log_drops_what_it_will_write_again(tmp_path: Path) -> None:
    log = JsonLines(tmp_path)
    for examples in (10, 20, 30):
        log.log("train", examples, {"loss": 1.0})
    log.close()
    with (tmp_path / "log.jsonl").open("a") as file:
        file.write('{"kind": "train", "sam')  # cut off by a crash
    JsonLines(tmp_path, start=20).close()
    assert [e["examples"] for e in read_log(tmp_path)] == [10, 20]


def test_an_evaluation_that_the_state_does_not_know_is_dropped(tmp_path: Path) -> None:
    """Killed after the line was written, before the state was: the resumed run evaluates again."""
    log = JsonLines(tmp_path)
    log.log("eval", 10, {"val_loss": 2.0})
    log.log("train", 20, {"loss": 1.0})
    log.log("eval", 20, {"val_loss": 1.0})
    log.close()
    JsonLines(tmp_path, start=20, evaluated=10).close()
    assert [(e["kind"], e["examples"]) for e in read_log(tmp_path)] == [("eval", 10), ("train", 20)]


def test_tensorboard_counts_samples(tmp_path: Path) -> None:
    board = Accelerated("tensorboard", tmp_path)
    board.log("train", 128, {"loss": 0.25})
    board.close()
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()  # type: ignore[no-untyped-call]
    (scalar,) = events.Scalars("train/loss")
    assert (scalar.step, scalar.value) == (128, 0.25)


def test_tensorboard_of_a_resumed_run_keeps_what_its_state_knows(tmp_path: Path) -> None:
    for start, steps in ((0, (64, 128, 192)), (128, (192, 256))):
        board = Accelerated("tensorboard", tmp_path, start=start)
        for step in steps:
            board.log("train", step, {"loss": start + step})
        board.close()
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()  # type: ignore[no-untyped-call]
    found = [(scalar.step, scalar.value) for scalar in events.Scalars("train/loss")]
    assert found == [(64, 64), (128, 128), (192, 320), (256, 384)]


def test_terminal_without_a_terminal_writes_few_lines() -> None:
    stream = io.StringIO()
    terminal = Terminal(1000, stream=stream)
    for examples in range(10, 1001, 10):
        terminal.log("train", examples, {"loss": 1 / examples, "ignored": 3.0})
    terminal.log("eval", 1000, {"success": 0.5, "score": 0.75})
    terminal.close()
    lines = stream.getvalue().splitlines()
    assert 10 <= len(lines) <= 13
    assert lines[0] == "  1%    0.0k examples  loss 0.1"
    assert lines[-1] == "100%    1.0k examples  success 0.5  score 0.75"
    assert lines[-2].startswith("100%")


def test_wandb_offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Numbers go to a run that a later part of the same run goes on with; no network is asked."""
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    for examples in (100, 200):
        tracker = Accelerated("wandb", tmp_path, start=examples)
        tracker.log("train", examples, {"loss": 0.5})
        tracker.close()
    files = list((tmp_path / "wandb").rglob("*.wandb"))
    identity = (tmp_path / "wandb-id.txt").read_text()
    assert files
    assert all(identity in file.name for file in files)


def test_a_tracker_whose_package_is_missing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(ImportError, match=r"log.trackers=wandb .*pip install 'cmpolicy\[wandb\]'"):
        Accelerated("wandb", tmp_path)


def test_terminal_shows_a_bar_when_asked() -> None:
    stream = io.StringIO()
    terminal = Terminal(100, start=20, bar=True, stream=stream)
    terminal.log("train", 60, {"loss": 0.5})
    terminal.close()
    assert "60" in stream.getvalue()
    assert "loss 0.5" in stream.getvalue()


def test_curves_draw_what_there_is(tmp_path: Path) -> None:
    log = JsonLines(tmp_path)
    for n in range(1, 30):
        log.log("train", n * 100, {"loss_fm": 1 / n, "loss_sd": 0.0, "grad_norm": 1.0, "lr": 1e-3})
    log.log("eval", 2900, {"val_loss_fm": 0.2, "val_action_error": 3.0, "health_tangent": 0.1})
    log.close()
    target = draw_curves(tmp_path)
    assert target is not None
    image = np.asarray(Image.open(target).convert("L"))
    assert image.shape[1] > 1000
    assert 0.01 < (image < 200).mean() < 0.3  # neither empty nor black


def test_no_curves_before_the_first_entry(tmp_path: Path) -> None:
    JsonLines(tmp_path).close()
    assert draw_curves(tmp_path) is None


def test_smoothing_keeps_constants_and_length() -> None:
    assert np.allclose(smoothed(np.full(50, 3.0)), 3.0)
    noisy = np.random.default_rng(0).normal(size=200)
    assert smoothed(noisy).shape == noisy.shape
    assert smoothed(noisy).std() < 0.6 * noisy.std()


def test_states_come_back_exactly(tmp_path: Path) -> None:
    tensors = {"model/a": torch.randn(3, 4), "rng/cpu": torch.get_rng_state()}
    values = {"examples": 7, "best": [0.1, 1 / 3], "none": None}
    save_state(tmp_path, TrainingState(tensors, values))
    state = load_state(tmp_path)
    assert state.values == values
    assert all(torch.equal(state.tensors[k], v) for k, v in tensors.items())


def test_what_a_killed_run_was_writing_is_removed(tmp_path: Path) -> None:
    """Each part is as large as the state, and a queue that kills often would fill the disk."""
    folder = tmp_path / "training_state"
    folder.mkdir()
    (folder / ".state.safetensors.x3k9").write_bytes(b"the first part")
    save_state(tmp_path, TrainingState({"model/a": torch.zeros(3)}, {"examples": 8}))
    assert [path.name for path in folder.iterdir()] == ["state.safetensors"]


def test_a_state_of_a_newer_version_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("cmpolicy.training.checkpoint.FORMAT_VERSION", 3)
    save_state(tmp_path, TrainingState({"a": torch.zeros(1)}, {}))
    monkeypatch.undo()
    with pytest.raises(CheckpointError, match=r"has format version 3, this cmpolicy reads 2"):
        load_state(tmp_path)


def test_a_foreign_file_is_no_state(tmp_path: Path) -> None:
    save_state(tmp_path, TrainingState({"a": torch.zeros(1)}, {}))
    (tmp_path / "training_state/state.safetensors").write_bytes(b"something else")
    with pytest.raises(CheckpointError, match="damaged or not one of cmpolicy's"):
        load_state(tmp_path)


@pytest.mark.parametrize(
    ("words", "shown"),
    [
        ("task=pusht seed=3", "task=pusht seed=3"),
        ("data.path=/home/me/x.zarr out=../r/", "data.path=x.zarr out=r"),
        ("'data.path=/home/my data/x.zarr'", "'data.path=x.zarr'"),
        ("init=owner/name data.path=demos/x", "init=owner/name data.path=demos/x"),
    ],
)
def test_a_card_names_no_folder_of_the_machine(words: str, shown: str) -> None:
    assert without_folders(f"cmpolicy train {words}") == f"cmpolicy train {shown}"
