"""Known weaknesses of the pinned set are named in SECURITY.md, with what they can reach."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


def test_every_known_weakness_is_named() -> None:
    pytest.importorskip("pip_audit", reason="needs pip-audit, of the extra dev")
    command = ["--format", "json", "--timeout", "5", "--progress-spinner", "off"]
    pins = ["-r", str(ROOT / "constraints.txt"), "--no-deps", "--disable-pip"]
    done = subprocess.run(
        [sys.executable, "-m", "pip_audit", *command, *pins],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    try:
        found = json.loads(done.stdout)["dependencies"]
    except ValueError:
        pytest.skip(f"the database of weaknesses is out of reach: {done.stderr.strip()[-200:]}")
    if all("skip_reason" in package for package in found):
        pytest.skip("the database of weaknesses is out of reach")
    text = (ROOT / "SECURITY.md").read_text()
    unnamed = [
        f"{package['name']} {package['version']}: {weakness['id']} {weakness['aliases']}"
        for package in found
        for weakness in package.get("vulns", ())
        if not any(name in text for name in (weakness["id"], *weakness["aliases"]))
    ]
    assert not unnamed, "\n".join(unnamed)
