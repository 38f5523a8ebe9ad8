"""``cmpolicy publish``: make the bundle to hand out from a trained one.

Stores the weights in half precision where asked, and writes results into the model card and beside
it, so that a policy travels with its numbers. Exit status: 0 well, 2 bad settings or files.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from cmpolicy.cli.parse import read
from cmpolicy.schema import ConfigError
from cmpolicy_eval.report import difference_table, table
from cmpolicy_eval.result import Result

_USAGE = """\
usage: cmpolicy publish policy=BUNDLE out=BUNDLE [weights=fp16|fp32] [noise_scale=0.8]
                        [results=[a.json,b.json]]

Write the bundle to hand out: weights in that precision, the noise of a sample multiplied by that
scale (not given: the policy's own; choose it on tuning seeds), and the results in its model card
and in results/. `out` may be `policy` itself: a published bundle is scored and then completed:

  cmpolicy publish policy=outputs/my-run/policy out=mine weights=fp16
  cmpolicy eval policy=mine nfe=[1,2,4] out=outputs/mine
  cmpolicy publish policy=mine out=mine results=[outputs/mine/result_nfe1.json]
"""
RESULTS = "results"


@dataclass(frozen=True)
class PublishSettings:
    """Settings of ``cmpolicy publish``."""

    policy: str
    out: str
    weights: Literal["fp16", "fp32"] = "fp16"
    noise_scale: float | None = None
    results: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.noise_scale is not None and not self.noise_scale > 0:
            raise ConfigError(f"noise_scale must be above 0, got {self.noise_scale}")


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point of ``cmpolicy publish``; returns the exit status."""
    words = list(sys.argv[1:] if argv is None else argv)
    if not words or {"-h", "--help"} & set(words):
        print(_USAGE, end="")
        return 0 if words else 2
    try:
        out = publish(read(PublishSettings, words))
    except (ValueError, OSError) as error:
        print(f"cmpolicy publish: {error}", file=sys.stderr)
        return 2
    size = (out / "model.safetensors").stat().st_size
    print(f"published {out}: {size / 1e6:.1f} MB of weights")
    return 0


def publish(settings: PublishSettings) -> Path:
    """Write the bundle and return its folder.

    Raises:
        BundleError, ResultError: what is wrong with a bundle or a result file.
    """
    import torch

    from cmpolicy.experiment.model_card import model_card
    from cmpolicy.policy.bundle import BundleError, read_metadata
    from cmpolicy.policy.policy import ConsistencyPolicy

    results = {Path(path): Result.load(Path(path).expanduser()) for path in settings.results}
    policy = ConsistencyPolicy.from_pretrained(settings.policy)
    metadata = read_metadata(settings.policy)
    if settings.noise_scale is not None:
        policy.noise_scale = settings.noise_scale
    if "config" not in metadata:
        raise BundleError(
            f"{settings.policy} does not say how it was trained; publish a bundle that "
            "cmpolicy train made"
        )
    out = Path(settings.out).expanduser()
    card = model_card(policy, metadata) + _results_section(list(results.values()))
    dtype = torch.float16 if settings.weights == "fp16" else torch.float32
    policy.save_pretrained(out, card=card, metadata=metadata, weights_dtype=dtype)
    names = _file_names(list(results))
    for (_, result), name in zip(results.items(), names, strict=True):
        result.save(out / RESULTS / name)
    return out


def _results_section(results: Sequence[Result]) -> str:
    if not results:
        return ""
    parts = ["## Results", table(results)]
    differences = difference_table(results)
    if differences:
        parts += ["Episode by episode, against the first row:", differences]
    parts.append(
        "Score: 95 % bootstrap interval. Success: 95 % Wilson interval. One training seed."
    )
    commands = "\n".join(dict.fromkeys(f"    {result.command}" for result in results))
    parts.append(f"Files: `{RESULTS}/`. Commands:\n\n{commands}")
    return "\n" + "\n\n".join(parts) + "\n"


def _file_names(paths: Sequence[Path]) -> list[str]:
    """``<folder>_<file>``: evaluations of different policies share their file names."""
    return [f"{path.absolute().parent.name}_{path.name}" for path in paths]


if __name__ == "__main__":
    sys.exit(main())
