"""``cmpolicy eval``: score a policy under a protocol, or compare results that are there."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from cmpolicy.cli.parse import describe, read
from cmpolicy.experiment.evaluate import EvalSettings, report, score
from cmpolicy_eval.report import difference_table, runs_table, table, write_report

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
        pool: results of one name are training runs of one recipe: they are averaged, with intervals
            over runs and episodes. Name them alike by name= when they are scored.
    """

    results: tuple[str, ...]
    out: str = "outputs/report"
    pool: bool = False


def help_text(words: Sequence[str]) -> str:
    """All settings with their meaning."""
    return describe(EvalSettings, _HEADER)


def run(words: Sequence[str]) -> int:
    """Score as the words say; the exit status."""
    if words and words[0] == "report":
        compared = read(ReportSettings, words[1:])
        pool = compared.pool
        results, written = report(compared.results, compared.out, pool=pool)
    else:
        settings, pool = read(EvalSettings, words), False
        results = score(settings, command=shlex.join(["cmpolicy", "eval", *words]))
        out = Path(settings.out).expanduser()
        written = [*write_report(results, out), *([out / "videos"] if settings.videos else [])]
    print(table(results))
    for more in (runs_table(results) if pool else "", difference_table(results, pool=pool)):
        if more:
            print(f"\n{more}")
    print("\n" + "\n".join(f"  {path}" for path in written))
    return 0
