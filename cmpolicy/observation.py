"""Values that come from outside, read as what a policy takes: float32 numbers, or uint8 frames.

Stores, simulators, robots, servers and exports all read observations here, so an input that one of
them accepts is accepted by all, with the same words where it is not.
"""

from __future__ import annotations

import io
import warnings
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageOps

from cmpolicy.spec import PolicySpec, SpecError

Array = npt.NDArray[Any]

#: Of a frame that comes as a file: more than a 4K camera has, and not a bomb.
_MOST_PIXELS = 4096 * 4096
#: A last axis that is longer is the width of a frame whose channels are elsewhere, or absent.
_MOST_CHANNELS = 8


class ObservationError(SpecError):
    """An observation that does not fit the policy; the message names the key."""


class NonFiniteObservationError(ObservationError):
    """An observation of the right form that holds NaN or infinite numbers."""


class NonFiniteActionError(ValueError):
    """A policy's actions hold NaN or infinite numbers."""


def checked_actions(actions: Array) -> Array:
    """The actions that a policy gave.

    Raises:
        NonFiniteActionError: they hold NaN or infinite numbers.
    """
    if not np.isfinite(actions).all():
        raise NonFiniteActionError(
            "the policy's actions are not finite: the observation is far outside of what it "
            "was trained on, or its weights are broken"
        )
    return actions


def read_observation(spec: PolicySpec, key: str, value: Any) -> Array:
    """One key of an observation, of any number of steps or rows.

    Args:
        spec: of the policy.
        key: of ``spec.obs``.
        value: (..., *shape); an array, a tensor on the CPU, a list or a number. Frames may be JPEG
            or PNG files (bytes) in lists as deep as the leading axes.

    Returns:
        (..., *shape) of ``spec.dtype(key)``: float32, or uint8 for an image; the value itself where
        it is that already. A plain number stands for one of shape (1,).

    Raises:
        ObservationError: not numbers, a frame of another kind or size.
        NonFiniteObservationError: NaN or infinite numbers.
    """
    what = f"observation {key!r}"
    if key in spec.images:
        return read_frames(what, value, spec.obs[key], resize=spec.resize)
    array = read_numbers(what, value, np.float64 if key in spec.precise else np.float32)
    return array[None] if array.ndim == 0 and spec.obs[key] == (1,) else array


def read_numbers(
    what: str, value: Any, dtype: type[np.floating[Any]] = np.float32
) -> npt.NDArray[Any]:
    """The values as contiguous float32 (or ``dtype``), without a copy where they are that.

    Raises:
        ObservationError: not real numbers.
        NonFiniteObservationError: NaN or inf, also of numbers too large for float32.
    """
    array = _array(what, value)
    with np.errstate(over="ignore"):  # becomes infinite, and is counted below
        numbers = np.asarray(array, dtype=dtype, order="C")
    bad = numbers.size - np.count_nonzero(np.isfinite(numbers))
    if bad:
        raise NonFiniteObservationError(
            f"{what} holds {bad} NaN or infinite numbers, expected none"
        )
    return numbers


def read_noise(spec: PolicySpec, value: Any, rows: int | None) -> npt.NDArray[np.float32]:
    """The noise of decisions, (B, *spec.noise_shape), or of one without a batch (rows None).

    Raises:
        ObservationError: not finite numbers, or another shape.
    """
    array = read_numbers("noise", value)
    want = spec.noise_shape if rows is None else (rows, *spec.noise_shape)
    if array.shape != want:
        names = f"{'batch, ' if rows else ''}{'draws of noise, ' if spec.n_noises > 1 else ''}"
        raise ObservationError(
            f"noise has shape {array.shape}, expected {want} ({names}horizon, action_dim)"
        )
    return array


def read_plan(spec: PolicySpec, value: Any, rows: int) -> Array:
    """Running plans, one a row, as a new float64 array (B, T, A); a row of NaN stands for none.

    Raises:
        ObservationError: not numbers, another shape, or a row with some numbers that are not
            finite.
    """
    array = np.array(_array("plan", value), np.float64)
    want = (rows, *spec.noise_shape_of(1))
    if array.shape != want:
        raise ObservationError(
            f"plan has shape {array.shape}, expected {want} (batch, horizon, action_dim): the plan "
            "of the decision before as spec.shifted(plan, steps) gives it"
        )
    bad = ~(np.isfinite(array).all((1, 2)) | np.isnan(array).all((1, 2)))
    if bad.any():
        raise ObservationError(
            f"plan holds NaN or infinite numbers in row {int(bad.argmax())}; a row holds numbers, "
            "or NaN alone where there is no plan yet"
        )
    return array


def read_frames(
    what: str, value: Any, shape: tuple[int, ...], *, resize: bool = False
) -> npt.NDArray[np.uint8]:
    """Camera frames (..., H, W, 3) as uint8 RGB; ``shape`` is (H, W, 3).

    Floating-point frames are accepted if they hold whole numbers in [0, 255]. With ``resize``
    frames of another size are brought to this one: the largest part in the middle that has its
    proportions is scaled, each new pixel the mean of those that it covers.

    Raises:
        ObservationError: another size, grey or four-channel frames, channels first, or numbers that
            are not grey levels; the message says which conversion is needed.
    """
    array = _array(what, _decoded(what, value, shape, resize))
    if 0 in array.shape[-3:]:
        size = " x ".join(map(str, array.shape[-3:]))
        raise ObservationError(f"{what} has an empty frame ({size}): the camera gave no picture")
    if resize and array.ndim >= 3 and array.shape[-1] == 3 and array.shape[-3:] != shape:
        return _resized(as_uint8(what, array), shape)
    if array.shape[-3:] != shape:
        raise ObservationError(f"{what} {_why_not(array.shape, shape, resize=resize)}")
    return as_uint8(what, array)


