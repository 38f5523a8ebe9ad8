"""The encoder of low-dimensional observations: one small MLP over the whole history."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from typing import ClassVar

import torch
from torch import Tensor, nn

from cmpolicy.nn.registry import register_encoder


@register_encoder
@dataclass(frozen=True)
class StateEncoderConfig:
    """Size of a :class:`StateEncoder`.

    Args:
        dim: D, the size of the features, at least 1.

    Raises:
        ValueError: ``dim`` below 1.
    """

    kind: ClassVar[str] = "mlp"

    dim: int = 256

    def __post_init__(self) -> None:
        if self.dim < 1:
            raise ValueError(f"dim={self.dim} must be at least 1")

    @property
    def feature_dim(self) -> int:
        """D."""
        return self.dim

    def build(self, obs: Mapping[str, tuple[int, ...]], n_obs_steps: int) -> StateEncoder:
        """A fresh encoder of these keys."""
        return StateEncoder(self, sum(map(prod, obs.values())) * n_obs_steps, tuple(obs))


class StateEncoder(nn.Module):
    """Normalised observations (B, To, ...) per key, concatenated, to features (B, D)."""

    def __init__(self, config: StateEncoderConfig, input_dim: int, keys: tuple[str, ...]) -> None:
        super().__init__()
        self.keys = keys
        self.mlp = nn.Sequential(
            nn.Linear(input_dim, config.dim), nn.Mish(), nn.Linear(config.dim, config.dim)
        )

    def forward(self, obs: Mapping[str, Tensor]) -> Tensor:
        """See the class."""
        parts = [obs[key] for key in self.keys]
        steps = [part.flatten(2) if part.ndim > 2 else part.unsqueeze(2) for part in parts]
        features: Tensor = self.mlp(torch.cat(steps, dim=-1).flatten(1))
        return features
