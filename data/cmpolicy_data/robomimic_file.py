"""Reading demonstrations in robomimic's HDF5 layout, checked as they are read.

::

    data            attributes env_args (JSON: env_name, type, env_kwargs), total
      demo_0        attributes num_samples, model_file (MuJoCo XML)
        obs/<key>   (L, ...)  what was seen when the action was chosen
        actions     (L, A)    what was executed
        states      (L, S)    the simulator's flattened state: time, qpos, qvel
        actions_abs (L, A)    optional: the controller's goals, as robomimic's own tool adds them
        next_obs/<key>, rewards, dones
      demo_1 ...
    mask/<filter>   names of demonstrations (train, valid, ...)

Demonstrations come in the order of their numbers, as robomimic reads them: demo_2 before demo_10.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]
Float64Array = npt.NDArray[np.float64]

_EXPECTED = (
    "Expected a robomimic HDF5 file, such as `cmpolicy data download robomimic` fetches or "
    "`cmpolicy data generate robomimic` writes."
)
# In robomimic from 0.4 on; needs the robosuite that the demonstrations were recorded with.
EXTRACT_COMMAND = (
    "python -m robomimic.scripts.dataset_states_to_obs --dataset {source} "
    "--output_name low_dim.hdf5 --done_mode 2"
)


class RobomimicFileError(ValueError):
    """A file that is not in robomimic's layout, or holds demonstrations that cannot be used."""


@dataclass(frozen=True)
class Demo:
    """One demonstration of L steps; every number in it is finite.

    Attributes:
        name: of its group (``demo_7``).
        obs: observation key -> (L, ...), as stored.
        actions: (L, A) float64, as executed.
        states: (L, S) float64 flattened simulator states, None if the file has none.
        model: MuJoCo XML of its scene, None if the file has none.
        goals: (L, A) float64, the controller's goals (``actions_abs``), None if the file has none.
    """

    name: str
    obs: dict[str, Array]
    actions: Float64Array
    states: Float64Array | None
    model: str | None
    goals: Float64Array | None

    def __len__(self) -> int:
        return int(self.actions.shape[0])


