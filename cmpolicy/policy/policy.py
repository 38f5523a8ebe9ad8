"""ConsistencyPolicy: observation history in, action chunk out, one network evaluation.

Legend: B batch, To observation steps, T horizon, Ta executed actions, A action size.
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from os import PathLike
from pathlib import Path
from typing import Any, NotRequired, TypedDict, cast

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from cmpolicy.flow.flow_map import FlowMap
from cmpolicy.flow.health import Health, flow_health
from cmpolicy.flow.objectives import Draws, LossOutput, Objective
from cmpolicy.flow.path import get_path
from cmpolicy.flow.sampler import SamplerKind, check_sampler, get_sampler, sample, start_between
from cmpolicy.hub import HubError, upload
from cmpolicy.nn.encoders.state import StateEncoderConfig
from cmpolicy.nn.registry import EncoderConfig, NetConfig
from cmpolicy.nn.target_head import TargetHead
from cmpolicy.normalize import Normalizer
from cmpolicy.observation import checked_actions, read_plan
from cmpolicy.policy.bundle import BundleError, read_bundle, write_bundle
from cmpolicy.policy.inputs import check_normalizer, checked_tensors, obs_tensors
from cmpolicy.policy.packing import pack, unpack
from cmpolicy.policy.sampling import SampledModule
from cmpolicy.spec import PolicySpec, SpecError


class Batch(TypedDict):
    """Training windows in env units."""

    obs: dict[str, Tensor]  # (B, To, ...) per key
    action: Tensor  # (B, T, A)
    action_is_pad: Tensor  # (B, T), true where an edge was repeated
    augment: NotRequired[Tensor]  # (B, n) in [0, 1), where frames are augmented
    targets: NotRequired[Tensor]  # (B, To, D), what the features are to tell


class ConsistencyPolicy(SampledModule):
    """A one-step policy: a flow map over action trajectories, conditioned on observations.

    Stateless between calls: episode state (observation history, running chunk) belongs to whoever
    drives it. It keeps the ``ActionChunkPolicy`` protocol through :meth:`infer`.

    Args:
        spec: keys, shapes and window.
        net: settings of the network F, such as ``UNet1DConfig()``.
        normalizer: knows ``action`` and every observation key that is not an image.
        encoder: settings of the observation encoder.
        path: ``linear`` or ``trigonometric``.
        sampler: the one that its objective asks for, see :data:`cmpolicy.flow.sampler.SAMPLERS`.
        nfe: network evaluations per decision, at least 1; part of a saved policy.
        objective: what :meth:`compute_loss` computes; not part of a saved policy.

    Raises:
        ValueError: a horizon that the net's depth does not divide, a normaliser without a key or of
            another size, an unknown path or sampler, an ``nfe`` that the sampler cannot do.
    """

    def __init__(
        self,
        spec: PolicySpec,
        net: NetConfig,
        normalizer: Normalizer,
        *,
        encoder: EncoderConfig | None = None,
        path: str = "linear",
        sampler: SamplerKind = "flow_map",
        nfe: int = 1,
        objective: Objective | None = None,
    ) -> None:
        net.check_horizon(spec.horizon)
        check_normalizer(spec, normalizer)
        super().__init__(spec, sampler, nfe)
        encoder = StateEncoderConfig() if encoder is None else encoder
        self.net_config = net
        self.encoder_config = encoder
        self.path_name = path
        self.control_hz: float | None = None  # rate of the actions it was trained on, if known
        #: What a bundle tells of it (data, protocol, simulator, command, result); JSON-ready.
        self.metadata: Mapping[str, Any] = {}
        self.objective = objective
        self.target_head: TargetHead | None = None  # in training; not part of a saved policy
        self.pad_loss = True  # whether repeated actions beyond an episode's ends are trained on
        self.normalizer = normalizer
        self.encoder = encoder.build(spec)
        self.feature_dim = int(cast(Any, self.encoder).feature_dim)
        self.flow_map = FlowMap(
            net.build(action_dim=spec.action_dim, feature_dim=self.feature_dim), get_path(path)
        )

    # -- what eval, robot and server read -------------------------------------------------------

    @property
    def n_obs_steps(self) -> int:
        """To."""
        return self.spec.n_obs_steps

    @property
    def device(self) -> torch.device:
        return next(self.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        return next(self.parameters()).dtype

    @property
    def net(self) -> nn.Module:
        """The network F inside the flow map."""
        return cast(nn.Module, self.flow_map.net)

    # -- training -------------------------------------------------------------------------------

    def draw(self, batch_size: int, generator: torch.Generator | None = None) -> Draws:
        """Noise and times of one training step, on the policy's device."""
        shape = self.spec.noise_shape_of(1)
        return self._objective().draw(batch_size, shape, generator, self.device)

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
        augment = batch.get("augment")
        features = self.encode(batch["obs"], augment)  # once: the whole step shares them
        if draws is None:
            draws = self.draw(len(action), generator)
        mask = None if self.pad_loss else ~batch["action_is_pad"][..., None]
        teacher = ema if objective.needs_ema else None
        with torch.no_grad():
            ema_features = None if teacher is None else teacher.encode(batch["obs"], augment)
        output = objective(
            self.flow_map,
            action,
            features,
            draws,
            mask=mask,
            progress=progress,
            ema=None if teacher is None else teacher.flow_map,
            ema_features=ema_features,
        )
        if self.target_head is None:
            return output
        loss, error = self.target_head(features, batch["targets"])
        return LossOutput(output.per_example + loss, {**output.metrics, "target_error": error})

    def forward(self, batch: Batch, **kwargs: Any) -> LossOutput:
        """:meth:`compute_loss`, so that wrappers such as DDP see every training pass."""
        return self.compute_loss(batch, **kwargs)

    @torch.no_grad()
    def health(
        self, batch: Batch, generator: torch.Generator | None = None, *, part: int | None = None
    ) -> Health:
        """How well the network keeps the identities of a flow map on these windows.

        ``part`` of them are encoded at a time; None: all.
        """
        action = self.normalizer.normalize("action", batch["action"]).to(self.dtype)
        obs, size = batch["obs"], part or len(action)
        parts = [{k: v[i : i + size] for k, v in obs.items()} for i in range(0, len(action), size)]
        features = torch.cat([self.encode(some) for some in parts])
        return flow_health(self.flow_map, action, features, generator, kind=self.sampler)

    # -- inference ------------------------------------------------------------------------------

    def encode(self, obs: Mapping[str, Tensor], augment: Tensor | None = None) -> Tensor:
        """Observation histories in env units, (B, To, ...) per key, to features (B, D).

        Called once per training step and once per decision; all evaluations share its result.

        Args:
            obs: numbers, and uint8 frames.
            augment: (B, n) uniform numbers that augment the frames of each row while training, see
                :class:`~cmpolicy.nn.encoders.image.ImageEncoder`; None: frames as they are.
        """
        dtype = self.dtype
        ready = {
            key: obs[key]
            if key in self.spec.images
            else self.normalizer.normalize(key, obs[key]).to(dtype)
            for key in self.spec.obs
        }
        encoded = self.encoder(ready) if augment is None else self.encoder(ready, augment)
        features: Tensor = encoded.to(dtype)
        return features

    @torch.inference_mode()
    def predict_trajectory(
        self,
        obs: Mapping[str, Tensor],
        *,
        nfe: int | None = None,
        noise: Tensor | None = None,
        sampler: SamplerKind | None = None,
        plan: Tensor | None = None,
    ) -> Tensor:
        """All predicted actions (B, T, A) in env units; the first is at the oldest observation.

        Args:
            obs: (B, To, ...) per key, env units, oldest first, on the policy's device. Keys that
                the policy does not know are ignored and logged once.
            nfe: network evaluations; None takes the policy's own :attr:`nfe`.
            noise: (B, T, A) standard normal, or (B, K, T, A) where the sampler takes K > 1 draws;
                drawn here if not given. It is multiplied by the policy's ``noise_scale``: below 1
                samples are less diverse and more typical (the low-temperature sampling of Ajay et
                al. 2023).
            sampler: another one than the policy's own.
            plan: (B, T, A) in env units, the running plan as :meth:`PolicySpec.shifted` gives it,
                for a policy with :attr:`warm_start`; rows with NaN have none and begin from noise.

        Raises:
            SpecError: observation keys or shapes, a noise or plan shape that do not fit, or a plan
                without a warm start.
            ValueError: an ``nfe`` that the sampler cannot do, or a sampler for other networks.
        """
        batch_size = self.spec.check_obs(obs)
        features = self.encode(checked_tensors(self.spec, obs, self.device))
        kind = self.sampler
        if sampler is not None:
            check_sampler(sampler, kind)
            kind = sampler
        nfe = self.nfe if nfe is None else nfe
        n_noises = get_sampler(kind).n_noises(nfe)
        shape = (batch_size, *self.spec.noise_shape_of(n_noises))
        if noise is None:
            noise = torch.randn(shape, device=features.device, dtype=features.dtype)
        elif tuple(noise.shape) != shape:
            raise SpecError(
                f"noise has shape {tuple(noise.shape)}, expected {shape} (batch, "
                f"{'' if n_noises == 1 else 'draws of noise, '}horizon, action_dim)"
            )
        x, start = noise * self.noise_scale, None
        if plan is not None:
            x, start = self._warm(x, plan)
        action = sample(
            self.flow_map,
            x,
            features,
            nfe=nfe,
            kind=kind,
            floor=self.time_floor,
            start=start,
        )
        return self.normalizer.unnormalize("action", action)

    def _warm(self, noise: Tensor, plan: Tensor) -> tuple[Tensor, Tensor]:
        """Where decisions begin that have a plan (B, T, A), and at which times (B,)."""
        if self._warm_start is None:
            raise SpecError("a plan was given, but this policy has no warm_start; set it, or none")
        if plan.shape != noise.shape:
            raise SpecError(
                f"plan has shape {tuple(plan.shape)}, expected {tuple(noise.shape)}"
                " (batch, horizon, action_dim): spec.shifted(plan, steps) makes it"
            )
        known = plan.isfinite().all(-1).all(-1)
        start = torch.where(known, self._warm_start, 1.0).to(noise.dtype)
        x = self.normalizer.normalize("action", plan).to(noise.dtype)
        return start_between(self.flow_map.path, x, noise, start), start

    def predict_action_chunk(
        self,
        obs: Mapping[str, Tensor],
        *,
        nfe: int | None = None,
        noise: Tensor | None = None,
        sampler: SamplerKind | None = None,
        plan: Tensor | None = None,
    ) -> Tensor:
        """The actions to execute now, (B, Ta, A) in env units: see :meth:`predict_trajectory`."""
        trajectory = self.predict_trajectory(obs, nfe=nfe, noise=noise, sampler=sampler, plan=plan)
        first = self.spec.n_obs_steps - 1
        return trajectory[:, first : first + self.spec.n_action_steps]

    def infer(
        self,
        obs: Mapping[str, npt.NDArray[Any]],
        noise: npt.NDArray[Any] | None = None,
        *,
        nfe: int | None = None,
        plan: npt.NDArray[Any] | None = None,
    ) -> npt.NDArray[Any]:
        """:meth:`predict_action_chunk` for numpy.

        Raises:
            SpecError: as there, or an observation that holds NaN or inf (key and count).
        """
        return self.infer_plan(obs, noise, nfe=nfe, plan=plan)[:, : self.spec.n_action_steps]

    def infer_plan(
        self,
        obs: Mapping[str, npt.NDArray[Any]],
        noise: npt.NDArray[Any] | None = None,
        *,
        nfe: int | None = None,
        plan: npt.NDArray[Any] | None = None,
    ) -> npt.NDArray[Any]:
        """Every predicted action from the newest observation on, (B, P, A) with P = T - To + 1.

        Its first Ta actions are those of :meth:`infer`. A control loop needs the others: with an
        inference that takes d steps, actions d to d + Ta - 1 are the first that can be executed.

        Args:
            obs: (B, To, ...) per key, env units, oldest first.
            noise: (B, T, A) standard normal; drawn here if not given.
            nfe: network evaluations; None takes the policy's own.
            plan: (B, T, A) the running plan, for a policy with :attr:`warm_start`: what this method
                gave for the decision before, through :meth:`PolicySpec.shifted`. Rows of NaN: none.

        Raises:
            SpecError: as :meth:`infer`, or a plan that holds other rows than of numbers or of NaN.
            NonFiniteActionError: the actions are not finite.
        """
        rows = self.spec.check_obs(obs)
        tensors = obs_tensors(self.spec, obs, self.dtype, self.device)
        z = before = None
        if noise is not None:
            z = torch.as_tensor(
                np.require(noise, requirements="W"), dtype=self.dtype, device=self.device
            )
        if plan is not None:
            before = torch.from_numpy(read_plan(self.spec, plan, rows)).to(self.device)
        trajectory = self.predict_trajectory(tensors, nfe=nfe, noise=z, plan=before)
        actions = trajectory[:, self.spec.n_obs_steps - 1 :]
        if actions.dtype is torch.bfloat16:  # which numpy does not know
            actions = actions.float()
        return checked_actions(actions.cpu().numpy())

    # -- bundles --------------------------------------------------------------------------------

    def save_pretrained(
        self,
        directory: str | PathLike[str],
        *,
        card: str = "",
        metadata: Mapping[str, Any] | None = None,
        weights_dtype: torch.dtype = torch.float32,
    ) -> None:
        """Write a policy bundle: see :func:`cmpolicy.policy.bundle.write_bundle`.

        The weights are stored as they are, so hand in the EMA weights.

        Args:
            directory: the bundle; replaced if it is one, refused if it is something else.
            card: text of the model card.
            metadata: JSON-ready facts kept in ``config.json`` (command, versions, result); None
                keeps those of the bundle that the policy came from.
            weights_dtype: of the stored weights; ``torch.float16`` halves the file.
        """
        bundle = pack(self, self.metadata if metadata is None else metadata)
        write_bundle(bundle, directory, card=card, weights_dtype=weights_dtype)

    @classmethod
    def from_pretrained(
        cls, name_or_path: str | PathLike[str], device: str | torch.device = "cpu"
    ) -> ConsistencyPolicy:
        """Load a bundle directory, a bundled name such as ``pusht``, or a hub id ``owner/name``.

        Raises:
            BundleError: what is wrong with the bundle, with its path.
        """
        policy = unpack(read_bundle(name_or_path), cls)
        policy.lay_out_for_inference()
        return policy.to(device).eval().requires_grad_(False)

    def lay_out_for_inference(self) -> None:
        """Let the network store its weights in the order that one decision reads them fastest."""
        lay_out = getattr(self.net, "lay_out_for_inference", None)
        if lay_out is not None:
            lay_out()

    def push_to_hub(self, repo_id: str, *, private: bool = False, **bundle: Any) -> str:
        """Upload a bundle to the hub as ``owner/name``; ``bundle`` as for :meth:`save_pretrained`.

        Returns:
            The repository's address; ``from_pretrained(repo_id)`` loads it anywhere.

        Raises:
            BundleError: not logged in, not allowed, or no network.
        """
        with tempfile.TemporaryDirectory() as folder:
            directory = Path(folder) / repo_id.rpartition("/")[2]
            self.save_pretrained(directory, **bundle)
            try:
                return upload(directory, repo_id, private=private)
            except HubError as error:
                raise BundleError(str(error)) from error

    def _objective(self) -> Objective:
        if self.objective is None:
            raise ValueError(
                "this policy has no objective, so it cannot be trained: build it with "
                "objective=build_objective('psd'), or set policy.objective"
            )
        return self.objective
