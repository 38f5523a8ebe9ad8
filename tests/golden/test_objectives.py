"""Objectives in float64 on the flow of a Gaussian: at the true map, and by hand off it.

``gaussian.net`` is the true map while its parameters are 0; the tests by hand bend it first.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from cmpolicy.flow.flow_map import FlowMap
from cmpolicy.flow.objectives import OBJECTIVES, Draws, build_objective

EXACT = {"weight_power": 0.0, "derivative": "jvp"}
SELF = {"weight_power": 0.0, "sd_share": 1.0, "sd_begin": 0.0}


def _gradient(net: Any, loss: Tensor) -> Tensor:
    """By every parameter, in one vector."""
    parameters = list(net.parameters())
    gradients = torch.autograd.grad(loss, parameters, materialize_grads=True)
    return torch.cat([g.flatten() for g in gradients])


def _column(t: Tensor) -> Tensor:
    return t[:, None]


# -- at the true map ----------------------------------------------------------------------------


def _expected_gradient(gaussian: Any, objective: Any, t: float, s: float, **rest: Any) -> Tensor:
    """Of the mean over data and noise, by Gauss-Hermite quadrature of 80 x 80 points."""
    nodes, weights = np.polynomial.hermite_e.hermegauss(80)
    a, b = (torch.as_tensor(v).flatten() for v in np.meshgrid(nodes, nodes))
    weight = torch.as_tensor(np.outer(weights, weights) / (2 * np.pi)).flatten()
    keep = weight > 1e-16
    a, b, weight = a[keep], b[keep], weight[keep]
    features = gaussian.features[:1].expand(len(a), -1)
    x = gaussian.net.center(features) + gaussian.net.std * _column(a)
    z = _column(b).expand_as(x)
    times = torch.full_like(a, t), torch.full_like(a, s)
    output = objective(gaussian.flow_map, x, features, Draws(z, *times), **rest)
    return _gradient(gaussian.net, (output.per_example * weight).sum())


@pytest.mark.parametrize(("t", "s"), [(0.9, 0.0), (0.7, 0.3), (0.3, 0.0)])
@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("fm", {}),
        ("isd", SELF | EXACT),
        ("esd", SELF | EXACT),
        ("lsd", SELF | EXACT),
        ("psd", SELF),
        ("psd", SELF | {"middle": "contract"}),
        ("ct", EXACT),
        ("meanflow", EXACT),
        ("imf", EXACT),
        ("alphaflow", EXACT),
    ],
)
def test_the_true_map_has_no_gradient(
    gaussian: Any, name: str, settings: dict[str, Any], t: float, s: float
) -> None:
    """Not for one example where the target holds v, but for their mean; alphaflow at alpha = 0."""
    objective = build_objective(name, **settings)
    gradient = _expected_gradient(gaussian, objective, t, s, progress=1.0)
    assert gradient.abs().max() < 1e-7
    with torch.no_grad():
        gaussian.net.skew += 0.5
        gaussian.net.bias += 0.1
    bent = _expected_gradient(gaussian, objective, t, s, progress=1.0)
    assert bent.abs().max() > 1e-3


def test_discrete_consistency_is_biased_by_its_step(gaussian: Any) -> None:
    """At the true map the gradient is of the order 1 / N: a neighbour on the line is not one on the
    flow."""
    found = []
    for steps in (100, 200):
        objective = build_objective("dct", steps_begin=steps, steps_end=steps, weight_power=0.0)
        found.append(_expected_gradient(gaussian, objective, 0.7, 0.0).norm())
    assert found[0] > 1e-5
    assert found[0] / found[1] == pytest.approx(2.0, rel=0.1)


def test_flow_matching_along_lines_is_biased(gaussian: Any) -> None:
    """alphaflow with alpha = 1 regresses F(x_t, t, s) on v, whose mean is u and not F."""
    objective = build_objective("alphaflow", **EXACT)
    assert objective.alpha(0.0) == 1.0  # type: ignore[attr-defined]
    assert _expected_gradient(gaussian, objective, 0.9, 0.0, progress=0.0).norm() > 1e-2
    on_the_diagonal = _expected_gradient(gaussian, objective, 0.9, 0.9, progress=0.0)
    assert on_the_diagonal.abs().max() < 1e-7


# -- by hand, off the true map ------------------------------------------------------------------


class Bent:
    """A bent flow map, examples, and what its objectives are made of, by reverse mode."""

    def __init__(self, gaussian: Any) -> None:
        with torch.no_grad():
            gaussian.net.skew += 0.4
            gaussian.net.gain -= 0.2
            gaussian.net.bias += torch.tensor([0.3, -0.1])
        self.flow_map, self.net = gaussian.flow_map, gaussian.net
        self.path, self.rate = gaussian.flow_map.path, gaussian.flow_map.path.rate
        generator = torch.Generator().manual_seed(3)
        self.x, self.z = torch.randn(2, 256, 2, generator=generator, dtype=torch.float64)
        self.t, self.s, self.c = gaussian.t, gaussian.s, gaussian.features
        self.draws = Draws(self.z, self.t, self.s)
        point = self.path.sample(self.x, self.z, self.t)
        self.x_t, self.v = point.x_t, point.velocity
        self.frozen = copy.deepcopy(self.net).requires_grad_(False)
        self.u_hat = self.frozen(self.x_t, self.t, self.t, self.c)

    def derivative(self, net: Any, s: Tensor, u: Tensor) -> Tensor:
        """(d/dx F) u + (d/dt F) / rate, per example, with the gradient of ``net``."""

        def f(x: Tensor, t: Tensor, s_: Tensor, c: Tensor) -> Tensor:
            out: Tensor = net(x[None], t[None], s_[None], c[None])[0]
            return out

        by_x = torch.func.vmap(torch.func.jacrev(f, argnums=0))(self.x_t, self.t, s, self.c)
        by_t = torch.func.vmap(torch.func.jacrev(f, argnums=1))(self.x_t, self.t, s, self.c)
        total: Tensor = torch.einsum("bij,bj->bi", by_x, u) + by_t / self.rate
        return total

    def residual(self, f: Tensor, s: Tensor, w: Tensor, d: Tensor) -> Tensor:
        """Of w and D against f: the paper's form on the linear path."""
        if self.rate == 1.0:
            return w - _column(self.t - s) * d - f
        delta = _column(self.t - s) * self.rate
        return torch.cos(delta) * (w - f) - torch.sin(delta) * (self.x_t + d)

    def loss_fm(self) -> Tensor:
        """Of every example."""
        f: Tensor = self.net(self.x_t, self.t, self.t, self.c)
        return (f - self.v).square().mean(1)

    def missed(self, arrived: Tensor) -> Tensor:
        """Squared distance of F from the output that jumps from x_t to ``arrived``."""
        if self.rate == 1.0:
            target = (self.x_t - arrived) / _column(self.t - self.s)
        else:
            delta = _column(self.t - self.s) * self.rate
            target = (torch.cos(delta) * self.x_t - arrived) / torch.sin(delta)
        back = self.path.jump(self.x_t, target, self.t, self.s)
        torch.testing.assert_close(back, arrived, rtol=0, atol=1e-12)
        f: Tensor = self.net(self.x_t, self.t, self.s, self.c)
        return (f - target).square().mean(1)

    def check(self, objective: Any, expected: Tensor, **rest: Any) -> None:
        """Loss and gradient are those by hand."""
        output = objective(self.flow_map, self.x, self.c, self.draws, **rest)
        torch.testing.assert_close(output.per_example, expected, rtol=1e-8, atol=1e-10)
        found = _gradient(self.net, output.per_example.sum())
        by_hand = _gradient(self.net, expected.sum())
        torch.testing.assert_close(found, by_hand, rtol=1e-8, atol=1e-9)
        assert (found.abs() > 1e-3).sum() >= 2
        assert not any(value.requires_grad for value in output.metrics.values())


