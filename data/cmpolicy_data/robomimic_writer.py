"""Writing demonstrations in robomimic's HDF5 layout; see :mod:`cmpolicy_data.robomimic_file`."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import numpy as np
import numpy.typing as npt

from cmpolicy_data.robomimic_file import import_h5py

Array = npt.NDArray[Any]


@dataclass(frozen=True)
class Recording:
    """One demonstration of L steps as it was recorded.

    Attributes:
        obs: observation key -> (L + 1, ...): before each action, and after the last.
        actions: (L, A) as executed.
        rewards: (L,) of the state after each action.
        dones: (L,) whether the episode might end after it.
        states: (L, S) flattened simulator states before each action.
        model: MuJoCo XML of the scene.
        attrs: further attributes of its group.

    Raises:
        ValueError: L is 0, or lengths disagree.
    """

    obs: Mapping[str, Array]
    actions: Array
    rewards: Array
    dones: Array
    states: Array
    model: str
    attrs: Mapping[str, Any]

    def __post_init__(self) -> None:
        length = len(self.actions)
        if length == 0:
            raise ValueError("A demonstration needs at least one step, got none.")
        expected = {f"obs/{key}": length + 1 for key in self.obs}
        expected |= dict.fromkeys(("rewards", "dones", "states"), length)
        found = {f"obs/{key}": len(value) for key, value in self.obs.items()}
        found |= {key: len(getattr(self, key)) for key in ("rewards", "dones", "states")}
        wrong = [key for key in expected if found[key] != expected[key]]
        if wrong:
            raise ValueError(
                f"A demonstration of {length} actions has {found[wrong[0]]} rows of {wrong[0]}; "
                f"expected {expected[wrong[0]]}."
            )

    def __len__(self) -> int:
        return len(self.actions)


class DemoWriter:
    """A file of demonstrations in the making, to be used in a ``with`` statement.

    It is written beside ``path`` and takes its place when the ``with`` statement ends well;
    otherwise ``path`` stays what it was.

    Args:
        path: of the file, in a folder that exists; a file that is there will be replaced.
        env_args: JSON that says which environment the demonstrations are of.
        attrs: further attributes of ``data``.

    Raises:
        ImportError: h5py is not installed.
    """

    def __init__(
        self, path: str | Path, env_args: str, attrs: Mapping[str, Any] | None = None
    ) -> None:
        h5py = import_h5py()
        self.path = Path(path).expanduser()
        handle, name = tempfile.mkstemp(
            prefix=f".{self.path.name}.", suffix=".partial", dir=self.path.parent
        )
        os.close(handle)
        self._temporary = Path(name)
        self._steps = 0
        self._names: list[str] = []
        try:
            self._file = h5py.File(self._temporary, "w")
            self._data = self._file.create_group("data")
            self._data.attrs["env_args"] = env_args
            self._data.attrs.update(attrs or {})
        except BaseException:
            self._discard()
            raise

    @property
    def steps(self) -> int:
        """How many steps all demonstrations have together."""
        return self._steps

    def add(self, recording: Recording) -> str:
        """Append a demonstration; returns the name of its group, ``demo_0`` and so on."""
        name = f"demo_{len(self._names)}"
        group = self._data.create_group(name)
        for key, value in recording.obs.items():
            group[f"obs/{key}"] = value[:-1]
            group[f"next_obs/{key}"] = value[1:]
        for key in ("actions", "rewards", "dones", "states"):
            group[key] = getattr(recording, key)
        group.attrs["num_samples"] = len(recording)
        group.attrs["model_file"] = recording.model
        group.attrs.update(recording.attrs)
        self._names.append(name)
        self._steps += len(recording)
        return name

    def add_mask(self, key: str, names: Sequence[str]) -> None:
        """Name a selection of the demonstrations, such as ``train``.

        Raises:
            ValueError: a name of no demonstration that was added.
        """
        unknown = [name for name in names if name not in self._names]
        if unknown:
            raise ValueError(f"mask/{key}: there is no demonstration {unknown[0]!r}.")
        # Fixed-length bytes, as robomimic's own tool writes them.
        self._file[f"mask/{key}"] = np.array(names, dtype="S")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        if kind is not None:
            self._discard()
            return
        try:
            self._data.attrs["total"] = self._steps
            self._file.close()
            with self._temporary.open("rb") as file:
                os.fsync(file.fileno())
            self._temporary.chmod(0o644)  # mkstemp makes private files
            self._temporary.replace(self.path)
        except BaseException:
            self._discard()
            raise

    def _discard(self) -> None:
        if hasattr(self, "_file"):
            self._file.close()
        self._temporary.unlink(missing_ok=True)
