"""The openpi wire format: msgpack, in which a numpy array travels as a map of four fields.

    array   {b"__ndarray__": True, b"data": C-order bytes, b"dtype": "<f4", b"shape": [8, 2]}
    scalar  {b"__npgeneric__": True, b"data": 1.5, b"dtype": "<f4"}

Everything else is plain msgpack: maps, lists, text, bytes, numbers, true, false and nil. Nothing is
ever unpickled, and what comes in is bounded before it is built, so that a small message can neither
become a large object nor a strange one.
"""

from __future__ import annotations

import math
import re
import reprlib
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

try:
    import msgpack
except ImportError as error:
    raise ImportError(
        "the policy server and its client need msgpack: pip install 'cmpolicy[serve]'"
    ) from error

#: Longest list or map, most entries in all containers of a message together, and deepest nesting.
MAX_LENGTH = 256
MAX_ENTRIES = 4096
MAX_DEPTH = 8
#: As numpy 1; numpy 2 has more.
MAX_NDIM = 32
#: Default bound of a message, 16 MiB.
MAX_BYTES = 2**24

_ARRAY, _SCALAR = b"__ndarray__", b"__npgeneric__"
_ARRAY_FIELDS = {_ARRAY, b"data", b"dtype", b"shape"}
_SCALAR_FIELDS = {_SCALAR, b"data", b"dtype"}
#: Kinds that both sides carry: bool, int, unsigned, float, bytes, text. Objects (which would be
#: pickled), structures, complex numbers and dates are refused.
_KINDS = "biufSU"
_SIZES = {"b": (1,), "i": (1, 2, 4, 8), "u": (1, 2, 4, 8), "f": (2, 4, 8)}
_LARGEST_TEXT = 65_536  # characters or bytes in one element of a text array
_SPELLING = re.compile(f"[<>|=]([{_KINDS}])([1-9][0-9]{{0,4}})", re.ASCII)
_MOST_ELEMENTS = 2**31


class WireError(ValueError):
    """A message that is not the wire format, or is beyond its bounds; the text says where."""


def pack(message: Any) -> bytes:
    """A message as bytes; arrays of any layout.

    Raises:
        WireError: a value that the format cannot carry.
    """
    try:
        packed: bytes = msgpack.packb(message, default=_encode)
    except WireError:
        raise
    except (TypeError, ValueError, OverflowError) as error:
        raise WireError(f"this cannot be sent: {error}") from error
    return packed


def unpack(data: bytes, *, max_bytes: int = MAX_BYTES) -> Any:
    """The inverse of :func:`pack`; arrays are read-only views of ``data``'s copy.

    Raises:
        WireError: the message is longer than ``max_bytes``, truncated, no msgpack, or holds an
            array whose fields contradict each other or whose dtype is refused.
    """
    if len(data) > max_bytes:
        raise WireError(f"the message has {len(data)} bytes, at most {max_bytes} are accepted")
    decoder = _Decoder()
    size = len(data)
    try:
        message = msgpack.unpackb(
            data,
            raw=False,
            strict_map_key=True,
            object_hook=decoder.map,
            list_hook=decoder.list,
            ext_hook=_refuse_extension,
            max_str_len=size,
            max_bin_len=size,
            max_array_len=MAX_LENGTH,
            max_map_len=MAX_LENGTH,
            max_ext_len=0,
        )
    except WireError:
        raise
    except UnicodeDecodeError as error:
        raise WireError("the message holds text that is not UTF-8") from error
    except (ValueError, TypeError, OverflowError, msgpack.UnpackException) as error:
        # some of msgpack's own errors have no text
        raise WireError(
            f"the message is not valid msgpack: {str(error) or type(error).__name__}"
        ) from error
    _check_depth(message)
    return message


def _encode(value: Any) -> dict[bytes, Any]:
    if isinstance(value, np.ndarray):
        _check_kind(value.dtype)
        flat = np.ascontiguousarray(value).reshape(-1).view(np.uint8)
        return {
            _ARRAY: True,
            b"data": flat.data,
            b"dtype": value.dtype.str,
            b"shape": value.shape,
        }
    if isinstance(value, np.generic):
        _check_kind(value.dtype)
        return {_SCALAR: True, b"data": value.item(), b"dtype": value.dtype.str}
    raise WireError(
        f"a {type(value).__name__} cannot be sent; messages hold numpy arrays, numbers, text, "
        "bytes, lists and maps"
    )


