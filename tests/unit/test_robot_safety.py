"""Limits between policy and robot, and the count of interventions."""

from typing import Any

import numpy as np
import pytest

from cmpolicy.robot.safety import (
    NON_FINITE_ACTION,
    OUT_OF_BOUNDS,
    TOO_FAST,
    SafetyFilter,
    SafetyLimits,
)
from cmpolicy.spec import Rotation


def _filter(dim: int = 2, period: float = 0.1, start: Any = None, **limits: Any) -> SafetyFilter:
    return SafetyFilter(SafetyLimits(**limits), dim, period, start)


def _apply(safety: SafetyFilter, *values: float) -> list[float] | None:
    action = safety.apply(np.array(values, np.float32))
    return None if action is None else action.tolist()


def test_without_limits_actions_pass_unchanged() -> None:
    safety = _filter()
    assert _apply(safety, 1e6, -3.5) == [1e6, -3.5]
    assert not any(safety.counts.values())


def test_bounds_per_dimension() -> None:
    safety = _filter(low=[0, -1], high=2)
    assert _apply(safety, -5, -5) == [0, -1]
    assert _apply(safety, 5, 1) == [2, 1]
    assert _apply(safety, 1, 1) == [1, 1]
    assert safety.counts[OUT_OF_BOUNDS] == 2
    assert _apply(_filter(low=[-np.inf, 0]), -9, -9) == [-9, 0]


def test_bounds_hold_in_float32() -> None:
    for bound in (0.1, -0.1, 1 / 3, 16777217.0):
        action = _filter(1, high=bound).apply(np.array([1e9], np.float32))
        assert action is not None
        assert float(action[0]) <= bound
        action = _filter(1, low=bound).apply(np.array([-1e9], np.float32))
        assert action is not None
        assert float(action[0]) >= bound


def test_rate_is_change_per_second() -> None:
    safety = _filter(max_rate=[10, np.inf], period=0.1)
    assert _apply(safety, 5, 5) == [5, 5]  # the first action has no predecessor
    assert _apply(safety, 9, 9) == [6, 9]
    assert _apply(safety, 5.5, 0) == [5.5, 0]
    assert safety.counts[TOO_FAST] == 1


def test_the_first_action_is_limited_from_where_the_robot_stands() -> None:
    safety = _filter(max_rate=10, start=[0, 0], low=-1, high=1)
    assert safety.hold is not None
    assert safety.hold.tolist() == [0, 0]
    assert _apply(safety, 5, 0.5) == [1, 0.5]  # bound and rate agree
    assert safety.counts == safety.counts | {OUT_OF_BOUNDS: 1, TOO_FAST: 0}


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_non_finite_actions_are_refused(bad: float) -> None:
    safety = _filter(low=-1, high=1)
    assert _apply(safety, 0.5, bad) is None
    assert safety.hold is None  # nothing is known to be safe yet
    assert _apply(safety, 0.5, 0.25) == [0.5, 0.25]
    assert _apply(safety, bad, 0) is None
    assert safety.hold is not None
    assert safety.hold.tolist() == [0.5, 0.25]
    assert safety.counts[NON_FINITE_ACTION] == 2


def test_rest_is_what_holds_relative_commands() -> None:
    safety = _filter(rest=0.0, max_rate=10)
    assert _apply(safety, 5, 5) == [5, 5]
    assert safety.hold is not None
    assert safety.hold.tolist() == [0, 0]
    safety.rested()
    assert _apply(safety, 5, 5) == [1, 1]  # from rest on


def test_the_caller_may_keep_and_change_what_it_got() -> None:
    safety = _filter(max_rate=10)
    action = safety.apply(np.zeros(2, np.float32))
    assert action is not None
    action[...] = 100
    assert _apply(safety, 5, 5) == [1, 1]


def test_an_action_of_another_shape_is_an_error() -> None:
    with pytest.raises(ValueError, match=r"shape \(3,\), expected \(2,\)"):
        _filter().apply(np.zeros(3))


