"""What a policy has to offer to drive a robot; numpy on both sides, no torch.

Kept by ``ConsistencyPolicy``, by its exports and by the client of a policy server.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol, runtime_checkable

from numpy.typing import NDArray

from cmpolicy.robot.schedule import Window
from cmpolicy.spec import PolicySpec

Array = NDArray[Any]


@runtime_checkable
class ChunkPolicy(Protocol):
    """A stateless policy: observation history in, a plan of actions out.

    Legend: B batch, To observation steps, T horizon, Ta executed actions, A action size,
    P = T - To + 1 planned actions (``spec.n_plan_steps``). Units are the robot's own::

        time          t-To+1 ...  t    t+1  ...  t+Ta-1  ...  t+P-1
        obs           o      ...  o
        infer                     a    a    ...  a                      (B, Ta, A)
        infer_plan                a    a    ...  a       ...  a         (B, P, A)

    A policy may have an attribute ``warm_start``. Unless that is None, ``infer_plan`` takes
    ``plan`` (B, T, A) beside the noise: the plan before, see :func:`warm_plan`.
    """

    @property
    def spec(self) -> PolicySpec:
        """Observation keys and shapes, A, T, To and Ta."""
        ...

    @property
    def n_obs_steps(self) -> int:
        """To: length of the observation history."""
        ...

    @property
    def n_action_steps(self) -> int:
        """Ta: actions executed per call."""
        ...

    def infer(self, obs: Mapping[str, Array], noise: Array | None = None) -> Array:
        """The actions to execute now.

        Args:
            obs: (B, To, ...) per key of ``spec.obs``, oldest first.
            noise: (B, T, A), standard normal (the policy scales it); drawn inside if not given.

        Returns:
            (B, Ta, A).

        Raises:
            SpecError: a key, shape or value that does not fit.
        """
        ...

    def infer_plan(self, obs: Mapping[str, Array], noise: Array | None = None) -> Array:
        """As :meth:`infer`, but every action from the newest observation on: (B, P, A)."""
        ...


def warm_plan(policy: ChunkPolicy, running: tuple[Array, int] | None) -> Array | None:
    """What a decision starts from: the running plan as a trajectory of now, (1, T, A).

    Args:
        policy: that decides.
        running: the newest plan (P, A), and how many of its steps are over; None before one.

    Returns:
        An array of its own, or None where the policy starts from noise.
    """
    if running is None or getattr(policy, "warm_start", None) is None:
        return None
    return policy.spec.shifted(*running)[None]


def plan_window(policy: ChunkPolicy) -> Window:
    """The policy's P, Ta and A.

    Raises:
        TypeError: the object does not keep the protocol; names what it lacks.
    """
    names = ("spec", "n_obs_steps", "n_action_steps", "infer", "infer_plan")
    missing = [name for name in names if not hasattr(policy, name)]
    if missing:
        raise TypeError(
            f"{type(policy).__name__} cannot drive a robot: it has no {', '.join(missing)}. "
            "Expected a ConsistencyPolicy, OnnxPolicy, RemotePolicy or another ChunkPolicy "
            "(cmpolicy.robot.policy)"
        )
    spec = policy.spec
    return Window(spec.n_plan_steps, spec.n_action_steps, spec.action_dim, spec.action_rotations)
