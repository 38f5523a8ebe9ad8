"""``cmpolicy data`` as a user meets it: output, messages, exit status."""

import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import zarr

from cmpolicy.cli.main import main as command
from cmpolicy_data import ReplayBuffer, validate


def main(words: Sequence[str]) -> int:
    """``cmpolicy data``."""
    return command(["data", *words])


@pytest.fixture
def store(tmp_path: Path) -> Path:
    buffer = ReplayBuffer.create(tmp_path / "demos.zarr")
    for length in (5, 9):
        buffer.append_episode({"action": np.ones((length, 2)), "state": np.ones((length, 3))})
    return buffer.path


def run(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str, str]:
    status = main([str(argument) for argument in arguments])
    out, err = capsys.readouterr()
    assert "Traceback" not in out + err
    return status, out, err


def test_inspect(capsys: pytest.CaptureFixture[str], store: Path):
    status, out, _ = run(capsys, "inspect", store)
    assert status == 0
    assert "2 episodes, 14 steps" in out


def test_validate_a_good_and_a_bad_store(capsys: pytest.CaptureFixture[str], store: Path):
    status, out, _ = run(capsys, "validate", store)
    assert status == 0
    assert out.endswith(f"{store}: no problems, 1 warning(s)\n")
    assert "92% of the steps repeat the one before" in out
    assert run(capsys, "validate", store, "strict=true")[0] == 1
    assert run(capsys, "validate", store, "keys=[action,'state[:3]']")[0] == 0
    status, out, _ = run(capsys, "validate", store, "keys=[pose,action]")
    assert status == 1
    assert "data/pose: missing key 'pose' (keys: action, state)" in out
    root = zarr.open_group(store, mode="r+")
    for key, value in (("action", np.nan), ("state", 1.0)):
        root[f"data/{key}"].resize((14 + 60, *root[f"data/{key}"].shape[1:]))
        root[f"data/{key}"][14:] = value
    root["meta/episode_ends"].resize((2 + 60,))
    root["meta/episode_ends"][2:] = 15 + np.arange(60)
    status, out, _ = run(capsys, "validate", store)
    assert status == 1
    assert "data/action: nan (not finite) at step 14 (episode 2, its step 0)" in out
    assert "... and 10 more" in out
    assert out.endswith(f"{store}: 60 problem(s)\n")


def test_pack(capsys: pytest.CaptureFixture[str], store: Path, tmp_path: Path):
    status, out, _ = run(capsys, "pack", store, tmp_path / "demos.zarr.zip")
    assert status == 0
    assert out.startswith(f"{tmp_path / 'demos.zarr.zip'}: ")
    assert validate(tmp_path / "demos.zarr.zip") == []


def test_generate(capsys: pytest.CaptureFixture[str], tmp_path: Path):
    out = tmp_path / "one.zarr.zip"
    status, text, err = run(capsys, "generate", "pusht", "episodes=1", "workers=1", f"out={out}")
    assert status == 0
    assert f"{out}: 1 episodes" in text
    assert err == ""
    assert validate(out, ["action", "state[:5]", "keypoint"]) == []
    assert ReplayBuffer.open(out).n_episodes == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["inspect", "nope"], "'nope' is neither a data set by name"),
        (["validate", "nope"], "cmpolicy data download pusht"),
        (["validate", "STORE", "key=action"], "unknown setting 'key'; did you mean 'keys'?"),
        (["validate", "STORE", "keys=[state[]"], "cannot read 'keys=[state[]'"),
        (["generate", "robomimic", "task=lift", "astray=0.5"], "astray=0.5: only pusht has it"),
        (["generate", "robomimic", "task=lift", "astray_by=p"], "astray_by=p: only pusht has it"),
        (["generate", "pusht", "episodes=many"], "episodes must be a whole number, got 'many'"),
        (["pack", "STORE", "x.tar"], "must end in .zip"),
        (["inspect", "FILE"], "not a whole .zip archive"),
    ],
)
def test_errors(
    capsys: pytest.CaptureFixture[str],
    store: Path,
    tmp_path: Path,
    arguments: list[str],
    message: str,
):
    (tmp_path / "file.zip").write_text("no")
    names = {"STORE": str(store), "FILE": str(tmp_path / "file.zip")}
    status, out, err = run(capsys, *(names.get(a, a) for a in arguments))
    assert (status, out) == (2, "")
    assert err.startswith("cmpolicy data: ")
    assert message in err


@pytest.mark.parametrize("arguments", [[], ["frob"], ["generate"], ["download", "kitchen"]])
def test_usage(capsys: pytest.CaptureFixture[str], arguments: list[str]):
    assert main(arguments) == 2
    assert capsys.readouterr().err.startswith("cmpolicy data: ")


@pytest.mark.parametrize("words", [["data", "inspect", "demos.zarr"], ["data", "--help"]])
def test_a_reader_that_ends_early_is_no_error(store: Path, words: list[str]) -> None:
    """``cmpolicy data inspect x | head`` printed "[Errno 32] Broken pipe"."""
    reading, writing = os.pipe()
    os.close(reading)
    code = "import sys; from cmpolicy.cli.main import main; sys.exit(main())"
    done = subprocess.run(
        [sys.executable, "-c", code, *words],
        cwd=store.parent,
        stdout=writing,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
    )
    os.close(writing)
    assert (done.returncode, done.stderr) == (141, "")


def test_inspect_shows_the_keys_beside_one_that_cannot_be_read(
    capsys: pytest.CaptureFixture[str], store: Path
) -> None:
    root = zarr.open_group(store, mode="r+")
    values = np.ones((14, 2), np.float32)
    root.create_array("data/stage", data=values, chunks=(7, 2), fill_value=np.nan)
    (store / "data/stage/c/1/0").unlink()
    status, out, _ = run(capsys, "inspect", store)
    assert status == 0
    assert "  state[2]" in out
    assert "no percentiles of stage: " in out
