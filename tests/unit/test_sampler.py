from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor

from cmpolicy.flow.flow_map import FlowMap
from cmpolicy.flow.path import PATHS
from cmpolicy.flow.sampler import (
    MIP_TIME,
    SamplerKind,
    check_sampler,
    get_sampler,
    sample,
    time_grid,
    trajectory,
)


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
    with pytest.raises(ValueError, match=r"nfe=0.*evaluations.*at least 1"):
        sample(flow_map, torch.zeros(1, 2), nfe=0)
    with pytest.raises(ValueError, match=r"'heun'.*\['flow_map', 'diagonal', "):
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


# -- those of other objectives ------------------------------------------------------------------


@pytest.mark.parametrize("path", sorted(PATHS))
def test_restart_begins_anew_from_noised_data(path: str) -> None:
    """Jumps to 0 only; in between the data is noised afresh, each time with the next draw."""
    net, flow_path = Recorder(), PATHS[path]
    z, features = torch.randn(3, 4, 8, 2), torch.randn(3, 8, 2)
    found = sample(FlowMap(net, flow_path), z, features, nfe=4, kind="restart")
    assert net.calls == [(t, 0.0) for t in (1.0, 0.75, 0.5, 0.25)]
    x, zero = z[:, 0], torch.zeros(3)
    for i, (t, s) in enumerate(itertools.pairwise((1.0, 0.75, 0.5, 0.25, 0.0))):
        x = flow_path.jump(x, -features, torch.full((3,), t), zero)
        if s:
            x = flow_path.sample(x, z[:, i + 1], torch.full((3,), s)).x_t
    torch.testing.assert_close(found, x)


@pytest.mark.parametrize("path", sorted(PATHS))
def test_regression_and_two_passes_know_no_noise(path: str) -> None:
    asked: list[Tensor] = []

    def net(x: Tensor, t: Tensor, s: Tensor, features: Tensor | None) -> Tensor:
        asked.append(x)
        return x + 1

    flow_map = FlowMap(net, PATHS[path])
    z = torch.randn(3, 4)
    assert torch.equal(sample(flow_map, z, kind="regression"), torch.ones(3, 4))
    assert torch.equal(asked.pop(), torch.zeros(3, 4))
    found = sample(flow_map, z, nfe=2, kind="mip")
    near = torch.full((3,), MIP_TIME)
    second = PATHS[path].sample(torch.ones(3, 4), torch.zeros(3, 4), near).x_t
    torch.testing.assert_close(asked[1], second)
    torch.testing.assert_close(found, second + 1)


@pytest.mark.parametrize(("kind", "nfe"), [("ddpm", 100), ("ddpm", 10), ("ddim", 10), ("ddim", 7)])
def test_diffusion_steps_are_those_of_diffusers(kind: SamplerKind, nfe: int) -> None:
    from diffusers.schedulers.scheduling_ddim import DDIMScheduler
    from diffusers.schedulers.scheduling_ddpm import DDPMScheduler

    def net(x: Tensor, t: Tensor, s: Tensor, features: Tensor | None) -> Tensor:
        return torch.sin(3 * x) * (0.5 + t.reshape(-1, 1, 1)) + 0.1

    count = get_sampler(kind).n_noises(nfe)
    assert count == (nfe if kind == "ddpm" else 1)
    generator = torch.Generator().manual_seed(0)
    z = torch.randn(3, count, 8, 2, generator=generator, dtype=torch.float64)
    given = z if count > 1 else z[:, 0]
    found = sample(FlowMap(net, PATHS["linear"]), given, nfe=nfe, kind=kind)

    cls = DDPMScheduler if kind == "ddpm" else DDIMScheduler
    scheduler = cls(100, beta_schedule="squaredcos_cap_v2", clip_sample=True)
    scheduler.alphas_cumprod = scheduler.alphas_cumprod.double()
    scheduler.set_timesteps(nfe)
    x = z[:, 0]
    for i, k in enumerate(scheduler.timesteps):
        f = net(x, (k / 100).double().expand(3), torch.zeros(3), None)
        x = (
            scheduler.step(f, k, x).prev_sample
            if kind == "ddim"
            else _ancestral(scheduler, f, k, x, z[:, i + 1] if i + 1 < nfe else None)
        )
    torch.testing.assert_close(found, x, rtol=1e-4, atol=1e-5)


def _ancestral(scheduler: Any, f: Tensor, k: Tensor, x: Tensor, noise: Tensor | None) -> Tensor:
    """One DDPM step of diffusers, its noise given: the mean is the step's with none."""
    scheduler.variance_noise = None
    zero = torch.Generator().manual_seed(0)
    drawn = torch.randn(x.shape, generator=zero, dtype=x.dtype)
    stepped: Tensor = scheduler.step(
        f, k, x, generator=torch.Generator().manual_seed(0)
    ).prev_sample
    if noise is None:
        return stepped
    std = scheduler._get_variance(int(k)).sqrt()
    return stepped + std * (noise - drawn)


@pytest.mark.parametrize(
    ("kind", "nfe", "words"),
    [
        ("regression", 2, "nfe=2.*exactly 1"),
        ("mip", 1, "nfe=1.*exactly 2"),
        ("ddpm", 101, "nfe=101.*or all 100"),
        ("ddim", 0, "nfe=0.*1 to 50"),
        ("ddim", 60, "nfe=60.*1 to 50"),  # it would start half-way, at noise taken for data
        ("restart", 0, "nfe=0.*at least 1"),
    ],
)
def test_evaluations_that_a_sampler_cannot_do(kind: SamplerKind, nfe: int, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        get_sampler(kind).grid(nfe)
    if kind != "restart":
        with pytest.raises(ValueError, match=r"time_floor=0.1.*only"):
            get_sampler(kind).grid(2, floor=0.1)


def test_a_sampler_goes_with_what_the_network_predicts() -> None:
    check_sampler("restart", "flow_map")
    check_sampler("ddim", "ddpm")
    for kind, own in (("ddim", "flow_map"), ("flow_map", "mip"), ("regression", "ddpm")):
        with pytest.raises(ValueError, match=f"sampler={kind}.*predicts the .*choose one of"):
            check_sampler(kind, own)
