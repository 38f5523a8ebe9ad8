from __future__ import annotations

import json
import re
from typing import Any, cast

import pytest
import torch
from torch import Tensor

from cmpolicy.cli.train import compose
from cmpolicy.nn.embeddings import MAX_FREQUENCY_DELTA, MAX_FREQUENCY_T, TwoTimeEmbedding
from cmpolicy.nn.registry import net_config, to_mapping
from cmpolicy.nn.unet1d import UNet1D, UNet1DConfig
from cmpolicy.policy.bundle import FORMAT_VERSION
from cmpolicy.spec import PolicySpec

TINY = UNet1DConfig((16, 32, 64), kernel_size=3, n_groups=4, time_dim=16)


def _net(config: UNet1DConfig = TINY, *, action_dim: int = 2, seed: int = 0) -> UNet1D:
    """A network whose last layer is not zero, as after some training."""
    torch.manual_seed(seed)
    net = UNet1D(config, action_dim=action_dim, feature_dim=6)
    torch.nn.init.normal_(net.head[-1].weight, std=0.1)  # type: ignore[arg-type]
    return net


def _inputs(batch: int = 3, horizon: int = 16, action_dim: int = 2) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(batch, horizon, action_dim, generator=generator)
    times = torch.rand(2, batch, generator=generator)
    return x, times.amax(0), times.amin(0), torch.randn(batch, 6, generator=generator)


@pytest.mark.parametrize(
    ("size", "low", "high"),
    [
        ("tiny", 0.8e6, 1.5e6),
        ("small", 3.5e6, 4.19e6),
        ("base", 15e6, 18e6),
        ("large", 63e6, 68e6),
    ],
)
def test_sizes(size: str, low: float, high: float) -> None:
    """``net=<size>``; small fits a bundled policy: 8 MB in half precision."""
    config = compose(f"net={size}")
    with torch.device("meta"):  # shapes alone: nothing is allocated
        first = config.encoder.build(PolicySpec({"state": (20,)}, 2, 16, 2, 8))
        net = config.net.build(action_dim=2, feature_dim=cast(Any, first).feature_dim)
    count = sum(p.numel() for module in (net, first) for p in module.parameters())
    assert low <= count <= high
    assert size != "small" or 2 * count < 8e6


@pytest.mark.parametrize("horizon", [4, 8, 12, 16, 20, 64])
@pytest.mark.parametrize("action_dim", [1, 7])
def test_any_horizon_that_the_depth_divides(horizon: int, action_dim: int) -> None:
    x, t, s, obs = _inputs(horizon=horizon, action_dim=action_dim)
    assert _net(action_dim=action_dim)(x, t, s, obs).shape == x.shape


@pytest.mark.parametrize("levels", [1, 2, 3, 4])
def test_depths(levels: int) -> None:
    config = UNet1DConfig((16,) * levels, kernel_size=3, n_groups=4, time_dim=16)
    x, t, s, obs = _inputs(horizon=8)
    assert _net(config)(x, t, s, obs).shape == x.shape


@pytest.mark.parametrize(
    ("horizon", "words"),
    [
        (10, ["horizon=10", "divisible by 4", "3 levels", "horizon=8 or 12"]),
        (3, ["horizon=3", "divisible by 4", "horizon=4, or fewer"]),
    ],
)
def test_horizon_that_it_does_not_divide(horizon: int, words: list[str]) -> None:
    x, t, s, obs = _inputs(horizon=horizon)
    with pytest.raises(ValueError, match=words[0]) as caught:
        _net()(x, t, s, obs)
    for word in words:
        assert word in str(caught.value)


def test_observation_is_required() -> None:
    x, t, s, _ = _inputs()
    with pytest.raises(ValueError, match=r"needs the features.*None"):
        _net()(x, t, s, None)


def test_fresh_network_is_zero() -> None:
    net = UNet1D(TINY, action_dim=2, feature_dim=6)
    assert not net(*_inputs()).any()


def test_gradient_reaches_every_parameter() -> None:
    net = _net()
    net(*_inputs()).square().mean().backward()
    for name, parameter in net.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.any(), name


def test_every_input_matters() -> None:
    net, (x, t, s, obs) = _net(), _inputs()
    f = net(x, t, s, obs)
    for changed in (
        net(x + 0.1, t, s, obs),
        net(x, t * 0.9, s * 0.9, obs),
        net(x, t, s * 0.5, obs),
        net(x, t, s, obs + 0.1),
    ):
        assert not torch.allclose(changed, f)


def test_samples_are_independent() -> None:
    net, (x, t, s, obs) = _net().double(), _inputs()
    x, t, s, obs = x.double(), t.double(), s.double(), obs.double()
    whole = net(x, t, s, obs)
    for i in range(len(x)):
        one = slice(i, i + 1)
        torch.testing.assert_close(net(x[one], t[one], s[one], obs[one]), whole[one])


