"""Encoders of camera frames: a crop, a convolutional network per camera, spatial softmax.

Legend: B batch, To observation steps, C cameras, H and W height and width of a frame, h and w of
its crop, K keypoints, D features.

Frames come as (B, To, H, W, 3) uint8 and stay so until they are cropped on the device. The crop is
random while training, the same for all frames of one window and camera, and in the centre otherwise
(Diffusion Policy, Chi et al., RSS 2023). Places in the features count from the middle of the whole
frame, so they do not depend on where the crop was. To add a backbone, derive a settings class from
:class:`ImageEncoderConfig` with ``backbone`` and register it.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from cmpolicy.nn.encoders.state import StateEncoder
from cmpolicy.nn.registry import register_encoder
from cmpolicy.spec import PolicySpec

#: Uniform numbers per camera: place of the crop (2), brightness, contrast.
_PER_CAMERA = 4
#: A crop that sees less of the frame than this has to be asked for by ``small_crop``.
_LEAST_CROP = 0.6


class View(NamedTuple):
    """Crops x (B, To, h, w, 3), their middle as of :meth:`ImageEncoder.view`, the frame's size."""

    x: Tensor
    middle: Tensor
    size: tuple[int, int]


class Backbone(NamedTuple):
    """A network (N, 3, h, w) in about [-1, 1] -> (N, channels, h / stride, w / stride), rounded."""

    network: nn.Module
    channels: int
    stride: int


@dataclass(frozen=True)
class ImageEncoderConfig(ABC):
    """Settings that all encoders of frames share.

    Args:
        dim: size of the features of all numbers (not frames) together.
        camera_dim: size of the features of one frame.
        keypoints: places per frame that the spatial softmax finds.
        crop: share of the height and of the width that the network sees, in (0, 1].
        small_crop: allow a crop below 0.6, which rarely is what one wants.
        jitter: largest relative change of brightness and of contrast in training, in [0, 1).
        shared: one network for all cameras.

    Raises:
        ValueError: a number outside its range.
    """

    dim: int = 64
    camera_dim: int = 64
    keypoints: int = 32
    crop: float = 0.875
    small_crop: bool = False
    jitter: float = 0.0
    shared: bool = False

    def __post_init__(self) -> None:
        for name in ("dim", "camera_dim", "keypoints"):
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
    def backbone(self) -> Backbone:
        """A fresh network for frames of any size."""

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

    def backbone(self) -> Backbone:
        """See the class; about 0.1M parameters at width 32."""
        first, second = self.width, 2 * self.width
        network = nn.Sequential(
            nn.Conv2d(3, first, 8, stride=4, padding=2),
            *(_Residual(first) for _ in range(self.blocks)),
            _norm(first),
            nn.ReLU(inplace=True),
            nn.Conv2d(first, second, 3, stride=2, padding=1),
            *(_Residual(second) for _ in range(self.blocks)),
            _norm(second),
            nn.ReLU(inplace=True),
        )
        return Backbone(network, second, stride=8)


