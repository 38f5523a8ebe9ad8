"""``cmpolicy export``: a policy bundle as one file, for onnxruntime or for torch alone.

Exit status: 0 written and checked; 2 bad settings or files, or a file that disagrees; 130 Ctrl-C.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from cmpolicy.cli.parse import read

_USAGE = """\
usage: cmpolicy export policy=BUNDLE out=FILE.onnx|FILE.pt2 [format=onnx|pt2] [nfe=N]

Write the whole map from observations and noise to actions as one file: normalisation inside, any
batch size, nfe network evaluations unrolled (the policy's own number unless given). The file is
compared with the policy before it is moved into place. `format` is told by the end of `out` where
it is not given.

  cmpolicy export policy=pusht format=onnx out=pusht.onnx   # runs with numpy and onnxruntime alone
  cmpolicy export policy=outputs/my-run/policy out=my.pt2   # runs with torch alone
"""


@dataclass(frozen=True)
class ExportSettings:
    """Settings of ``cmpolicy export``."""

    policy: str
    out: str
    format: Literal["onnx", "pt2"] | None = None
    nfe: int | None = None


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point of ``cmpolicy export``; returns the exit status."""
    words = list(sys.argv[1:] if argv is None else argv)
    if not words or {"-h", "--help"} & set(words):
        print(_USAGE, end="")
        return 0 if words else 2
    try:
        print(export(read(ExportSettings, words)))
    except (ValueError, OSError, ImportError) as error:  # bad input; a missing extra
        print(f"cmpolicy export: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("cmpolicy export: stopped, nothing was written", file=sys.stderr)
        return 130
    return 0


def export(settings: ExportSettings) -> str:
    """Write the file; what to say of it.

    Raises:
        ExportError, BundleError, ImportError, OSError: see ``export_policy`` and ``load_bundle``.
    """
    from cmpolicy.export.write import check_request, export_policy
    from cmpolicy.policy.bundle import read_hashes, read_metadata
    from cmpolicy.policy.policy import ConsistencyPolicy

    out = Path(settings.out).expanduser()
    format_ = settings.format or ("pt2" if out.suffix == ".pt2" else "onnx")
    check_request(out, format_, settings.nfe)
    policy = ConsistencyPolicy.from_pretrained(settings.policy)
    written = export_policy(
        policy,
        out,
        format=format_,
        nfe=settings.nfe,
        bundle_sha256=read_hashes(settings.policy),
        metadata=read_metadata(settings.policy),
    )
    nfe = policy.nfe if settings.nfe is None else settings.nfe
    usage = (
        f"cmpolicy eval policy={settings.out} nfe={nfe} out=outputs/exported"
        if format_ == "onnx"
        else f"cmpolicy.export.pt2.Pt2Policy({settings.out!r}, trust=True)"
    )
    return (
        f"written to {written.path}: {written.size / 1e6:.1f} MB, differs from the policy by at "
        f"most {written.difference:.1e} of the normalised range\nnext: {usage}"
    )


if __name__ == "__main__":
    sys.exit(main())
