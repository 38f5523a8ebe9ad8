"""Which claims hold: evidence and verdict of each, computed from the results by a stated rule."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from cmpolicy.study.measure import COLLAPSED
from cmpolicy.study.probes import FAMILY, LENGTHS
from cmpolicy.study.results import (
    Interval,
    Results,
    mean_interval,
    ratio_interval,
    share_interval,
)
from cmpolicy.study.targets import Array

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


def all_claims(results: Results) -> list[Claim]:
    """The claims table."""
    return [claim(results) for claim in _CLAIMS]


def _failures(results: Results, objectives: Sequence[str]) -> tuple[int, int]:
    ends = [o for name in objectives for run in results.from_scratch(name) for o in run.outcomes()]
    return sum(end != "healthy" for end in ends), len(ends)


def _compare_failures(results: Results, first: Sequence[str]) -> tuple[str, Verdict]:
    """Share of failed runs of some objectives against iSD's."""
    theirs = share_interval(*_failures(results, first))
    isd = share_interval(*_failures(results, ["isd"]))
    verdict: Verdict = "unclear"
    if theirs.low > isd.high:
        verdict = "supported"
    elif theirs.high < isd.low or theirs.high < 0.1:
        verdict = "refuted"
    return f"runs that fail: {'/'.join(first)} {theirs}, isd {isd}", verdict


_FAIL_RULE = (
    "supported: the interval of the share of failed runs (diverged, collapsed or wrong) lies above "
    "iSD's; refuted: it lies below iSD's, or below .1"
)


