"""The encoder of low-dimensional observations: one small MLP over the whole history."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from typing import ClassVar

import torch
from torch import Tensor, nn

from cmpolicy.nn.registry import register_encoder
from cmpolicy.spec import PolicySpec


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

    def build(self, spec: PolicySpec) -> StateEncoder:
        """A fresh encoder of a policy's observations.

        Raises:
            ValueError: there are camera frames among them.
        """
        if spec.images:
            raise ValueError(
                f"encoder.kind=mlp takes no camera frames, and {list(spec.images)} are; choose "
                "encoder=compact or encoder=resnet18, or leave them out of data.obs"
            )
        return StateEncoder(self.dim, spec.obs, spec.n_obs_steps)


class StateEncoder(nn.Module):
    """Normalised observations (B, To, ...) per key, concatenated, to features (B, D)."""

    def __init__(self, dim: int, obs: Mapping[str, tuple[int, ...]], n_obs_steps: int) -> None:
        super().__init__()
        self.keys = tuple(obs)
        self.feature_dim = dim
        input_dim = sum(map(prod, obs.values())) * n_obs_steps
        self.mlp = nn.Sequential(nn.Linear(input_dim, dim), nn.Mish(), nn.Linear(dim, dim))

    def forward(self, obs: Mapping[str, Tensor]) -> Tensor:
        parts = [obs[key] for key in self.keys]
        steps = [part.flatten(2) if part.ndim > 2 else part.unsqueeze(2) for part in parts]
        features: Tensor = self.mlp(torch.cat(steps, dim=-1).flatten(1))
        return features
