"""ALOHA's HDF5 files, one per episode, converted to a store.

A file has ``action`` (T, A), ``observations/qpos`` (T, A) and perhaps ``qvel`` and ``effort``,
``observations/images/<camera>`` (T, H, W, 3) uint8, or JPEG: (T, L) uint8 filled up with zeros, or
(T,) byte strings of their own lengths. ALOHA compresses RGB frames with OpenCV, which takes them
for BGR: what another decoder gives has red and blue exchanged. Depth maps beside the cameras are
left out. Mobile ALOHA's ``base_action`` (T, 2) becomes the last two numbers of the actions, as in
its own training.
"""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from cmpolicy_data.convert.writing import check_target, write_store
from cmpolicy_data.replay_buffer import ReplayBuffer

CONVERTER = "cmpolicy_data.convert.aloha"
#: Actions per second of ALOHA's recordings.
CONTROL_HZ = 50.0
BASE = "base_action"
#: Attribute of the store: names of the files' arrays that it does not have.
LEFT_OUT = "left_out"
_STATES, _IMAGES = ("qpos", "qvel", "effort"), "observations/images"


class AlohaError(ValueError):
    """A file that is not in ALOHA's layout, or episodes that do not fit together."""


@dataclass(frozen=True)
class _Episode:
    data: dict[str, npt.NDArray[Any]]
    model: None = None

    def arrays(self) -> dict[str, npt.NDArray[Any]]:
        return self.data


def convert(
    source: str | Path,
    out: str | Path,
    *,
    control_hz: float = CONTROL_HZ,
    progress: Callable[[int, int], None] | None = None,
) -> ReplayBuffer:
    """Convert a folder of episodes (or one file) to the store ``out``.

    Args:
        source: folder with ``episode_0.hdf5`` and so on, or one such file.
        out: a path that ends in .zarr or .zip; only a converted store is replaced.
        control_hz: actions per second.
        progress: called with (done, all) after each episode.

    Raises:
        AlohaError: names the file, and what was expected in it.
        ImportError: h5py is not installed.
        FileNotFoundError, FileExistsError, ValueError: see ``check_target``.
    """
    source, out = Path(source).expanduser(), Path(out).expanduser()
    check_target(out)
    files = _files(source)
    left_out: set[str] = set()

    def episodes() -> Iterator[_Episode]:
        first: set[str] = set()
        left_out.clear()
        for number, file in enumerate(files):
            data = _read(file, left_out)
            first.update(() if first else data)
            if set(data) != first:
                raise AlohaError(
                    f"{file} has {sorted(data)}, and {files[0].name} has {sorted(first)}; all "
                    "episodes need the same keys"
                )
            yield _Episode(data)
            if progress is not None:
                progress(number + 1, len(files))

    def attrs() -> dict[str, Any]:
        names = [file.name for file in files]
        return {"control_hz": control_hz, "episodes": names, LEFT_OUT: sorted(left_out)}

    write_store(out, CONVERTER, episodes(), attrs)
    return ReplayBuffer.open(out)


def _files(source: Path) -> list[Path]:
    if source.is_file():
        return [source]
    if not source.is_dir():
        raise FileNotFoundError(f"There is nothing at {source}.")
    found = [path for path in source.iterdir() if path.suffix in (".hdf5", ".h5")]
    if not found:
        raise AlohaError(f"{source} holds no .hdf5 files; ALOHA writes episode_0.hdf5 and so on")

    def number(path: Path) -> tuple[int, str]:
        digits = re.findall(r"\d+", path.stem)
        return (int(digits[-1]) if digits else -1, path.name)

    return sorted(found, key=number)


def _read(path: Path, left_out: set[str]) -> dict[str, npt.NDArray[Any]]:
    """All of an episode; names of what is not taken are added to ``left_out``."""
    try:
        import h5py
    except ImportError as error:
        raise ImportError("HDF5 files need h5py: pip install 'cmpolicy[robomimic]'") from error
    try:
        file = h5py.File(path, "r")
    except OSError as error:
        raise AlohaError(f"{path} is not a whole HDF5 file ({error}); copy it again") from error
    with file:
        if "action" not in file or "observations/qpos" not in file:
            raise AlohaError(
                f"{path} is not in ALOHA's layout: it has {sorted(file)}, expected action and "
                "observations/qpos. robomimic's files are converted with `convert robomimic`"
            )
        data: dict[str, npt.NDArray[Any]] = {"action": np.asarray(file["action"], np.float32)}
        if BASE in file:
            base = np.asarray(file[BASE], np.float32)
            if len(base) != len(data["action"]):
                raise AlohaError(
                    f"{path}: all keys need the same number of steps, got {len(base)} of {BASE} "
                    f"and {len(data['action'])} of action"
                )
            data["action"] = np.concatenate([data["action"], base], axis=1)
        for key in _STATES:
            if f"observations/{key}" in file:
                data[key] = np.asarray(file[f"observations/{key}"], np.float32)
        images = file.get(_IMAGES, {})
        cameras = [name for name in images if not _is_depth(images[name])]
        for camera in cameras:
            data[camera] = _frames(images[camera], f"{path}: images/{camera}")
        lengths = {key: len(value) for key, value in data.items()}
        if len(set(lengths.values())) > 1 or not lengths["action"]:
            raise AlohaError(f"{path}: all keys need the same number of steps, got {lengths}")
        taken = {"action", BASE, "compress_len", *(f"observations/{key}" for key in _STATES)}

        def note(name: str, item: Any) -> None:
            if hasattr(item, "shape") and name not in taken | {f"{_IMAGES}/{c}" for c in cameras}:
                left_out.add(name)

        file.visititems(note)
        return data


def _is_depth(array: Any) -> bool:
    """Whether there is one number wider than a byte per pixel."""
    maps = array.ndim == 3 or (array.ndim == 4 and array.shape[-1] == 1)
    return maps and array.dtype.kind in "uif" and array.dtype.itemsize > 1


def _frames(array: Any, what: str) -> npt.NDArray[np.uint8]:
    import h5py

    is_raw = array.ndim == 4 and array.shape[-1] == 3
    strings = array.ndim == 1 and h5py.check_vlen_dtype(array.dtype) == np.uint8
    if not strings and (array.dtype != np.uint8 or not (is_raw or array.ndim == 2)):
        raise AlohaError(
            f"{what} has shape {array.shape}, dtype {array.dtype}; expected uint8 frames "
            "(T, H, W, 3), or JPEG as (T, L) uint8 or (T,) strings of uint8. Round frames in "
            "[0, 1] times 255 to uint8 before"
        )
    if is_raw:
        return np.asarray(array)
    from PIL import Image

    frames = []
    for step in range(len(array)):
        try:
            with Image.open(io.BytesIO(np.asarray(array[step]).tobytes())) as image:
                frames.append(np.asarray(image.convert("RGB"))[..., ::-1])
        except OSError as error:
            raise AlohaError(f"{what}: step {step} is not a whole JPEG ({error})") from error
    if len({frame.shape for frame in frames}) > 1:
        raise AlohaError(f"{what} has frames of several sizes")
    return np.ascontiguousarray(np.stack(frames))
