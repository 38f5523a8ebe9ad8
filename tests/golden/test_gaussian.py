"""The identities of a flow map, in float64, on the flow of a Gaussian: both paths."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from cmpolicy.flow.flow_map import FlowMap, derivative_difference, derivative_jvp
from cmpolicy.flow.health import flow_health
from cmpolicy.flow.objectives import Draws, build_objective
from cmpolicy.flow.path import PATHS
from cmpolicy.flow.sampler import sample


def _residual(case: Any, derivative: Tensor) -> Tensor:
    u = case.net.velocity(case.x_t, case.t, case.features)
    f = case.net(case.x_t, case.t, case.s, case.features)
    residual: Tensor = case.flow_map.path.residual(f, u, derivative, case.x_t, case.t, case.s)
    return residual


def _tangent(case: Any) -> Tensor:
    tangent: Tensor = case.net.velocity(case.x_t, case.t, case.features)
    return tangent


def test_flow_map_is_the_closed_form(gaussian: Any) -> None:
    jumped = gaussian.flow_map(gaussian.x_t, gaussian.t, gaussian.s, gaussian.features)
    expected = gaussian.net.map(gaussian.x_t, gaussian.t, gaussian.s, gaussian.features)
    torch.testing.assert_close(jumped, expected, rtol=0, atol=1e-12)


def test_tangent_condition(gaussian: Any) -> None:
    """F(x, t, t) = u(x, t)."""
    found = gaussian.flow_map.velocity(gaussian.x_t, gaussian.t, gaussian.features)
    torch.testing.assert_close(found, _tangent(gaussian), rtol=0, atol=1e-12)


def test_velocity_is_the_derivative_of_the_map(gaussian: Any) -> None:
    """d X_{t->s} / d tau_s at s = t is u: the closed forms agree with each other."""
    h = 1e-5
    step = h / gaussian.flow_map.path.rate  # of the network's t, for a step h of flow time
    ahead = gaussian.net.map(gaussian.x_t, gaussian.t, gaussian.t + step, gaussian.features)
    behind = gaussian.net.map(gaussian.x_t, gaussian.t, gaussian.t - step, gaussian.features)
    torch.testing.assert_close((ahead - behind) / (2 * h), _tangent(gaussian), rtol=0, atol=1e-8)


def test_identity_where_s_is_t(gaussian: Any) -> None:
    jumped = gaussian.flow_map(gaussian.x_t, gaussian.t, gaussian.t, gaussian.features)
    assert torch.equal(jumped, gaussian.x_t)


def test_composition(gaussian: Any) -> None:
    """X_{m->s} o X_{t->m} = X_{t->s}."""
    m = (gaussian.t + gaussian.s) / 2
    jump = gaussian.flow_map
    halfway = jump(gaussian.x_t, gaussian.t, m, gaussian.features)
    composed = jump(halfway, m, gaussian.s, gaussian.features)
    direct = jump(gaussian.x_t, gaussian.t, gaussian.s, gaussian.features)
    torch.testing.assert_close(composed, direct, rtol=0, atol=1e-12)


def test_eulerian_residual_is_zero_with_jvp(gaussian: Any) -> None:
    d = derivative_jvp(
        gaussian.flow_map,
        gaussian.x_t,
        gaussian.t,
        gaussian.s,
        gaussian.features,
        _tangent(gaussian),
    )
    assert _residual(gaussian, d).abs().max() < 1e-11
    assert not d.requires_grad


def test_difference_is_of_second_order(gaussian: Any) -> None:
    """Halving the step divides the error by four, and the residual with it."""
    points = (gaussian.x_t, gaussian.t, gaussian.s, gaussian.features, _tangent(gaussian))
    exact = derivative_jvp(gaussian.flow_map, *points)
    differences = [
        derivative_difference(gaussian.flow_map, *points, epsilon) for epsilon in (0.01, 0.005)
    ]
    coarse, fine = ((d - exact).square().mean().sqrt() for d in differences)
    assert coarse / fine == pytest.approx(4.0, rel=0.02)
    assert fine < 1e-3
    assert _residual(gaussian, differences[1]).abs().max() < 5e-3


def test_difference_stays_inside_the_interval(gaussian: Any) -> None:
    """Near t = s the difference is one-sided, no time below s is asked for; t = 1 may be passed."""
    asked: list[tuple[Tensor, Tensor]] = []

    def net(x: Tensor, t: Tensor, s: Tensor, features: Tensor | None) -> Tensor:
        asked.append((t, s))
        f: Tensor = gaussian.net(x, t, s, features)
        return f

    t = torch.tensor([1.0, 0.999, 0.5, 0.3, 1.0], dtype=torch.float64)
    s = torch.tensor([0.2, 0.1, 0.4999, 0.3, 1.0], dtype=torch.float64)
    x, features = gaussian.x_t[:5], gaussian.features[:5]
    flow_map = FlowMap(net, gaussian.flow_map.path)
    u = gaussian.net.velocity(x, t, features)
    found = derivative_difference(flow_map, x, t, s, features, u)
    ((asked_t, asked_s),) = asked
    assert asked_t.max() > 1
    assert (asked_t >= asked_s).all()
    exact = derivative_jvp(gaussian.flow_map, x, t, s, features, u)
    assert torch.isfinite(found).all()
    torch.testing.assert_close(found[:4], exact[:4], rtol=0.02, atol=0.05)  # first order


@pytest.mark.parametrize("derivative", ["jvp", "difference"])
def test_time_floor_is_a_straight_flow_below_it(gaussian: Any, derivative: str) -> None:
    """The map to the floor followed by one step along the velocity there has L_sd = 0."""
    floor, net, path = 0.3, gaussian.net, gaussian.flow_map.path

    def straight(x: Tensor, t: Tensor, s: Tensor, features: Tensor | None) -> Tensor:
        above, at = t.clamp(min=floor), torch.full_like(t, floor)
        reached = net.map(x, above, at, features)  # where the flow from t is at the floor
        end = path.jump(reached, net.velocity(reached, at, features), at, torch.minimum(s, at))
        if path.rate == 1.0:
            jump = (x - end) / (t - s)[:, None]
        else:
            delta = ((t - s) * path.rate)[:, None]
            jump = (torch.cos(delta) * x - end) / torch.sin(delta)
        inside = torch.where((s < floor)[:, None], jump, net(x, t, s, features))
        at_most = (t <= floor) | (t == s)
        return torch.where(at_most[:, None], net.velocity(x, t, features), inside)

    x, z = gaussian.net.center(gaussian.features) + 0.1, torch.randn(256, 2, dtype=torch.float64)
    x = x.expand(256, 2)
    s = torch.where(gaussian.t > floor, gaussian.s * 0.0, gaussian.s)  # ends at 0, or starts below
    settings: dict[str, Any] = {"derivative": derivative, "epsilon": 1e-4, "sd_share": 1.0}
    flow_map, draws = FlowMap(straight, path), Draws(z, gaussian.t, s)
    metrics = [
        build_objective("isd", sd_begin=0.0, time_floor=value, **settings)(
            flow_map, x, gaussian.features, draws
        ).metrics["loss_sd"]
        for value in (floor, 0.0)
    ]
    assert metrics[0] < (1e-20 if derivative == "jvp" else 1e-7)
    assert metrics[1] > 1e-4  # the exact flow is another one


@pytest.mark.parametrize("derivative", ["jvp", "difference"])
def test_self_distillation_has_no_gradient_at_the_true_map(gaussian: Any, derivative: str) -> None:
    """At F = F*, iSD's gradient is that of its flow-matching half alone, for every parameter."""
    generator = torch.Generator().manual_seed(0)
    x = gaussian.net.center(gaussian.features) + gaussian.net.std * torch.randn(
        256, 2, generator=generator, dtype=torch.float64
    )
    z = torch.randn(256, 2, generator=generator, dtype=torch.float64)
    draws = Draws(z, gaussian.t, gaussian.s)
    parameters = list(gaussian.net.parameters())
    half = build_objective("fm")(gaussian.flow_map, x, gaussian.features, draws)
    isd = build_objective(
        "isd", derivative=derivative, weight_power=0.0, sd_share=1.0, sd_begin=0.0, epsilon=0.005
    )
    whole = isd(gaussian.flow_map, x, gaussian.features, draws)
    expected = torch.autograd.grad(half.per_example.mean(), parameters, materialize_grads=True)
    found = torch.autograd.grad(whole.per_example.mean(), parameters, materialize_grads=True)
    tolerance = 1e-11 if derivative == "jvp" else 5e-4
    torch.testing.assert_close(found, expected, rtol=0, atol=tolerance)
    assert whole.metrics["loss_sd"] < tolerance

    # and away from it there is one: a parameter that bends the map off the diagonal is felt
    with torch.no_grad():
        gaussian.net.skew += 0.5
    bent = isd(gaussian.flow_map, x, gaussian.features, draws).per_example.mean()
    (gradient,) = torch.autograd.grad(bent, [gaussian.net.skew])
    assert gradient.abs() > 1e-2