@pytest.fixture
def bent(gaussian: Any) -> Bent:
    return Bent(gaussian)


def _moved(bent: Bent, s: Tensor, w: Tensor, d: Tensor) -> Tensor:
    """|F - sg(F + R)|^2 with everything in R held."""
    f = bent.net(bent.x_t, bent.t, s, bent.c)
    still = bent.frozen(bent.x_t, bent.t, s, bent.c)
    loss: Tensor = (f - (still + bent.residual(still, s, w, d))).square().mean(1)
    return loss


def test_consistency_training(bent: Bent) -> None:
    zero = torch.zeros_like(bent.s)
    d = bent.derivative(bent.frozen, zero, bent.v)
    bent.check(build_objective("ct", **EXACT), _moved(bent, zero, bent.v, d))
    expected = _moved(bent, zero, bent.v, d)
    weighted = expected / (expected.detach() + 0.01).sqrt()
    bent.check(build_objective("ct", derivative="jvp", weight_power=0.5), weighted)


def test_mean_flow_and_its_improvement(bent: Bent) -> None:
    """They differ in what the derivative is taken along."""
    along_v = bent.derivative(bent.frozen, bent.s, bent.v)
    along_u = bent.derivative(bent.frozen, bent.s, bent.u_hat)
    bent.check(build_objective("meanflow", **EXACT), _moved(bent, bent.s, bent.v, along_v))
    bent.check(build_objective("imf", **EXACT), _moved(bent, bent.s, bent.v, along_u))


