"""What is in a store: keys, shapes, ranges, episodes, size on disk.

Arrays are read in blocks of whole chunks, so that images need not fit into memory.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from cmpolicy_data.chunks import (
    Array,
    absent_chunks,
    blocks,
    n_chunks,
    printable,
    read_rows,
)
from cmpolicy_data.frames import channels_first, looks_like_frames
from cmpolicy_data.replay_buffer import ReplayBuffer
from cmpolicy_data.store import size_on_disk

_BAR = 40
_BINS = 8
_WIDTH = 120


@dataclass(frozen=True)
class KeySummary:
    """One array. The numbers are over finite values; None where there are none."""

    key: str
    shape: tuple[int, ...]
    dtype: str
    chunks: tuple[int, ...]
    chunks_stored: int
    chunks_total: int
    minimum: float | None
    maximum: float | None
    mean: float | None
    n_not_finite: int
    colour: tuple[float, float, float] | None = None
    """Mean red, green and blue of an image key."""
    codec: str = ""


@dataclass(frozen=True)
class StoreSummary:
    """A store. ``lengths`` (E,) are the episodes' steps."""

    path: Path
    zarr_format: int
    bytes_on_disk: int
    lengths: npt.NDArray[np.int64]
    keys: tuple[KeySummary, ...]
    attrs: dict[str, object]
    unreadable: dict[str, str]
    """Arrays that cannot be opened, and why."""


def summarize(path: str | Path) -> StoreSummary:
    """Read a whole store and sum it up.

    Raises:
        FileNotFoundError, ReplayBufferError: it cannot be opened or read.
    """
    buffer = ReplayBuffer.open(path)
    return StoreSummary(
        path=buffer.path,
        zarr_format=buffer.zarr_format,
        bytes_on_disk=size_on_disk(buffer.path),
        lengths=np.diff(buffer.episode_ends, prepend=0),
        keys=tuple(_summarize_key(key, buffer[key], buffer.path) for key in buffer),
        attrs=buffer.attrs,
        unreadable=buffer.unreadable,
    )


def format_summary(summary: StoreSummary) -> str:
    """The summary as text for a terminal."""
    lengths = summary.lengths
    lines = [
        f"{summary.path}",
        f"zarr format {summary.zarr_format}, {_size(summary.bytes_on_disk)} on disk, "
        f"{lengths.size} episodes, {int(lengths.sum())} steps",
        "",
    ]
    rows = [["key", "shape", "dtype", "chunk", "chunks", "min", "max", "mean"]]
    for key in summary.keys:
        stored = str(key.chunks_total)
        if key.chunks_stored != key.chunks_total:
            stored = f"{key.chunks_stored}/{key.chunks_total}"
        numbers = [_number(value) for value in (key.minimum, key.maximum, key.mean)]
        rows.append([key.key, _shape(key.shape), key.dtype, _shape(key.chunks), stored, *numbers])
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    for row in rows:
        cells = [cell.ljust(width) for cell, width in zip(row[:4], widths[:4], strict=True)]
        cells += [cell.rjust(width) for cell, width in zip(row[4:], widths[4:], strict=True)]
        lines.append("  ".join(cells).rstrip())
    for key in summary.keys:
        if key.n_not_finite:
            lines.append(f"{key.key}: {key.n_not_finite} values are NaN or infinite")
        if key.colour is None:
            continue
        if key.dtype.startswith("float") and key.maximum is not None and key.maximum <= 1:
            lines.append(
                f"{key.key}: frames in 0..1, which a training refuses; multiply by 255, round, and "
                "store uint8"
            )
        else:
            steps, *size = key.shape
            height, width = size[1:] if size[2] != 3 else size[:2]
            colour = ", ".join(f"{value:.0f}" for value in key.colour)
            lines.append(
                f"{key.key}: images of {height} x {width}, mean colour ({colour}), "
                f"{_size(steps * height * width * 3)} as uint8, codec {key.codec}"
            )
    lines += [f"{key}: not read, {why}" for key, why in summary.unreadable.items()]
    lines += ["", *_histogram(lengths)]
    if summary.attrs:
        lines += [
            "",
            "attributes:",
            *(f"  {k}: {_short(v)}" for k, v in sorted(summary.attrs.items())),
        ]
    return "\n".join(map(printable, lines))


def _summarize_key(key: str, array: Array, path: Path) -> KeySummary:
    minimum, maximum, total, count, bad = np.inf, -np.inf, 0.0, 0, 0
    colours = np.zeros(3) if looks_like_frames(array) else None
    pixels = (0, 2, 3) if channels_first(array) else (0, 1, 2)
    if array.dtype.kind in "biuf" and array.ndim:
        for start, stop in blocks(array):
            rows = read_rows(array, start, stop, path)
            if colours is not None:
                colours += rows.sum(axis=pixels, dtype=np.float64)
            if rows.dtype.kind == "f" and not np.isfinite(rows).all():
                finite = rows[np.isfinite(rows)]
                bad += rows.size - finite.size
                rows = finite
            if rows.size:
                minimum = min(minimum, float(rows.min()))
                maximum = max(maximum, float(rows.max()))
                total += float(rows.sum(dtype=np.float64))
                count += rows.size
    n_total = n_chunks(array)
    n_absent = len(absent_chunks(array)) if array.ndim else 0
    return KeySummary(
        key=key,
        shape=array.shape,
        dtype=str(array.dtype),
        chunks=array.chunks,
        chunks_stored=n_total - n_absent,
        chunks_total=n_total,
        minimum=minimum if count else None,
        maximum=maximum if count else None,
        mean=total / count if count else None,
        n_not_finite=bad,
        colour=None if colours is None else _mean_colour(colours, array),
        codec=", ".join(type(c).__name__.removesuffix("Codec") for c in array.compressors)
        or "none",
    )


def _mean_colour(sums: npt.NDArray[np.float64], array: Array) -> tuple[float, float, float]:
    red, green, blue = sums / max(1, array.size // 3)
    return float(red), float(green), float(blue)


def _histogram(lengths: npt.NDArray[np.int64]) -> list[str]:
    if lengths.size == 0:
        return ["no episodes"]
    low, high = int(lengths.min()), int(lengths.max())
    head = f"episode lengths: {low} to {high} steps, mean {lengths.mean():.1f}"
    edges = np.unique(np.linspace(low, high + 1, _BINS + 1).astype(np.int64))
    counts = np.histogram(lengths, edges)[0]
    lines = [head]
    for start, stop, count in zip(edges[:-1], edges[1:], counts, strict=True):
        bar = "#" * round(_BAR * count / counts.max())
        lines.append(f"  {start:>6} - {stop - 1:<6} {count:>6}  {bar}".rstrip())
    return lines


def _short(value: object) -> str:
    """An attribute on one line: converted stores have long ones."""
    text = " ".join(str(value).split())
    return text if len(text) <= _WIDTH else f"{text[:_WIDTH]}... ({len(text)} characters)"


def _shape(shape: tuple[int, ...]) -> str:
    return " x ".join(map(str, shape)) or "-"


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.4g}"


def _size(n_bytes: int) -> str:
    size = float(n_bytes)
    for unit in ("B", "kB", "MB"):
        if size < 1000:
            return f"{size:.3g} {unit}"
        size /= 1000
    return f"{size:.3g} GB"
