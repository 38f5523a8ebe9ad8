"""Files that are named after what they were computed from, so that they never go stale."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Mapping
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from cmpolicy.files import write_atomically

Tensors = dict[str, Tensor]


def content_key(*parts: object) -> str:
    """Hex digest of the parts' representations."""
    return hashlib.sha256(repr(parts).encode()).hexdigest()


class ContentCache:
    """Tensors by content key in a folder; without a folder everything is computed anew.

    A file that cannot be read counts as missing. Files are written atomically.
    """

    def __init__(self, folder: str | os.PathLike[str] | None) -> None:
        self.folder = None if folder is None else Path(folder).expanduser()

    def get_or_make(
        self, kind: str, key: str, make: Callable[[], tuple[Tensors, Mapping[str, str]]]
    ) -> tuple[Tensors, Mapping[str, str]]:
        """What ``<kind>-<key>.safetensors`` holds: tensors and facts; ``make`` makes them."""
        if self.folder is None:
            return make()
        path = self.folder / f"{kind}-{key[:32]}.safetensors"
        found = _read(path)
        if found is None:
            found = make()
            _write(path, *found)
        return found


def _read(path: Path) -> tuple[Tensors, Mapping[str, str]] | None:
    try:
        with safe_open(path, framework="pt") as file:
            names = file.keys()  # the file itself is no mapping
            return {name: file.get_tensor(name) for name in names}, file.metadata() or {}
    except (OSError, SafetensorError):
        return None


def _write(path: Path, tensors: Tensors, facts: Mapping[str, str]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, save({k: v.contiguous().cpu() for k, v in tensors.items()}, dict(facts)))
