"""The discrete diffusion of Diffusion Policy: its schedule, and one step back along it.

Diffusers' ``DDPMScheduler`` and ``DDIMScheduler`` with ``squaredcos_cap_v2``, 100 steps,
``clip_sample`` and the prediction of the noise compute the same (a test compares them); here the
noise of each step is an input, so that a decision is a function of its noise wherever it runs.

Legend: a_k the product of 1 - beta up to step k, t = k / 100 in [0, 0.99], x (B, ...), t (B,).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from cmpolicy.flow.path import expand_time

#: Steps of the diffusion that is trained.
STEPS = 100
_OFFSET = 0.008
_START = math.cos(_OFFSET / (1 + _OFFSET) * math.pi / 2)


def kept(t: Tensor, like: Tensor) -> Tensor:
    """a_k of t = k / 100 (B,), and 1 below 0, ready to multiply ``like`` (B, ...).

    The cosine of Nichol and Dhariwal (2021) in closed form: beta <= 0.999 concerns step 99 alone.
    """
    last = t > 1 - 1.5 / STEPS
    share = (torch.where(last, t - 1 / STEPS, t) + 1 / STEPS + _OFFSET) / (1 + _OFFSET)
    a = (torch.cos(share * (math.pi / 2)) / _START).square()
    a = torch.where(last, a * 0.001, a)
    return expand_time(torch.where(t < 0, torch.ones_like(a), a), like)


def noised(x: Tensor, z: Tensor, t: Tensor) -> Tensor:
    """x_k = sqrt(a_k) x + sqrt(1 - a_k) z."""
    a = kept(t, x)
    return a.sqrt() * x + (1 - a).sqrt() * z


def step_back(x: Tensor, predicted: Tensor, t: Tensor, s: Tensor, noise: Tensor | None) -> Tensor:
    """From step t to an earlier one s, (below 0: the data), given the predicted noise.

    With ``noise`` (B, ...) the step is DDPM's (ancestral, the small variance), without it DDIM's.
    The data that the prediction stands for is clipped to [-1, 1].
    """
    a_t, a_s = kept(t, x), kept(s, x)
    data = ((x - (1 - a_t).sqrt() * predicted) / a_t.sqrt()).clamp(-1, 1)
    if noise is None:
        return a_s.sqrt() * data + (1 - a_s).sqrt() * predicted
    alpha = a_t / a_s
    mean = (a_s.sqrt() * (1 - alpha) * data + alpha.sqrt() * (1 - a_s) * x) / (1 - a_t)
    variance = (1 - a_s) / (1 - a_t) * (1 - alpha)
    return mean + variance.sqrt() * noise