class RobomimicFile:
    """An open file; ``open`` makes one, to be used in a ``with`` statement.

    Attributes:
        path: of the file.
        env_args: the JSON text that says which environment it was recorded in.
        demos: names of the demonstrations, in the order of their numbers.
        masks: name of a filter -> names of its demonstrations, in the order of their numbers.
    """

    def __init__(self, path: Path, file: Any) -> None:
        self.path = path
        self._file = file
        data = self._group(file, "data", "")
        self.demos = tuple(sorted((n for n in data if _is_demo(data[n], n)), key=_number))
        if not self.demos:
            raise RobomimicFileError(
                f"{path} holds no demonstrations (groups data/demo_0, data/demo_1, ...). "
                f"{_EXPECTED}"
            )
        self.env_args = self._env_args(data)
        self.masks = self._masks()

    @classmethod
    def open(cls, path: str | Path) -> Self:
        """Open a file for reading.

        Raises:
            FileNotFoundError: there is nothing at ``path``.
            RobomimicFileError: not HDF5, cut off, without demonstrations or env_args.
            ImportError: h5py is not installed.
        """
        h5py = import_h5py()
        path = Path(path).expanduser()
        if not path.exists():
            raise FileNotFoundError(f"There is no file {path}. {_EXPECTED}")
        if path.is_dir():
            raise RobomimicFileError(f"{path} is a folder. {_EXPECTED}")
        if not h5py.is_hdf5(path):
            raise RobomimicFileError(
                f"{path} is not an HDF5 file: it does not begin as one. {_EXPECTED}"
            )
        try:
            file = h5py.File(path, "r")
        except OSError as error:
            raise RobomimicFileError(
                f"{path} cannot be opened ({error}): the file is cut off, damaged, or still being "
                "written. Copy or download it again."
            ) from error
        try:
            return cls(path, file)
        except BaseException:
            file.close()
            raise

    def close(self) -> None:
        """Close the file; what was read from it stays."""
        self._file.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def select(self, filter_key: str | None) -> tuple[str, ...]:
        """Names of the demonstrations of a filter (``train``), in order; None: all of them.

        Raises:
            RobomimicFileError: no such filter; lists those there are.
        """
        if filter_key is None:
            return self.demos
        if filter_key not in self.masks:
            raise RobomimicFileError(
                f"{self.path} has no filter {filter_key!r} under mask/ (filters: "
                f"{', '.join(sorted(self.masks)) or 'none'}). Choose one of these, or none for all "
                "demonstrations."
            )
        return self.masks[filter_key]

    def obs_keys(self) -> list[str]:
        """Observation keys of the first demonstration, sorted."""
        return sorted(self._observations(self.demos[0]))

    def low_dim_keys(self) -> list[str]:
        """Observation keys that hold one vector per step (images do not), sorted.

        Raises:
            RobomimicFileError: the first demonstration has no observations, or none that are
                vectors.
        """
        obs = self._observations(self.demos[0])
        keys = sorted(key for key in obs if self._is_vector(obs, key, self.demos[0]))
        if not keys:
            raise RobomimicFileError(
                f"{self.path}: none of the observations of {self.demos[0]} ({', '.join(obs)}) is "
                "one vector per step. Name the keys to convert."
            )
        return keys

    def demo(self, name: str, keys: Sequence[str]) -> Demo:
        """Read and check one demonstration with the observations ``keys`` (may be none).

        Raises:
            RobomimicFileError: a key that is not there, no observations or actions, zero length,
                lengths that disagree, values that are not finite, or data that cannot be read.
        """
        where = f"{self.path}, {name}"
        group = self._group(self._file["data"], name, "data/")
        actions = self._numbers(group, "actions", where).astype(np.float64)
        if actions.ndim != 2 or actions.shape[1] < 1:
            raise RobomimicFileError(
                f"{where}: actions have shape {actions.shape}; expected one vector per step, (L, A)"
            )
        states = self._optional(group, "states", where)
        goals = self._optional(group, "actions_abs", where)
        there = self._observations(name) if keys else {}
        missing = [key for key in keys if key not in there]
        if missing:
            raise RobomimicFileError(
                f"{where}: no observation {', '.join(map(repr, missing))} (keys: "
                f"{', '.join(sorted(there))})."
            )
        obs = {key: self._numbers(there, key, f"{where}/obs") for key in keys}
        arrays = {"actions": actions, **{f"obs/{key}": value for key, value in obs.items()}}
        if states is not None:
            arrays["states"] = states
        if goals is not None:
            arrays["actions_abs"] = goals
        _check_lengths(arrays, group.attrs.get("num_samples"), where)
        for key, value in arrays.items():
            _check_finite(value, f"{where}/{key}")
        if goals is not None and goals.shape != actions.shape:
            raise RobomimicFileError(
                f"{where}: actions_abs has shape {goals.shape}, actions {actions.shape}; expected "
                "the same. Remove actions_abs or write it again."
            )
        model = group.attrs.get("model_file")
        return Demo(name, obs, actions, states, None if model is None else text_of(model), goals)

    def _group(self, parent: Any, name: str, prefix: str) -> Any:
        import h5py

        found = self._read(lambda: parent.get(name), f"{prefix}{name}")
        if not isinstance(found, h5py.Group):
            raise RobomimicFileError(f"{self.path} has no group {prefix}{name}. {_EXPECTED}")
        return found

    def _env_args(self, data: Any) -> str:
        value = data.attrs.get("env_args")
        if value is None:
            raise RobomimicFileError(
                f"{self.path} lacks the attribute env_args of data (JSON with env_name, type and "
                "env_kwargs): without it nobody knows in which environment it was recorded. "
                "Demonstrations straight from robosuite (env_info instead) are not read: "
                "robomimic's conversion scripts bring them into its layout."
            )
        text = text_of(value)
        try:
            parsed = json.loads(text)
        except ValueError as error:
            raise RobomimicFileError(
                f"{self.path}: env_args of data is not JSON ({error}): {text[:80]!r}"
            ) from error
        if not isinstance(parsed, dict) or not isinstance(parsed.get("env_name"), str):
            raise RobomimicFileError(
                f"{self.path}: env_args of data names no environment (env_name): {text[:80]!r}"
            )
        return text

    def _masks(self) -> dict[str, tuple[str, ...]]:
        import h5py

        group = self._file.get("mask")
        if not isinstance(group, h5py.Group):
            return {}
        masks = {}
        for key in group:
            names = [
                text_of(name) for name in np.ravel(self._values(group, key, f"{self.path}/mask"))
            ]
            unknown = sorted(set(names) - set(self.demos))
            if unknown:
                raise RobomimicFileError(
                    f"{self.path}: mask/{key} names {unknown[0]!r}, which is not among the "
                    f"{len(self.demos)} demonstrations ({self.demos[0]} to {self.demos[-1]})."
                )
            masks[str(key)] = tuple(sorted(set(names), key=_number))
        return masks

    def _observations(self, name: str) -> Mapping[str, Any]:
        import h5py

        obs = self._group(self._file["data"], name, "data/").get("obs")
        if not isinstance(obs, h5py.Group) or len(obs) == 0:
            command = EXTRACT_COMMAND.format(source=self.path)
            raise RobomimicFileError(
                f"{self.path}: {name} has no observations (obs/): this is a raw file, which holds "
                f"simulator states only. Extract them with robomimic 0.4 or newer:\n  {command}\n"
                "then convert the low_dim.hdf5 that it writes."
            )
        return obs

    def _is_vector(self, obs: Mapping[str, Any], key: str, name: str) -> bool:
        import h5py

        value = self._read(lambda: obs[key], f"data/{name}/obs/{key}")
        numeric = isinstance(value, h5py.Dataset) and value.dtype.kind in "biuf"
        return numeric and value.ndim in (1, 2)

    def _optional(self, group: Any, key: str, where: str) -> Float64Array | None:
        if key not in group:
            return None
        array = self._numbers(group, key, where).astype(np.float64)
        if array.ndim != 2:
            raise RobomimicFileError(
                f"{where}: {key} has shape {array.shape}; expected one vector per step, (L, ...)"
            )
        return array

    def _numbers(self, group: Any, key: str, where: str) -> Array:
        array = self._values(group, key, where)
        if array.dtype.kind not in "biuf":
            raise RobomimicFileError(f"{where}/{key} has dtype {array.dtype}; expected numbers")
        return array

    def _values(self, group: Any, key: str, where: str) -> Array:
        import h5py

        value = self._read(lambda: group.get(key), f"{where}/{key}")
        if not isinstance(value, h5py.Dataset):
            raise RobomimicFileError(f"{where} has no {key}. {_EXPECTED}")
        return np.asarray(self._read(lambda: value[()], f"{where}/{key}"))

    def _read(self, get: Any, what: str) -> Any:
        try:
            return get()
        except (OSError, KeyError, RuntimeError) as error:  # h5py's, for damaged parts
            raise RobomimicFileError(
                f"{self.path}: {what} cannot be read ({error}): the file is damaged. Copy or "
                "download it again."
            ) from error


