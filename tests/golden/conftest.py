"""Flows whose velocity and flow map are known exactly: what the learned ones are held against.

Data N(m, q^2) or a mixture of such; a path x_t = alpha x + beta z with flow time tau: t on the
linear path, theta = pi t / 2 on the trigonometric one. Derivatives are by tau.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from cmpolicy.flow.flow_map import FlowMap
from cmpolicy.flow.path import PATHS

HALF_PI = torch.pi / 2


def _column(t: Tensor) -> Tensor:
    return t[:, None]


class Gaussian(nn.Module):
    """F of the flow of N(m + features, q^2), per dimension, free of cancellation as s -> t.

    With y = x - alpha_t m, sigma^2 = alpha^2 q^2 + beta^2 and X = alpha_s m + sigma_s / sigma_t y:
    linear          F = (x - X) / (t - s)
                      = -m + (t + s - q^2 (2 - t - s)) / (sigma_t (sigma_t + sigma_s)) y
    trigonometric   F = (cos(d) x - X) / sin(d), d = theta_t - theta_s
                      = -sin(theta_t) m
                        + ((1 - q^2) sin(2 theta_t - d) - sin(d) sigma_t^2)
                          / (sigma_t (cos(d) sigma_t + sigma_s)) y
    ``bias`` and ``gain`` are parameters that are 0 at the true map, ``skew`` breaks it where s < t.
    """

    def __init__(self, path: str, mean: list[float], std: list[float]) -> None:
        super().__init__()
        self.path_name = path
        self.register_buffer("mean", torch.tensor(mean, dtype=torch.float64))
        self.register_buffer("std", torch.tensor(std, dtype=torch.float64))
        self.bias = nn.Parameter(torch.zeros(len(mean), dtype=torch.float64))
        self.gain = nn.Parameter(torch.zeros((), dtype=torch.float64))
        self.skew = nn.Parameter(torch.zeros((), dtype=torch.float64))

    def coefficients(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """alpha and beta, (B, 1)."""
        if self.path_name == "linear":
            return 1 - _column(t), _column(t)
        return torch.cos(HALF_PI * _column(t)), torch.sin(HALF_PI * _column(t))

    def sigma(self, t: Tensor) -> Tensor:
        alpha, beta = self.coefficients(t)
        return (alpha.square() * self.std.square() + beta.square()).sqrt()

    def center(self, features: Tensor | None) -> Tensor:
        return self.mean if features is None else self.mean + features

    def map(self, x: Tensor, t: Tensor, s: Tensor, features: Tensor | None = None) -> Tensor:
        """X_{t->s}(x), straight from the definition."""
        m = self.center(features)
        (a_t, _), (a_s, _) = self.coefficients(t), self.coefficients(s)
        return a_s * m + self.sigma(s) / self.sigma(t) * (x - a_t * m)

    def velocity(self, x: Tensor, t: Tensor, features: Tensor | None = None) -> Tensor:
        """u(x, t) by tau, from method.md on the linear path, by its derivative on the other."""
        m, q2 = self.center(features), self.std.square()
        alpha, beta = self.coefficients(t)
        y = x - alpha * m
        if self.path_name == "linear":
            return -m + (beta - alpha * q2) / self.sigma(t).square() * y
        return -beta * m + alpha * beta * (1 - q2) / self.sigma(t).square() * y

    def forward(self, x: Tensor, t: Tensor, s: Tensor, features: Tensor | None = None) -> Tensor:
        m, q2 = self.center(features), self.std.square()
        alpha, beta = self.coefficients(t)
        y, at_t, at_s = x - alpha * m, self.sigma(t), self.sigma(s)
        if self.path_name == "linear":
            both = _column(t + s)
            f = -m + (both - q2 * (2 - both)) / (at_t * (at_t + at_s)) * y
        else:
            d = HALF_PI * _column(t - s)
            top = (1 - q2) * torch.sin(2 * HALF_PI * _column(t) - d) - torch.sin(d) * at_t.square()
            f = -beta * m + top / (at_t * (torch.cos(d) * at_t + at_s)) * y
        off_diagonal = _column(t - s) * self.skew * torch.sin(3 * x)
        return f + self.bias + self.gain * x * _column(t) + off_diagonal


class Mixture(nn.Module):
    """F of a Gaussian mixture, from its closed-form u by the classical Runge-Kutta method.

    ``means`` (K, D), one ``std`` and equal weights. With ``steps`` steps X is right to about 1e-9.
    """

    def __init__(self, path: str, means: list[list[float]], std: float, steps: int = 200) -> None:
        super().__init__()
        self.path_name = path
        self.steps = steps
        self.std = std
        self.register_buffer("means", torch.tensor(means, dtype=torch.float64))

    def _coefficients(self, tau: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """alpha, beta and their derivatives by tau, (B, 1, 1)."""
        tau = tau[:, None, None]
        if self.path_name == "linear":
            return 1 - tau, tau, -torch.ones_like(tau), torch.ones_like(tau)
        return torch.cos(tau), torch.sin(tau), -torch.sin(tau), torch.cos(tau)

    def velocity_by_tau(self, x: Tensor, tau: Tensor) -> Tensor:
        """u = sum_k r_k(x) (alpha' m_k + (alpha alpha' q^2 + beta beta') / sigma^2 y_k).

        y_k = x - alpha m_k; r_k = softmax_k(-|y_k|^2 / (2 sigma^2)) is the posterior weight.
        """
        alpha, beta, d_alpha, d_beta = self._coefficients(tau)
        y = x[:, None] - alpha * self.means  # (B, K, D)
        var = alpha.square() * self.std**2 + beta.square()
        weight = torch.softmax(-y.square().sum(-1) / (2 * var[..., 0]), dim=1)
        part = d_alpha * self.means + (alpha * d_alpha * self.std**2 + beta * d_beta) / var * y
        return (weight[..., None] * part).sum(1)

    def map(self, x: Tensor, t: Tensor, s: Tensor) -> Tensor:
        """X_{t->s}(x)."""
        rate = PATHS[self.path_name].rate
        tau, h = t * rate, (s - t) * rate / self.steps
        for _ in range(self.steps):
            k1 = self.velocity_by_tau(x, tau)
            k2 = self.velocity_by_tau(x + _column(h) / 2 * k1, tau + h / 2)
            k3 = self.velocity_by_tau(x + _column(h) / 2 * k2, tau + h / 2)
            k4 = self.velocity_by_tau(x + _column(h) * k3, tau + h)
            x = x + _column(h) / 6 * (k1 + 2 * k2 + 2 * k3 + k4)
            tau = tau + h
        return x

    def forward(self, x: Tensor, t: Tensor, s: Tensor, features: Tensor | None = None) -> Tensor:
        """F of X where s < t; u on the diagonal."""
        rate = PATHS[self.path_name].rate
        if torch.equal(t, s):
            return self.velocity_by_tau(x, t * rate)
        jump = _column(t - s) * rate
        if self.path_name == "linear":
            return (x - self.map(x, t, s)) / jump
        return (torch.cos(jump) * x - self.map(x, t, s)) / torch.sin(jump)

    def cdf(self, x: Tensor, t: Tensor) -> Tensor:
        """Of x_t, for D = 1: what a flow in one dimension keeps."""
        alpha, beta, _, _ = self._coefficients(t * PATHS[self.path_name].rate)
        std = (alpha.square() * self.std**2 + beta.square()).sqrt()
        return torch.special.ndtr((x[:, None] - alpha * self.means) / std).mean(1)


@dataclass(frozen=True)
class Case:
    """A flow map around a closed form, and points at which to hold it to account."""

    net: Any
    flow_map: FlowMap
    x_t: Tensor  # (B, D)
    t: Tensor  # (B,), s + 0.05 <= t <= 0.95: differences of step 0.01 are central
    s: Tensor
    features: Tensor


@pytest.fixture(params=["linear", "trigonometric"])
def gaussian(request: pytest.FixtureRequest) -> Case:
    path: str = request.param
    net = Gaussian(path, mean=[0.7, -1.2], std=[0.4, 1.8])
    generator = torch.Generator().manual_seed(7)
    n = 256
    pair = torch.rand(2, n, generator=generator, dtype=torch.float64) * 0.9
    t, s = pair.max(0).values + 0.05, pair.min(0).values
    features = torch.randn(n, 2, generator=generator, dtype=torch.float64)
    x_t = torch.randn(n, 2, generator=generator, dtype=torch.float64) * 1.5
    return Case(net, FlowMap(net, PATHS[path]), x_t, t, s, features)


@pytest.fixture
def gaussian_flow() -> type[Gaussian]:
    return Gaussian


@pytest.fixture
def mixture_flow() -> type[Mixture]:
    return Mixture
