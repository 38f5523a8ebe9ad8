"""The real FID, KID, precision and recall, by torch-fidelity, where its Inception weights are.

torch-fidelity computes with the weights of the original TensorFlow network, which it downloads.
Without them there is no FID, and no other number takes its place.
"""

from __future__ import annotations

import hashlib
import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.utils.data import Dataset

from cmpolicy.image.datasets.data import ImageSet
from cmpolicy.image.metrics.cache import content_key

WEIGHTS_FILE = "weights-inception-2015-12-05-6726825d.pth"
_SHA256_START = "6726825d"  # as the file's name has it
_KID_SUBSET = 1000


class FidelityError(ValueError):
    """FID cannot be computed here; says what to do."""


@dataclass(frozen=True)
class FidelityScores:
    """All by Inception features. ``kid_std`` is over random subsets; n is the size of the sets."""

    fid: float
    kid: float
    kid_std: float
    precision: float
    recall: float
    n_real: int
    n_generated: int


def inception_weights(path: str | os.PathLike[str] | None = None) -> Path:
    """The weights' file: ``path``, else where torch-fidelity puts it.

    Raises:
        FidelityError: torch-fidelity is not installed, no file, or another one.
    """
    try:
        import torch_fidelity  # noqa: F401  only whether it is there
    except ImportError as error:
        raise FidelityError(
            f"FID is computed by torch-fidelity, which cannot be imported ({error}); install it "
            "with: pip install 'cmpolicy[image]'"
        ) from error
    default = Path(torch.hub.get_dir()) / "checkpoints" / WEIGHTS_FILE
    file = default if path is None else Path(path).expanduser()
    if not file.is_file():
        raise FidelityError(
            f"FID needs torch-fidelity's Inception weights, and {file} does not exist. Download "
            f"{WEIGHTS_FILE} from the release v0.2.0 of toshas/torch-fidelity on GitHub to "
            f"{default.parent}, or name a copy: inception=<file>. Without it, leave fid=false: the "
            "feature distance is another measure that needs no download"
        )
    with file.open("rb") as stream:
        found = hashlib.file_digest(stream, "sha256").hexdigest()
    if not found.startswith(_SHA256_START):
        raise FidelityError(
            f"{file} is not torch-fidelity's {WEIGHTS_FILE}: its SHA-256 starts with "
            f"{found[:8]}, not {_SHA256_START}; download it again"
        )
    return file


def fidelity_scores(
    real: ImageSet,
    generated: npt.NDArray[np.uint8],
    weights: Path,
    *,
    device: torch.device | str = "cpu",
    cache_dir: str | os.PathLike[str] | None = None,
) -> FidelityScores:
    """Scores of generated (N, H, W, C) against real images, with Inception ``weights``.

    Features of the real images are kept in ``cache_dir`` by content; grey images are repeated over
    three channels, so that their FID compares with no other.
    """
    from torch_fidelity import calculate_metrics

    smallest = min(len(real), len(generated))
    caching = {"cache": False}
    if cache_dir is not None:
        name = f"cmpolicy-{content_key(real.sha256, str(weights))[:32]}"
        caching = {"cache": True, "cache_root": str(cache_dir), "input2_cache_name": name}  # type: ignore[dict-item]
    found = calculate_metrics(
        input1=_Pictures(generated),
        input2=_Pictures(real.images),
        cuda=torch.device(device).type == "cuda",
        fid=True,
        kid=True,
        prc=True,
        feature_extractor="inception-v3-compat",  # else precision and recall want another network
        feature_layer_prc="2048",
        kid_subset_size=min(_KID_SUBSET, smallest),
        feature_extractor_weights_path=str(weights),
        verbose=False,
        **caching,
    )
    return FidelityScores(
        fid=float(found["frechet_inception_distance"]),
        kid=float(found["kernel_inception_distance_mean"]),
        kid_std=float(found["kernel_inception_distance_std"]),
        precision=float(found["precision"]),
        recall=float(found["recall"]),
        n_real=len(real),
        n_generated=len(generated),
    )


class _Pictures(Dataset[Tensor]):
    """What torch-fidelity reads: (3, H, W) uint8."""

    def __init__(self, images: npt.NDArray[np.uint8]) -> None:
        self._images = images

    def __len__(self) -> int:
        return len(self._images)

    def __getitem__(self, index: int) -> Tensor:
        image = torch.from_numpy(np.ascontiguousarray(self._images[index]))
        return image.permute(2, 0, 1).expand(3, -1, -1).contiguous()
