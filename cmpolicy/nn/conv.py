"""Three ways to compute the convolutions of the U-Net: the library's, and two for a CPU.

Legend: B batch, I and O channels in and out, T steps, K kernel size.

On a CPU the library's convolution spends most of its time on arranging weights for products of T
columns, and T is 16 or less here. ``by_product`` is for a few observations at a time: one product
of (B T, I K) rows with the (O, I K) weight as it is stored. ``by_rows`` is for training: the same
product, laid out so that its gradients are two products as well and every tensor stays contiguous.
Measured on a processor with AVX2. What is compiled or runs on a GPU is the library's.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

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
    if not torch.is_inference_mode_enabled():
        return by_rows
    return by_product if x.shape[0] <= MAX_BATCH else by_library


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


def by_rows(convolution: nn.Module, x: Tensor) -> Tensor:
    """The same numbers, up to rounding, with gradients; for the modules of :func:`by_product`."""
    if isinstance(convolution, nn.Conv1d):
        return _convolution_rows(convolution, x)
    if isinstance(convolution, nn.ConvTranspose1d):
        return _doubling_rows(convolution, x)
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


class _Swap(torch.autograd.Function):
    """(B, M, N) to (B, N, M), contiguous in both directions: so are the gradients of what is around
    it, and norms and activations would be several times slower on strided ones.
    """

    @staticmethod
    def forward(x: Tensor) -> Tensor:
        return x.transpose(1, 2).contiguous()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor], output: Tensor) -> None:
        """Nothing to keep."""

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return gradient.transpose(1, 2).contiguous()

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor) -> Tensor:
        return tangent.transpose(1, 2).contiguous()


def _swap(x: Tensor) -> Tensor:
    swapped: Tensor = _Swap.apply(x)  # type: ignore[no-untyped-call]
    return swapped


def _convolution_rows(convolution: nn.Conv1d, x: Tensor) -> Tensor:
    (width,), (stride,) = convolution.kernel_size, convolution.stride
    weight = convolution.weight.transpose(1, 2).flatten(1)  # (O, K I)
    steps = _swap(x)
    if width > 1:
        pad = width // 2
        padded = torch.constant_pad_nd(steps, (0, 0, pad, pad))
        last = padded.shape[1] - width + 1
        steps = torch.cat([padded[:, tap : tap + last : stride] for tap in range(width)], dim=-1)
    y = functional.linear(steps.flatten(0, 1), weight, convolution.bias)
    return _swap(y.view(x.shape[0], -1, y.shape[1]))


def _doubling_rows(convolution: nn.ConvTranspose1d, x: Tensor) -> Tensor:
    """See :func:`_doubling`: here both steps of y are columns of one product with x around t."""
    padded = torch.constant_pad_nd(_swap(x), (0, 0, 1, 1))
    rows = torch.cat([padded[:, :-2], padded[:, 1:-1], padded[:, 2:]], dim=-1).flatten(0, 1)
    after, even, odd, before = convolution.weight.unbind(-1)  # (I, O) each
    none = torch.zeros_like(even)
    weight = torch.cat(
        [torch.cat(pair, dim=1) for pair in ((before, none), (even, odd), (none, after))]
    )
    bias = convolution.bias
    y = functional.linear(rows, weight.t(), None if bias is None else torch.cat([bias, bias]))
    return _swap(y.view(x.shape[0], -1, y.shape[1] // 2))
