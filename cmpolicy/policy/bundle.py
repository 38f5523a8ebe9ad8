"""Policy bundles: the directory users share. No pickle is ever read or written.

A bundle holds ``config.json`` (format version, spec, net, path, sampler, metadata, hashes),
``model.safetensors`` (weights), ``normalizer.safetensors`` and ``README.md`` (the model card).
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor

from cmpolicy.files import replace_directory, space_note
from cmpolicy.nn.unet1d import UNet1D, UNet1DConfig
from cmpolicy.normalize import Normalizer
from cmpolicy.spec import PolicySpec

if TYPE_CHECKING:
    from cmpolicy.policy.policy import ConsistencyPolicy

FORMAT = "cmpolicy-policy"
FORMAT_VERSION = 1
CONFIG, MODEL, NORMALIZER, CARD = FILES = (
    "config.json",
    "model.safetensors",
    "normalizer.safetensors",
    "README.md",
)
IMAGE_INDEX = "model_index.json"  # what an image model has in place of CONFIG
BUNDLED = Path(__file__).resolve().parent.parent / "pretrained"


class BundleError(ValueError):
    """A policy bundle that cannot be loaded or written; the message holds its path."""


def bundled_names() -> list[str]:
    """Names that ``from_pretrained`` knows without a network."""
    if not BUNDLED.is_dir():
        return []
    return sorted(p.name for p in BUNDLED.iterdir() if (p / CONFIG).is_file())


# -- writing --------------------------------------------------------------------------------------


def save_bundle(
    policy: ConsistencyPolicy,
    directory: str | os.PathLike[str],
    *,
    card: str = "",
    metadata: Mapping[str, Any] | None = None,
    weights_dtype: torch.dtype = torch.float32,
) -> None:
    """Write a bundle; an older one at the same place stays whole until the new one is complete.

    Files in the directory that are no part of a bundle (a result, a ``.git``) are kept.

    Args:
        policy: its weights are stored as they are (hand in the EMA weights).
        directory: the bundle; replaced if it is one, refused if it is something else.
        card: text of the model card.
        metadata: JSON-ready facts kept in ``config.json`` (training command, versions, result).
        weights_dtype: of the stored weights; ``torch.float16`` halves the file.

    Raises:
        BundleError: ``directory`` exists and is no bundle, a weight is not finite, or the metadata
            is not JSON-ready.
        OSError: the disk is full or not writable; the older bundle is intact.
    """
    target = Path(directory).expanduser().absolute()
    _check_replaceable(target)
    files = _contents(policy, target, card, dict(metadata or {}), weights_dtype)

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
    policy: ConsistencyPolicy,
    target: Path,
    card: str,
    metadata: dict[str, Any],
    weights_dtype: torch.dtype,
) -> dict[str, bytes]:
    """The files of a bundle by name; the same policy always gives the same bytes."""
    weights = {
        name: value.detach().cpu().to(weights_dtype).contiguous()
        for name, value in cast(UNet1D, policy.flow_map.net).state_dict().items()
    }
    for name, value in weights.items():
        if not torch.isfinite(value).all():
            raise BundleError(
                f"refusing to write {target}: weight {name!r} is not finite as {weights_dtype}"
            )
    arrays = {k: v.detach().cpu().contiguous() for k, v in policy.normalizer.to_arrays().items()}
    tensors = {MODEL: save(weights), NORMALIZER: save(arrays)}
    config = {
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        "spec": policy.spec.to_dict(),
        "net": policy.net_config.to_dict(),
        "path": policy.path_name,
        "sampler": policy.sampler,
        "noise_scale": policy.noise_scale,
        "control_hz": policy.control_hz,
        "sha256": {name: hashlib.sha256(data).hexdigest() for name, data in tensors.items()},
        "metadata": metadata,
    }
    try:
        text = json.dumps(config, indent=2) + "\n"
    except (TypeError, ValueError) as error:
        raise BundleError(f"cannot write {target}: metadata must be JSON-ready: {error}") from error
    card = card or f"# {target.name}\n\nA cmpolicy policy bundle.\n"
    return {CONFIG: text.encode(), **tensors, CARD: card.encode()}


def _write_error(target: Path, needed: int, error: OSError) -> OSError:
    previous = "; the bundle that was there before is intact" if target.exists() else ""
    return OSError(
        error.errno,
        f"cannot write the policy bundle {target}: {error.strerror or error}; "
        f"{space_note(target, needed)}{previous}",
    )


# -- reading --------------------------------------------------------------------------------------


def load_bundle(
    name_or_path: str | os.PathLike[str], device: str | torch.device = "cpu"
) -> ConsistencyPolicy:
    """Read a bundle: a directory, a bundled name, or a hub id ``owner/name``.

    Raises:
        BundleError: not found, a file missing, truncated or foreign, weights that do not fit the
            configuration, or a bundle of a newer format version.
    """
    from cmpolicy.policy.policy import ConsistencyPolicy

    directory = locate(name_or_path)
    config = _read_config(directory)
    arrays = _read_tensors(directory, NORMALIZER, config)
    weights = _read_tensors(directory, MODEL, config)
    try:
        policy = ConsistencyPolicy(
            PolicySpec.from_dict(config["spec"]),
            UNet1DConfig(**config["net"]),
            Normalizer.from_arrays({name: value.float() for name, value in arrays.items()}),
            path=config["path"],
            sampler=config["sampler"],
        )
        policy.noise_scale = float(config.get("noise_scale", 1.0))
        rate = config.get("control_hz")
        policy.control_hz = None if rate is None else float(rate)
        policy.net.load_state_dict({name: value.float() for name, value in weights.items()})
    except (KeyError, TypeError, ValueError, RuntimeError) as error:
        reason = f"{CONFIG} lacks {error}" if isinstance(error, KeyError) else str(error)
        raise BundleError(
            f"{directory}: {CONFIG} and the stored tensors do not fit together: {reason}; "
            "the files may come from different bundles, so copy the whole directory again"
        ) from error
    policy.net.lay_out_for_inference()
    return policy.to(device).eval().requires_grad_(False)


def read_metadata(name_or_path: str | os.PathLike[str]) -> dict[str, Any]:
    """What ``save_bundle`` was given as metadata."""
    config = _read_config(locate(name_or_path))
    metadata: dict[str, Any] = config.get("metadata", {})
    if config["format_version"] == 1:
        _rename_samples(metadata)
    return metadata


def _rename_samples(metadata: dict[str, Any]) -> None:
    """Format version 1 called training examples "samples"."""
    for facts in (metadata, metadata.get("config", {})):
        if "samples" in facts:
            facts["examples"] = facts.pop("samples")
    if "start" in metadata:
        _rename_samples(metadata["start"])


def read_hashes(name_or_path: str | os.PathLike[str]) -> dict[str, str]:
    """SHA-256 of the bundle's tensor files, by name: what it was saved with."""
    hashes: dict[str, str] = _read_config(locate(name_or_path))["sha256"]
    return hashes


def locate(name_or_path: str | os.PathLike[str]) -> Path:
    """The directory of a bundle: see :func:`load_bundle`. Looked for in that order.

    Raises:
        BundleError: nothing of that name anywhere.
    """
    text = os.fspath(name_or_path)
    path = Path(text).expanduser().absolute()
    if path.is_file():
        raise BundleError(f"{path} is a file; a policy bundle is a directory with {CONFIG}")
    if (path / CONFIG).is_file():
        return path
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
        from cmpolicy.policy.hub import download

        return download(text)
    raise BundleError(
        f"no policy bundle at {path}, and {text!r} is not one of the bundled policies "
        f"{bundled_names()}; give a directory with {CONFIG}, or a hub id 'owner/name'"
    )


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
