"""Encoders of camera frames: a crop, a convolutional network per camera, spatial softmax.

Legend: B batch, To observation steps, C cameras, H and W height and width of a frame, h and w of
its crop, K keypoints, D features.

Frames come as (B, To, H, W, 3) uint8 and stay so until they are cropped on the device. The crop is
random while training, the same for all frames of one window and camera, and in the centre otherwise
(Diffusion Policy, Chi et al., RSS 2023). To add a backbone, derive a settings class from
:class:`ImageEncoderConfig` with ``backbone`` and register it.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from cmpolicy.nn.encoders.state import StateEncoder
from cmpolicy.nn.registry import register_encoder
from cmpolicy.spec import PolicySpec

#: Uniform numbers per camera: place of the crop (2), brightness, contrast.
_PER_CAMERA = 4
#: A crop that sees less of the frame than this has to be asked for by ``small_crop``.
_LEAST_CROP = 0.6


@dataclass(frozen=True)
class ImageEncoderConfig(ABC):
    """Settings that all encoders of frames share.

    Args:
        dim: size of the features of all numbers (not frames) together.
        camera_dim: size of the features of one frame.
        crop: share of the height and of the width that the network sees, in (0, 1].
        small_crop: allow a crop below 0.6, which rarely is what one wants.
        jitter: largest relative change of brightness and of contrast in training, in [0, 1).
        shared: one network for all cameras.

    Raises:
        ValueError: a number outside its range.
    """

    dim: int = 64
    camera_dim: int = 64
    crop: float = 0.875
    small_crop: bool = False
    jitter: float = 0.0
    shared: bool = False

    def __post_init__(self) -> None:
        for name in ("dim", "camera_dim"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1")
        if not 0 < self.crop <= 1:
            raise ValueError(f"crop={self.crop} must be in (0, 1]: the share that is seen")
        if self.crop < _LEAST_CROP and not self.small_crop:
            raise ValueError(
                f"crop={self.crop} sees less than {_LEAST_CROP:.0%} of the height and the width of "
                "a frame; if that is meant, set small_crop=true"
            )
        if not 0 <= self.jitter < 1:
            raise ValueError(f"jitter={self.jitter} must be in [0, 1)")

    @abstractmethod
    def backbone(self) -> nn.Module:
        """A fresh network: (N, 3, h, w) in [-1, 1] -> (N, camera_dim), for any h and w."""

    def build(self, spec: PolicySpec) -> ImageEncoder:
        """A fresh encoder of a policy's observations.

        Raises:
            ValueError: there is no camera frame among them.
        """
        if not spec.images:
            raise ValueError(
                f"the policy has no camera frames (its observations: {sorted(spec.obs)}); choose "
                "encoder=mlp, or name frames in data.obs"
            )
        return ImageEncoder(self, spec)


@register_encoder
@dataclass(frozen=True)
class CompactEncoderConfig(ImageEncoderConfig):
    """A residual network made for CPUs: a wide stem of stride 4, two stages, spatial softmax.

    Args:
        width: channels of the first stage; the second has twice as many.
        blocks: residual blocks per stage.
    """

    kind: ClassVar[str] = "compact"

    width: int = 32
    blocks: int = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        # No percent sign here: LeRobot's parser takes this for help text and formats it.
        if self.width < 8 or self.width & 7:
            raise ValueError(f"width={self.width} must be a multiple of 8")
        if self.blocks < 1:
            raise ValueError(f"blocks={self.blocks} must be at least 1")

    def backbone(self) -> nn.Module:
        """See the class; about 0.1M parameters at width 32."""
        first, second = self.width, 2 * self.width
        return nn.Sequential(
            nn.Conv2d(3, first, 8, stride=4, padding=2),
            *(_Residual(first) for _ in range(self.blocks)),
            _norm(first),
            nn.ReLU(inplace=True),
            nn.Conv2d(first, second, 3, stride=2, padding=1),
            *(_Residual(second) for _ in range(self.blocks)),
            _norm(second),
            nn.ReLU(inplace=True),
            SpatialSoftmax(second, second // 2, self.camera_dim),
        )


@register_encoder
@dataclass(frozen=True)
class ResNet18EncoderConfig(ImageEncoderConfig):
    """torchvision's ResNet-18 with GroupNorm in the place of BatchNorm, and spatial softmax.

    Args:
        pretrained: start from ImageNet weights, which torchvision downloads once.
        keypoints: of the spatial softmax.
    """

    kind: ClassVar[str] = "resnet18"

    pretrained: bool = False
    keypoints: int = 32

    def backbone(self) -> nn.Module:
        """See the class.

        Raises:
            ImportError: torchvision is missing.
            ValueError: the ImageNet weights are neither on this machine nor can be downloaded.
        """
        try:
            from torchvision.models import ResNet18_Weights, resnet18
        except ImportError as error:
            raise ImportError(
                "encoder=resnet18 needs torchvision: pip install 'cmpolicy[image]'"
            ) from error
        # GroupNorm has no running statistics: the EMA of the weights is then all of the EMA.
        network = resnet18(norm_layer=lambda channels: nn.GroupNorm(channels // 16, channels))
        if self.pretrained:
            weights = ResNet18_Weights.IMAGENET1K_V1
            try:
                state = weights.get_state_dict(progress=True, check_hash=True)
            except OSError as error:
                raise ValueError(
                    f"encoder.pretrained=true needs ImageNet weights, and they could not be had "
                    f"({error}). Put {weights.url.rpartition('/')[2]} of torchvision into "
                    f"{torch.hub.get_dir()}/checkpoints, or train with encoder.pretrained=false"
                ) from error
            own = network.state_dict()
            network.load_state_dict({k: v for k, v in state.items() if k in own}, strict=False)
        layers = [child for name, child in network.named_children() if name not in _HEAD]
        return nn.Sequential(*layers, SpatialSoftmax(512, self.keypoints, self.camera_dim))


_HEAD = ("avgpool", "fc")


class ImageEncoder(nn.Module):
    """Frames and numbers, (B, To, ...) per key, to features (B, D).

    D is To * C * camera_dim, and ``dim`` more where there are numbers.
    """

    def __init__(self, config: ImageEncoderConfig, spec: PolicySpec) -> None:
        super().__init__()
        self.keys = spec.images
        self.crops = [_crop_size(spec.obs[key], config.crop) for key in self.keys]
        self.jitter = config.jitter
        self.n_augment = _PER_CAMERA * len(self.keys)
        networks = [config.backbone() for _ in self.keys[: 1 if config.shared else None]]
        self.cameras = nn.ModuleList(networks)
        self.state = (
            StateEncoder(config.dim, spec.states, spec.n_obs_steps) if spec.states else None
        )
        frames = spec.n_obs_steps * len(self.keys) * config.camera_dim
        self.feature_dim = frames + (config.dim if spec.states else 0)

    def forward(self, obs: Mapping[str, Tensor], augment: Tensor | None = None) -> Tensor:
        """See the class.

        Args:
            obs: numbers normalised, frames uint8.
            augment: (B, 4 C) uniform in [0, 1): place of the crop, brightness and contrast of each
                camera; None crops in the centre and changes nothing else.
        """
        parts = [] if self.state is None else [self.state(obs)]
        for i, key in enumerate(self.keys):
            own = None if augment is None else augment[:, _PER_CAMERA * i : _PER_CAMERA * (i + 1)]
            x = self.view(i, obs[key], own)  # (B, To, h, w, 3)
            network = self.cameras[min(i, len(self.cameras) - 1)]
            frames = x.flatten(0, 1).permute(0, 3, 1, 2)  # channels last in memory
            parts.append(network(frames).view(x.shape[0], -1).to(torch.float32))
        return parts[0] if len(parts) == 1 else torch.cat([p.to(parts[-1]) for p in parts], dim=-1)

    def view(self, camera: int, frames: Tensor, augment: Tensor | None = None) -> Tensor:
        """What the network of a camera sees, (B, To, h, w, 3) in about [-1, 1].

        Args:
            camera: its number.
            frames: (B, To, H, W, 3) uint8.
            augment: (B, 4) as in :meth:`forward`.
        """
        height, width = self.crops[camera]
        if augment is None:
            cut = centre_crop(frames, height, width)
            return cut.to(self._dtype) / 127.5 - 1
        cut = crop_windows(frames, augment[:, :2], height, width)
        x = cut.to(self._dtype) / 127.5 - 1
        if self.jitter:
            change = (2 * augment[:, 2:, None, None, None, None] - 1) * self.jitter
            mean = x.mean(dim=(1, 2, 3, 4), keepdim=True)
            x = (x - mean) * (1 + change[:, 1]) + mean + change[:, 0]
        return x

    @property
    def _dtype(self) -> torch.dtype:
        return next(self.cameras.parameters()).dtype


class SpatialSoftmax(nn.Module):
    """Where in the frame each of K maps is active (Finn et al., 2016), and how much, to features.

    (N, channels, h, w) -> (N, features). The places are in [-1, 1].
    """

    def __init__(self, channels: int, keypoints: int, features: int) -> None:
        super().__init__()
        self.maps = nn.Conv2d(channels, keypoints, 1)
        self.out = nn.Linear(2 * keypoints + channels, features)

    def forward(self, x: Tensor) -> Tensor:
        """See the class."""
        maps = self.maps(x).flatten(2).float()  # (N, K, h w)
        weights = maps.softmax(dim=-1)
        rows = torch.linspace(-1, 1, x.shape[2], device=x.device)
        columns = torch.linspace(-1, 1, x.shape[3], device=x.device)
        y = weights @ rows.repeat_interleave(x.shape[3])
        z = weights @ columns.repeat(x.shape[2])
        features: Tensor = self.out(torch.cat([y, z, x.mean(dim=(2, 3)).float()], dim=-1).to(x))
        return features


class _Residual(nn.Module):
    """Pre-activation residual block (He et al., 2016) with GroupNorm."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            _norm(channels),
            nn.ReLU(inplace=True),
            nn.Conv2d(channels, channels, 3, padding=1),
            _norm(channels),
            nn.ReLU(inplace=True),
            nn.Conv2d(channels, channels, 3, padding=1),
        )

    def forward(self, x: Tensor) -> Tensor:
        """(N, channels, h, w), unchanged in shape."""
        y: Tensor = x + self.body(x)
        return y