def import_h5py() -> Any:
    """The package h5py.

    Raises:
        ImportError: not installed; names the extra.
    """
    try:
        import h5py
    except ImportError as error:
        raise ImportError(
            "robomimic's files need h5py; install it with: pip install 'cmpolicy[robomimic]'"
        ) from error
    return h5py


def _is_demo(value: Any, name: str) -> bool:
    return re.fullmatch(r"demo_\d+", name) is not None and hasattr(value, "keys")


def _number(name: str) -> int:
    return int(name.rpartition("_")[2])


def text_of(value: Any) -> str:
    """An HDF5 string, which comes as bytes or as text."""
    return value.decode() if isinstance(value, bytes) else str(value)


def _check_lengths(arrays: Mapping[str, Array], num_samples: Any, where: str) -> None:
    """Every array one row per step, at least one, as many as the demonstration says."""
    lengths = {key: value.shape[0] if value.ndim else 0 for key, value in arrays.items()}
    if not lengths["actions"]:
        raise RobomimicFileError(
            f"{where}: a demonstration of zero length (actions {arrays['actions'].shape}). Remove "
            "it from the file, or convert a filter that leaves it out (filter=...)."
        )
    if len(set(lengths.values())) > 1:
        raise RobomimicFileError(f"{where}: lengths disagree: {_listed(lengths.items())}")
    if num_samples is not None and int(num_samples) != lengths["actions"]:
        raise RobomimicFileError(
            f"{where}: the attribute num_samples is {int(num_samples)}, but there are "
            f"{lengths['actions']} actions"
        )


def _check_finite(value: Array, where: str) -> None:
    if value.dtype.kind != "f":
        return
    with np.errstate(over="ignore"):
        bad = ~np.isfinite(value.astype(np.float32)).reshape(value.shape[0], -1)
    if bad.any():
        step, column = np.argwhere(bad)[0]
        number = value.reshape(value.shape[0], -1)[step, column]
        kind = "too large for float32" if np.isfinite(number) else "not finite"
        raise RobomimicFileError(
            f"{where}: {number} ({kind}) at step {step}, column {column}; {int(bad.sum())} such "
            "values. Leave this demonstration out with a filter, or repair it."
        )


def _listed(items: Iterable[tuple[str, int]]) -> str:
    return ", ".join(f"{key} {value}" for key, value in items)
