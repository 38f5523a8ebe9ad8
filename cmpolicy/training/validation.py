"""Scores on held-out windows: loss, action error and the health of the flow map."""

from __future__ import annotations

from dataclasses import dataclass, fields

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from cmpolicy.flow.health import Health
from cmpolicy.flow.objectives import LossOutput
from cmpolicy.policy.policy import Batch, ConsistencyPolicy
from cmpolicy.training.loader import DeviceLoader

#: Windows of the health metrics; they cost about 20 evaluations per window.
HEALTH_WINDOWS = 256


@dataclass(frozen=True)
class Validation:
    """Numbers of one validation, by name.

    val_loss: unweighted sum of the objective's terms (val_loss_fm, val_loss_sd, ...).
    val_action_error: root mean square error of the executed actions, per number, in env units, at
        the policy's own number of evaluations.
    val_action_range: largest minus smallest action, root mean square over the dimensions: what the
        error is to be compared with.
    health_*: see :class:`cmpolicy.flow.health.Health`.
    """

    metrics: dict[str, float]


class HeldOutLosses:
    """The objective's terms averaged over parts of held-out data."""

    def __init__(self) -> None:
        self._sums: dict[str, Tensor] = {}
        self._count = 0

    def add(self, output: LossOutput, count: int) -> None:
        """Add a part of ``count`` examples."""
        for name, value in output.metrics.items():
            self._sums[name] = self._sums.get(name, torch.zeros_like(value)) + value * count
        self._count += count

    def read(self) -> dict[str, float]:
        """``val_<term>`` of each term, and ``val_loss``, the unweighted sum of the losses."""
        means = {f"val_{name}": float(total) / self._count for name, total in self._sums.items()}
        total = sum(v for name, v in means.items() if name.startswith("val_loss"))
        return {"val_loss": total, **means}


def health_metrics(health: Health) -> dict[str, float]:
    """The numbers of :class:`cmpolicy.flow.health.Health` as they are logged."""
    values = {field.name: getattr(health, field.name) for field in fields(health)}
    return {f"health_{name}": float(v) for name, v in values.items() if v is not None}


def evenly(n: int, most: int) -> npt.NDArray[np.int64]:
    """At most so many of the numbers 0 to n - 1, evenly spread, so of all parts of a sorted set."""
    count = min(most, n)
    return np.arange(count) * n // count


class Validator:
    """Scores policies on the same windows with the same noise, every time.

    Args:
        loader: of the held-out windows; its batch size is the batch size here.
        windows: at most so many are scored, spread evenly.
        seed: of noise and times.
    """

    def __init__(self, loader: DeviceLoader, *, windows: int, seed: int) -> None:
        numbers = evenly(loader.n_windows, windows)
        self._loader = loader
        self._numbers = torch.from_numpy(numbers).to(loader.device)
        self._of_health = self._numbers[evenly(len(numbers), HEALTH_WINDOWS)]
        self._seed = seed

    @torch.no_grad()
    def __call__(self, policy: ConsistencyPolicy) -> Validation:
        """Score ``policy``, by the objective as it is at the end of a run.

        As scheduled, policies from before a term joins in would look better than later ones.
        """
        generator = torch.Generator(self._loader.device).manual_seed(self._seed)
        losses = HeldOutLosses()
        values = 0
        squares = 0.0
        size = self._loader.batch_size
        for part in self._numbers.split(size):
            batch = self._loader.gather(part)
            output = policy.compute_loss(batch, generator, progress=1.0, ema=policy)
            losses.add(output, len(part))
            noise = torch.randn(
                len(part), *policy.spec.noise_shape, generator=generator, device=self._loader.device
            )
            error, count = _action_error(policy, batch, noise)
            squares, values = squares + error, values + count
        metrics = losses.read() | {
            "val_action_error": float((squares / max(values, 1)) ** 0.5),
            "val_action_range": _action_range(policy),
        }
        health = policy.health(self._loader.gather(self._of_health), generator, part=size)
        return Validation(metrics | health_metrics(health))


def _action_range(policy: ConsistencyPolicy) -> float:
    """Largest minus smallest action that counts, in env units, root mean square over dimensions."""
    limits = policy.normalizer.limits("action")
    if limits is None:  # what the network calls -1 and 1
        ends = torch.tensor([[-1.0], [1.0]]).expand(2, policy.spec.action_dim)
        scaled = policy.normalizer.unnormalize("action", ends.to(policy.device))
        limits = (scaled[0], scaled[1])
    return float((limits[1] - limits[0]).square().mean().sqrt())


def _action_error(policy: ConsistencyPolicy, batch: Batch, noise: Tensor) -> tuple[float, int]:
    """Summed squares and number of the executed, not padded, action numbers."""
    predicted = policy.predict_action_chunk(batch["obs"], noise=noise)
    first = policy.n_obs_steps - 1
    executed = slice(first, first + policy.n_action_steps)
    real = ~batch["action_is_pad"][:, executed, None]
    squares = (predicted - batch["action"][:, executed]).square() * real
    return float(squares.sum()), int(real.sum()) * predicted.shape[-1]
