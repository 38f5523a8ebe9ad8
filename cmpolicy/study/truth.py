"""The flow map X_{t->s} of a target, by an ODE solver of order eight in float64."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from scipy.integrate import solve_ivp

from cmpolicy.study.targets import Array, Gaussian, Target, get_target

#: Where the velocity of a target with sharp edges is no longer smooth; the rest is one step.
_SMALLEST_TIME = 1e-6
_GROUPS, _TOLERANCE = 8, 1e-9  # of points solved together; of the solver, absolute and relative
#: Points whose way through the flow is known.
TRUTH_POINTS = 1024


def flow(target: Target, x: Array, t: Array, s: Array) -> Array:
    """X_{t->s}(x), (N, D), of every point with times of its own.

    Each point goes from its t to its s while a common clock goes from 0 to 1; those with similar
    times are solved together. The solver is scipy's DOP853.

    Args:
        target: what flows.
        x: (N, D).
        t, s: (N,), s <= t.

    Raises:
        RuntimeError: the solver gave up.
    """
    if isinstance(target, Gaussian):
        return target.flow(x, t, s)
    found = np.empty_like(x)
    for group in np.array_split(np.argsort(s, kind="stable"), min(_GROUPS, len(x))):
        found[group] = _solve(target, x[group], t[group], s[group])
    return found


def _solve(target: Target, x: Array, t: Array, s: Array) -> Array:
    """In the clock r, log time: t^(1 - r) s^r, so that small times get small steps."""
    start, end = np.maximum(t, _SMALLEST_TIME), np.maximum(s, _SMALLEST_TIME)
    rate = np.log(end / start)

    def speed(r: float, flat: Array) -> Array:
        time = start * np.exp(rate * r)
        moved: Array = target.velocity(flat.reshape(x.shape), time)
        return (moved * (time * rate)[:, None]).ravel()

    solution = solve_ivp(
        speed, (0, 1), x.ravel(), method="DOP853", rtol=_TOLERANCE, atol=_TOLERANCE
    )
    if not solution.success:
        raise RuntimeError(f"the flow of {target} could not be solved: {solution.message}")
    arrived: Array = solution.y[:, -1].reshape(x.shape)
    rest = (end - s)[:, None]  # what the smallest time left over
    return arrived - rest * np.where(rest > 0, target.velocity(arrived, end), 0.0)


@dataclass(frozen=True)
class Truth:
    """Points of the true flow that every run is measured on.

    z (N, D) noise and end (N, D) its X_{1->0}; x_t (N, D) on the path at time t with X_{t->s} and
    X_{t->0} in x_s and x_0; velocity u(x_t, t) (N, D).
    """

    z: Array
    end: Array
    x_t: Array
    t: Array
    s: Array
    x_s: Array
    x_0: Array
    velocity: Array

    @property
    def spread(self) -> float:
        """Standard deviation of the end points, root mean square over dimensions."""
        return float(np.sqrt(self.end.var(axis=0).mean()))


def make_truth(name: str, points: int = TRUTH_POINTS) -> Truth:
    """Of the target ``name``; the same for every run.

    Raises:
        ConfigError: an unknown target.
    """
    target = get_target(name)
    rng = np.random.default_rng([0, 1])
    z, x, noise = (
        rng.normal(size=(points, target.dim)),
        target.sample(points, rng),
        rng.normal(size=(points, target.dim)),
    )
    times = np.sort(rng.uniform(0.02, 1, size=(points, 2)), axis=1)
    s, t = times.T.copy()
    x_t = (1 - t)[:, None] * x + t[:, None] * noise
    one, zero = np.ones(points), np.zeros(points)
    return Truth(
        z,
        flow(target, z, one, zero),
        x_t,
        t,
        s,
        flow(target, x_t, t, s),
        flow(target, x_t, t, zero),
        target.velocity(x_t, t),
    )
