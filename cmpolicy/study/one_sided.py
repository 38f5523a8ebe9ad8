"""iSD whose difference may not pass t = 1: what the study compares the package's own with."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from cmpolicy.flow.flow_map import FlowMap
from cmpolicy.flow.objectives import Isd
from cmpolicy.flow.path import expand_time


def one_sided_difference(
    flow_map: FlowMap, x: Tensor, t: Tensor, s: Tensor, u: Tensor, epsilon: float
) -> Tensor:
    """dF/dt along (u, 1, 0) on the linear path, with both points in [s, 1]; no gradient."""
    with torch.no_grad():
        after = (t + epsilon).clamp(max=1.0)
        before = torch.maximum(t - epsilon, s)
        up = flow_map.output(x + expand_time(after - t, x) * u, after, s)
        down = flow_map.output(x - expand_time(t - before, x) * u, before, s)
        return (up - down) / expand_time(after - before, x)


@dataclass(frozen=True)
class OneSidedIsd(Isd):
    """:class:`Isd` with a difference that stops at t = 1, where it is of first order."""

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
        """dF/dt along (tangent, 1, 0)."""
        return one_sided_difference(flow_map, x_t, t, s, tangent, self.epsilon)