@register_encoder
@dataclass(frozen=True)
class ResNet18EncoderConfig(ImageEncoderConfig):
    """torchvision's ResNet-18 with GroupNorm in the place of BatchNorm, and spatial softmax.

    Args:
        pretrained: start from ImageNet weights, which torchvision downloads once.
    """

    kind: ClassVar[str] = "resnet18"

    pretrained: bool = False

    def backbone(self) -> Backbone:
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
        return Backbone(nn.Sequential(*layers), 512, stride=32)


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
        networks = [_Camera(config) for _ in self.keys[: 1 if config.shared else None]]
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
        parts += self.look(self.views(obs, augment))
        return parts[0] if len(parts) == 1 else torch.cat([p.to(parts[-1]) for p in parts], dim=-1)

    def views(self, obs: Mapping[str, Tensor], augment: Tensor | None = None) -> list[View]:
        """What every camera's network sees; arguments as of :meth:`forward`."""
        found = []
        for i, key in enumerate(self.keys):
            own = None if augment is None else augment[:, _PER_CAMERA * i : _PER_CAMERA * (i + 1)]
            x, middle = self.view(i, obs[key], own)
            found.append(View(x, middle, (obs[key].shape[2], obs[key].shape[3])))
        return found

    def look(self, views: Sequence[View]) -> list[Tensor]:
        """Features (B, To * camera_dim) of every camera."""
        last = len(self.cameras) - 1
        features = [self.cameras[min(i, last)](*view) for i, view in enumerate(views)]
        return [
            f.view(view.x.shape[0], -1).to(torch.float32)
            for f, view in zip(features, views, strict=True)
        ]

    def view(
        self, camera: int, frames: Tensor, augment: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """What the network of a camera sees, (B, To, h, w, 3) in about [-1, 1], and where.

        The second is the middle of each window's crop, (B, 2) or (1, 2): down and right of the
        middle of the frame, whose edges are at -1 and 1.

        Args:
            camera: its number.
            frames: (B, To, H, W, 3) uint8.
            augment: (B, 4) as in :meth:`forward`.
        """
        size = self.crops[camera]
        free = [whole - seen for whole, seen in zip(frames.shape[2:4], size, strict=True)]
        if augment is None:
            cut = centre_crop(frames, *size)
            corners = [torch.full((1,), n // 2, device=frames.device) for n in free]
        else:
            corners = [(augment[:, i] * (n + 1)).long() for i, n in enumerate(free)]
            cut = crop_windows(frames, torch.stack(corners, dim=-1), *size)
        away = [
            (corner - n / 2) * (2 / whole)
            for corner, n, whole in zip(corners, free, frames.shape[2:4], strict=True)
        ]
        x = cut.to(self._dtype) / 127.5 - 1
        if augment is not None and self.jitter:
            change = (2 * augment[:, 2:, None, None, None, None] - 1) * self.jitter
            mean = x.mean(dim=(1, 2, 3, 4), keepdim=True)
            x = (x - mean) * (1 + change[:, 1]) + mean + change[:, 0]
        return x, torch.stack(away, dim=-1)

    @property
    def _dtype(self) -> torch.dtype:
        return next(self.cameras.parameters()).dtype


class _Camera(nn.Module):
    """The network of a camera: crops (B, To, h, w, 3) to features (B To, camera_dim)."""

    def __init__(self, config: ImageEncoderConfig) -> None:
        super().__init__()
        backbone = config.backbone()
        self.backbone = backbone.network
        self.softmax = SpatialSoftmax(backbone.channels, config.keypoints, backbone.stride)
        self.out = nn.Linear(2 * config.keypoints + backbone.channels, config.camera_dim)

    def forward(self, x: Tensor, middle: Tensor, size: Sequence[int]) -> Tensor:
        """See the class; ``middle`` as of :meth:`ImageEncoder.view`, ``size`` of the whole frame.

        Beside the places come the means of all channels: what is there, wherever it is.
        """
        frames = x.flatten(0, 1).permute(0, 3, 1, 2)  # channels last in memory
        maps = self.backbone(frames)
        places = self.softmax(maps, size).unflatten(0, x.shape[:2]) + middle[:, None, None]
        means = maps.mean(dim=(2, 3))
        with torch.autocast(x.device.type, enabled=False):  # as in SpatialSoftmax
            found = torch.cat([places.flatten(0, 1).flatten(1), means.to(places)], dim=-1)
            features: Tensor = self.out(found.to(self.out.weight))
        return features


class SpatialSoftmax(nn.Module):
    """Where each of K maps is active (Finn et al., 2016).

    (N, channels, h, w) -> (N, K, 2): down and right of the middle of the maps, in units of half the
    frame. A cell is ``stride`` pixels of the frame.
    """

    def __init__(self, channels: int, keypoints: int, stride: int) -> None:
        super().__init__()
        self.maps = nn.Conv2d(channels, keypoints, 1)
        self.stride = stride

    def forward(self, x: Tensor, size: Sequence[int]) -> Tensor:
        """See the class; ``size`` is (H, W) of the frame."""
        height, width = x.shape[2:]
        logits = self.maps(x).flatten(2).float()
        rows, columns = (
            (torch.arange(n, device=x.device) - (n - 1) / 2) * (2 * self.stride / whole)
            for n, whole in zip((height, width), size, strict=True)
        )
        cells = torch.stack([rows.repeat_interleave(width), columns.repeat(height)], dim=-1)
        # Single precision: bf16 would round a place to a 256th of half the frame.
        with torch.autocast(x.device.type, enabled=False):
            places: Tensor = logits.softmax(dim=-1) @ cells  # (N, K, h w) @ (h w, 2)
        return places


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


def crop_windows(frames: Tensor, corner: Tensor, height: int, width: int) -> Tensor:
    """A crop (B, To, height, width, 3) of frames (B, To, H, W, 3), one place per window.

    Args:
        frames: uint8.
        corner: (B, 2) int64, its first row and column.
        height, width: of the crop.
    """
    batch, steps = frames.shape[:2]
    rows = corner[:, :1] + torch.arange(height, device=corner.device)  # (B, h)
    b = torch.arange(batch, device=corner.device)[:, None, None]
    t = torch.arange(steps, device=corner.device)[None, :, None]
    # every row of a crop is one run of bytes: windows of 3 width numbers, 3 apart
    runs = frames.flatten(3).unfold(3, 3 * width, 3)
    cut = runs[b, t, rows[:, None, :], corner[:, 1, None, None]]
    return cut.view(batch, steps, height, width, 3)
