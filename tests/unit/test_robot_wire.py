"""The openpi wire format: round trips, both ways with openpi's own packer, and what is refused."""

import pickle
from contextlib import suppress
from typing import Any

import hypothesis.extra.numpy as hnp
import msgpack
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cmpolicy.serve.wire import MAX_DEPTH, MAX_ENTRIES, MAX_LENGTH, WireError, pack, unpack

DTYPES = st.one_of(
    hnp.boolean_dtypes(),
    hnp.integer_dtypes(endianness="?"),
    hnp.unsigned_integer_dtypes(endianness="?"),
    hnp.floating_dtypes(endianness="?", sizes=(16, 32, 64)),
    hnp.byte_string_dtypes(max_len=5),
    hnp.unicode_string_dtypes(max_len=5),
)
ARRAYS = DTYPES.flatmap(
    lambda dtype: hnp.arrays(dtype, hnp.array_shapes(min_dims=0, min_side=0, max_side=4))
)
PLAIN = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-(2**63), 2**64 - 1),
    st.floats(),
    st.text(max_size=8),
    st.binary(max_size=8),
)
KEYS = st.text(max_size=6)
MESSAGES = st.recursive(
    st.one_of(PLAIN, ARRAYS),
    lambda inner: st.one_of(st.lists(inner, max_size=4), st.dictionaries(KEYS, inner, max_size=4)),
    max_leaves=8,
)


def _same(first: Any, second: Any) -> bool:
    if isinstance(first, np.ndarray | np.generic):
        return (
            type(first) is type(second)
            and first.shape == second.shape
            and first.dtype == second.dtype
            and first.tobytes() == second.tobytes()  # NaN and -0.0 too
        )
    if isinstance(first, dict):
        return first.keys() == second.keys() and all(_same(first[k], second[k]) for k in first)
    if isinstance(first, list):
        return len(first) == len(second) and all(map(_same, first, second))
    return type(first) is type(second) and (
        first == second or (isinstance(first, float) and first != first and second != second)
    )


def _array(**changes: Any) -> dict[bytes, Any]:
    fields = {"__ndarray__": True, "data": bytes(24), "dtype": "<f4", "shape": [3, 2]}
    return {key.encode(): value for key, value in (fields | changes).items()}


@given(MESSAGES)
def test_round_trip(message: Any) -> None:
    assert _same(unpack(pack(message)), message)


@given(ARRAYS)
def test_same_bytes_as_openpi_and_back(array: np.ndarray) -> None:
    openpi = pytest.importorskip("openpi_client.msgpack_numpy")
    packed = pack({"obs": array})
    assert packed == openpi.packb({"obs": array})
    assert _same(openpi.unpackb(packed), unpack(packed))


@pytest.mark.parametrize("dtype", ["?", "i1", "<i8", "u2", "<f2", "<f4", ">f8"])
def test_scalars_as_openpi(dtype: str) -> None:
    openpi = pytest.importorskip("openpi_client.msgpack_numpy")
    scalar = np.ones(1, dtype)[0]
    assert pack([scalar]) == openpi.packb([scalar])
    (value,) = unpack(pack([scalar]))
    assert value == scalar
    if dtype != ">f8":  # float64 is Python's own float: it travels as one
        assert value.dtype == scalar.dtype


def test_layouts_and_sizes() -> None:
    base = np.arange(24, dtype=np.float32).reshape(4, 6)
    for array in (base.T, base[::2, 1:], base[::-1], np.asfortranarray(base), np.float32(3)):
        assert np.array_equal(unpack(pack(array)), array)
    assert not unpack(pack(base)).flags.writeable  # a view of the message: no second copy


