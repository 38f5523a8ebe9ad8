"""Distributions in one and two dimensions whose velocity u(x, t) is known in closed form.

Everything is numpy, float64, on the linear path x_t = (1 - t) x + t z. Legend: N points, D
dimensions, K components; x (N, D); t (N,) in [0, 1]. Data has a spread of about .5 around 0, like
normalised actions.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray
from scipy.special import log_ndtr, logsumexp

from cmpolicy.schema import choose

Array = NDArray[np.float64]

#: Nodes of the quadrature over one box, used where the noise is wider than the box.
_NODES, _WEIGHTS = np.polynomial.legendre.leggauss(24)  # type: ignore[no-untyped-call]


class Target(Protocol):
    """What the study needs of a distribution."""

    @property
    def dim(self) -> int:
        """D."""

    def sample(self, n: int, rng: np.random.Generator) -> Array:
        """Draw n points (n, D)."""

    def velocity(self, x: Array, t: Array) -> Array:
        """u(x, t) = E[z - x_0 | x_t = x], (N, D)."""


@dataclass(frozen=True)
class Mixture:
    """Gaussians of one width: sum_k w_k N(mean_k, width^2).

    Args:
        means: (K, D).
        width: standard deviation of each.
    """

    means: tuple[tuple[float, ...], ...]
    width: float

    @property
    def dim(self) -> int:
        return len(self.means[0])

    def sample(self, n: int, rng: np.random.Generator) -> Array:
        means = np.asarray(self.means)
        chosen = means[rng.integers(len(means), size=n)]
        return chosen + self.width * rng.normal(size=chosen.shape)

    def velocity(self, x: Array, t: Array) -> Array:
        """See :class:`Target`; the mean of the components' velocities, by their posterior."""
        time = t[:, None]
        variance = (1 - time) ** 2 * self.width**2 + time**2
        means = np.asarray(self.means)
        offset = x[:, None] - (1 - time[..., None]) * means  # (N, K, D)
        logits = -0.5 * (offset**2).sum(-1) / variance
        posterior = np.exp(logits - logsumexp(logits, axis=1, keepdims=True))
        slope = (time - (1 - time) * self.width**2) / variance
        each = slope[..., None] * offset - means
        mixed: Array = np.einsum("nk,nkd->nd", posterior, each)
        return mixed


@dataclass(frozen=True)
class Gaussian(Mixture):
    """One component: its flow map is in closed form as well.

    X_{t->s}(x) = (1 - s) m + (sigma_s / sigma_t) (x - (1 - t) m).
    """

    def flow(self, x: Array, t: Array, s: Array) -> Array:
        """X_{t->s}(x), (N, D)."""
        mean = np.asarray(self.means[0])
        after, before = t[:, None], s[:, None]

        def spread(time: Array) -> Array:
            return np.sqrt((1 - time) ** 2 * self.width**2 + time**2)

        ratio = spread(before) / spread(after)
        moved: Array = (1 - before) * mean + ratio * (x - (1 - after) * mean)
        return moved


@dataclass(frozen=True)
class Boxes:
    """Equally likely boxes, uniform inside: sharp edges and, in two dimensions, a checkerboard.

    Args:
        corners: lower corners, (K, D).
        side: length of every edge.
    """

    corners: tuple[tuple[float, ...], ...]
    side: float

    @property
    def dim(self) -> int:
        return len(self.corners[0])

    def sample(self, n: int, rng: np.random.Generator) -> Array:
        corners = np.asarray(self.corners)
        chosen = corners[rng.integers(len(corners), size=n)]
        return chosen + self.side * rng.random(size=chosen.shape)

    def velocity(self, x: Array, t: Array) -> Array:
        """See :class:`Target`: (x - E[x_0 | x]) / t, whose limit at t = 0 is E[z] - x = -x."""
        lower = np.unique(np.asarray(self.corners))  # each axis sees few different intervals
        which = np.searchsorted(lower, np.asarray(self.corners))  # (K, D)
        mass, mean = _interval(x[..., None], np.maximum(t, 1e-12)[:, None, None], lower, self.side)
        axes = np.arange(self.dim)
        logits = mass[:, axes, which].sum(-1)  # (N, K)
        posterior = np.exp(logits - logsumexp(logits, axis=1, keepdims=True))
        expected = np.einsum("nk,nkd->nd", posterior, mean[:, axes, which])
        time = t[:, None]
        moved: Array = np.where(time < 1e-12, -x, (x - expected) / np.maximum(time, 1e-12))
        return moved


