"""Opening an exported policy by the end of its name."""

from __future__ import annotations

import os
from pathlib import Path

from cmpolicy.export.facts import ExportError
from cmpolicy.export.onnx_policy import OnnxPolicy
from cmpolicy.export.runtime import ExportedRuntime

SUFFIXES = (".onnx", ".pt2")


def open_exported(path: str | os.PathLike[str], threads: int = 1) -> ExportedRuntime:
    """An ``OnnxPolicy`` with ``threads``, or an ``ExportedPolicy`` (whose threads are torch's own).

    Raises:
        ExportError: a name ending in neither ``.onnx`` nor ``.pt2``; otherwise as the classes.
    """
    file = Path(path)
    if file.suffix == ".onnx":
        return OnnxPolicy(file, threads)
    if file.suffix == ".pt2":
        from cmpolicy.export.program import ExportedPolicy

        return ExportedPolicy(file)
    raise ExportError(f"{file} is no exported policy: expected a name ending in .onnx or .pt2")


def is_exported(path: str | os.PathLike[str]) -> bool:
    """Whether the name is that of an exported policy, not of a bundle."""
    return Path(path).suffix in SUFFIXES
