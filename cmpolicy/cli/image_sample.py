"""``cmpolicy image sample``: images of chosen classes as one picture, or as files."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from cmpolicy.cli.parse import compose_settings
from cmpolicy.cli.run_command import guarded
from cmpolicy.experiment.image.sampling import (
    Device,
    draw_paths,
    make_images,
    open_model,
    parse_classes,
)
from cmpolicy.flow.sampler import SamplerKind
from cmpolicy.image.datasets.resize import as_image
from cmpolicy.image.pictures import samples_picture, save_picture
from cmpolicy.schema import ConfigError, from_mapping

PROGRAM = "cmpolicy image sample"
CONFIG_PACKAGE = "cmpolicy_conf.image"


@dataclass(frozen=True, kw_only=True)
class SampleConfig:
    """Settings; ``image/sample.yaml`` in ``cmpolicy_conf`` says what each means."""

    model: str
    classes: Any
    per_class: int
    nfe: int
    seed: int
    sampler: SamplerKind | None
    batch_size: int
    device: Device
    out: str
    files: str | None
    paths: str | None

    def __post_init__(self) -> None:
        for name in ("per_class", "nfe", "batch_size"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.seed < 0:
            raise ConfigError(f"seed must not be negative, got {self.seed}")
        for name in ("out", "paths"):
            path = getattr(self, name)
            if path is not None and not path.lower().endswith(".png"):
                raise ConfigError(f"{name}={path} must end in .png: pictures are written as PNG")


def main(words: Sequence[str]) -> int:
    """Entry point of ``cmpolicy image sample``; returns the exit status."""
    if not words or {"-h", "--help"} & set(words):
        print(f"Make images with a trained model.\n\n{help_text('sample')}", end="")
        return 0 if words else 2
    return guarded(lambda: _sample(words), PROGRAM)


def help_text(name: str) -> str:
    """The settings of an image command, as its YAML file has them."""
    return files(CONFIG_PACKAGE).joinpath(f"{name}.yaml").read_text(encoding="utf-8")


def _sample(words: Sequence[str]) -> int:
    settings = compose_settings("sample", words, package=CONFIG_PACKAGE)
    config = from_mapping(SampleConfig, settings)
    pipe = open_model(config.model, config.device)
    classes = parse_classes(config.classes, pipe.class_names)
    made = make_images(
        pipe,
        np.repeat(np.asarray(classes, dtype=np.int64), config.per_class),
        nfe=config.nfe,
        seed=config.seed,
        sampler=config.sampler,
        batch_size=config.batch_size,
    )
    plural = "s" * (config.nfe > 1)
    title = f"{config.nfe} network evaluation{plural} per image, seed {config.seed}"
    picture = samples_picture(made.images, made.labels, pipe.class_names, title)
    written = [save_picture(picture, Path(config.out).expanduser())]
    if config.paths is not None:
        out = Path(config.paths).expanduser()
        written.append(draw_paths(pipe, classes, seed=config.seed, sampler=config.sampler, out=out))
    if config.files is not None:
        written.append(_save_each(made.images, made.labels, config.files))
    rate = 1000 * made.seconds / len(made.images)
    print(f"{len(made.images)} images, {rate:.2f} ms each in batches of {config.batch_size}")
    print("\n".join(f"  {path}" for path in written))
    return 0


def _save_each(images: npt.NDArray[np.uint8], labels: npt.NDArray[np.int64], folder: str) -> Path:
    target = Path(folder).expanduser()
    counts: dict[int, int] = {}
    for image, label in zip(images, labels.tolist(), strict=True):
        i = counts[label] = counts.get(label, -1) + 1
        save_picture(as_image(image), target / f"{label}_{i:04d}.png")
    return target