def _interval(x: Array, t: Array, lower: Array, side: float) -> tuple[Array, Array]:
    """Of x_0 uniform on each interval: log mass of x_t = x (up to a constant), E[x_0 | x_t = x].

    x_0 given x_t is a normal of mean x / (1 - t) and deviation t / (1 - t), cut to the interval.
    Where that is wider than the interval the closed form cancels, and a quadrature is exact.
    """
    shape = np.broadcast_shapes(x.shape, t.shape, lower.shape)
    x, t, lower = (np.broadcast_to(a, shape) for a in (x, t, lower))
    mass, mean = np.empty(shape), np.empty(shape)
    wide = t > 0.5
    if wide.any():
        nodes = lower[wide][:, None] + side * (_NODES + 1) / 2
        time = t[wide][:, None]
        logits = -0.5 * ((x[wide][:, None] - (1 - time) * nodes) / time) ** 2 + np.log(_WEIGHTS)
        total = logsumexp(logits, axis=1)
        mass[wide] = total - np.log(t[wide]) + np.log(side / 2)
        mean[wide] = (np.exp(logits - total[:, None]) * nodes).sum(1)
    if not wide.all():
        time, point, low = t[~wide], x[~wide], lower[~wide]
        middle, sigma = point / (1 - time), time / (1 - time)
        alpha, beta = (low - middle) / sigma, (low + side - middle) / sigma
        flip = alpha > 0  # by symmetry, so that the larger of the two tails is the smaller number
        first, second = np.where(flip, -beta, alpha), np.where(flip, -alpha, beta)
        log_second, log_first = log_ndtr(second), log_ndtr(first)
        log_z = log_second + np.log1p(-np.exp(log_first - log_second))
        half = 0.5 * np.log(2 * np.pi)
        edge = np.exp(-0.5 * beta**2 - half - log_z) - np.exp(-0.5 * alpha**2 - half - log_z)
        inside = middle - sigma * edge
        mass[~wide] = log_z + half - np.log(1 - time)
        mean[~wide] = np.clip(inside, low, low + side)
    return mass, mean


def _ring(count: int, radius: float) -> tuple[tuple[float, ...], ...]:
    angles = 2 * np.pi * np.arange(count) / count
    return tuple((float(radius * np.cos(a)), float(radius * np.sin(a))) for a in angles)


def _checkerboard() -> tuple[tuple[float, ...], ...]:
    cells = [(i, j) for i in range(4) for j in range(4) if (i + j) % 2 == 0]
    return tuple((-1 + 0.5 * i, -1 + 0.5 * j) for i, j in cells)


TARGETS: dict[str, Target] = {
    "gaussian1": Gaussian(((0.3,),), 0.4),
    "gaussian2": Gaussian(((0.3, -0.2),), 0.4),
    "mixture1": Mixture(((-0.7,), (0.5,)), 0.2),
    "mixture2": Mixture(_ring(4, 0.7), 0.2),
    "checkerboard1": Boxes(((-1.0,), (0.0,), (0.75,)), 0.25),
    "checkerboard2": Boxes(_checkerboard(), 0.5),
}


def get_target(name: str) -> Target:
    """The target of that name.

    Raises:
        ConfigError: an unknown name.
    """
    return choose(TARGETS, name, "target")
