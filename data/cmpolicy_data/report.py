"""What looks healthy and is not: findings about numbers that a policy is to be trained on.

``validate`` lists what is broken. Here is what trains without an error and gives a useless policy:
a glitch that sets the scale, a clock as an observation, an angle that jumps, pauses.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from cmpolicy_data.chunks import MissingChunks, absent_chunks
from cmpolicy_data.frames import (
    channels_first_message,
    looks_like_frames,
    shaped_channels_first,
    starts_as_levels,
)
from cmpolicy_data.replay_buffer import ReplayBuffer
from cmpolicy_data.statistics import COARSE, FLOAT32, PERCENTILES, KeyStatistics

Int64Array = npt.NDArray[np.int64]

# Findings about one column are made for keys of at most so many columns.
_MOST_COLUMNS = 64
_MOST_NUMBERS = 4096
_CLOCK_KEY = re.compile(r"(.*[/_.])?(time|timestamp|stamp)(s|_ns|_s)?", re.IGNORECASE)
_CLOCK = 1e8  # seconds since 1970 are 1.7e9
_NARROW = 0.05
_STILL = 0.1


@dataclass(frozen=True)
class Finding:
    """One thing that may spoil a policy.

    Attributes:
        key: of the observation, or ``action``.
        column: dimension, or None for all of them.
        episode, step: where it shows first (the step counts from the episode's first), or None.
        message: what it is and which setting or change answers it.
    """

    key: str
    column: int | None
    episode: int | None
    step: int | None
    message: str

    def __str__(self) -> str:
        name = self.key if self.column is None else f"{self.key}[{self.column}]"
        return f"{name}: {self.message}"


def examine(
    values: Mapping[str, npt.NDArray[Any]],
    ends: Int64Array,
    *,
    actions: tuple[str, ...] = ("action",),
    pauses: bool = True,
    normalize: Mapping[str, str] | None = None,
) -> list[Finding]:
    """Findings about the keys' values.

    Args:
        values: (N, ...) finite numbers by key; camera frames are not for here.
        ends: (E,) one past the last row of each episode.
        actions: which keys are actions.
        pauses: whether the keys tell a pause from a motion.
        normalize: how keys are scaled: findings that it answers are left out, and those of keys
            that it does not have say nothing of scaling. None: not known, nothing is left out.
    """
    found: list[Finding] = []
    for key, array in values.items():
        method = "auto" if normalize is None else normalize.get(key)
        rows = array.reshape(len(array), -1)
        statistics = KeyStatistics.of(rows)
        if method in ("auto", None):
            found += _out_of_bounds(key, rows, statistics, ends, can_choose=method is not None)
        if rows.shape[1] <= _MOST_COLUMNS:
            for column in range(rows.shape[1]):
                coarse = array.dtype != np.float64 or key in actions
                one = rows[:, column].astype(np.float64)
                found += _column(key, column, one, statistics, ends, key in actions, coarse)
        found += _quaternions(key, rows, ends)
        if method in ("auto", "minmax"):
            found += _narrow(key, statistics)
    if pauses:
        found += _pauses(values, ends)
    return found


def table(values: Mapping[str, npt.NDArray[Any]]) -> list[str]:
    """Range and percentiles of every column (of keys with at most 64), as aligned lines."""
    head = ["column", "min", *(f"{p:g} %" for p in PERCENTILES), "max"]
    rows = [head]
    for key, array in values.items():
        flat = array.reshape(len(array), -1)
        if flat.shape[1] > _MOST_COLUMNS:
            continue
        statistics = KeyStatistics.of(flat)
        for c in range(flat.shape[1]):
            numbers = [statistics.minimum[c], *statistics.percentiles[:, c], statistics.maximum[c]]
            name = key if flat.shape[1] == 1 else f"{key}[{c}]"
            rows.append([name, *(f"{number:.4g}" for number in numbers)])
    widths = [max(len(row[i]) for row in rows) for i in range(len(head))]
    return [
        "  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]) for row in rows
    ]


def examine_store(path: str | Path, *, missing_chunks: MissingChunks = "auto") -> list[Finding]:
    """Findings about all numbers of a store, and about its clock if it has one.

    Raises:
        FileNotFoundError, ReplayBufferError: see :class:`ReplayBuffer`.
    """
    buffer = ReplayBuffer.open(path, missing_chunks=missing_chunks)
    values = {key: buffer.load(key) for key in _numeric(buffer)}
    clocks = {key: values.pop(key) for key in list(values) if _CLOCK_KEY.fullmatch(key)}
    found = examine(values, buffer.episode_ends)
    for key, times in clocks.items():
        found += _gaps(key, times, buffer.episode_ends)
    for key in buffer:
        frames = looks_like_frames(buffer[key])
        if frames and not starts_as_levels(buffer, key):
            message = (
                "has the shape of camera frames, but its numbers are not whole or not in "
                "[0, 255], and a training with these frames refuses them; if they lie in 0..1, "
                "multiply by 255, round, and store uint8"
            )
            found.append(Finding(key, None, *_where(0, buffer.episode_ends), message))
        elif not frames and shaped_channels_first(buffer[key].shape[1:]):
            found.append(Finding(key, None, None, None, channels_first_message(key, key)))
        absent = absent_chunks(buffer[key], buffer.n_steps)
        if absent:
            first = absent[0]
            found.append(
                Finding(
                    key,
                    None,
                    *_where(first.start, buffer.episode_ends),
                    f"{len(absent)} chunks are not there and are read as {buffer[key].fill_value}, "
                    f"first steps {first.start} to {first.stop - 1}; if the writer leaves none "
                    "out, they are lost: data.missing_chunks=error",
                )
            )
    return found


def table_of_store(path: str | Path) -> list[str]:
    """:func:`table` of all numbers of a store, and a line for each key that cannot be read.

    Raises:
        FileNotFoundError, ReplayBufferError: see :class:`ReplayBuffer`.
    """
    buffer = ReplayBuffer.open(path)
    values, unread = {}, []
    for key in _numeric(buffer):
        try:
            values[key] = buffer.load(key)
        except ValueError as error:
            unread.append(f"no percentiles of {key}: {error}")
    return [*table(values), *unread]


def _numeric(buffer: ReplayBuffer) -> list[str]:
    """Keys that are no images, with few enough numbers per step."""
    return [
        key
        for key in buffer
        if buffer[key].dtype.kind in "biuf"
        and not looks_like_frames(buffer[key])
        and 0 < int(np.prod(buffer[key].shape[1:])) <= _MOST_NUMBERS
    ]


def _gaps(key: str, times: npt.NDArray[Any], ends: Int64Array) -> Iterator[Finding]:
    """Steps of a clock that are much longer than the others, or go back."""
    if times.reshape(len(times), -1).shape[1] != 1 or len(times) < 3:
        return
    steps = np.diff(times.reshape(-1).astype(np.float64))
    within = np.ones(len(steps), bool)
    within[ends[:-1] - 1] = False
    usual = float(np.median(steps[within]))
    bad = np.flatnonzero(within & ((steps > 1.5 * usual) | (steps <= 0)))
    if bad.size and usual > 0:
        episode, step = _where(int(bad[0]) + 1, ends)
        yield Finding(
            key,
            None,
            episode,
            step,
            f"{bad.size} steps are not of the usual {usual:.4g}, first {steps[bad[0]]:.4g} in "
            f"episode {episode}, step {step}: frames were dropped, or the clock was set. A policy "
            "takes all steps for equally long; cut or resample there",
        )


def decision_steps(ends: Int64Array, episode: Int64Array, newest: Int64Array) -> str:
    """Which steps of the episodes training decides at, as one line.

    Args:
        ends: (E,) one past the last row of each episode.
        episode, newest: (W,) of each window, its episode and the row of its newest observation.
    """
    lengths = np.diff(ends, prepend=0)
    within = newest - (ends - lengths)[episode]
    last = np.full(len(ends), -1)
    np.maximum.at(last, episode, within)
    used, n_steps = np.minimum(last + 1, lengths).clip(0).sum(), int(lengths.sum())
    text = f"training decides at {used} of {n_steps} steps ({used / n_steps:.0%})"
    behind = lengths - 1 - last
    seen = behind[last >= 0]
    if seen.size and seen.max() > 0:
        text += f", not at the last {_span(seen)} of each episode, whose actions were not recorded"
    return text


def _span(numbers: Int64Array) -> str:
    low, high = int(numbers.min()), int(numbers.max())
    return f"{low}" if low == high else f"{low} to {high}"


def _out_of_bounds(
    key: str,
    rows: npt.NDArray[Any],
    statistics: KeyStatistics,
    ends: Int64Array,
    *,
    can_choose: bool,
) -> Iterator[Finding]:
    cure = f", or say data.normalize.{key}=minmax if they are right" if can_choose else ""
    for column in np.flatnonzero(statistics.n_outliers):
        low, high = statistics.low[column], statistics.high[column]
        outside = np.flatnonzero((rows[:, column] < low) | (rows[:, column] > high))
        first = int(outside[0])
        episode, step = _where(first, ends)
        yield Finding(
            key,
            int(column),
            episode,
            step,
            f"{rows[first, column]:.4g} in episode {episode}, step {step}, is out of all bounds: "
            f"the other values lie in [{low:.4g}, {high:.4g}] ({outside.size} such values). They "
            f"are cut to that range; repair them{cure}",
        )


def _column(
    key: str,
    column: int,
    values: npt.NDArray[np.float64],
    statistics: KeyStatistics,
    ends: Int64Array,
    is_action: bool,
    coarse: bool,
) -> Iterator[Finding]:
    low, high = statistics.low[column], statistics.high[column]
    span, largest = high - low, max(abs(low), abs(high))
    if span == 0:
        return  # the normaliser writes it instead of generating it
    if coarse and largest * FLOAT32 > COARSE * span:
        is_clock = largest > _CLOCK and not is_action
        clock = " It looks like a clock, which never shows a time of the training again."
        clock = clock if is_clock else ""
        yield Finding(
            key,
            column,
            None,
            None,
            f"values around {largest:.6g} differ by at most {span:.4g}, and single precision "
            f"resolves {largest * 2 * FLOAT32:.2g}: store them relative to a fixed value.{clock}",
        )
        return
    if not is_action and largest > _CLOCK and (np.diff(values) > 0).mean() > 0.9:
        yield Finding(
            key,
            column,
            None,
            None,
            "looks like a clock: it only rises. A policy never sees a time of the training again; "
            "leave it out of data.obs",
        )
    yield from _wraps(key, column, values, ends)


def _narrow(key: str, statistics: KeyStatistics) -> Iterator[Finding]:
    """Columns of which most values lie in a small part of the range."""
    low, high = statistics.middle
    span = statistics.high - statistics.low
    quantiles = np.subtract(*statistics.span("quantile")[::-1])
    # where percentiles would not scale it, it is a switch, and no worse for it
    columns = np.flatnonzero((high > low) & (high - low < _NARROW * span) & (quantiles < span))
    if columns.size:
        c = int(columns[np.argmin((high - low)[columns] / span[columns])])
        which = "" if columns.size == 1 else f" (and columns {', '.join(map(str, columns))} alike)"
        yield Finding(
            key,
            c,
            None,
            None,
            f"nine in ten values lie in [{low[c]:.4g}, {high[c]:.4g}], which is "
            f"{(high[c] - low[c]) / span[c]:.1%} of the range [{statistics.low[c]:.4g}, "
            f"{statistics.high[c]:.4g}]{which}: differences there are nearly invisible. "
            f"data.normalize.{key}=quantile scales by the percentiles 1 and 99",
        )


def _wraps(
    key: str, column: int, values: npt.NDArray[np.float64], ends: Int64Array
) -> Iterator[Finding]:
    """Jumps by almost a whole turn between neighbours."""
    for turn, unit in ((2 * np.pi, "radians"), (360.0, "degrees")):
        low, high = values.min(), values.max()
        if not 0.9 * turn < high - low <= 1.01 * turn:
            continue
        jumps = _inside(np.flatnonzero(np.abs(np.diff(values)) > 0.75 * turn), ends)
        others = np.abs(np.diff(values)) < 0.25 * turn
        if jumps.size and others.mean() > 0.9:
            episode, step = _where(int(jumps[0]) + 1, ends)
            yield Finding(
                key,
                column,
                episode,
                step,
                f"looks like an angle in {unit} that jumps by a turn {jumps.size} times, first in "
                f"episode {episode}, step {step}: for a network the two ends are far apart. Store "
                "its cosine and sine",
            )


def _quaternions(key: str, rows: npt.NDArray[np.float64], ends: Int64Array) -> Iterator[Finding]:
    """Unit quaternions that change their sign between neighbours: the same rotation, far apart."""
    after = 0  # the last one that was found: the next begins beyond it
    for first in range(min(rows.shape[1], _MOST_COLUMNS) - 3):
        if first < after:
            continue
        four = rows[:, first : first + 4].astype(np.float64)
        if np.abs((four**2).sum(axis=1) - 1).max() > 1e-3 or np.ptp(four, axis=0).max() < 1e-3:
            continue
        after = first + 4
        flips = _inside(np.flatnonzero((four[1:] * four[:-1]).sum(axis=1) < -0.5), ends)
        if flips.size:
            episode, step = _where(int(flips[0]) + 1, ends)
            yield Finding(
                key,
                first,
                episode,
                step,
                f"columns {first} to {first + 3} look like a quaternion that changes its sign "
                f"{flips.size} times, first in episode {episode}, step {step}: the same rotation "
                "at two places. Keep one sign within an episode, or store a 6-D rotation",
            )


def _pauses(values: Mapping[str, npt.NDArray[Any]], ends: Int64Array) -> Iterator[Finding]:
    """Steps at which nothing changes: a policy learns to stand still there."""
    flat = [array.reshape(len(array), -1) for array in values.values()]
    if not flat or len(flat[0]) < 2:
        return
    same = np.ones(len(flat[0]) - 1, bool)
    for rows in flat:
        same &= (rows[1:] == rows[:-1]).all(axis=1)
    same[ends[:-1] - 1] = False  # from one episode to the next
    share = float(same.mean())
    if share < _STILL:
        return
    starts = np.flatnonzero(same & ~np.r_[False, same[:-1]])
    stops = np.flatnonzero(same & ~np.r_[same[1:], False])
    longest = int(np.argmax(stops - starts))
    episode, step = _where(int(starts[longest]), ends)
    yield Finding(
        ", ".join(values),
        None,
        episode,
        step,
        f"{share:.0%} of the steps repeat the one before in all numbers, the longest run is "
        f"{stops[longest] - starts[longest] + 2} steps in episode {episode} from step {step}: a "
        "pause, or a sensor slower than the recording. A policy stands still where its data does; "
        "leave most of each pause out with data.max_pause=3, or record at the rate of the sensor",
    )


def _inside(rows: npt.NDArray[np.intp], ends: Int64Array) -> npt.NDArray[np.intp]:
    """Of changes from row i to i + 1, those within an episode."""
    return rows[~np.isin(rows + 1, ends)]


def _where(row: int, ends: Int64Array) -> tuple[int, int]:
    episode = int(np.searchsorted(ends, row, side="right"))
    return episode, row - (int(ends[episode - 1]) if episode else 0)
