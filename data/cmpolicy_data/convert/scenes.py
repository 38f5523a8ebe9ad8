"""The scene of each episode, kept in the store so that it can be replayed.

The MuJoCo XML of a demonstration differs from the next one's in a few numbers only (the size of an
object), so each distinct text is stored once and all of them in one compressed array::

    meta/scene_xml    (bytes,) uint8   the texts one after the other
    meta/scene_ends   (U,) int64       one past the last byte of each
    meta/scene_index  (E,) int64       which of them is the episode's
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import zarr
from zarr.codecs import Crc32cCodec, ZstdCodec

from cmpolicy_data.chunks import ReplayBufferError, lost_chunks, lost_message, read_rows
from cmpolicy_data.store import get_array, open_root

_CHUNK = 1 << 24


def write_scenes(path: Path, models: Sequence[str]) -> None:
    """Add the scenes of all E episodes to the directory store at ``path``."""
    distinct = list(dict.fromkeys(models))
    texts = [model.encode() for model in distinct]
    number = {model: i for i, model in enumerate(distinct)}
    meta = zarr.open_group(path, mode="r+", use_consolidated=False)["meta"]
    if not isinstance(meta, zarr.Group):
        raise ReplayBufferError(f"{path} has no group meta/.")
    columns: dict[str, npt.NDArray[Any]] = {
        "scene_xml": np.frombuffer(b"".join(texts), np.uint8),
        "scene_ends": np.cumsum([len(text) for text in texts], dtype=np.int64),
        "scene_index": np.array([number[model] for model in models], np.int64),
    }
    with zarr.config.set({"array.write_empty_chunks": True}):
        for name, values in columns.items():
            meta.create_array(
                name,
                data=values,
                chunks=(min(_CHUNK, len(values)),),
                compressors=(ZstdCodec(level=9), Crc32cCodec()),
            )


def read_scenes(path: str | Path, n_episodes: int) -> list[str] | None:
    """The MuJoCo XML of each episode; None if the store has none.

    Raises:
        FileNotFoundError: there is nothing at ``path``.
        ReplayBufferError: the store or its scenes are damaged, or of another number of episodes.
    """
    path = Path(path).expanduser()
    root = open_root(path)
    columns = []
    for name in ("meta/scene_xml", "meta/scene_ends", "meta/scene_index"):
        array = get_array(root, name, path)
        if array is None:
            return None
        lost = lost_chunks(array, rule="error")
        if lost:
            raise ReplayBufferError(f"{path}: {lost_message(lost, array)}.")
        columns.append(read_rows(array, 0, array.shape[0], path))
    xml, ends, index = columns
    if len(index) != n_episodes:
        raise ReplayBufferError(
            f"{path} holds scenes of {len(index)} episodes, but has {n_episodes}: it was appended "
            "to after it was converted. Convert again."
        )
    raw = xml.tobytes()
    texts = [raw[start:stop].decode() for start, stop in zip([0, *ends[:-1]], ends, strict=True)]
    return [texts[i] for i in index]