def test_eulerian_self_distillation_sends_gradient_through_the_jacobian(bent: Bent) -> None:
    d = bent.derivative(bent.net, bent.s, bent.u_hat)
    f = bent.net(bent.x_t, bent.t, bent.s, bent.c)
    expected = bent.loss_fm() + bent.residual(f, bent.s, bent.u_hat, d).square().mean(1)
    esd = build_objective("esd", **(SELF | EXACT))
    bent.check(esd, expected)
    isd = build_objective("isd", **(SELF | EXACT))
    losses = [o(bent.flow_map, bent.x, bent.c, bent.draws).loss for o in (esd, isd)]
    torch.testing.assert_close(losses[0], losses[1])  # the same number
    through, held = (_gradient(bent.net, loss) for loss in losses)
    assert (through - held).norm() > 0.05 * held.norm()  # another gradient


def test_lagrangian_self_distillation(bent: Bent) -> None:
    def jump(s: Tensor, i: int) -> Tensor:
        one = slice(i, i + 1)
        x: Tensor = bent.flow_map(bent.x_t[one], bent.t[one], s[None], bent.c[one])[0]
        return x

    by_s = torch.stack(
        [
            torch.autograd.functional.jacobian(
                lambda s, i=i: jump(s, i), bent.s[i], create_graph=True
            )
            for i in range(len(bent.s))
        ]
    )
    with torch.no_grad():
        arrived = bent.flow_map(bent.x_t, bent.t, bent.s, bent.c)
        velocity = bent.frozen(arrived, bent.s, bent.s, bent.c)
    expected = bent.loss_fm() + (by_s / bent.rate - velocity).square().mean(1)
    bent.check(build_objective("lsd", **(SELF | EXACT)), expected)
    exact = build_objective("lsd", **(SELF | EXACT))
    near = build_objective("lsd", epsilon=1e-4, **SELF)
    gradients = [
        _gradient(bent.net, o(bent.flow_map, bent.x, bent.c, bent.draws).loss)
        for o in (exact, near)
    ]
    torch.testing.assert_close(gradients[1], gradients[0], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(
    ("settings", "progress", "share"),
    [
        ({}, 0.3, 0.5),
        ({"middle": "contract"}, 0.0, 0.5),
        ({"middle": "contract"}, 1.0, 0.05),
        ({"middle": "contract", "middle_begin": 0.8, "middle_end": 0.4}, 0.5, 0.6),
        ({"weights": "ema"}, 0.0, 0.5),
    ],
)
def test_progressive_self_distillation(
    bent: Bent, settings: dict[str, Any], progress: float, share: float
) -> None:
    teacher = FlowMap(copy.deepcopy(bent.net), bent.path)
    if settings.get("weights") == "ema":
        with torch.no_grad():
            teacher.net.skew -= 0.3  # type: ignore[union-attr]
    m = bent.t - share * (bent.t - bent.s)
    with torch.no_grad():
        halfway = teacher(bent.x_t, bent.t, m, bent.c)
        arrived = teacher(halfway, m, bent.s, bent.c)
    psd = build_objective("psd", **(SELF | settings))
    bent.check(psd, bent.loss_fm() + bent.missed(arrived), progress=progress, ema=teacher)


@pytest.mark.parametrize(
    ("name", "settings"), [("isd", EXACT), ("psd", {}), ("psd", {"weights": "ema"})]
)
def test_the_finish_learns_where_the_velocity_leads(
    bent: Bent, name: str, settings: dict[str, Any]
) -> None:
    teacher = FlowMap(copy.deepcopy(bent.net), bent.path)
    if settings.get("weights") == "ema":
        with torch.no_grad():
            teacher.net.skew -= 0.3  # type: ignore[union-attr]
    x, t = bent.x_t, bent.t
    for after in (bent.t - (bent.t - bent.s) / 3, bent.t - (bent.t - bent.s) * 2 / 3, bent.s):
        with torch.no_grad():
            x, t = bent.path.jump(x, teacher.velocity(x, t, bent.c), t, after), after
    finish = SELF | settings | {"finish_begin": 0.7, "finish_steps": 3}
    objective, without = build_objective(name, **finish), build_objective(name, **(SELF | settings))
    bent.check(objective, bent.loss_fm() + bent.missed(x), progress=0.7, ema=teacher)
    call = (bent.flow_map, bent.x, bent.c, bent.draws)
    before = [o(*call, progress=0.69, ema=teacher).per_example for o in (objective, without)]
    assert torch.equal(*before)


def test_the_finish_is_biased_by_its_step(gaussian: Any) -> None:
    """At the true map the gradient is of the order 1 / finish_steps: Euler's method."""
    found = []
    for steps in (50, 100):
        finish = SELF | {"finish_begin": 0.0, "finish_steps": steps}
        objective = build_objective("psd", **finish)
        found.append(_expected_gradient(gaussian, objective, 0.9, 0.0).norm())
    assert found[0] > 1e-5
    assert found[0] / found[1] == pytest.approx(2.0, rel=0.1)


def test_alpha_flow_halfway(bent: Bent) -> None:
    objective: Any = build_objective("alphaflow", alpha_begin=0.0, alpha_end=1.0, **EXACT)
    alpha = objective.alpha(0.52)
    assert 0.2 < alpha < 0.5
    m = bent.t - alpha * (bent.t - bent.s)
    line = bent.path.sample(bent.x, bent.z, m).x_t
    f_m = bent.frozen(line, m, bent.s, bent.c)
    if bent.rate == 1.0:
        target = alpha * bent.v + (1 - alpha) * f_m  # the paper's own form
        f = bent.net(bent.x_t, bent.t, bent.s, bent.c)
        missed = (f - target).square().mean(1)
    else:
        missed = bent.missed(bent.path.jump(line, f_m, m, bent.s))
    bent.check(objective, missed / alpha, progress=0.52)


def test_alpha_flow_ends_as_mean_flow(bent: Bent) -> None:
    """Just before alpha is cut off the gradient is MeanFlow's already, whatever the weight."""
    if bent.rate != 1.0:
        pytest.skip("on the trigonometric path it is so up to a factor d / sin(d)")
    for power in (0.0, 1.0):
        settings = EXACT | {"weight_power": power}
        mean_flow = build_objective("meanflow", **settings)
        wanted = _gradient(bent.net, mean_flow(bent.flow_map, bent.x, bent.c, bent.draws).loss)
        alpha_flow: Any = build_objective("alphaflow", alpha_min=1e-5, **settings)
        progress = next(p for p in np.linspace(0, 1, 2001) if alpha_flow.alpha(p) < 1e-3)
        assert alpha_flow.alpha(progress) > 0
        for at, tolerance in ((progress, 5e-3), (1.0, 1e-12)):
            output = alpha_flow(bent.flow_map, bent.x, bent.c, bent.draws, progress=at)
            found = _gradient(bent.net, output.loss)
            assert (found - wanted).norm() <= tolerance * wanted.norm()


def test_discrete_consistency_by_hand(bent: Bent) -> None:
    steps = 20
    t = (bent.t * steps).ceil() / steps
    m, zero = t - 1 / steps, torch.zeros_like(t)
    later, earlier = (bent.path.sample(bent.x, bent.z, v).x_t for v in (t, m))
    ended = bent.flow_map(later, t, zero, bent.c)
    with torch.no_grad():
        target = bent.flow_map(earlier, m, zero, bent.c)
    expected = (ended - target).square().mean(1) / (t * (t - m))
    settings = {"steps_begin": steps, "steps_end": steps, "weight_power": 0.0}
    bent.check(build_objective("dct", **settings), expected)
    other = FlowMap(copy.deepcopy(bent.net), bent.path)
    with torch.no_grad():
        other.net.skew += 0.2  # type: ignore[union-attr]
        target = other(earlier, m, zero, bent.c)
    expected = (bent.flow_map(later, t, zero, bent.c) - target).square().mean(1) / (t * (t - m))
    bent.check(build_objective("dct", weights="ema", **settings), expected, ema=other)


def test_discrete_consistency_becomes_continuous(bent: Bent) -> None:
    """On the linear path its gradient goes to that of ct as the steps grow short."""
    if bent.rate != 1.0:
        pytest.skip("on the trigonometric path the two weigh times differently")
    steps = 4096
    t = (bent.t * steps).ceil() / steps
    draws = Draws(bent.z, t, bent.s)
    ct = build_objective("ct", **EXACT)(bent.flow_map, bent.x, bent.c, draws)
    settings = {"steps_begin": steps, "steps_end": steps, "weight_power": 0.0}
    dct = build_objective("dct", **settings)(bent.flow_map, bent.x, bent.c, draws)
    wanted = _gradient(bent.net, ct.loss)
    assert (_gradient(bent.net, dct.loss) - wanted).norm() < 2e-3 * wanted.norm()


def test_steps_double_in_the_course_of_the_run() -> None:
    dct: Any = build_objective("dct", steps_begin=10, steps_end=70)
    assert [dct.steps(p) for p in (0.0, 0.24, 0.26, 0.51, 0.76, 1.0)] == [10, 10, 20, 40, 70, 70]


@pytest.mark.parametrize("norm", ["l1", "l2"])
def test_regression_and_two_passes(bent: Bent, norm: str) -> None:
    def error(f: Tensor) -> Tensor:
        return ((f - bent.x).abs() if norm == "l1" else (f - bent.x).square()).mean(1)

    one, zero = torch.ones_like(bent.t), torch.zeros_like(bent.t)
    nothing = torch.zeros_like(bent.x)
    draws = build_objective("regression").draw(256, (2,), None, torch.device("cpu"))
    assert torch.equal(draws.t, one.float())
    assert torch.equal(draws.s, zero.float())
    bent.draws = Draws(bent.z, one, zero)
    first = error(bent.net(nothing, one, zero, bent.c))
    bent.check(build_objective("regression", norm=norm), first)
    near = torch.full_like(one, 0.1)
    x_t = bent.path.sample(bent.x, bent.z, near).x_t
    first = error(bent.net(nothing, one, zero, bent.c))
    bent.check(build_objective("mip", norm=norm), first + error(bent.net(x_t, near, zero, bent.c)))


def test_diffusion_predicts_the_noise(bent: Bent) -> None:
    from diffusers.schedulers.scheduling_ddpm import DDPMScheduler

    scheduler = DDPMScheduler(num_train_timesteps=100, beta_schedule="squaredcos_cap_v2")
    k = torch.arange(256) % 100
    t = k / 100
    noised = scheduler.add_noise(bent.x, bent.z, k)
    bent.draws = Draws(bent.z, t.double(), t.double())
    predicted = bent.net(noised, t.double(), t.double(), bent.c)
    expected = (predicted - bent.z).square().mean(1)
    output = build_objective("ddpm")(bent.flow_map, bent.x, bent.c, bent.draws)
    torch.testing.assert_close(output.per_example, expected, rtol=1e-4, atol=1e-4)


# -- what all of them keep ----------------------------------------------------------------------


@pytest.mark.parametrize("name", sorted(OBJECTIVES))
def test_an_example_is_its_own_affair(bent: Bent, name: str) -> None:
    """Neither the condition nor masked entries of one example reach another's loss."""
    objective = build_objective(name)
    ema = FlowMap(bent.frozen, bent.path)
    run: Callable[..., Tensor] = lambda c, mask=None: (  # noqa: E731
        objective(
            bent.flow_map, bent.x, c, objective_draws, mask=mask, progress=0.6, ema=ema
        ).per_example
    )
    drawn = objective.draw(256, (2,), torch.Generator().manual_seed(0), torch.device("cpu"))
    objective_draws = Draws(drawn.z.double(), drawn.t.double(), drawn.s.double())
    before = run(bent.c)
    assert before.shape == (256,)
    assert torch.isfinite(before).all()
    changed = bent.c.clone()
    changed[3] += 0.5
    differs = ~torch.isclose(run(changed), before, rtol=0, atol=1e-12)
    assert differs.nonzero().flatten().tolist() == [3]
    mask = torch.ones(256, 2, dtype=torch.bool)
    mask[5, 1] = False
    differs = ~torch.isclose(run(bent.c, mask), before, rtol=0, atol=1e-12)
    assert differs.nonzero().flatten().tolist() == [5]


@pytest.mark.parametrize("name", sorted(OBJECTIVES))
def test_guidance_changes_velocities_only(bent: Bent, name: str) -> None:
    objective = build_objective(name)
    drawn = objective.draw(256, (2,), torch.Generator().manual_seed(0), torch.device("cpu"))
    draws = Draws(drawn.z.double(), drawn.t.double(), drawn.s.double())
    run = (bent.flow_map, bent.x, bent.c, draws)
    double = {"velocity_target": lambda point, t: 2 * point.velocity}
    if name in ("ct", "dct", "ddpm", "mip", "regression"):
        with pytest.raises(ValueError, match="learns no velocity"):
            objective(*run, **double)
        return
    plain = objective(*run, progress=0.6).per_example
    guided = objective(*run, progress=0.6, **double).per_example
    assert not torch.allclose(plain, guided)
