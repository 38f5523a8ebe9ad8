from __future__ import annotations

import pytest
import torch
from torch import Tensor

from cmpolicy.flow.flow_map import FlowMap, derivative_difference, derivative_jvp
from cmpolicy.flow.path import PATHS
from cmpolicy.nn.unet1d import UNet1D, UNet1DConfig

Points = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]


def _unet(dtype: torch.dtype = torch.float64) -> UNet1D:
    torch.manual_seed(0)
    net = UNet1D(UNet1DConfig((16, 32), 3, 4, 16), action_dim=2, feature_dim=6).to(dtype)
    torch.nn.init.normal_(net.head[-1].weight)  # type: ignore[arg-type]
    return net


def _points(dtype: torch.dtype = torch.float64) -> Points:
    """x, t, s, features, u; times far enough from the ends for a central difference."""
    generator = torch.Generator().manual_seed(1)
    x, u = torch.randn(2, 6, 8, 2, generator=generator, dtype=dtype)
    features = torch.randn(6, 6, generator=generator, dtype=dtype)
    t = 0.5 + 0.45 * torch.rand(6, generator=generator, dtype=dtype)
    return x, t, t * 0.5, features, u


@pytest.mark.parametrize("path", sorted(PATHS))
def test_both_derivatives_agree_on_the_unet(path: str) -> None:
    flow_map = FlowMap(_unet(), PATHS[path])
    x, t, s, features, u = _points()
    exact = derivative_jvp(flow_map, x, t, s, features, u)
    errors = []
    for epsilon in (2e-3, 1e-3):
        found = derivative_difference(flow_map, x, t, s, features, u, epsilon)
        errors.append(((found - exact).square().mean() / exact.square().mean()).sqrt().item())
    assert errors[1] < 1e-3
    assert errors[0] / errors[1] == pytest.approx(4.0, rel=0.1)


@pytest.mark.parametrize("derivative", [derivative_jvp, derivative_difference])
def test_derivative_keeps_no_gradient(derivative: object) -> None:
    flow_map = FlowMap(_unet(), PATHS["linear"])
    x, t, s, features, u = _points()
    found = derivative(flow_map, x, t, s, features, u.requires_grad_())  # type: ignore[operator]
    assert not found.requires_grad


def test_difference_leaves_autocast() -> None:
    """In bfloat16 the two points are one; the difference is taken in full precision instead."""
    flow_map = FlowMap(_unet(torch.float32), PATHS["linear"])
    x, t, s, features, u = _points(torch.float32)
    expected = derivative_difference(flow_map, x, t, s, features, u)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(derivative_difference(flow_map, x, t, s, features, u), expected)
        assert flow_map.velocity(x, t, features).dtype == torch.float32
        assert flow_map(x, t, s, features).dtype == torch.float32


def test_difference_at_the_corner_is_finite() -> None:
    """t = s = 1: no interval to differentiate over, and (t - s) D is 0 whatever D is."""
    flow_map = FlowMap(_unet(), PATHS["linear"])
    x, t, _, features, u = _points()
    one = torch.ones_like(t)
    found = derivative_difference(flow_map, x, one, one, features, u)
    assert torch.isfinite(found).all()


def test_any_callable_is_a_network() -> None:
    flow_map = FlowMap(lambda x, t, s, features: 2 * x, PATHS["linear"])
    x, t, s, _, u = _points()
    shape = (6, 1, 1)
    torch.testing.assert_close(flow_map(x, t, s), x * (1 - 2 * (t - s).reshape(shape)))
    torch.testing.assert_close(derivative_jvp(flow_map, x, t, s, None, u), 2 * u)
    torch.testing.assert_close(derivative_difference(flow_map, x, t, s, None, u), 2 * u)
    assert not list(flow_map.parameters())
