"""How the times t and s of a training step are drawn, and how a loss is weighted."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class TimeLaw:
    """Beta(a, b) on [0, 1]; (1, 1) is uniform. arXiv 2601.22679 uses (0.8, 1) for t and s.

    Raises:
        ValueError: a or b not positive.
    """

    a: float = 1.0
    b: float = 1.0

    def __post_init__(self) -> None:
        if not (self.a > 0 and self.b > 0):
            raise ValueError(f"Beta({self.a}, {self.b}) is no law: both numbers must be positive")

    def draw(self, n: int, generator: torch.Generator | None, device: torch.device) -> Tensor:
        """n times (n,), float32, in [0, 1]."""
        if self.b == 1.0:  # Beta(a, 1) has the closed inverse u^(1/a)
            u = torch.rand(n, generator=generator, device=device)
            return u.pow(1.0 / self.a) if self.a != 1.0 else u
        gammas = torch._standard_gamma(
            torch.tensor([[self.a], [self.b]], device=device).expand(2, n).contiguous(), generator
        )
        return gammas[0] / gammas.sum(0).clamp(min=torch.finfo(torch.float32).tiny)


def adaptive_weight(loss: Tensor, power: float, floor: float = 0.01) -> Tensor:
    """loss / stopgrad(loss + floor)^power per sample (B,); power 0 leaves the loss as it is."""
    if power == 0.0:
        return loss
    return loss / (loss.detach() + floor).pow(power)
