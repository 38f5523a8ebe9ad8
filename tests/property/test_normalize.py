from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from cmpolicy.normalize import CONSTANT_SHARE, Normalizer

FINITE = st.floats(-1e4, 1e4, allow_nan=False, width=32)


@pytest.mark.filterwarnings("ignore:.*taken for constant")
@settings(max_examples=100, deadline=None)
@given(
    hnp.arrays(
        np.float32,
        hnp.array_shapes(min_dims=1, max_dims=3, min_side=1, max_side=5),
        elements=FINITE,
    )
)
def test_round_trip(values: np.ndarray) -> None:
    """In range, and back to the value within float32's precision of the key's magnitude."""
    normalizer = Normalizer.fit({"key": values})
    x = torch.as_tensor(values)
    y = normalizer.normalize("key", x)
    low, high = values.min(0).astype(np.float64), values.max(0).astype(np.float64)
    magnitude = np.maximum(np.abs(low), np.abs(high))
    constant = high - low <= np.maximum(CONSTANT_SHARE * magnitude, 1e-37)
    slack = 1e-6 * (1 + magnitude / np.where(constant, 1, high - low))
    assert (np.abs(y.double().numpy()) <= np.where(constant, 0, 1 + slack)).all()
    back = normalizer.unnormalize("key", y).double().numpy()
    assert (np.abs(back - values) <= 1e-6 * (1 + magnitude)).all()


@settings(max_examples=50, deadline=None)
@given(
    hnp.arrays(np.float32, st.tuples(st.integers(1, 6)), elements=FINITE),
    st.integers(1, 10),
)
def test_constant_dimensions_come_back_exactly(row: np.ndarray, n: int) -> None:
    values = np.repeat(row[None], n, axis=0)
    normalizer = Normalizer.fit({"key": values})
    y = normalizer.normalize("key", torch.as_tensor(values))
    assert not y.any()
    assert np.array_equal(normalizer.unnormalize("key", y).numpy(), values)


@settings(max_examples=50, deadline=None)
@given(
    st.dictionaries(
        st.text(min_size=1, max_size=8),
        hnp.array_shapes(min_dims=0, max_dims=2, max_side=3),
        min_size=1,
        max_size=4,
    )
)
def test_any_key_survives_the_arrays(shapes: dict[str, tuple[int, ...]]) -> None:
    rng = np.random.default_rng(0)
    fitted = Normalizer.fit({key: rng.random((4, *shape)) for key, shape in shapes.items()})
    again = Normalizer.from_arrays(fitted.to_arrays())
    for key, shape in shapes.items():
        x = torch.rand(2, *shape)
        assert torch.equal(again.normalize(key, x), fitted.normalize(key, x))
