"""Opening an image model and making images with it, whatever is done with them afterwards."""

from __future__ import annotations

import os
import re
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from cmpolicy.flow.sampler import SamplerKind, get_sampler
from cmpolicy.image.datasets.resize import as_image
from cmpolicy.image.pictures import paths_picture, samples_picture, save_picture
from cmpolicy.image.pipeline import INDEX, ConsistencyImagePipeline
from cmpolicy.image.pixels import as_pictures
from cmpolicy.schema import ConfigError, at_least
from cmpolicy.training.device import choose_device
from cmpolicy_eval.progress import progress_bar

Device = Literal["auto", "cpu", "cuda"]
PATH_STEPS = (1, 2, 4)
_RANGE = re.compile(r"(\d+)\s*-\s*(\d+)")


@dataclass(frozen=True, eq=False)
class MadeImages:
    """images (N, H, W, C) uint8 made as classes labels (N,), and the wall time it took."""

    images: npt.NDArray[np.uint8]
    labels: npt.NDArray[np.int64]
    seconds: float


def open_model(model: str, device: Device) -> ConsistencyImagePipeline:
    """The model in a folder, or in ``model/`` of the folder of a run, on its device.

    Raises:
        ConfigError: a GPU is asked for where there is none.
        ImageModelError: not an image model; says what it is.
    """
    folder = Path(model).expanduser()
    inside = folder / "model"
    found = str(inside) if (inside / INDEX).is_file() else os.path.expanduser(model)  # noqa: PTH111  a hub id is no path
    pipe = ConsistencyImagePipeline.from_pretrained(found)
    pipe.to(choose_device(device))
    return pipe


def parse_classes(wanted: Any, names: Sequence[str]) -> list[int]:
    """Labels from ``null`` (all), ``0-9``, ``3``, a class's name, or a list of these.

    Raises:
        ConfigError: no such class, a range the wrong way round, or a class given twice.
    """
    if wanted is None:
        return list(range(len(names)))
    items = wanted if isinstance(wanted, list | tuple) else str(wanted).split(",")
    labels: list[int] = []
    for item in items:
        text = str(item).strip()
        span = _RANGE.fullmatch(text)
        named = [] if span is None else list(map(str, range(int(span[1]), int(span[2]) + 1)))
        if text in names:
            labels.append(list(names).index(text))
        elif named and set(named) <= set(names):  # classes that are called by numbers
            labels += [list(names).index(name) for name in named]
        elif span is not None and int(span[1]) <= int(span[2]):
            labels += range(int(span[1]), int(span[2]) + 1)
        elif text.isdecimal():
            labels.append(int(text))
        else:
            raise ConfigError(
                f"classes: cannot read {text!r}; give numbers from 0 to {len(names) - 1}, a range "
                f"such as 0-{len(names) - 1}, or names: {_shown(names)}"
            )
    for label in labels:
        if label >= len(names):
            raise ConfigError(
                f"classes: there is no class {label}; the model has 0 to {len(names) - 1} "
                f"({_shown(names)})"
            )
    if not labels or len(set(labels)) != len(labels):
        raise ConfigError(f"classes must name at least one class, each once, got {wanted}")
    return labels


