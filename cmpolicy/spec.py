"""What a policy eats and gives: observation keys and shapes, action size, and the window in time.

The timeline of one decision at time t (To = n_obs_steps, T = horizon, Ta = n_action_steps)::

    time         t-To+1 ...  t    t+1  ...  t+Ta-1  ...  t-To+T
    observed     o      ...  o
    predicted    a      ...  a    a    ...  a       ...  a        T actions
    executed                 a    a    ...  a                     Ta actions

as in Diffusion Policy (Chi et al., RSS 2023, figure 2).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    from torch import Tensor  # where a policy runs without torch, its specification is read too


class SpecError(ValueError):
    """A policy specification, or an observation handed to a policy, that does not fit."""


@dataclass(frozen=True)
class PolicySpec:
    """Shapes and window of a policy.

    Args:
        obs: shape of one observation step per key: ``{"agent_pos": (2,), "keypoint": (9, 2)}``.
        action_dim: A, the size of one action.
        horizon: T, predicted actions per decision.
        n_obs_steps: To, observation steps a decision looks at.
        n_action_steps: Ta, actions executed before the next decision.

    Raises:
        SpecError: where the numbers cannot go together; the message holds them.
    """

    obs: dict[str, tuple[int, ...]]
    action_dim: int
    horizon: int
    n_obs_steps: int
    n_action_steps: int

    def __post_init__(self) -> None:
        for name in ("action_dim", "horizon", "n_obs_steps", "n_action_steps"):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise SpecError(f"{name} must be a whole number of at least 1, got {value!r}")
        object.__setattr__(self, "obs", _checked_shapes(self.obs))
        needed = self.n_obs_steps - 1 + self.n_action_steps
        if self.horizon < needed:
            raise SpecError(
                f"horizon={self.horizon} is too short: it starts at the oldest observation, so "
                f"n_obs_steps - 1 + n_action_steps = {needed} actions are needed; raise horizon or "
                f"lower n_action_steps={self.n_action_steps}"
            )

    @property
    def obs_dim(self) -> int:
        """Numbers in one observation step, all keys together."""
        return sum(int(np.prod(shape)) for shape in self.obs.values())

    @property
    def n_plan_steps(self) -> int:
        """P = T - To + 1: predicted actions from the newest observation on, at least Ta."""
        return self.horizon - self.n_obs_steps + 1

    def to_dict(self) -> dict[str, Any]:
        """A JSON-ready form; :meth:`from_dict` is its inverse."""
        return asdict(self) | {"obs": {key: list(shape) for key, shape in self.obs.items()}}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> PolicySpec:
        """Read what :meth:`to_dict` wrote."""
        try:
            obs = {str(key): tuple(shape) for key, shape in data["obs"].items()}
            rest = {n: data[n] for n in ("action_dim", "horizon", "n_obs_steps", "n_action_steps")}
        except (KeyError, TypeError, AttributeError) as error:
            raise SpecError(f"policy spec is incomplete: {error!r} in {data!r}") from error
        return cls(obs=obs, **rest)

    def check_obs(self, obs: Mapping[str, Tensor] | Mapping[str, npt.NDArray[Any]]) -> int:
        """Check a batch of observation histories, (B, To, ...) per key, and return B.

        Raises:
            SpecError: naming the missing or unknown keys, or the key whose shape is off.
        """
        if not isinstance(obs, Mapping):
            raise SpecError(
                f"observations must be a mapping from {sorted(self.obs)} to arrays, "
                f"got {type(obs).__name__}"
            )
        missing = sorted(self.obs.keys() - obs.keys())
        unknown = sorted(obs.keys() - self.obs.keys())
        if missing or unknown:
            raise SpecError(
                f"observation keys do not match the policy: missing {missing}, unknown {unknown}; "
                f"it was trained on {sorted(self.obs)}"
            )
        batch = 0  # set by the first key
        for key, shape in self.obs.items():
            got = tuple(np.shape(obs[key]))
            want = (self.n_obs_steps, *shape)
            if not got or got[1:] != want or got[0] < 1:
                raise SpecError(
                    f"observation {key!r} has shape {got}, expected "
                    f"({', '.join(map(str, ('batch', *want)))}): "
                    f"n_obs_steps={self.n_obs_steps} steps, oldest first"
                )
            if batch and got[0] != batch:
                raise SpecError(
                    f"observation {key!r} has batch size {got[0]}, the others have {batch}"
                )
            batch = got[0]
        return batch


def _checked_shapes(obs: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    if not obs:
        raise SpecError("a policy needs at least one observation key, got none")
    if "action" in obs:
        raise SpecError(
            "'action' is the name of what the policy predicts; give the observation another key, "
            "e.g. 'last_action'"
        )
    shapes: dict[str, tuple[int, ...]] = {}
    for key, shape in obs.items():
        try:
            shapes[key] = tuple(int(n) for n in shape)
        except (TypeError, ValueError):
            raise SpecError(
                f"observation {key!r} has shape {shape!r}; expected whole numbers, e.g. (9, 2)"
            ) from None
        if any(n < 1 for n in shapes[key]):
            raise SpecError(f"observation {key!r} has shape {shapes[key]}: every size must be >= 1")
    return shapes
