"""Evaluation protocols: which environment, from which initial states, for how long.

Whatever the protocol, the score of an episode is its largest reward and success is
``info["is_success"]`` at any step. For Push-T the reward is ``clip(coverage / 0.95, 0, 1)`` and
success is coverage > 0.95, so this is Diffusion Policy's score (2303.04137, section V) beside the
plain share of episodes that reach the goal.
"""

import difflib
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import gymnasium
import numpy as np

from cmpolicy_envs import PUSHT_ID

ResetOptions = Callable[[int], dict[str, Any] | None]


@dataclass(frozen=True)
class EvalProtocol:
    """How a policy is scored; ``make_env`` takes gymnasium's keyword ``render_mode``."""

    name: str
    summary: str
    make_env: Callable[..., gymnasium.Env[Any, Any]]
    max_steps: int
    reset_options: ResetOptions
    """Options of ``env.reset(seed=seed, options=...)`` for a seed."""
    default_seeds: tuple[int, int] = (100_000, 100_499)
    """First and last seed of the full evaluation."""
    training_seeds: tuple[int, int] | None = None
    """Seeds (first, last) from which the public demonstrations of the task were recorded."""


def dp_initial_state(seed: int) -> list[float]:
    """Diffusion Policy's test state for a seed: [agent x, agent y, block x, block y, angle].

    Passed through ``reset_to_state``, which moves the block (position first, angle second).

    Raises:
        ValueError: the seed is outside [0, 2**32), which numpy's RandomState does not take.
    """
    if not 0 <= seed < 2**32:
        raise ValueError(f"seed {seed} is outside [0, 2**32)")
    rng = np.random.RandomState(seed)  # the generator that defines the protocol
    return [
        float(rng.randint(50, 450)),
        float(rng.randint(50, 450)),
        float(rng.randint(100, 400)),
        float(rng.randint(100, 400)),
        float(rng.randn() * 2 * np.pi - np.pi),
    ]


def _dp_reset(seed: int) -> dict[str, Any]:
    return {"reset_to_state": dp_initial_state(seed)}


def _plain_reset(seed: int) -> None:
    del seed


_make_pusht = partial(gymnasium.make, PUSHT_ID, disable_env_checker=True)
# The human demonstrations hold 206 episodes, recorded from seed 0 on.
_PUSHT_HUMAN_SEEDS = (0, 205)

PROTOCOLS: dict[str, EvalProtocol] = {
    protocol.name: protocol
    for protocol in (
        EvalProtocol(
            name="pusht-dp",
            summary="Push-T from Diffusion Policy's test states",
            make_env=_make_pusht,
            max_steps=300,
            reset_options=_dp_reset,
            training_seeds=_PUSHT_HUMAN_SEEDS,
        ),
        EvalProtocol(
            name="pusht-gym",
            summary="Push-T from gym-pusht's own reset(seed)",
            make_env=_make_pusht,
            max_steps=300,
            reset_options=_plain_reset,
            training_seeds=_PUSHT_HUMAN_SEEDS,
        ),
    )
}


def get_protocol(name: str) -> EvalProtocol:
    """Protocol by name; ValueError lists the known ones."""
    if name not in PROTOCOLS:
        near = difflib.get_close_matches(name, PROTOCOLS, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise ValueError(f"unknown protocol {name!r}; known: {', '.join(PROTOCOLS)}{hint}")
    return PROTOCOLS[name]
