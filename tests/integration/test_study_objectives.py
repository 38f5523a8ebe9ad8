"""``cmpolicy study objectives``: interrupted, gone on with, refused; with a real simulator."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import psutil
import pytest

from cmpolicy.cli.main import main

SHORT = ["task=pusht", "net=tiny", "examples=256", "batch_size=64", "optim.warmup=0"]
STUDY = ["seeds=[0]", "nfe=[1,2]", "eval_seeds=500000-500001"]


def _study(out: Path, *words: str) -> int:
    return main(["study", "objectives", *SHORT, *STUDY, f"out={out}", *words])


def test_a_study_from_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "study"
    assert _study(out, "objectives=[isd]") == 0
    first = out / "results" / "isd-0.json"
    before = first.stat().st_mtime_ns
    made = json.loads((out / "study.json").read_text())
    del made["training"]["target_weight"]  # as if an older version had made it
    (out / "study.json").write_text(json.dumps(made))
    assert _study(out, "objectives=[isd,mip]") == 0  # what is done is not done again
    assert first.stat().st_mtime_ns == before
    text = capsys.readouterr().out
    assert "| isd " in text
    assert "| mip " in text
    table = (out / "table.md").read_text()
    assert "cmpolicy study objectives" in table
    assert (out / "objectives.png").stat().st_size > 1000
    found = json.loads((out / "results" / "mip-0.json").read_text())
    assert found["diverged"] is None
    assert found["cpu_ms_per_step"] > 0
    assert [(s["sampler"], s["nfe"], len(s["score"])) for s in found["scores"]] == [("mip", 2, 2)]

    assert _study(out, "objectives=[isd]", "optim.lr=1e-2") == 2
    message = capsys.readouterr().err
    assert "another training: optim.lr is" in message
    assert "0.01 here" in message


@pytest.mark.timeout(1800)  # two studies that train: minutes beside other work
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_study_that_is_stopped_goes_on(tmp_path: Path, number: signal.Signals) -> None:
    out = tmp_path / "study"
    words = [*SHORT, *STUDY, f"out={out}", "objectives=[fm,isd]", "examples=1600", "save_every=64"]
    command = [sys.executable, "-m", "cmpolicy", "study", "objectives", *words]
    # a job in the background of a shell hands down that SIGINT is ignored
    attend = partial(signal.signal, signal.SIGINT, signal.SIG_DFL)
    process = subprocess.Popen(command, stderr=subprocess.DEVNULL, preexec_fn=attend)
    state = out / "runs" / "fm-0" / "training_state" / "state.safetensors"
    while not state.exists():
        assert process.poll() is None
        time.sleep(0.05)
    children = psutil.Process(process.pid).children(recursive=True)
    process.send_signal(number)
    assert process.wait(timeout=300) == 128 + number
    assert not list((out / "runs").glob("isd-0")), "nothing else was begun"
    assert state.exists()
    assert not (out / "results").exists()
    assert psutil.wait_procs(children, timeout=60)[1] == [], "nothing is left running"
    if number is signal.SIGTERM:
        return
    log = out / "runs" / "fm-0" / "log.jsonl"
    assert main(["study", "objectives", *words, "objectives=[fm]"]) == 0
    assert json.loads(log.read_text().splitlines()[-1])["examples"] == 1600
    assert [path.name for path in (out / "results").iterdir()] == ["fm-0.json"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["objectives=[isdd]"], "unknown objective 'isdd'; did you mean 'isd'"),
        (["objective=isd"], "the study chooses the objective"),
        (["seed=3"], "seeds=[0,1,2]"),
        (["nfe=[1,1]"], "nothing twice"),
        (["workers=0"], "workers=0"),
        (["eval_seeds=7-3"], "7-3"),
        (["eval.episodes=200"], "name the episodes in eval_seeds=500000-500099"),
        (["task=custom", "data.path=none.zarr", "data.obs=[x]"], "simulator"),
    ],
)
def test_what_cannot_be_studied(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], words: list[str], message: str
) -> None:
    assert _study(tmp_path / "study", *words) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "study").exists()
