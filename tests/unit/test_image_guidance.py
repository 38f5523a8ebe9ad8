"""Guidance at training time: closed form, randomness, and weights that make no sense."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from cmpolicy.flow.flow_map import FlowMap
from cmpolicy.flow.objectives import Draws, build_objective
from cmpolicy.flow.path import PathSample, expand_time, get_path
from cmpolicy.image.guidance import Guidance, LabelDraws

MEANS = torch.tensor([-1.5, 0.5, 2.0], dtype=torch.float64)
NULL = len(MEANS)
Q2 = 0.04  # variance of every class


class ByLabel(nn.Module):
    """F(x, t, t) = slope[t, label] x + offset[t, label] on a grid of times: any Gaussian flow."""

    def __init__(self, times: int) -> None:
        super().__init__()
        self.slope = nn.Parameter(torch.zeros(times, NULL + 1, dtype=torch.float64))
        self.offset = nn.Parameter(torch.zeros(times, NULL + 1, dtype=torch.float64))
        self.times = times

    def forward(self, x: Tensor, t: Tensor, s: Tensor, label: Tensor | None) -> Tensor:
        assert label is not None
        i = (t * self.times - 0.5).round().long()
        return expand_time(self.slope[i, label], x) * x + expand_time(self.offset[i, label], x)


def class_velocity(x: Tensor, t: Tensor, mean: Tensor) -> Tensor:
    """u of N(mean, q^2) on the linear path, method.md."""
    t = expand_time(t, x)
    m = expand_time(mean, x)
    sigma2 = (1 - t) ** 2 * Q2 + t**2
    return -m + (t - (1 - t) * Q2) / sigma2 * (x - (1 - t) * m)


def test_what_is_learned_is_the_guided_velocity() -> None:
    """With v replaced by u_null + w (v - u_null), its mean given x is u_null + w (u_c - u_null)."""
    generator = torch.Generator().manual_seed(0)
    n, w = 200_000, 2.5
    t = torch.full((n,), 0.5, dtype=torch.float64)
    mean = MEANS[1].expand(n)
    x = mean + math.sqrt(Q2) * torch.randn(n, generator=generator, dtype=torch.float64)
    z = torch.randn(n, generator=generator, dtype=torch.float64)
    point = get_path("linear").sample(x[:, None], z[:, None], t)
    net = ByLabel(1)
    with torch.no_grad():
        net.slope[0, NULL], net.offset[0, NULL] = 0.3, -0.2
    flow_map = FlowMap(net, get_path("linear"))
    target = Guidance(w).target(flow_map, torch.full((n,), NULL), torch.zeros(n).bool())
    assert target is not None
    guided = target(point, t)
    u_null = 0.3 * point.x_t - 0.2
    expected = u_null + w * (class_velocity(point.x_t, t, mean) - u_null)
    error = guided - expected  # zero mean, and uncorrelated with x_t
    assert abs(float(error.mean())) < 0.02
    assert abs(float((error * point.x_t).mean())) < 0.02
    exact = u_null + w * (point.velocity - u_null)
    torch.testing.assert_close(guided, exact, rtol=0, atol=1e-12)


def test_samples_without_a_label_learn_v_itself() -> None:
    net = ByLabel(1)
    with torch.no_grad():
        net.offset.fill_(7.0)
    dropped = torch.tensor([True, False, True])
    target = Guidance(3.0).target(FlowMap(net, get_path("linear")), torch.full((3,), NULL), dropped)
    assert target is not None
    v = torch.tensor([[1.0], [2.0], [3.0]], dtype=torch.float64)
    got = target(PathSample(v * 0, v), torch.full((3,), 0.5, dtype=torch.float64))
    assert torch.equal(got[dropped], v[dropped])
    assert float(got[1]) == pytest.approx(7.0 + 3.0 * (2.0 - 7.0))
    assert not got.requires_grad


def test_without_guidance_nothing_is_computed() -> None:
    flow_map = FlowMap(ByLabel(1), get_path("linear"))
    assert Guidance(1.0).target(flow_map, torch.tensor([NULL]), torch.tensor([False])) is None


@pytest.mark.parametrize("objective", ["fm", "isd"])
def test_flow_matching_term_converges_to_guided_class_flows(objective: str) -> None:
    """Trained by the objective itself: the diagonal of every class, and of no class."""
    torch.manual_seed(0)
    times, w, n = 2, 2.0, 512
    net = ByLabel(times)
    flow_map = FlowMap(net, get_path("linear"))
    settings: dict[str, Any] = {"weight_power": 0.0, "sd_weight": 0.0} if objective == "isd" else {}
    loss = build_objective(objective, **settings)
    guidance = Guidance(w, dropout=0.3)
    optimizer = torch.optim.Adam(net.parameters(), lr=0.1)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 150)
    generator = torch.Generator().manual_seed(1)
    for _ in range(150):
        label = torch.randint(NULL, (n,), generator=generator)
        x = MEANS[label] + math.sqrt(Q2) * torch.randn(n, generator=generator, dtype=torch.float64)
        t = (torch.randint(times, (n,), generator=generator).double() + 0.5) / times
        z = torch.randn(n, 1, generator=generator, dtype=torch.float64)
        draws = guidance.draw(Draws(z, t, t), generator)
        null = torch.full_like(label, NULL)
        output = loss(
            flow_map,
            x[:, None],
            torch.where(draws.dropped, null, label),
            draws,
            progress=1.0,
            velocity_target=guidance.target(flow_map, null, draws.dropped),
        )
        optimizer.zero_grad()
        output.per_example.mean().backward()
        optimizer.step()
        schedule.step()
    net.requires_grad_(False)
    for i in range(times):
        t = torch.tensor([(i + 0.5) / times], dtype=torch.float64)
        for k, mean in enumerate(MEANS):
            # near the class's own points at that time
            x_t = ((1 - t) * mean)[:, None]
            u_null = net(x_t, t, t, torch.tensor([NULL]))
            # the null flow is the best line through a mixture, the class's own flow is a line
            expected = u_null + w * (class_velocity(x_t, t, mean.reshape(1)) - u_null)
            got = net(x_t, t, t, torch.tensor([k]))
            assert float(got) == pytest.approx(float(expected), abs=0.25), (i, k)


def test_dropped_labels_follow_the_generator_and_the_slice() -> None:
    guidance = Guidance(1.5, dropout=0.25)
    draws = Draws(torch.zeros(8000, 1), torch.rand(8000), torch.rand(8000))

    def draw(seed: int) -> LabelDraws:
        return guidance.draw(draws, torch.Generator().manual_seed(seed))

    first = draw(3)
    torch.manual_seed(99)  # the global generator has no say
    assert torch.equal(first.dropped, draw(3).dropped)
    assert not torch.equal(first.dropped, draw(4).dropped)
    assert float(first.dropped.double().mean()) == pytest.approx(0.25, abs=0.02)
    part = first.slice(100, 150)
    assert isinstance(part, LabelDraws)
    assert torch.equal(part.dropped, first.dropped[100:150])
    assert torch.equal(part.t, first.t[100:150])
    assert not Guidance(1.0, dropout=0.0).draw(draws, None).dropped.any()


@pytest.mark.parametrize(
    ("weight", "dropout", "message"),
    [
        (0.5, 0.1, "guidance=0.5 makes no sense: 1 is no guidance"),
        (-1.0, 0.1, "guidance=-1.0 makes no sense"),
        (math.nan, 0.1, "guidance=nan makes no sense"),
        (math.inf, 0.1, "guidance=inf makes no sense"),
        (100.0, 0.1, "choose 1 to 20"),
        (1.0, 1.0, "label_dropout=1.0 must be in [0, 1)"),
        (1.0, -0.1, "label_dropout=-0.1 must be in [0, 1)"),
        (2.0, 0.0, "guidance=2.0 needs samples without a label"),
    ],
)
def test_weights_that_make_no_sense(weight: float, dropout: float, message: str) -> None:
    with pytest.raises(ValueError) as caught:  # noqa: PT011  the message is what is tested
        Guidance(weight, dropout)
    assert message in str(caught.value)
