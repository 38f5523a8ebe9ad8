"""Seeds: what is understood, what is refused, when a warning is due."""

import warnings
from typing import Any

import pytest

from cmpolicy_eval.seeds import SeedOverlapWarning, format_seeds, parse_seeds, warn_if_overlapping


@pytest.mark.parametrize(
    ("text", "seeds"),
    [
        ("100000-100003", [100000, 100001, 100002, 100003]),
        (7, [7]),
        ("7", [7]),
        ("1, 5,10-12", [1, 5, 10, 11, 12]),
        ([3, 1, 2], [3, 1, 2]),
        (["4-5", 9], [4, 5, 9]),
    ],
)
def test_seeds_are_read(text: Any, seeds: list[int]) -> None:
    assert parse_seeds(text) == seeds


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("5-3", "'5-3' ends before it begins"),
        ("a few", "cannot read 'a few'"),
        ("1,,2", "cannot read ''"),
        ("-4", "cannot read '-4'"),
        (1.5, "cannot read '1.5'"),
        ("3,1-4", "3 is given more than once"),
        ([], "empty"),
        (2**32, "largest seed is 4294967295"),
    ],
)
def test_bad_seeds_are_named(text: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        parse_seeds(text)


def test_overlap_with_the_training_seeds_warns() -> None:
    with pytest.warns(SeedOverlapWarning, match=r"2 of 3 .*\(204-205\) are training seeds of them"):
        assert warn_if_overlapping([204, 205, 206], range(206), "them")


def test_no_overlap_no_warning() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert not warn_if_overlapping([206], range(206), "them")


def test_compact_form() -> None:
    assert format_seeds([3, 4, 5, 9, 11, 12]) == "3-5,9,11-12"
