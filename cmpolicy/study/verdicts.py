"""What a claim is, and the rules by which its verdict follows from intervals."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from cmpolicy.study.results import Interval, Results, share_interval

Verdict = Literal["supported", "refuted", "unclear"]


@dataclass(frozen=True)
class Claim:
    """One line of the claims table.

    ``rule`` says when the claim is supported and when refuted; ``needed`` what would decide a claim
    that is unclear, or overturn the verdict of one that is not. ``figure`` shows the evidence.
    """

    name: str
    claim: str
    evidence: str
    verdict: Verdict
    rule: str
    needed: str
    figure: str


def above(interval: Interval, supported: float, refuted: float) -> Verdict:
    """Supported where the whole interval is above one bound, refuted where it is below the other.

    An interval without ends decides nothing.
    """
    if interval.low > supported:
        return "supported"
    return "refuted" if interval.high < refuted else "unclear"


def failures(results: Results, objectives: Sequence[str]) -> tuple[int, int]:
    """How many runs from scratch of some objectives do not end healthy, and of how many."""
    ends = [o for name in objectives for run in results.from_scratch(name) for o in run.outcomes()]
    return sum(end != "healthy" for end in ends), len(ends)


def compare_failures(results: Results, first: Sequence[str]) -> tuple[str, Verdict]:
    """Share of failed runs of some objectives against iSD's."""
    theirs = share_interval(*failures(results, first))
    isd = share_interval(*failures(results, ["isd"]))
    verdict: Verdict = "unclear"
    if theirs.low > isd.high:
        verdict = "supported"
    elif theirs.high < isd.low or theirs.high < 0.1:
        verdict = "refuted"
    return f"runs that fail: {'/'.join(first)} {theirs}, isd {isd}", verdict


#: Of claims on how runs end.
FAIL_RULE = (
    "supported: the interval of the share of failed runs (diverged, collapsed or wrong) lies above "
    "iSD's; refuted: it lies below iSD's, or below .1"
)
