"""Everything that is wrong with a store, by name: what training would trip over, or not notice.

Arrays are read in blocks of whole chunks, so that images need not fit into memory.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import zarr

from cmpolicy_data.chunks import (
    Array,
    MissingChunks,
    ReplayBufferError,
    blocks,
    lost_chunks,
    lost_message,
    printable,
    read_rows,
)
from cmpolicy_data.seal import broken_seals
from cmpolicy_data.selector import Selector, SelectorError
from cmpolicy_data.store import arrays, get_array, is_marked, missing_rule, open_root

_ENDS = "meta/episode_ends"


@dataclass(frozen=True)
class Problem:
    """One thing that is wrong.

    Attributes:
        path: of the store.
        key: array in the store (``data/action``, ``meta/episode_ends``), "" for the store itself.
        index: step (for episode ends: the entry) that it is about, None for the whole array.
        message: what is wrong, what was expected, where.
    """

    path: Path
    key: str
    index: int | None
    message: str

    def __str__(self) -> str:
        return printable(f"{self.key or self.path}: {self.message}")


def validate(
    path: str | Path,
    required: Sequence[str] = ("action",),
    missing_chunks: MissingChunks = "auto",
) -> list[Problem]:
    """All problems of a store; an empty list means that it can be trained on.

    Args:
        path: of the store, a directory or a .zip.
        required: selectors that must be there (``action``, ``state[:2]``).
        missing_chunks: what a chunk that is not there means, see ``ReplayBuffer.open``.

    Raises:
        FileNotFoundError: there is nothing at ``path``.
    """
    path = Path(path).expanduser()
    try:
        root = open_root(path)
    except ReplayBufferError as error:
        return [Problem(path, "", None, str(error))]
    problems: list[Problem] = []
    ends = _episode_ends(root, path, problems)
    try:
        data, unreadable = arrays(root, "data", path)
    except ReplayBufferError as error:
        return [*problems, Problem(path, "data", None, str(error))]
    problems += [Problem(path, f"data/{key}", None, why) for key, why in unreadable.items()]
    if not data:
        problems.append(
            Problem(path, "data", None, "there are no arrays under data/, so nothing to train on")
        )
    problems.extend(_required(data, required, path))
    problems += [Problem(path, name, None, why) for name, why in broken_seals(root).items()]
    rule = missing_rule(root, missing_chunks)
    for key, array in data.items():
        problems.extend(_check_array(f"data/{key}", array, ends, is_marked(root), rule, path))
    return problems


def _episode_ends(root: zarr.Group, path: Path, found: list[Problem]) -> npt.NDArray[np.int64]:
    """The episode ends as far as they can be used (else empty); problems go to ``found``."""
    none = np.zeros(0, dtype=np.int64)

    def report(index: int | None, message: str) -> None:
        found.append(Problem(path, _ENDS, index, message))

    try:
        array = get_array(root, _ENDS, path)
    except ReplayBufferError as error:
        report(None, str(error))
        return none
    if array is None:
        report(None, "missing: (E,) integers, for each episode one past its last row, are needed")
        return none
    if array.ndim != 1 or array.dtype.kind not in "iu":
        report(None, f"must be 1-D integers, got shape {array.shape}, dtype {array.dtype}")
        return none
    marked = is_marked(root)
    committed = array.shape[0] - 1 if marked else None
    lost = lost_chunks(array, committed, rule="error")
    if lost:
        report(lost[0].start, lost_message(lost, array))
    try:
        ends = read_rows(array, 0, array.shape[0], path).astype(np.int64)
    except ReplayBufferError as error:
        report(None, str(error))
        return none
    if ends.size == 0:
        report(None, "empty: the store has no episodes")
    if marked and ends.size and ends[-1] <= 0:
        ends = ends[:-1]
        report(ends.size, "an append was cut off before its commit; the next append repairs this")
    for entry in np.flatnonzero(np.diff(ends, prepend=0) <= 0):
        before = int(ends[entry - 1]) if entry else 0
        report(
            int(entry),
            f"not increasing: entry {entry} is {int(ends[entry])} after {before}, so episode "
            f"{entry} has no steps",
        )
    return ends if ends.size and ends[-1] > 0 else none


def _required(data: dict[str, Array], required: Sequence[str], path: Path) -> Iterator[Problem]:
    for text in required:
        selector = Selector.parse(text)
        name = f"data/{selector.key}"
        if selector.key not in data:
            there = ", ".join(data) or "none"
            yield Problem(path, name, None, f"missing key {selector.key!r} (keys: {there})")
        elif not selector.is_whole:
            shape = data[selector.key].shape
            try:
                selector.columns(shape[1] if len(shape) > 1 else 1)
            except SelectorError as error:
                yield Problem(path, name, None, str(error))


def _check_array(
    name: str,
    array: Array,
    ends: npt.NDArray[np.int64],
    marked: bool,
    rule: MissingChunks,
    path: Path,
) -> Iterator[Problem]:
    if array.dtype.kind not in "biuf":
        yield Problem(
            path, name, None, f"wrong dtype {array.dtype}: expected numbers (float, int, bool)"
        )
        return
    if array.ndim == 0:
        yield Problem(path, name, None, "a single number: expected one row per step, (N, ...)")
        return
    n_steps = int(ends[-1]) if ends.size else None
    length = array.shape[0]
    if n_steps is not None and length != n_steps:
        left = " (rows of an append that was cut off; the next append removes them)"
        yield Problem(
            path,
            name,
            min(length, n_steps),
            f"wrong length: {length} steps, but the last episode ends at step {n_steps}"
            + (left if marked and length > n_steps else ""),
        )
    lost = lost_chunks(array, n_steps, rule=rule, ends=ends)
    if lost:
        yield Problem(path, name, lost[0].start, lost_message(lost, array))
    for start, stop in blocks(array):
        try:
            rows = read_rows(array, start, stop, path)
        except ReplayBufferError as error:
            yield Problem(path, name, start, str(error))
            continue
        if array.dtype.kind == "f":
            yield from _check_finite(name, rows, start, ends, path)


def _check_finite(
    name: str, rows: npt.NDArray[Any], start: int, ends: npt.NDArray[np.int64], path: Path
) -> Iterator[Problem]:
    """One problem for every episode with values that float32 does not hold as finite numbers."""
    with np.errstate(over="ignore"):
        bad = ~np.isfinite(rows.astype(np.float32, copy=False)).reshape(rows.shape[0], -1)
    steps = np.flatnonzero(bad.any(axis=1))
    if steps.size == 0:
        return
    episodes = np.searchsorted(ends, steps + start, side="right")
    flat = rows.reshape(rows.shape[0], -1)
    for episode in np.unique(episodes):
        mine = steps[episodes == episode]
        first = int(mine[0])
        column = int(np.argmax(bad[first]))
        value = flat[first, column]
        kind = "too large for float32" if np.isfinite(value) else "not finite"
        where = "no episode"
        if episode < ends.size:
            begin = int(ends[episode - 1]) if episode else 0
            where = f"episode {episode}, its step {start + first - begin}"
        yield Problem(
            path,
            name,
            start + first,
            f"{value} ({kind}) at step {start + first} ({where}), column {column}; "
            f"{int(bad[mine].sum())} such values in {mine.size} steps there",
        )
