"""Demonstration data: replay buffers in Zarr, window indices, checks, downloads, generators."""

from cmpolicy_data.catalog import DatasetNotFoundError, bundled_path, resolve
from cmpolicy_data.chunks import ReplayBufferError
from cmpolicy_data.demonstrations import Demonstrations, load_demonstrations
from cmpolicy_data.replay_buffer import ReplayBuffer
from cmpolicy_data.selector import Selector, SelectorError
from cmpolicy_data.validation import Problem, validate
from cmpolicy_data.windows import (
    EpisodeSplit,
    WindowError,
    WindowIndex,
    split_episodes,
    window_index,
)

__all__ = [
    "DatasetNotFoundError",
    "Demonstrations",
    "EpisodeSplit",
    "Problem",
    "ReplayBuffer",
    "ReplayBufferError",
    "Selector",
    "SelectorError",
    "WindowError",
    "WindowIndex",
    "bundled_path",
    "load_demonstrations",
    "resolve",
    "split_episodes",
    "validate",
    "window_index",
]
