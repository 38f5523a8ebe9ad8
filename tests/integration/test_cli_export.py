"""cmpolicy export: the file it writes, scored like the bundle, and its bad input."""

import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from cmpolicy.cli.main import main as command
from cmpolicy.export.runtime import open_exported
from cmpolicy.policy.bundle import read_hashes
from cmpolicy.policy.policy import ConsistencyPolicy


def evaluate(words: Sequence[str]) -> int:
    """``cmpolicy eval``."""
    return command(["eval", *words])


def main(words: Sequence[str]) -> int:
    """``cmpolicy export``."""
    return command(["export", *words])


METADATA: dict[str, Any] = {"data": "mine", "config": {"task": {"protocol": "pusht-dp"}}}


@pytest.fixture(scope="module")
def bundle(
    untrained_pusht: Callable[[], ConsistencyPolicy], tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """An untrained Push-T policy that moves, with facts in its metadata."""
    policy = untrained_pusht()
    policy.noise_scale = 0.8
    policy.control_hz = 10.0
    folder = tmp_path_factory.mktemp("policy") / "bundle"
    policy.save_pretrained(folder, metadata=METADATA)
    return folder


def _episodes(folder: Path, nfe: int) -> list[dict[str, Any]]:
    content: dict[str, Any] = json.loads((folder / f"result_nfe{nfe}.json").read_text())
    assert content["data"] == "mine"
    episodes: list[dict[str, Any]] = content["episodes"]
    return episodes


@pytest.mark.parametrize(("name", "nfe"), [("mine.onnx", 1), ("mine.onnx", 2)])
def test_exported_and_scored(
    bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str, nfe: int
) -> None:
    out = tmp_path / "new" / name
    assert main([f"policy={bundle}", f"out={out}", f"nfe={nfe}"]) == 0
    printed = capsys.readouterr().out
    assert f"written to {out}: " in printed
    assert "of the normalised range" in printed
    command = printed.splitlines()[-1].removeprefix("next: cmpolicy eval ").split()
    facts = open_exported(out).facts
    assert facts.bundle_sha256 == read_hashes(bundle)
    assert (facts.nfe, facts.noise_scale, facts.control_hz) == (nfe, 0.8, 10.0)
    assert (facts.protocol, facts.simulator) == ("pusht-dp", {})
    assert [path.name for path in out.parent.iterdir()] == [name]

    short = ["seeds=500000-500002", "workers=1", "device=cpu"]
    assert evaluate([*command[:-1], *short, f"out={tmp_path / 'file'}"]) == 0
    assert evaluate([f"policy={bundle}", f"nfe={nfe}", *short, f"out={tmp_path / 'own'}"]) == 0
    of_file, of_bundle = _episodes(tmp_path / "file", nfe), _episodes(tmp_path / "own", nfe)
    assert [e["success"] for e in of_file] == [e["success"] for e in of_bundle]
    # contacts amplify the last bits of an action over an episode
    for one, other in zip(of_file, of_bundle, strict=True):
        assert one["score"] == pytest.approx(other["score"], abs=0.02)


def test_what_was_fixed_at_export_is_not_set_by_eval(
    bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "mine.onnx"
    assert main([f"policy={bundle}", f"out={out}"]) == 0
    scored = f"out={tmp_path / 'scored'}"
    for word, message in [
        ("nfe=[1,2]", "makes 1 evaluation(s)"),
        ("sampler=diagonal", "has sampler=flow_map, not diagonal"),
        ("noise_scale=0.5", "has noise_scale=0.8, not 0.5"),
        ("n_action_steps=2", "has n_action_steps=8, not 2"),
        ("device=cuda", "runs on the CPU"),
    ]:
        assert evaluate([f"policy={out}", "seeds=500000", word, scored]) == 2
        assert message in capsys.readouterr().err
    assert not (tmp_path / "scored").exists()
    program = tmp_path / "mine.pt2"
    assert main([f"policy={bundle}", "format=pt2", f"out={program}"]) == 0
    assert "Pt2Policy" in capsys.readouterr().out
    assert evaluate([f"policy={program}", "seeds=500000", scored]) == 2
    assert "run any code" in capsys.readouterr().err
    (tmp_path / "foreign.onnx").write_bytes(b"not a model")
    assert evaluate([f"policy={tmp_path / 'foreign.onnx'}", "seeds=500000", scored]) == 2
    assert "is not a whole ONNX file of cmpolicy" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["out=x.onnx"], "setting 'policy' is missing"),
        (["policy=pusht"], "setting 'out' is missing"),
        (["policy=nowhere/at/all", "out=x.onnx"], "nowhere/at/all"),
        (["policy=pusht", "out=x.bin"], "out=x.bin: a file of format=onnx is named *.onnx"),
        (["policy=pusht", "out=x.onnx", "format=pt2"], "give out=x.pt2"),
        (["policy=pusht", "out=x.onnx", "format=tflite"], "format"),
        (["policy=pusht", "out=x.onnx", "nfe=0"], "nfe=0 must be between 1 and 32"),
        (["policy=pusht", "out=x.onnx", "nef=2"], "did you mean 'nfe'?"),
    ],
)
def test_bad_input(
    words: list[str],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(words) == 2
    printed = capsys.readouterr().err
    assert message in printed
    assert "Traceback" not in printed
    assert list(tmp_path.iterdir()) == []


def test_without_the_extra(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    assert main(["policy=pusht", f"out={tmp_path / 'x.onnx'}"]) == 2
    assert "needs onnxscript: pip install 'cmpolicy[export]'" in capsys.readouterr().err


def test_help(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--help"]) == 0
    assert "policy=BUNDLE out=FILE.onnx|FILE.pt2" in capsys.readouterr().out
    assert main([]) == 2
