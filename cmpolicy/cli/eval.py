"""``cmpolicy eval``: score a policy under a protocol, or compare results that are there."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from cmpolicy.cli.parse import describe, read
from cmpolicy.experiment.evaluate import EvalSettings, report, score
from cmpolicy_eval.report import difference_table, table, write_report
from cmpolicy_eval.result import Result

_HEADER = """\
usage: cmpolicy eval policy=outputs/<run>/policy|<name>|<file>.onnx [key=value ...]
       cmpolicy eval report results=[a.json,b.json] [out=outputs/report]

Score a policy in simulation, or compare result files."""


@dataclass(frozen=True, kw_only=True)
class ReportSettings:
    """Of ``eval report``.

    Args:
        results: result files.
        out: folder of the report.
    """

    results: tuple[str, ...]
    out: str = "outputs/report"


def help_text(words: Sequence[str]) -> str:
    """All settings with their meaning."""
    return describe(EvalSettings, _HEADER)


def run(words: Sequence[str]) -> int:
    """Score as the words say; the exit status."""
    if words and words[0] == "report":
        compared = read(ReportSettings, words[1:])
        results, written = report(compared.results, compared.out)
    else:
        settings = read(EvalSettings, words)
        results = score(settings, command=shlex.join(["cmpolicy", "eval", *words]))
        out = Path(settings.out).expanduser()
        written = [*write_report(results, out), *([out / "videos"] if settings.videos else [])]
    _show(results, written)
    return 0


def _show(results: Sequence[Result], written: Sequence[Path]) -> None:
    print(table(results))
    differences = difference_table(results)
    if differences:
        print(f"\n{differences}")
    print("\n" + "\n".join(f"  {path}" for path in written))
