"""Encoder of a low-dimensional observation history."""

from __future__ import annotations

from torch import Tensor, nn


class ObsEncoder(nn.Module):
    """Normalised observation history, flattened (B, To * D), to features (B, dim)."""

    def __init__(self, input_dim: int, dim: int) -> None:
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(input_dim, dim), nn.Mish(), nn.Linear(dim, dim))

    def forward(self, obs: Tensor) -> Tensor:
        """(B, To * D) to (B, dim)."""
        features: Tensor = self.mlp(obs)
        return features
