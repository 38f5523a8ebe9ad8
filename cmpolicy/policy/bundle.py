"""Policy bundles: the directory users share. No pickle is ever read or written.

A bundle holds ``config.json`` (format version, spec, network, encoder, path, sampler, number of
evaluations, metadata, hashes), ``model.safetensors`` (weights), ``normalizer.safetensors`` and
``README.md`` (the model card).
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor

from cmpolicy.files import WriteError, replace_directory, space_note
from cmpolicy.hub import HubError, download
from cmpolicy.nn.registry import EncoderConfig, NetConfig, encoder_config, net_config, to_mapping
from cmpolicy.policy.card import with_header
from cmpolicy.policy.format_1 import from_format_1
from cmpolicy.schema import UnknownNameError
from cmpolicy.spec import PolicySpec, check_warm_start

FORMAT = "cmpolicy-policy"
FORMAT_VERSION = 2
CONFIG, MODEL, NORMALIZER, CARD = FILES = (
    "config.json",
    "model.safetensors",
    "normalizer.safetensors",
    "README.md",
)
MAX_NFE = 100_000
LEROBOT = "cmpolicy"  # folder of the bundle in a checkpoint that lerobot wrote
IMAGE_INDEX = "model_index.json"  # what an image model has in place of CONFIG
BUNDLED = Path(__file__).resolve().parent.parent / "pretrained"


class BundleError(ValueError):
    """A policy bundle that cannot be loaded, written, fetched or uploaded."""


@dataclass(frozen=True)
class Bundle:
    """What a bundle holds; ``ConsistencyPolicy`` is made of it and makes it.

    ``weights`` are named ``net.<name>`` and ``encoder.<name>``; they and ``normalizer`` are float32
    when read, but for the origins of the normaliser. ``source`` is where it was read.
    """

    spec: PolicySpec
    net: NetConfig
    encoder: EncoderConfig
    path: str
    sampler: str
    nfe: int
    noise_scale: float
    control_hz: float | None
    weights: Mapping[str, Tensor]
    normalizer: Mapping[str, Tensor]
    metadata: Mapping[str, Any]
    warm_start: float | None = None
    source: Path | None = None

    @contextmanager
    def errors_named(self) -> Iterator[None]:
        """Turn what is wrong between configuration and tensors into a BundleError."""
        try:
            yield
        except (KeyError, TypeError, ValueError, RuntimeError) as error:
            reason = f"{CONFIG} lacks {error}" if isinstance(error, KeyError) else str(error)
            raise BundleError(
                f"{self.source}: {CONFIG} and the stored tensors do not fit together: {reason}; "
                "the files may come from different bundles, so copy the whole directory again"
            ) from error


def bundled_names() -> list[str]:
    """Names that ``from_pretrained`` knows without a network."""
    if not BUNDLED.is_dir():
        return []
    return sorted(p.name for p in BUNDLED.iterdir() if (p / CONFIG).is_file())


# -- writing --------------------------------------------------------------------------------------


def write_bundle(
    bundle: Bundle,
    directory: str | os.PathLike[str],
    *,
    card: str = "",
    weights_dtype: torch.dtype = torch.float32,
) -> None:
    """Write a bundle; an older one at the same place stays whole until the new one is complete.

    Files in the directory that are no part of a bundle (a result, a ``.git``) are kept.

    Raises:
        BundleError: ``directory`` exists and is no bundle, a weight is not finite, or the metadata
            is not JSON-ready.
        WriteError: the disk is full or not writable; the older bundle is intact.
    """
    target = Path(directory).expanduser().absolute()
    _check_replaceable(target)
    files = _contents(bundle, target, card, weights_dtype)

    def fill(folder: Path) -> None:
        for name, data in files.items():
            (folder / name).write_bytes(data)

    try:
        replace_directory(target, fill)
    except OSError as error:
        raise _write_error(target, sum(map(len, files.values())), error) from error


def _check_replaceable(target: Path) -> None:
    if not target.exists():
        return
    if not target.is_dir():
        raise BundleError(
            f"{target} is a file; a policy bundle is a directory: choose another name"
        )
    if not any(target.iterdir()):
        return
    try:
        _read_config(target)
    except BundleError as error:
        raise BundleError(
            f"{target} exists and is not a policy bundle ({error}); nothing was written: choose "
            "another directory, or remove it first"
        ) from error


def _contents(
    bundle: Bundle, target: Path, card: str, weights_dtype: torch.dtype
) -> dict[str, bytes]:
    """The files of a bundle by name; the same policy always gives the same bytes."""
    weights = {
        name: value.detach().cpu().to(weights_dtype).contiguous()
        for name, value in bundle.weights.items()
    }
    for name, value in weights.items():
        if not torch.isfinite(value).all():
            raise BundleError(
                f"refusing to write {target}: weight {name!r} is not finite as {weights_dtype}"
            )
    arrays = {key: value.detach().cpu().contiguous() for key, value in bundle.normalizer.items()}
    tensors = {MODEL: save(weights), NORMALIZER: save(arrays)}
    config = {
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        "spec": bundle.spec.to_dict(),
        "net": to_mapping(bundle.net),
        "encoder": to_mapping(bundle.encoder),
        "path": bundle.path,
        "sampler": bundle.sampler,
        "nfe": bundle.nfe,
        "noise_scale": bundle.noise_scale,
        "control_hz": bundle.control_hz,
        **({} if bundle.warm_start is None else {"warm_start": bundle.warm_start}),
        "sha256": {name: hashlib.sha256(data).hexdigest() for name, data in tensors.items()},
        "metadata": dict(bundle.metadata),
    }
    try:
        text = json.dumps(config, indent=2) + "\n"
    except (TypeError, ValueError) as error:
        raise BundleError(f"cannot write {target}: metadata must be JSON-ready: {error}") from error
    card = card or f"# {target.name}\n\nA cmpolicy policy bundle.\n"
    card = with_header(card, bundle.metadata)
    return {CONFIG: text.encode(), **tensors, CARD: card.encode()}


def _write_error(target: Path, needed: int, error: OSError) -> WriteError:
    previous = "; the bundle that was there before is intact" if target.exists() else ""
    return WriteError(
        f"cannot write the policy bundle {target}: {error.strerror or error}; "
        f"{space_note(target, needed)}{previous}"
    )


# -- reading --------------------------------------------------------------------------------------


def read_bundle(name_or_path: str | os.PathLike[str]) -> Bundle:
    """Read a bundle: a directory, a bundled name, or a hub id ``owner/name``.

    Raises:
        BundleError: not found, a file missing, truncated or foreign, a configuration that makes no
            sense, or a bundle of a newer format version.
    """
    directory = locate(name_or_path)
    while True:
        identity = _identity(directory)
        try:
            return _read(directory)
        except (BundleError, OSError):
            if _identity(directory) == identity:
                raise
            # the bundle was replaced meanwhile: what was read is of two


def _identity(directory: Path) -> int | None:
    """Another one once the directory was replaced."""
    try:
        return directory.stat().st_ino
    except OSError:
        return None


def _read(directory: Path) -> Bundle:
    config = _read_config(directory)
    arrays = _read_tensors(directory, NORMALIZER, config)
    weights = _read_tensors(directory, MODEL, config)
    try:
        if config["format_version"] == 1:
            config, weights = from_format_1(config, weights)
        rate = config.get("control_hz")
        _check_weights(weights)
        return Bundle(
            spec=PolicySpec.from_dict(config["spec"]),
            net=net_config(config["net"]),
            encoder=encoder_config(_without_download(config["encoder"])),
            path=str(config["path"]),
            sampler=str(config["sampler"]),
            nfe=int(_number(config, "nfe", 1, MAX_NFE)),
            noise_scale=_number(config, "noise_scale", 0, 100, default=1.0),
            control_hz=None if rate is None else _number(config, "control_hz", 1e-6, 1e6),
            weights={name: value.float() for name, value in weights.items()},
            normalizer={
                name: value if name.endswith(".origin") else value.float()
                for name, value in arrays.items()
            },
            metadata=config.get("metadata", {}),
            warm_start=check_warm_start(config.get("warm_start")),
            source=directory,
        )
    except UnknownNameError as error:  # perhaps of a module that is not imported
        raise BundleError(f"{directory / CONFIG}: {error}") from error
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        reason = f"it lacks {error}" if isinstance(error, KeyError) else str(error)
        raise BundleError(f"{directory / CONFIG} is damaged: {reason}") from error


def _without_download(encoder: Mapping[str, Any]) -> dict[str, Any]:
    """An encoder that began with pretrained weights has its own by now, in the bundle."""
    return dict(encoder) | ({"pretrained": False} if "pretrained" in encoder else {})


def _check_weights(weights: Mapping[str, Tensor]) -> None:
    for name, value in weights.items():
        if not value.is_floating_point():
            raise ValueError(f"weight {name!r} is of {value.dtype}, expected floating point")
        if not torch.isfinite(value).all():
            raise ValueError(f"weight {name!r} is not finite")


def _number(
    config: Mapping[str, Any], key: str, least: float, most: float, default: float | None = None
) -> float:
    value = config[key] if default is None else config.get(key, default)
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if not is_number or not least <= value <= most:
        raise ValueError(f"{key}={value!r} must be a number from {least:g} to {most:g}")
    return float(value)


def read_hashes(name_or_path: str | os.PathLike[str]) -> dict[str, str]:
    """SHA-256 of the bundle's tensor files, by name: what it was saved with."""
    hashes: dict[str, str] = _read_config(locate(name_or_path))["sha256"]
    return hashes