@pytest.mark.parametrize(
    "value",
    [
        np.array([object()]),
        np.zeros(2, np.complex64),
        np.zeros(2, "i4,f4"),
        np.zeros(2, "M8[s]"),
        np.zeros(2, np.longdouble),
        np.zeros(2, "V4"),
        object(),
        {1, 2},
        2**70,
    ],
)
def test_what_is_not_sent(value: Any) -> None:
    with pytest.raises(WireError, match="sent"):
        pack({"obs": value})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"dtype": "O"}, "dtype 'O' is not accepted"),
        ({"dtype": "|O8"}, "is not accepted"),
        ({"dtype": "i4,i4"}, "is not accepted"),
        ({"dtype": "<c8"}, "is not accepted"),
        ({"dtype": "<f3"}, "is not accepted"),
        ({"dtype": "<f4\n"}, "is not accepted"),
        ({"dtype": "<U999999999"}, "is not accepted"),
        ({"dtype": "<U0"}, "is not accepted"),
        ({"dtype": "<f\u0664"}, "is not accepted"),  # a digit, but no ASCII digit
        ({"dtype": b"<f4"}, "is not accepted"),
        ({"dtype": None}, "is not accepted"),
        ({"shape": [3, 3]}, "has 36 bytes, got 24"),
        ({"shape": [2**62, 2**62]}, "is not accepted"),
        ({"shape": [0, 2**62]}, "is not accepted"),
        ({"shape": [-3, -2]}, "list of whole numbers"),
        ({"shape": [3.0, 2]}, "list of whole numbers"),
        ({"shape": [True, 6]}, "list of whole numbers"),
        ({"shape": 6}, "list of whole numbers"),
        ({"shape": [1] * 33 + [6]}, "is not accepted"),
        ({"data": "x" * 24}, "must be bytes"),
        ({"data": [1.0] * 6}, "must be bytes"),
        ({"data": None}, "must be bytes"),
        ({"__ndarray__": 1}, "has the fields"),
        ({"extra": 1}, "has the fields"),
    ],
)
def test_arrays_that_contradict_themselves(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(WireError, match=message):
        unpack(msgpack.packb({"obs": _array(**changes)}))


@pytest.mark.parametrize(
    ("dtype", "value", "message"),
    [
        ("|i1", 300, "does not fit"),
        ("|u1", -1, "does not fit"),
        ("<f4", 3, "holds a float"),
        ("|b1", 1, "holds a bool"),
        ("|O", 1, "is not accepted"),
        ("<f4", [1.0], "holds a float"),
    ],
)
def test_scalars_that_contradict_themselves(dtype: str, value: Any, message: str) -> None:
    with pytest.raises(WireError, match=message):
        unpack(msgpack.packb({b"__npgeneric__": True, b"data": value, b"dtype": dtype}))


def _nested(levels: int) -> bytes:
    return b"\x91" * levels + b"\x01"


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "not valid msgpack"),
        (b"\xc1", "not valid msgpack"),
        (pack({"obs": np.zeros(9)})[:-1], "not valid msgpack"),
        (pack(1) + pack(2), "not valid msgpack"),
        (b"\xdd\xff\xff\xff\xff", "max_array_len"),
        (b"\xdf\xff\xff\xff\xff", "max_map_len"),
        (b"\xc6\xff\xff\xff\xff", "not valid msgpack"),
        (b"\xdb\xff\xff\xff\xff", "not valid msgpack"),
        (msgpack.packb(list(range(MAX_LENGTH + 1))), "max_array_len"),
        (msgpack.packb([[{}] * 250] * 20), f"more than {MAX_ENTRIES} entries"),
        (_nested(MAX_DEPTH + 1), "nested deeper"),
        (_nested(100_000), "not valid msgpack"),
        (msgpack.packb(msgpack.ExtType(5, b"x")), "max_ext_len"),
        (msgpack.packb(msgpack.Timestamp(1)), "max_ext_len"),
        (b"\xa2\xff\xff", "not UTF-8"),
        (b"\x81\xc0\x01", "not valid msgpack"),
        (pickle.dumps({"obs": 1}), "not valid msgpack"),
    ],
)
def test_messages_that_are_none(data: bytes, message: str) -> None:
    with pytest.raises(WireError, match=message):
        unpack(data)


def test_bound_of_a_message() -> None:
    data = pack({"obs": np.zeros(100)})
    assert unpack(data, max_bytes=len(data))["obs"].shape == (100,)
    with pytest.raises(WireError, match=f"has {len(data)} bytes, at most {len(data) - 1}"):
        unpack(data, max_bytes=len(data) - 1)


@given(st.binary(max_size=200))
def test_no_bytes_do_anything_but_unpack_or_raise(data: bytes) -> None:
    with suppress(WireError):
        unpack(data)


@given(st.data())
def test_nor_do_mutated_messages(data: st.DataObject) -> None:
    message = bytearray(pack({"a": np.zeros((2, 3), np.float32), "b": np.int8(3), "c": ["x"]}))
    for _ in range(data.draw(st.integers(1, 4))):
        message[data.draw(st.integers(0, len(message) - 1))] = data.draw(st.integers(0, 255))
    with suppress(WireError):
        unpack(bytes(message))
