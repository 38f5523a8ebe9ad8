"""Episodes of a store in Rerun: a recording (.rrd) of them, and its viewer.

One recording holds them all, ``/episode_<number>/<key>`` each, on the timelines ``step`` and, where
the rate is known, ``time``; both begin at 0 in every episode, so that episodes can be compared. The
viewer shows one tab per episode: its cameras above, its numbers below.
"""

from __future__ import annotations

import io
import shutil
import subprocess
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import Image

from cmpolicy_data.frames import Frames
from cmpolicy_data.replay_buffer import ReplayBuffer
from cmpolicy_data.shown import curves, dimension_names, episode_bounds, pictures, shown_keys

try:
    import rerun as rr
    import rerun.blueprint as rrb
except ImportError as error:
    raise ImportError(
        f"looking at episodes in Rerun needs rerun-sdk ({error}): pip install 'cmpolicy[view]'. A "
        "video does without: out=episode.mp4"
    ) from error

_AT_ONCE = 64  # frames in memory
_QUALITY = 95  # of JPEG
_SPARE = 2**20  # bytes of a disk


class ViewerError(RuntimeError):
    """Rerun's viewer did not run."""

    exit_status = 1


def record_episodes(
    buffer: ReplayBuffer,
    episodes: Sequence[int],
    out: Path,
    *,
    keys: Sequence[str] = (),
    hz: float | None = None,
) -> Path:
    """Write episodes as one Rerun recording.

    Args:
        buffer: the store.
        episodes: numbers, from 0.
        out: the file, ending in .rrd; it appears when it is whole.
        keys: to show, see :func:`cmpolicy_data.shown.shown_keys`.
        hz: steps per second, for the timeline ``time``.

    Raises:
        ReplayBufferError: no such episode or key, or a chunk that cannot be read.
        OSError: the file cannot be written.
    """
    pictured, curved = shown_keys(buffer, keys)
    bounds = {episode: episode_bounds(buffer, episode) for episode in episodes}
    out.parent.mkdir(parents=True, exist_ok=True)
    part = out.with_name(f"{out.name}.part")
    part.touch()  # what forbids it is an OSError here, and less clear from Rerun
    recording = rr.RecordingStream("cmpolicy")
    try:
        recording.save(part, default_blueprint=_layout(bounds, pictured, curved))
        recording.send_recording_name(buffer.path.name)
        for episode, (start, end) in bounds.items():
            for key in curved:
                rows = curves(buffer, key, start, end)
                names = dimension_names(buffer, key) or [f"{key}[{i}]" for i in range(len(rows.T))]
                _check_room(part, rows.nbytes)
                path, times = _path(episode, key), _times(np.arange(end - start), hz)
                recording.log(path, rr.SeriesLines(names=names), static=True)
                recording.send_columns(path, times, rr.Scalars.columns(scalars=rows))
            for key in pictured:
                for first in range(start, end, _AT_ONCE):
                    frames = pictures(buffer, key, first, min(first + _AT_ONCE, end))
                    _check_room(part, frames.nbytes)
                    times = _times(np.arange(len(frames)) + first - start, hz)
                    recording.send_columns(_path(episode, key), times, _encoded(frames))
        recording.disconnect()  # which writes what is left
        part.replace(out)
    finally:
        recording.disconnect()
        part.unlink(missing_ok=True)
    return out


def open_viewer(recording: Path) -> None:
    """Show a recording in Rerun's viewer until its window is closed.

    Raises:
        ViewerError: it could not be shown, for instance because there is no display.
    """
    # `python -m rerun_cli` of old releases has exit status 0 whatever happened.
    start = "import sys; from rerun_cli.__main__ import main; sys.exit(main())"
    # The viewer also listens for more data: on this machine, not on all of its networks.
    words = ["--bind", "127.0.0.1", str(recording)]
    status = subprocess.run([sys.executable, "-c", start, *words], check=False).returncode
    if status != 0:
        raise ViewerError(
            f"Rerun's viewer ended with status {status} (its own message is above). It needs a "
            "display; without one write a recording to open elsewhere, out=episodes.rrd, or a "
            "video, out=episode.mp4"
        )


def _check_room(file: Path, size: int) -> None:
    """Raise OSError where a disk is about to be full, of which Rerun only prints a message."""
    free = shutil.disk_usage(file.parent).free
    if free < _SPARE + 2 * size:
        raise OSError(
            f"there is no room for the recording: {free / 2**20:.0f} MiB are free in "
            f"{file.parent}; make room there, or show fewer episodes or keys"
        )


def _path(episode: int, key: str) -> str:
    return rr.new_entity_path([f"episode_{episode}", *key.split("/")])


def _times(steps: npt.NDArray[np.int64], hz: float | None) -> list[rr.TimeColumn]:
    times = [rr.TimeColumn("step", sequence=steps)]
    if hz is not None:
        nanoseconds = np.round(steps * (1e9 / hz)).astype("timedelta64[ns]")
        times.append(rr.TimeColumn("time", duration=nanoseconds))
    return times


def _encoded(frames: Frames) -> rr.ComponentColumnList:
    blobs = []
    for frame in frames:
        file = io.BytesIO()
        Image.fromarray(frame).save(file, "jpeg", quality=_QUALITY)
        blobs.append(file.getvalue())
    return rr.EncodedImage.columns(blob=blobs, media_type=["image/jpeg"] * len(blobs))


def _layout(
    episodes: Iterable[int], pictured: Sequence[str], curved: Sequence[str]
) -> rrb.Blueprint:
    tabs = []
    for episode in episodes:
        rows: list[rrb.Horizontal | rrb.Grid] = []
        if pictured:
            cameras = [rrb.Spatial2DView(origin=_path(episode, k), name=k) for k in pictured]
            rows.append(rrb.Horizontal(*cameras))
        if curved:
            numbers = [rrb.TimeSeriesView(origin=_path(episode, k), name=k) for k in curved]
            rows.append(rrb.Grid(*numbers))
        tabs.append(rrb.Vertical(*rows, name=f"episode {episode}"))
    return rrb.Blueprint(rrb.Tabs(*tabs))
