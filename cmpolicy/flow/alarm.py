"""One warning for a run whose map goes wrong, from the health metrics that it logs.

The bounds were chosen on ``cmpolicy study stability``, where the true map is known (its page shows
what each catches), and leave the bundled policies alone. The gradient norm is not among them: it
tells divergence, which the trainer stops at by itself, and little else.
"""

from __future__ import annotations

from collections.abc import Mapping

from cmpolicy.flow.sampler import SamplerKind, get_sampler

#: Samples given one observation vary less than all data together; some is the noise of a short run.
MAX_VARIANCE_RATIO = 1.5
#: Below this there is one answer for all noise; policies that need little of it have .01 to .05.
MIN_VARIANCE_RATIO = 1e-3
#: Two jumps that end so far from one, against its length.
MAX_SEMIGROUP = 0.3
#: Eulerian residual at t = 1 against the conditional velocity.
MAX_TANGENT_AT_1 = 0.8
#: Share of a run, and its examples, before which nothing is said: early maps recover.
ALARM_BEGIN, ALARM_EXAMPLES = 0.5, 20_000

_CURE = (
    "lower optim.lr or raise batch_size; if that does not help, train with objective=psd, or with "
    "a later objective.sd_begin"
)


def alarm_counts(examples: int, total: int) -> bool:
    """Whether a run of ``total`` examples has come far enough for an alarm to mean something."""
    return examples >= max(ALARM_BEGIN * total, ALARM_EXAMPLES)


def health_alarm(metrics: Mapping[str, float], kind: SamplerKind) -> str | None:
    """What is wrong with the map and which setting to change; None for a healthy one.

    Args:
        metrics: ``health_*`` of an evaluation, as logged; those that are missing say nothing.
        kind: how samples are made. Jumps are judged only where they are sampled with.
    """
    if not get_sampler(kind).is_random:  # one answer is what it is meant to give
        return None
    ratio = metrics.get("health_variance_ratio")
    if ratio is not None and not ratio <= MAX_VARIANCE_RATIO:  # a NaN is no good ratio either
        return (
            f"samples vary {ratio:.2g} times as much as the data (health_variance_ratio; at most "
            f"{MAX_VARIANCE_RATIO} is right): the map has not converged. To cure it, {_CURE}"
        )
    if ratio is not None and ratio < MIN_VARIANCE_RATIO:
        return (
            f"all noise gives nearly one sample (health_variance_ratio {ratio:.2g}, below "
            f"{MIN_VARIANCE_RATIO}): the map has collapsed, unless the data has one answer for "
            f"each observation. To cure it, {_CURE}"
        )
    if kind != "flow_map":
        return None
    for name, bound, what in (
        ("health_semigroup", MAX_SEMIGROUP, "two jumps do not end where one does"),
        ("health_tangent_at_1", MAX_TANGENT_AT_1, "the jump from noise is not that of its flow"),
    ):
        value = metrics.get(name)
        if value is not None and not value <= bound:
            return (
                f"{what} ({name} {value:.2g}, above {bound}): one evaluation will be off. To cure "
                f"it, train longer, {_CURE}; or sample with more evaluations, nfe=4"
            )
    return None
