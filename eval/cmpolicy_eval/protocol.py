"""Evaluation protocols: which environment, from which initial states, for how long.

Whatever the protocol, the score of an episode is its largest reward and success is
``info["is_success"]`` at any step. For Push-T the reward is ``clip(coverage / 0.95, 0, 1)`` and
success is coverage > 0.95, so this is Diffusion Policy's score (2303.04137, section V) beside the
plain share of episodes that reach the goal.
"""

import difflib
import importlib
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import gymnasium

from cmpolicy_envs import PUSHT_ID, PUSHT_IMAGE_ID
from cmpolicy_envs.pusht_states import dp_initial_state
from cmpolicy_envs.robomimic_args import EnvArgs
from cmpolicy_envs.robomimic_tasks import TASKS, get_task
from cmpolicy_eval.rollout import DEFAULT_BATCH_SIZE

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
    control_hz: int = 10
    """Steps per second, the rate of a video."""
    batch_size: int = DEFAULT_BATCH_SIZE
    """Episodes at a time, and rows of a policy call, unless told otherwise."""


def _dp_reset(seed: int) -> dict[str, Any]:
    return {"reset_to_state": dp_initial_state(seed)}


def _plain_reset(seed: int) -> None:
    del seed


_make_pusht = partial(gymnasium.make, PUSHT_ID, disable_env_checker=True)
_make_pusht_image = partial(gymnasium.make, PUSHT_IMAGE_ID, disable_env_checker=True)
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
        EvalProtocol(
            name="pusht-image-dp",
            summary="Push-T seen by a camera, from Diffusion Policy's test states",
            make_env=_make_pusht_image,
            max_steps=300,
            reset_options=_dp_reset,
            training_seeds=_PUSHT_HUMAN_SEEDS,
        ),
    )
}


#: Protocols of Robomimic's tasks and the cameras that each shows.
ROBOMIMIC: dict[str, tuple[str, ...]] = {
    "robomimic-ph": (),
    "robomimic-ph-image": ("agentview", "robot0_eye_in_hand"),
}
PROTOCOL_NAMES = (*PROTOCOLS, *ROBOMIMIC)


def get_protocol(
    name: str, *, task: str | None = None, actions: str = "delta", env_args: str | None = None
) -> EvalProtocol:
    """Protocol by name.

    Args:
        name: one of :data:`PROTOCOL_NAMES`, or ``module:NAME`` of an :class:`EvalProtocol` of one's
            own; the module is looked for in the current folder, too.
        task: of Robomimic's: ``lift``, ``can``, ``square``, ``transport`` or ``tool_hang``.
        actions: of these: ``delta`` or ``absolute``.
        env_args: of these: robomimic's JSON that says which environment; None takes
            robosuite's own Panda with OSC_POSE.

    Raises:
        ValueError: an unknown name or task, no task where there are several, settings that the
            protocol does not have, or ``env_args`` that cannot be built.
    """
    check_protocol(name)
    if ":" in name:
        return _imported(name)
    if name in ROBOMIMIC:
        return _robomimic(name, task, actions, env_args)
    if task is not None:
        raise ValueError(f"protocol {name!r} is one task; it takes no task={task}")
    return PROTOCOLS[name]


def check_protocol(name: str) -> None:
    """Raise ValueError, listing the known ones, if there is no protocol of that name."""
    if ":" in name:
        _imported(name)
    elif name not in PROTOCOL_NAMES:
        near = difflib.get_close_matches(name, PROTOCOL_NAMES, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise ValueError(
            f"unknown protocol {name!r}; known: {', '.join(PROTOCOL_NAMES)}{hint}; "
            "or module:NAME of a protocol of your own"
        )


def _imported(name: str) -> EvalProtocol:
    module, _, attribute = name.partition(":")
    here = str(Path.cwd())
    if here not in sys.path:
        sys.path.append(here)  # also for the simulator processes, which get a copy
    try:
        found = getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError, ValueError) as error:
        raise ValueError(
            f"protocol {name!r} cannot be imported: {error}; expected module:NAME, with the module "
            f"in the current folder ({here}) or installed"
        ) from error
    if not isinstance(found, EvalProtocol):
        raise ValueError(
            f"protocol {name!r} is of type {type(found).__name__}, expected an EvalProtocol "
            "(cmpolicy_eval.protocol)"
        )
    return found


def _robomimic(name: str, task: str | None, actions: str, env_args: str | None) -> EvalProtocol:
    if task is None:
        raise ValueError(f"{name} needs a task: task={' | '.join(TASKS)}")
    known = get_task(task)
    arguments = None if env_args is None else EnvArgs.from_json(env_args)
    return EvalProtocol(
        name=f"{name} {known.name}",
        summary=f"Robomimic {known.name} in robosuite, {actions} actions, success at any step",
        # Not gymnasium.make: an episode's length is the protocol's own affair.
        make_env=partial(_make_robomimic, known.name, actions, arguments, ROBOMIMIC[name]),
        max_steps=known.max_steps,
        reset_options=_plain_reset,
        default_seeds=(100_000, 100_099),
        control_hz=20,
        # A robosuite environment takes 50 to 70 MB, and 0.2 s to make.
        batch_size=20,
    )


def _make_robomimic(
    task: str, actions: str, env_args: EnvArgs | None, cameras: tuple[str, ...], **kwargs: Any
) -> gymnasium.Env[Any, Any]:
    from cmpolicy_envs.robomimic import RobomimicEnv  # robosuite is an extra

    return RobomimicEnv(task, env_args=env_args, actions=actions, cameras=cameras, **kwargs)
