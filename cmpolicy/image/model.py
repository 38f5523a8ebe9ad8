"""ImageFlowModel: what the trainer trains, a flow map over images given their class."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import torch
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor, nn

from cmpolicy.flow.flow_map import FlowMap
from cmpolicy.flow.health import Health, flow_health
from cmpolicy.flow.objectives import LossOutput, Objective
from cmpolicy.flow.path import get_path
from cmpolicy.flow.sampler import SamplerKind, get_sampler, sample, trajectory
from cmpolicy.image.datasets.data import ImageBatch
from cmpolicy.image.guidance import Guidance, LabelDraws
from cmpolicy.image.net import ImageNet, ImageNetConfig

Generators = torch.Generator | Sequence[torch.Generator] | None


class ImageFlowModel(nn.Module):
    """A class-conditional flow map over images, with what it needs to be trained.

    Args:
        net: the network, the only weights there are.
        path: ``linear`` or ``trigonometric``.
        sampler: the one that its objective asks for, see :mod:`cmpolicy.flow.sampler`.
        objective: what :meth:`compute_loss` computes.
        guidance: guidance at training time.

    Raises:
        ValueError: an unknown path or sampler, or an objective that differentiates forward through
            a network that cannot be.
    """

    def __init__(
        self,
        net: ImageNet,
        *,
        path: str = "linear",
        sampler: SamplerKind = "flow_map",
        objective: Objective,
        guidance: Guidance | None = None,
    ) -> None:
        super().__init__()
        get_sampler(sampler)  # raises
        check_derivative(objective, net.net_config)
        self.path_name = path
        self.sampler: SamplerKind = sampler
        self.objective = objective
        self.guidance = guidance or Guidance()
        self.flow_map = FlowMap(net, get_path(path))

    @property
    def net(self) -> ImageNet:
        """The network F inside the flow map."""
        return cast(ImageNet, self.flow_map.net)

    @property
    def device(self) -> torch.device:
        return next(self.parameters()).device

    # -- training -------------------------------------------------------------------------------

    def draw(self, batch_size: int, generator: torch.Generator | None = None) -> LabelDraws:
        """Noise, times and dropped labels of one training step, on the model's device."""
        draws = self.objective.draw(batch_size, self.net.image_shape, generator, self.device)
        return self.guidance.draw(draws, generator)

    def compute_loss(
        self,
        batch: ImageBatch,
        *,
        draws: LabelDraws,
        progress: float = 0.0,
        ema: ImageFlowModel | None = None,
    ) -> LossOutput:
        """Loss of a batch of images.

        Args:
            batch: images (B, C, H, W) in [-1, 1], labels (B,).
            draws: of this batch, from :meth:`draw` or its slice.
            progress: share of the run that is done, in [0, 1]; drives schedules.
            ema: the same model with EMA weights, for objectives that ask for them.
        """
        null = torch.full_like(batch["labels"], self.net.n_classes)
        labels = torch.where(draws.dropped, null, batch["labels"])
        return self.objective(
            self.flow_map,
            batch["images"],
            labels,
            draws,
            progress=progress,
            ema=None if ema is None else ema.flow_map,
            ema_features=labels,
            velocity_target=self.guidance.target(self.flow_map, null, draws.dropped),
        )

    def forward(self, batch: ImageBatch, **kwargs: Any) -> LossOutput:
        """:meth:`compute_loss`, so that wrappers such as DDP see every training pass."""
        return self.compute_loss(batch, **kwargs)

    @torch.no_grad()
    def health(self, batch: ImageBatch, generator: torch.Generator | None = None) -> Health:
        """How well the network keeps the identities of a flow map on these images."""
        return flow_health(
            self.flow_map, batch["images"], batch["labels"], generator, kind=self.sampler
        )

    def generate(
        self,
        labels: Tensor,
        *,
        nfe: int = 1,
        generator: Generators = None,
    ) -> Tensor:
        return generate_images(
            self.flow_map, labels, nfe=nfe, generator=generator, sampler=self.sampler
        )


@torch.no_grad()
def generate_images(
    flow_map: FlowMap,
    labels: Tensor,
    *,
    nfe: int = 1,
    generator: Generators = None,
    sampler: SamplerKind = "flow_map",
) -> Tensor:
    """Images of these classes, float32 (N, C, H, W) in [-1, 1].

    Args:
        flow_map: over an :class:`ImageNet`.
        labels: (N,) int64.
        nfe: network evaluations per image.
        generator: of the noise; a list has one per image, and an image then does not depend on the
            others. Generators of the CPU give the same noise on every device.
        sampler: see :mod:`cmpolicy.flow.sampler`.

    Raises:
        ValueError: ``nfe`` below 1, an unknown sampler, or a list of another number of
            generators than of labels.
    """
    noise = _noise(flow_map, len(labels), generator, get_sampler(sampler).n_noises(nfe))
    images = sample(flow_map, noise, labels.to(noise.device), nfe=nfe, kind=sampler)
    return images.clamp(-1.0, 1.0).float()


@torch.no_grad()
def generate_trajectory(
    flow_map: FlowMap,
    labels: Tensor,
    *,
    nfe: int = 1,
    generator: Generators = None,
    sampler: SamplerKind = "flow_map",
) -> Tensor:
    """States of :func:`generate_images`, noise to image: float32 (nfe + 1, N, C, H, W).

    They are not clamped: noise is not within [-1, 1].
    """
    noise = _noise(flow_map, len(labels), generator, get_sampler(sampler).n_noises(nfe))
    states = trajectory(flow_map, noise, labels.to(noise.device), nfe=nfe, kind=sampler)
    return states.float()


def _noise(flow_map: FlowMap, count: int, generator: Generators, n_noises: int) -> Tensor:
    if isinstance(generator, Sequence) and len(generator) != count:
        raise ValueError(
            f"{len(generator)} generators were given for {count} images; give one, or one per image"
        )
    net = cast(ImageNet, flow_map.net)
    noise: Tensor = randn_tensor(
        (count, *(() if n_noises == 1 else (n_noises,)), *net.image_shape),
        generator=list(generator) if isinstance(generator, Sequence) else generator,
        device=net.device,
        dtype=net.dtype,
    )
    return noise


def check_derivative(objective: Objective, net: ImageNetConfig) -> None:
    """Refuse forward-mode differentiation of a network that cannot be differentiated so.

    Raises:
        ValueError: what to choose instead.
    """
    if getattr(objective, "derivative", None) == "jvp" and not net.differentiates_forward:
        raise ValueError(
            "objective.derivative=jvp: torch cannot differentiate its fused attention forward; "
            "choose objective.derivative=difference, or net.attention=plain (slower, more memory)"
        )
