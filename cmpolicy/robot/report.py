"""What a run of a control loop did."""

from __future__ import annotations

import math
from array import array
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

COMPLETED = "completed"
"""``stopped_by`` of a run that took all its ticks."""

_SHORTEST = 1e-6
_LONGEST = 1e3
_RATIO = 1.01
_SCALE = 1 / math.log(_RATIO)
_BINS = math.ceil(math.log(_LONGEST / _SHORTEST) * _SCALE) + 1


@dataclass(frozen=True)
class Quantiles:
    """Of durations in milliseconds; p50 and p99 to 1 %, ``max`` exact; nan where there are none."""

    count: int
    p50: float
    p99: float
    max: float


class Histogram:
    """Counts of durations in bins of 1 % width, from 1 µs to 1000 s."""

    def __init__(self) -> None:
        self._counts = array("q", bytes(8 * _BINS))
        self._total = 0
        self._max = 0.0

    def add(self, seconds: float) -> None:
        """Count one duration; negative ones count as 0."""
        index = 0
        if seconds > _SHORTEST:
            index = min(_BINS - 1, int(math.log(seconds / _SHORTEST) * _SCALE) + 1)
        self._counts[index] += 1
        self._total += 1
        self._max = max(self._max, seconds)

    def quantiles(self) -> Quantiles:
        """In milliseconds."""
        if self._total == 0:
            return Quantiles(0, math.nan, math.nan, math.nan)
        return Quantiles(
            self._total, self._quantile(0.5) * 1e3, self._quantile(0.99) * 1e3, self._max * 1e3
        )

    def _quantile(self, share: float) -> float:
        """Upper edge of the bin that holds it, but no more than the largest value."""
        wanted = math.ceil(share * self._total)
        seen = 0
        for index, count in enumerate(self._counts):
            seen += count
            if seen >= wanted:
                return min(self._max, _SHORTEST * _RATIO**index)
        return self._max


@dataclass(frozen=True)
class LoopReport:
    """Counts and times of one run; ``str`` is a table of them.

    Attributes:
        hz: ticks per second.
        schedule: ``sync`` or ``async``.
        ticks: that should have run: until the end, or until the run was stopped.
        missed: of these, how many got no action in their time (skipped, or the robot's own calls
            or a synchronous inference took longer than a tick).
        seconds: from the first tick to the end.
        jitter: how late the ticks that ran began, ms.
        latency: calls of the policy, ms.
        plans: that arrived.
        stale_actions: dropped, because a plan arrived after their ticks.
        seams: plans blended into their predecessor.
        waited: ticks before the first plan was there.
        held: ticks on which the robot was held for want of a usable action; ``interventions`` says
            why.
        interventions: of the safety layer, by kind.
        stopped_by: ``completed``, or why the run ended before.
    """

    hz: float
    schedule: str
    ticks: int
    missed: int
    seconds: float
    jitter: Quantiles
    latency: Quantiles
    plans: int
    stale_actions: int
    seams: int
    waited: int
    held: int
    interventions: Mapping[str, int]
    stopped_by: str

    @property
    def missed_share(self) -> float:
        """Missed ticks out of all, in [0, 1]."""
        return self.missed / self.ticks if self.ticks else 0.0

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        return asdict(self) | {"interventions": dict(self.interventions)}

    def __str__(self) -> str:
        kinds = ", ".join(f"{kind} {n}" for kind, n in self.interventions.items() if n) or "none"
        missed = f"{self.missed} ({100 * self.missed_share:.2f} %)"
        rows = [
            ("loop", f"{self.schedule}, {self.hz:g} Hz, {self.seconds:.1f} s"),
            ("ticks", f"{self.ticks}, missed {missed}, waited {self.waited}, held {self.held}"),
            ("jitter", f"{_times(self.jitter)}"),
            ("inference", f"{_times(self.latency)}"),
            (
                "plans",
                f"{self.plans}, {self.seams} seams blended, {self.stale_actions} stale actions "
                "dropped",
            ),
            ("interventions", kinds),
            ("stopped by", self.stopped_by),
        ]
        return "\n".join(f"{name:<15}{value}" for name, value in rows)


def _times(q: Quantiles) -> str:
    if q.count == 0:
        return "none"
    return f"p50 {q.p50:.2f} ms, p99 {q.p99:.2f} ms, max {q.max:.2f} ms"
