"""Demonstration data: replay buffers in Zarr, window indices, checks, downloads, generators."""

from cmpolicy_data.replay_buffer import ReplayBuffer
from cmpolicy_data.selector import Selector, SelectorError
from cmpolicy_data.store import ReplayBufferError
from cmpolicy_data.windows import (
    EpisodeSplit,
    WindowError,
    WindowIndex,
    split_episodes,
    window_index,
)

__all__ = [
    "EpisodeSplit",
    "ReplayBuffer",
    "ReplayBufferError",
    "Selector",
    "SelectorError",
    "WindowError",
    "WindowIndex",
    "split_episodes",
    "window_index",
]
