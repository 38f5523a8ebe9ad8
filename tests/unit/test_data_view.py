"""``cmpolicy data view``: episodes as Rerun recordings and as videos."""

from __future__ import annotations

import io
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import imageio.v2 as imageio
import numpy as np
import pytest
from PIL import Image

from cmpolicy.cli.main import main
from cmpolicy_data import ReplayBuffer

N = 80
RNG = np.random.default_rng(0)
#: Of one colour each, which JPEG and video nearly keep.
FRAMES = np.broadcast_to(RNG.integers(0, 256, (N, 1, 1, 3), dtype=np.uint8), (N, 16, 20, 3))
ACTIONS = RNG.normal(size=(N, 2)).astype(np.float32)


def _store(tmp_path: Path, attrs: dict[str, Any] | None = None, **data: Any) -> Path:
    buffer = ReplayBuffer.create(tmp_path / "my.zarr", attrs=attrs)
    whole = {"action": ACTIONS, **data}
    for start, end in ((0, 10), (10, N)):
        buffer.append_episode({key: value[start:end] for key, value in whole.items()})
    return buffer.path


def _view(capsys: pytest.CaptureFixture[str], *words: object) -> tuple[int, str]:
    status = main(["data", "view", *map(str, words)])
    out, err = capsys.readouterr()
    return status, out + err


def _read(file: Path, index: str) -> Any:
    """The only recording in a file, as a table with a row for every value of the index."""
    dataframe = pytest.importorskip("rerun.dataframe", reason="newer releases read otherwise")
    archive = dataframe.load_archive(file)
    assert archive.num_recordings() == 1
    view = archive.all_recordings()[0].view(index=index, contents="/**")
    return view.select().read_all().to_pydict()


