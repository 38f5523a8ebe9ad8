"""The trajectory-conditioned 1-D U-Net of Diffusion Policy, conditioned on two times.

Legend: B batch, T horizon, A action size, C channels, K levels. Convolutions run over the action
trajectory; the observation history and the times t, t - s enter every block through FiLM
(Perez et al. 2018). Structure: Chi et al., "Diffusion Policy", RSS 2023.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from cmpolicy.nn.conv import Convolve, convolution_for
from cmpolicy.nn.embeddings import TwoTimeEmbedding, check_time_dim
from cmpolicy.nn.encoders.state import ObsEncoder


@dataclass(frozen=True)
class UNet1DConfig:
    """Size of the network.

    Args:
        down_dims: channels per level; each further level halves the horizon.
        kernel_size: odd width of the convolutions.
        n_groups: groups of every GroupNorm.
        time_dim: width of the time embedding.
        obs_dim: width of the observation features.

    Raises:
        ValueError: numbers that cannot go together, with their values.
    """

    down_dims: tuple[int, ...] = (256, 512, 1024)
    kernel_size: int = 5
    n_groups: int = 8
    time_dim: int = 128
    obs_dim: int = 256

    def __post_init__(self) -> None:
        object.__setattr__(self, "down_dims", tuple(int(n) for n in self.down_dims))
        for name in ("kernel_size", "n_groups", "time_dim", "obs_dim"):
            value = getattr(self, name)
            if not isinstance(value, int) or value < 1:
                raise ValueError(f"{name} must be a whole number of at least 1, got {value!r}")
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

    @property
    def horizon_factor(self) -> int:
        """What the horizon must be a multiple of: 2^(levels - 1)."""
        return 1 << (len(self.down_dims) - 1)

    def check_horizon(self, horizon: int) -> None:
        """Raise ValueError unless the depth divides the horizon."""
        if horizon % self.horizon_factor:
            below = horizon - horizon % self.horizon_factor
            nearest = [str(n) for n in (below, below + self.horizon_factor) if n]
            raise ValueError(
                f"horizon={horizon} is not divisible by {self.horizon_factor}, which "
                f"{len(self.down_dims)} levels (down_dims={list(self.down_dims)}) need; use "
                f"horizon={' or '.join(nearest)}, or fewer levels"
            )

    def to_dict(self) -> dict[str, Any]:
        """A JSON-ready form; ``UNet1DConfig(**data)`` is its inverse."""
        return asdict(self) | {"down_dims": list(self.down_dims)}


#: 1.3M, 3.8M, 17.5M and 66M parameters with 40 observation numbers and 2 action dimensions; the
#: horizon adds none. ``small`` is a file of 7.7 MB in half precision, ``large`` is the size of
#: Diffusion Policy's network.
NET_PRESETS: dict[str, UNet1DConfig] = {
    "tiny": UNet1DConfig((32, 64, 128), kernel_size=5, time_dim=64, obs_dim=128),
    "small": UNet1DConfig((64, 128, 256), kernel_size=3, time_dim=128, obs_dim=256),
    "base": UNet1DConfig((128, 256, 512), kernel_size=5, time_dim=128, obs_dim=256),
    "large": UNet1DConfig((256, 512, 1024), kernel_size=5, time_dim=256, obs_dim=256),
}


def net_config(preset: str, **overrides: Any) -> UNet1DConfig:
    """A preset with some of its numbers replaced.

    Raises:
        ValueError: an unknown preset or field.
    """
    if preset not in NET_PRESETS:
        raise ValueError(f"unknown net preset {preset!r}; choose one of {sorted(NET_PRESETS)}")
    try:
        return replace(NET_PRESETS[preset], **overrides)
    except TypeError as error:
        raise ValueError(f"net: {error}; known: {sorted(NET_PRESETS[preset].to_dict())}") from error


def norm_mish(norm: nn.GroupNorm, x: Tensor) -> Tensor:
    """What follows every convolution. The plain function: 25 of them stand in one evaluation."""
    h = torch.group_norm(x, norm.num_groups, norm.weight, norm.bias, norm.eps)
    return nn.functional.mish(h)


@dataclass(frozen=True)
class Kernels:
    """How the two operations that make up the network are computed: by torch, or in an export."""

    convolve: Convolve
    norm_mish: Callable[[nn.GroupNorm, Tensor], Tensor] = norm_mish


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
    """F(x, t, s, obs): x (B, T, A), t and s (B,), obs (B, To * D) normalised -> (B, T, A).

    One linear layer makes the FiLM numbers of all blocks at once. The last convolution starts at
    zero, so a fresh network is F = 0: a flow map that is the identity on the linear path, and
    x -> cos(d) x on the trigonometric one.
    """

    def __init__(self, config: UNet1DConfig, *, action_dim: int, obs_input_dim: int) -> None:
        super().__init__()
        self.config = config
        dims = config.down_dims
        size = (config.kernel_size, config.n_groups)
        self.time = TwoTimeEmbedding(config.time_dim)
        self.obs = ObsEncoder(obs_input_dim, config.obs_dim)

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
            nn.Mish(), nn.Linear(config.time_dim + config.obs_dim, sum(self.film_sizes))
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

    def forward(self, x: Tensor, t: Tensor, s: Tensor, obs: Tensor | None) -> Tensor:
        """See the class. ``obs`` is required.

        Raises:
            ValueError: no observation, or a horizon that the depth does not divide.
        """
        if obs is None:
            raise ValueError("UNet1D needs the observation history as its condition, got None")
        self.config.check_horizon(x.shape[1])
        condition = torch.cat([self.time(t, s), self.obs(obs)], dim=-1)
        film = self.film(condition) + self.film_center
        return self.trunk(x.transpose(1, 2), film, Kernels(convolution_for(x))).transpose(1, 2)

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
