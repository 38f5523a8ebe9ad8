"""What objectives of F(x_t, t, s) share: how t and s are drawn, how dF/dt is taken."""

from __future__ import annotations

from dataclasses import dataclass
from typing import get_args

import torch
from torch import Tensor

from cmpolicy.flow.flow_map import Derivative, FlowMap, derivative_difference, derivative_jvp
from cmpolicy.flow.objectives.objective import Draws, Objective, check_choice, check_shares
from cmpolicy.flow.times import TimeLaw

#: Where a jump is shorter than this in t, the output that makes it is a quotient of two roundings.
MIN_JUMP = 1e-3


@dataclass(frozen=True)
class TwoTimes(Objective):
    """t and s are sorted independent draws; a share of them is moved to the ends.

    Args:
        zero_share: share of the examples that jump all the way to s = 0, in [0, 1].
        one_share: share of the examples whose t is 1 exactly, where one-step sampling begins, in
            [0, 1].
        time_a, time_b: t and s ~ Beta(time_a, time_b), the larger is t.
    """

    zero_share: float = 0.5  # the paper has 0
    one_share: float = 0.25  # the paper has 0
    time_a: float = 0.8
    time_b: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_shares(self, "zero_share", "one_share")
        TimeLaw(self.time_a, self.time_b)

    def draw(
        self,
        batch_size: int,
        shape: tuple[int, ...],
        generator: torch.Generator | None,
        device: torch.device,
    ) -> Draws:
        law = TimeLaw(self.time_a, self.time_b)
        first = law.draw(batch_size, generator, device)
        second = law.draw(batch_size, generator, device)
        t, s = torch.maximum(first, second), torch.minimum(first, second)
        if self.zero_share:
            s = s.masked_fill(_chosen(self.zero_share, s, generator), 0.0)
        if self.one_share:
            t = t.masked_fill(_chosen(self.one_share, t, generator), 1.0)
        z = torch.randn(batch_size, *shape, generator=generator, device=device)
        return Draws(z, t, s)


def _chosen(share: float, like: Tensor, generator: torch.Generator | None) -> Tensor:
    return torch.rand(len(like), generator=generator, device=like.device) < share


@dataclass(frozen=True)
class Eulerian(TwoTimes):
    """Objectives that contain dF/dt along the flow.

    Args:
        derivative: ``difference`` (central, step ``epsilon``) or ``jvp`` (exact).
        epsilon: step of the difference in t, in (0, 0.5).
    """

    derivative: Derivative = "difference"
    epsilon: float = 0.02  # the paper has 0.005

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice(self, "derivative", get_args(Derivative))
        if not 0 < self.epsilon < 0.5:
            raise ValueError(f"objective.epsilon={self.epsilon} must lie in (0, 0.5)")

    def along(
        self,
        flow_map: FlowMap,
        x_t: Tensor,
        t: Tensor,
        s: Tensor,
        features: Tensor | None,
        tangent: Tensor,
        *,
        lowest: Tensor | None = None,
        keep_gradient: bool = False,
    ) -> Tensor:
        """dF/dt along (tangent, 1, 0), by the way that was chosen."""
        point = (flow_map, x_t, t, s, features, tangent)
        if self.derivative == "jvp":
            return derivative_jvp(*point, keep_gradient=keep_gradient)
        return derivative_difference(*point, self.epsilon, lowest, keep_gradient=keep_gradient)
