"""The U-Net's operations as onnxruntime runs them fastest on a CPU, at batch 1 (measured).

Legend: B batch, I and O channels in and out, T steps, K kernel size, G groups.

Only a convolution over two dimensions has blocked kernels there, which store their weights in the
order they are read. So a trajectory is an image of height 1, (B, C, 1, T), and upsampling by two is
a convolution whose outputs interleave. What follows is memory-bound no longer but bound by the
number of nodes, so Mish is written with few of them.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from cmpolicy.nn.kernels import Kernels


def prepare(net: nn.Module) -> Kernels:
    """Rewrite the parameters of ``net`` (a copy: it is of no other use then) for these kernels."""
    for module in list(net.modules()):
        if isinstance(module, nn.Conv1d):
            module.weight = nn.Parameter(module.weight.detach().unsqueeze(2))
        elif isinstance(module, nn.ConvTranspose1d):
            _prepare_doubling(module)
        elif isinstance(module, nn.GroupNorm):
            module.weight = nn.Parameter(-module.weight.detach())
            module.bias = nn.Parameter(-module.bias.detach())
    return Kernels(_convolve, _norm_mish)


def _prepare_doubling(convolution: nn.ConvTranspose1d) -> None:
    """(I, O, 4), stride 2, padding 1, to (2 O, I, 1, 2): see :func:`_convolve`.

    y[2 t] = w_3 x[t - 1] + w_1 x[t] and y[2 t + 1] = w_2 x[t] + w_0 x[t + 1].
    """
    w0, w1, w2, w3 = convolution.weight.detach().permute(2, 1, 0)  # (O, I) each
    odd, even = torch.stack([w2, w0], dim=-1), torch.stack([w3, w1], dim=-1)
    convolution.weight = nn.Parameter(torch.cat([odd, even]).unsqueeze(2))
    convolution.bias = nn.Parameter(convolution.get_parameter("bias").detach().repeat(2))


def _convolve(convolution: nn.Module, x: Tensor) -> Tensor:
    """x (B, I, 1, T) to (B, O, 1, T'), T' = T / stride, or 2 T for a transposed convolution."""
    weight, bias = convolution.get_parameter("weight"), convolution.get_parameter("bias")
    if isinstance(convolution, nn.Conv1d):
        (stride,), pad = convolution.stride, convolution.kernel_size[0] // 2
        return functional.conv2d(x, weight, bias, stride=(1, stride), padding=(0, pad))
    # Window j is (x[j - 1], x[j]), T + 1 of them: y[2 j - 1] and y[2 j], the ends fall away.
    windows = functional.conv2d(x, weight, bias, padding=(0, 1))
    odd_and_even: Tensor = windows.unflatten(1, (2, -1)).permute(0, 2, 3, 4, 1)  # (B, O, 1, T+1, 2)
    return odd_and_even.flatten(3)[..., 1:-1]


def _norm_mish(norm: nn.GroupNorm, x: Tensor) -> Tensor:
    """Mish of the normalised x.

    With n = -x and q = sigmoid(n)^2, tanh(softplus(x)) = (1 - q) / (1 + q), so that
    mish(x) = n - 2 n / (1 + q): no overflow for any x, and no logarithm. The sign of n is that of
    the norm's parameters (:func:`prepare`).
    """
    groups = x.reshape(-1, norm.num_groups, x.shape[1] // norm.num_groups * x.shape[3])
    normal = torch.instance_norm(groups, None, None, None, None, True, 0.0, norm.eps, False)
    weight, bias = norm.weight[:, None, None], norm.bias[:, None, None]
    n = normal.reshape(-1, *x.shape[1:]) * weight + bias
    half = torch.sigmoid(n)
    part = n / (-1 - half * half)
    return n + (part + part)
