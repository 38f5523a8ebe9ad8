"""Downloads from a local HTTP server that misbehaves in the ways servers and networks do."""

import hashlib
import io
import threading
import zipfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest

from cmpolicy.cli.main import main as command
from cmpolicy_data import ReplayBuffer, load_demonstrations
from cmpolicy_data.download import (
    PUSHT_HUMAN,
    DownloadError,
    RemoteDataset,
    array_hash,
    download,
    fetch,
)


def main(words: Sequence[str]) -> int:
    """``cmpolicy data``."""
    return command(["data", *words])


CONTENT = bytes(np.random.default_rng(0).integers(0, 256, 400_000, dtype=np.uint8))


@dataclass
class Behaviour:
    """What the server does; ``cuts`` and ``errors`` are used up one per request."""

    content: bytes = CONTENT
    etag: str | None = '"v1"'
    ranges: bool = True
    tell_length: bool = True
    cuts: list[int | None] = field(default_factory=list)
    errors: list[int] = field(default_factory=list)
    wrong_range: bool = False
    requests: list[str | None] = field(default_factory=list)
    url: str = ""


class Handler(BaseHTTPRequestHandler):
    behaviour: Behaviour

    def do_GET(self) -> None:
        does = self.behaviour
        asked = self.headers.get("Range")
        does.requests.append(asked)
        if self.path != "/pusht.zip":
            self.send_error(404)
            return
        if does.errors:
            self.send_error(does.errors.pop(0))
            return
        body, start = does.content, 0
        guard = self.headers.get("If-Range")
        if asked and does.ranges and guard == does.etag:
            start = int(asked.removeprefix("bytes=").removesuffix("-"))
            if start >= len(body):
                self.send_response(416)
                self.send_header("Content-Range", f"bytes */{len(body)}")
                self.send_header("Content-Length", "0")
                self.end_headers()
                return
            told = start + does.wrong_range
            self.send_response(206)
            self.send_header("Content-Range", f"bytes {told}-{len(body) - 1}/{len(body)}")
        else:
            self.send_response(200)
        if does.etag:
            self.send_header("ETag", does.etag)
        if does.tell_length:
            self.send_header("Content-Length", str(len(body) - start))
        self.end_headers()
        cut = does.cuts.pop(0) if does.cuts else None
        self.wfile.write(body[start : None if cut is None else start + cut])

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Behaviour]:
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    behaviour = Behaviour()
    handler = type("OneHandler", (Handler,), {"behaviour": behaviour})
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as made:
        thread = threading.Thread(target=made.serve_forever, args=(0.01,), daemon=True)
        thread.start()
        behaviour.url = f"http://127.0.0.1:{made.server_port}/pusht.zip"
        yield behaviour
        made.shutdown()
        thread.join()


def quick(behaviour: Behaviour, target: Path, **settings: object) -> Path:
    return fetch(behaviour.url, target, retry_wait_s=0.0, **settings)  # type: ignore[arg-type]


