"""Scheduling in ticks: when inference starts, what is stale, how a seam is blended."""

import numpy as np
import pytest

from cmpolicy.robot.chunker import TemporalEnsemble
from cmpolicy.robot.schedule import (
    LATENCY_WINDOW,
    Asynchronous,
    AsyncPlanner,
    LatencyQuantile,
    Synchronous,
    Window,
)
from cmpolicy.spec import Rotation
from cmpolicy_envs.rotations import axis_angle_to_matrix

WINDOW = Window(n_plan_steps=7, n_action_steps=4, action_dim=1)


def _plan(tick: int, value: float = 0.0) -> np.ndarray:
    """(P, 1): action of tick k is k, plus ``value``."""
    return (np.arange(tick, tick + WINDOW.n_plan_steps) + value)[:, None].astype(np.float32)


def _planner(**settings: float) -> AsyncPlanner:
    return Asynchronous(**settings).planner(WINDOW)  # type: ignore[arg-type]


def _value(action: np.ndarray | None) -> float | None:
    return None if action is None else float(action[0])


def test_synchronous_executes_ta_actions_in_order_whenever_the_plan_came() -> None:
    planner = Synchronous().planner(WINDOW)
    assert planner.due(0)
    planner.begin(0)
    assert not planner.due(1)
    assert planner.choose(1) is None
    planner.arrive(2, _plan(0))
    got = [_value(planner.choose(tick)) for tick in (2, 3, 5, 6)]
    assert got == [0, 1, 2, 3]  # not by time
    assert planner.due(7)
    assert planner.choose(7) is None
    assert (planner.stale, planner.seams) == (0, 0)


def test_asynchronous_drops_by_timestamp() -> None:
    planner = _planner(blend=0)
    planner.begin(0)
    assert planner.choose(0) is None
    planner.arrive(2, _plan(0))
    assert planner.stale == 2
    assert [_value(planner.choose(tick)) for tick in (2, 3)] == [2, 3]
    assert not planner.due(3)
    assert planner.due(4)  # Ta after the last observation
    planner.begin(4)
    assert [_value(planner.choose(tick)) for tick in (4, 5)] == [4, 5]
    planner.arrive(6, _plan(4, value=100))
    assert planner.stale == 4
    assert [_value(planner.choose(tick)) for tick in (6, 7, 9, 10)] == [106, 107, 109, 110]
    assert planner.choose(11) is None  # the plan ended at 10
    assert planner.seams == 0


def test_the_seam_rises_linearly_from_the_old_plan_to_the_new() -> None:
    planner = _planner(blend=3)
    planner.begin(0)
    planner.arrive(0, _plan(0))
    planner.begin(1)
    planner.arrive(2, _plan(1, value=40))
    # the old plan reaches tick 6; weights of the new one: 1/4, 2/4, 3/4, then 1
    assert [_value(planner.choose(tick)) for tick in range(2, 8)] == [12, 23, 34, 45, 46, 47]
    assert planner.seams == 1


def test_a_seam_is_no_longer_than_what_is_left_of_the_old_plan() -> None:
    planner = _planner(blend=3)
    planner.begin(0)
    planner.arrive(0, _plan(0))
    planner.begin(4)
    planner.arrive(6, _plan(4, value=10))  # one tick of the old plan left: tick 6
    assert [_value(planner.choose(tick)) for tick in (6, 7)] == [11, 17]


def test_a_plan_that_comes_too_late_is_dropped_whole() -> None:
    planner = _planner()
    planner.begin(0)
    planner.arrive(7, _plan(0))
    assert planner.stale == 7
    assert planner.choose(7) is None
    assert planner.due(7)


def test_a_late_whole_plan_leaves_the_old_one() -> None:
    planner = _planner(every=1, blend=0)
    planner.begin(0)
    planner.arrive(0, _plan(0))
    planner.begin(5)
    planner.arrive(12, _plan(5))
    assert planner.choose(12) is None
    assert planner.due(12)


def test_nothing_is_due_while_an_inference_runs_and_a_failed_one_is_repeated() -> None:
    planner = _planner()
    planner.begin(0)
    assert not any(planner.due(tick) for tick in range(20))
    planner.fail()
    assert planner.due(20)


@pytest.mark.parametrize(
    ("latency", "gap"),
    [
        (0.0, 4),  # Ta
        (2.4, 4),  # 2.4 + 0.5: lead 3, and 7 - 3 = 4
        (3.0, 3),
        (5.2, 1),
        (9.0, 1),  # longer than the plan: as often as there are ticks
    ],
)
def test_inference_starts_early_enough_for_the_latency(latency: float, gap: int) -> None:
    planner = _planner(margin=0.5)
    planner.measured(latency)
    planner.begin(0)
    planner.arrive(0, _plan(0))
    assert next(tick for tick in range(1, 99) if planner.due(tick)) == gap


def test_every_is_the_users_choice_within_reason() -> None:
    planner = _planner(every=2)
    planner.begin(0)
    planner.arrive(0, _plan(0))
    assert [planner.due(tick) for tick in (1, 2)] == [False, True]


