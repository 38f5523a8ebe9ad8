"""The files in meta/ of a LeRobot data set, whose entries are checked as they are asked for."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np

from cmpolicy_data.convert.lerobot.errors import LeRobotError, import_parquet


class Info:
    """``meta/info.json``, whose entries are checked as they are asked for."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.values = read_json(path)

    def text(self, key: str) -> str:
        return str(self._get(key, str, "a text"))

    def number(self, key: str) -> float:
        """A number above 0; whole numbers stay whole."""
        value = self._get(key, (int, float), "a number above 0")
        if isinstance(value, bool) or not 0 < value < 1e9:
            raise LeRobotError(f"{self.path}: {key} is {value!r}, expected a number above 0.")
        return value

    def count(self, key: str) -> int:
        return int(self._get(key, int, "a whole number"))

    def mapping(self, key: str) -> dict[str, Any]:
        return dict(self._get(key, dict, "a mapping"))

    def file(self, key: str, **where: Any) -> Path:
        """The path that a template gives, which may not lead out of the data set."""
        template = self.text(key)
        try:
            found = template.format(**where)
        except (KeyError, IndexError, ValueError, AttributeError) as error:
            raise LeRobotError(f"{self.path}: {key} is {template!r}, with {error!r}.") from error
        parts = PurePosixPath(found)
        if parts.is_absolute() or ".." in parts.parts:
            raise LeRobotError(f"{self.path}: {key} leads out of the data set: {found!r}.")
        return self.path.parent.parent / found

    def _get(self, key: str, kind: type | tuple[type, ...], expected: str) -> Any:
        value = self.values.get(key)
        if not isinstance(value, kind):
            found = f"is {value!r}" if key in self.values else "is missing"
            raise LeRobotError(f"{self.path}: {key} {found}, expected {expected}.")
        return value


def read_table(file: Path) -> Any:
    """A small parquet file, whole.

    Raises:
        LeRobotError: not there, or not readable.
    """
    parquet = import_parquet()
    try:
        return parquet.ParquetFile(file).read()
    except (OSError, ValueError) as error:  # ArrowInvalid is a ValueError
        raise LeRobotError(f"{file} cannot be read as parquet: {_first(error)}.") from error


def read_json(path: Path) -> dict[str, Any]:
    """A mapping of a JSON file.

    Raises:
        LeRobotError: not there, or no mapping.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise LeRobotError(f"{path} cannot be read: {_first(error)}.") from error
    if not isinstance(value, dict):
        raise LeRobotError(f"{path} holds no mapping.")
    return value


def json_lines(path: Path) -> Sequence[dict[str, Any]]:
    """The mappings of a file with one on each line.

    Raises:
        LeRobotError: not there, or other lines.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
        rows = [json.loads(line) for line in lines if line.strip()]
    except (OSError, ValueError) as error:
        raise LeRobotError(f"{path} cannot be read: {_first(error)}.") from error
    bad = next((row for row in rows if not isinstance(row, dict)), None)
    if bad is not None:
        raise LeRobotError(f"{path} has the line {bad!r}, expected a mapping.")
    return rows


def _first(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0].rstrip(".")


def whole(row: Mapping[str, Any], key: str, where: str) -> int:
    """A whole number, at least 0, of a row.

    Raises:
        LeRobotError: anything else.
    """
    value = row.get(key)
    if not isinstance(value, int) or isinstance(value, bool) or value < 0:
        raise LeRobotError(f"{where}: {key} is {value!r}, expected a whole number.")
    return value


def seconds(row: Mapping[str, Any], key: str, where: str) -> float:
    """A time, at least 0 s, of a row.

    Raises:
        LeRobotError: anything else.
    """
    value = row.get(key)
    if not isinstance(value, int | float) or not np.isfinite(value) or value < 0:
        raise LeRobotError(f"{where}: {key} is {value!r}, expected seconds.")
    return float(value)


def place(row: Mapping[str, Any], prefix: str, where: str) -> dict[str, int]:
    """Which folder and file a row names for ``prefix``.

    Raises:
        LeRobotError: it does not.
    """
    return {key: whole(row, f"{prefix}/{key}", where) for key in ("chunk_index", "file_index")}
