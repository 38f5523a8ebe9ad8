"""The parts of the stability study: stacks of networks, probes, rules of the claims."""

from __future__ import annotations

import json
import math
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from cmpolicy.flow.flow_map import derivative_difference, derivative_jvp
from cmpolicy.flow.objectives import Draws, build_objective
from cmpolicy.study.alarm_table import alarm_rows
from cmpolicy.study.claims import all_claims
from cmpolicy.study.jobs import Job, jobs_of, jump_objectives, makes_jumps
from cmpolicy.study.measure import Ruler, outcome
from cmpolicy.study.nets import StackAdam, flow_map_of, init_nets, norms, one_of
from cmpolicy.study.one_sided import one_sided_difference
from cmpolicy.study.probes import FAMILY, run_probes
from cmpolicy.study.results import (
    Interval,
    Results,
    mean_interval,
    ratio_interval,
    share_interval,
)
from cmpolicy.study.run_job import gradient_step, run_job
from cmpolicy.study.targets import get_target
from cmpolicy.study.truth import make_truth
from cmpolicy.study.verdicts import above


def _batch(models: int, size: int = 16, dim: int = 2) -> tuple[Tensor, ...]:
    g = torch.Generator().manual_seed(0)
    x, z = torch.randn(2, models, size, dim, generator=g, dtype=torch.float64)
    times = torch.rand(models, size, 2, generator=g, dtype=torch.float64).sort(dim=2).values
    return x, z, times[..., 1], times[..., 0]


def _double(stack: list[Tensor]) -> list[Tensor]:
    return [p.double() for p in stack]


@pytest.mark.parametrize("name", jump_objectives())
def test_each_network_has_its_own_gradient(name: str) -> None:
    """A stack's losses, gradients and norms are those of its networks one by one."""
    objective = build_objective(name)
    stack, batch = _double(init_nets([0, 1, 2], 2)), _batch(3)
    gradients, losses = gradient_step(objective, 0.6)(stack, stack, *batch)
    for i in range(3):
        weights = [p.requires_grad_() for p in one_of(stack, i)]
        x, z, t, s = (part[i] for part in batch)
        ema = flow_map_of(one_of(stack, i)) if objective.needs_ema else None
        loss = objective(flow_map_of(weights), x, None, Draws(z, t, s), progress=0.6, ema=ema).loss
        alone = torch.autograd.grad(loss, weights)
        torch.testing.assert_close(losses[i], loss.detach())
        for together, single in zip(gradients, alone, strict=True):
            torch.testing.assert_close(together[i], single)
        whole = torch.cat([g.flatten() for g in alone]).norm()
        torch.testing.assert_close(norms(gradients)[i], whole)


def test_adam_is_adam_with_a_rate_for_each_network() -> None:
    stack = _double(init_nets([0, 1], 2))
    alone = [[p.requires_grad_() for p in one_of([q.clone() for q in stack], i)] for i in (0, 1)]
    optimizers = [torch.optim.Adam(w, lr=rate) for w, rate in zip(alone, (1e-3, 1e-2), strict=True)]
    adam = StackAdam(stack, torch.tensor([1e-3, 1e-2], dtype=torch.float64))
    g = torch.Generator().manual_seed(0)
    for _ in range(4):
        grads = [torch.randn(p.shape, generator=g, dtype=torch.float64) for p in stack]
        for i, (weights, optimizer) in enumerate(zip(alone, optimizers, strict=True)):
            for p, grad in zip(weights, grads, strict=True):
                p.grad = grad[i].clone()
            optimizer.step()
        adam.step(grads, 1.0)
    for i, weights in enumerate(alone):
        for together, single in zip(stack, weights, strict=True):
            torch.testing.assert_close(together[i], single.detach(), rtol=1e-6, atol=1e-9)


