"""Demonstrations in a Zarr store: ``data/<key>`` (N, ...) and ``meta/episode_ends`` (E,).

The layout is Diffusion Policy's: the steps of all episodes one after the other along the first axis
of every array, and for each episode one past its last row. Reads Zarr formats 2 and 3, directories
and .zip archives; writes format 3 directories, episode by episode.

Appending is atomic. ``meta/episode_ends`` is the commit point: the rows of the new episode are
written first, past the end that readers know, and only then the episode's end, by one atomic
replacement of one chunk file. An append that is cut off leaves rows that no episode owns; readers
do not see them and the next append removes them. One writer at a time: a lock sees to that.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal, Self

import numpy as np
import numpy.typing as npt
import zarr
from zarr.storage import LocalStore

from cmpolicy_data.chunks import (
    Array,
    MissingChunks,
    ReplayBufferError,
    lost_chunks,
    lost_message,
    read_rows,
)
from cmpolicy_data.parts import Parts, check_episode, encoding, in_parts, new_array
from cmpolicy_data.seal import SEAL, broken_seal, refuse_to_append
from cmpolicy_data.selector import Selector, SelectorError
from cmpolicy_data.statistics import needs_float64
from cmpolicy_data.store import (
    MARK,
    array_names,
    arrays,
    get_array,
    is_marked,
    mark,
    missing_rule,
    only_writer,
    open_root,
)
from cmpolicy_data.windows import WindowError, check_episode_ends

_ENDS = "meta/episode_ends"


class ReplayBuffer:
    """A store of demonstrations; ``open`` or ``create`` makes one.

    Attributes:
        path: where the store is.
        episode_ends: (E,) int64, one past the last row of each episode.
        unreadable: arrays that cannot be opened, by key, and why; all others can be used.
    """

    def __init__(
        self, path: Path, root: zarr.Group, missing_chunks: MissingChunks = "auto"
    ) -> None:
        self.path = path
        self._root = root
        self._rule = missing_rule(root, missing_chunks)
        self._marked = is_marked(root)
        self._data, self.unreadable = arrays(root, "data", path)
        self.episode_ends = self._read_episode_ends()

    @classmethod
    def open(
        cls,
        path: str | Path,
        mode: Literal["r", "r+"] = "r",
        *,
        missing_chunks: MissingChunks = "auto",
    ) -> Self:
        """Open a store: a directory or a .zip, Zarr format 2 or 3 (``r+``: to append).

        Args:
            path: of the store.
            mode: ``r`` or ``r+``.
            missing_chunks: what a chunk that is not there means: ``auto``, ``zero`` or ``error``,
                see :func:`cmpolicy_data.chunks.lost_chunks`.

        Raises:
            FileNotFoundError: there is nothing at ``path``.
            ReplayBufferError: not a store, damaged, without data/ or meta/episode_ends, or with
                ends that do not increase.
        """
        path = Path(path).expanduser()
        return cls(path, open_root(path, mode), missing_chunks)

    @classmethod
    def create(cls, path: str | Path, *, attrs: Mapping[str, Any] | None = None) -> Self:
        """A new, empty directory store; keys, shapes and dtypes come with the first episode.

        Raises:
            FileExistsError: there is something at ``path`` already.
            ReplayBufferError: a .zip, or ``attrs`` that are no JSON values.
        """
        path = Path(path).expanduser()
        if path.exists():
            raise FileExistsError(
                f"{path} exists already. Open it with mode='r+' to append, or choose another path."
            )
        if path.suffix == ".zip":
            raise ReplayBufferError(
                f"{path}: a .zip cannot be appended to. Create a directory store (for example "
                f"{path.with_suffix('')}) and pack it when it is complete."
            )
        try:
            json.dumps(attrs or {})
        except (TypeError, ValueError) as error:
            raise ReplayBufferError(f"{path}: attrs must be JSON values: {error}.") from error
        root = zarr.create_group(
            LocalStore(path),
            zarr_format=3,
            attributes={**(attrs or {}), **mark(all_chunks_written=True)},
        )
        root.create_group("data")
        root.create_group("meta").create_array(
            "episode_ends", shape=(0,), chunks=(4096,), dtype="int64", **encoding()
        )
        return cls.open(path, "r+")

    def keys(self) -> list[str]:
        """Names of the arrays under data/, sorted."""
        return sorted(self._data)

    @property
    def n_episodes(self) -> int:
        """Number of episodes E."""
        return int(self.episode_ends.shape[0])

    @property
    def n_steps(self) -> int:
        """Number of steps N over all episodes."""
        return int(self.episode_ends[-1]) if self.n_episodes else 0

    @property
    def zarr_format(self) -> int:
        """2 or 3."""
        return int(self._root.metadata.zarr_format)

    @property
    def attrs(self) -> dict[str, Any]:
        """The store's own attributes, a copy."""
        own = (MARK, SEAL)
        return {key: value for key, value in self._root.attrs.asdict().items() if key not in own}

    def update_attrs(self, attrs: Mapping[str, Any]) -> None:
        """Add or replace attributes (JSON values) of a store opened for appending.

        Others stay, also those that another process set since this store was opened.
        """
        self._require_writable()
        own = [key for key in attrs if key in (MARK, SEAL)]
        if own:
            raise ReplayBufferError(f"{self.path}: {own} are cmpolicy's own; choose other names.")
        with only_writer(self.path):
            self._root = open_root(self.path, "r+")  # as it is now, not as it was when opened
            self._root.attrs.update(attrs)

    def mark_converted(self) -> None:
        """Note that its episodes were made from other files, and can be made again."""
        self._require_writable()
        self._root.attrs.update(mark(all_chunks_written=True, converted=self.n_episodes))

    @property
    def is_converted(self) -> bool:
        """Whether all of it was made from other files: nothing was appended since."""
        own = self._root.attrs.asdict().get(MARK)
        return isinstance(own, dict) and own.get("converted") == self.n_episodes

    def per_episode(self, name: str) -> npt.NDArray[Any]:
        """(E,) what the store says of every episode: ``meta/<name>``, or a mask of that name.

        A mask is a list of episode numbers in the attribute ``masks``, as converted robomimic
        files have them.

        Raises:
            ReplayBufferError: there is no such thing, or not one number per episode; lists what
                there is.
        """
        masks = self.attrs.get("masks")
        if isinstance(masks, dict) and name in masks:
            mask = masks[name]
            if not isinstance(mask, list) or not all(
                type(e) is int and 0 <= e < self.n_episodes for e in mask
            ):
                raise ReplayBufferError(
                    f"{self.path}: the mask {name!r} must be a list of episode numbers from 0 to "
                    f"{self.n_episodes - 1}, got {str(mask)[:60]}. True or false of every episode "
                    "is an array meta/<name>, (E,)."
                )
            return np.isin(np.arange(self.n_episodes), mask)
        array = get_array(self._root, f"meta/{name}", self.path)
        if array is None:
            there = sorted({*array_names(self._root, "meta"), *(masks or ())} - {"episode_ends"})
            raise ReplayBufferError(
                f"{self.path} says nothing of the name {name!r} about its episodes: expected "
                f"meta/{name}, (E,), or a mask (there are: {', '.join(there) or 'none'})."
            )
        if array.shape != (self.n_episodes,) or array.dtype.kind not in "biuf":
            raise ReplayBufferError(
                f"{self.path}: meta/{name} has shape {array.shape}, dtype {array.dtype}; expected "
                f"one number per episode, ({self.n_episodes},)."
            )
        found = read_rows(array, 0, self.n_episodes, self.path)
        unknown = np.flatnonzero(~np.isfinite(found))
        if unknown.size:
            raise ReplayBufferError(
                f"{self.path}: meta/{name} holds {found[unknown[0]]} for episode {unknown[0]} (and "
                f"{unknown.size - 1} more); say 0 or 1 of every episode."
            )
        return found

    def __getitem__(self, key: str) -> Array:
        """The Zarr array of a key, unread.

        Raises:
            ReplayBufferError: no such key; lists those there are.
        """
        if key in self.unreadable:
            raise ReplayBufferError(
                f"{self.path}: data/{key} cannot be opened: {self.unreadable[key]}"
            )
        if key not in self._data:
            there = ", ".join(self.keys()) or "none"
            raise ReplayBufferError(f"{self.path} has no key {key!r} under data/ (keys: {there}).")
        return self._data[key]

    def __iter__(self) -> Iterator[str]:
        return iter(self.keys())

    def __contains__(self, key: object) -> bool:
        return key in self._data

    def load(self, selector: str) -> npt.NDArray[Any]:
        """All steps of a key, or of some of its columns: ``"action"``, ``"state[:2]"``.

        Returns:
            (N, ...): float32 for floating-point data, float64 where float32 would resolve less than
            a thousandth of a column's range, else the stored dtype; a key of shape (N,) comes as
            one column (N, 1).

        Raises:
            SelectorError: bad syntax, or columns that are not there.
            ReplayBufferError: no such key, not numbers, no episodes, a length that does not match
                the episodes, a broken seal, or chunks that are missing or damaged.
        """
        chosen = Selector.parse(selector)
        self.check(chosen.key)
        array = self[chosen.key]
        rows = read_rows(array, 0, self.n_steps, self.path)
        try:
            rows = chosen.take(rows)
        except SelectorError as error:
            raise SelectorError(f"{self.path}: {error}") from None
        if needs_float64(rows):
            return rows.astype(np.float64, copy=False)
        return rows.astype(np.float32, copy=False) if rows.dtype.kind == "f" else rows

    def check(self, key: str) -> None:
        """Check, without reading it, that a key can be loaded (``load`` does this first).

        Raises:
            ReplayBufferError: as ``load``.
        """
        # before the key: a store without episodes has no keys either
        if self.n_episodes == 0:
            raise ReplayBufferError(
                f"{self.path} has no episodes (meta/episode_ends is empty). Append or generate at "
                "least one first."
            )
        array = self[key]
        if array.dtype.kind not in "biuf":
            raise ReplayBufferError(
                f"{self.path}: data/{key} has dtype {array.dtype}; only numbers (float, int, "
                "uint8, bool) can be trained on. Convert it when the store is written."
            )
        rows = array.shape[0] if array.ndim else 0
        # Rows past the last end are of an interrupted append, if it is a store that we append to.
        if rows < self.n_steps or (rows > self.n_steps and not self._marked):
            raise ReplayBufferError(
                f"{self.path}: data/{key} has {rows} steps, but the episodes end at step "
                f"{self.n_steps} (last entry of meta/episode_ends). Every array needs exactly one "
                "row per step. `cmpolicy data validate` lists all that does not match."
            )
        changed = broken_seal(self._root, f"data/{key}")
        if changed:
            raise ReplayBufferError(f"{self.path}: data/{key} {changed}.")
        lost = lost_chunks(array, self.n_steps, rule=self._rule, ends=self.episode_ends)
        if lost:
            raise ReplayBufferError(f"{self.path}: {lost_message(lost, array)}.")

    def append_episode(self, episode: Mapping[str, npt.ArrayLike | Parts]) -> int:
        """Append one episode {key: (L, ...)}, atomically (module docstring).

        The first episode fixes keys, trailing shapes and dtypes. :class:`Parts` are drawn while
        they are written, one of each key in turn.

        Returns:
            The number of the new episode.

        Raises:
            ReplayBufferError: other keys, shapes or kinds of numbers than the store's, lengths that
                differ, an empty episode, a store opened for reading or sealed, one that another
                process appends to, or a full disk.
        """
        self._require_writable()
        values = {
            key: value if isinstance(value, Parts) else np.asarray(value)
            for key, value in episode.items()
        }
        # Chunks of nothing but zeros are written too, else they could not be told from lost ones.
        try:
            with only_writer(self.path), zarr.config.set({"array.write_empty_chunks": True}):
                self._append(values)
        except OSError as error:
            raise ReplayBufferError(
                f"Cannot append to {self.path}: {error.strerror or error}. The {self.n_episodes} "
                "episodes that it has are whole; make room, then append this one again."
            ) from error
        return self.n_episodes - 1

    def _append(self, values: Mapping[str, npt.NDArray[Any] | Parts]) -> None:
        self._root = open_root(self.path, "r+")  # it may have been sealed since it was opened
        refuse_to_append(self._root, self.path)
        # What is on disk counts: the append that was cut off may have been our own.
        self._data, self.unreadable = arrays(self._root, "data", self.path)
        if self.unreadable:
            raise ReplayBufferError(
                f"Cannot append to {self.path}: data/{next(iter(self.unreadable))} cannot be opened"
            )
        self.episode_ends = self._read_episode_ends()
        known = self._data if self.n_episodes else None
        length = check_episode(values, known, f"Cannot append to {self.path}")
        self._repair()
        start = self.n_steps
        for array in self._data.values():
            array.resize((start + length, *array.shape[1:]))
        for key, row, part in in_parts(values):
            if key not in self._data:
                self._data[key] = new_array(self._root, f"data/{key}", values[key], part)
                self._data[key].resize((length, *part.shape[1:]))
            array = self._data[key]
            array[start + row : start + row + len(part)] = part.astype(array.dtype, copy=False)
        # The new entry reads as 0, which is no episode's end, until the next line commits it.
        ends = self._root[_ENDS]
        if not isinstance(ends, zarr.Array):  # checked when the store was opened
            raise ReplayBufferError(f"{self.path} has lost {_ENDS}.")
        ends.resize((self.n_episodes + 1,))
        ends[self.n_episodes] = start + length
        self.episode_ends = np.append(self.episode_ends, np.int64(start + length))

    def _read_episode_ends(self) -> npt.NDArray[np.int64]:
        array = get_array(self._root, _ENDS, self.path)
        if array is None:
            raise ReplayBufferError(
                f"{self.path} has no {_ENDS}: (E,) integers, for each episode one past its last "
                "row. Without it the episodes cannot be told apart."
            )
        if array.ndim != 1 or array.dtype.kind not in "iu":
            raise ReplayBufferError(
                f"{self.path}: {_ENDS} must be 1-D integers, got shape {array.shape}, dtype "
                f"{array.dtype}."
            )
        # The last entry may be of an append that was cut off just before its commit, so not there.
        committed = array.shape[0] - 1 if self._marked else array.shape[0]
        changed = broken_seal(self._root, _ENDS)
        if changed:
            raise ReplayBufferError(f"{self.path}: {_ENDS} {changed}.")
        lost = lost_chunks(array, committed, rule="error")  # 0 is no episode's end
        if lost:
            raise ReplayBufferError(f"{self.path}: {lost_message(lost, array)}.")
        ends = read_rows(array, 0, array.shape[0], self.path).astype(np.int64)
        if self._marked and ends.size and ends[-1] <= 0:
            ends = ends[:-1]
        if ends.size:
            try:
                check_episode_ends(ends)
            except WindowError as error:
                raise ReplayBufferError(f"{self.path}: {error}") from error
        return ends

    def _repair(self) -> None:
        """Remove what an interrupted append left behind; mark the store as one we append to."""
        if not self._marked:
            # Only from here on may rows past the last end be read as an interrupted append.
            for key in self._data:
                self.check(key)
            self._root.attrs.update(mark(all_chunks_written=False))
            self._marked = True
        ends = self._root[_ENDS]
        if isinstance(ends, zarr.Array) and ends.shape[0] > self.n_episodes:
            ends.resize((self.n_episodes,))
        for key, array in list(self._data.items()):
            if self.n_episodes == 0:  # not even the keys were committed
                del self._root[f"data/{key}"]
                del self._data[key]
            elif array.shape[0] > self.n_steps:
                array.resize((self.n_steps, *array.shape[1:]))

    def _require_writable(self) -> None:
        if self._root.read_only:
            raise ReplayBufferError(
                f"{self.path} is open for reading. Use ReplayBuffer.open(path, mode='r+') on a "
                "directory store."
            )