def test_upcoming_is_what_choose_will_give() -> None:
    planner = _planner()
    assert planner.upcoming(0).shape == (0, 1)
    planner.begin(0)
    planner.arrive(1, _plan(0))
    assert planner.upcoming(5).ravel().tolist() == [5, 6]
    assert planner.upcoming(9).shape == (0, 1)
    sync = Synchronous().planner(WINDOW)
    sync.begin(0)
    sync.arrive(0, _plan(0))
    sync.choose(0)
    assert sync.upcoming(1).ravel().tolist() == [1, 2, 3]


def test_which_tick_comes_next() -> None:
    waiting, going = Synchronous().planner(WINDOW), _planner()
    # in time, a little late, late by most of a tick, late by two and a half
    assert [waiting.next_tick(3, e) for e in (3.2, 4.1, 4.9, 6.5)] == [4, 5, 5, 7]
    assert [going.next_tick(3, e) for e in (3.2, 4.1, 4.9, 6.2)] == [4, 4, 5, 6]
    assert [waiting.taken_at(r) for r in (2.0, 2.5)] == [2.0, 2.5]
    assert [going.taken_at(r) for r in (2.0, 2.5)] == [2, 3]


def test_latency_quantile() -> None:
    estimate = LatencyQuantile(0.9)
    assert estimate.value == 0
    for latency in range(1, 11):
        estimate.add(float(latency))
    assert estimate.value == 9
    for _ in range(LATENCY_WINDOW):
        estimate.add(2.0)
    assert estimate.value == 2  # what is long ago is forgotten
    with pytest.raises(ValueError, match="-1"):
        estimate.add(-1.0)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"every": 0}, "every=0"),
        ({"blend": -1}, "blend=-1"),
        ({"quantile": 0.0}, "quantile=0"),
        ({"quantile": 1.5}, "quantile=1.5"),
        ({"margin": -0.1}, "margin=-0.1"),
        ({"margin": float("nan")}, "margin=nan"),
    ],
)
def test_impossible_settings(settings: dict[str, float], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        Asynchronous(**settings)  # type: ignore[arg-type]


def _matrix(kind: str, value: np.ndarray) -> np.ndarray:
    if kind == "angle":
        return axis_angle_to_matrix(np.array([0, 0, value[0]]))
    if kind == "axis_angle":
        return axis_angle_to_matrix(value)
    angle = 2 * np.arctan2(np.linalg.norm(value[:3]), value[3])  # (x, y, z, w)
    return axis_angle_to_matrix(angle * value[:3] / np.linalg.norm(value[:3]))


def _described(kind: str, angle: float) -> np.ndarray:
    """A turn about z by ``angle``, in (-pi, pi]."""
    half = [0, 0, np.sin(angle / 2), np.cos(angle / 2)]
    values = {"angle": [angle], "axis_angle": [0, 0, angle], "quaternion": half}
    return np.array(values[kind], float)


@pytest.mark.parametrize("kind", ["angle", "axis_angle", "quaternion"])
def test_rotations_are_mixed_the_short_way(kind: str) -> None:
    old, new = _described(kind, np.pi - 0.1), _described(kind, -np.pi + 0.1)
    size = len(old)
    window = Window(4, 2, size + 1, (Rotation(kind, tuple(range(size))),))  # type: ignore[arg-type]
    rows = [np.append(v, x)[None] for v, x in ((old, 0.0), (new, 1.0))]
    mixed = window.mix(*rows, np.array([[0.5]]))
    assert mixed[0, -1] == 0.5
    half_way = _described(kind, np.pi)
    np.testing.assert_allclose(_matrix(kind, mixed[0, :size]), _matrix(kind, half_way), atol=1e-9)
    for share, end in ((0.0, old), (1.0, new)):
        got = window.mix(*rows, np.array([[share]]))[0, :size]
        np.testing.assert_allclose(_matrix(kind, got), _matrix(kind, end), atol=1e-9)
    np.testing.assert_allclose(got, new, atol=1e-12)  # in the policy's own way of writing it


def test_nothing_is_averaged_where_rotations_are_not_known(
    caplog: pytest.LogCaptureFixture,
) -> None:
    window = Window(6, 2, 1, None)
    with caplog.at_level("INFO"):
        planner = Asynchronous(blend=2).planner(window)
    assert "plans are not blended" in caplog.text
    for tick, value in ((0, 1.0), (2, 5.0)):
        planner.begin(tick)
        planner.arrive(tick, np.full((6, 1), value, np.float32))
        assert planner.choose(tick) == value
    assert planner.seams == 0
    with pytest.raises(ValueError, match=r"data\.action_rotations"):
        TemporalEnsemble(window, 0.01)


def test_an_ensemble_of_angles() -> None:
    ensemble = TemporalEnsemble(Window(2, 1, 1, (Rotation("angle", (0,)),)), 0.0)
    ensemble.add(np.full((2, 1), 3.1))
    assert abs(ensemble.add(np.full((2, 1), -3.1))[0]) == pytest.approx(np.pi, abs=1e-6)
