"""Seeds of an evaluation: parsing, printing, and the check against the training seeds."""

import re
import warnings
from collections.abc import Iterable, Sequence

MAX_SEED = 2**32 - 1
"""Largest seed that numpy's generators and every protocol take."""

_PART = re.compile(r"(\d+)(?:\s*-\s*(\d+))?")


class SeedOverlapWarning(UserWarning):
    """A policy is scored on initial states that its training data started from."""


def parse_seeds(text: str | int | Iterable[object]) -> list[int]:
    """Seeds from ``"100000-100499"`` (both ends included), ``"1,5,10-19"``, a number or a list.

    Raises:
        ValueError: quotes the part that is not understood, or the seed that is given twice.
    """
    if isinstance(text, Iterable) and not isinstance(text, str):
        parts = [str(part) for part in text]
    else:
        parts = str(text).split(",")
    seeds: list[int] = []
    for part in parts:
        match = _PART.fullmatch(part.strip())
        if match is None:
            raise ValueError(
                f"seeds: cannot read {part.strip()!r}; expected a number, a range such as "
                "100000-100499 (both ends included) or several of these with commas"
            )
        first = int(match[1])
        last = int(match[2]) if match[2] else first
        if last < first:
            raise ValueError(f"seeds: the range {part.strip()!r} ends before it begins")
        if last > MAX_SEED:
            raise ValueError(f"seeds: {last} is too large; the largest seed is {MAX_SEED}")
        seeds.extend(range(first, last + 1))
    if not seeds:
        raise ValueError("seeds: empty; expected for example 100000-100499")
    seen: set[int] = set()
    for seed in seeds:
        if seed in seen:
            raise ValueError(f"seeds: {seed} is given more than once")
        seen.add(seed)
    return seeds


def format_seeds(seeds: Sequence[int]) -> str:
    """Compact form: ``[3, 4, 5, 9]`` becomes ``"3-5,9"``; ``parse_seeds`` reads it back."""
    parts: list[str] = []
    start = 0
    for index in range(1, len(seeds) + 1):
        if index == len(seeds) or seeds[index] != seeds[index - 1] + 1:
            first, last = seeds[start], seeds[index - 1]
            parts.append(str(first) if first == last else f"{first}-{last}")
            start = index
    return ",".join(parts)


def warn_if_overlapping(seeds: Sequence[int], training: Iterable[int], source: str) -> bool:
    """Warn when ``seeds`` meet the seeds of the training data; True if they do.

    Args:
        seeds: of the evaluation.
        training: seeds that the training episodes started from.
        source: what was recorded from them, for the message.
    """
    common = sorted(set(seeds).intersection(training))
    if common:
        warnings.warn(
            f"{len(common)} of {len(seeds)} evaluation seeds ({format_seeds(common)}) are training "
            f"seeds of {source}: the score is not that of unseen initial states. Use seeds from "
            "100000 on.",
            SeedOverlapWarning,
            stacklevel=2,
        )
    return bool(common)
