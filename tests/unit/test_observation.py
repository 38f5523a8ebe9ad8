from __future__ import annotations

import dataclasses
import io
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from cmpolicy.observation import (
    NonFiniteObservationError,
    ObservationError,
    encode_jpeg,
    read_frames,
    read_numbers,
    read_observation,
)
from cmpolicy.spec import PolicySpec, SpecError

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
        (FRAME > 100, "holds true and false"),
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
    learning = torch.tensor([1, 2.5], requires_grad=True)
    assert read_observation(SPEC, "arm", learning).tolist() == [1, 2.5]
    with pytest.raises(ObservationError, match="'arm' is not an array of numbers"):
        read_observation(SPEC, "arm", [learning, learning])
    for bad in ([np.nan, 1], [1e300, 1]):
        with pytest.raises(NonFiniteObservationError, match="'arm' holds 1 NaN or infinite"):
            read_observation(SPEC, "arm", bad)
    with pytest.raises(ObservationError, match="not an array of numbers"):
        read_observation(SPEC, "arm", [[1], [2, 3]])


def _file(frame: np.ndarray, kind: str = "PNG") -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(frame).save(buffer, kind)
    return buffer.getvalue()


def test_frames_that_come_as_files() -> None:
    assert np.array_equal(read_frames("frame", _file(FRAME), SHAPE), FRAME)
    history = [_file(FRAME), _file(FRAME // 2)]
    read = read_frames("frame", [history, history], SHAPE)
    assert read.shape == (2, 2, *SHAPE)
    assert np.array_equal(read[1, 1], FRAME // 2)
    smooth = np.full((48, 64, 3), 120, np.uint8)
    jpeg = read_frames("frame", encode_jpeg(smooth, 90), smooth.shape)
    assert np.abs(jpeg.astype(int) - smooth).max() <= 2


@pytest.mark.parametrize(
    ("value", "words"),
    [
        (b"\xff\xd8\xff nothing", "holds bytes that are no JPEG or PNG"),
        (b"", "holds bytes that are no JPEG or PNG"),
        (_file(FRAME)[:-30], "holds bytes that are no JPEG or PNG"),
        (_file(FRAME, "BMP"), "holds bytes that are no JPEG or PNG"),
        (_file(np.zeros((5000, 5000, 3), np.uint8)), "an image of 5000 x 5000; at most 16777216"),
        (_file(FRAME[:, :4]), "frames of 6 x 4 x 3: the policy was trained on frames of 6 x 8 x 3"),
        ([_file(FRAME), _file(FRAME[:5])], "frames of 5 x 8 x 3"),
        ([[_file(FRAME)], [_file(FRAME)] * 2], "lists of several lengths"),
        (_file(FRAME[:5])[:-30], "frames of 5 x 8 x 3"),  # by its header, before it is decoded
    ],
)
def test_files_that_are_no_frames(value: Any, words: str) -> None:
    with pytest.raises(ObservationError, match=words):
        read_frames("frame", value, SHAPE)


def test_resizing_keeps_proportions() -> None:
    """Of a wide frame the middle is seen; a pixel is the mean of those that it covers."""
    wide = np.zeros((60, 100, 3), np.uint8)
    wide[:, :10] = wide[:, -10:] = 255  # 80 of 100 columns are seen
    small = read_frames("frame", wide, SHAPE, resize=True)
    assert small.shape == SHAPE
    assert not small.any()
    checks = np.indices((12, 16)).sum(0)[..., None].repeat(3, -1) % 2 * 200
    small = read_frames("frame", np.stack([checks, checks]).astype(np.uint8), SHAPE, resize=True)
    assert small.shape == (2, *SHAPE)
    assert (small == 100).all()
    files = [_file(checks.astype(np.uint8)), _file(FRAME), _file(wide)]  # each by itself
    assert np.array_equal(
        read_frames("frame", files, SHAPE, resize=True),
        np.stack([small[0], FRAME, np.zeros(SHAPE, np.uint8)]),
    )
    with pytest.raises(ObservationError, match=r"policy\.resize=true"):
        read_frames("frame", wide, SHAPE)


@pytest.mark.parametrize(
    ("shape", "words"),
    [
        ((6, 8, 4), "has 4 channels: .* drop alpha"),
        ((480, 640, 4), "has 4 channels: .* drop alpha"),
        ((480, 640, 1), r"has one channel: .* np.repeat\(frame, 3, -1\)"),
        ((480, 640), "grey frame of 480 x 640: .* repeat it to three channels"),
        ((2, 480, 640), "grey frame of 480 x 640: .* repeat it to three channels"),
        ((2, 3, 480, 640), r"channels first, \(3, 480, 640\): .* np.moveaxis"),
    ],
)
def test_what_is_no_frame_of_any_size(shape: tuple[int, ...], words: str) -> None:
    """A policy that resizes does not ask for another size, nor to be trained so."""
    with pytest.raises(ObservationError, match=words) as caught:
        read_frames("frame", np.zeros(shape, np.uint8), SHAPE, resize=True)
    assert "policy.resize" not in str(caught.value)


def test_a_policy_that_resizes_takes_histories_of_any_size() -> None:
    spec = dataclasses.replace(SPEC, resize=True)
    assert PolicySpec.from_dict(spec.to_dict()) == spec
    assert PolicySpec.from_dict(SPEC.to_dict()) == SPEC
    obs = {"top": np.zeros((2, 1, 30, 40, 3), np.uint8), "grip": np.zeros((2, 1, 1))}
    assert spec.check_obs({**obs, "arm": np.zeros((2, 1, 2))}) == 2
    assert read_observation(spec, "top", obs["top"]).shape == (2, 1, *SHAPE)
    first = np.zeros((2, 1, 3, 30, 40), np.uint8)
    with pytest.raises(SpecError, match=r"\(batch, 1, height, width, 3\): .*np.moveaxis"):
        spec.check_obs({**obs, "arm": np.zeros((2, 1, 2)), "top": first})
    with pytest.raises(SpecError, match=r"\(batch, 1, 6, 8, 3\): .*np.moveaxis"):
        SPEC.check_obs({**obs, "arm": np.zeros((2, 1, 2)), "top": first[..., :8]})
