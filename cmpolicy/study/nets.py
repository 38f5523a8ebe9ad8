"""Many small networks F(x, t, s) at once: same shape, one stack of weights.

Legend: M models, B examples, D dimensions. A stack is a list of tensors with a leading M; one model
is the same list without it. ``torch.func.vmap`` runs a function of one model over the stack.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor

from cmpolicy.flow.flow_map import FlowMap
from cmpolicy.flow.path import LinearPath

WIDTH, LAYERS = 64, 3
#: Waves of t and of t - s: periods 4, 2, 4/3 and 1, smooth at both ends and past them.
_WAVES = 4

Weights = list[Tensor]


def apply_net(weights: Sequence[Tensor], x: Tensor, t: Tensor, s: Tensor) -> Tensor:
    """F(x, t, s) of one model: x (B, D), t and s (B,)."""
    wave = torch.arange(1, _WAVES + 1, dtype=x.dtype) * (math.pi / 2)
    late, length = t[:, None] * wave, (t - s)[:, None] * wave
    h = torch.cat([x, late.cos(), late.sin(), length.cos(), length.sin()], dim=1)
    last = len(weights) - 2
    for i in range(0, len(weights), 2):
        h = torch.addmm(weights[i + 1], h, weights[i])
        if i < last:
            h = torch.nn.functional.silu(h)
    return h


def init_nets(seeds: Sequence[int], dim: int) -> Weights:
    """A stack of fresh networks, one per seed; equal seeds give equal networks."""
    sizes = [dim + 4 * _WAVES, *[WIDTH] * LAYERS, dim]
    models = []
    for seed in seeds:
        generator = torch.Generator().manual_seed(seed)
        model: Weights = []
        for fan_in, fan_out in pairwise(sizes):
            weight = torch.randn(fan_in, fan_out, generator=generator) / math.sqrt(fan_in)
            model += [weight, torch.zeros(fan_out)]
        models.append(model)
    return [torch.stack(tensors) for tensors in zip(*models, strict=True)]


def flow_map_of(weights: Sequence[Tensor]) -> FlowMap:
    """The flow map of one model, on the linear path."""

    def net(x: Tensor, t: Tensor, s: Tensor, features: Tensor | None) -> Tensor:
        return apply_net(weights, x, t, s)

    return FlowMap(net, LinearPath())


def one_of(stack: Sequence[Tensor], index: int) -> Weights:
    """Model ``index`` of a stack."""
    return [tensor[index].detach() for tensor in stack]


class StackAdam:
    """Adam (beta .9 and .999) on a stack, with a learning rate for each model; no clipping.

    What happens to one model, such as a gradient that is not finite, does not touch the others.
    """

    def __init__(self, stack: Weights, rates: Tensor) -> None:
        self._stack, self._rates = stack, rates
        self._mean = [torch.zeros_like(p) for p in stack]
        self._square = [torch.zeros_like(p) for p in stack]
        self._step = 0

    def step(self, gradients: Sequence[Tensor], factor: float) -> None:
        """One step of the rates times ``factor``."""
        self._step += 1
        first, second = 1 - 0.9**self._step, 1 - 0.999**self._step
        for p, g, m, v in zip(self._stack, gradients, self._mean, self._square, strict=True):
            m.lerp_(g, 0.1)
            v.mul_(0.999).addcmul_(g, g, value=0.001)
            rate = (self._rates * (factor / first)).reshape(-1, *[1] * (p.ndim - 1))
            p.sub_(rate * m / ((v / second).sqrt_().add_(1e-8)))


def norms(gradients: Sequence[Tensor]) -> Tensor:
    """Gradient norm of each model, (M,)."""
    return torch.stack([g.flatten(1).square().sum(1) for g in gradients]).sum(0).sqrt()
