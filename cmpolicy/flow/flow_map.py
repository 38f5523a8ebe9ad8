"""The flow map X_{t->s}, its diagonal (the velocity) and its derivative along the flow."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor, nn

from cmpolicy.flow.path import Path, expand_time

#: F(x_t (B, ...), t (B,), s (B,), features (B, ...) or None) -> (B, ...)
Network = Callable[[Tensor, Tensor, Tensor, Tensor | None], Tensor]
Derivative = Literal["jvp", "difference"]


class FlowMap(nn.Module):
    """X_{t->s}(x_t) = path.jump(x_t, F(x_t, t, s)): the identity at s = t by construction.

    Args:
        net: any callable ``F(x, t, s, features)``; an ``nn.Module`` is registered.
        path: the interpolant, see :mod:`cmpolicy.flow.path`.
    """

    def __init__(self, net: Network, path: Path) -> None:
        super().__init__()
        self.net = net
        self.path = path

    def forward(self, x: Tensor, t: Tensor, s: Tensor, features: Tensor | None = None) -> Tensor:
        """Jump from time t to time s <= t in one evaluation. x (B, ...), t and s (B,)."""
        return self.path.jump(x, self.output(x, t, s, features), t, s)

    def output(self, x: Tensor, t: Tensor, s: Tensor, features: Tensor | None = None) -> Tensor:
        """F(x, t, s) in the precision of x, so that autocast ends where the path algebra begins."""
        return self.net(x, t, s, features).to(x.dtype)

    def velocity(self, x: Tensor, t: Tensor, features: Tensor | None = None) -> Tensor:
        """u(x, t) = F(x, t, t), the tangent condition. By flow time, see ``path.rate``."""
        return self.output(x, t, t, features)


def derivative_jvp(
    flow_map: FlowMap,
    x: Tensor,
    t: Tensor,
    s: Tensor,
    features: Tensor | None,
    u: Tensor,
    *,
    keep_gradient: bool = False,
) -> Tensor:
    """dF/dtau along (u, 1, 0) by forward-mode differentiation: exact.

    The network's t moves by 1/rate while flow time moves by 1. No gradient is kept unless asked.
    Autocast is left: forward-mode differentiation through it mixes two types of numbers.
    """
    with _gradient(keep_gradient), exactly(x):
        derivative: Tensor = torch.func.jvp(
            lambda x_, t_: flow_map.output(x_, t_, s, features),
            (x, t),
            (u, torch.full_like(t, 1.0 / flow_map.path.rate)),
        )[1]
    return derivative


def derivative_difference(
    flow_map: FlowMap,
    x: Tensor,
    t: Tensor,
    s: Tensor,
    features: Tensor | None,
    u: Tensor,
    epsilon: float = 0.005,
    lowest: Tensor | None = None,
    *,
    keep_gradient: bool = False,
) -> Tensor:
    """dF/dtau by the central difference of step ``epsilon`` in t, both points in one batch.

    Points stay above ``lowest`` (B,), which is s where it is not given: near it the difference is
    one-sided (arXiv 2601.22679 ships the difference). They may pass t = 1, where path and time
    features go on smoothly, so that the difference is central at t = 1, the one time that one-step
    sampling asks for. No gradient is kept unless asked. Autocast is left: in bfloat16 the two
    points cannot be told apart (0.4 % relative precision against a step of 0.005).
    """
    with _gradient(keep_gradient), exactly(x):
        rate = flow_map.path.rate
        after = t + epsilon
        before = torch.maximum(t - epsilon, s if lowest is None else lowest)
        points = torch.cat(
            [
                x + expand_time((after - t) * rate, x) * u,
                x - expand_time((t - before) * rate, x) * u,
            ]
        )
        doubled = None if features is None else torch.cat([features, features])
        f = flow_map.output(points, torch.cat([after, before]), torch.cat([s, s]), doubled)
        f_after, f_before = f.chunk(2)
        return (f_after - f_before) / expand_time((after - before) * rate, x)


def exactly(like: Tensor) -> torch.autocast:
    """Leaves autocast, where outputs are compared that bfloat16 cannot tell apart."""
    return torch.autocast(like.device.type, enabled=False)


def _gradient(keep: bool) -> torch.set_grad_enabled:
    """Grad mode inside of a derivative; where it is off already it stays off."""
    return torch.set_grad_enabled(keep and torch.is_grad_enabled())
