"""The two entries of the checks: `make install` on a wrong Python, and the verdict of .ci/run."""

import shutil
import subprocess
from pathlib import Path

import pytest


def _project(tmp_path: Path, repository: Path, recipe: str) -> Path:
    """A folder with the real .ci/run over a Makefile whose `test` is the recipe."""
    (tmp_path / ".ci").mkdir()
    shutil.copy(repository / ".ci" / "run", tmp_path / ".ci" / "run")
    (tmp_path / "Makefile").write_text(f"test:\n\t@{recipe}\n")
    return tmp_path / ".ci" / "run"


PASSED = "===== 3 passed, 1 skipped in 2.31s ====="
EMPTY = "===== no tests ran in 0.01s ====="
SKIPPED = "===== 4 skipped in 0.20s ====="
FAILED = "===== 1 failed, 3 passed in 2.31s ====="
LONG = "===== 400 passed, 2 warnings in 312.31s (0:05:12) ====="


@pytest.mark.parametrize(
    ("closing", "status", "good"),
    [
        (PASSED, 0, True),
        (LONG, 0, True),
        (FAILED, 1, False),
        (EMPTY, 5, False),
        (EMPTY, 0, False),
        (SKIPPED, 0, False),
    ],
)
def test_ci_verdict(
    tmp_path: Path, repository: Path, closing: str, status: int, good: bool
) -> None:
    run = _project(tmp_path, repository, f"echo '{closing}'; exit {status}")
    done = subprocess.run([str(run)], capture_output=True, text=True, check=False)
    assert (done.returncode == 0) is good
    assert done.stdout.splitlines()[-1] == closing


def test_ci_fails_when_a_step_before_pytest_fails(tmp_path: Path, repository: Path) -> None:
    run = _project(tmp_path, repository, "echo 'Found 3 errors.'; exit 1")
    done = subprocess.run([str(run)], capture_output=True, text=True, check=False)
    assert done.returncode != 0
    assert "make test failed" in done.stderr


def _install(folder: Path, repository: Path, python: str) -> subprocess.CompletedProcess[str]:
    for name in ("Makefile", "pyproject.toml", "constraints.txt"):
        shutil.copy(repository / name, folder / name)
    command = ["make", "install", f"PYTHON={python}"]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)


def test_install_refuses_an_old_python(tmp_path: Path, repository: Path) -> None:
    old = tmp_path / "python3.10"
    old.write_text('#!/bin/sh\n[ "$1" = -V ] && echo "Python 3.10.13" && exit 0\nexit 1\n')
    old.chmod(0o755)
    done = _install(tmp_path, repository, str(old))
    assert done.returncode != 0
    assert "needs Python 3.11 or newer" in done.stderr
    assert "Python 3.10.13" in done.stderr
    assert not (tmp_path / ".venv").exists()


def test_install_names_a_missing_python(tmp_path: Path, repository: Path) -> None:
    done = _install(tmp_path, repository, "python-of-nowhere")
    assert done.returncode != 0
    assert "'python-of-nowhere' was not found" in done.stderr


def test_make_alone_lists_the_targets(repository: Path) -> None:
    done = subprocess.run(
        ["make", "--no-print-directory"], cwd=repository, capture_output=True, text=True, check=True
    )
    listed = {line.split()[1] for line in done.stdout.splitlines() if line.startswith("  make ")}
    assert {"help", "install", "demo", "test", "lint", "types", "unit", "bench", "clean"} <= listed
