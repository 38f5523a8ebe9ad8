"""``cmpolicy image``: train a one-step image generator, sample it, score it."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from pathlib import Path

from cmpolicy.cli.parse import Composition, describe, parse, read
from cmpolicy.experiment.image.config import ImageTrainConfig
from cmpolicy.schema import ConfigError, from_mapping

_PACKAGE = "cmpolicy_conf.image"
_HEADER = """\
usage: cmpolicy image train [dataset=...] [preset=...] [objective=...] [net=...] [key=value ...]
       cmpolicy image train resume=outputs/<run> [examples=...]
       cmpolicy image sample model=outputs/<run>/model [key=value ...]
       cmpolicy image eval model=outputs/<run>/model [dataset=...] [key=value ...]
       cmpolicy image eval report results=[a.json,b.json] [out=outputs/image-report]

Train a class-conditional one-step image generator from scratch, make images with it, score it.
`cmpolicy image train --help`, and so on, list the settings."""
_COMMANDS = ("train", "sample", "eval")


def help_text(words: Sequence[str]) -> str:
    """Of the command among the words, or of all."""
    if not words or words[0] not in _COMMANDS:
        return _HEADER
    if words[0] == "train":
        return _training().help(_HEADER, words[1:])
    if words[0] == "sample":
        from cmpolicy.experiment.image.sampling import SampleSettings

        return describe(SampleSettings, _HEADER)
    from cmpolicy.experiment.image.evaluate import ImageEvalSettings

    return describe(ImageEvalSettings, _HEADER)


def run(words: Sequence[str]) -> int:
    """Do as the words say; the exit status."""
    if not words or words[0] not in _COMMANDS:
        given = f"unknown command {words[0]!r}." if words else "which command?"
        raise ConfigError(f"{given} Choose one of {', '.join(_COMMANDS)}")
    command, *rest = words
    if command == "train":
        return _train(rest)
    return _sample(rest) if command == "sample" else _evaluate(rest)


def _training() -> Composition:
    return Composition(ImageTrainConfig, package=_PACKAGE)


def _train(words: Sequence[str]) -> int:
    from cmpolicy.experiment.image.train import closing_text, resume_images, train_images
    from cmpolicy.experiment.run import CONFIG_FILE, read_yaml, stopped_text

    overrides = {override.key_or_group: override for override in parse(words)}
    command = f"cmpolicy image train {shlex.join(words)}".rstrip()
    if "resume" in overrides:
        changes = _training().values(overrides.values())
        run_dir = changes.pop("resume")
        result = resume_images(run_dir, changes, command=command)
        config = ImageTrainConfig.from_mapping(read_yaml(result.run_dir / CONFIG_FILE))
    else:
        settings = _training().compose(words)
        out = settings.pop("out")
        config = ImageTrainConfig.from_mapping(settings)
        result = train_images(config, out, command=command)
    if not result.is_main:
        return 0
    if not result.finished:
        print(stopped_text(result, "image train", config.examples))
        return 128 + (result.end.signum or 0)
    print(closing_text(result, config))
    return 0


def _sample(words: Sequence[str]) -> int:
    from cmpolicy.experiment.image.sampling import SampleSettings, sample_images

    settings = read(SampleSettings, words)
    written, rate = sample_images(settings)
    print(f"{rate:.2f} ms per image in batches of {settings.batch_size}")
    print("\n".join(f"  {path}" for path in written))
    return 0


def _evaluate(words: Sequence[str]) -> int:
    from cmpolicy.cli.eval import ReportSettings
    from cmpolicy.experiment.image.evaluate import (
        ImageEvalSettings,
        evaluate_images,
        write_image_report,
    )
    from cmpolicy.experiment.image.results import ImageResult, explanation, results_table

    if words and words[0] == "report":
        compared = read(ReportSettings, words[1:])
        results = [ImageResult.load(Path(path).expanduser()) for path in compared.results]
        written = write_image_report(results, Path(compared.out).expanduser())
    else:
        composition = Composition(
            ImageEvalSettings,
            config_name="eval",
            package=_PACKAGE,
            extra={},
            text=("model", "name", "inception", "out", "dataset.path"),
        )
        settings = from_mapping(ImageEvalSettings, composition.compose(words))
        command = shlex.join(["cmpolicy", "image", "eval", *words])
        results, written = evaluate_images(settings, command=command)
    print(f"{results_table(results)}\n\n{explanation(results)}\n")
    print("\n".join(f"  {path}" for path in written))
    return 0