def spread_over(n: int, classes: Sequence[int]) -> npt.NDArray[np.int64]:
    """(n,) labels, sorted by class: evenly, the first classes get one more where n does not fit."""
    shares = [n // len(classes) + (i < n % len(classes)) for i in range(len(classes))]
    return np.repeat(np.asarray(classes, dtype=np.int64), shares)


def noise_generators(labels: npt.NDArray[np.int64], seed: int) -> list[torch.Generator]:
    """One per image: image i of class k depends on (seed, k, i) alone."""
    counts: dict[int, int] = {}
    generators = []
    for label in labels.tolist():
        i = counts.get(label, 0)
        counts[label] = i + 1
        entropy = np.random.SeedSequence([seed, label, i]).generate_state(1, np.uint64)[0]
        generators.append(torch.Generator().manual_seed(int(entropy >> np.uint64(1))))
    return generators


def make_images(
    pipe: ConsistencyImagePipeline,
    labels: npt.NDArray[np.int64],
    *,
    nfe: int,
    seed: int,
    sampler: SamplerKind | None,
    batch_size: int,
) -> MadeImages:
    """Images of these classes. The time is the network's: a first small call is not counted."""
    generators = noise_generators(labels, seed)
    wanted = torch.from_numpy(labels)
    pipe.generate(
        wanted[:1], nfe=nfe, generator=noise_generators(labels[:1], seed), sampler=sampler
    )
    parts: list[npt.NDArray[np.uint8]] = []
    seconds = 0.0
    with progress_bar(len(labels), unit="image", desc=f"nfe={nfe}") as bar:
        for first in range(0, len(labels), batch_size):
            batch = slice(first, first + batch_size)
            start = time.perf_counter()
            made = pipe.generate(
                wanted[batch], nfe=nfe, generator=generators[batch], sampler=sampler
            )
            parts.append(as_pictures(made))  # waits for the device
            seconds += time.perf_counter() - start
            bar.update(len(parts[-1]))
    return MadeImages(np.concatenate(parts), labels, seconds)


def draw_paths(
    pipe: ConsistencyImagePipeline,
    classes: Sequence[int],
    *,
    seed: int,
    sampler: SamplerKind | None,
    out: Path,
) -> Path:
    """A picture of one image per class on its way from the same noise in 1, 2 and 4 evaluations.

    Of these only what the sampler can do; one that makes a fixed number makes that.
    """
    labels = np.asarray(classes, dtype=np.int64)
    states: dict[int, Tensor] = {}
    for n in _path_steps(sampler or pipe.sampler):
        states[n] = pipe.trajectory(
            torch.from_numpy(labels),
            nfe=n,
            generator=noise_generators(labels, seed),
            sampler=sampler,
        )
    names = [pipe.class_names[label] for label in classes]
    title = f"from the same noise in {', '.join(map(str, states))} evaluations (seed {seed})"
    return save_picture(paths_picture(states, names, title), out)


def _path_steps(kind: SamplerKind) -> list[int]:
    possible = []
    for n in PATH_STEPS:
        try:
            get_sampler(kind).grid(n)
        except ValueError:
            continue
        possible.append(n)
    return possible


def _shown(names: Sequence[str]) -> str:
    return ", ".join(names[:20]) + (", ..." if len(names) > 20 else "")


@dataclass(frozen=True, kw_only=True)
class SampleSettings:
    """Which images to make.

    Args:
        model: folder of a trained model, or of the run that trained it.
        classes: 0-9, a number, a name, or a list such as [3,7]; null: all.
        per_class: images of each class.
        nfe: network evaluations per image; null: the model's own number.
        seed: image i of class k depends on (seed, k, i) alone.
        sampler: flow_map or diagonal; null: the model's own.
        batch_size: images per call of the network.
        device: auto, cpu or cuda.
        out: one picture, a row per class.
        files: folder for each image as a PNG of its own, <class>_<i>.png.
        paths: a picture of the way from noise at 1, 2 and 4 evaluations, one image per class.
    """

    model: str
    classes: Any = None
    per_class: int = 8
    nfe: int | None = None
    seed: int = 0
    sampler: SamplerKind | None = None
    batch_size: int = 250
    device: Device = "auto"
    out: str = "outputs/images/samples.png"
    files: str | None = None
    paths: str | None = None

    def __post_init__(self) -> None:
        for name in ("per_class", "nfe", "batch_size"):
            if getattr(self, name) is not None:
                at_least(name, getattr(self, name), 1)
        at_least("seed", self.seed, 0)
        for name in ("out", "paths"):
            path = getattr(self, name)
            if path is not None and not path.lower().endswith(".png"):
                raise ConfigError(f"{name}={path} must end in .png: pictures are written as PNG")


def sample_images(config: SampleSettings) -> tuple[list[Path], float]:
    """Make images; the files that were written, and milliseconds per image.

    Raises:
        ConfigError: settings that cannot be. ImageModelError: the model cannot be read.
    """
    pipe = open_model(config.model, config.device)
    nfe = pipe.nfe if config.nfe is None else config.nfe
    classes = parse_classes(config.classes, pipe.class_names)
    made = make_images(
        pipe,
        np.repeat(np.asarray(classes, dtype=np.int64), config.per_class),
        nfe=nfe,
        seed=config.seed,
        sampler=config.sampler,
        batch_size=config.batch_size,
    )
    plural = "s" * (nfe > 1)
    title = f"{nfe} network evaluation{plural} per image, seed {config.seed}"
    picture = samples_picture(made.images, made.labels, pipe.class_names, title)
    written = [save_picture(picture, Path(config.out).expanduser())]
    if config.paths is not None:
        out = Path(config.paths).expanduser()
        written.append(draw_paths(pipe, classes, seed=config.seed, sampler=config.sampler, out=out))
    if config.files is not None:
        written.append(_save_each(made.images, made.labels, config.files))
    rate = 1000 * made.seconds / len(made.images)
    return written, rate


def _save_each(images: npt.NDArray[np.uint8], labels: npt.NDArray[np.int64], folder: str) -> Path:
    target = Path(folder).expanduser()
    if target.is_dir() and any(target.iterdir()):
        raise ConfigError(f"files={folder} holds something; choose an empty folder or a new one")
    counts: dict[int, int] = {}
    for image, label in zip(images, labels.tolist(), strict=True):
        i = counts[label] = counts.get(label, -1) + 1
        save_picture(as_image(image), target / f"{label}_{i:04d}.png")
    return target
