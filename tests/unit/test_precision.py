"""Which precision ``precision=auto`` takes on a CPU."""

from __future__ import annotations

import pytest
import torch

from cmpolicy.training.config import LoopConfig
from cmpolicy.training.device import use_bf16

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("found", "bf16"),
    [
        ({"avx512_bf16": True, "amx_bf16": True}, True),
        ({"avx512_bf16": True, "amx_bf16": False}, False),
        ({}, False),
    ],
)
def test_bf16_on_a_cpu_is_for_matrix_units(
    monkeypatch: pytest.MonkeyPatch, found: dict[str, bool], bf16: bool
):
    """The vector instructions alone made training slower than fp32 (bench/README)."""
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: found, raising=False)
    assert use_bf16(LoopConfig(), CPU) == bf16


def test_a_torch_that_does_not_say(monkeypatch: pytest.MonkeyPatch):
    """As the one of LeRobot's environment."""
    monkeypatch.delattr(torch.cpu, "get_capabilities", raising=False)
    assert not use_bf16(LoopConfig(), CPU)
    assert use_bf16(LoopConfig(precision="bf16"), CPU)
