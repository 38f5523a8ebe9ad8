"""Pixels as they are stored and as the network sees them."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor


def from_uint8(images: Tensor) -> Tensor:
    """uint8 of any shape to float32 in [-1, 1]."""
    return images.float() / 127.5 - 1.0


def to_uint8(images: Tensor) -> Tensor:
    """Floats of any shape in [-1, 1] to uint8, rounded; what lies outside is clipped."""
    return (images.float() * 127.5 + 127.5).round().clamp(0, 255).to(torch.uint8)


def as_pictures(images: Tensor) -> npt.NDArray[np.uint8]:
    """A network's (N, C, H, W) in [-1, 1] to (N, H, W, C) uint8 on the host."""
    return to_uint8(images).permute(0, 2, 3, 1).contiguous().cpu().numpy()


def as_input(pictures: npt.NDArray[np.uint8]) -> Tensor:
    """(N, H, W, C) uint8 to what a network sees: (N, C, H, W) float32 in [-1, 1]."""
    return from_uint8(torch.from_numpy(np.ascontiguousarray(pictures)).permute(0, 3, 1, 2))
