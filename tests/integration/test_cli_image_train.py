"""``cmpolicy image train`` from the words to a model that makes images, on tiny networks."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from cmpolicy.cli.main import main as command
from cmpolicy.cli.parse import Composition
from cmpolicy.experiment.image.config import ImageTrainConfig
from cmpolicy.experiment.image.evaluate import trained_on
from cmpolicy.experiment.image.train import (
    PART,
    HeldOutScorer,
    new_model,
    resume_images,
    train_images,
)
from cmpolicy.experiment.run import read_yaml
from cmpolicy.image.datasets import load_images
from cmpolicy.image.pipeline import ConsistencyImagePipeline
from cmpolicy.schema import ConfigError
from cmpolicy.training.checkpoint import load_state
from cmpolicy.training.trackers import read_log


def main(words: Sequence[str]) -> int:
    """``cmpolicy image``."""
    return command(["image", *words])


HANG = 600  # seconds after which a process is taken to hang; a busy machine needs minutes
TINY = [
    "net.widths=[8]",
    "net.groups=4",
    "net.embedding=8",
    "dataset.image_size=8",
    "examples=64",
    "batch_size=8",
    "optim.warmup=16",
    "eval.every=32",
    "eval.images=20",
    "eval.per_class=1",
    "save_every=32",
    "log.every=16",
    "log.trackers=[]",
    "device=cpu",
    "precision=fp32",
]


@pytest.fixture(autouse=True)
def _own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs go to outputs/ under the current folder."""
    monkeypatch.chdir(tmp_path)


def train(*words: str) -> int:
    return main(["train", *TINY, *words])


def log_values(run_dir: Path) -> list[dict[str, Any]]:
    """The log without what the clock says."""
    clock = {"seconds", "examples_per_s"}
    return [{k: v for k, v in e.items() if k not in clock} for e in read_log(run_dir)]


