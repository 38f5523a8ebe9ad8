"""Which claims hold: evidence and verdict of each, computed from the results by a stated rule."""

from __future__ import annotations

from cmpolicy.study.claims_consistency import ALARM, CONSISTENCY
from cmpolicy.study.claims_distillation import DISTILLATION
from cmpolicy.study.results import Results
from cmpolicy.study.verdicts import Claim


def all_claims(results: Results) -> list[Claim]:
    """The claims table."""
    return [claim(results) for claim in (*CONSISTENCY, *DISTILLATION, *ALARM)]
