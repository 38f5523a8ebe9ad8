"""How far long work has come: a bar on a terminal, elsewhere (a log, a job's output) lines."""

from __future__ import annotations

import sys
from typing import Any, TextIO

from tqdm import tqdm

_EVERY = 60.0
"""Seconds between two lines; work that is over sooner writes none."""


class _Lines:
    """A stream to which tqdm writes whole lines, since a log cannot overwrite them."""

    encoding = "utf-8"

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, text: str) -> None:
        if line := text.strip("\r\n "):
            self._stream.write(f"{line}\n")

    def flush(self) -> None:
        self._stream.flush()


def progress_bar(
    total: int | None,
    *,
    unit: str,
    desc: str | None = None,
    stream: TextIO | None = None,
    every: float = _EVERY,
    **settings: Any,
) -> Any:
    """A tqdm bar; where the stream is no terminal, a line a minute and one at the end.

    Args:
        total: how much there is to do; None: unknown.
        unit: of it.
        desc: what is done.
        stream: None: stderr.
        every: seconds between two lines.
        settings: others of ``tqdm``.
    """
    stream = sys.stderr if stream is None else stream
    if not stream.isatty():
        settings |= {
            "bar_format": "{l_bar}{r_bar}",
            "delay": every,
            "mininterval": every,
            "miniters": 1,
        }
        stream = _Lines(stream)  # type: ignore[assignment]
    return tqdm(total=total, unit=unit, desc=desc, file=stream, **settings)
