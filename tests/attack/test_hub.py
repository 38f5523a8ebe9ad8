"""A hub or a proxy that accepts connections and says nothing (hardening: no end after 420 s)."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

_LOAD = """
import sys
from cmpolicy import ConsistencyPolicy
from cmpolicy.image.pipeline import ConsistencyImagePipeline
kinds = {"policy": ConsistencyPolicy, "image": ConsistencyImagePipeline}
try:
    kinds[sys.argv[1]].from_pretrained("owner/name")
except ValueError as error:
    print("refused:", error)
"""


@pytest.mark.parametrize("kind", ["policy", "image"])
def test_a_silent_hub_ends_in_one_message(tmp_path: Path, kind: str) -> None:
    with socket.create_server(("127.0.0.1", 0), backlog=50) as server:
        endpoint = f"http://127.0.0.1:{server.getsockname()[1]}"
        environment = os.environ | {"HF_ENDPOINT": endpoint, "HF_HOME": str(tmp_path)}
        environment |= {"HF_HUB_DISABLE_TELEMETRY": "1", "NO_PROXY": "127.0.0.1"}
        environment.pop("HF_HUB_OFFLINE", None)
        begin = time.monotonic()
        done = subprocess.run(
            [sys.executable, "-c", _LOAD, kind],
            env=environment,
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )
        taken = time.monotonic() - begin
    print(f"ended after {taken:.0f} s")
    assert done.returncode == 0, done.stderr
    assert "'owner/name' could not be fetched" in done.stdout
