"""Two ways to compute the convolutions of the U-Net: torch's own, and one for small batches.

Legend: B batch, I and O channels in and out, T steps, K kernel size.

On a CPU torch's convolution spends most of its time on arranging weights for products of T columns,
and T is 16 or less here. ``by_product`` is one product of (B T, I K) rows with the (O, I K) weight
as it is stored. On a Xeon with AVX-512 (one thread, fp32) it takes 0.6 to 0.8 times as long at 4 to
16 observations, as long at one, and longer from 64 on. Training, GPUs and compiled networks use
torch's convolution.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional

#: Applies a Conv1d or ConvTranspose1d of the U-Net to (B, I, T).
Convolve = Callable[[nn.Module, Tensor], Tensor]

#: Batches up to this size are computed as matrix products.
MAX_BATCH = 16


def convolution_for(x: Tensor) -> Convolve:
    """The quicker way for a batch like x (B, ...), see the module."""
    if torch.compiler.is_compiling() or x.device.type != "cpu":
        return by_library
    is_small = torch.is_inference_mode_enabled() and x.shape[0] <= MAX_BATCH
    return by_product if is_small else by_library


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
