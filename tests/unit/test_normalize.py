from __future__ import annotations

import copy

import numpy as np
import pytest
import torch

from cmpolicy.normalize import Normalizer


def _data(dtype: type = np.float32) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    return {
        "action": (rng.random((50, 2)) * 500).astype(dtype),
        "keypoint": (rng.standard_normal((50, 9, 2)) * 3 - 7).astype(dtype),
    }


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64, np.int64])
def test_range_is_minus_one_to_one(dtype: type) -> None:
    data = _data(dtype)
    normalizer = Normalizer.fit(data)
    for key, values in data.items():
        y = normalizer.normalize(key, torch.as_tensor(values))
        torch.testing.assert_close(y.amin(0), -torch.ones(y.shape[1:]).to(y), rtol=0, atol=1e-5)
        torch.testing.assert_close(y.amax(0), torch.ones(y.shape[1:]).to(y), rtol=0, atol=1e-5)
        back = normalizer.unnormalize(key, y)
        torch.testing.assert_close(back, torch.as_tensor(values).to(back), rtol=1e-5, atol=1e-4)


def test_constant_dimension_is_centred_and_comes_back_exactly() -> None:
    values = np.full((20, 3), [4.25, -512.0, 0.1], np.float32)
    values[:, 1] = np.linspace(-1, 1, 20)
    normalizer = Normalizer.fit({"state": values})
    y = normalizer.normalize("state", torch.as_tensor(values))
    assert torch.equal(y[:, [0, 2]], torch.zeros(20, 2))
    back = normalizer.unnormalize("state", y)
    assert torch.equal(back[:, [0, 2]], torch.as_tensor(values)[:, [0, 2]])
    # a value never seen in the data is nothing to the network, and what it says is not asked for
    assert normalizer.normalize("state", torch.tensor([5.25, 0.0, 0.1]))[0] == 0.0
    generated = normalizer.unnormalize("state", torch.randn(5, 3))
    assert torch.equal(generated[:, [0, 2]], torch.as_tensor(values)[:5, [0, 2]])


def test_a_tiny_range_is_no_constant() -> None:
    """Actions of a few micrometres, in metres: decided by precision, not by the unit."""
    values = np.random.default_rng(0).uniform(-6e-5, 6e-5, (100, 2))
    normalizer = Normalizer.fit({"action": values})
    y = normalizer.normalize("action", torch.as_tensor(values))
    assert y.abs().amax() > 0.9
    back = normalizer.unnormalize("action", y)
    torch.testing.assert_close(back, torch.as_tensor(values), rtol=1e-5, atol=1e-10)


def test_rounding_is_taken_for_constant_with_a_warning() -> None:
    values = np.array([[1e6, 0.0], [1e6 + 0.0625, 1.0]])
    with pytest.warns(UserWarning, match=r"state\[0\] is taken for constant: it varies by 0\.0625"):
        normalizer = Normalizer.fit({"state": values})
    assert not normalizer.normalize("state", torch.as_tensor(values))[:, 0].any()


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_non_finite_data(bad: float) -> None:
    data = _data()
    data["keypoint"][3, 4, 1] = bad
    with pytest.raises(ValueError, match=r"'keypoint' holds NaN or inf.*cmpolicy data validate"):
        Normalizer.fit(data)


def test_empty_data() -> None:
    with pytest.raises(ValueError, match="'action' holds no steps"):
        Normalizer.fit({"action": np.zeros((0, 2))})


def test_unknown_key() -> None:
    normalizer = Normalizer.fit(_data())
    for method in (normalizer.normalize, normalizer.unnormalize):
        with pytest.raises(KeyError, match=r"no key 'image'; it knows \['action', 'keypoint'\]"):
            method("image", torch.zeros(2))


def test_identity() -> None:
    normalizer = Normalizer.identity({"action": (2,), "force": ()})
    x = torch.randn(4, 2)
    assert torch.equal(normalizer.normalize("action", x), x)
    assert torch.equal(normalizer.unnormalize("force", x), x)


def test_arrays_round_trip() -> None:
    fitted = Normalizer.fit(_data() | {"robot.arm/pos": np.random.default_rng(1).random((9, 3))})
    again = Normalizer.from_arrays(fitted.to_arrays())
    assert set(again.keys) == set(fitted.keys)
    for name, value in fitted.to_arrays().items():
        assert torch.equal(again.to_arrays()[name], value)


