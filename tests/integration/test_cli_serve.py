"""cmpolicy serve as users run it: the process, its signals, its token, and its bad input."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from websockets.exceptions import ConnectionClosed
from websockets.sync.client import ClientConnection, connect

from cmpolicy import RemotePolicy
from cmpolicy.cli.main import main as command
from cmpolicy.nn.unet1d import UNet1DConfig
from cmpolicy.normalize import Normalizer
from cmpolicy.policy.policy import ConsistencyPolicy
from cmpolicy.serve.client import RemotePolicyError
from cmpolicy.spec import PolicySpec


def bench(words: Sequence[str]) -> int:
    """``cmpolicy bench``."""
    return command(["bench", *words])


def export(words: Sequence[str]) -> int:
    """``cmpolicy export``."""
    return command(["export", *words])


def main(words: Sequence[str]) -> int:
    """``cmpolicy serve``."""
    return command(["serve", *words])


WAIT = 120.0  # s: a busy machine takes a while to load torch
OBS = {"state": np.ones((1, 2, 3), np.float32)}


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    rng = np.random.default_rng(0)
    normalizer = Normalizer.fit(
        {"state": rng.normal(size=(9, 3)), "action": rng.normal(size=(9, 2))}
    )
    spec = PolicySpec({"state": (3,)}, action_dim=2, horizon=8, n_obs_steps=2, n_action_steps=4)
    net = UNet1DConfig((8, 16), kernel_size=3, n_groups=4, time_dim=8)
    folder = tmp_path_factory.mktemp("policy") / "bundle"
    ConsistencyPolicy(spec, net, normalizer).save_pretrained(folder)
    return folder


_AS_USERS = ("-m", "cmpolicy", "serve")
_WITHOUT_TORCH = (
    "-c",
    "import sys; sys.modules['torch'] = None\n"
    "from cmpolicy.cli.main import main; sys.exit(main(['serve', *sys.argv[1:]]))",
)


@contextmanager
def _serving(
    *words: str, how: tuple[str, ...] = _AS_USERS, **environment: str
) -> Iterator[tuple[subprocess.Popen[str], str, list[str]]]:
    """The process, its address, and the lines it printed until it listened."""
    process = subprocess.Popen(
        [sys.executable, *how, *words],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | environment,
    )
    watchdog = threading.Timer(WAIT, process.kill)
    watchdog.start()
    try:
        assert process.stdout is not None
        lines = [process.stdout.readline() for _ in range(3)]
        found = re.search(r"ws://[^ ]+", lines[0])
        assert found, process.stderr and process.stderr.read()
        yield process, found[0], lines
    finally:
        watchdog.cancel()
        process.kill()
        process.communicate()


def test_served_and_ended_by_ctrl_c(bundle: Path) -> None:
    with _serving(f"policy={bundle}", "port=0", "nfe=2", "seed=1") as (process, url, lines):
        assert f"serving {bundle} at {url} (2 evaluation(s) per chunk, cpu)" in lines[0]
        example = lines[1].strip() + "\n" + lines[2].strip()  # it works with arrays for shapes
        example = re.sub(r"\(B, ([\d, ]+)\)(?=[,}])", r"np.zeros((1, \1))", example)
        scope: dict[str, Any] = {"np": np}
        exec(example, scope)
        assert scope["actions"].shape == (1, 4, 2)
        scope["policy"].close()
        with RemotePolicy(url) as remote, connect(url, proxy=None) as idle:
            local = ConsistencyPolicy.from_pretrained(bundle).eval()
            local.nfe = 2
            noise = np.ones((1, *local.spec.noise_shape), np.float32)
            np.testing.assert_allclose(remote.infer(OBS, noise), local.infer(OBS, noise), atol=1e-5)
            idle.recv(timeout=WAIT)
            _ended_by(process, signal.SIGINT, idle)


def test_token_of_the_environment_and_ended_by_sigterm(bundle: Path) -> None:
    with _serving(f"policy={bundle}", "port=0", CMPOLICY_TOKEN="s3cret") as (process, url, lines):
        assert "token=..." in lines[1]
        assert "s3cret" not in "".join(lines)
        with pytest.raises(RemotePolicyError, match="refused the token"):
            RemotePolicy(url)
        RemotePolicy(url, token="s3cret").close()
        headers = {"Authorization": "Bearer s3cret"}
        with connect(url, proxy=None, additional_headers=headers) as idle:
            idle.recv(timeout=WAIT)
            assert "s3cret" not in _ended_by(process, signal.SIGTERM, idle)


def _ended_by(
    process: subprocess.Popen[str], number: signal.Signals, idle: ClientConnection
) -> str:
    """Signal the process; it tells its clients, says so, and ends well. Returns what it wrote."""
    process.send_signal(number)
    with pytest.raises(ConnectionClosed) as closed:
        idle.recv(timeout=WAIT)
    assert closed.value.rcvd is not None
    assert closed.value.rcvd.code == 1001
    _, written = process.communicate(timeout=WAIT)
    assert process.returncode == 0
    assert "1 answered, 0 refused" in written or "0 answered, 0 refused" in written
    assert written.endswith("cmpolicy serve: stopped\n")
    assert "Traceback" not in written
    return written


@pytest.fixture(scope="module")
def exported(bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("onnxruntime")
    file = tmp_path_factory.mktemp("exported") / "policy.onnx"
    assert export([f"policy={bundle}", f"out={file}", "nfe=2"]) == 0
    return file


def test_an_exported_file_is_served_without_torch(bundle: Path, exported: Path) -> None:
    local = ConsistencyPolicy.from_pretrained(bundle).eval()
    local.nfe = 2
    with _serving(f"policy={exported}", "port=0", how=_WITHOUT_TORCH) as (process, url, lines):
        assert f"serving {exported} at {url} (2 evaluation(s) per chunk, cpu)" in lines[0]
        with RemotePolicy(url) as remote, connect(url, proxy=None) as idle:
            noise = np.ones((1, *local.spec.noise_shape), np.float32)
            np.testing.assert_allclose(remote.infer(OBS, noise), local.infer(OBS, noise), atol=1e-4)
            idle.recv(timeout=WAIT)
            _ended_by(process, signal.SIGTERM, idle)


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("nfe=4", "was exported with nfe=2; leave nfe out"),
        ("device=cuda", "an exported file runs on the CPU"),
    ],
)
def test_what_an_exported_file_cannot(
    word: str, message: str, exported: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([f"policy={exported}", word]) == 2
    assert message in capsys.readouterr().err


def test_port_in_use(bundle: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        assert main([f"policy={bundle}", f"port={port}"]) == 2
    printed = capsys.readouterr().err
    assert f"cannot listen on ws://127.0.0.1:{port}" in printed
    assert "in use; choose another port, or port=0" in printed
    assert "Traceback" not in printed


def test_warnings(bundle: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = [f"policy={bundle}", "host=no.such.host.invalid"]
    assert main(words) == 2
    assert "anyone who can reach no.such.host.invalid" in capsys.readouterr().err
    assert main([*words, "token=1234"]) == 2
    assert "a token on the command line is visible" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["port=1"], "setting 'policy' is missing"),
        (["policy=nowhere/at/all"], "nowhere/at/all"),
        (["policy=x", "prot=8000"], "did you mean 'port'?"),
        (["policy=x", "8000"], "'8000' is not a setting"),
        (["policy=x", "port=70000"], "port=70000 must lie between 0 and 65535"),
        (["policy=x", "port=http"], "port must be a whole number, got 'http'"),
        (["policy=x", "nfe=0"], "nfe=0 must be at least 1"),
        (["policy=x", "threads=0"], "threads=0 must be at least 1"),
        (["policy=x", "idle_timeout=-1"], "idle_timeout=-1.0 must be a number of seconds, or 0"),
        (["policy=x", "seed=-1"], "seed=-1 must be at least 0"),
        (["policy=x", "device=warp"], "device=warp is no device"),
        (["policy={bundle}", "token=''"], "the token must be of visible ASCII"),
    ],
)
def test_bad_input(
    words: list[str], message: str, bundle: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([word.format(bundle=bundle) for word in words]) == 2
    printed = capsys.readouterr().err
    assert message in printed
    assert "Traceback" not in printed


def test_an_empty_token_is_a_mistake(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("CMPOLICY_TOKEN", "")
    assert main(["policy=pusht"]) == 2
    assert "CMPOLICY_TOKEN is empty" in capsys.readouterr().err


def test_help(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--help"]) == 0
    assert "CMPOLICY_TOKEN" in capsys.readouterr().out
    assert main([]) == 2


def test_bench(bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:

    out = tmp_path / "server.json"
    words = [f"policy={bundle}", "pairs=10", "clients=4", "seconds=0.5", f"out={out}"]
    assert bench(["server", *words]) == 0
    content = json.loads(out.read_text())
    summary = content["summary"]
    assert len(content["rows"]) == 4 + 4
    assert summary["served_fewest"] > 0
    assert summary["round_trip_ms_p50"] > 0
    assert summary["policy_ms_p50"] > 0
    assert summary["error_after"] < 1e-4
    assert "4 clients in 0.5 s" in capsys.readouterr().out
    assert bench(["server", "policy=x", "clients=0"]) == 2
    assert "clients=0 must be at least 1" in capsys.readouterr().err