def locate(name_or_path: str | os.PathLike[str]) -> Path:
    """The directory of a bundle: see :func:`read_bundle`. Looked for in that order.

    Raises:
        BundleError: nothing of that name anywhere.
    """
    text = os.fspath(name_or_path)
    path = Path(text).expanduser().absolute()
    if path.is_file():
        raise BundleError(f"{path} is a file; a policy bundle is a directory with {CONFIG}")
    if (path / CONFIG).is_file():
        return _inside(path)
    if text in bundled_names():
        return BUNDLED / text
    if (path / IMAGE_INDEX).is_file():
        raise BundleError(
            f"{path} is a diffusers pipeline, such as an image model, and no policy; an image "
            "model is opened with ConsistencyImagePipeline.from_pretrained or cmpolicy image"
        )
    if path.is_dir():
        inside = sorted(p.parent.name for p in path.glob(f"*/{CONFIG}"))
        hint = f"; did you mean {path / inside[0]}?" if inside else ""
        raise BundleError(f"{path} is no policy bundle: {CONFIG} is missing{hint}")
    # owner/name, unless the owner is a folder here: then it is a path with a typing error
    is_id = text.count("/") == 1 and not text.startswith((".", "/", "~", "outputs/"))
    if is_id and not path.parent.is_dir():
        try:
            return _inside(download(text, (*FILES, *(f"{LEROBOT}/{name}" for name in FILES))))
        except HubError as error:
            raise BundleError(f"no policy bundle at {path}, and {error}") from error
    raise BundleError(
        f"no policy bundle at {path}, and {text!r} is not one of the bundled policies "
        f"{bundled_names()}; give a directory with {CONFIG}, or a hub id 'owner/name'"
    )


