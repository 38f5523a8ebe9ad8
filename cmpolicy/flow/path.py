"""Interpolants between data (t = 0) and noise (t = 1), and the flow-map algebra of each.

Legend: x data, z noise, F network output, u velocity, D derivative of F along the flow; all
(B, ...). t and s are (B,) with 0 <= s <= t <= 1. Equations: arXiv 2601.22679 and its trigonometric
counterpart; one table of them stands in each class.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor


@dataclass(frozen=True)
class PathSample:
    """A point on the path and its conditional velocity, both (B, ...)."""

    x_t: Tensor
    velocity: Tensor


def expand_time(t: Tensor, like: Tensor) -> Tensor:
    """(B,) to (B, 1, ..., 1), ready to multiply ``like`` (B, ...)."""
    return t.reshape(t.shape + (1,) * (like.ndim - t.ndim))


class Path(Protocol):
    """What a path provides. Velocities and derivatives are by *flow time* tau = rate * t."""

    @property
    def rate(self) -> float:
        """d tau / d t: flow time that passes while the network's t goes from 0 to 1."""

    def sample(self, x: Tensor, z: Tensor, t: Tensor) -> PathSample:
        """x_t and d x_t / d tau."""

    def jump(self, x_t: Tensor, f: Tensor, t: Tensor, s: Tensor) -> Tensor:
        """X_{t->s}(x_t) from the network output F(x_t, t, s)."""

    def output_of(self, x_t: Tensor, x_s: Tensor, t: Tensor, s: Tensor) -> Tensor:
        """The network output F that jumps from x_t to x_s: the inverse of :meth:`jump`, t > s."""

    def residual(
        self, f: Tensor, u: Tensor, d: Tensor, x_t: Tensor, t: Tensor, s: Tensor
    ) -> Tensor:
        """The Eulerian residual, zero where F is the flow map of u, finite for every t and s."""


@dataclass(frozen=True)
class LinearPath:
    """x_t = (1 - t) x + t z, v_t = z - x, X_{t->s} = x_t - (t - s) F, F = u - (t - s) dF/dt."""

    rate: float = 1.0

    def sample(self, x: Tensor, z: Tensor, t: Tensor) -> PathSample:
        velocity = z - x
        return PathSample(x + expand_time(t, x) * velocity, velocity)

    def jump(self, x_t: Tensor, f: Tensor, t: Tensor, s: Tensor) -> Tensor:
        return x_t - expand_time(t - s, x_t) * f

    def output_of(self, x_t: Tensor, x_s: Tensor, t: Tensor, s: Tensor) -> Tensor:
        return (x_t - x_s) / expand_time(t - s, x_t)

    def residual(
        self, f: Tensor, u: Tensor, d: Tensor, x_t: Tensor, t: Tensor, s: Tensor
    ) -> Tensor:
        """u - (t - s) D - F."""
        return u - expand_time(t - s, x_t) * d - f


@dataclass(frozen=True)
class TrigonometricPath:
    """x_t = cos(th) x + sin(th) z with th = pi t / 2; v, u and D are by th.

    X_{t->s} = cos(d) x_t - sin(d) F with d = (t - s) pi / 2;
    identity cos(d) (u - F) = sin(d) (x_t + dF/dth).
    """

    rate: float = math.pi / 2

    def sample(self, x: Tensor, z: Tensor, t: Tensor) -> PathSample:
        theta = expand_time(t, x) * self.rate
        cos, sin = torch.cos(theta), torch.sin(theta)
        return PathSample(cos * x + sin * z, cos * z - sin * x)

    def jump(self, x_t: Tensor, f: Tensor, t: Tensor, s: Tensor) -> Tensor:
        delta = expand_time(t - s, x_t) * self.rate
        return torch.cos(delta) * x_t - torch.sin(delta) * f

    def output_of(self, x_t: Tensor, x_s: Tensor, t: Tensor, s: Tensor) -> Tensor:
        delta = expand_time(t - s, x_t) * self.rate
        return (torch.cos(delta) * x_t - x_s) / torch.sin(delta)

    def residual(
        self, f: Tensor, u: Tensor, d: Tensor, x_t: Tensor, t: Tensor, s: Tensor
    ) -> Tensor:
        """cos(d) (u - F) - sin(d) (x_t + D): no tangent, so nothing blows up at d = pi / 2."""
        delta = expand_time(t - s, x_t) * self.rate
        return torch.cos(delta) * (u - f) - torch.sin(delta) * (x_t + d)


PATHS: dict[str, Path] = {"linear": LinearPath(), "trigonometric": TrigonometricPath()}


def get_path(name: str) -> Path:
    """The path of that name.

    Raises:
        ValueError: an unknown name, with the known ones.
    """
    try:
        return PATHS[name]
    except KeyError:
        raise ValueError(f"unknown path {name!r}; choose one of {sorted(PATHS)}") from None
