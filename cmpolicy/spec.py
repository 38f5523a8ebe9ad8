"""Inputs and outputs of a policy: observation keys and shapes, action size, window in time.

The timeline of one decision at time t (To = n_obs_steps, T = horizon, Ta = n_action_steps)::

    time         t-To+1 ...  t    t+1  ...  t+Ta-1  ...  t-To+T
    observed     o      ...  o
    predicted    a      ...  a    a    ...  a       ...  a        T actions
    executed                 a    a    ...  a                     Ta actions

as in Diffusion Policy (Chi et al., RSS 2023, figure 2).
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Literal, get_args

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    from torch import Tensor  # where a policy runs without torch, its specification is read too


class SpecError(ValueError):
    """A policy specification, or an observation handed to a policy, that does not fit."""


_log = logging.getLogger(__name__)

#: Keys of a message to the server that are not observations.
RESERVED = ("step", "reset", "seed", "noise", "plan")

RotationKind = Literal["angle", "quaternion", "axis_angle", "rotation_6d"]
_ROTATION_SIZES = {"angle": 1, "quaternion": 4, "axis_angle": 3, "rotation_6d": 6}


@dataclass(frozen=True)
class Rotation:
    """Action dimensions that hold a rotation and cannot be averaged number by number.

    Args:
        kind: ``angle`` (radians, 1 number), ``axis_angle`` (radians, 3), ``quaternion`` (4, in
            either order of its parts), ``rotation_6d`` (6: the first two columns of the matrix).
        dims: the dimensions, in order.

    Raises:
        SpecError: an unknown kind, or another number of dimensions than the kind has.
    """

    kind: RotationKind
    dims: tuple[int, ...]

    def __post_init__(self) -> None:
        if self.kind not in get_args(RotationKind):
            raise SpecError(f"unknown rotation {self.kind!r}; known: {get_args(RotationKind)}")
        object.__setattr__(self, "dims", tuple(int(n) for n in self.dims))
        if len(self.dims) != _ROTATION_SIZES[self.kind]:
            raise SpecError(
                f"a rotation of kind {self.kind!r} has {_ROTATION_SIZES[self.kind]} numbers, got "
                f"dimensions {list(self.dims)}"
            )


@dataclass(frozen=True)
class PolicySpec:
    """Shapes and window of a policy.

    Args:
        obs: shape of one observation step per key: ``{"agent_pos": (2,), "keypoint": (9, 2)}``.
        action_dim: A, the size of one action.
        horizon: T, predicted actions per decision.
        n_obs_steps: To, observation steps a decision looks at.
        n_action_steps: Ta, actions executed before the next decision.
        action_rotations: which action dimensions are rotations; empty where none is, None where
            nothing is known about it (plans are then not blended).
        images: keys of ``obs`` that are camera frames, (H, W, 3) uint8 RGB. All others are numbers.
        precise: keys of ``obs`` whose numbers need float64, such as positions on a map; all other
            numbers are float32.
        resize: whether frames of another size are brought to this one, proportions kept, or
            refused.
        n_noises: K, draws of noise that one decision takes; a sampler with fresh noise in every
            evaluation takes several.

    Raises:
        SpecError: where the numbers cannot go together; the message holds them.
    """

    obs: dict[str, tuple[int, ...]]
    action_dim: int
    horizon: int
    n_obs_steps: int
    n_action_steps: int
    action_rotations: tuple[Rotation, ...] | None = None
    images: tuple[str, ...] = ()
    resize: bool = False
    precise: tuple[str, ...] = ()
    n_noises: int = 1

    def __post_init__(self) -> None:
        for name in ("action_dim", "horizon", "n_obs_steps", "n_action_steps", "n_noises"):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise SpecError(f"{name} must be a whole number of at least 1, got {value!r}")
        object.__setattr__(self, "obs", _checked_shapes(self.obs))
        object.__setattr__(self, "images", tuple(str(key) for key in self.images))
        object.__setattr__(self, "precise", tuple(str(key) for key in self.precise))
        for key in self.precise:
            if key not in self.obs or key in self.images:
                raise SpecError(f"precise names {key!r}, which is none of {sorted(self.states)}")
        for key in self.images:
            shape = self.obs.get(key)
            if shape is None or len(shape) != 3 or shape[2] != 3:
                raise SpecError(
                    f"image {key!r} has shape {shape}, expected (height, width, 3): RGB, channels "
                    "last"
                )
        if self.action_rotations is not None:
            object.__setattr__(self, "action_rotations", tuple(self.action_rotations))
            _check_rotations(self.action_rotations, self.action_dim)
        needed = self.n_obs_steps - 1 + self.n_action_steps
        if self.horizon < needed:
            raise SpecError(
                f"horizon={self.horizon} is too short: it starts at the oldest observation, so "
                f"n_obs_steps - 1 + n_action_steps = {needed} actions are needed; raise horizon or "
                f"lower n_action_steps={self.n_action_steps}"
            )

    @property
    def states(self) -> dict[str, tuple[int, ...]]:
        """Shapes of the keys that are not images."""
        return {key: shape for key, shape in self.obs.items() if key not in self.images}

    def dtype(self, key: str) -> type[np.uint8] | type[np.float32] | type[np.float64]:
        """Of a key's values: uint8 for images, float64 for precise numbers, else float32."""
        if key in self.images:
            return np.uint8
        return np.float64 if key in self.precise else np.float32

    def zeros(self, batch: int = 1) -> dict[str, npt.NDArray[Any]]:
        """Observation histories of zeros, (batch, To, ...) per key, of the right dtypes."""
        return {
            key: np.zeros((batch, self.n_obs_steps, *shape), self.dtype(key))
            for key, shape in self.obs.items()
        }

    def message_bytes(self) -> int:
        """Bytes of one history, its noise and its plan: 8 for a number, one for a grey level."""
        sizes = {key: int(np.prod(shape)) for key, shape in self.obs.items()}
        step = sum(n if key in self.images else 8 * n for key, n in sizes.items())
        numbers = int(np.prod(self.noise_shape)) + self.horizon * self.action_dim
        return self.n_obs_steps * step + 8 * numbers

    @property
    def noise_shape(self) -> tuple[int, ...]:
        """(T, A): shape of the noise of one decision; (K, T, A) where it takes K > 1 draws."""
        return self.noise_shape_of(self.n_noises)

    def noise_shape_of(self, n_noises: int) -> tuple[int, ...]:
        """:attr:`noise_shape` of a decision that takes so many draws."""
        one = (self.horizon, self.action_dim)
        return one if n_noises == 1 else (n_noises, *one)

    @property
    def n_plan_steps(self) -> int:
        """P = T - To + 1: predicted actions from the newest observation on, at least Ta."""
        return self.horizon - self.n_obs_steps + 1

    def shifted(self, plan: npt.NDArray[Any], steps: int) -> npt.NDArray[Any]:
        """A plan of ``steps`` steps ago as a trajectory of now: what a warm start begins from.

        Args:
            plan: (P, A), every action from the observation of that time on.
            steps: control steps that have passed since, at least 0.

        Returns:
            (T, A): what the plan held for each step of the present window. Steps before its first
            action have the first, steps beyond its last one the last. NaN, which stands for no
            plan, where it ended before now.
        """
        if steps > len(plan):
            return np.full(self.noise_shape_of(1), np.nan)
        first = steps - self.n_obs_steps + 1
        rows = np.arange(first, first + self.horizon).clip(0, len(plan) - 1)
        trajectory: npt.NDArray[Any] = plan[rows]
        return trajectory

    def to_dict(self) -> dict[str, Any]:
        """A JSON-ready form; :meth:`from_dict` is its inverse."""
        plain = asdict(self) | {"obs": {key: list(shape) for key, shape in self.obs.items()}}
        if self.images:
            plain["images"] = list(self.images)
        else:
            del plain["images"]  # older readers know no images
        if not self.resize:
            del plain["resize"]
        if self.n_noises == 1:
            del plain["n_noises"]
        if self.precise:
            plain["precise"] = list(self.precise)
        else:
            del plain["precise"]
        if self.action_rotations is None:
            del plain["action_rotations"]
        else:
            plain["action_rotations"] = [
                {"kind": rotation.kind, "dims": list(rotation.dims)}
                for rotation in self.action_rotations
            ]
        return plain

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> PolicySpec:
        """Read what :meth:`to_dict` wrote."""
        try:
            obs = {str(key): tuple(shape) for key, shape in data["obs"].items()}
            rest = {n: data[n] for n in ("action_dim", "horizon", "n_obs_steps", "n_action_steps")}
            rest["images"] = tuple(data.get("images", ()))
            rest["precise"] = tuple(data.get("precise", ()))
            rest["resize"] = bool(data.get("resize", False))
            rest["n_noises"] = data.get("n_noises", 1)
            if data.get("action_rotations") is not None:
                rest["action_rotations"] = tuple(Rotation(**r) for r in data["action_rotations"])
        except (KeyError, TypeError, AttributeError) as error:
            raise SpecError(f"policy spec is incomplete: {error!r} in {data!r}") from error
        return cls(obs=obs, **rest)

    def check_obs(self, obs: Mapping[str, Tensor] | Mapping[str, npt.NDArray[Any]]) -> int:
        """Check a batch of observation histories, (B, To, ...) per key, and return B.

        Keys that the policy does not know are ignored; the first time, the log names them.

        Raises:
            SpecError: naming the missing keys, or the key whose shape does not fit.
        """
        if not isinstance(obs, Mapping):
            raise SpecError(
                f"observations must be a mapping from {sorted(self.obs)} to arrays, "
                f"got {type(obs).__name__}"
            )
        if len(obs) != len(self.obs) or obs.keys() != self.obs.keys():
            self.check_keys(obs)
        batch = 0  # set by the first key
        for key, shape in self.obs.items():
            got = tuple(np.shape(obs[key]))
            want: tuple[Any, ...] = (self.n_obs_steps, *shape)
            any_size = self.resize and key in self.images
            if any_size and len(got) == 5 and got[4] == 3:
                want = (self.n_obs_steps, *got[2:])
            if not got or got[1:] != want or got[0] < 1:
                want = (self.n_obs_steps, "height", "width", 3) if any_size else want
                first = key in self.images and len(got) == 5 and got[2] == 3 != got[4]
                hint = "; its channels are first: np.moveaxis(frames, -3, -1)" if first else ""
                raise SpecError(
                    f"observation {key!r} has shape {got}, expected "
                    f"({', '.join(map(str, ('batch', *want)))}): "
                    f"n_obs_steps={self.n_obs_steps} steps, oldest first{hint}"
                )
            if batch and got[0] != batch:
                raise SpecError(
                    f"observation {key!r} has batch size {got[0]}, the others have {batch}"
                )
            batch = got[0]
        return batch

    def check_keys(self, obs: Mapping[str, Any]) -> None:
        """Whether every key of the policy is there; other keys are ignored, and logged once.

        Raises:
            SpecError: naming the missing keys.
        """
        missing = sorted(self.obs.keys() - obs.keys())
        if missing:
            raise SpecError(
                f"observation keys are missing: {missing}; the policy was trained on "
                f"{sorted(self.obs)}, got {sorted(map(str, obs))}"
            )
        self.note_ignored(obs)

    def note_ignored(self, obs: Mapping[str, Any]) -> None:
        """Log the keys that the policy does not know, once per process."""
        unknown = tuple(sorted(str(key) for key in obs.keys() - self.obs.keys()))
        if unknown and unknown not in _ignored:
            _ignored.add(unknown)
            _log.warning(
                "observation keys %s are ignored: the policy was trained on %s",
                list(unknown),
                sorted(self.obs),
            )


def check_warm_start(value: float | None) -> float | None:
    """A start time of decisions that have a plan, in (0, 1], or None for no warm start.

    Raises:
        ValueError: anything else, such as NaN.
    """
    if value is None:
        return None
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if not is_number or not 0 < value <= 1:
        raise ValueError(
            f"warm_start={value!r} must be a time in (0, 1]: near 0 a decision stays with the plan "
            "before it, at 1 it begins from noise alone; leave it out for no warm start"
        )
    return float(value)


#: Sets of ignored keys that were logged in this process.
_ignored: set[tuple[str, ...]] = set()


def _check_rotations(rotations: Sequence[Rotation], action_dim: int) -> None:
    dims = [dim for rotation in rotations for dim in rotation.dims]
    outside = [dim for dim in dims if not 0 <= dim < action_dim]
    if outside or len(set(dims)) != len(dims):
        raise SpecError(
            f"action_rotations name dimensions {dims}: each must be in 0..{action_dim - 1} and "
            "belong to one rotation"
        )


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
