"""The mp4 files: frames of an episode, each checked against the time that it should have."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import numpy.typing as npt

from cmpolicy_data.convert.lerobot.errors import LeRobotError, import_av
from cmpolicy_data.convert.lerobot.layout import Episode, Feature, Span
from cmpolicy_data.convert.lerobot.rows import TOLERANCE, check_size
from cmpolicy_data.frames import Frames
from cmpolicy_data.parts import part_sizes


def frames_of(
    span: Span,
    feature: Feature,
    times: npt.NDArray[Any],
    fps: float,
    episode: Episode,
    threads: int = 1,
) -> Iterator[Frames]:
    """The frames at these times of an episode, (l, H, W, 3) at a time.

    The first frame is that nearest to the first time; from there on every frame is taken, so each
    must be where its time is. ``threads`` of the codec decode.

    Raises:
        LeRobotError: no video, another size, frames that are missing or at other times.
    """
    where = f"{span.file}, episode {episode.number}"
    height, width = feature.shape
    frames = _decoded(span, fps, where, threads)
    moments = iter(enumerate(np.asarray(times, np.float64) + span.start))
    for size in part_sizes(episode.first_row, len(times), height * width * 3):
        part = np.empty((size, height, width, 3), np.uint8)
        for row, (number, time) in zip(part, moments, strict=False):
            found = next(frames, None)
            if found is None:
                raise LeRobotError(
                    f"{where}: the video is cut short, its frame {number} of {len(times)} (at "
                    f"{time:.4f} s) is missing."
                )
            moment, frame = found
            if not abs(moment - time) * fps <= TOLERANCE:
                raise LeRobotError(
                    f"{where}: frame {number} should be at {time:.4f} s, but the next one in the "
                    f"video is at {moment:.4f} s. Frames are missing, or it is the video of "
                    "another episode."
                )
            picture = frame.to_ndarray(format="rgb24")
            check_size(picture, feature, where)
            row[:] = picture
        yield part
    extra = next(frames, None) if span.whole else None
    if extra is not None:
        raise LeRobotError(
            f"{where}: the video has more frames than the episode has steps ({len(times)}); the "
            f"next is at {extra[0]:.4f} s."
        )


def _decoded(span: Span, fps: float, where: str, threads: int) -> Iterator[tuple[float, Any]]:
    """(time, frame) from the beginning of a span to the end of the file."""
    av = import_av()
    try:
        with av.open(str(span.file)) as container:
            if not container.streams.video:
                raise LeRobotError(f"{where}: the file holds no video.")
            stream = container.streams.video[0]
            stream.codec_context.thread_count = threads
            first = span.start - TOLERANCE / fps
            if first > 0:
                container.seek(int(first / stream.time_base), stream=stream)
            for frame in container.decode(stream):
                if frame.pts is None:
                    raise LeRobotError(f"{where}: a frame of the video has no time.")
                moment = float(frame.pts * stream.time_base)
                if moment >= first:
                    yield moment, frame
    except av.FFmpegError as error:
        raise LeRobotError(
            f"{where}: the video cannot be decoded ({error.strerror or error}). The file is "
            "damaged, or its codec is missing."
        ) from error
