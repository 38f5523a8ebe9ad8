"""``cmpolicy publish``: make the bundle to hand out from a trained one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from cmpolicy.cli.parse import describe, read
from cmpolicy.schema import at_least, positive
from cmpolicy.spec import check_warm_start
from cmpolicy_eval.report import difference_table, table
from cmpolicy_eval.result import Result

_HEADER = """\
usage: cmpolicy publish policy=BUNDLE out=BUNDLE [key=value ...]

Write the bundle to hand out: half the size, with its results in the model card and in results/.
`out` may be `policy` itself: a published bundle is scored and then completed:

  cmpolicy publish policy=outputs/my-run/policy out=mine weights=fp16
  cmpolicy eval policy=mine nfe=[1,2,4] out=outputs/mine
  cmpolicy publish policy=mine out=mine results=[outputs/mine/result_nfe1.json]"""
RESULTS = "results"


@dataclass(frozen=True)
class PublishSettings:
    """Of ``publish``.

    Args:
        policy: the trained bundle.
        out: the bundle to write.
        weights: precision of the stored weights, fp16 or fp32.
        noise_scale: the noise of a sample is multiplied by it; null: the policy's own. Choose it on
            tuning seeds.
        nfe: network evaluations that the bundle is deployed with; null: the policy's own.
        n_action_steps: actions executed before the next decision; null: as the policy was trained.
            Choose it on tuning seeds.
        warm_start: time in (0, 1] at which decisions after the first start from the plan before;
            null: the policy's own, if it has one; 1: none, every decision starts from noise.
        results: result files of `cmpolicy eval`.
    """

    policy: str
    out: str
    weights: Literal["fp16", "fp32"] = "fp16"
    noise_scale: float | None = None
    nfe: int | None = None
    n_action_steps: int | None = None
    warm_start: float | None = None
    results: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        positive("noise_scale", self.noise_scale)
        at_least("nfe", self.nfe, 1)
        at_least("n_action_steps", self.n_action_steps, 1)
        check_warm_start(self.warm_start)


def help_text(words: Sequence[str]) -> str:
    """All settings."""
    return describe(PublishSettings, _HEADER)


def run(words: Sequence[str]) -> int:
    """Publish; the exit status."""
    out = publish(read(PublishSettings, words))
    size = (out / "model.safetensors").stat().st_size
    print(f"published {out}: {size / 1e6:.1f} MB of weights")
    return 0


def publish(settings: PublishSettings) -> Path:
    """Write the bundle and return its folder.

    Raises:
        BundleError, ResultError: what is wrong with a bundle or a result file.
        SpecError: more action steps than the policy's horizon holds.
    """
    import torch

    from cmpolicy.experiment.model_card import model_card
    from cmpolicy.policy.bundle import BundleError
    from cmpolicy.policy.policy import ConsistencyPolicy

    results = {Path(path): Result.load(Path(path).expanduser()) for path in settings.results}
    policy = ConsistencyPolicy.from_pretrained(settings.policy)
    metadata = policy.metadata
    if settings.noise_scale is not None:
        policy.noise_scale = settings.noise_scale
    policy.nfe = settings.nfe or policy.nfe
    policy.n_action_steps = settings.n_action_steps or policy.n_action_steps
    if settings.warm_start is not None:
        policy.warm_start = None if settings.warm_start == 1 else settings.warm_start
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
    """``<folder>_<file>``, with more folders where that is not enough to tell them apart."""
    whole = [path.absolute().parts[1:] for path in paths]
    for n in range(2, max(map(len, whole), default=1) + 1):
        names = ["_".join(parts[-n:]) for parts in whole]
        if len(set(names)) == len(names):
            return names
    return [f"{i}_{path.name}" for i, path in enumerate(paths)]
