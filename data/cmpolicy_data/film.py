"""An episode of a store as a video: its cameras side by side, its numbers as curves below."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import imageio.v2 as imageio
import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw, ImageFont

from cmpolicy_data.chunks import ReplayBufferError, read_rows
from cmpolicy_data.frames import as_levels, looks_like_frames
from cmpolicy_data.replay_buffer import ReplayBuffer

_HEIGHT = 256  # of a camera's picture, px
_CURVES = 96  # height of one key's curves, px
_WIDTH = 256
_COLOURS = ("#1f6fb4", "#de4220", "#188038", "#8e44ad", "#b8860b", "#555555", "#d81b60", "#00838f")


def film_episode(
    buffer: ReplayBuffer, episode: int, out: Path, *, keys: Sequence[str] = (), fps: float = 10.0
) -> Path:
    """Write an mp4 of one episode, one frame per step.

    Args:
        buffer: the store.
        episode: number, from 0.
        out: the file, ending in .mp4.
        keys: to show; empty: all images, and all keys of at most 16 numbers per step.
        fps: frames per second.

    Raises:
        ReplayBufferError: no such episode or key, or a chunk that cannot be read.
        ValueError: ``out`` does not end in .mp4.
    """
    if out.suffix != ".mp4":
        raise ValueError(f"out={out} must end in .mp4")
    if not 0 <= episode < buffer.n_episodes:
        raise ReplayBufferError(
            f"{buffer.path} has no episode {episode}; it has {buffer.n_episodes}, from 0 on"
        )
    start = int(buffer.episode_ends[episode - 1]) if episode else 0
    end = int(buffer.episode_ends[episode])
    cameras: dict[str, npt.NDArray[np.uint8]] = {}
    curves: dict[str, npt.NDArray[Any]] = {}
    for key in keys or buffer.keys():
        array = buffer[key]
        if looks_like_frames(array):
            rows = read_rows(array, start, end, buffer.path)
            cameras[key] = as_levels(rows, buffer, key, start)
        elif array.dtype.kind in "biuf" and int(np.prod(array.shape[1:])) <= 16:
            rows = read_rows(array, start, end, buffer.path)
            curves[key] = rows.reshape(len(rows), -1).astype(np.float64)
        elif keys:
            raise ReplayBufferError(f"data/{key} cannot be shown: {array.shape[1:]} per step")
    background = _page(cameras, curves)
    out.parent.mkdir(parents=True, exist_ok=True)
    writer: Any = imageio.get_writer(
        out, fps=fps, codec="libx264", quality=7, pixelformat="yuv420p", macro_block_size=16
    )
    with closing(writer):
        for step in range(end - start):
            page = background.copy()
            _draw_step(page, cameras, curves, step, f"episode {episode}, step {step}")
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
