"""Stop on a non-finite gradient without asking the device every step."""

from __future__ import annotations

import torch
from torch import Tensor


class NonFiniteError(RuntimeError):
    """The loss or the gradient became NaN or infinite.

    Attributes:
        examples: training examples seen before the offending step.
        grad_norm: the gradient norm of that step.
    """

    exit_status = 1

    def __init__(self, examples: int, grad_norm: float) -> None:
        super().__init__(
            f"non-finite gradient at example {examples}: gradient norm {grad_norm}. "
            "Usual cures: a lower optim.lr, a longer optim.warmup, a tighter optim.grad_clip"
        )
        self.examples = examples
        self.grad_norm = grad_norm


class FiniteGuard:
    """Remembers on the device the first step whose gradient norm was not finite.

    :attr:`tripped` goes to fused AdamW as ``found_inf``: from that step on no weight and no moment
    changes, however late :meth:`check` reads it.
    """

    def __init__(self, device: torch.device) -> None:
        self.tripped = torch.zeros((), device=device)
        self._examples = torch.zeros((), dtype=torch.float64, device=device)
        self._norm = torch.zeros((), dtype=torch.float64, device=device)

    def watch(self, grad_norm: Tensor, examples: int) -> None:
        """Note the step that starts at ``examples``; ``grad_norm`` is a scalar on the device."""
        bad = ~torch.isfinite(grad_norm)
        first = bad & (self.tripped == 0)
        self._examples.masked_fill_(first, examples)
        self._norm = torch.where(first, grad_norm.double(), self._norm)
        self.tripped.masked_fill_(bad, 1.0)

    def check(self) -> None:
        """Wait for the device and raise.

        Raises:
            NonFiniteError: a watched norm was not finite.
        """
        if self.tripped.item():
            raise NonFiniteError(int(self._examples.item()), float(self._norm.item()))