def test_a_network_that_diverges_leaves_the_others_alone() -> None:
    objective = build_objective("isd", derivative="jvp", sd_begin=0.0)
    good, both = init_nets([0], 1), init_nets([0, 1], 1)
    for p in both:
        p[1] = math.nan
    batch = [part.float() for part in _batch(2, dim=1)]
    for stack in (good, both):
        models = len(stack[0])
        adam = StackAdam(stack, torch.full((models,), 1e-3))
        for _ in range(3):
            part = [p[:models] for p in batch]
            adam.step(gradient_step(objective, 0.6)(stack, stack, *part)[0], 1.0)
    for alone, beside in zip(good, both, strict=True):
        torch.testing.assert_close(alone[0], beside[0])


def test_one_sided_difference() -> None:
    """Inside it is the package's central one; at t = 1 it is of first order, that one of second."""
    flow_map = flow_map_of(one_of(_double(init_nets([0], 2)), 0))
    x = torch.randn(8, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    s, u = torch.zeros(8, dtype=torch.float64), x.flip(0)
    for time, orders in ((0.5, (2, 2)), (1.0, (1, 2))):
        t = torch.full((8,), time, dtype=torch.float64)
        exact = derivative_jvp(flow_map, x, t, s, None, u)
        for order, way in zip(orders, ("one", "central"), strict=True):
            errors = []
            for epsilon in (2e-3, 1e-3):
                if way == "one":
                    found = one_sided_difference(flow_map, x, t, s, u, epsilon)
                else:
                    found = derivative_difference(flow_map, x, t, s, None, u, epsilon)
                errors.append(float((found - exact).norm()))
            assert math.log2(errors[0] / errors[1]) == pytest.approx(order, abs=0.1)


# -- degenerate solutions -----------------------------------------------------------------------


def test_consistency_has_no_slope_towards_the_truth() -> None:
    """Closed form: ct's gradient along the family is zero and its loss least at the constant."""
    job = Job("family", "g", "gaussian2", "ct", seeds=3, steps=0, probes=("family",))
    found = run_probes(job, init_nets([0], 2), get_target("gaussian2"), 0.0)["family"]
    for i, a in enumerate(FAMILY):
        ct, isd = (mean_interval(found[f"{name}_slope"][i]) for name in ("ct", "isd"))
        assert abs(ct.value) < 0.01
        if a < 1:
            assert isd.high < -50  # iSD is driven to the truth, wherever it is
    losses = [float(np.mean(found["ct_loss"][i])) for i in range(len(FAMILY))]
    assert losses[0] < 1e-20
    assert losses == sorted(losses)
    assert np.mean(found["isd_loss"][FAMILY.index(1.0)]) == min(np.mean(found["isd_loss"], axis=1))


# -- what is run --------------------------------------------------------------------------------


def test_only_flow_maps_take_part() -> None:
    names = jump_objectives()
    assert {"fm", "isd", "ct", "dct", "esd", "lsd", "psd", "meanflow"} <= set(names)
    assert not {"ddpm", "mip", "regression"} & set(names)
    assert makes_jumps(build_objective("ct"))


@pytest.mark.parametrize("size", ["tiny", "quick", "standard"])
def test_jobs_have_files_of_their_own_and_buildable_objectives(size: str) -> None:
    jobs = jobs_of(size)
    assert len({job.file for job in jobs}) == len(jobs)
    for job in jobs:
        job.build()
        get_target(job.target)
    if size != "tiny":
        assert min(job.seeds for job in jobs) >= 5


def test_a_job_is_reproducible_and_seeds_share_their_data() -> None:
    """The same networks at either learning rate at first; the same results every time."""
    truth = make_truth("gaussian1", 64)
    job = Job("x", "y", "gaussian1", "isd", batch=8, rates=(1e-3, 1e-2), seeds=2, steps=3)
    first, again = (run_job(job, truth, 3) for _ in range(2))
    for result in (first, again):
        del result["seconds"]
    assert first == again
    start = first["metrics"]["error"][0]
    assert start[:2] == start[2:]
    assert start[0] != start[1]


def test_the_ruler_knows_the_true_map() -> None:
    """The closed form of a Gaussian has no error; a constant map has error 1 and no variance."""
    target = get_target("gaussian1")
    mean, width = target.means[0][0], target.width  # type: ignore[attr-defined]

    def spread(t: Tensor) -> Tensor:
        return ((1 - t) ** 2 * width**2 + t**2).sqrt()

    def true(x: Tensor, t: Tensor, s: Tensor, features: Tensor | None) -> Tensor:
        t, s = t[:, None], torch.minimum(s, t - 1e-3)[:, None]
        moved = (1 - s) * mean + spread(s) / spread(t) * (x - (1 - t) * mean)
        return (x - moved) / (t - s)

    def constant(x: Tensor, t: Tensor, s: Tensor, features: Tensor | None) -> Tensor:
        return (x - mean) / (t - s).clamp(min=1e-3)[:, None]

    ruler, isd = Ruler(make_truth("gaussian1", 256)), build_objective("isd")
    maps = flow_map_of(init_nets([0], 1))
    maps.net = true
    found = ruler.measure(maps, isd)
    assert found["error"] < 1e-3
    assert found["error_any"] < 2e-3
    assert found["variance"] == pytest.approx(1, abs=1e-3)
    assert found["health_semigroup"] < 0.01
    maps.net = constant
    collapsed = ruler.measure(maps, isd)
    assert collapsed["error"] == pytest.approx(1, abs=0.05)
    assert outcome(collapsed["error"], collapsed["variance"]) == "collapsed"


@pytest.mark.parametrize(
    ("error", "variance", "end"),
    [
        (0.1, 1.0, "healthy"),
        (0.6, 1.0, "wrong"),
        (0.9, 0.1, "collapsed"),
        (4.0, 1.0, "diverged"),
        (math.nan, 1.0, "diverged"),
        (0.1, math.nan, "diverged"),
    ],
)
def test_outcomes(error: float, variance: float, end: str) -> None:
    assert outcome(error, variance) == end


# -- intervals and rules ------------------------------------------------------------------------


def test_intervals_are_over_seeds() -> None:
    values = np.array([[1.0, 2.0, 3.0], [3.0, 4.0, 5.0]])
    found = mean_interval(values)  # seeds have means 2, 3, 4
    assert found.value == pytest.approx(3)
    assert found.high - found.value == pytest.approx(4.303 / math.sqrt(3), rel=1e-3)
    ratio = ratio_interval(2 * values, values)
    assert (ratio.value, ratio.low, ratio.high) == pytest.approx((2, 2, 2))
    assert math.isnan(mean_interval([1.0]).low)
    assert mean_interval([1.0, math.nan, 3.0]).value == pytest.approx(2)
    assert share_interval(0, 10).low == 0


@pytest.mark.parametrize(
    ("interval", "verdict"),
    [
        ((2.0, 1.6, 2.4), "supported"),
        ((1.0, 0.9, 1.05), "refuted"),
        ((1.4, 1.0, 1.8), "unclear"),
        ((1.7, math.nan, math.nan), "unclear"),
    ],
)
def test_verdicts_follow_from_intervals(interval: Any, verdict: str) -> None:
    assert above(Interval(*interval), 1.5, 1.1) == verdict


def test_the_readme_says_what_was_found() -> None:
    """Its tables are those of the committed results, and they of what the jobs measured."""
    root = Path(__file__).parents[2]
    study = root / "eval/results/study/standard"
    told = json.loads((study / "claims.json").read_text())
    results = Results([json.loads(job.read_text()) for job in sorted((study / "jobs").iterdir())])
    assert [asdict(claim) for claim in all_claims(results)] == told["claims"]
    assert alarm_rows(results) == told["alarms"]
    readme = (root / "cmpolicy/study/README.md").read_text()
    for claim in told["claims"]:
        assert f"| {claim['claim']} | {claim['verdict']} | {claim['evidence']} |" in readme
    for row in told["alarms"]:
        assert row["healthy runs warned of"] in readme