def _norm(channels: int) -> nn.GroupNorm:
    return nn.GroupNorm(channels // 8, channels)


def _crop_size(shape: tuple[int, ...], share: float) -> tuple[int, int]:
    return max(1, round(share * shape[0])), max(1, round(share * shape[1]))


def centre_crop(frames: Tensor, height: int, width: int) -> Tensor:
    """The middle (..., height, width, 3) of frames (..., H, W, 3); a view."""
    top = (frames.shape[-3] - height) // 2
    left = (frames.shape[-2] - width) // 2
    return frames[..., top : top + height, left : left + width, :]


def crop_windows(frames: Tensor, place: Tensor, height: int, width: int) -> Tensor:
    """A crop (B, To, height, width, 3) of frames (B, To, H, W, 3), one place per window.

    Args:
        frames: uint8.
        place: (B, 2) uniform in [0, 1): from top and left to bottom and right.
        height, width: of the crop.
    """
    batch, steps = frames.shape[:2]
    free = torch.tensor(
        [frames.shape[2] - height + 1, frames.shape[3] - width + 1], device=place.device
    )
    corner = (place * free).long()  # (B, 2)
    rows = corner[:, :1] + torch.arange(height, device=place.device)  # (B, h)
    b = torch.arange(batch, device=place.device)[:, None, None]
    t = torch.arange(steps, device=place.device)[None, :, None]
    # every row of a crop is one run of bytes: windows of 3 width numbers, 3 apart
    runs = frames.flatten(3).unfold(3, 3 * width, 3)
    cut = runs[b, t, rows[:, None, :], corner[:, 1, None, None]]
    return cut.view(batch, steps, height, width, 3)
