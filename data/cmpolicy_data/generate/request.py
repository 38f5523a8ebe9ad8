"""What a generator of demonstrations is asked for, looked at before anything is generated."""

from __future__ import annotations

import shlex
from collections.abc import Callable
from pathlib import Path

#: From there on seeds are of evaluation: nothing is trained on from where policies are scored.
FIRST_EVALUATION_SEED = 100_000


def check_request(
    what: str,
    out: Path,
    suffixes: tuple[str, ...],
    episodes: int,
    seed: int,
    workers: int,
    is_ours: Callable[[Path], bool],
) -> None:
    """Raise ValueError or OSError for what cannot be, or would replace what is not ours."""
    for name, value in (("episodes", episodes), ("workers", workers)):
        if value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}.")
    if seed < 0 or seed + episodes > FIRST_EVALUATION_SEED:
        raise ValueError(
            f"seed must be at least 0 and seed + episodes at most {FIRST_EVALUATION_SEED} (from "
            f"there on seeds belong to evaluation), got seed={seed} with {episodes} episodes."
        )
    if out.suffix not in suffixes:
        raise ValueError(f"out must be a path that ends in {suffixes[0]}, got {out}.")
    if not out.parent.is_dir():
        raise FileNotFoundError(f"{out.parent} is not a folder. Create it first.")
    if out.exists() and not is_ours(out):
        raise FileExistsError(
            f"{shlex.quote(str(out))} exists and was not written by `cmpolicy data generate "
            f"{what}`. Choose another path or remove it."
        )
