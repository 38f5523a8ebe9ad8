"""The whole map from observations and noise to actions, as a module for ``torch.export`` and ONNX.

Legend: B batch, To observation steps, T horizon, P planned and Ta executed actions, A action size,
N evaluations, D features.
"""

from __future__ import annotations

import copy
from typing import Any, Literal

import torch
from torch import Tensor, nn

from cmpolicy.export.kernels import prepare
from cmpolicy.flow.sampler import start_between, time_grid
from cmpolicy.policy.policy import ConsistencyPolicy

#: ``torch``: matrix products, torch's own norms. ``onnxruntime``: ``cmpolicy.export.kernels``.
Target = Literal["torch", "onnxruntime"]


class PlanMap(nn.Module):
    """((B, To, ...) per key in the order of the spec, noise (B, T, A)) -> actions, plan.

    With a warm start there are two further inputs: ``before`` (B, T, A) float64, the plan before in
    env units, and ``start`` (B,), the time at which each row begins, 1 where it has no such plan.

    ``plan`` (B, P, A) holds every action from the newest observation on, ``actions`` (B, Ta, A) its
    first; both in env units. The noise is standard normal. The observations are encoded once. A
    network that offers ``at_fixed_times`` (:class:`~cmpolicy.nn.unet1d.UNet1D` does) folds away
    what depends on the times alone; any other is called as it is.

    Args:
        policy: copied; later changes of it are not seen. Its ``sampler``, ``noise_scale``,
            ``time_floor`` and ``warm_start`` count.
        nfe: N; None takes the policy's own.
        target: what will run the map.

    Raises:
        ValueError: ``nfe`` below 1.
    """

    def __init__(
        self, policy: ConsistencyPolicy, nfe: int | None = None, *, target: Target = "torch"
    ) -> None:
        super().__init__()
        policy = copy.deepcopy(policy).cpu().float().eval().requires_grad_(False)
        self.nfe = policy.nfe if nfe is None else nfe
        self.path, self.encoder, self.spec = policy.flow_map.path, policy.encoder, policy.spec
        self.noise_scale = policy.noise_scale
        grid = time_grid(self.nfe, floor=policy.time_floor)
        self.register_buffer("grid", grid)
        self.is_diagonal = policy.sampler == "diagonal"
        t, s = grid[:-1], grid[:-1] if self.is_diagonal else grid[1:]
        net: Any = policy.net
        kernels = prepare if target == "onnxruntime" else None
        self.net: Any
        if policy.warm_start is not None:
            self.net = net.at_any_times(kernels) if hasattr(net, "at_any_times") else net
        elif hasattr(net, "at_fixed_times"):
            self.net = net.at_fixed_times(t, s, kernels)
        else:
            self.net = _FixedTimes(net, t, s)
        self.normalizer = policy.normalizer

    def forward(
        self,
        obs: tuple[Tensor, ...],
        noise: Tensor,
        before: Tensor | None = None,
        start: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """See the class."""
        normal = {
            key: value if key in self.spec.images else self.normalizer.normalize(key, value)
            for key, value in zip(self.spec.obs, obs, strict=True)
        }
        features, x = self.encoder(normal), noise * self.noise_scale
        x = self._cold(x, features) if start is None else self._warm(x, features, before, start)
        action = self.normalizer.unnormalize("action", x)
        first = self.spec.n_obs_steps - 1
        return action[:, first : first + self.spec.n_action_steps], action[:, first:]

    def _cold(self, x: Tensor, features: Tensor) -> Tensor:
        condition, grid = self.net.condition(features), self.get_buffer("grid")
        for i in range(self.nfe):
            x = self.path.jump(x, self.net(i, x, condition), grid[i], grid[i + 1])
        return x

    def _warm(self, x: Tensor, features: Tensor, before: Tensor | None, start: Tensor) -> Tensor:
        if before is None:
            raise ValueError("a start time needs the plan before")
        plan = self.normalizer.normalize("action", before).to(x.dtype)
        x = start_between(self.path, plan, x, start)
        for now, following in zip(*(self.get_buffer("grid")[n:] for n in (0, 1)), strict=False):
            t, s = now * start, following * start
            x = self.path.jump(x, self.net(x, t, t if self.is_diagonal else s, features), t, s)
        return x


class _FixedTimes(nn.Module):
    """Any network F(x, t, s, features), evaluated at N known pairs of times."""

    def __init__(self, net: nn.Module, t: Tensor, s: Tensor) -> None:
        super().__init__()
        self.net = net
        self.register_buffer("times", torch.stack([t, s]))

    def condition(self, features: Tensor) -> Tensor:
        """The features themselves."""
        return features

    def forward(self, i: int, x: Tensor, condition: Tensor) -> Tensor:
        """F at x (B, T, A) in evaluation ``i``."""
        t, s = self.get_buffer("times")[:, i]
        f: Tensor = self.net(x, t.expand(len(x)), s.expand(len(x)), condition)
        return f


def example_warm_inputs(policy: ConsistencyPolicy, batch: int, seed: int = 0) -> tuple[Tensor, ...]:
    """Plans and start times, every other row without a plan; empty for a policy without them."""
    if policy.warm_start is None:
        return ()
    rng = torch.Generator().manual_seed(seed)
    normalizer = copy.deepcopy(policy.normalizer).cpu()
    plan = torch.rand(batch, *policy.spec.noise_shape, generator=rng) * 2 - 1
    start = torch.ones(batch)
    start[::2] = policy.warm_start
    return normalizer.unnormalize("action", plan).double(), start


def example_inputs(
    policy: ConsistencyPolicy, batch: int, seed: int = 0
) -> tuple[tuple[Tensor, ...], Tensor]:
    """Observations in the range of the policy's training data, and noise; the inputs of its map."""
    rng = torch.Generator().manual_seed(seed)
    spec, normalizer = policy.spec, copy.deepcopy(policy.normalizer).cpu()
    obs = tuple(
        torch.randint(256, (batch, spec.n_obs_steps, *shape), generator=rng, dtype=torch.uint8)
        if key in spec.images
        else normalizer.unnormalize(
            key, torch.rand(batch, spec.n_obs_steps, *shape, generator=rng) * 2 - 1
        )
        for key, shape in spec.obs.items()
    )
    return obs, torch.randn(batch, *policy.spec.noise_shape, generator=rng)
