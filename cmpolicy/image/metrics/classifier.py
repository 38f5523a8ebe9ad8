"""A small convolutional classifier trained on real images: who is it, and what are its features.

It is the judge of the recognition rate and the extractor of the classifier features. It knows the
training part alone; ``accuracy`` is measured on the test part and belongs beside every number that
the classifier gives.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cmpolicy.image.datasets.data import ImageData, ImageSet
from cmpolicy.image.metrics.cache import ContentCache, Tensors, content_key
from cmpolicy.image.pixels import as_input

_FORMAT = 1  # raise when a classifier trained by the code below would be another one
_BATCH = 500
Progress = Callable[[int, int], None]
"""Called with samples done and samples in all."""


@dataclass(frozen=True)
class ClassifierConfig:
    """How the classifier is built and trained.

    Args:
        width: channels of the first stage, a quarter of the features' size; null: 16 for grey
            images, 32 for colour.
        samples: training samples seen; null: 30 epochs, but 20,000 to 120,000 of grey images, up to
            500,000 of colour images.
        batch_size: of a step. lr: highest learning rate (one cycle, AdamW).
        shift: images are moved by up to this share of their size.
        seed: of weights, order and shifts.
    """

    width: int | None = None
    samples: int | None = None
    batch_size: int = 128
    lr: float = 4e-3
    shift: float = 0.08
    seed: int = 0

    def __post_init__(self) -> None:
        if (self.width is not None and self.width < 1) or self.batch_size < 1:
            raise ValueError(
                "a classifier needs width and batch_size of at least 1, got "
                f"width={self.width} and batch_size={self.batch_size}"
            )
        if self.lr <= 0 or not 0 <= self.shift < 0.5:
            raise ValueError(
                f"a classifier needs lr above 0 and shift in [0, 0.5), got lr={self.lr} and "
                f"shift={self.shift}"
            )
        if self.samples is not None and self.samples < self.batch_size:
            raise ValueError(
                f"samples={self.samples} is less than one batch (batch_size={self.batch_size})"
            )

    def width_for(self, data: ImageData) -> int:
        """:attr:`width`, null resolved."""
        return self.width or (16 if data.channels == 1 else 32)

    def samples_for(self, data: ImageData) -> int:
        """:attr:`samples`, null resolved."""
        most = 120_000 if data.channels == 1 else 500_000
        return self.samples or min(max(30 * len(data.train), 20_000), most)


class ClassifierNet(nn.Module):
    """x (B, C, H, W) in [-1, 1] -> scores (B, n_classes); any H = W of at least 4."""

    def __init__(self, channels: int, n_classes: int, width: int) -> None:
        super().__init__()
        w = width
        self.body = nn.Sequential(
            _stage(channels, w),
            nn.MaxPool2d(2),
            _stage(w, 2 * w),
            nn.MaxPool2d(2),
            _stage(2 * w, 4 * w),
        )
        self.head = nn.Linear(4 * w, n_classes)

    def features(self, x: Tensor) -> Tensor:
        """(B, 4 width): the last layer before the scores."""
        body: Tensor = self.body(x)
        return body.mean(dim=(2, 3))

    def forward(self, x: Tensor) -> Tensor:
        """Scores (B, n_classes)."""
        scores: Tensor = self.head(F.dropout(self.features(x), 0.2, self.training))
        return scores


def _stage(n_in: int, n_out: int) -> nn.Module:
    layers: list[nn.Module] = []
    for first, last in ((n_in, n_out), (n_out, n_out)):
        layers += [
            nn.Conv2d(first, last, 3, padding=1, bias=False),
            nn.BatchNorm2d(last),
            nn.ReLU(inplace=True),
        ]
    return nn.Sequential(*layers)


class ImageClassifier:
    """A trained classifier with its accuracy on real images that it was not trained on.

    Attributes:
        accuracy: share of the test part recognised. n_test: images in it.
        key: hash of everything that it was made from.
    """

    def __init__(
        self, net: ClassifierNet, *, accuracy: float, n_test: int, key: str, device: torch.device
    ) -> None:
        self.net = net.to(device).eval().requires_grad_(False)
        self.accuracy, self.n_test, self.key, self.device = accuracy, n_test, key, device

    def predict(self, images: npt.NDArray[np.uint8]) -> npt.NDArray[np.int64]:
        """images (N, H, W, C) -> labels (N,)."""
        return self._over(images, lambda x: self.net(x).argmax(dim=1)).numpy()

    def features(self, images: npt.NDArray[np.uint8]) -> npt.NDArray[np.float32]:
        """images (N, H, W, C) -> (N, D)."""
        return self._over(images, self.net.features).numpy()

    def _over(self, images: npt.NDArray[np.uint8], f: Callable[[Tensor], Tensor]) -> Tensor:
        with torch.inference_mode():
            parts = [
                f(as_input(images[i : i + _BATCH]).to(self.device)).cpu()
                for i in range(0, len(images), _BATCH)
            ]
        return torch.cat(parts)


def real_classifier(
    data: ImageData,
    config: ClassifierConfig | None = None,
    *,
    cache: ContentCache | None = None,
    device: torch.device | str = "cpu",
    progress: Progress | None = None,
) -> ImageClassifier:
    """The classifier of a data set: from the cache, or trained now (a minute for MNIST on a CPU).

    The cache key covers the content of both parts, the configuration and the code's version.
    """
    chosen = config or ClassifierConfig()
    where = torch.device(device)
    key = content_key(
        "classifier", _FORMAT, data.train.sha256, data.test.sha256, data.flip, asdict(chosen)
    )

    def make() -> tuple[Tensors, dict[str, str]]:
        net = _train(data, chosen, where, progress)
        trained = ImageClassifier(net, accuracy=0.0, n_test=0, key=key, device=where)
        right = int((trained.predict(data.test.images) == data.test.labels).sum())
        facts = {"right": str(right), "n_test": str(len(data.test))}
        return {name: value.detach().clone() for name, value in net.state_dict().items()}, facts

    weights, facts = (cache or ContentCache(None)).get_or_make("classifier", key, make)
    with torch.random.fork_rng(devices=[]):  # first weights that are replaced at once
        net = ClassifierNet(data.channels, data.n_classes, chosen.width_for(data))
    net.load_state_dict(weights)
    n_test = int(facts["n_test"])
    accuracy = int(facts["right"]) / n_test
    return ImageClassifier(net, accuracy=accuracy, n_test=n_test, key=key, device=where)


def _train(
    data: ImageData, config: ClassifierConfig, device: torch.device, progress: Progress | None
) -> ClassifierNet:
    generator = torch.Generator().manual_seed(config.seed)
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(config.seed)  # initial weights and dropout
        net = ClassifierNet(data.channels, data.n_classes, config.width_for(data))
        net = net.to(device).train()
        samples = config.samples_for(data)
        steps = max(samples // config.batch_size, 1)
        optimizer = torch.optim.AdamW(net.parameters(), lr=config.lr, weight_decay=1e-2)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, config.lr, total_steps=steps)
        images, labels = _resident(data.train, device)
        for step in range(steps):
            rows = torch.randint(len(labels), (config.batch_size,), generator=generator).to(device)
            x = _varied(images[rows], data.flip, config.shift, generator)
            loss = F.cross_entropy(net(x), labels[rows], label_smoothing=0.05)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
            schedule.step()
            if progress is not None:
                progress((step + 1) * config.batch_size, steps * config.batch_size)
    return net


def _resident(data: ImageSet, device: torch.device) -> tuple[Tensor, Tensor]:
    images = torch.from_numpy(np.ascontiguousarray(data.images.transpose(0, 3, 1, 2)))
    return images.to(device), torch.from_numpy(data.labels.copy()).to(device)


def _varied(images: Tensor, flip: bool, shift: float, generator: torch.Generator) -> Tensor:
    """uint8 (B, C, H, W) to [-1, 1], each moved a little, and half of them mirrored."""
    x = images.float() / 127.5 - 1.0
    reach = round(shift * x.shape[-1])
    if reach:
        size = x.shape[-1]
        padded = F.pad(x, (reach,) * 4, mode="replicate")
        dy, dx = torch.randint(2 * reach + 1, (2, len(x)), generator=generator).to(x.device)
        rows = dy[:, None] + torch.arange(size, device=x.device)
        columns = dx[:, None] + torch.arange(size, device=x.device)
        number = torch.arange(len(x), device=x.device)[:, None, None]
        x = padded[number, :, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)
    if flip:
        coins = torch.rand(len(x), generator=generator).to(x.device) < 0.5
        x = torch.where(coins[:, None, None, None], x.flip(-1), x)
    return x
