"""The ground truth of the stability study."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.integrate import quad
from scipy.special import ndtr

from cmpolicy.schema import ConfigError
from cmpolicy.study.targets import TARGETS, Boxes, Gaussian, Mixture, get_target
from cmpolicy.study.truth import flow, make_truth

RNG = np.random.default_rng(0)


def _points(name: str, n: int = 64) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    target = get_target(name)
    times = np.sort(RNG.uniform(0.05, 1, size=(n, 3)), axis=1)
    x = target.sample(n, RNG)
    x_t = (1 - times[:, 2:]) * x + times[:, 2:] * RNG.normal(size=x.shape)
    return x_t, times[:, 2].copy(), times[:, 0].copy()


def test_solver_agrees_with_the_closed_form() -> None:
    """A Gaussian by the solver (as a mixture of one) against its own formula, to 1e-8."""
    closed = TARGETS["gaussian2"]
    assert isinstance(closed, Gaussian)
    x, t, s = _points("gaussian2")
    solved = flow(Mixture(closed.means, closed.width), x, t, s)
    np.testing.assert_allclose(solved, closed.flow(x, t, s), atol=1e-8)


@pytest.mark.parametrize("name", ["mixture1", "checkerboard1"])
def test_in_one_dimension_the_flow_keeps_quantiles(name: str) -> None:
    """X_{1->0}(z) lies where the data's distribution function is the normal's at z."""
    target = TARGETS[name]
    z = np.linspace(-2, 2, 33)[:, None]
    one = np.ones(len(z))
    end = flow(target, z, one, 0 * one)
    if isinstance(target, Mixture):
        found = np.mean([ndtr((end - m[0]) / target.width) for m in target.means], axis=0)
    else:
        assert isinstance(target, Boxes)
        found = np.mean([np.clip((end - c[0]) / target.side, 0, 1) for c in target.corners], axis=0)
    np.testing.assert_allclose(found, ndtr(z), atol=2e-8)


@pytest.mark.parametrize("name", ["gaussian1", "mixture2", "checkerboard2"])
def test_flow_composes(name: str) -> None:
    x, t, s = _points(name, 32)
    m = (s + t) / 2
    target = TARGETS[name]
    once, twice = flow(target, x, t, s), flow(target, flow(target, x, t, m), m, s)
    np.testing.assert_allclose(twice, once, atol=1e-7)
    np.testing.assert_allclose(flow(target, x, t, t), x, atol=1e-12)


@pytest.mark.parametrize("name", ["gaussian2", "mixture1", "mixture2"])
def test_velocity_is_that_of_the_score(name: str) -> None:
    """u = -(x + t score) / (1 - t), with the score of p_t by automatic differentiation."""
    target = TARGETS[name]
    assert isinstance(target, Mixture)
    x, t, _ = _points(name)
    t = t * 0.9
    point, time = torch.tensor(x, requires_grad=True), torch.tensor(t)[:, None]
    variance = (1 - time) ** 2 * target.width**2 + time**2
    means = torch.tensor(target.means, dtype=torch.float64)
    logits = -0.5 * (point[:, None] - (1 - time[..., None]) * means).square().sum(-1) / variance
    (score,) = torch.autograd.grad(logits.logsumexp(1).sum(), point)
    by_score = -(x + t[:, None] * score.numpy()) / (1 - t[:, None])
    np.testing.assert_allclose(target.velocity(x, t), by_score, atol=1e-10)


@pytest.mark.parametrize("t", [0.02, 0.3, 0.5, 0.500001, 0.8, 0.999, 1.0])
def test_velocity_of_boxes_is_a_quotient_of_integrals(t: float) -> None:
    """Both ways to integrate over a box, at the seam between them and near both ends."""
    target = TARGETS["checkerboard1"]
    assert isinstance(target, Boxes)
    for x in (-0.9, -0.3, 0.1, 0.8, 1.3):

        def weight(x0: float, x: float = x) -> float:
            return float(np.exp(-0.5 * ((x - (1 - t) * x0) / t) ** 2))

        ends = [(c[0], c[0] + target.side) for c in target.corners]
        near = [min(max(x / max(1 - t, 1e-9), a), b) for a, b in ends]
        mass, first = (
            sum(
                quad(f, a, b, points=[p], epsabs=0, epsrel=1e-12)[0]
                for (a, b), p in zip(ends, near, strict=True)
            )
            for f in (weight, lambda x0: x0 * weight(x0))
        )
        if mass < 1e-200:  # nothing of the data is near, and the integral is lost
            continue
        found = target.velocity(np.array([[x]]), np.array([t]))
        np.testing.assert_allclose(found[0, 0], (x - first / mass) / t, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("name", sorted(TARGETS))
def test_velocity_is_the_mean_of_the_conditional_one(name: str) -> None:
    """Monte Carlo: against any function of x_t, v averages as u does."""
    target, n = TARGETS[name], 200_000
    rng = np.random.default_rng(1)
    x, z, t = target.sample(n, rng), rng.normal(size=(n, target.dim)), rng.uniform(0.05, 1, n)
    x_t = (1 - t)[:, None] * x + t[:, None] * z
    off = (z - x) - target.velocity(x_t, t)
    for test in (np.ones_like(x_t), np.tanh(x_t), np.cos(3 * x_t) * t[:, None]):
        assert abs((off * test).mean()) < 5 * (off * test).std() / np.sqrt(n * target.dim)


def test_truth_is_the_same_every_time_and_ends_on_the_data() -> None:
    one, again = make_truth("checkerboard2", 128), make_truth("checkerboard2", 128)
    np.testing.assert_array_equal(one.end, again.end)
    cells = np.floor((one.end + 1) / 0.5 + 1e-6 * np.sign(-one.end))
    assert (np.abs(one.end) < 1 + 1e-4).all()
    assert (cells.sum(axis=1) % 2 == 0).mean() > 0.98  # the rest lies on edges, to rounding
    assert (one.s <= one.t).all()


def test_unknown_target() -> None:
    with pytest.raises(ConfigError, match="checkerboard2"):
        get_target("checkerbord2")
