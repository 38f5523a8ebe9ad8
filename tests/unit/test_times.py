from __future__ import annotations

import math

import pytest
import torch

from cmpolicy.flow.times import TimeLaw, adaptive_weight

CPU = torch.device("cpu")


def _kolmogorov(samples: torch.Tensor, cdf: torch.Tensor) -> float:
    """sup |empirical - true| over sorted samples, for the law's values there."""
    n = len(samples)
    steps = torch.arange(n + 1, dtype=torch.float64) / n
    return float(torch.maximum((steps[1:] - cdf).abs(), (steps[:-1] - cdf).abs()).max())


@pytest.mark.parametrize(("a", "b"), [(1.0, 1.0), (0.8, 1.0), (2.0, 1.0), (1.0, 3.0)])
def test_law(a: float, b: float) -> None:
    """Kolmogorov-Smirnov against the closed distribution function, level 0.1 %."""
    n = 20_000
    t = TimeLaw(a, b).draw(n, torch.Generator().manual_seed(0), CPU).double().sort().values
    assert t.min() >= 0
    assert t.max() <= 1
    cdf = t**a if b == 1 else 1 - (1 - t) ** b
    assert _kolmogorov(t, cdf) < 1.95 / math.sqrt(n)


def test_moments_of_a_law_without_closed_distribution() -> None:
    a, b, n = 2.5, 1.5, 50_000
    t = TimeLaw(a, b).draw(n, torch.Generator().manual_seed(0), CPU).double()
    variance = a * b / ((a + b) ** 2 * (a + b + 1))
    assert t.mean().item() == pytest.approx(a / (a + b), abs=4 * math.sqrt(variance / n))
    assert t.var().item() == pytest.approx(variance, rel=0.03)


@pytest.mark.parametrize(("a", "b"), [(0.8, 1.0), (0.05, 0.05), (2.0, 5.0)])
def test_draws_are_finite_and_reproducible(a: float, b: float) -> None:
    first, again = (
        TimeLaw(a, b).draw(1000, torch.Generator().manual_seed(3), CPU) for _ in range(2)
    )
    assert torch.equal(first, again)
    assert torch.isfinite(first).all()
    assert first.dtype == torch.float32
    other = TimeLaw(a, b).draw(1000, torch.Generator().manual_seed(4), CPU)
    assert not torch.equal(first, other)


@pytest.mark.parametrize(("a", "b"), [(0.0, 1.0), (1.0, -1.0), (math.nan, 1.0)])
def test_no_law(a: float, b: float) -> None:
    with pytest.raises(ValueError, match=r"Beta\(.*positive"):
        TimeLaw(a, b)


def test_adaptive_weight() -> None:
    loss = torch.tensor([0.0, 0.5, 20.0], dtype=torch.float64, requires_grad=True)
    for power in (0.5, 1.0):
        weighted = adaptive_weight(loss, power)
        (gradient,) = torch.autograd.grad(weighted.sum(), loss)
        weight = (loss.detach() + 0.01) ** -power
        torch.testing.assert_close(weighted, loss * weight)
        torch.testing.assert_close(gradient, weight)  # the weight itself is a constant
    assert adaptive_weight(loss, 0.0) is loss
