"""Scores of an image model with where they come from, as JSON and as a table."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cmpolicy.image.metrics.fidelity import FidelityScores
from cmpolicy.image.metrics.scores import ImageScores
from cmpolicy.schema import ConfigError, from_mapping
from cmpolicy_eval.evaluate import git_commit, versions
from cmpolicy_eval.metrics import wilson_interval
from cmpolicy_eval.report import aligned
from cmpolicy_eval.result import write_atomically

_DISTRIBUTIONS = ("diffusers", "safetensors", "torchvision", "scikit-learn", "torch-fidelity")
_COLUMNS = (
    "model",
    "NFE",
    "recognised (95 % interval)",
    "feature distance",
    "precision",
    "recall",
    "variety (lowest class)",
    "copy ratio",
    "FID",
    "KID",
    "ms per image",
)


@dataclass(frozen=True, kw_only=True)
class RealData:
    """What the images were compared with.

    Attributes:
        source: in words. sha256: of the training and of the test part's content.
        n_train, n_test: images in them. class_names: by label.
    """

    source: str
    sha256: tuple[str, ...]
    n_train: int
    n_test: int
    class_names: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class Judge:
    """What recognises, and which features are compared.

    Attributes:
        accuracy: of the classifier on the ``n_test`` real images that it was not trained on.
        features: in words; the distance, precision and recall are in these, so they are not FID.
    """

    accuracy: float
    n_test: int
    features: str


@dataclass(frozen=True, kw_only=True)
class ImageResult:
    """Scores of one model at one number of network evaluations (NFE).

    Attributes:
        model: label. nfe: network evaluations per image. sampler: ``flow_map`` or ``diagonal``.
        seed: of the noise. batch_size: images per call of the network.
        ms_per_image: wall time of generation by the number of images.
        scores: of the generated images; real: of test images, scored the same way.
        fidelity: FID and KID; null if not asked for.
    """

    model: str
    nfe: int
    sampler: str
    seed: int
    batch_size: int
    ms_per_image: float
    data: RealData
    judge: Judge
    scores: ImageScores
    real: ImageScores
    fidelity: FidelityScores | None
    device: str
    versions: Mapping[str, str]
    command: str
    git_commit: str | None

    def save(self, path: Path) -> Path:
        """Write as JSON, atomically."""
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, json.dumps(dataclasses.asdict(self), indent=2) + "\n")
        return path

    @classmethod
    def load(cls, path: Path) -> ImageResult:
        """Read what :meth:`save` wrote.

        Raises:
            ConfigError: no such file, not JSON, or not such a result; names the file.
        """
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            return from_mapping(cls, content)
        except (OSError, ValueError) as error:
            raise ConfigError(
                f"{path} cannot be read as a result of cmpolicy image eval: {error}"
            ) from error


def origin(device: str, command: str) -> dict[str, Any]:
    """The fields of a result that say where it comes from."""
    return {
        "device": device,
        "versions": versions(_DISTRIBUTIONS),
        "command": command,
        "git_commit": git_commit(),
    }


def results_table(results: Sequence[ImageResult]) -> str:
    """A Markdown table: a line per result, and one per data set for its own test images."""
    rows: list[list[str]] = []
    real: dict[tuple[object, ...], list[str]] = {}
    for result in results:
        rows.append(
            [
                result.model,
                str(result.nfe),
                *_cells(result.scores),
                "" if result.fidelity is None else f"{result.fidelity.fid:.2f}",
                "" if result.fidelity is None else f"{result.fidelity.kid:.4f}",
                f"{result.ms_per_image:.2f}",
            ]
        )
        mark = (result.data.sha256, result.judge.features, result.real.n)
        name = f"real test images of {result.data.source}"
        real[mark] = [name, "", *_cells(result.real), "", "", ""]
    rows += real.values()
    kept = [i for i in range(len(_COLUMNS)) if any(row[i] for row in rows)]
    head, *rows = ([row[i] for i in kept] for row in (_COLUMNS, *rows))
    return aligned(head, rows, left=len(head))


def explanation(results: Sequence[ImageResult]) -> str:
    """What the columns of the table mean, with the figures of the judge."""
    seen = dict.fromkeys((r.judge, r.data.source, r.scores.n_reference) for r in results)
    lines = []
    for judge, source, n_reference in seen:
        lines.append(
            f"Data: {source}. Recognised by a classifier that was trained on the real training "
            f"images and is itself right on {judge.accuracy:.2%} of {judge.n_test} real test "
            f"images. Feature distance (Frechet), precision and recall: {judge.features}, against "
            f"{n_reference} training images; this is not FID and compares only with numbers of the "
            "same features and set sizes."
        )
    lines.append(
        "Variety: mean pixel distance of two images of a class over the same of training images. "
        "Copy ratio: median pixel distance to the nearest training image over that of test images "
        "(near 0: copies)."
    )
    return "\n\n".join(lines)


def _cells(scores: ImageScores) -> list[str]:
    low, high = wilson_interval(scores.recognised, scores.n)
    return [
        f"{scores.recognised / scores.n:.2%} ({low:.2%}-{high:.2%}, n={scores.n})",
        f"{scores.feature_distance:.3f}",
        f"{scores.precision:.3f}",
        f"{scores.recall:.3f}",
        f"{scores.diversity:.2f} ({scores.diversity_lowest:.2f})",
        f"{scores.copy_ratio:.2f}",
    ]