def _check_kind(dtype: np.dtype[Any]) -> None:
    sizes = _SIZES.get(dtype.kind)
    if dtype.kind not in _KINDS or dtype.itemsize == 0 or (sizes and dtype.itemsize not in sizes):
        raise WireError(
            f"arrays of dtype {str(dtype)!r} are not sent; use bool, int, float32 or float64"
        )


class _Decoder:
    """Hooks for one message; counts what it holds, since an empty map costs one byte to send."""

    def __init__(self) -> None:
        self._entries = 0

    def list(self, value: list[Any]) -> list[Any]:
        self._count(len(value))
        return value

    def map(self, value: dict[Any, Any]) -> Any:
        self._count(len(value))
        if _ARRAY in value:
            return _decode_array(value)
        if _SCALAR in value:
            return _decode_scalar(value)
        return value

    def _count(self, entries: int) -> None:
        self._entries += 1 + entries
        if self._entries > MAX_ENTRIES:
            raise WireError(
                f"the message holds more than {MAX_ENTRIES} entries; send numbers as numpy arrays"
            )


def _decode_array(fields: Mapping[Any, Any]) -> NDArray[Any]:
    if fields.keys() != _ARRAY_FIELDS or fields[_ARRAY] is not True:
        raise WireError(f"an array has the fields {_names(_ARRAY_FIELDS)}, got {_names(fields)}")
    dtype, data, shape = _dtype(fields[b"dtype"]), fields[b"data"], fields[b"shape"]
    if type(data) is not bytes:
        raise WireError(f"the data of an array must be bytes, got {type(data).__name__}")
    if type(shape) is not list or not all(type(n) is int and n >= 0 for n in shape):
        raise WireError(
            f"the shape of an array must be a list of whole numbers, got {reprlib.repr(shape)}"
        )
    # a zero makes any other size fit no bytes at all
    if len(shape) > MAX_NDIM or math.prod(n or 1 for n in shape) > _MOST_ELEMENTS:
        raise WireError(f"an array of shape {reprlib.repr(shape)} is not accepted")
    needed = math.prod(shape) * dtype.itemsize
    if needed != len(data):
        raise WireError(
            f"an array of shape {tuple(shape)} and dtype {dtype.str!r} has {needed} bytes, "
            f"got {len(data)}"
        )
    return np.ndarray(shape=tuple(shape), dtype=dtype, buffer=data)


def _decode_scalar(fields: Mapping[Any, Any]) -> Any:
    if fields.keys() != _SCALAR_FIELDS or fields[_SCALAR] is not True:
        raise WireError(
            f"a numpy scalar has the fields {_names(_SCALAR_FIELDS)}, got {_names(fields)}"
        )
    dtype, value = _dtype(fields[b"dtype"]), fields[b"data"]
    expected = {"b": bool, "i": int, "u": int, "f": float, "S": bytes, "U": str}[dtype.kind]
    if type(value) is not expected:
        raise WireError(
            f"a numpy scalar of dtype {dtype.str!r} holds a {expected.__name__}, "
            f"got {type(value).__name__}"
        )
    if (
        isinstance(value, int)
        and dtype.kind in "iu"
        and not np.iinfo(dtype).min <= value <= np.iinfo(dtype).max
    ):
        raise WireError(f"{value} does not fit a numpy scalar of dtype {dtype.str!r}")
    with np.errstate(over="ignore"):  # a float too large for float32 is inf, as in numpy itself
        return dtype.type(value)


def _dtype(name: Any) -> np.dtype[Any]:
    """The dtype of that name; spelt as numpy spells it, since ``np.dtype`` reads whole structures.

    Raises:
        WireError: any other.
    """
    spelt = _SPELLING.fullmatch(name) if type(name) is str else None
    if spelt is not None:
        kind, size = spelt[1], int(spelt[2])
        if size in _SIZES.get(kind, range(1, _LARGEST_TEXT + 1)):
            return np.dtype(name)
    raise WireError(
        f"dtype {reprlib.repr(name)} is not accepted; use bool, int, float32 or float64"
    )


def _refuse_extension(code: int, data: bytes) -> Any:
    raise WireError(f"the message holds a msgpack extension (type {code}); none is accepted")


def _check_depth(message: Any) -> None:
    level = [message]
    for _ in range(MAX_DEPTH):
        inner: list[Any] = []
        for value in level:
            if type(value) is dict:
                inner.extend(value.values())
            elif type(value) is list:
                inner.extend(value)
        if not inner:
            return
        level = inner
    if any(type(value) in (dict, list) for value in level):
        raise WireError(f"the message is nested deeper than {MAX_DEPTH} levels")


def _names(fields: Any) -> str:
    return reprlib.repr(sorted(str(name) for name in fields))