def _consistency(results: Results) -> Claim:
    evidence, verdict = _compare_failures(results, ["ct", "dct"])
    return Claim(
        "consistency-unstable",
        "Consistency training from scratch is unstable.",
        evidence,
        verdict,
        _FAIL_RULE,
        "other networks and longer runs",
        "outcomes",
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
        above(Interval(-theirs.value, -theirs.high, -theirs.low), -COLLAPSED, -COLLAPSED),
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
    verdict: Verdict = "unclear"
    if ct.low > max(isd.high, 1.0):
        verdict = "supported"
    elif ct.high < max(isd.low, 1.0):
        verdict = "refuted"
    return Claim(
        "leaves-truth",
        "Consistency training drives networks from the true map, further than iSD does.",
        f"error at the end against the start: ct {ct}, isd {isd}",
        verdict,
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


def _length_ratio(results: Results, length: float) -> Interval:
    index = LENGTHS.index(length)
    pairs = [run.probe("lengths")[-1][1] for run in results.of("probe", objective="isd")]
    above_, below = (
        np.array([p[f"{name}_median"][index] for p in pairs]) for name in ("esd", "isd")
    )
    return ratio_interval(above_, below)


def _jacobian(results: Results) -> Claim:
    ratio = _length_ratio(results, 1.0)
    return Claim(
        "esd-gradient",
        "Plain Eulerian self-distillation has large gradients through the spatial Jacobian.",
        f"gradient norm of L_sd, esd over isd, same networks and batches, t - s = 1: {ratio}",
        above(ratio, 1.5, 1.1),
        "supported: the ratio is above 1.5; refuted: below 1.1",
        "higher dimensions, larger networks",
        "lengths",
    )


def _growing(results: Results) -> Claim:
    short, long = _length_ratio(results, 0.1), _length_ratio(results, 1.0)
    verdict: Verdict = "unclear"
    if long.low > short.high:
        verdict = "supported"
    elif long.high < short.low:
        verdict = "refuted"
    return Claim(
        "esd-length",
        "The excess of ESD's gradient grows with the length of the jump.",
        f"esd over isd: {short} at t - s = .1, {long} at 1",
        verdict,
        "supported: the interval at 1 lies above that at .1; refuted: below",
        "more seeds",
        "lengths",
    )


def _esd_training(results: Results) -> Claim:
    esd, isd = (
        np.concatenate([np.nanmax(r.gradient("largest"), axis=0) for r in runs])
        for runs in (results.of("probe", objective=name) for name in ("esd", "isd"))
    )
    ratio = ratio_interval(esd, isd)
    return Claim(
        "esd-training",
        "In its own training, too, ESD has larger gradients than iSD.",
        f"largest gradient norm of a run, unweighted loss, esd over isd: {ratio}",
        above(ratio, 1.1, 1.0),
        "supported: the ratio is above 1.1; refuted: below 1",
        "higher dimensions, longer runs",
        "lengths",
    )


def _esd(results: Results) -> Claim:
    evidence, verdict = _compare_failures(results, ["esd"])
    return Claim(
        "esd-unstable",
        "Those gradients make training by ESD fail.",
        evidence,
        verdict,
        _FAIL_RULE,
        "higher dimensions, where a Jacobian has more directions: here it has at most two",
        "outcomes",
    )


def _stable(results: Results) -> Claim:
    failed, total = _failures(results, ["isd"])
    share = share_interval(failed, total)
    return Claim(
        "isd-stable",
        "Self-distillation with stop-gradient (iSD) is stable.",
        f"runs of isd that fail: {share} of {total}",
        above(Interval(-share.value, -share.high, -share.low), -0.1, -0.1),
        "supported: the share of failed runs is below .1; refuted: above",
        "runs beyond these learning rates and batch sizes",
        "outcomes",
    )


def _variance(results: Results) -> Claim:
    points = [p for run in results.of("probe", objective="isd") for _, p in run.probe("tangent")]
    own, data = (np.array([p[f"noise_{kind}"] for p in points]) for kind in ("self", "data"))
    ratio = ratio_interval(own, data)
    return Claim(
        "tangent-variance",
        "The tangent u_hat lowers the variance of gradients against v_t.",
        f"variance over batches of L_sd's gradient, u_hat over v, mean over stages: {ratio}",
        above(Interval(-ratio.value, -ratio.high, -ratio.low), -1.0, -1.0),
        "supported: the ratio is below 1; refuted: above",
        "more stages",
        "tangent",
    )


def _bias(results: Results) -> Claim:
    runs = [run.probe("tangent") for run in results.of("probe", objective="isd")]
    start, end = (mean_interval([r[i][1]["mix"] for r in runs]) for i in (0, -1))
    return Claim(
        "tangent-bias",
        "Early in training the bias of u_hat outweighs the variance of v_t.",
        f"share of u_hat in the mix nearest to the true velocity: {start} at the start, {end} at "
        "the end",
        above(Interval(-start.value, -start.high, -start.low), -0.5, -0.5),
        "supported: at the start the best mix has less than half of u_hat; refuted: more",
        "data whose conditional velocity varies less, such as actions given an observation",
        "tangent",
    )


def _of_derivative(results: Results, first: str, second: str) -> Interval:
    one, two = (results.named("derivative", name).final("error") for name in (first, second))
    return ratio_interval(one, two)


def _difference(results: Results) -> Claim:
    ratios = {e: _of_derivative(results, f"central-{e}", "jvp") for e in (0.005, 0.02, 0.05)}
    inside = all(r.low > 0.9 and r.high < 1.1 for r in ratios.values())
    outside = any(r.low > 1.1 for r in ratios.values())
    return Claim(
        "difference",
        "The central difference does as well as the exact derivative.",
        "error of the map over that by jvp: "
        + "; ".join(f"e = {e}: {ratio}" for e, ratio in ratios.items()),
        "supported" if inside else "refuted" if outside else "unclear",
        "supported: every ratio lies within .9 to 1.1; refuted: one lies above 1.1",
        "more seeds",
        "derivative",
    )


def _one_sided(results: Results) -> Claim:
    ratio = _of_derivative(results, "onesided-0.05", "central-0.05")
    return Claim(
        "one-sided",
        "A difference that stops at t = 1 gives a worse one-step map than one that passes it.",
        f"error of the map, e = .05, one-sided over central: {ratio}",
        above(ratio, 1.0, 1.0),
        "supported: the ratio is above 1; refuted: below",
        "more seeds; networks with sharper features of time",
        "derivative",
    )


def _setting(results: Results, name: str, claim: str, slug: str) -> Claim:
    changed, base = (results.named("settings", n).final("error") for n in (name, "base"))
    ratio = ratio_interval(changed, base)
    return Claim(
        slug,
        claim,
        f"error of the map with {name.replace('-', ' ')} over that without: {ratio}",
        above(ratio, 1.0, 1.0),
        "supported: the ratio is above 1; refuted: below",
        "more seeds, longer runs",
        "settings",
    )


def _ends(results: Results) -> Claim:
    return _setting(
        results,
        "zero_share=0-one_share=0",
        "Drawing t = 1 and s = 0 themselves improves the one-step map.",
        "ends",
    )


def _power(results: Results) -> Claim:
    return _setting(
        results, "weight_power=0", "The adaptive weight improves the one-step map.", "power"
    )


def _ema(results: Results) -> Claim:
    runs = results.of("settings")
    averaged, online = (
        np.concatenate([r.ema() for r in runs]),
        np.concatenate([r.final("error") for r in runs]),
    )
    ratio = ratio_interval(online, averaged)
    return Claim(
        "ema",
        "Averaged weights give a better one-step map at the end of a run with a cosine schedule.",
        f"error of the weights over that of their EMA: {ratio}",
        above(ratio, 1.0, 1.0),
        "supported: the ratio is above 1; refuted: below",
        "constant learning rates, where averaging has more to do",
        "settings",
    )


def _meanflow(results: Results) -> Claim:
    pairs = [
        (run.final("error"), results.named("grid", str(run.job["name"]).replace("meanflow", "isd")))
        for run in results.of("grid", objective="meanflow")
    ]
    above_ = np.concatenate([error for error, _ in pairs])
    below = np.concatenate([run.final("error") for _, run in pairs])
    ratio = ratio_interval(above_, below)
    return Claim(
        "against-meanflow",
        "At the same steps iSD gives a better one-step map than MeanFlow.",
        f"error of meanflow over isd: {ratio}",
        above(ratio, 1.0, 1.0),
        "supported: the ratio is above 1; refuted: below",
        "longer runs: the paper's case for u_hat is late in training",
        "grid",
    )


_CLAIMS: Sequence[Callable[[Results], Claim]] = (
    _consistency, _degenerate, _stays, _escapes, _leaves, _batch, _jacobian, _growing,
    _esd_training, _esd, _stable, _variance, _bias, _difference, _one_sided, _ends, _power, _ema,
    _meanflow,
)  # fmt: skip
