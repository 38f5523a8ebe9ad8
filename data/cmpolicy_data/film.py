"""Episodes of a store as a video: cameras side by side, numbers as curves below."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import imageio.v2 as imageio
import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw, ImageFont

from cmpolicy_data.replay_buffer import ReplayBuffer
from cmpolicy_data.shown import curves, episode_bounds, pictures, shown_keys

_HEIGHT = 256  # of a camera's picture, px
_CURVES = 96  # height of one key's curves, px
_WIDTH = 256
_COLOURS = ("#1f6fb4", "#de4220", "#188038", "#8e44ad", "#b8860b", "#555555", "#d81b60", "#00838f")


def film_episodes(
    buffer: ReplayBuffer,
    episodes: Sequence[int],
    out: Path,
    *,
    keys: Sequence[str] = (),
    fps: float = 10.0,
) -> Path:
    """Write an mp4 of episodes, one after the other, one frame per step.

    Args:
        buffer: the store.
        episodes: numbers, from 0.
        out: the file, ending in .mp4.
        keys: to show, see :func:`cmpolicy_data.shown.shown_keys`.
        fps: frames per second.

    Raises:
        ReplayBufferError: no such episode or key, or a chunk that cannot be read.
    """
    pictured, curved = shown_keys(buffer, keys)
    bounds = {episode: episode_bounds(buffer, episode) for episode in episodes}
    out.parent.mkdir(parents=True, exist_ok=True)
    writer: Any = imageio.get_writer(
        out, fps=fps, codec="libx264", quality=7, pixelformat="yuv420p", macro_block_size=16
    )
    with closing(writer):
        for episode, (start, end) in bounds.items():
            cameras = {key: pictures(buffer, key, start, end) for key in pictured}
            numbers = {key: curves(buffer, key, start, end) for key in curved}
            background = _page(cameras, numbers)
            for step in range(end - start):
                page = background.copy()
                _draw_step(page, cameras, numbers, step, f"episode {episode}, step {step}")
                writer.append_data(np.asarray(page))
    return out


def _columns(cameras: dict[str, Any]) -> int:
    return max(2, len(cameras))


def _page(cameras: dict[str, Any], curves: dict[str, npt.NDArray[Any]]) -> Image.Image:
    """The parts that do not change: names, and curves of the whole episode."""
    top = _HEIGHT if cameras else 0
    width = _WIDTH * _columns(cameras)
    height = -(-(32 + top + _CURVES * len(curves)) // 16) * 16
    page = Image.new("RGB", (width, height), "white")
    draw, font = ImageDraw.Draw(page), ImageFont.load_default(size=13)
    for row, (key, values) in enumerate(curves.items()):
        y = 32 + top + row * _CURVES
        low, high = float(np.nanmin(values)), float(np.nanmax(values))
        draw.text((6, y + 2), f"{key}   {low:.4g} to {high:.4g}", fill="black", font=font)
        for column in range(values.shape[1]):
            x = np.linspace(0, width - 1, len(values))
            share = (values[:, column] - low) / (high - low or 1.0)
            points = list(
                zip(x.tolist(), (y + _CURVES - 6 - share * (_CURVES - 28)).tolist(), strict=True)
            )
            if np.isfinite(share).all() and len(points) > 1:
                draw.line(points, fill=_COLOURS[column % len(_COLOURS)], width=1)
    return page


def _draw_step(
    page: Image.Image,
    cameras: dict[str, npt.NDArray[np.uint8]],
    curves: dict[str, npt.NDArray[Any]],
    step: int,
    caption: str,
) -> None:
    draw, font = ImageDraw.Draw(page), ImageFont.load_default(size=13)
    draw.text((6, 8), "   ".join([caption, *cameras]), fill="black", font=font)
    for number, frames in enumerate(cameras.values()):
        picture = Image.fromarray(frames[step])
        scale = min(_WIDTH / picture.width, _HEIGHT / picture.height)
        size = (max(1, round(picture.width * scale)), max(1, round(picture.height * scale)))
        page.paste(picture.resize(size, Image.Resampling.NEAREST), (number * _WIDTH, 32))
    for values in curves.values():
        x = round(step * (page.width - 1) / max(1, len(values) - 1))
        draw.line([(x, 32 + (_HEIGHT if cameras else 0)), (x, page.height)], fill="#bbbbbb")
