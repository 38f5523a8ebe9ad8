"""Frames into mp4 files: many episodes in a file, a new file when one is large enough."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from fractions import Fraction
from pathlib import Path
from typing import Any

from cmpolicy_data.convert.lerobot.errors import LeRobotError, import_av
from cmpolicy_data.frames import Frames

ENCODERS = {"av1": "libsvtav1", "h264": "libx264", "hevc": "libx265"}
"""Name of a codec -> FFmpeg's encoder. lerobot itself records av1."""


class VideoFiles:
    """The video files of one camera, written one after the other."""

    def __init__(
        self,
        place: Callable[[int], Path],
        size: tuple[int, int],
        rate: Fraction,
        *,
        codec: str,
        crf: int,
        limit: int,
    ) -> None:
        """Nothing is written yet.

        Args:
            place: the path of the file with a number.
            size: height and width. rate: frames per second.
            codec: a key of `ENCODERS`. crf: its quality, smaller is better.
            limit: bytes from which on the next episode begins a new file.
        """
        self._place, self._size, self._rate, self._limit = place, size, rate, limit
        self._encoder, self._options = ENCODERS[codec], {"crf": str(crf), "g": "2"}
        if codec == "av1":
            self._options["preset"] = "12"  # the fastest, lerobot's
        if codec == "hevc":
            self._options["x265-params"] = "log-level=none"
        self._file = -1
        self._container: Any = None
        self._frames = self._first = self._bytes = 0
        self._codec = codec

    def add(self, frames: Frames) -> None:
        """Write the next frames (l, H, W, 3) of the episode.

        Raises:
            LeRobotError: the encoder refuses them.
        """
        av = import_av()
        try:
            if self._container is None:
                self._open(av)
            for picture in frames:
                frame = av.VideoFrame.from_ndarray(picture, format="rgb24")
                frame.pts, frame.time_base = self._frames, 1 / self._rate
                if self._frames == self._first:
                    # An episode is a cut: predicted from the one before it would look like that.
                    frame.pict_type = av.video.frame.PictureType.I
                self._mux(self._stream.encode(frame))
                self._frames += 1
        except av.FFmpegError as error:
            raise self._refused(error) from error

    def end_episode(self) -> tuple[int, float, float]:
        """Number of the file that the episode is in, and its times there, s.

        Raises:
            LeRobotError: the encoder failed.
        """
        found = (self._file, float(self._first / self._rate), float(self._frames / self._rate))
        self._first = self._frames
        if self._bytes >= self._limit:
            self.close()
        return found

    def close(self) -> None:
        """Complete the file.

        Raises:
            LeRobotError: the encoder failed.
        """
        if self._container is None:
            return
        av = import_av()
        try:
            self._mux(self._stream.encode(None))
            self._container.close()
        except av.FFmpegError as error:
            raise self._refused(error) from error
        finally:
            self._container = None

    def _mux(self, packets: Iterable[Any]) -> None:
        for packet in packets:
            self._bytes += packet.size
            self._container.mux(packet)

    def _open(self, av: Any) -> None:
        self._file += 1
        self._frames = self._first = self._bytes = 0
        self._path = self._place(self._file)
        self._path.parent.mkdir(parents=True, exist_ok=True)
        os.environ.setdefault("SVT_LOG", "1")  # errors alone
        self._container = av.open(str(self._path), "w", options={"movflags": "faststart"})
        self._stream = self._container.add_stream(
            self._encoder, rate=self._rate, options=self._options
        )
        self._stream.height, self._stream.width = self._size
        self._stream.pix_fmt = "yuv420p"

    def _refused(self, error: Exception) -> LeRobotError:
        height, width = self._size
        return LeRobotError(
            f"{self._path}: the {self._codec} encoder failed on frames of {height} x {width} "
            f"({error}). Use images=image, which stores them without loss, or codec="
            f"{'|'.join(ENCODERS)}."
        )