@pytest.mark.parametrize("steps", [1, 2, 5])
def test_sampler_is_exact_in_any_number_of_steps(gaussian: Any, steps: int) -> None:
    z = gaussian.x_t
    one = torch.ones(len(z), dtype=torch.float64)
    expected = gaussian.net.map(z, one, torch.zeros_like(one), gaussian.features)
    found = sample(gaussian.flow_map, z, gaussian.features, nfe=steps)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)


def test_diagonal_sampler_converges(gaussian: Any) -> None:
    """First order in the number of steps: Euler on the linear path, DDIM on the other."""
    z = gaussian.x_t
    one = torch.ones(len(z), dtype=torch.float64)
    expected = gaussian.net.map(z, one, torch.zeros_like(one), gaussian.features)
    errors = []
    for steps in (100, 200):
        with torch.no_grad():
            found = sample(gaussian.flow_map, z, gaussian.features, nfe=steps, kind="diagonal")
        errors.append(float((found - expected).square().mean().sqrt()))
    assert errors[0] / errors[1] == pytest.approx(2.0, rel=0.1)
    assert errors[1] < 0.03


def test_health_of_the_true_map(gaussian: Any) -> None:
    generator = torch.Generator().manual_seed(1)
    n = 4096
    x = gaussian.net.mean + gaussian.net.std * torch.randn(
        n, 2, generator=generator, dtype=torch.float64
    )
    health = flow_health(gaussian.flow_map, x, None, generator)
    assert health.semigroup < 1e-12
    assert health.tangent < 1e-3  # the difference's own error
    assert health.variance_ratio == pytest.approx(1.0, abs=0.05)


def test_health_of_a_bent_map(gaussian: Any) -> None:
    with torch.no_grad():
        gaussian.net.skew += 1.0
    x = gaussian.x_t
    health = flow_health(gaussian.flow_map, x, gaussian.features, torch.Generator().manual_seed(1))
    assert health.semigroup > 0.02
    assert health.tangent > 0.02


def test_health_of_a_collapsed_map(gaussian_flow: Any) -> None:
    """A map onto the mean keeps every identity but has lost the variance."""
    net = gaussian_flow("linear", mean=[0.5, 0.5], std=[1e-4, 1e-4])
    generator = torch.Generator().manual_seed(2)
    x = 0.5 + 0.3 * torch.randn(512, 2, generator=generator, dtype=torch.float64)
    health = flow_health(FlowMap(net, PATHS["linear"]), x, None, generator)
    assert health.semigroup < 1e-6
    assert health.variance_ratio < 1e-3
