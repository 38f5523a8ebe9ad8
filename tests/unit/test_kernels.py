from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional

from cmpolicy.nn.kernels import (
    MAX_BATCH,
    by_library,
    by_product,
    by_taps,
    kernels_for,
    norm_mish,
    norm_quick_mish,
    quick_mish,
)

each_convolution = pytest.mark.parametrize(
    "convolution",
    [
        nn.Conv1d(6, 8, 1),
        nn.Conv1d(6, 8, 3, padding=1),
        nn.Conv1d(6, 8, 5, padding=2, bias=False),
        nn.Conv1d(6, 6, 3, stride=2, padding=1),
        nn.ConvTranspose1d(6, 8, 4, stride=2, padding=1),
        nn.ConvTranspose1d(6, 8, 4, stride=2, padding=1, bias=False),
    ],
    ids=str,
)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("contiguous", [True, False])
@pytest.mark.parametrize("batch", [1, 3])
@each_convolution
def test_product_is_the_convolution(
    convolution: nn.Module, batch: int, contiguous: bool, dtype: torch.dtype
) -> None:
    convolution = copy.deepcopy(convolution).to(dtype)  # the next test has the same one
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(batch, 8, 6, generator=generator, dtype=dtype).transpose(1, 2)
    x = x.contiguous() if contiguous else x
    before = x.clone()
    with torch.inference_mode():
        found = by_product(convolution, x)
        expected = by_library(convolution, x)
    tolerance = 1e-5 if dtype == torch.float32 else 1e-13
    torch.testing.assert_close(found, expected, rtol=0, atol=tolerance)
    assert torch.equal(x, before)


@pytest.mark.parametrize("width", [3, 5])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_taps_are_the_convolution(width: int, dtype: torch.dtype) -> None:
    """Values and gradients; in float64 to its last digits, so that rounding hides nothing."""
    torch.manual_seed(0)
    convolution = nn.Conv1d(128, 120, width, padding=width // 2)
    x = torch.randn(3, 128, 8, requires_grad=True)
    if dtype == torch.float64:
        convolution, x = convolution.double(), x.detach().double().requires_grad_()
    towards = torch.randn(3, 120, 8, dtype=x.dtype)
    found = []
    for way in (by_library, by_taps):
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
            torch.set_autocast_dtype("cpu", dtype)  # what by_taps computes in
            try:
                y = way(convolution, x)
            finally:
                torch.set_autocast_dtype("cpu", torch.bfloat16)
        assert y.dtype == dtype
        gradients = torch.autograd.grad(
            (y.to(towards) * towards).sum(), [x, *convolution.parameters()]
        )
        found.append((y, *gradients))
    for expected, value in zip(*found, strict=True):
        error = (value - expected).double().norm() / expected.double().norm()
        assert error < (1e-14 if dtype == torch.float64 else 0.01)


def test_what_taps_do_not_do_is_left_to_torch() -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, 256, 8, generator=generator)
    for other in (
        nn.Conv1d(256, 256, 1),
        nn.Conv1d(256, 256, 3, stride=2, padding=1),
        nn.Conv1d(256, 8, 3, padding=1),  # small
        nn.ConvTranspose1d(256, 128, 4, stride=2, padding=1),
    ):
        with torch.autocast("cpu", torch.bfloat16):
            assert torch.equal(by_taps(other, x), by_library(other, x))


def test_quick_mish_is_mish() -> None:
    x = torch.cat([torch.linspace(-40, 40, 4001, dtype=torch.float64), torch.tensor([-1e4, 1e4])])
    torch.testing.assert_close(quick_mish(x), functional.mish(x), rtol=1e-12, atol=1e-14)
    x.requires_grad_()
    found = torch.autograd.grad(quick_mish(x).sum(), x)[0]
    expected = torch.autograd.grad(functional.mish(x).sum(), x)[0]
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-14)
    for dtype, tolerance in ((torch.float32, 1e-6), (torch.bfloat16, 1e-2)):
        y = quick_mish(x.detach().to(dtype))
        assert y.dtype == dtype
        expected = functional.mish(x.detach().to(dtype).double())
        torch.testing.assert_close(y.double(), expected, rtol=tolerance, atol=tolerance)
    assert quick_mish(torch.tensor(float("nan"))).isnan()


def test_quick_mish_has_derivatives_in_both_modes() -> None:
    x = torch.linspace(-5, 30, 50, dtype=torch.float64, requires_grad=True)
    v = torch.linspace(1, 2, 50, dtype=torch.float64)
    assert torch.autograd.gradcheck(quick_mish, (x,), check_forward_ad=True)
    found = torch.func.jvp(quick_mish, (x,), (v,))[1]
    expected = torch.func.jvp(functional.mish, (x,), (v,))[1]
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-14)
    # reverse over forward, as esd asks for
    again = torch.autograd.grad(found.sum(), x)[0]
    torch.testing.assert_close(again, torch.autograd.grad(expected.sum(), x)[0])


def test_each_way_in_its_place() -> None:
    """Small batches without gradients are products; training on a CPU has ways of its own."""

    def ways(x: torch.Tensor) -> tuple[object, object]:
        kernels = kernels_for(x)
        return kernels.convolve, kernels.norm_mish

    one, many = torch.zeros(MAX_BATCH, 8, 2), torch.zeros(MAX_BATCH + 1, 8, 2)
    with torch.inference_mode():
        assert ways(one) == (by_product, norm_mish)
        assert ways(many) == (by_library, norm_mish)
        with torch.autocast("cpu", torch.bfloat16):
            assert ways(many) == (by_library, norm_mish)
    with torch.no_grad():
        assert ways(one) == (by_library, norm_quick_mish)
    assert ways(many) == (by_library, norm_quick_mish)
    with torch.autocast("cpu", torch.bfloat16):
        assert ways(many) == (by_taps, norm_quick_mish)
    assert ways(one.to("meta")) == (by_library, norm_mish)
    chosen = []

    def compiled(x: torch.Tensor) -> torch.Tensor:
        chosen.append(ways(x))
        return x + 1

    torch.compile(compiled, backend="eager")(one)
    assert chosen == [(by_library, norm_mish)]