class TestFetch:
    def test_a_file_with_its_digest_and_progress(self, server: Behaviour, tmp_path: Path):
        told: list[tuple[int, int | None]] = []
        digest = hashlib.sha256(CONTENT).hexdigest()
        path = quick(
            server,
            tmp_path / "x.zip",
            sha256=digest.upper(),
            progress=lambda done, total: told.append((done, total)),
        )
        assert path.read_bytes() == CONTENT
        assert told[0] == (0, len(CONTENT))
        assert told[-1] == (len(CONTENT), len(CONTENT))
        assert [p.name for p in tmp_path.iterdir()] == ["x.zip"]

    def test_a_cut_connection_is_resumed(self, server: Behaviour, tmp_path: Path):
        server.cuts = [100_000, 50_000]
        assert quick(server, tmp_path / "x.zip").read_bytes() == CONTENT
        assert server.requests == [None, "bytes=100000-", "bytes=150000-"]

    def test_a_later_run_goes_on(self, server: Behaviour, tmp_path: Path):
        server.cuts = [100_000]
        with pytest.raises(DownloadError, match=r"100000 bytes are kept in .*goes on from there"):
            quick(server, tmp_path / "x.zip", retries=0)
        assert not (tmp_path / "x.zip").exists()
        assert quick(server, tmp_path / "x.zip").read_bytes() == CONTENT
        assert server.requests == [None, "bytes=100000-"]

    def test_a_run_that_stopped_at_the_last_byte(self, server: Behaviour, tmp_path: Path):
        server.cuts = [len(CONTENT) - 1]
        with pytest.raises(DownloadError):
            quick(server, tmp_path / "x.zip", retries=0)
        with (tmp_path / "x.zip.part").open("ab") as part:
            part.write(CONTENT[-1:])
        assert quick(server, tmp_path / "x.zip").read_bytes() == CONTENT

    def test_a_file_that_changed_on_the_server_is_fetched_anew(
        self, server: Behaviour, tmp_path: Path
    ):
        server.cuts = [100_000]
        with pytest.raises(DownloadError):
            quick(server, tmp_path / "x.zip", retries=0)
        server.content, server.etag = CONTENT[::-1], '"v2"'
        assert quick(server, tmp_path / "x.zip").read_bytes() == CONTENT[::-1]

    def test_a_shorter_file_than_what_is_kept(self, server: Behaviour, tmp_path: Path):
        server.cuts = [100_000]
        with pytest.raises(DownloadError):
            quick(server, tmp_path / "x.zip", retries=0)
        server.content = CONTENT[:5000]  # and yet the same tag
        assert quick(server, tmp_path / "x.zip").read_bytes() == CONTENT[:5000]

    def test_a_server_without_ranges(self, server: Behaviour, tmp_path: Path):
        server.ranges, server.cuts = False, [100_000]
        assert quick(server, tmp_path / "x.zip").read_bytes() == CONTENT
        assert server.requests == [None, "bytes=100000-"]

    @pytest.mark.parametrize("etag", [None, 'W/"weak"'])
    def test_without_a_strong_tag_nothing_is_glued(
        self, server: Behaviour, tmp_path: Path, etag: str | None
    ):
        server.etag, server.cuts = etag, [100_000]
        assert quick(server, tmp_path / "x.zip").read_bytes() == CONTENT
        assert server.requests == [None, None]

    def test_a_server_that_sends_another_range(self, server: Behaviour, tmp_path: Path):
        server.wrong_range, server.cuts = True, [100_000]
        assert quick(server, tmp_path / "x.zip").read_bytes() == CONTENT

    def test_a_server_that_does_not_tell_the_length(self, server: Behaviour, tmp_path: Path):
        server.tell_length = False
        told: list[int | None] = []
        path = quick(server, tmp_path / "x.zip", progress=lambda _, total: told.append(total))
        assert path.read_bytes() == CONTENT
        assert set(told) == {None}

    def test_another_address_does_not_continue_this_part(self, server: Behaviour, tmp_path: Path):
        (tmp_path / "x.zip.part").write_bytes(b"of something else")
        assert quick(server, tmp_path / "x.zip").read_bytes() == CONTENT
        assert server.requests == [None]

    def test_a_wrong_digest(self, server: Behaviour, tmp_path: Path):
        with pytest.raises(DownloadError, match=r"has SHA-256 .*, expected abc.*removed"):
            quick(server, tmp_path / "x.zip", sha256="abc")
        assert list(tmp_path.iterdir()) == []

    def test_not_found_is_not_tried_again(self, server: Behaviour, tmp_path: Path):
        server.url = server.url.replace("pusht", "nope")
        with pytest.raises(DownloadError, match=r"nope.zip answered 404 .*another source"):
            quick(server, tmp_path / "x.zip")
        assert len(server.requests) == 1

    def test_an_overloaded_server_is_tried_again(self, server: Behaviour, tmp_path: Path):
        server.errors = [503, 429]
        assert quick(server, tmp_path / "x.zip").read_bytes() == CONTENT
        server.errors = [503] * 9
        with pytest.raises(DownloadError, match="answered 503"):
            quick(server, tmp_path / "y.zip", retries=2)

    def test_nobody_answers(self, server: Behaviour, tmp_path: Path):
        # Port 9 (discard) is closed on any machine that runs tests.
        with pytest.raises(DownloadError, match=r"could not be downloaded.*Check the network"):
            fetch("http://127.0.0.1:9/x.zip", tmp_path / "x.zip", retries=1, retry_wait_s=0.0)

    @pytest.mark.parametrize("url", ["not a url", "htp://x/y.zip"])
    def test_no_address_at_all(self, tmp_path: Path, url: str):
        with pytest.raises(DownloadError, match=r"not an http"):
            fetch(url, tmp_path / "x.zip")


@pytest.fixture
def dataset(server: Behaviour, tmp_path: Path) -> RemoteDataset:
    """A tiny data set in an archive like the public one, served."""
    rng = np.random.default_rng(0)
    store = tmp_path / "source" / "tiny.zarr"
    store.parent.mkdir()
    buffer = ReplayBuffer.create(store)
    buffer.append_episode({"action": rng.normal(size=(9, 2)).astype(np.float32)})
    serve(server, {f"pusht/tiny.zarr/{name}": data for name, data in files(store).items()})
    hashes = {
        "action": array_hash(buffer.load("action")),
        "episode_ends": array_hash(buffer.episode_ends),
    }
    return RemoteDataset(url=server.url, store="tiny.zarr", hashes=hashes)


def files(folder: Path) -> dict[str, bytes]:
    members = (p for p in folder.rglob("*") if p.is_file())
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in members}


