"""What is shown of a store's episodes: their rows as pictures or curves, and names of numbers."""

from __future__ import annotations

import warnings
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from cmpolicy_data.chunks import ReplayBufferError, read_rows
from cmpolicy_data.frames import (
    Frames,
    as_levels,
    channels_first,
    looks_like_frames,
    starts_as_levels,
)
from cmpolicy_data.replay_buffer import ReplayBuffer

_MOST_CURVES = 16  # of one key


def episode_bounds(buffer: ReplayBuffer, episode: int) -> tuple[int, int]:
    """First row of an episode, and one past its last.

    Raises:
        ReplayBufferError: there is no such episode.
    """
    if not 0 <= episode < buffer.n_episodes:
        raise ReplayBufferError(
            f"{buffer.path} has no episode {episode}; it has {buffer.n_episodes}, from 0 on"
        )
    start = int(buffer.episode_ends[episode - 1]) if episode else 0
    return start, int(buffer.episode_ends[episode])


def shown_keys(buffer: ReplayBuffer, keys: Sequence[str] = ()) -> tuple[list[str], list[str]]:
    """Keys that are shown as pictures, and those that are shown as curves.

    Args:
        buffer: the store.
        keys: to show; empty: all images, and all keys of at most 16 numbers per step. A key that
            has an image's shape and holds other numbers (a normal map, say) is then left out, with
            a warning.

    Raises:
        ReplayBufferError: one of ``keys`` is not there, or neither of the two; or what is shown is
            not whole.
    """
    cameras, curves = [], []
    for key in keys or buffer.keys():
        array = buffer[key]
        if looks_like_frames(array):
            if keys or starts_as_levels(buffer, key):
                cameras.append(key)
            else:
                warnings.warn(
                    f"{buffer.path}: data/{key} is not shown: its steps have the shape of an image "
                    f"{array.shape[1:]}, but hold numbers that are not whole or not in [0, 255]",
                    stacklevel=2,
                )
        elif array.dtype.kind in "biuf" and int(np.prod(array.shape[1:])) <= _MOST_CURVES:
            curves.append(key)
        elif keys:
            raise ReplayBufferError(
                f"{buffer.path}: data/{key} cannot be shown: it is {array.dtype}, "
                f"{array.shape[1:]} per step; shown are images (H, W, 3) and up to "
                f"{_MOST_CURVES} numbers"
            )
    for key in (*cameras, *curves):
        buffer.check(key)  # a lost chunk would be shown as black frames
    return cameras, curves


def pictures(buffer: ReplayBuffer, key: str, start: int, end: int) -> Frames:
    """(end - start, H, W, 3) uint8."""
    array = buffer[key]
    rows = read_rows(array, start, end, buffer.path)
    if channels_first(array):
        rows = np.moveaxis(rows, 1, -1)
    return as_levels(rows, buffer, key, range(start, end))


def curves(buffer: ReplayBuffer, key: str, start: int, end: int) -> npt.NDArray[np.float64]:
    """(end - start, D)."""
    rows = read_rows(buffer[key], start, end, buffer.path)
    return rows.reshape(len(rows), -1).astype(np.float64)


def dimension_names(buffer: ReplayBuffer, key: str) -> list[str] | None:
    """The names in a store's attribute ``names`` of a key's numbers; None where it has none."""
    names = buffer.attrs.get("names")
    own = names.get(key) if isinstance(names, dict) else None
    size = int(np.prod(buffer[key].shape[1:]))
    return own if isinstance(own, list) and len(own) == size else None