def test_state_dict_does_not_depend_on_the_order_of_keys() -> None:
    data = _data() | {"goal": _data()["action"] * 3}
    fitted = Normalizer.fit(data)
    twin = Normalizer.identity({key: data[key].shape[1:] for key in reversed(data)})
    twin.load_state_dict(fitted.state_dict())
    for key, values in data.items():
        x = torch.as_tensor(values)
        assert torch.equal(twin.normalize(key, x), fitted.normalize(key, x))


def test_buffers_follow_the_module() -> None:
    normalizer = Normalizer.fit(_data())
    assert normalizer.normalize("action", torch.zeros(2)).dtype == torch.float32
    assert normalizer.double().normalize("action", torch.zeros(2).double()).dtype == torch.float64
    twin = Normalizer.identity({"action": (2,), "keypoint": (9, 2)})
    twin.load_state_dict(normalizer.state_dict())
    assert torch.equal(
        twin.to_arrays()["action.scale"], normalizer.float().to_arrays()["action.scale"]
    )
    clone = copy.deepcopy(normalizer)
    clone.to_arrays()["action.scale"].zero_()
    assert normalizer.to_arrays()["action.scale"].all()
    assert not list(normalizer.parameters())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"action.offset": None}, "'action' has no offset"),
        ({"action.offset": torch.zeros(3)}, "'action' has no offset of its scale's shape"),
        ({"action.scale": torch.tensor([1.0, torch.inf])}, "'action' holds non-finite"),
        ({"action.offset": torch.tensor([1.0, torch.nan])}, "'action' holds non-finite"),
    ],
)
def test_from_arrays_refuses_what_cannot_be_inverted(
    changes: dict[str, torch.Tensor | None], message: str
) -> None:
    arrays = Normalizer.identity({"action": (2,)}).to_arrays() | changes
    with pytest.raises(ValueError, match=message):
        Normalizer.from_arrays({k: v for k, v in arrays.items() if v is not None})


def test_unchanged_dimensions_stay_as_they_are() -> None:
    action = np.random.default_rng(0).uniform(-0.3, 0.7, (64, 3))
    mask = np.array([False, True, False])
    normalizer = Normalizer.fit({"action": action, "state": action}, {"action": mask})
    given = torch.as_tensor(action, dtype=torch.float32)
    mapped = normalizer.normalize("action", given)
    torch.testing.assert_close(mapped[:, 1], given[:, 1], rtol=0, atol=0)
    assert mapped[:, [0, 2]].amin() == pytest.approx(-1, abs=1e-6)
    assert mapped[:, [0, 2]].amax() == pytest.approx(1, abs=1e-6)
    assert normalizer.normalize("state", given)[:, 1].amax() == pytest.approx(1, abs=1e-6)


def test_limits_cut_before_and_after() -> None:
    values = np.random.default_rng(0).uniform(-1, 1, (50, 2))
    values[3, 0] = 5000
    spans = {"action": (np.array([-1.0, -1.0]), np.array([1.0, 1.0]))}
    normalizer = Normalizer.fit({"action": values}, spans=spans, limits=spans)
    y = normalizer.normalize("action", torch.as_tensor(values, dtype=torch.float32))
    assert y.abs().max() == 1
    assert normalizer.unnormalize("action", torch.tensor([[7.0, -0.5]])).tolist() == [[1.0, -0.5]]
    assert normalizer.limits("action")[1].tolist() == [1, 1]
    again = Normalizer.from_arrays(normalizer.to_arrays())
    assert again.unnormalize("action", torch.tensor([[7.0, -0.5]])).tolist() == [[1.0, -0.5]]


def test_a_state_without_limits_takes_them_away_and_one_with_them_brings_them() -> None:
    values = {"action": np.linspace(0, 1, 9)[:, None]}
    limits = {"action": (np.zeros(1), np.ones(1))}
    plain, cut = Normalizer.fit(values), Normalizer.fit(values, limits=limits)
    for target, source in ((plain, cut), (cut, Normalizer.fit(values))):
        target.load_state_dict(source.state_dict())
        high = float(target.unnormalize("action", torch.tensor([3.0])))
        assert high == (2.0 if source.limits("action") is None else 1.0)


def test_limits_that_cannot_be() -> None:
    arrays = Normalizer.fit(
        {"a": np.linspace(0, 1, 9)[:, None]}, limits={"a": (np.zeros(1), np.ones(1))}
    ).to_arrays()
    arrays["a.low"] = torch.tensor([2.0])
    with pytest.raises(ValueError, match="'a' has limits that cannot be"):
        Normalizer.from_arrays(arrays)
