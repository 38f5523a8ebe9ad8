"""Intervals against published and worked values."""

import math

import numpy as np
import pytest

from cmpolicy_eval.metrics import (
    bootstrap_interval,
    paired_difference,
    paired_share_interval,
    wilson_interval,
)


# Newcombe (1998), "Two-sided confidence intervals for the single proportion", table I, method 3.
@pytest.mark.parametrize(
    ("successes", "n", "low", "high"),
    [
        (81, 263, 0.2553, 0.3662),
        (15, 148, 0.0624, 0.1605),
        (0, 20, 0.0, 0.1611),
        (1, 29, 0.0061, 0.1718),
    ],
)
def test_wilson_gives_newcombes_values(successes: int, n: int, low: float, high: float) -> None:
    assert wilson_interval(successes, n) == pytest.approx((low, high), abs=5e-5)


def test_wilson_is_symmetric_and_stays_within_bounds() -> None:
    low, high = wilson_interval(20, 20)
    assert (1 - high, 1 - low) == pytest.approx(wilson_interval(0, 20))
    assert high == 1.0


def test_wilson_refuses_what_is_no_share() -> None:
    with pytest.raises(ValueError, match="got 5, 4"):
        wilson_interval(5, 4)


def test_bootstrap_agrees_with_the_normal_law_on_many_values() -> None:
    values = np.random.default_rng(0).normal(3.0, 2.0, 2000)
    low, high = bootstrap_interval(values)
    half = 1.96 * values.std() / math.sqrt(len(values))
    assert low == pytest.approx(values.mean() - half, abs=0.1 * half)
    assert high == pytest.approx(values.mean() + half, abs=0.1 * half)


def test_bootstrap_is_reproducible_and_seeded() -> None:
    values = np.arange(7.0)
    assert bootstrap_interval(values) == bootstrap_interval(values)
    assert bootstrap_interval(values) != bootstrap_interval(values, seed=1, n_resamples=50)


def test_bootstrap_of_equal_values_is_a_point() -> None:
    assert bootstrap_interval([0.25] * 5) == (0.25, 0.25)


def test_bootstrap_needs_values() -> None:
    with pytest.raises(ValueError, match=r"got \(0,\)"):
        bootstrap_interval([])


def test_paired_share_interval_against_the_formula_by_hand() -> None:
    # n12 = 3, n21 = 1, n = 10: adjusted shares 4/12 and 2/12
    first = [True] * 3 + [False] * 1 + [True] * 6
    second = [False] * 3 + [True] * 1 + [True] * 6
    half = 1.959964 * math.sqrt((4 / 12 + 2 / 12 - (2 / 12) ** 2) / 12)
    expected = (2 / 12 - half, 2 / 12 + half)
    assert paired_share_interval(first, second) == pytest.approx(expected, abs=1e-6)


def test_agreement_everywhere_is_no_certainty() -> None:
    low, high = paired_share_interval([True] * 50, [True] * 50)
    assert -0.1 < low < 0 < high < 0.1
    assert low == pytest.approx(-high)


def test_pairing_uses_the_correlation() -> None:
    rng = np.random.default_rng(0)
    common = rng.uniform(size=200)
    first, second = common + 0.01, common
    difference = paired_difference(
        first.tolist(), [True] * 200, second.tolist(), [True] * 100 + [False] * 100
    )
    assert difference.n == 200
    assert difference.score == pytest.approx(0.01)
    assert difference.score_ci95 == pytest.approx((0.01, 0.01))
    assert difference.success == pytest.approx(0.5)
    assert difference.success_ci95[0] > 0.4


def test_pairs_must_be_pairs() -> None:
    with pytest.raises(ValueError, match=r"got \(1,\) and \(2,\)"):
        paired_difference([1.0], [True], [1.0, 1.0], [True, True])
