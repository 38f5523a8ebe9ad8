"""Finding a data set by name or by path."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

HUMAN_STORE = "pusht_cchi_v7_replay.zarr"
"""Folder name of the human Push-T demonstrations of Diffusion Policy, as published."""

_ASSETS = Path(__file__).parent / "assets"
_BUNDLED = {task: f"{task}_scripted.zarr.zip" for task in ("pusht", "lift", "can", "square")}
_SCRIPTED = {f"{task}_scripted": task for task in _BUNDLED}
_NAMES = {**dict.fromkeys(_SCRIPTED, "bundled, scripted"), "pusht_human": "human demonstrations"}


_MAKE = {"pusht": "cmpolicy data generate pusht"}
_MAKE_ROBOMIMIC = (
    "cmpolicy data generate robomimic task={task} out={task}.hdf5, then "
    "cmpolicy data convert robomimic {task}.hdf5 out={task}.zarr, and data.path={task}.zarr"
)


class DatasetNotFoundError(FileNotFoundError):
    """A data set that is nowhere to be found; says where it was looked for."""


def bundled_path(name: str) -> Path:
    """The store of scripted demonstrations of a task that comes with the package.

    Raises:
        DatasetNotFoundError: no such bundled data, or the installation lacks the file.
    """
    if name not in _BUNDLED:
        raise DatasetNotFoundError(
            f"There is no bundled data set {name!r}; bundled are: {', '.join(_BUNDLED)}."
        )
    path = _ASSETS / _BUNDLED[name]
    if not path.is_file():
        raise DatasetNotFoundError(
            f"The bundled demonstrations are missing from this installation ({path}). Reinstall "
            f"cmpolicy, or make them: {_MAKE.get(name, _MAKE_ROBOMIMIC.format(task=name))}"
        )
    return path


def cache_dir() -> Path:
    """The folder cmpolicy in $XDG_CACHE_HOME, or in ~/.cache."""
    base = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(base).expanduser() / "cmpolicy"


def data_dir() -> Path:
    """Where downloads go: CMPOLICY_DATA if it is set, else the cache.

    If CMPOLICY_DATA is the store itself, the folder that it is in.
    """
    configured = os.environ.get("CMPOLICY_DATA")
    if not configured:
        return cache_dir()
    path = Path(configured).expanduser()
    return path.parent if _is_store(path) else path


def resolve(data: str, path: str | Path | None = None) -> Path:
    """The store that a data set's name, or a path, stands for.

    Args:
        data: ``<task>_scripted`` (bundled), ``pusht_human`` (``path``, else CMPOLICY_DATA, else the
            download cache), ``robomimic`` (needs ``path``), or the path of any store.
        path: the store; for ``pusht_human`` also a folder that it is in.

    Raises:
        DatasetNotFoundError: lists where it was looked for and what to do.
    """
    if path is not None and not Path(path).expanduser().exists():
        raise DatasetNotFoundError(
            f"There is no data at {path} (data.path). Check the path{_REMEDY}"
        )
    if data in _SCRIPTED:
        return bundled_path(_SCRIPTED[data]) if path is None else Path(path).expanduser()
    if data == "pusht_human":
        return _find_human(path)
    if data == "robomimic" and path is None:
        raise DatasetNotFoundError(f"data=robomimic needs data.path, a store.{_ROBOMIMIC_REMEDY}")
    found = Path(path if path is not None else data).expanduser()
    if found.exists():
        return found
    names = ", ".join(f"{name} ({what})" for name, what in _NAMES.items())
    raise DatasetNotFoundError(
        f"{data!r} is neither a data set by name ({names}) nor an existing path{_REMEDY}"
    )


_ROBOMIMIC_REMEDY = (
    "\nTo get one:\n"
    "  cmpolicy data download robomimic task=tool_hang type=ph     the official file, or\n"
    "  cmpolicy data generate robomimic task=lift out=lift.hdf5    scripted; then\n"
    "  cmpolicy data convert robomimic lift.hdf5 out=lift.zarr"
)
_REMEDY = (
    ".\nTo get Push-T demonstrations:\n"
    "  cmpolicy data download pusht    the human ones, from their public archive\n"
    "  cmpolicy data generate pusht    scripted ones, made here"
)


def _find_human(path: str | Path | None) -> Path:
    places: Mapping[str, str | Path | None] = {
        "data.path": path,
        "CMPOLICY_DATA": os.environ.get("CMPOLICY_DATA") or None,
        "download cache": cache_dir(),
    }
    looked = []
    for name, place in places.items():
        if place is None:
            looked.append(f"  {name}: not set")
            continue
        base = Path(place).expanduser()
        for candidate in (base, base / HUMAN_STORE, base / f"{HUMAN_STORE}.zip"):
            if _is_store(candidate):
                return candidate
        looked.append(f"  {name}: {base} is not, and does not hold, {HUMAN_STORE}")
    raise DatasetNotFoundError(
        "The human Push-T demonstrations (pusht_human) were not found. Looked in:\n"
        + "\n".join(looked)
        + "\nTwo ways on:\n"
        "  cmpolicy data download pusht        fetches them (or set data.path / CMPOLICY_DATA)\n"
        "  cmpolicy train task=pusht           trains on the bundled scripted demonstrations"
    )


def _is_store(path: Path) -> bool:
    if path.is_file():
        return path.suffix == ".zip"
    return (path / ".zgroup").is_file() or (path / "zarr.json").is_file()
