"""How the U-Net's operations are computed: by torch, or in a way that suits a CPU better.

Legend: B batch, I and O channels in and out, T steps, K kernel size.

On a CPU torch's convolution spends most of its time on arranging weights for products of T columns,
and T is 16 or less here:

- ``by_product`` is one product of (B T, I K) rows with the (O, I K) weight as it is stored. On a
  Xeon with AVX-512 (one thread, fp32) it takes 0.6 to 0.8 times as long at 4 to 16 observations, as
  long at one, and longer from 64 on.
- ``by_taps`` is one product of (B T, K I) rows, one run of I numbers per tap, for training in bf16
  on CPUs that multiply in it: there torch's backward pass takes two to four times as long from 128
  channels on.

Training on a CPU computes Mish by one exponential, where torch takes three transcendental
functions. GPUs and compiled networks use torch's own operations.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional

#: Applies a Conv1d or ConvTranspose1d of the U-Net to (B, I, T).
Convolve = Callable[[nn.Module, Tensor], Tensor]

#: Batches up to this size are computed as matrix products.
MAX_BATCH = 16
#: Weights from this size on are worth the copies of ``by_taps``.
_MIN_WEIGHT = 40_000
#: Beyond this tanh(softplus(x)) is 1 in single precision, and its exponential squared is finite.
_MISH_LIMIT = 20.0


def norm_mish(
    norm: nn.GroupNorm, x: Tensor, mish: Callable[[Tensor], Tensor] = functional.mish
) -> Tensor:
    """What follows every convolution. The plain function: 25 of them stand in one evaluation."""
    return mish(torch.group_norm(x, norm.num_groups, norm.weight, norm.bias, norm.eps))


@dataclass(frozen=True)
class Kernels:
    """How the two operations that make up the network are computed: by torch, or in an export."""

    convolve: Convolve
    norm_mish: Callable[[nn.GroupNorm, Tensor], Tensor] = norm_mish


def kernels_for(x: Tensor) -> Kernels:
    """The quicker ones for a batch like x (B, ...), see the module."""
    if torch.compiler.is_compiling() or x.device.type != "cpu":
        return _PLAIN
    if torch.is_inference_mode_enabled():
        return _PRODUCTS if x.shape[0] <= MAX_BATCH else _PLAIN
    return _TAPS if torch.is_autocast_enabled("cpu") else _TRAINING


def by_library(convolution: nn.Module, x: Tensor) -> Tensor:
    """The module as it is."""
    y: Tensor = convolution(x)
    return y


def by_product(convolution: nn.Module, x: Tensor) -> Tensor:
    """The same numbers by one matrix product, up to rounding.

    For ``nn.Conv1d`` of any kernel, stride and zero padding, and for the ``nn.ConvTranspose1d``
    that doubles the length (kernel 4, stride 2, padding 1).
    """
    if isinstance(convolution, nn.Conv1d):
        return _convolution(convolution, x)
    if isinstance(convolution, nn.ConvTranspose1d):
        return _doubling(convolution, x)
    return by_library(convolution, x)


def by_taps(convolution: nn.Module, x: Tensor) -> Tensor:
    """The same numbers by one matrix product in the precision of autocast, up to rounding.

    For a large ``nn.Conv1d`` of stride 1 with zero padding; any other is left to torch.
    """
    if (
        not isinstance(convolution, nn.Conv1d)
        or convolution.kernel_size[0] == 1
        or convolution.stride[0] != 1
        or convolution.weight.numel() < _MIN_WEIGHT
    ):
        return by_library(convolution, x)
    dtype = torch.get_autocast_dtype("cpu")
    weight = convolution.weight.to(dtype).transpose(1, 2).flatten(1)  # (O, K I)
    width, n_steps = convolution.kernel_size[0], x.shape[2]
    pad = width // 2
    steps = functional.pad(x.to(dtype).transpose(1, 2), (0, 0, pad, pad))
    taps = torch.cat([steps[:, k : k + n_steps] for k in range(width)], dim=-1)  # (B, T, K I)
    return functional.linear(taps, weight, convolution.bias).transpose(1, 2)


# Rows are one matrix, not a batch of them: for a batch the library chooses between several products
# by strides and by whether a gradient could be wanted, and they differ in the last bit.


def _convolution(convolution: nn.Conv1d, x: Tensor) -> Tensor:
    weight, (width,) = convolution.weight.flatten(1), convolution.kernel_size
    steps = x.transpose(1, 2)
    if width > 1:
        pad = width // 2
        padded = torch.constant_pad_nd(steps, (0, 0, pad, pad))
        steps = padded.unfold(1, width, convolution.stride[0])  # (B, T, I, K)
    y = functional.linear(steps.reshape(-1, weight.shape[1]), weight, convolution.bias)
    return y.view(x.shape[0], -1, y.shape[1]).transpose(1, 2)


def _doubling(convolution: nn.ConvTranspose1d, x: Tensor) -> Tensor:
    """Tap k of step t, (B, T, O, K), falls on step 2 t + k - 1 of the output y.

    So y[2 t] = w_1 x[t] + w_3 x[t - 1] and y[2 t + 1] = w_2 x[t] + w_0 x[t + 1].
    """
    rows = x.transpose(1, 2).flatten(0, 1)
    taps = torch.mm(rows, convolution.weight.flatten(1)).view(*x.shape[::2], -1, 4)
    after, even, odd, before = taps.unbind(-1)
    even[:, 1:] += before[:, :-1]
    odd[:, :-1] += after[:, 1:]
    y: Tensor = taps[..., 1:3].permute(0, 2, 1, 3).flatten(2)  # (B, O, 2 T)
    return y if convolution.bias is None else y + convolution.bias[:, None]


def quick_mish(x: Tensor) -> Tensor:
    """x tanh(softplus(x)), as torch's ``mish``, with one exponential e of x.

    tanh(log(1 + e)) = n / (n + 1) for n = e + e^2 / 2. Computed in single precision at least.
    """
    y: Tensor = _Mish.apply(x)  # type: ignore[no-untyped-call]
    return y


class _Mish(torch.autograd.Function):
    """Half the time of torch's in both directions; also for forward-mode derivatives."""

    @staticmethod
    def forward(x: Tensor) -> Tensor:
        z = _wide(x)
        n = z.clamp(max=_MISH_LIMIT).exp_()
        n.addcmul_(n, n, value=0.5)
        return n.div_(n + 1).mul_(z).to(x.dtype)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor], output: Tensor) -> None:
        """Keep x alone."""
        ctx.save_for_backward(*inputs)
        ctx.save_for_forward(*inputs)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        """With n' = e + e^2: y' = n / (n + 1) + x n' / (n + 1)^2, in place."""
        z = _wide(ctx.saved_tensors[0])
        e = z.clamp(max=_MISH_LIMIT).exp_()
        n = torch.addcmul(e, e, e, value=0.5)
        below = n + 1
        slope = e.addcmul_(e, e).div_(below).mul_(z).add_(n).div_(below)
        return slope.mul_(gradient).to(gradient.dtype)

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor) -> Tensor:
        """The same slope, in operations that can be differentiated again."""
        z = _wide(ctx.saved_tensors[0])
        e = z.clamp(max=_MISH_LIMIT).exp()
        n = e + e.square() / 2
        slope = ((e + e.square()) * z / (n + 1) + n) / (n + 1)
        return (slope * tangent).to(tangent.dtype)


def _wide(x: Tensor) -> Tensor:
    return x.float() if x.dtype in (torch.bfloat16, torch.float16) else x


norm_quick_mish = partial(norm_mish, mish=quick_mish)

_PLAIN = Kernels(by_library)
_PRODUCTS = Kernels(by_product)
_TRAINING = Kernels(by_library, norm_quick_mish)
_TAPS = Kernels(by_taps, norm_quick_mish)
