"""A copy of a store with episodes left out, joined or cut."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from cmpolicy_data.chunks import read_rows
from cmpolicy_data.convert.writing import check_target, write_store
from cmpolicy_data.replay_buffer import ReplayBuffer

CONVERTER = "cmpolicy_data.convert.edit"
# Attributes about single episodes: their numbers are others afterwards.
_OF_EPISODES = ("masks", "demos", "seeds", "tasks", "episodes", "converter")


class EditError(ValueError):
    """Episodes that are not there, or that cannot be edited as asked."""


@dataclass(frozen=True)
class _Rows:
    """An episode of the new store: rows of the old one."""

    buffer: ReplayBuffer
    ranges: tuple[tuple[int, int], ...]
    model: None = None

    def arrays(self) -> dict[str, npt.NDArray[Any]]:
        path = self.buffer.path
        return {
            key: np.concatenate([read_rows(self.buffer[key], *part, path) for part in self.ranges])
            for key in self.buffer
        }


def plan(
    ends: npt.NDArray[np.int64],
    *,
    drop: Sequence[int] = (),
    keep: Sequence[int] | None = None,
    join: Sequence[Sequence[int]] = (),
    cut: Mapping[int, Sequence[int]] | None = None,
    min_steps: int = 1,
) -> list[tuple[tuple[int, int], ...]]:
    """Rows (start, stop) of each new episode, in order.

    Raises:
        EditError: an episode that is not there or is named twice, a cut outside an episode, or
            nothing left.
    """
    n, starts = len(ends), ends - np.diff(ends, prepend=0)
    cut = dict(cut or {})
    named = [*drop, *(keep or ()), *(e for group in join for e in group), *cut]
    for episode in named:
        if not 0 <= episode < n:
            raise EditError(f"there is no episode {episode}: the store has 0 to {n - 1}")
    edited = [*drop, *(e for group in join for e in group), *cut]
    twice = sorted({e for e in edited if edited.count(e) > 1})
    if twice:
        raise EditError(f"episode {twice[0]} is named by more than one of drop, join and cut")
    for group in join:
        if len(group) < 2 or list(group) != list(range(group[0], group[0] + len(group))):
            raise EditError(f"join={list(group)} must be episodes that follow one another")
    joined = {group[0]: list(group) for group in join}
    followers = {e for group in join for e in group[1:]}
    found: list[tuple[tuple[int, int], ...]] = []
    for episode in range(n):
        left_out = keep is not None and episode not in keep
        if episode in drop or episode in followers or left_out:
            continue
        start, stop = int(starts[episode]), int(ends[joined.get(episode, [episode])[-1]])
        places = sorted(cut.get(episode, ()))
        if any(not 0 < place < stop - start for place in places) or len(set(places)) < len(places):
            raise EditError(
                f"episode {episode} has {stop - start} steps; it cannot be cut before step {places}"
            )
        edges = [start, *(start + place for place in places), stop]
        found += [((a, b),) for a, b in itertools.pairwise(edges) if b - a >= min_steps]
    if not found:
        raise EditError("no episode is left")
    return found


def edit(
    source: str | Path,
    out: str | Path,
    *,
    progress: Callable[[int, int], None] | None = None,
    **changes: Any,
) -> ReplayBuffer:
    """Write the store ``out``: ``source`` with changes, its keys and other attributes as they are.

    What the store says of single episodes (masks, seeds, scenes, ``meta/success``) is left out.

    Args:
        source: a store.
        out: a path that ends in .zarr (a folder) or .zip; only a converted store is replaced.
        progress: called with (done, all) after each episode.
        **changes: see :func:`plan`.

    Raises:
        EditError: see :func:`plan`.
        FileNotFoundError, FileExistsError, ReplayBufferError, ValueError: files that cannot be
            used.
    """
    out = Path(out).expanduser()
    check_target(out)
    buffer = ReplayBuffer.open(source)
    if out.exists() and out.resolve() == buffer.path.resolve():
        raise EditError(f"out={out} is the store itself; choose another path")
    for key in buffer:
        buffer.check(key)
    if buffer.unreadable:
        key, why = next(iter(buffer.unreadable.items()))
        raise EditError(f"{source}: data/{key} cannot be opened, so it would be lost: {why}")
    episodes = plan(buffer.episode_ends, **changes)

    def rows() -> Iterator[_Rows]:
        for number, ranges in enumerate(episodes):
            yield _Rows(buffer, ranges)
            if progress is not None:
                progress(number + 1, len(episodes))

    attrs = {key: value for key, value in buffer.attrs.items() if key not in _OF_EPISODES}
    write_store(out, CONVERTER, rows(), attrs)
    return ReplayBuffer.open(out)
