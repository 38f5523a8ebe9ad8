"""``cmpolicy image eval``: score an image model, or compare results that are there."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from cmpolicy.bench.report import describe_device
from cmpolicy.cli.image_sample import CONFIG_PACKAGE, help_text
from cmpolicy.cli.parse import compose_settings, read_words
from cmpolicy.cli.run_command import guarded
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
from cmpolicy.flow.sampler import SamplerKind
from cmpolicy.image.datasets import ImageData, ImageDataConfig, load_images
from cmpolicy.image.metrics import (
    ClassifierFeatures,
    ContentCache,
    EfficientNetFeatures,
    ImageScorer,
    real_classifier,
)
from cmpolicy.image.metrics.diversity import nearest_neighbours
from cmpolicy.image.metrics.features import ExtractorName
from cmpolicy.image.metrics.fidelity import fidelity_scores, inception_weights
from cmpolicy.image.pictures import neighbours_picture, samples_picture, save_picture
from cmpolicy.image.pipeline import ConsistencyImagePipeline
from cmpolicy.schema import ConfigError, from_mapping, unknown_key_message
from cmpolicy_data.catalog import cache_dir, data_dir
from cmpolicy_eval.result import write_atomically

PROGRAM = "cmpolicy image eval"
_HEADER = """Score a trained image model, or compare result files.

cmpolicy image eval model=outputs/<run>/model [key=value ...]
cmpolicy image eval report results=[a.json,b.json] [out=outputs/image-report]

Settings and their values:
"""
_NEIGHBOURS, _NEIGHBOUR_ROWS, _SHOWN_PER_CLASS = 5, 2, 10


@dataclass(frozen=True, kw_only=True)
class ImageEvalConfig:
    """Settings; ``image/eval.yaml`` in ``cmpolicy_conf`` says what each means."""

    model: str
    name: str | None
    nfe: tuple[int, ...]
    samples: int
    seed: int
    sampler: SamplerKind | None
    batch_size: int
    device: Device
    features: ExtractorName
    fid: bool
    inception: str | None
    pictures: bool
    out: str
    dataset: ImageDataConfig | None = None

    def __post_init__(self) -> None:
        if not self.nfe or min(self.nfe) < 1 or len(set(self.nfe)) != len(self.nfe):
            raise ConfigError(
                f"nfe must hold numbers of at least 1, each once, got {list(self.nfe)}"
            )
        for key in ("samples", "batch_size"):
            if getattr(self, key) < 1:
                raise ConfigError(f"{key} must be at least 1, got {getattr(self, key)}")
        if self.seed < 0:
            raise ConfigError(f"seed must not be negative, got {self.seed}")
        if self.inception is not None and not self.fid:
            raise ConfigError(f"inception={self.inception} is for fid=true; give that, too")


@dataclass(frozen=True, kw_only=True)
class ReportConfig:
    """Settings of ``report``: result files, and the folder of the report."""

    results: tuple[str, ...]
    out: str = "outputs/image-report"


def main(words: Sequence[str]) -> int:
    """Entry point of ``cmpolicy image eval``; returns the exit status."""
    if not words or {"-h", "--help"} & set(words):
        print(_HEADER + help_text("eval"), end="")
        return 0 if words else 2
    if words[0] == "report":
        return guarded(lambda: _report(words[1:]), PROGRAM)
    return guarded(lambda: _evaluate(words), PROGRAM)


def _report(words: Sequence[str]) -> int:
    settings = read_words(words)
    known = [field.name for field in fields(ReportConfig)]
    for key in settings:
        if key not in known:
            raise ConfigError(unknown_key_message(key, known))
    config = from_mapping(ReportConfig, settings)
    if not config.results:
        raise ConfigError("results is empty; give result files: results=[a.json,b.json]")
    results = [ImageResult.load(Path(path).expanduser()) for path in config.results]
    return _write_report(results, Path(config.out).expanduser(), [])


def _evaluate(words: Sequence[str]) -> int:
    settings = compose_settings("eval", words, package=CONFIG_PACKAGE)
    if isinstance(settings["nfe"], int):
        settings["nfe"] = [settings["nfe"]]
    config = from_mapping(ImageEvalConfig, settings)
    weights = inception_weights(config.inception) if config.fid else None
    pipe = open_model(config.model, config.device)
    data = open_data(config.dataset or trained_on(config.model, pipe), pipe)
    if config.samples < 2 * data.n_classes:
        raise ConfigError(
            f"samples={config.samples} is too few: scores need 2 images of each of "
            f"{data.n_classes} classes"
        )
    folder = cache_dir() / "images"
    scorer = build_scorer(config.features, data, ContentCache(folder), pipe.device)
    real = scorer.score_real(config.samples)
    out = Path(config.out).expanduser()
    labels = spread_over(config.samples, range(data.n_classes))
    results: list[ImageResult] = []
    pictures: list[Path] = []
    command = shlex.join(["cmpolicy", "image", "eval", *words])
    for nfe in config.nfe:
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
        result.save(out / f"result_nfe{nfe}.json")
        results.append(result)
        if config.pictures:
            pictures += _draw(made, data, nfe, config.seed, out)
    if config.pictures:
        shown = range(min(data.n_classes, 20))
        pictures.append(
            draw_paths(pipe, shown, seed=config.seed, sampler=config.sampler, out=out / "paths.png")
        )
    return _write_report(results, out, pictures)


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
        print(f"left out {len(data.skipped)} broken files: {', '.join(data.skipped[:3])} ...")
    return data


def build_scorer(
    features: ExtractorName,
    data: ImageData,
    cache: ContentCache,
    device: torch.device,
) -> ImageScorer:
    """Classifier and features; the classifier is trained now if the cache has none."""
    with tqdm(desc="classifier of the real images", unit="image", disable=None) as bar:

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


def _write_report(results: Sequence[ImageResult], out: Path, pictures: Sequence[Path]) -> int:
    shown = "".join(f"![{path.stem}]({path.name})\n\n" for path in pictures)
    text = f"# Image models\n\n{results_table(results)}\n\n{explanation(results)}\n\n{shown}"
    out.mkdir(parents=True, exist_ok=True)
    write_atomically(out / "report.md", text.rstrip() + "\n")
    print(f"{results_table(results)}\n\n{explanation(results)}\n")
    print("\n".join(f"  {path}" for path in (out / "report.md", *pictures)))
    return 0


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
