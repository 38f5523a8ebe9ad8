"""``cmpolicy export``: a policy bundle as one file, for onnxruntime or for torch alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from cmpolicy.cli.parse import describe, read
from cmpolicy.spec import check_warm_start

_HEADER = """\
usage: cmpolicy export policy=BUNDLE out=FILE.onnx|FILE.pt2 [key=value ...]

Write the whole map from observations and noise to actions as one file: normalisation inside, any
batch size, all evaluations unrolled. The file is compared with the policy before it is moved into
place.

  cmpolicy export policy=pusht out=pusht.onnx               # runs with numpy and onnxruntime alone
  cmpolicy export policy=outputs/my-run/policy out=my.pt2   # runs with torch alone"""


@dataclass(frozen=True)
class ExportSettings:
    """Of ``export``.

    Args:
        policy: bundle directory, bundled name or hub id.
        out: the file to write.
        format: onnx or pt2; null: told by the end of `out`.
        nfe: network evaluations per plan; null: the policy's own.
        warm_start: time in (0, 1] at which plans after the first start from the one before, for
            which the file then has two inputs; null: the policy's own, if it has one.
    """

    policy: str
    out: str
    format: Literal["onnx", "pt2"] | None = None
    nfe: int | None = None
    warm_start: float | None = None

    def __post_init__(self) -> None:
        check_warm_start(self.warm_start)


def help_text(words: Sequence[str]) -> str:
    """All settings."""
    return describe(ExportSettings, _HEADER)


def run(words: Sequence[str]) -> int:
    """Export; the exit status."""
    print(export(read(ExportSettings, words)))
    return 0


def export(settings: ExportSettings) -> str:
    """Write the file; what to say of it.

    Raises:
        ExportError, BundleError, ImportError, OSError: see ``export_policy`` and ``read_bundle``.
    """
    from cmpolicy.experiment.protocols import own_protocol
    from cmpolicy.export.write import check_request, export_policy
    from cmpolicy.policy.bundle import read_hashes
    from cmpolicy.policy.policy import ConsistencyPolicy

    out = Path(settings.out).expanduser()
    format_ = settings.format or ("pt2" if out.suffix == ".pt2" else "onnx")
    check_request(out, format_, settings.nfe)
    policy = ConsistencyPolicy.from_pretrained(settings.policy)
    if settings.warm_start is not None:
        policy.warm_start = settings.warm_start
    written = export_policy(
        policy,
        out,
        format=format_,
        nfe=settings.nfe,
        bundle_sha256=read_hashes(settings.policy),
    )
    nfe = policy.nfe if settings.nfe is None else settings.nfe
    if format_ == "pt2":
        usage = f"cmpolicy.export.pt2.Pt2Policy({settings.out!r}, trust=True)"
    elif own_protocol(policy.metadata) is None:  # of a robot: there is no simulator to score it in
        usage = f"cmpolicy.OnnxPolicy({settings.out!r})"
    else:
        usage = f"cmpolicy eval policy={settings.out} nfe={nfe} out=outputs/exported"
    return (
        f"written to {written.path}: {written.size / 1e6:.1f} MB, differs from the policy by at "
        f"most {written.difference:.1e} of the normalised range\nnext: {usage}"
    )
