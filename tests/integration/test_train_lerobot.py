"""``cmpolicy train task=lerobot data.repo_id=owner/name``: from a cache, a hub, or neither."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

import numpy as np
import pytest

from cmpolicy.policy.policy import ConsistencyPolicy
from cmpolicy_data import ReplayBuffer

pytest.importorskip("pyarrow")
pytest.importorskip("av")

from cmpolicy_data.convert.lerobot.writing import write

COMMIT = "c0ffee" + 34 * "0"


@contextmanager
def serve(folder: Path, repo_id: str) -> Iterator[tuple[str, list[str]]]:
    """Serve a folder as the data set ``repo_id``; others are private.

    Yields:
        Its address, for HF_ENDPOINT, and the files that are asked for, in order.
    """
    asked: list[str] = []
    files = {str(f.relative_to(folder)): f for f in folder.rglob("*") if f.is_file()}

    class Hub(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            path = self.path.partition("?")[0]
            about = {"id": repo_id, "sha": COMMIT, "siblings": [{"rfilename": f} for f in files]}
            if path.startswith(f"/api/datasets/{repo_id}/tree/"):
                sizes = [(name, file.stat().st_size) for name, file in files.items()]
                entries = [
                    {"type": "file", "path": name, "size": size, "oid": f"{i:040x}"}
                    for i, (name, size) in enumerate(sizes)
                ]
                return self.answer(json.dumps(entries).encode())
            if path.startswith(f"/api/datasets/{repo_id}"):
                return self.answer(json.dumps(about).encode())
            name = path.removeprefix(f"/datasets/{repo_id}/resolve/{COMMIT}/")
            if name in files:
                if self.command == "GET":
                    asked.append(name)
                return self.answer(files[name].read_bytes(), name)
            self.send_response(401)
            self.send_header("X-Error-Code", "RepoNotFound")
            self.send_header("Content-Length", "0")
            return self.end_headers()

        do_HEAD = do_GET  # noqa: N815

        def answer(self, body: bytes, name: str = "") -> None:
            self.send_response(200)
            self.send_header("Content-Length", str(len(body)))
            if name:
                self.send_header("X-Repo-Commit", COMMIT)
                self.send_header("ETag", f'"{list(files).index(name):040x}"')
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(body)

        def log_message(self, *_: object) -> None: ...

    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", asked
    finally:
        server.shutdown()
        server.server_close()


SHORT = [
    *("net=tiny", "net.down_dims=[8,16]", "net.n_groups=4", "net.time_dim=8", "encoder.dim=8"),
    *("encoder.width=8", "examples=8", "batch_size=4", "optim.warmup=0", "eval.windows=4"),
    *("log.trackers=[]", "device=cpu"),
]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data set with a camera, two kinds of numbers and 50 steps per second."""
    folder = tmp_path_factory.mktemp("data")
    buffer = ReplayBuffer.create(folder / "x.zarr")
    rng = np.random.default_rng(0)
    for length in (40, 45):
        steps = np.cumsum(rng.normal(size=(length, 4)), axis=0).astype("float32")
        frames = rng.integers(0, 256, (length, 32, 32, 3), dtype=np.uint8)
        buffer.append_episode(
            {"state": steps, "effort": steps[:, :1], "action": steps[:, :2], "images.top": frames}
        )
    write(buffer.path, folder / "set", task="go", fps=50, images="image")
    return folder / "set"


