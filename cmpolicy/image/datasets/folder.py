"""A directory of images, one directory per class: ``path/<class name>/<any name>.png``.

Classes are numbered by the order of their names. Directories and files whose names start with a
dot are no part of the data.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

from cmpolicy.image.datasets.data import ImageData, ImageDataConfig, ImageDataError, ImageSet
from cmpolicy.image.datasets.resize import as_array, resize, resize_all
from cmpolicy.image.datasets.split import stratified_test_rows

_MODES = ("L", "RGB")
_MORE_THAN_8_BIT = ("I", "F", "I;16", "I;16B", "I;16L")


@dataclass(frozen=True)
class _Picture:
    file: Path
    label: int
    image: Image.Image  # loaded, upright


def load_folder(config: ImageDataConfig) -> ImageData:
    """Read ``config.path``; a share of each class is held out as the test part.

    Raises:
        ImageDataError: no directory, no or empty classes, an unreadable file, mixed sizes or modes
            that are not to be converted; names the directory or file.
    """
    root = Path(str(config.path)).expanduser()
    classes = _classes(root)
    pictures: list[_Picture] = []
    skipped: list[str] = []
    for label, folder in enumerate(classes):
        before = len(pictures)
        for file in _files(folder):
            picture = _open(file, config, skipped)
            if picture is not None:
                pictures.append(_Picture(file, label, picture))
        if len(pictures) - before < 2:
            raise ImageDataError(
                f"class {folder.name!r} ({folder}) has {len(pictures) - before} readable image(s); "
                "at least 2 are needed, one of which is held out: add images, or remove the "
                "directory"
            )
    convert = _converter(config, pictures, root)
    images = np.stack([as_array(convert(p)) for p in pictures])
    if config.mixed == "refuse":
        images = resize_all(images, config.image_size)
    labels = np.array([p.label for p in pictures], dtype=np.int64)
    train, test = stratified_test_rows(labels, config.test_fraction)
    return ImageData(
        name="folder",
        train=ImageSet(images[train], labels[train]),
        test=ImageSet(images[test], labels[test]),
        class_names=tuple(folder.name for folder in classes),
        source=f"folder {root.name}",
        flip=config.flips,
        skipped=tuple(skipped),
    )


def _classes(root: Path) -> list[Path]:
    if not root.is_dir():
        raise ImageDataError(f"there is no directory {root}; check path")
    found = sorted(p for p in root.iterdir() if not p.name.startswith("."))
    stray = [p for p in found if not p.is_dir()]
    if stray:
        raise ImageDataError(
            f"{stray[0]} lies beside the class directories, so its class is unknown ({len(stray)} "
            "such file(s)); move it into the directory of its class"
        )
    if not found:
        raise ImageDataError(
            f"{root} has no class directories; expected {root}/<class name>/<image files>"
        )
    return found


def _files(folder: Path) -> list[Path]:
    files = sorted(p for p in folder.iterdir() if not p.name.startswith("."))
    nested = [p for p in files if p.is_dir()]
    if nested:
        raise ImageDataError(
            f"{nested[0]} is a directory within a class; expected image files in {folder}"
        )
    if not files:
        raise ImageDataError(
            f"class {folder.name!r} is empty: {folder} has no images; add some, or remove it"
        )
    return files


def _open(file: Path, config: ImageDataConfig, skipped: list[str]) -> Image.Image | None:
    """The picture as a person would see it; None if it is to be skipped."""
    try:
        with Image.open(file) as picture:
            picture.load()
            return ImageOps.exif_transpose(picture)
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        if config.broken == "refuse":
            raise ImageDataError(
                f"{file} cannot be read as an image ({error}); remove it, or leave such files out "
                "with broken=skip"
            ) from error
        skipped.append(f"{file.parent.name}/{file.name}")
        return None


def _converter(
    config: ImageDataConfig, pictures: Sequence[_Picture], root: Path
) -> Callable[[_Picture], Image.Image]:
    """What makes all pictures alike. Nothing is changed that was not asked for."""
    for picture in pictures:
        if picture.image.mode in _MORE_THAN_8_BIT:
            raise ImageDataError(
                f"{picture.file} has more than 8 bits per value (mode {picture.image.mode}), and "
                "how to map these to 0..255 is not known; save it with 8 bits"
            )
    size, mode = config.image_size, config.mode
    if config.mixed == "convert" and size is not None and mode is not None:
        return lambda picture: _fitted(_in_mode(picture.image, mode), size)
    _refuse_mixed(root, "size", pictures, lambda image: f"{image.width}x{image.height}")
    _refuse_mixed(root, "mode", pictures, lambda image: image.mode)
    first = pictures[0]
    if first.image.width != first.image.height:
        raise ImageDataError(
            f"the images in {root} are {first.image.width}x{first.image.height}, not square; "
            f"give {_CONVERT} to crop them at the centre"
        )
    found = first.image.mode
    if found not in _MODES:
        raise ImageDataError(
            f"the images in {root} have mode {found}, not L (grey) or RGB; give {_CONVERT}"
        )
    if mode not in (None, found):
        raise ImageDataError(
            f"the images in {root} have mode {found}, not mode={mode}; give mode={found}, or "
            f"{_CONVERT.replace('RGB', str(mode))}"
        )
    return lambda picture: picture.image


_CONVERT = "mixed=convert image_size=32 mode=RGB, say,"


def _refuse_mixed(
    root: Path, what: str, pictures: Sequence[_Picture], key: Callable[[Image.Image], str]
) -> None:
    groups: dict[str, list[Path]] = defaultdict(list)
    for picture in pictures:
        groups[key(picture.image)].append(picture.file)
    if len(groups) == 1:
        return
    ordered = sorted(groups.items(), key=lambda group: -len(group[1]))
    listed = ", ".join(
        f"{name} ({len(files)}, as {files[0].relative_to(root)})" for name, files in ordered[:4]
    )
    more = f" and {len(ordered) - 4} more" if len(ordered) > 4 else ""
    raise ImageDataError(
        f"the images in {root} have {len(groups)} {what}s: {listed}{more}; give {_CONVERT} to "
        "make them alike"
    )


def _in_mode(image: Image.Image, mode: str) -> Image.Image:
    """To L or RGB; transparent images are laid on white."""
    if image.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in image.info:
        layer = image.convert("RGBA")
        ground = Image.new("RGBA", layer.size, "white")
        image = Image.alpha_composite(ground, layer)
    return image.convert(mode)


def _fitted(image: Image.Image, size: int) -> Image.Image:
    """The largest square at the centre, scaled."""
    side = min(image.size)
    left, top = (image.width - side) // 2, (image.height - side) // 2
    square = image.crop((left, top, left + side, top + side))
    return square if side == size else resize(square, size)
