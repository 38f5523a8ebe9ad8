"""Policy bundles: the directory users share. No pickle is ever read or written.

A bundle holds ``config.json`` (format version, spec, net, path, sampler, metadata, hashes),
``model.safetensors`` (weights), ``normalizer.safetensors`` and ``README.md`` (the model card).
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from cmpolicy.nn.unet1d import UNet1DConfig
from cmpolicy.normalize import Normalizer
from cmpolicy.spec import PolicySpec

if TYPE_CHECKING:
    from cmpolicy.policy.consistency import ConsistencyPolicy

FORMAT = "cmpolicy-policy"
FORMAT_VERSION = 1
CONFIG, MODEL, NORMALIZER, CARD = (
    "config.json",
    "model.safetensors",
    "normalizer.safetensors",
    "README.md",
)
BUNDLED = Path(__file__).resolve().parent.parent / "pretrained"


class BundleError(ValueError):
    """A policy bundle that cannot be loaded or written; the message holds its path."""


def bundled_names() -> list[str]:
    """Names that ``from_pretrained`` knows without a network."""
    if not BUNDLED.is_dir():
        return []
    return sorted(p.name for p in BUNDLED.iterdir() if (p / CONFIG).is_file())


def save_bundle(
    policy: ConsistencyPolicy,
    directory: str | os.PathLike[str],
    *,
    card: str = "",
    metadata: Mapping[str, Any] | None = None,
    weights_dtype: torch.dtype = torch.float32,
) -> None:
    """Write a bundle; an older one at the same place stays whole until the new one is complete.

    Args:
        policy: its weights are stored as they are (hand in the EMA weights).
        directory: the bundle; replaced if it is one, refused if it is something else.
        card: text of the model card.
        metadata: JSON-ready facts kept in ``config.json`` (training command, versions, result).
        weights_dtype: of the stored weights; ``torch.float16`` halves the file.

    Raises:
        BundleError: ``directory`` exists and is no bundle, or a weight is not finite.
        OSError: the disk is full or not writable.
    """
    target = Path(directory).absolute()
    if target.exists() and not (target / CONFIG).is_file() and any(target.iterdir()):
        raise BundleError(f"{target} exists and is not a policy bundle; choose another directory")
    weights = {
        name: value.detach().cpu().to(weights_dtype).contiguous()
        for name, value in policy.flow_map.net.state_dict().items()  # type: ignore[union-attr]
    }
    for name, value in weights.items():
        if not torch.isfinite(value).all():
            raise BundleError(f"weight {name!r} is not finite: refusing to write {target}")
    arrays = {k: v.detach().cpu().contiguous() for k, v in policy.normalizer.to_arrays().items()}

    target.parent.mkdir(parents=True, exist_ok=True)
    staging = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
    try:
        save_file(weights, staging / MODEL)
        save_file(arrays, staging / NORMALIZER)
        config = {
            "format": FORMAT,
            "format_version": FORMAT_VERSION,
            "spec": policy.spec.to_dict(),
            "net": policy.net_config.to_dict(),
            "path": policy.path_name,
            "sampler": policy.sampler,
            "sha256": {name: _sha256(staging / name) for name in (MODEL, NORMALIZER)},
            "metadata": dict(metadata or {}),
        }
        (staging / CONFIG).write_text(json.dumps(config, indent=2) + "\n")
        (staging / CARD).write_text(card or f"# {target.name}\n\nA cmpolicy policy bundle.\n")
        for file in staging.iterdir():
            _fsync(file)
        staging.chmod(0o755)
        replace_directory(staging, target)
    except BaseException:
        shutil.rmtree(staging, ignore_errors=True)
        raise


def replace_directory(staging: Path, target: Path) -> None:
    """Put ``staging`` in the place of ``target``; the old one is deleted only afterwards."""
    old: Path | None = None
    if target.exists():
        old = Path(tempfile.mkdtemp(prefix=f".{target.name}.old.", dir=target.parent))
        os.rename(target, old / target.name)
    os.rename(staging, target)
    _fsync(target.parent)
    if old is not None:
        shutil.rmtree(old, ignore_errors=True)


def load_bundle(
    name_or_path: str | os.PathLike[str], device: str | torch.device = "cpu"
) -> ConsistencyPolicy:
    """Read a bundle: a directory, a bundled name, or a hub id ``owner/name``.

    Raises:
        BundleError: not found, a file missing, truncated or foreign, weights that do not fit the
            configuration, or a bundle of a newer format version.
    """
    from cmpolicy.policy.consistency import ConsistencyPolicy

    directory = locate(name_or_path)
    config = _read_config(directory)
    arrays = _read_tensors(directory, NORMALIZER, config)
    weights = _read_tensors(directory, MODEL, config)
    try:
        spec = PolicySpec.from_dict(config["spec"])
        net = UNet1DConfig(**config["net"])
        policy = ConsistencyPolicy(
            spec,
            net,
            Normalizer.from_arrays(arrays),
            path=config["path"],
            sampler=config["sampler"],
        )
        policy.flow_map.net.load_state_dict(  # type: ignore[union-attr]
            {name: value.float() for name, value in weights.items()}
        )
    except (KeyError, TypeError, ValueError, RuntimeError) as error:
        raise BundleError(
            f"{directory}: {CONFIG} and the stored tensors do not fit together: {error}; "
            "the files may come from different bundles, so copy the whole directory again"
        ) from error
    return policy.to(device).eval().requires_grad_(False)


def read_metadata(name_or_path: str | os.PathLike[str]) -> dict[str, Any]:
    """What ``save_bundle`` was given as metadata."""
    metadata: dict[str, Any] = _read_config(locate(name_or_path)).get("metadata", {})
    return metadata


def locate(name_or_path: str | os.PathLike[str]) -> Path:
    """The directory of a bundle: see :func:`load_bundle`."""
    text = os.fspath(name_or_path)
    path = Path(text)
    if path.is_dir():
        return path.absolute()
    if path.exists():
        raise BundleError(f"{path} is a file; a policy bundle is a directory with {CONFIG}")
    if (BUNDLED / text / CONFIG).is_file():
        return BUNDLED / text
    if text.count("/") == 1 and not text.startswith((".", "/", "~", "outputs/")):
        return _download(text)
    raise BundleError(
        f"no policy bundle at {path.absolute()}, and {text!r} is not one of the bundled policies "
        f"{bundled_names()}; give a directory with {CONFIG}, or a hub id 'owner/name'"
    )


def _download(repo_id: str) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        found = snapshot_download(repo_id, allow_patterns=[CONFIG, MODEL, NORMALIZER, CARD])
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        raise BundleError(
            f"no policy bundle at {Path(repo_id).absolute()}, and {repo_id!r} could not be fetched "
            f"from the hub: {error}"
        ) from error
    return Path(found)


def _read_config(directory: Path) -> dict[str, Any]:
    file = directory / CONFIG
    if not file.is_file():
        raise BundleError(f"{directory} is no policy bundle: {CONFIG} is missing")
    try:
        config = json.loads(file.read_text())
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise BundleError(f"{file} is truncated or not JSON: {error}") from error
    if not isinstance(config, dict) or config.get("format") != FORMAT:
        raise BundleError(
            f"{file} was not written by cmpolicy: expected format {FORMAT!r}; a bundle is made by "
            "policy.save_pretrained or cmpolicy-train"
        )
    version = config.get("format_version")
    if not isinstance(version, int) or version > FORMAT_VERSION:
        raise BundleError(
            f"{file} has format version {version}; this cmpolicy reads up to {FORMAT_VERSION}: "
            "upgrade cmpolicy"
        )
    return config


def _read_tensors(directory: Path, name: str, config: Mapping[str, Any]) -> dict[str, Tensor]:
    file = directory / name
    if not file.is_file():
        raise BundleError(f"{directory} is incomplete: {name} is missing; copy the bundle again")
    expected = config.get("sha256", {}).get(name)
    if expected is not None and _sha256(file) != expected:
        raise BundleError(
            f"{file} is truncated or belongs to another bundle: its SHA-256 is not the one in "
            f"{CONFIG}; copy the whole bundle again"
        )
    try:
        tensors: dict[str, Tensor] = load_file(file)
    except (SafetensorError, OSError) as error:
        raise BundleError(f"{file} cannot be read as safetensors: {error}") from error
    return tensors


def _sha256(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
