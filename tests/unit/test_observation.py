from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from cmpolicy.observation import (
    NonFiniteObservationError,
    ObservationError,
    read_frames,
    read_numbers,
    read_observation,
)
from cmpolicy.spec import PolicySpec

SHAPE = (6, 8, 3)
SPEC = PolicySpec(
    {"top": SHAPE, "grip": (1,), "arm": (2,)},
    action_dim=1,
    horizon=4,
    n_obs_steps=1,
    n_action_steps=2,
    images=("top",),
)
FRAME = np.random.default_rng(0).integers(0, 256, SHAPE, dtype=np.uint8)


@given(st.sampled_from([np.float16, np.float32, np.float64, np.int64, np.uint8]), st.booleans())
def test_whole_numbers_of_any_type_are_frames(dtype: Any, batch: bool) -> None:
    value = FRAME.astype(dtype)
    value = np.stack([value, value]) if batch else value
    frames = read_observation(SPEC, "top", value)
    assert frames.dtype == np.uint8
    assert np.array_equal(frames, value)


def test_frames_are_not_copied() -> None:
    assert read_frames("frame", FRAME, SHAPE) is FRAME
    numbers = np.zeros(3, np.float32)
    assert read_numbers("numbers", numbers) is numbers


@pytest.mark.parametrize(
    ("value", "words"),
    [
        (FRAME / 255, "not whole .largest 0.*multiply by 255"),
        (FRAME.astype(np.float32) + 0.5, r"outside \[0, 255\]|not whole"),
        (FRAME.astype(np.int16) - 300, r"outside \[0, 255\]"),
        (np.full(SHAPE, np.nan), r"outside \[0, 255\] \(or NaN\)"),
        (FRAME[..., 0], "grey frame of 6 x 8: .* repeat it to three channels"),
        (np.moveaxis(FRAME, -1, 0), r"channels first, \(3, 6, 8\): .* np.moveaxis"),
        (np.concatenate([FRAME, FRAME[..., :1]], -1), "has 4 channels: .* drop alpha"),
        (FRAME[:5], "frames of 5 x 8 x 3: the policy was trained on frames of 6 x 8 x 3; resize"),
        (3.0, "frames of a number"),
        ("frame", "is a str"),
        ([["a"]], "dtype <U1"),
    ],
)
def test_what_is_no_frame(value: Any, words: str) -> None:
    with pytest.raises(ObservationError, match=words) as caught:
        read_observation(SPEC, "top", value)
    assert "'top'" in str(caught.value)


def test_numbers_from_anywhere() -> None:
    for value in ([1, 2.5], (1, 2.5), np.array([1, 2.5]), torch.tensor([1, 2.5])):
        found = read_observation(SPEC, "arm", value)
        assert found.dtype == np.float32
        assert found.tolist() == [1, 2.5]
    assert read_observation(SPEC, "grip", 0.5).tolist() == [0.5]
    for bad in ([np.nan, 1], [1e300, 1]):
        with pytest.raises(NonFiniteObservationError, match="'arm' holds 1 NaN or infinite"):
            read_observation(SPEC, "arm", bad)
    with pytest.raises(ObservationError, match="not an array of numbers"):
        read_observation(SPEC, "arm", [[1], [2, 3]])