def _inside(directory: Path) -> Path:
    """The bundle in a checkpoint of lerobot, or the directory itself."""
    inner = directory / LEROBOT
    is_bundle = (directory / NORMALIZER).exists() or not (inner / CONFIG).is_file()
    return directory if is_bundle else inner


def _read_config(directory: Path) -> dict[str, Any]:
    file = directory / CONFIG
    if not file.is_file():
        raise BundleError(f"{directory} is no policy bundle: {CONFIG} is missing")
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:  # not JSON, or not text
        raise BundleError(
            f"{file} is truncated or not JSON: {error}; copy the bundle again"
        ) from error
    if not isinstance(config, dict) or config.get("format") != FORMAT:
        raise BundleError(
            f"{file} was not written by cmpolicy: expected format {FORMAT!r}; a bundle is made by "
            "policy.save_pretrained or cmpolicy train"
        )
    version = config.get("format_version")
    if not isinstance(version, int) or not 1 <= version <= FORMAT_VERSION:
        raise BundleError(
            f"{file} has format version {version}; this cmpolicy reads up to {FORMAT_VERSION}: "
            "upgrade cmpolicy"
        )
    if not isinstance(config.get("sha256"), dict):
        raise BundleError(f"{file} is damaged: it lacks the hashes of the other files")
    return config


def _read_tensors(directory: Path, name: str, config: Mapping[str, Any]) -> dict[str, Tensor]:
    file = directory / name
    if not file.is_file():
        raise BundleError(f"{directory} is incomplete: {name} is missing; copy the bundle again")
    with file.open("rb") as stream:
        found = hashlib.file_digest(stream, "sha256").hexdigest()
    if found != config["sha256"].get(name):
        raise BundleError(
            f"{file} is truncated or belongs to another bundle: its SHA-256 is not the one in "
            f"{CONFIG}; copy the whole bundle again"
        )
    try:
        tensors: dict[str, Tensor] = load_file(file)
    except (SafetensorError, OSError) as error:
        raise BundleError(f"{file} cannot be read as safetensors: {error}") from error
    return tensors
