"""Properties of ensembling, scheduling and the safety layer, at any sizes and latencies."""

import math

import numpy as np
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from cmpolicy.robot.chunker import TemporalEnsemble
from cmpolicy.robot.safety import SafetyFilter, SafetyLimits
from cmpolicy.robot.schedule import Asynchronous, Synchronous, Window

sizes = st.integers(1, 12)


@given(
    n_plan_steps=sizes,
    ticks=st.integers(1, 30),
    coefficient=st.floats(-3, 3) | st.sampled_from([0.0, 0.01, 800.0, -800.0]),
    seed=st.integers(0, 99),
)
def test_ensembling_online_is_the_weighted_mean_offline(
    n_plan_steps: int, ticks: int, coefficient: float, seed: int
) -> None:
    plans = np.random.default_rng(seed).normal(size=(ticks, n_plan_steps, 2)).astype(np.float32)
    online = TemporalEnsemble(Window(n_plan_steps, 1, 2), coefficient)
    for episode in range(2):
        for tick in range(ticks):
            first = max(0, tick - n_plan_steps + 1)
            candidates = np.array([plans[made, tick - made] for made in range(first, tick + 1)])
            exponents = -coefficient * np.arange(len(candidates))
            weights = np.exp(exponents - exponents.max())  # ACT's weights, oldest first
            expected = (weights[:, None] * candidates.astype(float)).sum(0) / weights.sum()
            np.testing.assert_allclose(
                online.add(plans[tick]), expected, rtol=1e-5, atol=1e-5, err_msg=f"{episode=}"
            )
        online.reset()


@given(
    ta=sizes,
    extra=st.integers(0, 12),
    blend=st.integers(0, 6),
    every=st.none() | sizes,
    margin=st.floats(0, 3),
    latencies=st.lists(st.floats(0, 20), min_size=1, max_size=12),
)
def test_asynchronous_actions_are_always_those_of_their_tick(
    ta: int,
    extra: int,
    blend: int,
    every: int | None,
    margin: float,
    latencies: list[float],
) -> None:
    """Every plan says k for tick k, so whatever is blended or late, tick k must get k or nothing.

    And no tick goes without an action for longer than the latencies make inevitable.
    """
    window = Window(ta + extra, ta, 1)
    planner = Asynchronous(every=every, blend=blend, margin=margin).planner(window)
    ready: float | None = None
    begun = calls = plans = gap = 0
    longest = math.ceil(max(latencies))
    for tick in range(50):
        if ready is not None and planner.taken_at(ready) <= tick:
            planner.measured(ready - begun)
            plan = np.arange(begun, begun + window.n_plan_steps, dtype=np.float32)[:, None]
            planner.arrive(tick, plan)
            ready, plans = None, plans + 1
        if planner.due(tick):
            assert ready is None
            planner.begin(tick)
            begun, ready = tick, tick + latencies[calls % len(latencies)]
            calls += 1
            if planner.taken_at(ready) <= tick:
                plan = np.arange(tick, tick + window.n_plan_steps, dtype=np.float32)[:, None]
                planner.arrive(tick, plan)
                ready, plans = None, plans + 1
        upcoming = planner.upcoming(tick).copy()
        action = planner.choose(tick)
        if action is None:
            gap += 1
            assert len(upcoming) == 0
        else:
            gap = 0
            assert abs(float(action[0]) - tick) < 1e-3
            assert upcoming[0, 0] == action[0]
        if longest < window.n_plan_steps:
            assert gap <= 2 * longest  # one inference under way, and the next at the latest
    assert planner.seams < max(plans, 1)
    assert planner.stale >= 0


@given(
    ta=sizes,
    latencies=st.lists(st.integers(0, 5), min_size=1, max_size=8),
)
def test_asynchronous_without_gap_where_plans_are_long_enough(
    ta: int, latencies: list[int]
) -> None:
    """One inference at a time: the next begins Ta ticks after the last, or when that is done.

    Where a plan reaches until that one arrives, every tick after the first plan has an action.
    """
    longest = max(latencies)
    window = Window(max(ta, longest) + longest + 1, ta, 1)
    planner = Asynchronous().planner(window)
    for _ in range(3):
        planner.measured(longest)
    ready = -1
    started = False
    calls = 0
    plan = np.zeros((window.n_plan_steps, 1), np.float32)
    for tick in range(60):
        for _ in range(2):  # also one that takes no time
            if ready == tick:
                planner.arrive(tick, plan)
                ready, started = -1, True
            if planner.due(tick):
                planner.begin(tick)
                ready = tick + latencies[calls % len(latencies)]
                calls += 1
        assert planner.choose(tick) is not None or not started


@given(ta=sizes, extra=st.integers(0, 5), delays=st.lists(st.floats(0, 5), min_size=1))
def test_synchronous_sends_whole_chunks_in_order(ta: int, extra: int, delays: list[float]) -> None:
    window = Window(ta + extra, ta, 1)
    planner = Synchronous().planner(window)
    tick, sent = 0, []
    for number, delay in enumerate(delays):
        assert planner.due(tick)
        planner.begin(tick)
        plan = 100 * number + np.arange(window.n_plan_steps, dtype=np.float32)[:, None]
        planner.arrive(tick, plan)
        for step in range(ta):
            action = planner.choose(tick)
            assert action is not None
            sent.append(float(action[0]))
            elapsed = tick + (delay if step == 0 else 0.0)
            following = planner.next_tick(tick, elapsed)
            assert elapsed < following <= elapsed + 1
            assert following > tick
            tick = following
    assert sent == [100 * n + k for n in range(len(delays)) for k in range(ta)]


@given(
    actions=hnp.arrays(
        np.float32,
        st.tuples(st.integers(1, 20), st.just(2)),
        elements=st.floats(-(2.0**20), 2.0**20, width=32)
        | st.sampled_from([math.nan, math.inf, -math.inf]),
    ),
    low=st.floats(-100, 0),
    span=st.floats(0, 100),
    rate=st.floats(0.01, 1e4),
    period=st.floats(0.001, 1),
)
def test_whatever_the_policy_says_the_robot_gets_safe_actions(
    actions: np.ndarray, low: float, span: float, rate: float, period: float
) -> None:
    high = low + span
    limits = SafetyLimits(low=low, high=high, max_rate=rate)
    try:
        safety = SafetyFilter(limits, 2, period)
    except ValueError:  # no float32 lies between the bounds
        assert np.nextafter(np.float32(low), np.float32(np.inf)) > high
        return
    last: np.ndarray | None = None
    refused = 0
    for action in actions:
        safe = safety.apply(action)
        if not np.isfinite(action).all():
            assert safe is None
            refused += 1
            continue
        assert safe is not None
        assert np.isfinite(safe).all()
        assert (safe.astype(float) >= low).all()
        assert (safe.astype(float) <= high).all()
        if last is not None:
            assert (np.abs(safe - last) <= rate * period + 1e-4).all()
        elif ((action.astype(float) >= low) & (action.astype(float) <= high)).all():
            assert (safe == action).all()
        last = safe
        hold = safety.hold
        assert hold is not None
        np.testing.assert_array_equal(hold, safe)
    assert safety.counts["non-finite action"] == refused
