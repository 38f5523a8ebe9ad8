"""``cmpolicy image eval``: score an image model, or compare results that are there."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from cmpolicy.experiment.image.results import (
    ImageResult,
    Judge,
    RealData,
    explanation,
    origin,
    results_table,
)
from cmpolicy.experiment.image.sampling import (
    Device,
    MadeImages,
    draw_paths,
    make_images,
    open_model,
    spread_over,
)
from cmpolicy.experiment.run import CONFIG_FILE, read_yaml
from cmpolicy.files import put_aside
from cmpolicy.flow.sampler import SamplerKind
from cmpolicy.image.datasets import ImageData, ImageDataConfig, load_images, skipped_text
from cmpolicy.image.metrics import (
    ClassifierFeatures,
    ContentCache,
    EfficientNetFeatures,
    ImageScorer,
    check_test_part,
    real_classifier,
)
from cmpolicy.image.metrics.diversity import nearest_neighbours
from cmpolicy.image.metrics.features import ExtractorName
from cmpolicy.image.metrics.fidelity import fidelity_scores, inception_weights
from cmpolicy.image.pictures import neighbours_picture, samples_picture, save_picture
from cmpolicy.image.pipeline import ConsistencyImagePipeline
from cmpolicy.schema import ConfigError, at_least, each_once, from_mapping
from cmpolicy.training.device import describe_device
from cmpolicy_data.catalog import cache_dir, data_dir
from cmpolicy_eval.progress import progress_bar
from cmpolicy_eval.result import write_atomically

_NEIGHBOURS, _NEIGHBOUR_ROWS, _SHOWN_PER_CLASS = 5, 2, 10


@dataclass(frozen=True, kw_only=True)
class ImageEvalSettings:
    """How an image model is scored.

    Args:
        model: folder of a trained model, or of the run that trained it.
        name: label in tables and files; null: the model as given.
        nfe: network evaluations per image, one result each; null: the model's own number.
        samples: images made, evenly over the classes.
        seed: image i of class k depends on (seed, k, i) alone.
        sampler: flow_map or diagonal; null: the model's own.
        batch_size: images per call of the network.
        device: auto, cpu or cuda.
        features: classifier (trained on the real data) or efficientnet (trained on ImageNet).
        fid: FID and KID by torch-fidelity, which needs its Inception weights.
        inception: their file; null: where torch-fidelity puts it.
        pictures: samples and nearest training images.
        out: folder of result_nfe<n>.json, report.md and pictures.
        dataset: the real images; null: what the model was trained on.
    """

    model: str
    name: str | None = None
    nfe: tuple[int, ...] | None = None
    samples: int = 2000
    seed: int = 0
    sampler: SamplerKind | None = None
    batch_size: int = 250
    device: Device = "auto"
    features: ExtractorName = "classifier"
    fid: bool = False
    inception: str | None = None
    pictures: bool = True
    out: str = "outputs/image-eval"
    dataset: ImageDataConfig | None = None

    def __post_init__(self) -> None:
        if self.nfe is not None:
            each_once("nfe", self.nfe, 1)
        for key in ("samples", "batch_size"):
            at_least(key, getattr(self, key), 1)
        at_least("seed", self.seed, 0)
        if self.inception is not None and not self.fid:
            raise ConfigError(f"inception={self.inception} is for fid=true; give that, too")


def evaluate_images(
    config: ImageEvalSettings, *, command: str = "evaluate_images"
) -> tuple[list[ImageResult], list[Path]]:
    """Score an image model; the results, and the files that were written.

    Raises:
        ConfigError: settings that cannot be, or data that does not fit the model.
        ValueError: too few held-out images to score against, or copies among them.
        ImageModelError, OSError: the model or the data cannot be read.
    """
    weights = inception_weights(config.inception) if config.fid else None
    pipe = open_model(config.model, config.device)
    data = open_data(config.dataset or trained_on(config.model, pipe), pipe)
    if config.samples < 2 * data.n_classes:
        raise ConfigError(
            f"samples={config.samples} is too few: scores need 2 images of each of "
            f"{data.n_classes} classes"
        )
    check_test_part(data)
    folder = cache_dir() / "images"
    scorer = build_scorer(config.features, data, ContentCache(folder), pipe.device)
    real = scorer.score_real(config.samples)
    out = Path(config.out).expanduser()
    labels = spread_over(config.samples, range(data.n_classes))
    results: list[ImageResult] = []
    pictures: list[Path] = []
    for nfe in config.nfe or (pipe.nfe,):
        made = make_images(
            pipe,
            labels,
            nfe=nfe,
            seed=config.seed,
            sampler=config.sampler,
            batch_size=config.batch_size,
        )
        fidelity = None
        if weights is not None:
            fidelity = fidelity_scores(
                data.train, made.images, weights, device=pipe.device, cache_dir=folder
            )
        result = ImageResult(
            model=config.name or config.model,
            nfe=nfe,
            sampler=config.sampler or pipe.sampler,
            seed=config.seed,
            batch_size=config.batch_size,
            ms_per_image=round(1000 * made.seconds / len(labels), 4),
            data=_described(data),
            judge=_judge(scorer),
            scores=scorer.score(made.images, made.labels),
            real=real,
            fidelity=fidelity,
            **origin(describe_device(pipe.device), command),
        )
        file = out / f"result_nfe{nfe}.json"
        if file.is_file() and not _is_alike(file, result):
            put_aside(file)
        result.save(file)
        results.append(result)
        if config.pictures:
            pictures += _draw(made, data, nfe, config.seed, out)
    if config.pictures:
        shown = range(min(data.n_classes, 20))
        pictures.append(
            draw_paths(pipe, shown, seed=config.seed, sampler=config.sampler, out=out / "paths.png")
        )
    return results, write_image_report(results, out, pictures)


def _is_alike(file: Path, result: ImageResult) -> bool:
    try:
        return ImageResult.load(file).scores == result.scores
    except ValueError:
        return False


def trained_on(model: str, pipe: ConsistencyImagePipeline) -> ImageDataConfig:
    """The data that a model was trained on.

    A model keeps no path, since it may be handed on; while it lies in the folder of its run, the
    run's settings still know it.

    Raises:
        ConfigError: the model does not say, or not where.
    """
    own = pipe.metadata.get("dataset")
    if not isinstance(own, dict):
        raise ConfigError("the model does not say what it was trained on; give dataset=<name>")
    folder = Path(model).expanduser()
    for run in (folder, folder.parent):
        if (run / CONFIG_FILE).is_file():
            settings = read_yaml(run / CONFIG_FILE).get("dataset")
            if isinstance(settings, dict) and {**settings, "path": None} == {**own, "path": None}:
                own = settings
                break
    try:
        return from_mapping(ImageDataConfig, own, where="dataset")
    except ConfigError as error:  # such as a folder without its path
        name = own.get("name")
        raise ConfigError(
            f"the model was trained on dataset={name} and says too little of it ({error}); give "
            f"dataset={name} dataset.path=<...>"
        ) from error


def open_data(config: ImageDataConfig, pipe: ConsistencyImagePipeline) -> ImageData:
    """The data of ``config``, if it fits the model.

    Raises:
        ConfigError: the data cannot be read, or has other classes, sizes or colours.
    """
    try:
        data = load_images(config, download_dir=data_dir())
    except ValueError as error:
        raise ConfigError(f"dataset={config.name}: {error}") from error
    for what, theirs, ours in (
        ("image_size", data.image_size, pipe.image_size),
        ("channels", data.channels, pipe.channels),
        ("classes", data.class_names, pipe.class_names),
    ):
        if theirs != ours:
            raise ConfigError(
                f"{data.source} does not fit the model: its {what} {_are(what)} {theirs}, the "
                f"model's {ours}; give the data set that the model was trained on"
            )
    if data.skipped:
        print(skipped_text(data))
    return data


def build_scorer(
    features: ExtractorName,
    data: ImageData,
    cache: ContentCache,
    device: torch.device,
) -> ImageScorer:
    """Classifier and features; the classifier is trained now if the cache has none."""
    with progress_bar(None, unit="image", desc="classifier of the real images") as bar:

        def show(done: int, total: int) -> None:
            bar.total = total
            bar.update(done - bar.n)

        classifier = real_classifier(data, cache=cache, device=device, progress=show)
    extractor = (
        ClassifierFeatures(classifier)
        if features == "classifier"
        else EfficientNetFeatures(device=device)
    )
    return ImageScorer(data, classifier, extractor, cache)


def _draw(made: MadeImages, data: ImageData, nfe: int, seed: int, out: Path) -> list[Path]:
    how = f"{nfe} network evaluation{'s' * (nfe > 1)} per image, seed {seed}"
    order = {label: np.flatnonzero(made.labels == label) for label in np.unique(made.labels)}
    rows = np.concatenate([rows[:_SHOWN_PER_CLASS] for rows in order.values()])
    samples = samples_picture(made.images[rows], made.labels[rows], data.class_names, how)
    rows = np.concatenate([rows[:_NEIGHBOUR_ROWS] for rows in list(order.values())[:10]])
    names = [data.class_names[label] for label in made.labels[rows]]
    nearest = nearest_neighbours(
        made.images[rows], data.train.images, min(_NEIGHBOURS, len(data.train))
    )
    near = neighbours_picture(
        made.images[rows], nearest, data.train, names, data.class_names, f"{how}; pixel distance"
    )
    return [
        save_picture(samples, out / f"samples_nfe{nfe}.png"),
        save_picture(near, out / f"nearest_nfe{nfe}.png"),
    ]


def write_image_report(
    results: Sequence[ImageResult], out: Path, pictures: Sequence[Path] = ()
) -> list[Path]:
    """``report.md`` with the table of the results and the pictures; what is there now."""
    if not results:
        raise ConfigError("results is empty; give result files: results=[a.json,b.json]")
    shown = "".join(f"![{path.stem}]({path.name})\n\n" for path in pictures)
    text = f"# Image models\n\n{results_table(results)}\n\n{explanation(results)}\n\n{shown}"
    out.mkdir(parents=True, exist_ok=True)
    write_atomically(out / "report.md", text.rstrip() + "\n")
    return [out / "report.md", *pictures]


def _described(data: ImageData) -> RealData:
    return RealData(
        source=data.source,
        sha256=(data.train.sha256, data.test.sha256),
        n_train=len(data.train),
        n_test=len(data.test),
        class_names=data.class_names,
    )


def _judge(scorer: ImageScorer) -> Judge:
    classifier = scorer.classifier
    return Judge(
        accuracy=classifier.accuracy, n_test=classifier.n_test, features=scorer.extractor.title
    )


def _are(what: str) -> str:
    return "is" if what == "image_size" else "are"