def test_double_precision_throughout() -> None:
    """No operation falls back to single precision: a step of 1e-9 is resolved."""
    net, (x, t, s, obs) = _net().double(), (v.double() for v in _inputs())
    f = net(x, t, s, obs)
    assert f.dtype == torch.float64
    h = 1e-9
    change = (net(x, t + h, s, obs) - net(x, t - h, s, obs)) / (2 * h)
    coarse = (net(x, t + 1e-4, s, obs) - net(x, t - 1e-4, s, obs)) / 2e-4
    torch.testing.assert_close(change, coarse, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("batch", [1, 5])
def test_inference_gives_the_numbers_of_training(batch: int) -> None:
    """At small batch inference computes the convolutions in another way."""
    net, inputs = _net(), _inputs(batch)
    expected = net(*inputs)
    with torch.inference_mode():
        found = net(*inputs)
    torch.testing.assert_close(found, expected.detach(), rtol=1e-5, atol=1e-6)


def test_layout_for_inference_keeps_the_numbers() -> None:
    net, inputs = _net(), _inputs()
    expected, state = net(*inputs), {k: v.clone() for k, v in net.state_dict().items()}
    net.lay_out_for_inference()
    torch.testing.assert_close(net(*inputs), expected, rtol=1e-5, atol=1e-6)
    assert all(torch.equal(value, state[key]) for key, value in net.state_dict().items())
    # and it can be trained as before: gradient and optimizer state take the layout of the weight
    weights = []
    for laid_out in (True, False):
        net = _net()
        if laid_out:
            net.lay_out_for_inference()
        net(*inputs).square().mean().backward()
        torch.optim.AdamW(net.parameters(), lr=0.1, eps=1e-3, fused=True).step()
        weights.append(net.film.get_parameter("1.weight"))
    torch.testing.assert_close(weights[0], weights[1], rtol=0, atol=1e-4)


def test_config_round_trip() -> None:
    data = json.loads(json.dumps(to_mapping(TINY)))
    assert data["kind"] == "unet1d"
    assert net_config(data) == TINY
    assert net_config(TINY) is TINY


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"down_dims": ()}, ["down_dims is empty"]),
        ({"down_dims": (64, 100)}, ["[64, 100]", "100 is not a multiple of n_groups=8"]),
        ({"kernel_size": 4}, ["kernel_size=4", "odd"]),
        ({"kernel_size": -1}, ["kernel_size", "at least 1", "-1"]),
        ({"n_groups": 0}, ["n_groups", "at least 1", "0"]),
        ({"time_dim": 6}, ["time_dim=6", "multiple of 4"]),
        ({"time_dim": 10.5}, ["net.time_dim", "whole number", "10.5"]),
        ({"width": 3}, ["unknown setting 'net.width'", "net.down_dims"]),
    ],
)
def test_impossible_configs(changes: dict[str, Any], words: list[str]) -> None:
    with pytest.raises(ValueError, match=re.escape(words[0])) as caught:
        net_config({"kind": "unet1d", **changes})
    for word in words:
        assert word in str(caught.value)


# -- time embedding -------------------------------------------------------------------------------


def _features(t: Tensor, s: Tensor, dim: int = 64) -> Tensor:
    """Those of t and those of t - s, (2, B, dim / 2), before the MLP."""
    embedding = TwoTimeEmbedding(dim).double()
    embedding.mlp = torch.nn.Identity()
    return embedding(t, s).unflatten(1, (2, dim // 2)).transpose(0, 1)


def test_time_features_are_smooth() -> None:
    """They change by at most w per unit of time, so a difference of step 0.02 resolves them."""
    t = torch.linspace(0, 1, 2001, dtype=torch.float64)
    for features, highest in zip(
        _features(t, torch.zeros_like(t)), (MAX_FREQUENCY_T, MAX_FREQUENCY_DELTA), strict=True
    ):
        slope = (features.diff(dim=0) / t.diff()[:, None]).abs().max().item()
        assert 0.9 * highest * torch.pi / 2 < slope <= highest * torch.pi / 2
        assert slope * 0.02 < 0.6


def test_time_features_tell_times_apart() -> None:
    grid = torch.linspace(0, 1, 101, dtype=torch.float64)
    for features in _features(grid, torch.zeros_like(grid)):
        distance = torch.cdist(features, features)
        distance.fill_diagonal_(1.0)
        assert distance.min() > 0.02


def test_diagonal_is_one_constant() -> None:
    """Where s = t, the half that knows t - s is the same for every t."""
    t = torch.tensor([0.1, 0.7], dtype=torch.float64)
    of_t, of_delta = _features(t, t)
    assert torch.equal(of_delta[0], of_delta[1])
    assert not torch.allclose(of_t[0], of_t[1])


def test_frequencies_are_part_of_the_bundle_format() -> None:
    """Bundles do not store them: whoever changes one raises FORMAT_VERSION, or old bundles lie."""
    quarter_turns = TwoTimeEmbedding(16).frequencies / (torch.pi / 2)
    expected = [[0.5, 1.5874, 5.0397, 16.0], [0.5, 1.0, 2.0, 4.0]]
    torch.testing.assert_close(quarter_turns, torch.tensor(expected), rtol=1e-4, atol=0)
    assert FORMAT_VERSION == 2