@pytest.mark.parametrize(
    ("limits", "words"),
    [
        ({"low": 2, "high": 1}, "low=2 lies above high=1"),
        ({"low": [0, 0, 0]}, r"low has shape \(3,\).*2"),
        ({"high": float("nan")}, "high=nan holds NaN"),
        ({"max_rate": 0}, "max_rate=0 must be above 0"),
        ({"rest": [0, np.inf]}, "rest=.*must be finite"),
        ({"start": 5, "high": 1}, "start=5 lies outside the bounds"),
        ({"max_observation_age": 0}, "max_observation_age=0"),
        ({"max_observation_age": float("nan")}, "max_observation_age=nan"),
        ({"max_misses": -1}, "max_misses=-1"),
    ],
)
def test_impossible_limits(limits: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        _filter(**limits)


@pytest.mark.parametrize("bound", [0.1, 0.3, 0.7, 1.1, 512.3])
def test_a_robot_may_stand_at_its_bounds(bound: float) -> None:
    """Float32, in which actions are sent, may not hold them."""
    for start in ([bound, -bound], np.array([bound, -bound], np.float32)):
        held = _filter(start=start, low=-bound, high=bound).hold
        assert held is not None
        assert held.astype(np.float64).max() <= bound
        np.testing.assert_allclose(held, start, rtol=1e-6)
    with pytest.raises(ValueError, match="lies outside the bounds"):
        _filter(start=1.0001 * bound, low=-bound, high=bound)


def _turning(kind: Any, *dims: int, rate: float = 2.0, **limits: Any) -> SafetyFilter:
    given = SafetyLimits(max_rate=rate, **limits)
    return SafetyFilter(given, len(dims), 0.1, rotations=(Rotation(kind, dims),))


def test_an_angle_is_slowed_down_the_short_way_round() -> None:
    safety = _turning("angle", 0)
    sent = []
    for wanted in np.linspace(2.9, 3.9, 11):  # 1 rad per second, below the limit
        wrapped = (wanted + np.pi) % (2 * np.pi) - np.pi
        sent.append(_apply(safety, wrapped))
    assert safety.counts[TOO_FAST] == 0
    found = [_apply(safety, -1.5) for _ in range(4)]  # 0.9 rad on: 0.2 a tick
    angles = np.unwrap([sent[-1][0], *(f[0] for f in found)])  # type: ignore[index]
    np.testing.assert_allclose(np.diff(angles), 0.2, atol=1e-5)
    assert safety.counts[TOO_FAST] == 4


@pytest.mark.parametrize("half", [np.pi, 3.1416, 3.14])
@pytest.mark.parametrize("kind", ["angle", "axis_angle"])
def test_a_turn_within_its_bounds_is_slowed_down_on_every_tick(kind: str, half: float) -> None:
    """The description that the policy uses lies outside of the bounds half of the way."""
    n = {"angle": 1, "axis_angle": 3}[kind]
    safety = _turning(kind, *range(n), low=-half, high=half)
    sent = [_apply(safety, *[0.0] * (n - 1), wanted)[-1] for wanted in [2.0, *[-2.0] * 13]]  # type: ignore[index]
    steps = np.diff(np.unwrap(sent))
    assert steps.min() >= 0
    assert steps.max() <= 0.2 + 1e-5
    assert sent[-1] == -2.0


@pytest.mark.parametrize("bound", [2.0, 3.0, 3.12])
def test_an_angle_with_stops_goes_the_way_that_there_is(bound: float) -> None:
    """What lies between its bounds on the other side is not to be crossed."""
    safety = _turning("angle", 0, low=-bound, high=bound)
    far = bound - 0.1
    sent = [_apply(safety, wanted)[0] for wanted in [far, *[-far] * 40]]  # type: ignore[index]
    steps = np.diff(sent)
    assert (np.abs(steps) <= 0.2 + 1e-5).all()
    assert sent[-1] == pytest.approx(-far)


def test_a_quaternion_may_change_its_sign() -> None:
    safety = _turning("quaternion", 0, 1, 2, 3)
    q = np.array([1.0, 0, 0, 0])
    assert _apply(safety, *q) == [1, 0, 0, 0]
    assert _apply(safety, *-q) == [-1, 0, 0, 0]  # the same rotation
    assert safety.counts[TOO_FAST] == 0
    turned = [np.cos(0.5), np.sin(0.5), 0, 0]
    before = np.array([-1.0, 0, 0, 0])
    for _ in range(4):
        sent = _apply(safety, *turned)
        assert sent is not None
        step = min(np.abs(sent - before).max(), np.abs(sent + before).max())
        assert step <= 0.2 + 1e-6
        before = np.array(sent)
    np.testing.assert_allclose(sent, turned, atol=1e-6)


def test_a_quaternion_that_stays_is_sent_as_it_is() -> None:
    """Also one that is not quite of length one, as networks give them."""
    safety = _turning("quaternion", 0, 1, 2, 3)
    given = np.array([0.9, 0, 0, 0], np.float32).tolist()
    assert [_apply(safety, *given) for _ in range(4)] == [given] * 4
    assert safety.counts[TOO_FAST] == 0