def train(tmp_path: Path, *words: str, **env: str) -> subprocess.CompletedProcess[str]:
    """Run the command as a process: the hub's address is read once, when its library is loaded."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith("HF_")}
    kept |= {"HF_HOME": str(tmp_path / "hf"), "XDG_CACHE_HOME": str(tmp_path / "cache")}
    command = [sys.executable, "-m", "cmpolicy.cli.main", "train", "task=lerobot", *words, *SHORT]
    return subprocess.run(
        command, env=kept | env, cwd=tmp_path, capture_output=True, text=True, timeout=300
    )


def copied(data: Path, target: Path, version: str = "v3.0") -> Path:
    """The data set in another place, perhaps with another version in its metadata."""
    for file in data.rglob("*"):
        if file.is_file():
            copy = target / file.relative_to(data)
            copy.parent.mkdir(parents=True, exist_ok=True)
            copy.write_bytes(file.read_bytes())
    info: dict[str, Any] = json.loads((target / "meta/info.json").read_text())
    (target / "meta/info.json").write_text(json.dumps(info | {"codebase_version": version}))
    return target


def test_from_lerobots_own_cache_without_a_network(data: Path, tmp_path: Path):
    """All observations, the rate of the data, and the name of the data set in the card."""
    copied(data, tmp_path / "hf/lerobot/me/arm")
    done = train(tmp_path, "data.repo_id=me/arm", "out=run", HF_HUB_OFFLINE="1")
    assert done.returncode == 0, done.stderr
    policy = ConsistencyPolicy.from_pretrained(tmp_path / "run/policy")
    assert policy.spec.obs == {"effort": (1,), "images.top": (32, 32, 3), "state": (4,)}
    assert policy.spec.images == ("images.top",)
    assert (policy.control_hz, policy.spec.horizon, policy.n_action_steps) == (50.0, 32, 16)
    assert "me/arm" in (tmp_path / "run/policy/README.md").read_text()
    (store,) = (tmp_path / "cache/cmpolicy/lerobot").glob("*.zarr")
    assert ReplayBuffer.open(store).attrs["source"]["name"] == "me/arm"


def test_from_a_hub_then_from_its_cache(data: Path, tmp_path: Path):
    with serve(data, "me/arm") as (address, asked):
        words = ("data.repo_id=me/arm", "data.obs=[images.top,state]")
        done = train(tmp_path, *words, "out=run", HF_ENDPOINT=address)
        assert done.returncode == 0, done.stderr
        parts = ("meta", "data")  # not its card
        files = [f for part in parts for f in (data / part).rglob("*.*")]
        assert sorted(asked) == sorted(str(f.relative_to(data)) for f in files)
    policy = ConsistencyPolicy.from_pretrained(tmp_path / "run/policy")
    assert policy.spec.obs == {"images.top": (32, 32, 3), "state": (4,)}
    (store,) = (tmp_path / "cache/cmpolicy/lerobot").glob("*.zarr")
    assert ReplayBuffer.open(store).attrs["source"]["commit"] == COMMIT
    # the server is gone now
    done = train(tmp_path, *words, "out=again", HF_ENDPOINT=address)
    assert done.returncode == 0, done.stderr
    assert list((tmp_path / "cache/cmpolicy/lerobot").glob("*.zarr")) == [store]


def test_no_network_and_nothing_cached(tmp_path: Path):
    done = train(tmp_path, "data.repo_id=me/arm", HF_HUB_OFFLINE="1")
    assert done.returncode == 2
    own = tmp_path / "hf/lerobot/me/arm"
    for place in (tmp_path / "me/arm", own, tmp_path / "hf/hub", tmp_path / "hf/lerobot/hub"):
        assert str(place) in done.stderr
    assert f"hf download me/arm --repo-type dataset --local-dir {own}" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_private_repository(data: Path, tmp_path: Path):
    with serve(data, "me/arm") as (address, _):
        done = train(tmp_path, "data.repo_id=me/secret", HF_ENDPOINT=address)
    assert done.returncode == 2
    assert "it is private or gated. For those log in (`hf auth login`, or HF_TOKEN)" in done.stderr


def test_an_old_version_is_refused_before_it_is_fetched(data: Path, tmp_path: Path):
    old = copied(data, tmp_path / "old", "v2.0")
    with serve(old, "me/old") as (address, asked):
        done = train(tmp_path, "data.repo_id=me/old", HF_ENDPOINT=address)
    assert done.returncode == 2
    assert "is a LeRobotDataset v2.0; v3.0 and v2.1 are read. Upgrade it" in done.stderr
    assert "convert_dataset_v20_to_v21" in done.stderr
    assert asked
    assert all(name.startswith("meta/") for name in asked)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "neither data.repo_id nor data.path is set"),
        (["data.repo_id=a/b", "data.path=c"], "data.path=c and data.repo_id=a/b are both set"),
        (["data.revision=v3.0"], "data.revision is of data.repo_id, which is not set"),
        (["data.path=nowhere"], "nowhere. Give the folder of a LeRobot data set"),
    ],
)
def test_settings_that_do_not_fit(tmp_path: Path, words: list[str], message: str):
    done = train(tmp_path, *words, HF_HUB_OFFLINE="1")
    assert done.returncode == 2
    assert message in done.stderr
