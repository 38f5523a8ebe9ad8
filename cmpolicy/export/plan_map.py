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
from cmpolicy.flow.sampler import get_sampler, start_between
from cmpolicy.policy.policy import ConsistencyPolicy

#: ``torch``: matrix products, torch's own norms. ``onnxruntime``: ``cmpolicy.export.kernels``.
Target = Literal["torch", "onnxruntime"]


class PlanMap(nn.Module):
    """((B, To, ...) per key in the order of the spec, noise (B, T, A)) -> actions, plan.

    The noise is (B, K, T, A) where the sampler takes K > 1 draws. With a warm start there are two
    further inputs: ``before`` (B, T, A) float64, the plan before in env units, and ``start`` (B,),
    the time at which each row begins, 1 where there is no such plan.

    ``plan`` (B, P, A) holds every action from the newest observation on, ``actions`` (B, Ta, A) its
    first; both in env units. The noise is standard normal. The observations are encoded once. A
    network that offers ``at_fixed_times`` (:class:`~cmpolicy.nn.unet1d.UNet1D` does) folds away
    what depends on the times alone; any other is called as it is.

    Args:
        policy: copied; later changes of it are not seen. Its ``nfe`` (N), ``sampler``,
            ``noise_scale``, ``time_floor`` and ``warm_start`` count.
        target: what will run the map.
    """

    def __init__(self, policy: ConsistencyPolicy, *, target: Target = "torch") -> None:
        super().__init__()
        policy = copy.deepcopy(policy).cpu().float().eval().requires_grad_(False)
        self.nfe = policy.nfe
        self.path, self.encoder, self.spec = policy.flow_map.path, policy.encoder, policy.spec
        self.noise_scale = policy.noise_scale
        self.sampler = get_sampler(policy.sampler)
        grid = self.sampler.grid(self.nfe, floor=policy.time_floor)
        self.register_buffer("grid", grid)
        t, s = grid[:-1], self.sampler.second_time(grid[:-1], grid[1:])
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
        normal = {
            key: value if key in self.spec.images else self.normalizer.normalize(key, value)
            for key, value in zip(self.spec.obs, obs, strict=True)
        }
        condition = self.encoder(normal)
        if start is None:
            condition = self.net.condition(condition)
        grid = self.get_buffer("grid")
        scaled = noise * self.noise_scale
        noises = scaled.unbind(1) if self.sampler.n_noises(self.nfe) > 1 else (scaled,)
        x = noises[0] if self.sampler.is_random else noises[0] * 0
        if before is not None and start is not None:
            plan = self.normalizer.normalize("action", before).to(x.dtype)
            x = start_between(self.path, plan, x, start)
        for i in range(self.nfe):
            if start is None:
                f = self.net(i, x, condition)
                t, s = grid[i], grid[i + 1]
            else:
                t, s = grid[i] * start, grid[i + 1] * start
                f = self.net(x, t, self.sampler.second_time(t, s), condition)
            later = noises[i + 1] if i + 1 < len(noises) else None
            x = self.sampler.advance(self.path, x, f, t, s, later)
        action = self.normalizer.unnormalize("action", x)
        first = self.spec.n_obs_steps - 1
        return action[:, first : first + self.spec.n_action_steps], action[:, first:]


class _FixedTimes(nn.Module):
    """Any network F(x, t, s, features), evaluated at N known pairs of times."""

    def __init__(self, net: nn.Module, t: Tensor, s: Tensor) -> None:
        super().__init__()
        self.net = net
        self.register_buffer("times", torch.stack([t, s]))

    def condition(self, features: Tensor) -> Tensor:
        return features

    def forward(self, i: int, x: Tensor, condition: Tensor) -> Tensor:
        """F at x (B, T, A) in evaluation ``i``."""
        t, s = self.get_buffer("times")[:, i]
        rows = x.shape[0]  # len() would fix the batch size of the exported file
        f: Tensor = self.net(x, t.expand(rows), s.expand(rows), condition)
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