def test_a_run_gives_a_model_that_makes_images(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert train("out=run", "guidance=1.5", "log.trackers=[tensorboard]") == 0
    printed = capsys.readouterr().out
    assert "cmpolicy image eval model=run/model" in printed
    run = tmp_path / "run"
    assert (run / "curves.png").read_bytes()[:4] == b"\x89PNG"
    assert list((run / "tensorboard").iterdir())
    assert sorted(p.name for p in (run / "samples").iterdir()) == ["000000032.png", "000000064.png"]
    evaluations = [e for e in read_log(run) if e["kind"] == "eval"]
    assert [e["examples"] for e in evaluations] == [32, 64]
    for entry in evaluations:
        assert entry["val_loss"] == pytest.approx(entry["val_loss_fm"] + entry["val_loss_sd"])
        assert entry["val_loss_sd"] > 0  # though it joins the training later
        assert {"health_semigroup", "health_tangent", "health_variance_ratio"} <= entry.keys()

    pipe = ConsistencyImagePipeline.from_pretrained(run / "model")
    assert pipe.class_names == tuple("0123456789")
    picture = pipe("7", generator=torch.Generator().manual_seed(0)).images[0]
    assert (picture.mode, picture.size) == ("L", (8, 8))
    assert pipe.metadata["examples"] == 64
    assert pipe.metadata["metrics"]["val_loss"] == evaluations[-1]["val_loss"]
    assert pipe.metadata["config"]["guidance"] == 1.5
    assert pipe.metadata["dataset"]["name"] == "digits"
    card = (run / "model" / "README.md").read_text()
    assert "`cmpolicy image train net.widths=[8]" in card.replace("'", "")
    assert "guidance 1.5 in training" in card
    # both are the EMA weights of the end
    ema = load_state(run).tensors
    for folder in ("model", "model_last"):
        net = ConsistencyImagePipeline.from_pretrained(run / folder).net
        for name, weight in net.named_parameters():
            assert torch.equal(weight, ema[f"ema/flow_map.net.{name}"]), name


@pytest.mark.parametrize(
    "words",
    [
        [
            "guidance=2.0",
            "objective.tangent_weights=ema",
            "objective.sd_begin=0.0",
            "objective.derivative=jvp",
        ],
        ["net=dit", "net.width=8", "net.depth=1", "net.heads=2", "path=trigonometric"],
    ],
)
def test_resume_is_bit_exact(tmp_path: Path, words: list[str]) -> None:
    """Two steps and two more are four steps; the labels that are dropped included."""
    unet = [w for w in TINY if not (w.startswith("net.") and "net=dit" in words)]
    composition = Composition(ImageTrainConfig, package="cmpolicy_conf.image")
    more = ["examples=32", "eval.every=24", "save_every=16"]
    settings = composition.compose([*unet, *words, *more])
    settings.pop("out")
    config = ImageTrainConfig.from_mapping(settings)
    train_images(config, "straight")
    assert train_images(config, "parts", until=16).end.examples == 16
    assert load_state(tmp_path / "parts").values["examples"] == 16
    assert resume_images("parts").finished
    a, b = load_state(tmp_path / "straight"), load_state(tmp_path / "parts")
    assert a.tensors.keys() == b.tensors.keys()
    for name, tensor in a.tensors.items():
        assert torch.equal(tensor, b.tensors[name]), name
    assert log_values(tmp_path / "straight") == log_values(tmp_path / "parts")
    weights = "net/diffusion_pytorch_model.safetensors"
    both = [(tmp_path / run / "model" / weights).read_bytes() for run in ("straight", "parts")]
    assert both[0] == both[1]


def test_a_run_can_be_prolonged_but_not_changed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert train("out=run", "objective=fm") == 0
    assert main(["train", "resume=run", "examples=96"]) == 0
    assert load_state(tmp_path / "run").values["examples"] == 96
    assert ConsistencyImagePipeline.from_pretrained("run/model").sampler == "diagonal"
    capsys.readouterr()
    assert main(["train", "resume=run", "guidance=3"]) == 2
    assert "it keeps all but examples" in capsys.readouterr().err
    assert train("out=run") == 2
    assert "go on with it: cmpolicy image train resume=run" in capsys.readouterr().err


def test_a_run_can_start_from_a_model(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert train("out=first") == 0
    still = ["optim.lr=1e-12", "optim.weight_decay=0", "optim.warmup=0"]
    assert train("out=second", *still, f"init={tmp_path}/first/model") == 0
    pipes = [
        ConsistencyImagePipeline.from_pretrained(f"{run}/model") for run in ("first", "second")
    ]
    for name, weight in pipes[1].net.state_dict().items():
        torch.testing.assert_close(
            weight, pipes[0].net.state_dict()[name], rtol=0, atol=1e-6, msg=name
        )
    # a resumed run goes on from its own weights, wherever the first ones are now
    (tmp_path / "first").rename(tmp_path / "moved")
    assert main(["train", "resume=second", "examples=96"]) == 0
    card = (tmp_path / "second/model/README.md").read_text()
    assert "Trained further, from `model`, on" in card
    assert "- from example 64 on: `cmpolicy image train resume=second examples=96`" in card
    assert "- before that: 64 examples, `cmpolicy image train " in card
    assert train("out=third", f"init={tmp_path}/second/model", "examples=32") == 0
    card = (tmp_path / "third/model/README.md").read_text()  # whole, of every stage
    assert "- from example 64 on: `cmpolicy image train resume=second examples=96`" in card
    assert card.count("- before that") == 2
    for file in (tmp_path / "second/model").glob("*.*"):  # a card may be handed on
        assert str(tmp_path).encode() not in file.read_bytes()
    capsys.readouterr()
    for word, message in (
        ("net.widths=[16]", "that model has network"),
        ("path=trigonometric", "that model has path linear, this run trigonometric; change path"),
        ("dataset.image_size=16", "that model has pictures (1, 8, 8), this run (1, 16, 16)"),
        ("init=nowhere", "nowhere"),
    ):
        assert train("init=moved/model", word) == 2
        assert message in capsys.readouterr().err
    assert not (tmp_path / "outputs").exists()


def test_flow_matching_is_sampled_along_the_diagonal(tmp_path: Path) -> None:
    assert train("out=run", "objective=fm", "path=trigonometric", "guidance=1.5") == 0
    pipe = ConsistencyImagePipeline.from_pretrained("run/model")
    assert (pipe.sampler, pipe.config.path) == ("diagonal", "trigonometric")
    assert "loss_sd" not in read_log(tmp_path / "run")[0]
    assert "num_inference_steps=10" in (tmp_path / "run/model/README.md").read_text()


def test_a_diverging_run_stops_and_keeps_its_state(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert train("out=run", "optim.lr=1e36", "optim.grad_clip=null") == 1
    printed = capsys.readouterr().err
    assert "non-finite gradient at example" in printed
    assert "cmpolicy image train resume=run optim.lr=" in printed
    tensors = load_state(tmp_path / "run").tensors.values()
    assert all(bool(t.isfinite().all()) for t in tensors if t.is_floating_point())


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["guidance=0.5"], "guidance=0.5 makes no sense"),
        (["dataset=folder", "dataset.path=nowhere"], "nowhere"),
        (["dataset=mnist", "dataset.path=nowhere.npz"], "nowhere.npz; check path"),
        (["net.widths=[8,8,8,8,8]"], "halves the image 4 times, which 8 pixels do not allow"),
        (["optim.lrr=1"], "did you mean 'optim.lr'"),
        (["examples=4"], "examples=4 is less than one batch"),
        (["device=cuda"], "torch sees no GPU"),
        (["resume=nowhere"], "there is no nowhere/config.yaml"),
    ],
)
def test_bad_input_is_one_message(
    capsys: pytest.CaptureFixture[str], words: list[str], message: str
) -> None:
    if words == ["device=cuda"] and torch.cuda.is_available():
        pytest.skip("there is a GPU")
    if words[0].startswith("resume"):
        assert main(["train", *words]) == 2
    else:
        small = [] if "dataset=" in words[0] else ["dataset.image_size=8"]
        rest = [w for w in TINY if not w.startswith("dataset")]
        assert main(["train", *small, *rest, *words]) == 2
    printed = capsys.readouterr().err
    assert printed.startswith("cmpolicy image: ")
    assert message in printed, printed
    assert "Traceback" not in printed
    assert not Path("outputs").exists()


