"""What features of observations are trained to tell beside the objective (``data.targets``)."""

from __future__ import annotations

from math import prod

import torch
from torch import Tensor, nn


class TargetHead(nn.Module):
    """A linear reading of the features (B, D), compared with targets (B, *shape).

    Imitation hardly asks for precise places: the actions of demonstrations scatter by more than a
    wrong place costs. Reading known places off the features asks for them directly. Linear, so that
    the features themselves come to hold them.

    Args:
        feature_dim: D.
        shape: of one example's targets.
        weight: of the loss.
    """

    def __init__(self, feature_dim: int, shape: tuple[int, ...], weight: float) -> None:
        super().__init__()
        self.read = nn.Linear(feature_dim, prod(shape))
        self.weight = weight

    def forward(self, features: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """The weighted loss of every example (B,), and the root mean square error.

        The loss is the mean absolute error: unlike a squared one it still pulls at small errors.
        """
        error = self.read(features).float() - targets.flatten(1)
        with torch.no_grad():
            size = error.square().mean().sqrt()
        return self.weight * error.abs().mean(dim=1), size
