"""Which feature each key of a store becomes, and its cells as Arrow arrays."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

from cmpolicy_data.convert.lerobot.errors import LeRobotError
from cmpolicy_data.convert.lerobot.layout import KEY
from cmpolicy_data.frames import Frames, channels_first, looks_like_frames
from cmpolicy_data.replay_buffer import ReplayBuffer
from cmpolicy_data.shown import dimension_names

IMAGES = ("video", "image")


@dataclass(frozen=True)
class Column:
    """A key of the store and the feature that it becomes."""

    key: str
    name: str
    dtype: str
    shape: tuple[int, ...]
    names: list[str] | None

    @property
    def is_camera(self) -> bool:
        return self.dtype in IMAGES

    def describe(self, fps: float, codec: str) -> dict[str, Any]:
        found: dict[str, Any] = {
            "dtype": self.dtype,
            "shape": list(self.shape),
            "names": self.names,
        }
        if self.dtype == "video":
            found["info"] = {
                "video.height": self.shape[0],
                "video.width": self.shape[1],
                "video.codec": codec,
                "video.pix_fmt": "yuv420p",
                "video.is_depth_map": False,
                "video.fps": fps,
                "video.channels": 3,
                "has_audio": False,
            }
        return found


def feature_name(key: str, *, frames: bool) -> str:
    """LeRobot's name of a store's key: ``observation/state`` and ``state`` are alike there."""
    if key == "action":
        return key
    key = key.replace("/", ".").removeprefix("observation.")
    return (
        f"observation.images.{key}"
        if frames and not key.startswith("image")
        else f"observation.{key}"
    )


def columns_of(buffer: ReplayBuffer, keys: Sequence[str], images: str) -> list[Column]:
    """The columns of some keys of a store, or of all.

    Raises:
        LeRobotError, ReplayBufferError: keys that are not there, or cannot be columns.
    """
    chosen = list(dict.fromkeys(keys)) or buffer.keys()
    if "action" not in chosen:
        raise LeRobotError(f"{buffer.path}: the keys {chosen} do not hold 'action'.")
    columns = []
    for key in chosen:
        buffer.check(key)
        array = buffer[key]
        if looks_like_frames(array):
            size = array.shape[2:] if channels_first(array) else array.shape[1:3]
            kind = ["height", "width", "channels"]
            columns.append(Column(key, feature_name(key, frames=True), images, (*size, 3), kind))
            continue
        shape = array.shape[1:] or (1,)
        if len(shape) > 5:
            raise LeRobotError(
                f"{buffer.path}: data/{key} has {len(shape)} axes per step, at most 5."
            )
        columns.append(
            Column(
                key,
                feature_name(key, frames=False),
                array.dtype.name,
                shape,
                dimension_names(buffer, key),
            )
        )
    for column in columns:
        others = [c.key for c in columns if c.name == column.name]
        if len(others) > 1:
            raise LeRobotError(
                f"{buffer.path}: the keys {others} would both be {column.name!r} in LeRobot; leave "
                "one of them out with keys=[...]."
            )
        if not KEY.fullmatch(column.name):
            raise LeRobotError(
                f"{buffer.path}: {column.key!r} would be {column.name!r} in LeRobot, which is no "
                "name there (letters, digits, . _ -); leave it out with keys=[...]."
            )
    return columns


def arrow_table(numbers: Mapping[str, npt.NDArray[Any]], pictures: Mapping[str, Frames]) -> Any:
    """A table of rows: numbers, and frames as PNG."""
    import pyarrow

    cells = {name: _arrow(rows) for name, rows in numbers.items()}
    kind = pyarrow.struct({"bytes": pyarrow.binary(), "path": pyarrow.string()})
    for name, frames in pictures.items():
        cells[name] = pyarrow.array(
            [{"bytes": _png(frame), "path": None} for frame in frames], type=kind
        )
    return pyarrow.table(cells)


def _arrow(rows: npt.NDArray[Any]) -> Any:
    """Rows (L, ...) as an Arrow array: numbers, or lists of a fixed size, or lists in lists."""
    import pyarrow

    shape = rows.shape[1:]
    array = pyarrow.array(np.ascontiguousarray(rows).reshape(-1))
    if shape in ((), (1,)):
        return array
    if len(shape) == 1:
        return pyarrow.FixedSizeListArray.from_arrays(array, shape[0])
    for size in reversed(shape):
        offsets = pyarrow.array(np.arange(0, len(array) + 1, size, dtype=np.int32))
        array = pyarrow.ListArray.from_arrays(offsets, array)
    return array


def _png(frame: Frames) -> bytes:
    file = io.BytesIO()
    Image.fromarray(frame).save(file, format="PNG", compress_level=1)
    return file.getvalue()
