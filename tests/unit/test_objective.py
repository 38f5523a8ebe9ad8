from __future__ import annotations

import copy
import re
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from cmpolicy.flow.flow_map import FlowMap
from cmpolicy.flow.objectives import OBJECTIVES, Draws, Isd, build_objective
from cmpolicy.flow.path import PATHS

CPU = torch.device("cpu")
D = 3


def _isd(**settings: Any) -> Any:
    """The paper's iSD, unless told otherwise."""
    paper = {"sd_begin": 0.0, "zero_share": 0.0, "one_share": 0.0, "epsilon": 0.005}
    return build_objective("isd", **(paper | settings))


class Net(nn.Module):
    """A smooth F(x, t, s, features) on (B, D)."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.layers = nn.Sequential(nn.Linear(2 * D + 2, 16), nn.Tanh(), nn.Linear(16, D)).double()

    def forward(self, x: Tensor, t: Tensor, s: Tensor, features: Tensor | None) -> Tensor:
        c = torch.zeros_like(x) if features is None else features
        f: Tensor = self.layers(torch.cat([x, c, t[:, None], s[:, None]], dim=1))
        return f


def _problem(n: int = 8, path: str = "linear") -> tuple[FlowMap, Tensor, Tensor, Draws]:
    generator = torch.Generator().manual_seed(1)
    x, features, z = torch.randn(3, n, D, generator=generator, dtype=torch.float64)
    times = torch.rand(2, n, generator=generator, dtype=torch.float64) * 0.9 + 0.05
    return FlowMap(Net(), PATHS[path]), x, features, Draws(z, times.amax(0), times.amin(0))


def _gradients(flow_map: FlowMap, loss: Tensor) -> tuple[Tensor, ...]:
    return torch.autograd.grad(loss, list(flow_map.parameters()), materialize_grads=True)


def _frozen(flow_map: FlowMap) -> Any:
    return copy.deepcopy(flow_map.net).requires_grad_(False)  # type: ignore[union-attr]


def _derivative(
    net: Any, x: Tensor, t: Tensor, s: Tensor, c: Tensor, u: Tensor, rate: float
) -> Tensor:
    """(d/dx F) u + (d/dt F) / rate by reverse mode, per sample: another way than the code's."""

    def f(x_: Tensor, t_: Tensor, s_: Tensor, c_: Tensor) -> Tensor:
        out: Tensor = net(x_[None], t_[None], s_[None], c_[None])[0]
        return out

    by_x = torch.func.vmap(torch.func.jacrev(f, argnums=0))(x, t, s, c)
    by_t = torch.func.vmap(torch.func.jacrev(f, argnums=1))(x, t, s, c)
    total: Tensor = torch.einsum("bij,bj->bi", by_x, u) + by_t / rate
    return total


# -- iSD by hand --------------------------------------------------------------------------------


