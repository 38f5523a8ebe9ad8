"""What long work shows on a terminal, and in a log."""

from __future__ import annotations

import io
import re
import time
from typing import Any

from cmpolicy_eval.progress import progress_bar


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def _work(stream: io.StringIO, *, seconds: float = 0.0, **settings: Any) -> str:
    with progress_bar(4, unit="episode", desc="nfe=1", stream=stream, **settings) as bar:
        for _ in range(4):
            time.sleep(seconds)
            bar.update()
    return stream.getvalue()


def test_a_log_gets_whole_lines() -> None:
    text = _work(io.StringIO(), seconds=0.02, every=0.01)
    assert "\r" not in text
    lines = text.splitlines()
    assert 2 <= len(lines) <= 6
    assert all(re.match(r"nfe=1: +\d+%\|\| \d/4 \[.*episode", line) for line in lines)
    assert "4/4" in lines[-1]


def test_a_log_gets_no_line_of_work_that_is_soon_over() -> None:
    assert _work(io.StringIO()) == ""


def test_a_terminal_gets_a_bar() -> None:
    assert "\r" in _work(Terminal(), mininterval=0)
