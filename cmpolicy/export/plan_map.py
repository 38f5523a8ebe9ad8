"""The whole map from observations and noise to actions, as a module for ``torch.export`` and ONNX.

Legend: B batch, To observation steps, T horizon, P planned and Ta executed actions, A action size,
N evaluations, F numbers of all FiLM layers.
"""

from __future__ import annotations

import copy
from typing import Literal

import torch
from torch import Tensor, nn

from cmpolicy.export.kernels import prepare
from cmpolicy.flow.sampler import time_grid
from cmpolicy.nn.conv import by_product
from cmpolicy.nn.unet1d import Kernels
from cmpolicy.policy.policy import ConsistencyPolicy

#: ``torch``: matrix products, torch's own norms. ``onnxruntime``: ``cmpolicy.export.kernels``.
Target = Literal["torch", "onnxruntime"]


class PlanMap(nn.Module):
    """((B, To, ...) per key in the order of the spec, noise (B, T, A)) -> actions, plan.

    ``plan`` (B, P, A) holds every action from the newest observation on, ``actions`` (B, Ta, A) its
    first; both in env units. The noise is standard normal. The times of all N evaluations are
    known, so what they contribute to each FiLM layer is a constant, and the contribution of the
    observations is the same in all of them.

    Args:
        policy: copied; later changes of it are not seen. Its ``sampler``, ``noise_scale``
            and ``time_floor`` count.
        nfe: N.
        target: what will run the map.

    Raises:
        ValueError: ``nfe`` below 1.
    """

    def __init__(
        self, policy: ConsistencyPolicy, nfe: int = 1, *, target: Target = "torch"
    ) -> None:
        super().__init__()
        policy = copy.deepcopy(policy).cpu().float().eval().requires_grad_(False)
        self.unet, self.path = policy.net, policy.flow_map.path
        self.spec, self.nfe, self.noise_scale = policy.spec, nfe, policy.noise_scale
        self.is_image = target == "onnxruntime"
        grid = time_grid(nfe, floor=policy.time_floor)
        self._fold_times(grid, diagonal=policy.sampler == "diagonal")
        arrays = policy.normalizer.to_arrays()
        for kind in ("scale", "offset"):
            steps = torch.cat([arrays[f"{key}.{kind}"].flatten() for key in self.spec.obs])
            self.register_buffer(f"obs_{kind}", steps.clone())
            self.register_buffer(f"action_{kind}", arrays[f"action.{kind}"].clone())
        self.kernels = prepare(self.unet) if self.is_image else Kernels(by_product)

    def _fold_times(self, grid: Tensor, *, diagonal: bool) -> None:
        """Keep the half of the FiLM layer that reads the observations; the other is a constant."""
        unet, time_dim = self.unet, self.unet.config.time_dim
        t, s = grid[:-1], grid[:-1] if diagonal else grid[1:]
        of_time, of_obs = unet.film.get_parameter("1.weight").split(
            [time_dim, unet.config.obs_dim], dim=1
        )
        with torch.no_grad():
            constant = nn.functional.mish(unet.time(t, s)) @ of_time.T
            constant += unet.film.get_parameter("1.bias") + unet.get_buffer("film_center")
        self.register_buffer("grid", grid)
        self.register_buffer("film_of_times", constant)  # (N, F)
        self.register_buffer("film_of_obs", of_obs.T.contiguous())  # (obs_dim, F)
        del unet.film, unet.time

    def forward(self, obs: tuple[Tensor, ...], noise: Tensor) -> tuple[Tensor, Tensor]:
        """See the class."""
        film_of_obs = self._observe(obs)
        grid, film_of_times = self.get_buffer("grid"), self.get_buffer("film_of_times")
        x = noise * self.noise_scale
        for i in range(self.nfe):
            f = self._evaluate(x, film_of_obs + film_of_times[i])
            x = self.path.jump(x, f, grid[i], grid[i + 1])
        action = (x - self.get_buffer("action_offset")) / self.get_buffer("action_scale")
        first = self.spec.n_obs_steps - 1
        return action[:, first : first + self.spec.n_action_steps], action[:, first:]

    def _observe(self, obs: tuple[Tensor, ...]) -> Tensor:
        """What the observations contribute to every FiLM layer, (B, F)."""
        parts = [value.flatten(2) if value.ndim > 2 else value.unsqueeze(2) for value in obs]
        steps = torch.cat(parts, dim=-1)
        normal = steps * self.get_buffer("obs_scale") + self.get_buffer("obs_offset")
        features = nn.functional.mish(self.unet.obs(normal.flatten(1)))
        return features @ self.get_buffer("film_of_obs")

    def _evaluate(self, x: Tensor, film: Tensor) -> Tensor:
        """F at x (B, T, A)."""
        h = x.transpose(1, 2)
        if not self.is_image:
            return self.unet.trunk(h, film, self.kernels).transpose(1, 2)
        return self.unet.trunk(h.unsqueeze(2), film, self.kernels).squeeze(2).transpose(1, 2)


def example_inputs(
    policy: ConsistencyPolicy, batch: int, seed: int = 0
) -> tuple[tuple[Tensor, ...], Tensor]:
    """Observations in the range of the policy's training data, and noise; the inputs of its map."""
    rng = torch.Generator().manual_seed(seed)
    spec, normalizer = policy.spec, copy.deepcopy(policy.normalizer).cpu()
    obs = tuple(
        normalizer.unnormalize(
            key, torch.rand(batch, spec.n_obs_steps, *shape, generator=rng) * 2 - 1
        )
        for key, shape in spec.obs.items()
    )
    return obs, torch.randn(batch, *policy.noise_shape, generator=rng)