def test_a_recording(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Episode 1 is longer than the frames that are read at once."""
    pytest.importorskip("rerun", reason="needs the extra cmpolicy[view]")
    attrs = {"control_hz": 10, "names": {"action": ["left", "right"], "arm": ["too few"]}}
    store = _store(tmp_path, attrs, **{"images.top": FRAMES, "arm": FRAMES[:, 0, :5, 0]})
    out = tmp_path / "new/my.rrd"
    assert _view(capsys, store, "episodes=[1,0]", f"out={out}") == (0, f"{out}\n")
    assert list(out.parent.iterdir()) == [out]
    table = _read(out, "step")
    assert table["step"] == list(range(N - 10))
    assert table["/episode_0/action:Scalar"][10:] == [None] * (N - 20)
    np.testing.assert_array_equal(table["/episode_0/action:Scalar"][:10], ACTIONS[:10])
    np.testing.assert_array_equal(table["/episode_1/action:Scalar"], ACTIONS[10:])
    np.testing.assert_array_equal(table["/episode_1/arm:Scalar"], FRAMES[10:, 0, :5, 0])
    assert table["/episode_1/action:Name"][0] == ["left", "right"]
    assert table["/episode_1/arm:Name"][0][4] == "arm[4]"
    blobs = table["/episode_1/images.top:Blob"]
    assert len(blobs) == N - 10
    for step in (0, 63, 64, N - 11):
        picture = np.asarray(Image.open(io.BytesIO(bytes(blobs[step][0]))))
        assert picture.shape == (16, 20, 3)
        assert np.abs(picture.astype(int) - FRAMES[10 + step]).max() < 12
    seconds = [time.total_seconds() for time in _read(out, "time")["time"]]
    np.testing.assert_allclose(seconds, np.arange(N - 10) / 10)


def test_a_recording_without_frames_and_rate(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("rerun", reason="needs the extra cmpolicy[view]")
    store = _store(tmp_path, many=np.ones((N, 17), np.float32))
    out = tmp_path / "my.rrd"
    assert _view(capsys, store, f"out={out}")[0] == 0
    assert set(_read(out, "step")) == {
        "step",
        "/episode_0/action:Scalar",
        "/episode_0/action:Name",
    }
    assert _view(capsys, store, "episodes=0", "fps=5", f"out={out}")[0] == 0
    assert "time" in _read(out, "time")


def test_a_full_disk_leaves_no_file(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("rerun", reason="needs the extra cmpolicy[view]")
    monkeypatch.setattr("shutil.disk_usage", lambda _: SimpleNamespace(free=2**20))
    status, text = _view(capsys, _store(tmp_path), f"out={tmp_path / 'my.rrd'}")
    assert status == 2
    assert "1 MiB are free in" in text
    assert [path.name for path in tmp_path.iterdir()] == ["my.zarr"]


def test_the_viewer_needs_a_display(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("rerun", reason="needs the extra cmpolicy[view]")
    if sys.platform != "linux":
        pytest.skip("elsewhere it would open")
    for name in ("DISPLAY", "WAYLAND_DISPLAY", "WAYLAND_SOCKET"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    assert main(["data", "view", str(_store(tmp_path))]) == 1
    error = capfd.readouterr().err
    assert "viewer ended with status 1" in error
    assert "out=episode.mp4" in error
    assert not list(tmp_path.rglob("*.rrd*"))


def test_without_rerun(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "rerun", None)
    monkeypatch.delitem(sys.modules, "cmpolicy_data.recording", raising=False)
    store = _store(tmp_path)
    for words in ([], [f"out={tmp_path / 'my.rrd'}"]):
        status, text = _view(capsys, store, *words)
        assert status == 2
        assert "pip install 'cmpolicy[view]'" in text
        assert "out=episode.mp4" in text
    assert _view(capsys, store, f"out={tmp_path / 'my.mp4'}")[0] == 0


def test_a_film(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    store = _store(tmp_path, top=FRAMES, wrist=255 - FRAMES[:, :8, :8], arm=FRAMES[:, 0, :5, 0])
    out = tmp_path / "films/episode.mp4"
    assert _view(capsys, store, "episodes=[1,0]", "fps=25", f"out={out}")[0] == 0
    film = [np.asarray(frame) for frame in imageio.get_reader(out)]
    assert len(film) == N
    for step, row in ((3, 13), (N - 10 + 3, 3)):
        for left, want in ((100, FRAMES[row, 0, 0]), (356, 255 - FRAMES[row, 0, 0])):
            found = film[step][60:70, left : left + 10].mean(axis=(0, 1))
            assert np.abs(found - want).max() < 40


@pytest.mark.parametrize("out", ["my.rrd", "my.mp4"])
def test_what_cannot_be_shown(out: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    store = _store(tmp_path, many=np.ones((N, 17), np.float32))
    for word, message in (
        ("episodes=[0,2]", "my.zarr has no episode 2; it has 2, from 0 on"),
        ("episodes=[]", "episodes=[] names no episode"),
        ("keys=[many]", "data/many cannot be shown: it is float32, (17,) per step"),
        ("keys=[arm]", "has no key 'arm'"),
        ("fps=-1", "fps=-1.0 must be a number of steps per second"),
        (f"out={tmp_path}/my.gif", "my.gif must end in .rrd (for Rerun) or .mp4 (a video)"),
    ):
        words = [word] if word.startswith("out") else [word, f"out={tmp_path / out}"]
        status, text = _view(capsys, store, *words)
        assert status == 2
        assert message in text
    assert [path.name for path in tmp_path.iterdir()] == ["my.zarr"]


def test_channels_first_are_pictures_too(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """They were left out of the video without a word."""
    store, out = _store(tmp_path, top=np.moveaxis(FRAMES, -1, 1)), tmp_path / "my.mp4"
    assert _view(capsys, store, "episodes=[1]", "keys=[top]", f"out={out}")[0] == 0
    film = [np.asarray(frame) for frame in imageio.get_reader(out)]
    colours = film[5][100:200, 50:200].reshape(-1, 3).astype(int)
    assert np.abs(colours - FRAMES[15, 0, 0]).max() < 16


def test_a_lost_chunk_is_not_shown_as_black_frames(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rng = np.random.default_rng(0)
    store = _store(tmp_path, top=rng.integers(0, 256, (N, 64, 64, 3), dtype=np.uint8))
    (store / "data/top/c/1/0/0/0").unlink()
    status, said = _view(capsys, store, "episodes=[1]", f"out={tmp_path / 'my.mp4'}")
    assert status == 2
    assert "chunks of data/top are not there, the first is data/top/c/1/0/0/0" in said


@pytest.mark.filterwarnings("default:.*is not shown")
def test_what_has_an_image_s_shape_alone_is_left_out(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A normal map in the store kept everything else from being looked at."""
    normals = RNG.normal(size=(N, 16, 20, 3)).astype(np.float32)
    levels = FRAMES.astype(np.float32)  # as in Diffusion Policy's stores: frames
    store, out = _store(tmp_path, normals=normals, top=levels), tmp_path / "my.mp4"
    status, said = _view(capsys, store, "episodes=[1]", f"out={out}")
    assert status == 0
    assert "warning:" in said
    assert "data/normals is not shown: its steps have the shape of an image (16, 20, 3)" in said
    colours = imageio.get_reader(out).get_data(5)[100:200, 50:200].reshape(-1, 3).astype(int)
    assert np.abs(colours - FRAMES[15, 0, 0]).max() < 16
    status, said = _view(capsys, store, "keys=[normals]", f"out={out}")
    assert status == 2
    assert "data/normals holds numbers that are not whole" in said
