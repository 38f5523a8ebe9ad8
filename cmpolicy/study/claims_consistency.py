"""Claims on consistency training: unstable, and with degenerate solutions."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from cmpolicy.study.alarm_table import alarm_samples
from cmpolicy.study.measure import COLLAPSED
from cmpolicy.study.probes import FAMILY
from cmpolicy.study.results import (
    Interval,
    Results,
    mean_interval,
    ratio_interval,
    share_interval,
)
from cmpolicy.study.targets import Array
from cmpolicy.study.verdicts import Claim, above, below, failure_claim


def _consistency(results: Results) -> Claim:
    return failure_claim(
        results,
        ["ct", "dct"],
        "consistency-unstable",
        "Consistency training from scratch is unstable.",
        "other networks and longer runs",
    )


def _degenerate(results: Results) -> Claim:
    found = results.of("family")[0].probe("family")[0][1]
    a = list(FAMILY)
    zero, one = (mean_interval(found["ct_loss"][a.index(v)]) for v in (0.0, 1.0))
    off = [i for i, v in enumerate(a) if v != 1.0]
    ct, isd = (np.abs(np.mean(np.array(found[f"{n}_slope"])[off], axis=1)) for n in ("ct", "isd"))
    worst = float((ct / isd).max())
    good = zero.high < one.low and worst < 0.02
    return Claim(
        "degenerate-exist",
        "Consistency training has degenerate solutions: constant maps are fixed points.",
        f"closed form, Gaussian: loss of ct at the constant map {zero}, at the truth {one}; its "
        f"gradient between them is at most {worst:.2g} of iSD's",
        "supported" if good else "refuted",
        "supported: ct's loss is lower at the constant map than at the truth, and its gradient "
        "along the family between them is below 2 % of iSD's everywhere; else refuted",
        "an error in the closed form: it needs no training",
        "family",
    )


def _from_constant(results: Results, names: Sequence[str], metric: str) -> Array:
    """At the end of runs from the constant map, (objectives and targets, rates, seeds)."""
    runs = [r for r in results.of("start", start="constant") if r.job["objective"] in names]
    return np.stack([run.final(metric) for run in runs])


def _stays(results: Results) -> Claim:
    rate = results.of("start")[0].rates[0]
    theirs = mean_interval(_from_constant(results, ["ct", "dct"], "variance")[:, 0])
    isd = mean_interval(_from_constant(results, ["isd"], "variance")[:, 0])
    return Claim(
        "degenerate-stay",
        "At a small learning rate, consistency training does not leave the constant map.",
        f"variance against the truth's at the end, learning rate {rate:g}, from the constant map: "
        f"ct/dct {theirs}, isd {isd}",
        below(theirs, COLLAPSED),
        f"supported: ct's and dct's variance ends below {COLLAPSED}; refuted: above",
        "longer runs; networks that hold the map exactly down to t = 0",
        "starts",
    )


def _escapes(results: Results) -> Claim:
    theirs = _from_constant(results, ["ct", "dct"], "error")
    isd = _from_constant(results, ["isd"], "error")
    ratio = ratio_interval(theirs, isd.mean(axis=0, keepdims=True))
    return Claim(
        "degenerate-escape",
        "From the constant map iSD comes nearer to the truth than consistency training.",
        f"error at the end, either learning rate, ct/dct over isd: {ratio}; isd's own "
        f"{mean_interval(isd)}",
        above(ratio, 1.0, 1.0),
        "supported: the ratio is above 1; refuted: below",
        "longer runs, other targets",
        "starts",
    )


def _leaves(results: Results) -> Claim:
    def growth(name: str) -> Interval:
        runs = results.of("start", start="truth", objective=name)  # (rates, seeds) each
        ends = np.concatenate([r.final("error") for r in runs])
        begins = np.concatenate([r.series("error")[0] for r in runs])
        return ratio_interval(ends, begins)

    ct, isd = growth("ct"), growth("isd")
    return Claim(
        "leaves-truth",
        "Consistency training drives networks from the true map, further than iSD does.",
        f"error at the end against the start: ct {ct}, isd {isd}",
        above(ct, max(isd.high, 1.0), max(isd.low, 1.0)),
        "supported: ct's error grows, and by more than iSD's; refuted: it falls, or grows by less",
        "more learning rates; networks that fit the truth better at the start",
        "starts",
    )


def _batch(results: Results) -> Claim:
    runs = [r for r in results.from_scratch("ct") if r.job["target"] == results.target]
    runs.sort(key=lambda r: int(r.job["batch"]))
    ratio = ratio_interval(runs[0].final("error"), runs[-1].final("error"))
    sizes = f"{runs[0].job['batch']} against {runs[-1].job['batch']}"
    return Claim(
        "batch",
        "Consistency training fails more with small batches.",
        f"error of ct with batch {sizes}: ratio {ratio}",
        above(ratio, 1.0, 1.0),
        "supported: the ratio is above 1; refuted: below",
        "more seeds and batch sizes",
        "batch",
    )


def _look(results: Results) -> Claim:
    ends = [
        variance
        for name in ("ct", "dct")
        for run in results.from_scratch(name)
        for variance, end in zip(run.final("variance").ravel(), run.outcomes(), strict=True)
        if end != "healthy" and np.isfinite(variance)
    ]
    ratio = ratio_interval(np.array(ends), np.ones(len(ends)))
    return Claim(
        "degenerate-look",
        "Consistency training from scratch goes wrong by maps that stretch noise too far, not by "
        "collapse.",
        f"variance against the truth's in the {len(ends)} runs of ct/dct that fail, geometric "
        f"mean: {ratio}",
        above(ratio, 1.0, 1.0),
        "supported: the ratio is above 1; refuted: below; the interval is over runs",
        "smaller learning rates, where networks that have collapsed stay so",
        "picture",
    )


def _alarm(results: Results) -> Claim:
    samples = alarm_samples(results)
    failed, healthy = ([s.warned for s in samples if s.failed is end] for end in (True, False))
    caught, wrong = (share_interval(sum(w), max(len(w), 1)) for w in (failed, healthy))
    good = caught.low > 0.5 and wrong.high < 0.1
    bad = caught.high < 0.5 or wrong.low > 0.1
    return Claim(
        "alarm",
        "The metrics that a run logs tell most failing runs from healthy ones.",
        f"the warning catches {caught} of the failed runs and {wrong} of the healthy ones",
        "supported" if good else "refuted" if bad else "unclear",
        "supported: more than half of the failed and less than a tenth of the healthy runs are "
        "warned of; refuted: one of the two is otherwise",
        "runs that the bounds were not chosen on",
        "alarms",
    )


CONSISTENCY: Sequence[Callable[[Results], Claim]] = (
    _consistency, _look, _degenerate, _stays, _escapes, _leaves, _batch,
)  # fmt: skip
ALARM: Sequence[Callable[[Results], Claim]] = (_alarm,)