@pytest.mark.parametrize("power", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("derivative", ["jvp", "difference"])
@pytest.mark.parametrize("path", ["linear", "trigonometric"])
def test_loss_and_gradient_by_hand(path: str, derivative: str, power: float) -> None:
    """Steps 2 to 6 of the method, u_hat and D from a frozen copy: no gradient through either."""
    flow_map, x, features, draws = _problem(path=path)
    settings = {"derivative": derivative, "weight_power": power, "sd_share": 1.0, "epsilon": 1e-4}
    output = _isd(**settings)(flow_map, x, features, draws)

    t, s, net, frozen = draws.t, draws.s, flow_map.net, _frozen(flow_map)
    point = flow_map.path.sample(x, draws.z, t)
    u_hat = frozen(point.x_t, t, t, features)
    d = _derivative(frozen, point.x_t, t, s, features, u_hat, flow_map.path.rate)
    loss_fm = (net(point.x_t, t, t, features) - point.velocity).square().mean(1)
    f = net(point.x_t, t, s, features)
    if path == "linear":
        target = u_hat - (t - s)[:, None] * d  # the paper's own form
    else:
        delta = (t - s)[:, None] * flow_map.path.rate
        still = frozen(point.x_t, t, s, features)
        target = still + torch.cos(delta) * (u_hat - still) - torch.sin(delta) * (point.x_t + d)
    loss_sd = (f - target).square().mean(1)
    total = loss_fm + loss_sd
    expected = total / (total.detach() + 0.01) ** power

    tolerance = {"rtol": 1e-6, "atol": 1e-8}
    torch.testing.assert_close(output.per_example, expected, **tolerance)
    torch.testing.assert_close(output.metrics["loss_fm"], loss_fm.mean().detach(), **tolerance)
    torch.testing.assert_close(output.metrics["loss_sd"], loss_sd.mean().detach(), **tolerance)
    found = _gradients(flow_map, output.per_example.sum())
    by_hand = _gradients(flow_map, expected.sum())
    torch.testing.assert_close(found, by_hand, **tolerance)
    assert not any(value.requires_grad for value in output.metrics.values())


def test_flow_matching_by_hand() -> None:
    flow_map, x, features, draws = _problem()
    output = build_objective("fm")(flow_map, x, features, draws)
    x_t = (1 - draws.t)[:, None] * x + draws.t[:, None] * draws.z
    error = flow_map.net(x_t, draws.t, draws.t, features) - (draws.z - x)
    torch.testing.assert_close(output.per_example, error.square().mean(1))
    assert set(output.metrics) == {"loss_fm"}


# -- the tangent --------------------------------------------------------------------------------


def _loss(settings: dict[str, Any], *, progress: float = 0.0, ema: FlowMap | None = None) -> Tensor:
    flow_map, x, features, draws = _problem()
    isd = _isd(weight_power=0.0, **settings)
    return isd(flow_map, x, features, draws, progress=progress, ema=ema).per_example.detach()


def test_schedule_goes_from_data_to_self() -> None:
    data, own = _loss({"tangent": "data"}), _loss({"tangent": "self"})
    assert not torch.allclose(data, own)
    schedule = {"tangent": "schedule", "tangent_begin": 0.2, "tangent_end": 0.6}
    torch.testing.assert_close(_loss(schedule, progress=0.1), data)
    torch.testing.assert_close(_loss(schedule, progress=0.2), data)
    torch.testing.assert_close(_loss(schedule, progress=0.6), own)
    torch.testing.assert_close(_loss(schedule, progress=1.0), own)
    halfway = _loss(schedule, progress=0.4)
    assert not torch.allclose(halfway, data)
    assert not torch.allclose(halfway, own)


def test_tangent_mix() -> None:
    mix = Isd(tangent="schedule", tangent_begin=0.2, tangent_end=0.6).tangent_mix
    assert [round(mix(p), 12) for p in (0.0, 0.3, 0.4, 0.6, 1.0)] == [0.0, 0.25, 0.5, 1.0, 1.0]
    step = Isd(tangent="schedule", tangent_begin=0.5, tangent_end=0.5).tangent_mix
    assert [step(0.49), step(0.5)] == [0.0, 1.0]
    assert Isd(tangent="data").tangent_mix(1.0) == 0.0
    assert Isd().tangent_mix(0.0) == 1.0


def test_self_distillation_joins_in_later() -> None:
    """Before its share of the run the loss is flow matching's, afterwards the whole."""
    flow_map, x, features, draws = _problem()
    late = _isd(sd_begin=0.5, weight_power=1.0)
    before = late(flow_map, x, features, draws, progress=0.49)
    fm = build_objective("fm")(flow_map, x, features, draws).per_example
    torch.testing.assert_close(before.per_example, fm / (fm.detach() + 0.01))
    assert before.metrics["loss_sd"] == 0
    after = late(flow_map, x, features, draws, progress=0.5)
    expected = _isd()(flow_map, x, features, draws)
    torch.testing.assert_close(after.per_example, expected.per_example)


def test_data_tangent_is_the_conditional_velocity() -> None:
    flow_map, x, features, draws = _problem()
    isd = _isd(tangent="data", derivative="jvp", weight_power=0.0, sd_share=1.0, sd_weight=2.0)
    found = isd(flow_map, x, features, draws).per_example
    point = flow_map.path.sample(x, draws.z, draws.t)
    frozen, v = _frozen(flow_map), draws.z - x
    d = _derivative(frozen, point.x_t, draws.t, draws.s, features, v, 1.0)
    target = v - (draws.t - draws.s)[:, None] * d
    loss_sd = (frozen(point.x_t, draws.t, draws.s, features) - target).square().mean(1)
    loss_fm = (frozen(point.x_t, draws.t, draws.t, features) - v).square().mean(1)
    torch.testing.assert_close(found, loss_fm + 2.0 * loss_sd)


def test_tangent_from_ema_weights() -> None:
    own = _loss({})
    same = FlowMap(Net(0), PATHS["linear"])
    other = FlowMap(Net(5), PATHS["linear"])
    torch.testing.assert_close(_loss({"tangent_weights": "ema"}, ema=same), own)
    assert not torch.allclose(_loss({"tangent_weights": "ema"}, ema=other), own)
    # online: the EMA weights are there, but not asked for
    torch.testing.assert_close(_loss({}, ema=other), own)
    # data: there is no u_hat to take from anywhere
    data = {"tangent": "data"}
    torch.testing.assert_close(_loss(data | {"tangent_weights": "ema"}), _loss(data))
    with pytest.raises(ValueError, match="takes targets from EMA weights"):
        _loss({"tangent_weights": "ema"})


def test_no_gradient_reaches_the_ema_weights() -> None:
    flow_map, x, features, draws = _problem()
    ema = FlowMap(Net(5), PATHS["linear"])
    isd = _isd(tangent_weights="ema")
    isd(flow_map, x, features, draws, ema=ema).per_example.sum().backward()
    assert all(p.grad is None for p in ema.parameters())
    assert all(p.grad is not None and p.grad.any() for p in flow_map.parameters())


# -- shares -------------------------------------------------------------------------------------


def test_masked_entries_count_for_nothing() -> None:
    """Neither in the loss nor in its gradient; the others are averaged over what is left."""
    flow_map, x, features, draws = _problem()
    mask = torch.ones(8, D, dtype=torch.bool)
    mask[2, 1:] = False
    for objective in (_isd(sd_share=1.0, weight_power=0.0), build_objective("fm")):
        masked = objective(flow_map, x, features, draws, mask=mask).per_example
        whole = objective(flow_map, x, features, draws).per_example
        differs = ~torch.isclose(masked, whole, rtol=0, atol=1e-12)
        assert differs.nonzero().flatten().tolist() == [2]
        every = objective(flow_map, x, features, draws, mask=torch.ones(8, 1)).per_example
        torch.testing.assert_close(every, whole)
    fm = build_objective("fm")
    masked = fm(flow_map, x, features, draws, mask=mask).per_example[2]
    x_t = (1 - draws.t)[:, None] * x + draws.t[:, None] * draws.z
    error = flow_map.net(x_t, draws.t, draws.t, features) - (draws.z - x)
    torch.testing.assert_close(masked, error[2, 0].square())


@pytest.mark.parametrize(
    ("n", "share", "count"), [(8, 0.5, 4), (8, 1.0, 8), (7, 0.3, 2), (4, 0.01, 1)]
)
def test_share_of_samples_with_self_distillation(n: int, share: float, count: int) -> None:
    flow_map, x, features, draws = _problem(n)
    settings = {"weight_power": 0.0}
    plain = build_objective("fm")(flow_map, x, features, draws).per_example
    whole = _isd(sd_share=share, **settings)(flow_map, x, features, draws)
    carries = ~torch.isclose(whole.per_example, plain, rtol=0, atol=1e-12)
    assert int(carries.sum()) == count
    every = _isd(sd_share=1.0, **settings)(flow_map, x, features, draws)
    torch.testing.assert_close(whole.per_example[carries], every.per_example[carries])


@pytest.mark.parametrize("share", [0.25, 0.5, 1.0])
@pytest.mark.parametrize("parts", [2, 4])
def test_slices_of_a_global_draw_give_the_losses_of_the_whole(share: float, parts: int) -> None:
    """What makes N processes with batch B/N the same training as one with batch B."""
    n = 16
    flow_map, x, features, draws = _problem(n)
    isd = _isd(sd_share=share)
    whole = isd(flow_map, x, features, draws)
    size = n // parts
    sliced = [
        isd(flow_map, x[i : i + size], features[i : i + size], draws.slice(i, i + size))
        for i in range(0, n, size)
    ]
    joined = torch.cat([output.per_example for output in sliced])
    torch.testing.assert_close(joined, whole.per_example, rtol=0, atol=1e-12)
    for name, value in whole.metrics.items():
        mean = torch.stack([output.metrics[name] for output in sliced]).mean()
        torch.testing.assert_close(mean, value, rtol=0, atol=1e-12)


def test_zero_share() -> None:
    for share in (0.0, 0.3, 1.0):
        draws = _isd(zero_share=share).draw(4000, (2,), torch.Generator().manual_seed(0), CPU)
        assert (draws.s == 0).double().mean().item() == pytest.approx(share, abs=0.03)


def test_one_share() -> None:
    """So many draws begin at t = 1 exactly, where one-step sampling does."""
    for share in (0.0, 0.25, 1.0):
        draws = _isd(one_share=share).draw(4000, (2,), torch.Generator().manual_seed(0), CPU)
        assert (draws.t == 1).double().mean().item() == pytest.approx(share, abs=0.03)
        assert (draws.s <= draws.t).all()


def test_condition_of_one_sample_is_its_own_affair() -> None:
    flow_map, x, features, draws = _problem()
    isd = _isd(sd_share=1.0)
    before = isd(flow_map, x, features, draws).per_example
    changed = features.clone()
    changed[3] += 1.0
    after = isd(flow_map, x, changed, draws).per_example
    differs = ~torch.isclose(before, after, rtol=0, atol=1e-12)
    assert differs.nonzero().flatten().tolist() == [3]


def test_without_condition() -> None:
    flow_map, x, _, draws = _problem()
    for name in OBJECTIVES:
        output = build_objective(name)(flow_map, x, None, draws)
        assert output.per_example.shape == (8,)


# -- draws --------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", sorted(OBJECTIVES))
def test_draws(name: str) -> None:
    objective = build_objective(name)
    first, again = (
        objective.draw(512, (16, 2), torch.Generator().manual_seed(5), CPU) for _ in range(2)
    )
    assert first.z.shape == (512, 16, 2)
    assert first.t.shape == first.s.shape == (512,)
    assert (first.s <= first.t).all()
    assert (first.s >= 0).all()
    assert (first.t <= 1).all()
    for a, b in ((first.z, again.z), (first.t, again.t), (first.s, again.s)):
        assert torch.equal(a, b)
    assert first.z.mean().item() == pytest.approx(0.0, abs=0.05)
    assert first.z.std().item() == pytest.approx(1.0, abs=0.05)


def test_flow_matching_draws_the_diagonal() -> None:
    draws = build_objective("fm").draw(16, (2,), None, CPU)
    assert torch.equal(draws.t, draws.s)


def test_larger_of_two_is_t() -> None:
    """t of Beta(1, 1) draws is the maximum of two uniforms: E t = 2/3, E s = 1/3."""
    draws = _isd(time_a=1.0).draw(20_000, (1,), torch.Generator().manual_seed(0), CPU)
    assert draws.t.mean().item() == pytest.approx(2 / 3, abs=0.01)
    assert draws.s.mean().item() == pytest.approx(1 / 3, abs=0.01)


# -- settings -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "settings", "words"),
    [
        (
            "isdd",
            {},
            [
                "unknown objective 'isdd'; did you mean 'isd'?",
                "known: alphaflow, ct, dct, ddpm, esd, fm, imf, isd",
            ],
        ),
        (
            "isd",
            {"wieght_power": 1},
            ["'objective.wieght_power'; did you", "weight_power", "epsilon"],
        ),
        (
            "fm",
            {"zzz": 1},
            ["setting 'objective.zzz'", "objective.time_a, objective.time_b"],
        ),
        ("isd", {"tangent": "teacher"}, ["objective.tangent='teacher'", "self, data, schedule"]),
        ("isd", {"tangent_weights": "best"}, ["'best'", "online, ema"]),
        ("isd", {"derivative": "vjp"}, ["'vjp'", "jvp, difference"]),
        ("isd", {"sd_share": 0.0}, ["sd_share=0.0", "use fm"]),
        ("isd", {"sd_share": 1.5}, ["sd_share=1.5", "(0, 1]"]),
        ("isd", {"sd_begin": 1.0}, ["sd_begin=1.0", "[0, 1)"]),
        ("psd", {"finish_begin": 1.5}, ["finish_begin=1.5", "[0, 1]"]),
        ("psd", {"finish_steps": 1}, ["finish_steps=1", "at least 2"]),
        ("isd", {"time_floor": 0.1, "finish_begin": 0.8}, ["time_floor=0.1", "knows no floor"]),
        ("isd", {"zero_share": -0.1}, ["zero_share=-0.1", "[0, 1]"]),
        ("isd", {"time_floor": 1.0}, ["time_floor=1.0", "[0, 1)"]),
        ("isd", {"tangent_begin": 0.8, "tangent_end": 0.2}, ["0.8", "0.2", "in order"]),
        ("isd", {"epsilon": 0.0}, ["epsilon=0.0", "(0, 0.5)"]),
        ("isd", {"weight_power": -1}, ["weight_power=-1.0", "negative"]),
        ("isd", {"sd_weight": float("nan")}, ["sd_weight=nan"]),
        ("isd", {"time_a": 0.0}, ["Beta(0.0, 1.0)", "positive"]),
        ("isd", {"sd_share": "half"}, ["objective.sd_share must be a number", "half"]),
    ],
)
def test_bad_settings(name: str, settings: dict[str, Any], words: list[str]) -> None:
    with pytest.raises(ValueError, match=re.escape(words[0])) as caught:
        build_objective(name, **settings)
    for word in words:
        assert word in str(caught.value)
