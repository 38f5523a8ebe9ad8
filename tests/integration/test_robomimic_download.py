"""Official files from a small server on this machine that speaks as the Hugging Face hub does."""

import hashlib
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from cmpolicy.cli.main import main as command
from cmpolicy_data.download import DownloadError
from cmpolicy_data.robomimic_download import TYPES, download, hub_path


def main(words: Sequence[str]) -> int:
    """``cmpolicy data``."""
    return command(["data", *words])


pytest.importorskip("h5py")

COMMIT = "0123456789abcdef0123456789abcdef01234567"
PREFIX = "/datasets/robomimic/robomimic_datasets/resolve/"


@dataclass
class Hub:
    """What the server holds, by path in the repository, and what it was asked for."""

    files: dict[str, bytes] = field(default_factory=dict)
    cut: int | None = None
    asked: list[str] = field(default_factory=list)
    address: str = ""


class Handler(BaseHTTPRequestHandler):
    hub: Hub

    def do_HEAD(self) -> None:
        self._answer(with_body=False)

    def do_GET(self) -> None:
        self._answer(with_body=True)

    def _answer(self, *, with_body: bool) -> None:
        self.hub.asked.append(f"{self.command} {self.path}")
        revision, _, name = self.path.removeprefix(PREFIX).partition("/")
        content = self.hub.files.get(name)
        known = self.path.startswith(PREFIX) and revision in ("main", COMMIT)
        if content is None or not known:
            self.send_response(404)
            self.send_header("X-Error-Code", "EntryNotFound" if known else "RevisionNotFound")
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        self.send_response(200)
        self.send_header("X-Repo-Commit", COMMIT)
        self.send_header("ETag", f'"{hashlib.sha256(content).hexdigest()}"')
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if with_body:
            self.wfile.write(content[: self.hub.cut])

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    made = Hub()
    handler = type("OneHandler", (Handler,), {"hub": made})
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
        thread.start()
        made.address = f"http://127.0.0.1:{server.server_port}"
        yield made
        server.shutdown()
        thread.join()


@pytest.fixture
def content(tmp_path: Path, write_robomimic: Callable[..., Path]) -> bytes:
    path = write_robomimic(tmp_path / "served.hdf5")
    data = path.read_bytes()
    path.unlink()
    return data


def test_a_file_is_fetched_once(hub: Hub, content: bytes, tmp_path: Path):
    hub.files["v1.5/square/ph/low_dim_v15.hdf5"] = content
    path = download("square", out=tmp_path, endpoint=hub.address)
    assert path == tmp_path / "robomimic" / "v1.5" / "square" / "ph" / "low_dim_v15.hdf5"
    assert path.read_bytes() == content
    assert download("square", out=tmp_path, endpoint=hub.address) == path
    assert sum(request.startswith("GET") for request in hub.asked) == 1


def test_the_command(hub: Hub, content: bytes, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    hub.files["v1.5/can/mg/low_dim_sparse_v15.hdf5"] = content
    arguments = ["task=can", "type=mg", f"out={tmp_path}", f"endpoint={hub.address}"]
    status = main(["download", "robomimic", *arguments, f"revision={COMMIT}"])
    out, _ = capsys.readouterr()
    assert status == 0
    path = tmp_path / "robomimic" / "v1.5" / "can" / "mg" / "low_dim_sparse_v15.hdf5"
    assert f"{path}: readable" in out
    assert f"cmpolicy data convert robomimic {path} out=can_mg.zarr" in out


def test_a_file_that_the_repository_lacks(hub: Hub, tmp_path: Path):
    with pytest.raises(DownloadError, match=r"lift/ph/low_dim_v15\.hdf5 could not be downloaded"):
        download("lift", out=tmp_path, endpoint=hub.address)


def test_a_connection_that_breaks_leaves_no_file(hub: Hub, content: bytes, tmp_path: Path):
    hub.files["v1.5/lift/ph/low_dim_v15.hdf5"] = content
    hub.cut = len(content) // 2
    with pytest.raises(DownloadError, match="could not be downloaded"):
        download("lift", out=tmp_path, endpoint=hub.address)
    assert list(tmp_path.rglob("*.hdf5")) == []
    hub.cut = None
    assert download("lift", out=tmp_path, endpoint=hub.address).read_bytes() == content


def test_a_file_that_is_no_demonstrations(hub: Hub, tmp_path: Path):
    hub.files["v1.5/lift/ph/low_dim_v15.hdf5"] = b"<html>log in first</html>"
    with pytest.raises(DownloadError, match=r"was downloaded, but: .* not an HDF5 file.*Delete"):
        download("lift", out=tmp_path, endpoint=hub.address)


def test_without_a_network(
    hub: Hub, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    # As HF_HUB_OFFLINE=1, which is read at import; a dead network is retried for 20 s before.
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    arguments = ["task=square", f"out={tmp_path}", f"endpoint={hub.address}"]
    assert main(["download", "robomimic", *arguments]) == 2
    out, err = capsys.readouterr()
    assert (out, hub.asked) == ("", [])
    where = f"{hub.address}{PREFIX}main/v1.5/square/ph/low_dim_v15.hdf5"
    assert f"cmpolicy data: {where} could not be downloaded" in err
    assert "`cmpolicy data convert robomimic FILE`" in err
    assert "cmpolicy data generate robomimic task=square" in err


@pytest.mark.parametrize("type", TYPES)
def test_paths(type: str):
    for task in TYPES[type][0]:
        assert hub_path(task, type) == f"v1.5/{task}/{type}/{TYPES[type][1]}"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "name the task"),
        (["task=door"], "no ph demonstrations of the task 'door'; tasks: lift, can, square"),
        (["task=square", "type=mg"], "no mg demonstrations of the task 'square'; tasks: lift, can"),
        (["task=lift", "type=pro"], "of type 'pro'; types: ph, mh, mg, paired"),
    ],
)
def test_bad_arguments(capsys: pytest.CaptureFixture[str], arguments: list[str], message: str):
    assert main(["download", "robomimic", *arguments]) == 2
    assert message in capsys.readouterr().err
