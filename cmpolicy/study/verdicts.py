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


def below(interval: Interval, bound: float) -> Verdict:
    """Supported where the whole interval is below the bound, refuted where it is above it."""
    if interval.high < bound:
        return "supported"
    return "refuted" if interval.low > bound else "unclear"


def failures(results: Results, objectives: Sequence[str]) -> tuple[int, int]:
    """How many runs from scratch of some objectives do not end healthy, and of how many."""
    ends = [o for name in objectives for run in results.from_scratch(name) for o in run.outcomes()]
    return sum(end != "healthy" for end in ends), len(ends)


def failure_claim(
    results: Results, first: Sequence[str], name: str, claim: str, needed: str
) -> Claim:
    """A claim that some objectives fail more often than iSD."""
    theirs = share_interval(*failures(results, first))
    isd = share_interval(*failures(results, ["isd"]))
    return Claim(
        name,
        claim,
        f"runs that fail: {'/'.join(first)} {theirs}, isd {isd}",
        above(theirs, isd.high, max(isd.low, 0.1)),
        "supported: the interval of the share of failed runs (diverged, collapsed or wrong) lies "
        "above iSD's; refuted: it lies below iSD's, or below .1",
        needed,
        "outcomes",
    )
