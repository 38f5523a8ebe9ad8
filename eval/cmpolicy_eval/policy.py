"""What a policy has to offer to be scored, and the check that it fits an environment."""

from collections.abc import Mapping
from typing import Any, Protocol

import numpy as np
from gymnasium import spaces
from numpy.typing import NDArray


class ActionChunkPolicy(Protocol):
    """A stateless policy that maps the last observations to the next actions.

    Optional attributes that are honoured when present:

    * ``spec`` with ``obs`` (key -> shape) and ``action_dim``: checked against the environment
      before the first step, and only the keys in ``spec.obs`` are handed to ``infer``;
    * ``spec.noise_shape`` (T, A): ``infer`` then takes ``noise`` (B, T, A), standard normal, drawn
      per episode from its seed, so that an episode does not depend on its neighbours in the batch;
    * ``warm_start``, unless it is None: ``infer_plan(obs, noise=noise, plan=plan)`` is called; it
      gives all actions (B, P, A), of which the first Ta are executed. Rows of ``plan`` (B, T, A)
      are ``spec.shifted(actions, Ta)`` of the call before, NaN at the first.
    """

    @property
    def n_obs_steps(self) -> int:
        """To: length of the observation history."""
        ...

    @property
    def n_action_steps(self) -> int:
        """Ta: number of actions executed per call."""
        ...

    def infer(self, obs: Mapping[str, NDArray[np.float32]]) -> NDArray[np.float32]:
        """Observations (B, To, ...) to actions (B, Ta, A), both in units of the environment."""
        ...


class PolicyMismatchError(ValueError):
    """Policy and environment disagree about observations or actions."""


def check_policy_fits(
    policy: ActionChunkPolicy, observation_space: spaces.Space[Any], action_space: spaces.Space[Any]
) -> tuple[str, ...]:
    """Observation keys to hand to the policy.

    Raises:
        PolicyMismatchError: names what the policy wants and what the environment gives.
    """
    if not isinstance(observation_space, spaces.Dict) or not isinstance(action_space, spaces.Box):
        raise PolicyMismatchError(
            "rollouts need an environment with Dict observations and Box actions, got "
            f"{type(observation_space).__name__} and {type(action_space).__name__}"
        )
    given = {key: tuple(space.shape or ()) for key, space in observation_space.spaces.items()}
    for name in ("n_obs_steps", "n_action_steps"):
        value = getattr(policy, name, None)
        if not isinstance(value, int) or value < 1:
            raise PolicyMismatchError(f"policy.{name} must be a positive int, got {value!r}")
    spec = getattr(policy, "spec", None)
    if spec is None:
        return tuple(given)
    wanted = {key: tuple(shape) for key, shape in spec.obs.items()}
    any_size = spec.images if getattr(spec, "resize", False) else ()
    wrong = [
        key
        for key, shape in wanted.items()
        if given.get(key) != shape
        and not (key in any_size and len(given.get(key, ())) == 3 and given[key][2:] == shape[2:])
    ]
    if wrong:
        raise PolicyMismatchError(
            f"the policy observes {_describe(wanted)}, but the environment gives "
            f"{_describe(given)}; not matching: {', '.join(wrong)}. Score it under a protocol of "
            "the task it was trained on, or train with data.obs naming these keys."
        )
    if action_space.shape != (spec.action_dim,):
        raise PolicyMismatchError(
            f"the policy gives actions of {spec.action_dim} numbers, but the environment takes "
            f"actions of shape {action_space.shape}. Score it under a protocol of its own task."
        )
    return tuple(wanted)


def _describe(shapes: Mapping[str, tuple[int, ...]]) -> str:
    return "{" + ", ".join(f"{key}: {shape}" for key, shape in shapes.items()) + "}"
