"""A small network, trained from scratch on a 2-D Gaussian, finds the closed-form one-step map."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from cmpolicy.flow.flow_map import FlowMap
from cmpolicy.flow.objectives import build_objective
from cmpolicy.flow.path import PATHS
from cmpolicy.flow.sampler import sample

MEAN, STD = [0.5, -0.3], [0.5, 1.0]


class Mlp(nn.Module):
    """F(x, t, s) in two dimensions."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Linear(4, 64), nn.SiLU(), nn.Linear(64, 64), nn.SiLU(), nn.Linear(64, 2)
        )

    def forward(self, x: Tensor, t: Tensor, s: Tensor, features: Tensor | None) -> Tensor:
        f: Tensor = self.layers(torch.cat([x, t[:, None], (t - s)[:, None]], dim=1))
        return f


def _train(objective: str, path: str, steps: int = 300, **settings: Any) -> FlowMap:
    torch.manual_seed(0)
    flow_map = FlowMap(Mlp(), PATHS[path])
    loss = build_objective(objective, **settings)
    optimizer = torch.optim.Adam(flow_map.parameters(), lr=5e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    generator = torch.Generator().manual_seed(1)
    cpu = torch.device("cpu")
    for step in range(steps):
        x = torch.tensor(MEAN) + torch.tensor(STD) * torch.randn(256, 2, generator=generator)
        draws = loss.draw(256, (2,), generator, cpu)
        output = loss(flow_map, x, None, draws, progress=step / steps)
        optimizer.zero_grad()
        output.per_example.mean().backward()
        optimizer.step()
        schedule.step()
    return flow_map


@torch.no_grad()
def _one_step_error(flow_map: FlowMap, kind: Any, path: str, gaussian_flow: Any) -> float:
    """Root mean square error of one evaluation, in units of the data's standard deviation."""
    z = torch.randn(2000, 2, generator=torch.Generator().manual_seed(2))
    one, zero = torch.ones(2000), torch.zeros(2000)
    truth = gaussian_flow(path, MEAN, STD).map(z.double(), one.double(), zero.double())
    error = (sample(flow_map, z, kind=kind) - truth) / torch.tensor(STD)
    return float(error.square().mean().sqrt())


@pytest.mark.parametrize("path", ["linear", "trigonometric"])
def test_isd_finds_the_map_and_beats_flow_matching(path: str, gaussian_flow: Any) -> None:
    isd = _train("isd", path, weight_power=0.0)
    fm = _train("fm", path)
    error_isd = _one_step_error(isd, "flow_map", path, gaussian_flow)
    error_fm = _one_step_error(fm, "diagonal", path, gaussian_flow)
    assert error_isd < 0.25
    assert error_fm > 0.8  # its one step is the mean
    # while many steps along its diagonal are right: the data's spread is there
    z = torch.randn(2000, 2, generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        std = sample(fm, z, nfe=50, kind="diagonal").std(dim=0)
    torch.testing.assert_close(std, torch.tensor(STD), rtol=0.2, atol=0)
