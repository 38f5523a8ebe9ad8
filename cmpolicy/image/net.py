"""Networks F(x, t, s, class) for images: diffusers' U-Net or DiT, told both times and the class.

Legend: B batch, C channels, H = W image size in pixels, E size of the embedding.
Either network is told the sum of an embedding of t and t - s and an embedding of the class; row
``n_classes`` of the latter stands for "no label".
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal, get_args

import torch
from diffusers import ConfigMixin, DiTTransformer2DModel, ModelMixin, UNet2DModel
from diffusers.configuration_utils import register_to_config
from diffusers.models.attention_processor import Attention, AttnProcessor
from torch import Tensor, nn

from cmpolicy.nn.embeddings import TwoTimeEmbedding, check_time_dim
from cmpolicy.schema import at_least

#: ``fused`` is torch's own kernel, which cannot be differentiated forward; ``plain`` can.
AttentionKernel = Literal["fused", "plain"]


@dataclass(frozen=True, kw_only=True)
class UNetConfig:
    """Size of diffusers' ``UNet2DModel``.

    Args:
        widths: channels at each resolution, the full one first; each next is half as large.
        blocks: residual blocks per resolution on the way down (one more on the way up).
        attention_levels: resolutions with self-attention, 0 the full one; [] for none.
        head_dim: channels per attention head.
        groups: of the group normalisation; divides every width.
        embedding: E, a multiple of 4.
        attention: see :data:`AttentionKernel`.
    """

    kind: Literal["unet"] = "unet"
    widths: tuple[int, ...] = (32, 64)
    blocks: int = 1
    attention_levels: tuple[int, ...] = ()
    head_dim: int = 32
    groups: int = 8
    embedding: int = 128
    attention: AttentionKernel = "fused"

    def __post_init__(self) -> None:
        _check_common(self.embedding, self.attention)
        if not self.widths or any(w < 1 or w % self.groups for w in self.widths):
            raise ValueError(
                f"net.widths={list(self.widths)} must be at least one multiple of "
                f"net.groups={self.groups}"
            )
        at_least("net.blocks", self.blocks, 1)
        strange = [k for k in self.attention_levels if not 0 <= k < len(self.widths)]
        if strange:
            raise ValueError(
                f"net.attention_levels={list(self.attention_levels)}: there is no resolution "
                f"{strange[0]}; net.widths={list(self.widths)} makes 0 to {len(self.widths) - 1}"
            )
        for level in self.attention_levels:
            if self.widths[level] % self.head_dim:
                raise ValueError(
                    f"net.widths={list(self.widths)}: resolution {level} has attention, so its "
                    f"width must be a multiple of net.head_dim={self.head_dim}"
                )

    @property
    def differentiates_forward(self) -> bool:
        """Whether ``torch.func.jvp`` works on the network."""
        return not self.attention_levels or self.attention == "plain"

    def build(self, image_size: int, channels: int) -> nn.Module:
        """The U-Net: body(x, 0, class_labels=embedding).

        Raises:
            ValueError: the image cannot be halved as often.
        """
        halvings = len(self.widths) - 1
        if image_size % 2**halvings:
            raise ValueError(
                f"net.widths={list(self.widths)} halves the image {halvings} times, which "
                f"{image_size} pixels do not allow; leave out widths, or choose dataset.image_size"
            )
        at = [level in self.attention_levels for level in range(len(self.widths))]
        body: Any = UNet2DModel(
            sample_size=image_size,
            in_channels=channels,
            out_channels=channels,
            block_out_channels=self.widths,
            layers_per_block=self.blocks,
            down_block_types=tuple("AttnDownBlock2D" if a else "DownBlock2D" for a in at),
            up_block_types=tuple("AttnUpBlock2D" if a else "UpBlock2D" for a in reversed(at)),
            add_attention=at[-1],
            attention_head_dim=self.head_dim,
            norm_num_groups=self.groups,
            resnet_time_scale_shift="scale_shift",
            time_embedding_dim=self.embedding,
            class_embed_type="identity",
        )
        _zero(body.conv_out)
        unet: nn.Module = body
        return unet


@dataclass(frozen=True, kw_only=True)
class DiTConfig:
    """Size of diffusers' ``DiTTransformer2DModel`` (Peebles and Xie 2023).

    Args:
        width: E and the size of a token, a multiple of 4 and of ``heads``.
        depth: transformer blocks.
        heads: of the attention.
        patch_size: side in pixels of the patch that is one token.
        attention: see :data:`AttentionKernel`.
    """

    kind: Literal["dit"] = "dit"
    width: int = 128
    depth: int = 6
    heads: int = 4
    patch_size: int = 2
    attention: AttentionKernel = "fused"

    def __post_init__(self) -> None:
        _check_common(self.width, self.attention)
        for name in ("depth", "heads", "patch_size"):
            at_least(f"net.{name}", getattr(self, name), 1)
        if self.width % self.heads:
            raise ValueError(f"net.width={self.width} must be a multiple of net.heads={self.heads}")

    @property
    def embedding(self) -> int:
        """E."""
        return self.width

    @property
    def differentiates_forward(self) -> bool:
        """Whether ``torch.func.jvp`` works on the network."""
        return self.attention == "plain"

    def build(self, image_size: int, channels: int) -> nn.Module:
        """The transformer: body(x, class_labels=embedding).

        Raises:
            ValueError: an image that is not made of whole patches.
        """
        if image_size % self.patch_size:
            raise ValueError(
                f"net.patch_size={self.patch_size} does not divide an image of {image_size} pixels"
            )
        body: Any = DiTTransformer2DModel(
            num_attention_heads=self.heads,
            attention_head_dim=self.width // self.heads,
            in_channels=channels,
            num_layers=self.depth,
            sample_size=image_size,
            patch_size=self.patch_size,
            num_embeds_ada_norm=1,  # each block's own embedding, which is replaced
        )
        for block in body.transformer_blocks:
            block.norm1.emb = _Given()
            _zero(block.norm1.linear)  # adaLN-Zero: every block starts as the identity
        _zero(body.proj_out_2)
        transformer: nn.Module = body
        return transformer


#: Size and kind of an image network.
ImageNetConfig = UNetConfig | DiTConfig
KINDS: dict[str, type[UNetConfig] | type[DiTConfig]] = {"unet": UNetConfig, "dit": DiTConfig}


class ImageNet(ModelMixin, ConfigMixin):  # type: ignore[misc]
    """F(x (B, C, H, W), t (B,), s (B,), label (B,) or None) -> (B, C, H, W).

    A diffusers model: ``save_pretrained`` and ``from_pretrained`` (safetensors).

    Args:
        image_size, channels: of the images, H = W and C.
        n_classes: classes; labels run from 0, and ``n_classes`` itself is "no label".
        net: fields of :class:`UNetConfig` or :class:`DiTConfig`, ``kind`` among them.

    Raises:
        ValueError: sizes that do not fit each other.
    """

    @register_to_config
    def __init__(
        self, image_size: int, channels: int, n_classes: int, net: Mapping[str, Any]
    ) -> None:
        super().__init__()
        if n_classes < 1 or channels < 1:
            raise ValueError(f"a network needs classes and channels, got {n_classes}, {channels}")
        config = net_config(net)
        self.net_config = config
        self.times = TwoTimeEmbedding(config.embedding)
        # N(0, 1), as torch has it: at a DiT's usual 0.02 the class is drowned by the times, and a
        # network of MNIST needs thousands of steps to notice it
        self.classes = nn.Embedding(n_classes + 1, config.embedding)
        self.body = config.build(image_size, channels)
        if config.attention == "plain":
            for module in self.body.modules():
                if isinstance(module, Attention):
                    module.set_processor(_PlainAttention())

    @property
    def n_classes(self) -> int:
        """Number of classes, "no label" not counted."""
        return int(self.config.n_classes)

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(C, H, W)."""
        size = int(self.config.image_size)
        return int(self.config.channels), size, size

    def forward(self, x: Tensor, t: Tensor, s: Tensor, label: Tensor | None = None) -> Tensor:
        """See the class; no label means that of no class."""
        if label is None:
            label = torch.full((len(x),), self.n_classes, dtype=torch.long, device=x.device)
        embedding = self.times(t, s) + self.classes(label)
        # the body's own time stands still: both times are in the embedding
        time = torch.zeros((), dtype=torch.long, device=x.device)
        output: Tensor = self.body(x, time, class_labels=embedding, return_dict=False)[0]
        return output


