"""Embedding of the two times a flow map is asked about."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

#: Frequencies of the features of t and of t - s, in quarter turns over [0, 1]. Bounded, since the
#: objective differentiates by t: a feature cos(w t) enters dF/dt with factor w (see also Lu and
#: Song 2024, "Simplifying, stabilizing and scaling continuous-time consistency models", on time
#: embeddings). t - s gets the lower ones: F(x, t, s) departs slowly from its diagonal.
MIN_FREQUENCY, MAX_FREQUENCY_T, MAX_FREQUENCY_DELTA = 0.5, 16.0, 4.0


def check_time_dim(dim: int) -> None:
    """Raise ValueError unless the features of two times, sine and cosine each, fill ``dim``."""
    if dim < 8 or dim % 4:
        raise ValueError(f"time_dim={dim} must be a multiple of 4, at least 8")


class TwoTimeEmbedding(nn.Module):
    """t (B,) and t - s (B,) in [0, 1] to (B, dim): sines, cosines, and a small MLP."""

    frequencies: Tensor

    def __init__(self, dim: int) -> None:
        super().__init__()
        check_time_dim(dim)
        exponents = torch.linspace(0, 1, dim // 4)
        highest = torch.tensor([[MAX_FREQUENCY_T], [MAX_FREQUENCY_DELTA]])
        frequencies = MIN_FREQUENCY * (highest / MIN_FREQUENCY) ** exponents  # (2, dim / 4)
        self.register_buffer("frequencies", frequencies * math.pi / 2, persistent=False)
        self.mlp = nn.Sequential(nn.Linear(dim, 2 * dim), nn.Mish(), nn.Linear(2 * dim, dim))

    def forward(self, t: Tensor, s: Tensor) -> Tensor:
        """Features of t and of t - s, so that the diagonal s = t is one constant input."""
        angles = torch.stack([t, t - s], dim=1)[..., None] * self.frequencies
        features = torch.cat([angles.sin(), angles.cos()], dim=-1).flatten(1)
        embedded: Tensor = self.mlp(features)
        return embedded
