from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from cmpolicy.nn.conv import MAX_BATCH, by_library, by_product, convolution_for

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


def test_each_way_in_its_place() -> None:
    """Small batches without gradients are products; everything else is torch's convolution."""
    one, many = torch.zeros(MAX_BATCH, 8, 2), torch.zeros(MAX_BATCH + 1, 8, 2)
    with torch.inference_mode():
        assert convolution_for(one) is by_product
        assert convolution_for(many) is by_library
    with torch.no_grad():
        assert convolution_for(one) is by_library
    assert convolution_for(many) is by_library
    assert convolution_for(one.to("meta")) is by_library
    chosen = []

    def compiled(x: torch.Tensor) -> torch.Tensor:
        chosen.append(convolution_for(x))
        return x + 1

    torch.compile(compiled, backend="eager")(one)
    assert chosen == [by_library]