def as_uint8(what: str, array: Array) -> npt.NDArray[np.uint8]:
    """Grey levels as uint8.

    Raises:
        ObservationError: numbers outside [0, 255], or not whole; true and false.
    """
    if array.dtype == np.uint8:
        return array
    if array.dtype == np.bool_:
        raise ObservationError(f"{what} holds true and false: frames are uint8 RGB in 0..255")
    if array.size and not (np.isfinite(array).all() and array.min() >= 0 and array.max() <= 255):
        raise ObservationError(
            f"{what} holds numbers outside [0, 255] (or NaN): frames are uint8 RGB"
        )
    levels = array.astype(np.uint8)
    if not np.array_equal(levels, array):
        largest = float(array.max())
        hint = "; multiply by 255 and round" if largest <= 1 else ""
        raise ObservationError(
            f"{what} holds numbers that are not whole (largest {largest:.4g}): frames are uint8 "
            f"RGB in 0..255{hint}"
        )
    return levels


def encode_jpeg(frame: npt.NDArray[np.uint8], quality: int) -> bytes:
    """A frame (H, W, 3) as a JPEG file; ``quality`` from 1 to 95."""
    file = io.BytesIO()
    Image.fromarray(frame).save(file, "JPEG", quality=quality)
    return file.getvalue()


def _decoded(what: str, value: Any, shape: tuple[int, ...], resize: bool) -> Any:
    """Frames that come as files, as arrays of the right size; anything else as it is."""
    if isinstance(value, list | tuple) and value and isinstance(value[0], bytes | list | tuple):
        parts = [_decoded(what, part, shape, resize) for part in value]
        if len({np.shape(part) for part in parts}) > 1:
            raise ObservationError(f"{what} holds lists of several lengths")
        return parts
    if not isinstance(value, bytes | bytearray):
        return value
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # see below
            with Image.open(io.BytesIO(value), formats=("JPEG", "PNG")) as image:
                # the header's size is looked at before anything is decoded
                if image.width * image.height > _MOST_PIXELS:
                    raise ObservationError(
                        f"{what} is an image of {image.height} x {image.width}; at most "
                        f"{_MOST_PIXELS} pixels are decoded"
                    )
                size = (image.height, image.width, 3)
                if not resize and size != shape:  # a small file may hold a large frame
                    raise ObservationError(f"{what} {_why_not(size, shape)}")
                frame = np.asarray(image.convert("RGB"))
                return frame if size == shape else _resized(frame, shape)
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        if isinstance(error, ObservationError):
            raise
        raise ObservationError(f"{what} holds bytes that are no JPEG or PNG: {error}") from error


def _resized(frames: npt.NDArray[np.uint8], shape: tuple[int, ...]) -> npt.NDArray[np.uint8]:
    size = (shape[1], shape[0])
    flat = frames.reshape(-1, *frames.shape[-3:])
    out = np.empty((len(flat), *shape), np.uint8)
    for i, frame in enumerate(flat):
        out[i] = ImageOps.fit(Image.fromarray(frame), size, method=Image.Resampling.BOX)
    return out.reshape(*frames.shape[:-3], *shape)


def _why_not(got: tuple[int, ...], shape: tuple[int, ...], *, resize: bool = False) -> str:
    """What is wrong with the shape of a frame, and what to do; with ``resize`` no size is wrong."""
    height, width, channels = shape
    wanted = f"the policy was trained on frames of {height} x {width} x {channels}"
    picture = resize and len(got) > 1 and got[-1] > _MOST_CHANNELS  # ends with height and width
    if (picture or got[-2:] == (height, width)) and got[-3:-2] != (channels,):
        return (
            f"is a grey frame of {got[-2]} x {got[-1]}: {wanted}; repeat it to three channels, "
            "np.repeat(frame[..., None], 3, -1)"
        )
    if picture or got[-3:] == (channels, height, width):
        return f"has its channels first, {got[-3:]}: {wanted}; np.moveaxis(frame, -3, -1)"
    if got[-3:-1] == (height, width) or (resize and len(got) > 2):
        if got[-1] == 1:
            return f"has one channel: {wanted} (RGB); np.repeat(frame, 3, -1)"
        return f"has {got[-1]} channels: {wanted} (RGB); drop alpha with frame[..., :3]"
    size = " x ".join(map(str, got[-3:])) if got else "a number"
    how = "" if resize else " (or train with policy.resize=true)"
    return (
        f"has frames of {size}: {wanted}; resize them before, with the aspect ratio kept{how}, and "
        "use the camera that the demonstrations were recorded with"
    )


def _array(what: str, value: Any) -> Array:
    if not isinstance(value, np.ndarray | np.generic | int | float | list | tuple) and not hasattr(
        value, "__array__"
    ):
        raise ObservationError(f"{what} is a {type(value).__name__}; expected an array of numbers")
    if hasattr(value, "detach"):  # a tensor that may want a gradient
        value = value.detach()
    try:
        array = np.asarray(value)
    except (TypeError, ValueError, RuntimeError) as error:
        raise ObservationError(f"{what} is not an array of numbers: {error}") from error
    if array.dtype.kind not in "biuf":
        raise ObservationError(f"{what} has dtype {array.dtype}, expected real numbers")
    return array
