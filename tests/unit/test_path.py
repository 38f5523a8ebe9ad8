from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from cmpolicy.flow.path import PATHS, LinearPath, TrigonometricPath, expand_time, get_path

NAMES = sorted(PATHS)


def _points(*shape: int) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    x, z = torch.randn(2, 5, *shape, generator=generator, dtype=torch.float64)
    return x, z, torch.rand(5, generator=generator, dtype=torch.float64)


def test_expand_time() -> None:
    t = torch.rand(5)
    assert expand_time(t, torch.zeros(5, 16, 2)).shape == (5, 1, 1)
    assert torch.equal(expand_time(t, t), t)


@pytest.mark.parametrize("name", NAMES)
def test_ends_are_data_and_noise(name: str) -> None:
    x, z, _ = _points(16, 2)
    zero = torch.zeros(5, dtype=torch.float64)
    torch.testing.assert_close(PATHS[name].sample(x, z, zero).x_t, x, rtol=0, atol=1e-15)
    torch.testing.assert_close(PATHS[name].sample(x, z, zero + 1).x_t, z, rtol=0, atol=1e-15)


@pytest.mark.parametrize("name", NAMES)
def test_velocity_is_the_derivative_by_flow_time(name: str) -> None:
    x, z, t = _points(16, 2)
    path, h = PATHS[name], 1e-5
    ahead = path.sample(x, z, t + h / path.rate).x_t
    behind = path.sample(x, z, t - h / path.rate).x_t
    velocity = path.sample(x, z, t).velocity
    torch.testing.assert_close((ahead - behind) / (2 * h), velocity, rtol=0, atol=1e-9)


@pytest.mark.parametrize("name", NAMES)
def test_jump_along_one_line(name: str) -> None:
    """With F = v the jump from t lands on the same line's point at s: v knows both ends."""
    x, z, t = _points(3)
    s = t * 0.4
    path = PATHS[name]
    start, end = path.sample(x, z, t), path.sample(x, z, s)
    torch.testing.assert_close(path.jump(start.x_t, start.velocity, t, s), end.x_t)


@pytest.mark.parametrize("name", NAMES)
def test_no_jump_is_the_identity(name: str) -> None:
    x, z, t = _points(16, 2)
    assert torch.equal(PATHS[name].jump(x, z, t, t), x)


def test_residuals_by_hand() -> None:
    f, u, d, x = (torch.tensor([[v]], dtype=torch.float64) for v in (0.3, -0.7, 1.1, 0.9))
    t, s = torch.tensor([0.8]).double(), torch.tensor([0.3]).double()
    assert LinearPath().residual(f, u, d, x, t, s).item() == pytest.approx(-0.7 - 0.5 * 1.1 - 0.3)
    delta = 0.5 * math.pi / 2
    expected = math.cos(delta) * (-0.7 - 0.3) - math.sin(delta) * (0.9 + 1.1)
    assert TrigonometricPath().residual(f, u, d, x, t, s).item() == pytest.approx(expected)


@pytest.mark.parametrize("name", NAMES)
def test_residual_is_finite_over_the_whole_square(name: str) -> None:
    """Also for the jump from pure noise to data, where tan(d) would be infinite."""
    grid = torch.linspace(0, 1, 11)
    t, s = torch.meshgrid(grid, grid, indexing="ij")
    t, s = torch.maximum(t, s).flatten(), torch.minimum(t, s).flatten()
    f, u, d, x = torch.randn(4, len(t), 2, generator=torch.Generator().manual_seed(0))
    residual = PATHS[name].residual(f, u, d, x, t, s)
    assert residual.abs().max() < 100


def test_unknown_path() -> None:
    assert get_path("linear") == LinearPath()
    with pytest.raises(ValueError, match=r"'cosine'.*\['linear', 'trigonometric'\]"):
        get_path("cosine")
