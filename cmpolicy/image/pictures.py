"""Labelled pictures of images: samples by class, the way from noise, nearest training images.

Pixels are enlarged by a whole factor and never smoothed, so that one sees what the model made.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from cmpolicy.files import write_atomically
from cmpolicy.flow.sampler import time_grid
from cmpolicy.image.datasets.data import ImageSet
from cmpolicy.image.metrics.diversity import Nearest
from cmpolicy.image.pixels import as_pictures

Pictures = npt.NDArray[np.uint8]  # (N, H, W, C)
_TILE = 48  # px that an image is enlarged to, about
_GAP, _MARGIN = 3, 10
_INK, _FAINT, _GROUND = (25, 25, 25), (110, 110, 110), (255, 255, 255)


@dataclass(frozen=True, eq=False)
class Column:
    """Images (R, H, W, C), one per row, below a heading.

    ``captions`` are written under the images; ``apart`` leaves space before the column.
    """

    images: Pictures
    heading: str = ""
    captions: Sequence[str] = ()
    apart: bool = False


def table(columns: Sequence[Column], row_names: Sequence[str], title: str) -> Image.Image:
    """Columns side by side under a title, the rows named at their left.

    Raises:
        ValueError: no columns, or one without an image (and caption, if any) for every row.
    """
    if not columns or not row_names:
        raise ValueError("a picture needs at least one column and one row")
    for column in columns:
        if len(column.images) != len(row_names) or len(column.captions) not in (0, len(row_names)):
            raise ValueError(
                f"{len(row_names)} rows need as many images and captions, got "
                f"{len(column.images)} and {len(column.captions)}"
            )
    height, width = columns[0].images.shape[1:3]
    scale = max(1, round(_TILE / width))
    tile_w, tile_h = width * scale, height * scale
    line = _font().size + 4
    caption_h = line if any(c.captions for c in columns) else 0
    names_w = max(_text_width(name) for name in row_names) + 2 * _GAP
    # a heading may reach over the columns after it, which have none
    widths = [max([tile_w, *(_text_width(t) for t in c.captions)]) for c in columns]
    lefts = []
    x = _MARGIN + names_w
    for column, column_w in zip(columns, widths, strict=True):
        x += 6 * _GAP if column.apart else 0
        lefts.append(x)
        x += column_w + _GAP
    ends = max(left + _text_width(c.heading) for c, left in zip(columns, lefts, strict=True))
    top = _MARGIN + line + _GAP + (line if any(c.heading for c in columns) else 0)
    row_h = tile_h + caption_h + _GAP
    page = Image.new(
        "RGB",
        (
            max(x, _MARGIN + _text_width(title), ends) + _MARGIN,
            top + len(row_names) * row_h + _MARGIN,
        ),
        _GROUND,
    )
    draw = ImageDraw.Draw(page)
    draw.text((_MARGIN, _MARGIN), title, fill=_INK, font=_font())
    for row, name in enumerate(row_names):
        y = top + row * row_h + tile_h / 2
        draw.text((_MARGIN + names_w - 2 * _GAP, y), name, fill=_INK, font=_font(), anchor="rm")
    for column, left in zip(columns, lefts, strict=True):
        draw.text((left, top - line), column.heading, fill=_FAINT, font=_font())
        for row, image in enumerate(column.images):
            y = top + row * row_h
            page.paste(_enlarged(image, scale), (left, y))
            if column.captions:
                at = (left, y + tile_h)
                draw.text(at, column.captions[row], fill=_FAINT, font=_font())
    return page


def samples_picture(
    images: Pictures, labels: npt.NDArray[np.int64], class_names: Sequence[str], title: str
) -> Image.Image:
    """One row per class, with as many images as the rarest class has.

    Args:
        images: (N, H, W, C). labels: (N,), what each was made as.
        class_names: by label.
        title: written above.
    """
    classes = np.unique(labels).tolist()
    per_class = min(int((labels == label).sum()) for label in classes)
    rows = np.stack([images[labels == label][:per_class] for label in classes])
    columns = [Column(rows[:, i]) for i in range(per_class)]
    return table(columns, [class_names[label] for label in classes], title)


def paths_picture(
    trajectories: Mapping[int, Tensor], row_names: Sequence[str], title: str
) -> Image.Image:
    """The same noise carried to images in different numbers of evaluations, state by state.

    Args:
        trajectories: by number of evaluations n: (n + 1, R, C, H, W) from noise to image, evenly
            spaced in time. All start at the same noise. Values outside [-1, 1] are clipped.
        row_names: of the R images.
        title: written above.
    """
    columns: list[Column] = []
    for n, states in sorted(trajectories.items()):
        times = time_grid(n).tolist()
        if not columns:
            columns.append(Column(as_pictures(states[0]), "noise"))
        for i in range(1, n + 1):
            first = i == 1
            heading = f"{n} eval." if first else ""
            at = f"t={times[i]:.2g}"
            columns.append(
                Column(as_pictures(states[i]), heading, captions=[at] * len(row_names), apart=first)
            )
    columns[0] = Column(columns[0].images, "noise", captions=["t=1"] * len(row_names))
    return table(columns, row_names, title)


def neighbours_picture(
    images: Pictures,
    nearest: Nearest,
    training: ImageSet,
    row_names: Sequence[str],
    class_names: Sequence[str],
    title: str,
) -> Image.Image:
    """Each image beside the training images nearest to it, with class and pixel distance.

    Args:
        images: (R, H, W, C). nearest: of them in ``training``.
        row_names: of the R images. class_names: by label of ``training``.
        title: written above.
    """
    columns = [Column(images, "generated", captions=[""] * len(images))]
    for rank in range(nearest.rows.shape[1]):
        rows = nearest.rows[:, rank]
        captions = [
            f"{class_names[int(training.labels[row])]}: {distance:.2f}"
            for row, distance in zip(rows, nearest.distances[:, rank], strict=True)
        ]
        heading = "nearest training images" if rank == 0 else ""
        columns.append(Column(training.images[rows], heading, captions, apart=rank == 0))
    return table(columns, row_names, title)


def save_picture(picture: Image.Image, path: str | os.PathLike[str]) -> Path:
    """Write a PNG atomically.

    Raises:
        ValueError: a path that does not end in ``.png``.
    """
    target = Path(path)
    if target.suffix.lower() != ".png":
        raise ValueError(f"pictures are written as PNG; give a path ending in .png, not {target}")
    buffer = BytesIO()
    picture.save(buffer, "PNG", optimize=True)
    target.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(target, buffer.getvalue())
    return target


def _enlarged(image: npt.NDArray[np.uint8], scale: int) -> Image.Image:
    large = image.repeat(scale, axis=0).repeat(scale, axis=1)
    return Image.fromarray(large[..., 0] if large.shape[-1] == 1 else large).convert("RGB")


def _text_width(text: str) -> int:
    width: float = _font().getlength(text)
    return math.ceil(width)


@lru_cache(maxsize=1)
def _font() -> Any:
    return ImageFont.load_default(size=12)
