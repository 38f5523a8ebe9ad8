"""``cmpolicy study objectives``: interrupted, gone on with, refused; with a real simulator."""

from __future__ import annotations

import json
from pathlib import Path

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


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["objectives=[isdd]"], "unknown objective 'isdd'; did you mean 'isd'"),
        (["objective=isd"], "the study chooses the objective"),
        (["seed=3"], "seeds=[0,1,2]"),
        (["nfe=[1,1]"], "different numbers"),
        (["workers=0"], "workers=0"),
        (["eval_seeds=7-3"], "7-3"),
        (["task=custom", "data.path=none.zarr", "data.obs=[x]"], "simulator"),
    ],
)
def test_what_cannot_be_studied(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], words: list[str], message: str
) -> None:
    assert _study(tmp_path / "study", *words) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "study").exists()
