"""ConsistencyPolicy: observation history in, action chunk out, one network evaluation.

Legend: B batch, To observation steps, T horizon, Ta executed actions, A action size.
"""

from __future__ import annotations

from collections.abc import Mapping
from os import PathLike
from typing import Any, TypedDict, cast

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from cmpolicy.flow.flow_map import FlowMap
from cmpolicy.flow.health import Health, flow_health
from cmpolicy.flow.objective import Draws, Objective
from cmpolicy.flow.objective import LossOutput as LossOutput  # part of this module's interface
from cmpolicy.flow.path import get_path
from cmpolicy.flow.sampler import SAMPLERS, SamplerKind, sample
from cmpolicy.nn.unet1d import UNet1D, UNet1DConfig
from cmpolicy.normalize import Normalizer
from cmpolicy.spec import PolicySpec, SpecError


class Batch(TypedDict):
    """Training windows in env units."""

    obs: dict[str, Tensor]  # (B, To, ...) per key
    action: Tensor  # (B, T, A)
    action_is_pad: Tensor  # (B, T), true where an edge was repeated


class ConsistencyPolicy(nn.Module):
    """A one-step policy: a flow map over action trajectories, conditioned on observations.

    Stateless between calls: episode state (observation history, running chunk) belongs to whoever
    drives it. It keeps the ``ActionChunkPolicy`` protocol through :meth:`infer`.

    Args:
        spec: keys, shapes and window.
        net: size of the U-Net.
        normalizer: knows every observation key and ``action``.
        path: ``linear`` or ``trigonometric``.
        sampler: ``flow_map``, or ``diagonal`` for a network trained by flow matching alone.
        objective: what :meth:`compute_loss` computes; not part of a saved policy.

    Raises:
        ValueError: a horizon that the net's depth does not divide, a normaliser without a key or of
            another size, an unknown path or sampler.
    """

    def __init__(
        self,
        spec: PolicySpec,
        net: UNet1DConfig,
        normalizer: Normalizer,
        *,
        path: str = "linear",
        sampler: SamplerKind = "flow_map",
        objective: Objective | None = None,
    ) -> None:
        super().__init__()
        net.check_horizon(spec.horizon)
        if sampler not in SAMPLERS:
            raise ValueError(f"unknown sampler {sampler!r}; choose one of {list(SAMPLERS)}")
        _check_normalizer(spec, normalizer)
        self.spec = spec
        self.net_config = net
        self.path_name = path
        self.sampler: SamplerKind = sampler
        self.nfe = 1
        self.noise_scale = 1.0
        self.time_floor = 0.0  # start of the last of several evaluations; not saved, see time_grid
        self.control_hz: float | None = None  # rate of the actions it was trained on, if known
        self.objective = objective
        self.normalizer = normalizer
        unet = UNet1D(
            net, action_dim=spec.action_dim, obs_input_dim=spec.n_obs_steps * spec.obs_dim
        )
        self.flow_map = FlowMap(unet, get_path(path))

    # -- what eval, robot and server read -------------------------------------------------------

    @property
    def n_obs_steps(self) -> int:
        """To."""
        return self.spec.n_obs_steps

    @property
    def n_action_steps(self) -> int:
        """Ta."""
        return self.spec.n_action_steps

    @property
    def noise_shape(self) -> tuple[int, int]:
        """(T, A): shape of the noise of one decision."""
        return self.spec.horizon, self.spec.action_dim

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return next(self.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        """Of the weights."""
        return next(self.parameters()).dtype

    @property
    def net(self) -> UNet1D:
        """The network F inside the flow map: the only weights there are."""
        return cast(UNet1D, self.flow_map.net)

    # -- training -------------------------------------------------------------------------------

    def draw(self, batch_size: int, generator: torch.Generator | None = None) -> Draws:
        """Noise and times of one training step, on the policy's device."""
        return self._objective().draw(batch_size, self.noise_shape, generator, self.device)

    def compute_loss(
        self,
        batch: Batch,
        generator: torch.Generator | None = None,
        *,
        draws: Draws | None = None,
        progress: float = 0.0,
        ema: ConsistencyPolicy | None = None,
    ) -> LossOutput:
        """Loss of a batch of windows in env units.

        Args:
            batch: see :class:`Batch`.
            generator: draws the noise and times, unless ``draws`` are given.
            draws: the noise and times, e.g. this process's slice of a global draw.
            progress: share of the run that is done, in [0, 1]; drives schedules.
            ema: the same policy with EMA weights, for objectives that ask for them.

        Raises:
            ValueError: no objective was given to the policy.
        """
        objective = self._objective()
        action = self.normalizer.normalize("action", batch["action"]).to(self.dtype)
        condition = self.encode(batch["obs"])
        if draws is None:
            draws = self.draw(len(action), generator)
        output = objective(
            self.flow_map,
            action,
            condition,
            draws,
            progress=progress,
            ema=None if ema is None else ema.flow_map,
        )
        return LossOutput(output.per_example.mean(), output.per_example, output.metrics)

    def forward(self, batch: Batch, **kwargs: Any) -> LossOutput:
        """:meth:`compute_loss`, so that wrappers such as DDP see every training pass."""
        return self.compute_loss(batch, **kwargs)

    @torch.no_grad()
    def health(self, batch: Batch, generator: torch.Generator | None = None) -> Health:
        """How well the network keeps the identities of a flow map on these windows."""
        action = self.normalizer.normalize("action", batch["action"]).to(self.dtype)
        condition = self.encode(batch["obs"])
        return flow_health(self.flow_map, action, condition, generator, kind=self.sampler)

    # -- inference ------------------------------------------------------------------------------

    def encode(self, obs: Mapping[str, Tensor]) -> Tensor:
        """Observation history in env units, (B, To, ...) per key, to the condition (B, To * D)."""
        steps = []
        for key in self.spec.obs:
            step = self.normalizer.normalize(key, obs[key])
            steps.append(step.reshape(*step.shape[:2], -1))
        return torch.cat(steps, dim=-1).flatten(1).to(self.dtype)

    @torch.inference_mode()
    def predict_trajectory(
        self,
        obs: Mapping[str, Tensor],
        *,
        nfe: int = 1,
        noise: Tensor | None = None,
        sampler: SamplerKind | None = None,
    ) -> Tensor:
        """All predicted actions (B, T, A) in env units; the first is at the oldest observation.

        Args:
            obs: (B, To, ...) per key, env units, oldest first, on the policy's device.
            nfe: network evaluations.
            noise: (B, T, A) standard normal; drawn here if not given. It is multiplied by the
                policy's ``noise_scale``: below 1 samples are less diverse and more typical (the
                low-temperature sampling of Ajay et al. 2023).
            sampler: another one than the policy's own.

        Raises:
            SpecError: observation keys or shapes, or a noise shape, that do not fit.
            ValueError: ``nfe`` below 1.
        """
        batch_size = self.spec.check_obs(obs)
        for key, value in obs.items():
            if not isinstance(value, Tensor):
                raise SpecError(
                    f"observation {key!r} is a {type(value).__name__}; this takes tensors on "
                    f"{self.device}, and policy.infer(obs) takes arrays"
                )
        condition = self.encode(obs)
        if noise is None:
            noise = torch.randn(
                batch_size, *self.noise_shape, device=condition.device, dtype=condition.dtype
            )
        elif tuple(noise.shape) != (batch_size, *self.noise_shape):
            raise SpecError(
                f"noise has shape {tuple(noise.shape)}, expected {(batch_size, *self.noise_shape)}"
                " (batch, horizon, action_dim)"
            )
        action = sample(
            self.flow_map,
            noise * self.noise_scale,
            condition,
            nfe=nfe,
            kind=sampler or self.sampler,
            floor=self.time_floor,
        )
        return self.normalizer.unnormalize("action", action)

    def predict_action_chunk(
        self,
        obs: Mapping[str, Tensor],
        *,
        nfe: int = 1,
        noise: Tensor | None = None,
        sampler: SamplerKind | None = None,
    ) -> Tensor:
        """The actions to execute now, (B, Ta, A) in env units: see :meth:`predict_trajectory`."""
        trajectory = self.predict_trajectory(obs, nfe=nfe, noise=noise, sampler=sampler)
        first = self.spec.n_obs_steps - 1
        return trajectory[:, first : first + self.spec.n_action_steps]

    def infer(
        self, obs: Mapping[str, npt.NDArray[Any]], noise: npt.NDArray[Any] | None = None
    ) -> npt.NDArray[Any]:
        """:meth:`predict_action_chunk` for numpy, with ``self.nfe`` evaluations.

        Raises:
            SpecError: as there, or an observation that holds NaN or inf (key and count).
        """
        return self.infer_plan(obs, noise)[:, : self.spec.n_action_steps]

    def infer_plan(
        self, obs: Mapping[str, npt.NDArray[Any]], noise: npt.NDArray[Any] | None = None
    ) -> npt.NDArray[Any]:
        """Every predicted action from the newest observation on, (B, P, A) with P = T - To + 1.

        Its first Ta actions are those of :meth:`infer`. A control loop needs the others: with an
        inference that takes d steps, actions d to d + Ta - 1 are the first that can be executed.

        Args:
            obs: (B, To, ...) per key, env units, oldest first.
            noise: (B, T, A) standard normal; drawn here if not given.

        Raises:
            SpecError: as :meth:`infer`.
        """
        self.spec.check_obs(obs)
        for key, value in obs.items():
            array = np.asarray(value)  # also of a list or a tensor
            bad = array.size - np.count_nonzero(np.isfinite(array))
            if bad:
                raise SpecError(
                    f"observation {key!r} holds {bad} NaN or infinite numbers, expected none"
                )
        here: Any = {"dtype": self.dtype, "device": self.device}
        tensors = {key: torch.as_tensor(value, **here) for key, value in obs.items()}
        z = None if noise is None else torch.as_tensor(noise, **here)
        trajectory = self.predict_trajectory(tensors, nfe=self.nfe, noise=z)
        plan: npt.NDArray[Any] = trajectory[:, self.spec.n_obs_steps - 1 :].cpu().numpy()
        return plan

    # -- bundles --------------------------------------------------------------------------------

    def save_pretrained(
        self,
        directory: str | PathLike[str],
        *,
        card: str = "",
        metadata: Mapping[str, Any] | None = None,
        weights_dtype: torch.dtype = torch.float32,
    ) -> None:
        """Write a policy bundle: see :func:`cmpolicy.policy.bundle.save_bundle`."""
        from cmpolicy.policy.bundle import save_bundle

        save_bundle(self, directory, card=card, metadata=metadata, weights_dtype=weights_dtype)

    @classmethod
    def from_pretrained(
        cls, name_or_path: str | PathLike[str], device: str | torch.device = "cpu"
    ) -> ConsistencyPolicy:
        """Load a bundle directory, a bundled name such as ``pusht``, or a hub id ``owner/name``.

        Raises:
            BundleError: what is wrong with the bundle, with its path.
        """
        from cmpolicy.policy.bundle import load_bundle

        return load_bundle(name_or_path, device)

    def push_to_hub(self, repo_id: str, *, private: bool = False, **bundle: Any) -> str:
        """Upload a bundle to the hub as ``owner/name``; ``bundle`` as for :meth:`save_pretrained`.

        Returns:
            The repository's address; ``from_pretrained(repo_id)`` loads it anywhere.

        Raises:
            BundleError: not logged in, not allowed, or no network.
        """
        from cmpolicy.policy.hub import push

        return push(self, repo_id, private=private, **bundle)

    def _objective(self) -> Objective:
        if self.objective is None:
            raise ValueError(
                "this policy has no objective, so it cannot be trained: build it with "
                "objective=build_objective('isd'), or set policy.objective"
            )
        return self.objective


def _check_normalizer(spec: PolicySpec, normalizer: Normalizer) -> None:
    shapes = {**spec.obs, "action": (spec.action_dim,)}
    arrays = normalizer.to_arrays()
    for key, shape in shapes.items():
        scale = arrays.get(f"{key}.scale")
        got = None if scale is None else tuple(scale.shape)
        if got != shape:
            raise ValueError(
                f"normaliser and policy disagree on {key!r}: the policy has shape {shape}, "
                f"the normaliser {got}"
            )
