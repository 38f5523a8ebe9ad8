from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from cmpolicy.nn.conv import MAX_BATCH, by_library, by_product, by_rows, convolution_for

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


@each_convolution
def test_rows_are_the_convolution_with_its_derivatives(convolution: nn.Module) -> None:
    """Value, both gradients and the forward-mode derivative."""
    convolution = copy.deepcopy(convolution).double()
    generator = torch.Generator().manual_seed(0)
    x, tangent = torch.randn(2, 3, 6, 8, generator=generator, dtype=torch.float64)
    inputs = (x.requires_grad_(), *convolution.parameters())
    found, expected = by_rows(convolution, x), by_library(convolution, x)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-13)
    assert found.is_contiguous()
    upstream = torch.randn(found.shape, generator=generator, dtype=torch.float64)
    gradients = torch.autograd.grad(found, inputs, upstream)
    torch.testing.assert_close(
        gradients, torch.autograd.grad(expected, inputs, upstream), rtol=0, atol=1e-12
    )
    assert gradients[0].is_contiguous()
    torch.testing.assert_close(
        torch.func.jvp(lambda y: by_rows(convolution, y), (x.detach(),), (tangent,))[1],
        torch.func.jvp(lambda y: by_library(convolution, y), (x.detach(),), (tangent,))[1],
        rtol=0,
        atol=1e-13,
    )


def test_each_way_in_its_place() -> None:
    """Few observations are products, training is rows, a GPU's and what is compiled the library."""
    one, many = torch.zeros(MAX_BATCH, 8, 2), torch.zeros(MAX_BATCH + 1, 8, 2)
    with torch.inference_mode():
        assert convolution_for(one) is by_product
        assert convolution_for(many) is by_library
    with torch.no_grad():
        assert convolution_for(one) is by_rows
    assert convolution_for(many) is by_rows
    assert convolution_for(one.to("meta")) is by_library
    chosen = []

    def compiled(x: torch.Tensor) -> torch.Tensor:
        chosen.append(convolution_for(x))
        return x + 1

    torch.compile(compiled, backend="eager")(one)
    assert chosen == [by_library]
