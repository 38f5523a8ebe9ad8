from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from cmpolicy.flow.flow_map import FlowMap
from cmpolicy.flow.path import PATHS
from cmpolicy.flow.sampler import SamplerKind, sample, time_grid, trajectory


class Recorder:
    """F = -features, and what it was asked."""

    def __init__(self) -> None:
        self.calls: list[tuple[float, float]] = []

    def __call__(self, x: Tensor, t: Tensor, s: Tensor, features: Tensor | None) -> Tensor:
        assert t.shape == s.shape == (len(x),)
        self.calls.append((t[0].item(), s[0].item()))
        return torch.zeros_like(x) if features is None else -features


def test_time_grid() -> None:
    assert time_grid(1).tolist() == [1.0, 0.0]
    assert time_grid(4, dtype=torch.float64).tolist() == [1.0, 0.75, 0.5, 0.25, 0.0]


def test_time_grid_with_a_floor() -> None:
    assert time_grid(2, floor=0.25).tolist() == [1.0, 0.25, 0.0]
    assert time_grid(4, dtype=torch.float64, floor=0.25).tolist() == [1.0, 0.75, 0.5, 0.25, 0.0]
    net = Recorder()
    sample(FlowMap(net, PATHS["linear"]), torch.zeros(1, 4, 2), nfe=2, floor=0.25)
    assert net.calls == [(1.0, 0.25), (0.25, 0.0)]
    with pytest.raises(ValueError, match="at least 2 evaluations, or no floor"):
        time_grid(1, floor=0.25)
    with pytest.raises(ValueError, match=r"must lie in \[0, 1\), got 1.5"):
        time_grid(4, floor=1.5)


@pytest.mark.parametrize("steps", [1, 2, 4])
def test_flow_map_sampler_asks_for_each_jump_once(steps: int) -> None:
    net = Recorder()
    z = torch.randn(3, 16, 2)
    sample(FlowMap(net, PATHS["linear"]), z, nfe=steps)
    grid = time_grid(steps).tolist()
    assert net.calls == list(itertools.pairwise(grid))


@pytest.mark.parametrize("steps", [1, 2, 4])
def test_diagonal_sampler_asks_for_velocities(steps: int) -> None:
    net = Recorder()
    z, features = torch.randn(2, 3, 16, 2)
    found = sample(FlowMap(net, PATHS["linear"]), z, features, nfe=steps, kind="diagonal")
    assert net.calls == [(t, t) for t in time_grid(steps).tolist()[:-1]]
    torch.testing.assert_close(found, z + features)


@pytest.mark.parametrize("kind", ["flow_map", "diagonal"])
def test_noise_is_left_alone(kind: SamplerKind) -> None:
    z = torch.randn(3, 4)
    before = z.clone()
    sample(FlowMap(Recorder(), PATHS["trigonometric"]), z, z + 1, nfe=3, kind=kind)
    assert torch.equal(z, before)


def test_bad_arguments() -> None:
    flow_map = FlowMap(Recorder(), PATHS["linear"])
    with pytest.raises(ValueError, match=r"evaluations.*at least 1, got 0"):
        sample(flow_map, torch.zeros(1, 2), nfe=0)
    with pytest.raises(ValueError, match=r"'heun'.*\['flow_map', 'diagonal'\]"):
        sample(flow_map, torch.zeros(1, 2), kind="heun")  # type: ignore[arg-type]


@pytest.mark.parametrize("kind", ["flow_map", "diagonal"])
def test_a_trajectory_starts_at_the_noise_and_ends_at_the_sample(kind: SamplerKind) -> None:
    z = torch.randn(5, 3, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)

    def net(x: Tensor, t: Tensor, s: Tensor, features: Tensor | None) -> Tensor:
        return 0.3 * x + (t + s)[:, None, None]

    flow_map = FlowMap(net, PATHS["linear"])
    states = trajectory(flow_map, z, nfe=3, kind=kind)
    assert states.shape == (4, 5, 3, 2)
    assert torch.equal(states[0], z)
    assert torch.equal(states[-1], sample(flow_map, z, nfe=3, kind=kind))
    assert not torch.equal(states[1], states[2])
