"""A Gaussian mixture: closed-form velocity, flow map by a fourth-order solver, in float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from cmpolicy.flow.flow_map import FlowMap, derivative_difference
from cmpolicy.flow.path import PATHS
from cmpolicy.flow.sampler import sample

PATH_NAMES = ["linear", "trigonometric"]


@pytest.mark.parametrize("path", PATH_NAMES)
def test_reference_map_keeps_the_distribution(path: str, mixture_flow: Any) -> None:
    """In one dimension a flow keeps quantiles: CDF_s(X_{t->s}(x)) = CDF_t(x)."""
    net = mixture_flow(path, means=[[-1.0], [0.3], [1.5]], std=0.3)
    x = torch.linspace(-2.0, 2.0, 21, dtype=torch.float64)[:, None]
    t = torch.full((21,), 0.9, dtype=torch.float64)
    s = torch.full((21,), 0.1, dtype=torch.float64)
    moved = net.map(x, t, s)
    torch.testing.assert_close(net.cdf(moved, s), net.cdf(x, t), rtol=0, atol=1e-7)


@pytest.mark.parametrize("path", PATH_NAMES)
def test_residual_of_the_reference_map(path: str, mixture_flow: Any) -> None:
    """The finite-difference residual vanishes with the square of the step on a curved 2-D flow."""
    net = mixture_flow(path, means=[[-1.0, 0.5], [1.0, 0.8], [0.2, -1.2]], std=0.5)
    flow_map = FlowMap(net, PATHS[path])
    generator = torch.Generator().manual_seed(3)
    n = 64
    t = 0.35 + 0.6 * torch.rand(n, generator=generator, dtype=torch.float64)
    s = 0.3 * torch.rand(n, generator=generator, dtype=torch.float64)
    x = torch.randn(n, 2, generator=generator, dtype=torch.float64)
    u = flow_map.velocity(x, t)
    f = net(x, t, s)
    residuals = []
    for epsilon in (0.01, 0.005):
        d = derivative_difference(flow_map, x, t, s, None, u, epsilon)
        residual = flow_map.path.residual(f, u, d, x, t, s)
        residuals.append(residual.square().mean().sqrt() / u.square().mean().sqrt())
    assert residuals[1] < 2e-3
    assert residuals[0] / residuals[1] == pytest.approx(4.0, rel=0.1)


@pytest.mark.parametrize("path", PATH_NAMES)
def test_one_step_of_the_flow_map_is_many_of_the_diagonal(path: str, mixture_flow: Any) -> None:
    net = mixture_flow(path, means=[[-1.0, 0.5], [1.0, 0.8]], std=0.5)
    flow_map = FlowMap(net, PATHS[path])
    z = torch.randn(32, 2, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    one = sample(flow_map, z, nfe=1)
    many = sample(flow_map, z, nfe=1000, kind="diagonal")
    torch.testing.assert_close(many, one, rtol=0, atol=1e-2)
