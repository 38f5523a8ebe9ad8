"""The trajectory-conditioned 1-D U-Net of Diffusion Policy, conditioned on two times.

Legend: B batch, T horizon, A action size, C channels, K levels. Convolutions run over the action
trajectory; the features of the observations and the times t, t - s enter every block through FiLM
(Perez et al. 2018). Structure: Chi et al., "Diffusion Policy", RSS 2023.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from cmpolicy.nn.embeddings import TwoTimeEmbedding, check_time_dim
from cmpolicy.nn.kernels import Kernels, by_product, kernels_for
from cmpolicy.nn.registry import register_net


@register_net
@dataclass(frozen=True)
class UNet1DConfig:
    """Size of a :class:`UNet1D`; the default is ``net=small``, a file of 7.7 MB in half precision.

    Args:
        down_dims: channels per level; each further level halves the horizon.
        kernel_size: odd width of the convolutions.
        n_groups: groups of every GroupNorm.
        time_dim: width of the time embedding.

    Raises:
        ValueError: numbers that cannot go together, with their values.
    """

    kind: ClassVar[str] = "unet1d"

    down_dims: tuple[int, ...] = (64, 128, 256)
    kernel_size: int = 3
    n_groups: int = 8
    time_dim: int = 128

    def __post_init__(self) -> None:
        for name in ("kernel_size", "n_groups", "time_dim"):
            value = getattr(self, name)
            if value < 1:
                raise ValueError(f"{name}={value} must be at least 1")
        if not self.down_dims:
            raise ValueError("down_dims is empty: a U-Net needs at least one level")
        for dim in self.down_dims:
            if dim < 1 or dim % self.n_groups:
                raise ValueError(
                    f"down_dims={list(self.down_dims)}: {dim} is not a multiple of "
                    f"n_groups={self.n_groups}"
                )
        if self.kernel_size % 2 == 0:
            raise ValueError(f"kernel_size={self.kernel_size} must be odd, to keep the length")
        check_time_dim(self.time_dim)

    def check_horizon(self, horizon: int) -> None:
        """Raise ValueError unless the depth divides the horizon."""
        factor = 1 << (len(self.down_dims) - 1)
        if horizon % factor:
            below = horizon - horizon % factor
            nearest = [str(n) for n in (below, below + factor) if n]
            raise ValueError(
                f"horizon={horizon} is not divisible by {factor}, which "
                f"{len(self.down_dims)} levels (down_dims={list(self.down_dims)}) need; use "
                f"horizon={' or '.join(nearest)}, or fewer levels"
            )

    def build(self, *, action_dim: int, feature_dim: int) -> UNet1D:
        return UNet1D(self, action_dim=action_dim, feature_dim=feature_dim)


class FilmBlock(nn.Module):
    """conv - norm - Mish - FiLM - conv - norm - Mish, plus the input. (B, C_in, T) to (B, C, T)."""

    def __init__(self, in_dim: int, dim: int, kernel_size: int, n_groups: int) -> None:
        super().__init__()
        pad = kernel_size // 2
        self.conv_in = nn.Conv1d(in_dim, dim, kernel_size, padding=pad)
        self.norm_in = nn.GroupNorm(n_groups, dim)
        self.conv_out = nn.Conv1d(dim, dim, kernel_size, padding=pad)
        self.norm_out = nn.GroupNorm(n_groups, dim)
        self.residual = nn.Conv1d(in_dim, dim, 1) if in_dim != dim else None
        self.film_sizes = [dim, dim]

    def forward(self, x: Tensor, scale: Tensor, shift: Tensor, kernels: Kernels) -> Tensor:
        """``scale`` (around one) and ``shift`` are (B, C, 1)."""
        h = kernels.norm_mish(self.norm_in, kernels.convolve(self.conv_in, x))
        h = torch.addcmul(shift, h, scale)
        h = kernels.norm_mish(self.norm_out, kernels.convolve(self.conv_out, h))
        return h + (x if self.residual is None else kernels.convolve(self.residual, x))


class UNet1D(nn.Module):
    """F(x, t, s, features): x (B, T, A), t and s (B,), features (B, D) -> (B, T, A).

    One linear layer makes the FiLM numbers of all blocks at once. The last convolution starts at
    zero, so a fresh network is F = 0: a flow map that is the identity on the linear path, and
    x -> cos(d) x on the trigonometric one.
    """

    def __init__(self, config: UNet1DConfig, *, action_dim: int, feature_dim: int) -> None:
        super().__init__()
        self.config = config
        dims = config.down_dims
        size = (config.kernel_size, config.n_groups)
        self.time = TwoTimeEmbedding(config.time_dim)
        self.feature_dim = feature_dim

        pairs = list(zip((action_dim, *dims[:-1]), dims, strict=True))
        self.down = nn.ModuleList(
            nn.ModuleList([FilmBlock(i, o, *size), FilmBlock(o, o, *size)]) for i, o in pairs
        )
        self.downsample = nn.ModuleList(nn.Conv1d(d, d, 3, stride=2, padding=1) for d in dims[:-1])
        self.mid = nn.ModuleList(FilmBlock(dims[-1], dims[-1], *size) for _ in range(2))
        self.upsample = nn.ModuleList(
            nn.ConvTranspose1d(lower, upper, 4, stride=2, padding=1)
            for lower, upper in zip(dims[:0:-1], dims[-2::-1], strict=True)
        )
        self.up = nn.ModuleList(
            nn.ModuleList([FilmBlock(2 * d, d, *size), FilmBlock(d, d, *size)])
            for d in dims[-2::-1]
        )
        self.head = nn.Sequential(
            nn.Conv1d(dims[0], dims[0], config.kernel_size, padding=config.kernel_size // 2),
            nn.GroupNorm(config.n_groups, dims[0]),
            nn.Mish(),
            nn.Conv1d(dims[0], action_dim, 1),
        )
        nn.init.zeros_(self.head[-1].weight)  # type: ignore[arg-type]
        nn.init.zeros_(self.head[-1].bias)  # type: ignore[arg-type]
        blocks = [m for m in self.modules() if isinstance(m, FilmBlock)]
        self.film_sizes = [size for block in blocks for size in block.film_sizes]
        self.film = nn.Sequential(
            nn.Mish(), nn.Linear(config.time_dim + feature_dim, sum(self.film_sizes))
        )
        # the layer gives each scale around zero: what makes it a factor around one
        ones = [torch.full((size,), float(i % 2 == 0)) for i, size in enumerate(self.film_sizes)]
        self.register_buffer("film_center", torch.cat(ones), persistent=False)

    def lay_out_for_inference(self) -> None:
        """Store the film layer's weight, a third of all numbers, by columns instead of rows.

        A product with few rows is as fast as memory is read, and this order is read twice as fast.
        The numbers, names and shapes stay what they were.
        """
        weight = self.film.get_parameter("1.weight")
        weight.data = weight.data.t().contiguous().t()

    def forward(self, x: Tensor, t: Tensor, s: Tensor, features: Tensor | None) -> Tensor:
        """See the class.

        Raises:
            ValueError: no features, or a horizon that the depth does not divide.
        """
        if features is None:
            raise ValueError("UNet1D needs the features of the observations, got None")
        self.config.check_horizon(x.shape[1])
        condition = torch.cat([self.time(t, s), features], dim=-1)
        film = self.film(condition) + self.film_center
        return self.trunk(x.transpose(1, 2), film, kernels_for(x)).transpose(1, 2)

    def trunk(self, x: Tensor, film: Tensor, kernels: Kernels) -> Tensor:
        """What is left once the condition is known: x (B, A, ..., T) -> (B, A, ..., T).

        ``film`` (B, sum(film_sizes)) holds scale (around one) and shift of every block in turn.
        """
        convolve = kernels.convolve
        singles = (1,) * (x.ndim - 2)
        films = iter(film.reshape(*film.shape, *singles).split(self.film_sizes, dim=1))
        h = x
        skips = []
        for level, blocks in enumerate(self.down):
            for block in blocks:  # type: ignore[attr-defined]
                h = block(h, next(films), next(films), kernels)
            if level < len(self.downsample):
                skips.append(h)
                h = convolve(self.downsample[level], h)
        for block in self.mid:
            h = block(h, next(films), next(films), kernels)
        for upsample, blocks in zip(self.upsample, self.up, strict=True):
            h = torch.cat([convolve(upsample, h), skips.pop()], dim=1)
            for block in blocks:  # type: ignore[attr-defined]
                h = block(h, next(films), next(films), kernels)
        h = kernels.norm_mish(self.head[1], convolve(self.head[0], h))  # type: ignore[arg-type]
        return convolve(self.head[3], h)

    def at_fixed_times(
        self, t: Tensor, s: Tensor, prepare: Callable[[nn.Module], Kernels] | None = None
    ) -> FixedTimesUNet1D:
        """The network at N known pairs of times, for an export; ``self`` is of no other use then.

        Args:
            t, s: (N,).
            prepare: rewrites the parameters for kernels that take (B, C, 1, T) trajectories, see
                ``cmpolicy.export.kernels``; None takes torch's own.
        """
        return FixedTimesUNet1D(self, t, s, prepare)

    def at_any_times(self, prepare: Callable[[nn.Module], Kernels] | None = None) -> TimedUNet1D:
        """The same network for an export whose times are inputs; ``prepare`` as above."""
        return TimedUNet1D(self, prepare)


class FixedTimesUNet1D(nn.Module):
    """N evaluations of a U-Net at known times.

    What the times contribute to each FiLM layer is a constant, and what the features contribute is
    the same in all evaluations (:meth:`condition`). F numbers of all FiLM layers.
    """

    def __init__(
        self,
        unet: UNet1D,
        t: Tensor,
        s: Tensor,
        prepare: Callable[[nn.Module], Kernels] | None,
    ) -> None:
        super().__init__()
        of_time, of_features = unet.film.get_parameter("1.weight").split(
            [unet.config.time_dim, unet.feature_dim], dim=1
        )
        with torch.no_grad():
            constant = nn.functional.mish(unet.time(t, s)) @ of_time.T
            constant += unet.film.get_parameter("1.bias") + unet.get_buffer("film_center")
        self.register_buffer("film_of_times", constant)  # (N, F)
        self.register_buffer("film_of_features", of_features.detach().T.contiguous())  # (D, F)
        del unet.film, unet.time
        self.unet = unet
        self.is_image = prepare is not None
        self.kernels = Kernels(by_product) if prepare is None else prepare(unet)

    def condition(self, features: Tensor) -> Tensor:
        """Features (B, D) to what they contribute to every FiLM layer, (B, F)."""
        return nn.functional.mish(features) @ self.get_buffer("film_of_features")

    def forward(self, i: int, x: Tensor, condition: Tensor) -> Tensor:
        """F at x (B, T, A) in evaluation ``i``."""
        film = condition + self.get_buffer("film_of_times")[i]
        h = x.transpose(1, 2)
        if not self.is_image:
            return self.unet.trunk(h, film, self.kernels).transpose(1, 2)
        return self.unet.trunk(h.unsqueeze(2), film, self.kernels).squeeze(2).transpose(1, 2)


class TimedUNet1D(nn.Module):
    """A U-Net for an export, F(x, t, s, features) as the U-Net's own."""

    def __init__(self, unet: UNet1D, prepare: Callable[[nn.Module], Kernels] | None) -> None:
        super().__init__()
        self.unet = unet
        self.is_image = prepare is not None
        self.kernels = Kernels(by_product) if prepare is None else prepare(unet)

    def forward(self, x: Tensor, t: Tensor, s: Tensor, features: Tensor) -> Tensor:
        """x (B, T, A), t and s (B,), features (B, D) -> (B, T, A)."""
        condition = torch.cat([self.unet.time(t, s), features], dim=-1)
        film = self.unet.film(condition) + self.unet.get_buffer("film_center")
        h = x.transpose(1, 2)
        if not self.is_image:
            return self.unet.trunk(h, film, self.kernels).transpose(1, 2)
        return self.unet.trunk(h.unsqueeze(2), film, self.kernels).squeeze(2).transpose(1, 2)
