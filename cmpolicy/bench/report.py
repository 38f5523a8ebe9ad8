"""What a benchmark leaves: an aligned table on the terminal and a JSON file."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from cmpolicy_eval.evaluate import git_commit, versions
from cmpolicy_eval.result import write_atomically

Cell = str | int | float


@dataclass(frozen=True)
class Report:
    """One benchmark's outcome.

    Attributes:
        benchmark: its name.
        title: what was measured, for people.
        columns: headings of ``rows``.
        rows: numbers and words, one tuple per line of the table.
        summary: the figures that the benchmark is for, by name.
        closing: the same as sentences.
        settings: of the benchmark.
        device: in words, see :func:`describe_device`.
    """

    benchmark: str
    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[Cell, ...], ...]
    summary: Mapping[str, float]
    closing: tuple[str, ...]
    settings: Mapping[str, Any]
    device: str

    def table(self) -> str:
        """The title, the table and the closing sentences."""
        return "\n".join([self.title, *_aligned(self.columns, self.rows), *self.closing])

    def save(self, path: str | Path, command: str) -> Path:
        """Write everything, with versions and the commit, as JSON (atomically)."""
        target = Path(path)
        target.parent.mkdir(parents=True, exist_ok=True)
        content = asdict(self)
        del content["closing"], content["columns"]
        content["rows"] = [dict(zip(self.columns, row, strict=True)) for row in self.rows]
        content |= {"versions": versions(), "command": command, "git_commit": git_commit()}
        write_atomically(target, json.dumps(content, indent=2) + "\n")
        return target


def _aligned(columns: Sequence[str], rows: Sequence[Sequence[Cell]]) -> list[str]:
    """Right-aligned columns; floats with three significant decimals."""
    cells = [list(columns), *([_text(cell) for cell in row] for row in rows)]
    widths = [max(len(line[i]) for line in cells) for i in range(len(columns))]
    return [
        "  " + "   ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True))
        for line in cells
    ]


def _text(cell: Cell) -> str:
    return f"{cell:.3f}" if isinstance(cell, float) else str(cell)
