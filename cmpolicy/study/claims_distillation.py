"""Claims on self-distillation: gradients, tangents, derivatives and settings."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import numpy as np

from cmpolicy.study.probes import LENGTHS
from cmpolicy.study.results import (
    Interval,
    Results,
    mean_interval,
    ratio_interval,
    share_interval,
)
from cmpolicy.study.verdicts import Claim, above, below, failure_claim, failures


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
    return Claim(
        "esd-length",
        "The excess of ESD's gradient grows with the length of the jump.",
        f"esd over isd: {short} at t - s = .1, {long} at 1",
        above(long, short.high, short.low),
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
    return failure_claim(
        results,
        ["esd"],
        "esd-unstable",
        "Those gradients make training by ESD fail.",
        "higher dimensions, where a Jacobian has more directions: here it has at most two",
    )


def _stable(results: Results) -> Claim:
    failed, total = failures(results, ["isd"])
    share = share_interval(failed, total)
    return Claim(
        "isd-stable",
        "Self-distillation with stop-gradient (iSD) is stable.",
        f"runs of isd that fail: {share} of {total}",
        below(share, 0.1),
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
        below(ratio, 1.0),
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
        below(start, 0.5),
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


def _setting(name: str, changed: str, claim: str, results: Results) -> Claim:
    without, base = (results.named("settings", n).final("error") for n in (changed, "base"))
    ratio = ratio_interval(without, base)
    return Claim(
        name,
        claim,
        f"error of the map with {changed.replace('-', ' ')} over that without: {ratio}",
        above(ratio, 1.0, 1.0),
        "supported: the ratio is above 1; refuted: below",
        "more seeds, longer runs",
        "settings",
    )


_ends = partial(
    _setting,
    "ends",
    "zero_share=0-one_share=0",
    "Drawing t = 1 and s = 0 themselves improves the one-step map.",
)
_power = partial(
    _setting, "power", "weight_power=0", "The adaptive weight improves the one-step map."
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


DISTILLATION: Sequence[Callable[[Results], Claim]] = (
    _jacobian, _growing, _esd_training, _esd, _stable, _variance, _bias, _difference, _one_sided,
    _ends, _power, _ema, _meanflow,
)  # fmt: skip
