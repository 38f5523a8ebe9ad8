"""Seeds survive printing and reading."""

from hypothesis import given
from hypothesis import strategies as st

from cmpolicy_eval.seeds import MAX_SEED, format_seeds, parse_seeds


@given(st.lists(st.integers(0, 60) | st.integers(0, MAX_SEED), min_size=1, unique=True))
def test_seeds_survive_printing_and_reading(seeds: list[int]) -> None:
    assert parse_seeds(format_seeds(seeds)) == seeds