def _write_pictures(folder: Path, levels: dict[str, int], count: int = 6) -> None:
    rng = np.random.default_rng(0)
    for name, level in levels.items():
        (folder / name).mkdir(parents=True)
        for i in range(count):
            pixels = rng.integers(level, level + 127, (8, 8, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / name / f"{i}.png")


def test_a_run_goes_on_with_its_own_pictures_alone(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """With others, labels would mean other classes, and held-out pictures would train."""
    _write_pictures(tmp_path / "mine", {"dark": 0, "light": 128})
    rest = [w for w in TINY if not w.startswith("dataset")]
    assert main(["train", *rest, "dataset=folder", "dataset.path=mine", "out=run"]) == 0
    assert main(["train", "resume=run", "examples=96"]) == 0
    capsys.readouterr()
    (tmp_path / "mine/light").rename(tmp_path / "mine/amber")
    assert main(["train", "resume=run", "examples=128"]) == 2
    assert (
        "its classes were ['dark', 'light'], they are ['amber', 'dark']" in capsys.readouterr().err
    )
    (tmp_path / "mine/amber").rename(tmp_path / "mine/light")
    (tmp_path / "mine/dark/5.png").unlink()
    assert main(["train", "resume=run", "examples=128"]) == 2
    assert "are not those that run was started on" in capsys.readouterr().err


def test_a_run_goes_on_from_any_folder_and_where_its_pictures_were_moved_to(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    _write_pictures(tmp_path / "mine", {"dark": 0, "light": 128})
    (tmp_path / "mine/dark/note.txt").write_text("no picture")
    rest = [w for w in TINY if not w.startswith("dataset")]
    words = ["dataset=folder", "dataset.path=mine", "dataset.broken=skip"]
    assert main(["train", *rest, *words, "out=run"]) == 0
    assert "left out 1 broken files: dark/note.txt\n" in capsys.readouterr().err
    monkeypatch.chdir(tmp_path / "run")
    assert main(["train", "resume=../run", "examples=96"]) == 0
    (tmp_path / "mine").rename(tmp_path / "moved")
    assert main(["train", "resume=../run", "examples=128", "dataset.path=../moved"]) == 0


def test_many_classes_are_not_drawn_all_at_once(tmp_path: Path) -> None:
    """1000 classes would be 8000 images in one call of the network."""
    _write_pictures(tmp_path / "mine", {f"{k:02d}": 5 * k for k in range(22)}, count=2)
    rest = [w for w in TINY if not w.startswith(("dataset", "eval.per_class"))]
    words = Composition(ImageTrainConfig, package="cmpolicy_conf.image").compose(
        [*rest, "dataset=folder", "dataset.path=mine", "eval.per_class=15"]
    )
    config = ImageTrainConfig.from_mapping({k: v for k, v in words.items() if k != "out"})
    data = load_images(config.dataset)
    model = new_model(config, data).eval()
    rows: list[int] = []
    model.net.register_forward_pre_hook(lambda _, given: rows.append(len(given[0])))
    HeldOutScorer(config, data, tmp_path)(model, 64)
    assert rows[-2:] == [PART, 20 * 15 - PART]  # of 20 classes


def test_health_is_measured_on_all_classes_of_a_sorted_folder(tmp_path: Path) -> None:
    """The first rows held three classes of four, and the alarm compared with their variance."""
    _write_pictures(tmp_path / "mine", {f"{k}": 30 * k for k in range(4)}, count=100)
    rest = [w for w in TINY if not w.startswith(("dataset", "eval.images"))]
    words = Composition(ImageTrainConfig, package="cmpolicy_conf.image").compose(
        [*rest, "dataset=folder", "dataset.path=mine", "dataset.test_fraction=0.5"]
    )
    config = ImageTrainConfig.from_mapping({k: v for k, v in words.items() if k != "out"})
    data = load_images(config.dataset)
    model = new_model(config, data).eval()
    labels: list[list[int]] = []
    health = model.health

    def watched(batch: Any, *rest: Any) -> Any:
        labels.append(sorted(set(batch["labels"].tolist())))
        return health(batch, *rest)

    model.health = watched  # type: ignore[method-assign]
    HeldOutScorer(config, data, tmp_path)(model, 64)
    assert labels == [[0, 1, 2, 3]]


def test_a_folder_of_ones_own_in_colour(tmp_path: Path) -> None:
    _write_pictures(tmp_path / "mine", {"dark": 0, "light": 128})
    rest = [w for w in TINY if not w.startswith("dataset")]
    words = ["dataset=folder", "dataset.path=mine", "dataset.flip=true", "out=run"]
    assert main(["train", *rest, *words]) == 0
    pipe = ConsistencyImagePipeline.from_pretrained("run/model")
    assert pipe.class_names == ("dark", "light")
    assert pipe("light").images[0].mode == "RGB"
    assert str(tmp_path) not in json.dumps(pipe.metadata["config"])
    mine = str(tmp_path / "mine")
    assert read_yaml(Path("run/config.yaml"))["dataset"]["path"] == mine
    # the run knows where its data lies, the model alone does not
    for inside in ("run", "run/model"):
        config = trained_on(inside, pipe)
        assert (config.name, config.path, config.flip) == ("folder", mine, True)
    Path("run/model").rename("handed_on")
    with pytest.raises(ConfigError, match=r"give dataset=folder dataset\.path="):
        trained_on("handed_on", pipe)


def test_dispatch_and_help(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 2
    assert main(["--help"]) == 0
    assert "cmpolicy image sample" in capsys.readouterr().out
    assert main(["paint"]) == 2
    assert "'paint'" in capsys.readouterr().err
    assert main(["train", "--help"]) == 0
    printed = capsys.readouterr().out
    assert "cmpolicy image train resume=" in printed
    assert "label_dropout" in printed


def test_a_signal_leaves_a_run_that_can_be_resumed(tmp_path: Path) -> None:
    words = [*TINY, "out=run", "examples=10000000", "eval.every=10000000"]
    process = subprocess.Popen(
        [sys.executable, "-m", "cmpolicy", "image", "train", *words],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"},
    )
    log = tmp_path / "run/log.jsonl"
    deadline = time.monotonic() + HANG
    while process.poll() is None and not (log.exists() and log.stat().st_size):
        assert time.monotonic() < deadline
        time.sleep(0.1)
    process.send_signal(signal.SIGTERM)  # as SIGINT, which a job in the background may ignore
    out, err = process.communicate(timeout=HANG)
    assert process.returncode == 143, err
    assert "go on with:\n  cmpolicy image train resume=run" in out
    examples = int(load_state(tmp_path / "run").values["examples"])
    assert main(["train", "resume=run", f"examples={examples + 16}"]) == 0
    assert load_state(tmp_path / "run").values["examples"] == examples + 16
