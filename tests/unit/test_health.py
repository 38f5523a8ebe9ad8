from __future__ import annotations

import math
from functools import partial

import pytest
import torch
from torch import Tensor

from cmpolicy.flow.flow_map import FlowMap
from cmpolicy.flow.health import flow_health
from cmpolicy.flow.path import PATHS


def _zero(x: Tensor, t: Tensor, s: Tensor, features: Tensor | None) -> Tensor:
    return torch.zeros_like(x)


@pytest.mark.parametrize("path", sorted(PATHS))
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_fresh_network_has_finite_health(path: str, dtype: torch.dtype) -> None:
    """F = 0 everywhere: nothing to divide by in the network, so nothing is divided by it."""
    x = torch.rand(32, 16, 2, generator=torch.Generator().manual_seed(0), dtype=dtype)
    health = flow_health(FlowMap(_zero, PATHS[path]), x, None, torch.Generator().manual_seed(1))
    assert 0 <= health.semigroup < 10
    assert 0 <= health.tangent < 10
    assert math.isfinite(health.variance_ratio)


def test_reproducible_and_without_gradient() -> None:
    net = torch.nn.Linear(4, 4)
    flow_map = FlowMap(lambda x, t, s, features: net(x), PATHS["linear"])
    x, features = torch.randn(2, 16, 4)
    first, again = (
        flow_health(flow_map, x, features, torch.Generator().manual_seed(1)) for _ in range(2)
    )
    assert first == again
    assert not first.tangent.requires_grad


def test_variance_is_within_one_condition() -> None:
    """A map that answers each condition with one sample has no variance, however they differ."""

    def to_cond(x: Tensor, t: Tensor, s: Tensor, features: Tensor | None) -> Tensor:
        assert features is not None
        return (x - features) / t[:, None]

    x = torch.randn(64, 2, generator=torch.Generator().manual_seed(0))
    health = flow_health(FlowMap(to_cond, PATHS["linear"]), x, x, torch.Generator().manual_seed(1))
    assert health.variance_ratio < 1e-6


@pytest.mark.parametrize("n", [1, 8])
def test_constant_data_does_not_divide_by_zero(n: int) -> None:
    x = torch.full((n, 2), 0.3)
    health = flow_health(FlowMap(_zero, PATHS["linear"]), x, None, torch.Generator().manual_seed(1))
    assert math.isfinite(health.variance_ratio)


def test_diagonal_sampler_is_given_steps() -> None:
    """One Euler step gives the mean of the data; a velocity is judged over several."""
    asked = []

    def net(x: Tensor, t: Tensor, s: Tensor, features: Tensor | None) -> Tensor:
        asked.append(t[0].item())
        return torch.zeros_like(x)

    flow_map = FlowMap(net, PATHS["linear"])
    flow_health(flow_map, torch.randn(4, 2), None, kind="diagonal")
    diagonal, before = len(asked), asked.clear()
    flow_health(flow_map, torch.randn(4, 2), None, kind="flow_map")
    assert before is None
    assert diagonal - len(asked) == 9


def test_the_map_is_compared_with_its_own_flow() -> None:
    """F = x / t is the velocity of data at 0: one exact jump. Off by half, it is not."""

    def net(factor: float, x: Tensor, t: Tensor, s: Tensor, features: Tensor | None) -> Tensor:
        wrong = torch.where(s < t, factor, 1.0)
        return wrong[:, None] * x / t[:, None]

    x = 0.5 * torch.randn(64, 2, generator=torch.Generator().manual_seed(0))
    errors = []
    for factor in (1.0, 1.5):
        health = flow_health(FlowMap(partial(net, factor), PATHS["linear"]), x, None)
        errors.append(float(health.map_error))
        assert math.isfinite(health.tangent_at_1)
    assert errors[0] < 0.01 < errors[1]