class _PlainAttention(AttnProcessor):  # type: ignore[misc]
    """Attention written out in full, which torch differentiates forward."""

    def __call__(
        self,
        attn: Attention,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        temb: Tensor | None = None,
    ) -> Tensor:
        output: Tensor = super().__call__(
            attn, hidden_states, encoder_hidden_states, attention_mask, temb
        )
        # the forward derivative of a group norm needs derivatives that lie contiguous in memory
        return output.clone(memory_format=torch.contiguous_format)


class _Given(nn.Module):
    """In place of a DiT block's own embedding of time and class: the one that is handed in."""

    def forward(self, timestep: Tensor, class_labels: Tensor, hidden_dtype: torch.dtype) -> Tensor:
        return class_labels.to(hidden_dtype)


def net_config(settings: Mapping[str, Any]) -> ImageNetConfig:
    """The configuration that ``settings`` (with ``kind``) spell out.

    Raises:
        ValueError: an unknown kind or field, or a size that makes no sense.
    """
    kind = settings.get("kind")
    if kind not in KINDS:
        raise ValueError(f"net.kind={kind!r} is not one of {sorted(KINDS)}")
    values = {k: tuple(v) if isinstance(v, list | tuple) else v for k, v in settings.items()}
    make: Any = KINDS[kind]
    try:
        config: ImageNetConfig = make(**values)
    except TypeError as error:
        raise ValueError(f"net: {error}") from error
    return config


def build_net(
    config: ImageNetConfig, *, image_size: int, channels: int, n_classes: int
) -> ImageNet:
    """A fresh network; it predicts 0 until it is trained.

    Raises:
        ValueError: sizes that do not fit each other.
    """
    settings = {k: list(v) if isinstance(v, tuple) else v for k, v in asdict(config).items()}
    net: ImageNet = ImageNet(
        image_size=image_size, channels=channels, n_classes=n_classes, net=settings
    )
    return net


def _check_common(embedding: int, attention: str) -> None:
    check_time_dim(embedding)
    if attention not in get_args(AttentionKernel):
        raise ValueError(
            f"net.attention={attention!r} is not one of {', '.join(get_args(AttentionKernel))}"
        )


def _zero(layer: nn.Module) -> None:
    """Weights to zero, so that what the layer adds starts at nothing."""
    for parameter in layer.parameters():
        nn.init.zeros_(parameter)
