"""What a run of a control loop did."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from cmpolicy.robot.stats import Quantiles

COMPLETED = "completed"
"""``stopped_by`` of a run that took all its ticks."""


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