def serve(server: Behaviour, members: dict[str, bytes], link: str | None = None) -> None:
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w") as archive:
        for name, data in members.items():
            archive.writestr(name, data)
        if link is not None:
            info = zipfile.ZipInfo("pusht/tiny.zarr/link")
            info.external_attr = 0o120777 << 16
            archive.writestr(info, link)
    server.content = content.getvalue()


class TestDownload:
    def test_fetched_checked_and_unpacked(
        self, server: Behaviour, dataset: RemoteDataset, tmp_path: Path
    ):
        server.cuts = [500]
        out = tmp_path / "data"
        path = download(dataset, out, retry_wait_s=0.0)
        assert path == out / "tiny.zarr"
        assert load_demonstrations(path, ["action"]).action.shape == (9, 2)
        assert [p.name for p in out.iterdir()] == ["tiny.zarr"]
        n_requests = len(server.requests)
        assert download(dataset, out) == path  # it is there
        assert len(server.requests) == n_requests

    def test_the_default_folder(
        self, dataset: RemoteDataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ):
        monkeypatch.setenv("CMPOLICY_DATA", str(tmp_path / "env"))
        assert download(dataset) == tmp_path / "env" / "tiny.zarr"

    def test_other_content_is_not_put_in_place(
        self, server: Behaviour, dataset: RemoteDataset, tmp_path: Path
    ):
        other = ReplayBuffer.create(tmp_path / "other.zarr")
        other.append_episode({"action": np.ones((9, 2), np.float32)})
        serve(server, {f"tiny.zarr/{name}": data for name, data in files(other.path).items()})
        with pytest.raises(DownloadError, match=r"not the expected data: action in .* has hash"):
            download(dataset, tmp_path / "data")
        assert list((tmp_path / "data").iterdir()) == []

    def test_something_else_is_there_already(self, dataset: RemoteDataset, tmp_path: Path):
        ReplayBuffer.create(tmp_path / "tiny.zarr").append_episode({"action": np.ones((2, 2))})
        with pytest.raises(DownloadError, match=r"there already, but it is not.*Delete it"):
            download(dataset, tmp_path)

    @pytest.mark.parametrize("name", ["../evil", "/evil", "tiny.zarr/../../evil", "C:/evil"])
    def test_members_that_point_outside(
        self, server: Behaviour, dataset: RemoteDataset, tmp_path: Path, name: str
    ):
        serve(server, {name: b"evil", "tiny.zarr/x": b""})
        with pytest.raises(DownloadError, match="points outside the archive"):
            download(dataset, tmp_path / "data")
        assert not list(tmp_path.rglob("evil*"))

    def test_links_are_refused(self, server: Behaviour, dataset: RemoteDataset, tmp_path: Path):
        serve(server, {"tiny.zarr/x": b""}, link="/etc/passwd")
        with pytest.raises(DownloadError, match="points outside"):
            download(dataset, tmp_path / "data")

    def test_no_archive_and_no_store_in_it(
        self, server: Behaviour, dataset: RemoteDataset, tmp_path: Path
    ):
        server.content = b"<html>moved</html>"
        with pytest.raises(DownloadError, match=r"not a whole \.zip archive"):
            download(dataset, tmp_path / "data")
        serve(server, {"README": b""})
        with pytest.raises(DownloadError, match=r"no folder tiny.zarr in it"):
            download(dataset, tmp_path / "data")

    def test_the_command(
        self,
        server: Behaviour,
        pusht_human: Path,
        tmp_path: Path,
        capsys: pytest.CaptureFixture[str],
    ):
        """The human store, without its images, through ``cmpolicy data download``."""
        members = {
            f"pusht/{PUSHT_HUMAN.store}/{name}": data
            for part in ("data/action", "data/state", "data/keypoint", "meta")
            for name, data in ((f"{part}/{k}", v) for k, v in files(pusht_human / part).items())
        }
        for name in (".zgroup", "data/.zgroup"):
            members[f"pusht/{PUSHT_HUMAN.store}/{name}"] = (pusht_human / name).read_bytes()
        serve(server, members)
        digest = hashlib.sha256(server.content).hexdigest()
        options = [f"url={server.url}", f"out={tmp_path}", f"sha256={digest}"]
        assert main(["download", "pusht", *options]) == 0
        out, err = capsys.readouterr()
        store = tmp_path / PUSHT_HUMAN.store
        assert out.startswith(f"{store}: verified")
        assert f"data.path={store}" in out
        assert err == ""  # no progress bar unless on a terminal
        assert ReplayBuffer.open(store).n_episodes == 206

    def test_the_command_says_what_is_wrong(
        self, server: Behaviour, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ):
        url = server.url.replace("pusht", "nope")
        assert main(["download", "pusht", f"url={url}", f"out={tmp_path}"]) == 2
        assert "answered 404" in capsys.readouterr().err
