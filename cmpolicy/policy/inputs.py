"""A policy's parts, whether they fit together; and the arrays it is asked with, as tensors."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from cmpolicy.normalize import Normalizer
from cmpolicy.observation import read_observation
from cmpolicy.spec import PolicySpec, SpecError


def check_normalizer(spec: PolicySpec, normalizer: Normalizer) -> None:
    """Raise ValueError unless the normaliser knows the action and all numbers, in their shapes."""
    shapes = {**spec.states, "action": (spec.action_dim,)}
    arrays = normalizer.to_arrays()
    for key, shape in shapes.items():
        scale = arrays.get(f"{key}.scale")
        got = None if scale is None else tuple(scale.shape)
        if got != shape:
            raise ValueError(
                f"normaliser and policy disagree on {key!r}: the policy has shape {shape}, "
                f"the normaliser {got}"
            )


def checked_tensors(
    spec: PolicySpec, obs: Mapping[str, Any], device: torch.device
) -> dict[str, Tensor]:
    """Observation tensors (B, To, ...) of the policy's keys; frames of another size are resized.

    Raises:
        SpecError: something that is no tensor, or frames that are not uint8.
    """
    tensors = {}
    for key, shape in spec.obs.items():
        value = obs[key]
        if not isinstance(value, Tensor):
            raise SpecError(
                f"observation {key!r} is a {type(value).__name__}; this takes tensors on "
                f"{device}, and policy.infer(obs) takes arrays"
            )
        if key in spec.images and value.dtype is not torch.uint8:
            raise SpecError(
                f"observation {key!r} holds {value.dtype}; frames are torch.uint8 RGB in "
                "0..255, (frames * 255).round().to(torch.uint8) if they are in 0..1"
            )
        if spec.resize and key in spec.images and value.shape[2:] != shape:
            value = torch.from_numpy(read_observation(spec, key, value.numpy(force=True)))
            value = value.to(device)
        tensors[key] = value
    return tensors


def obs_tensors(
    spec: PolicySpec,
    obs: Mapping[str, npt.NDArray[Any]],
    dtype: torch.dtype,
    device: torch.device,
) -> dict[str, Tensor]:
    """Observations (B, To, ...) per key as tensors there; frames and precise numbers keep theirs.

    Raises:
        SpecError: not numbers, or NaN or inf (key and count).
    """
    tensors = {}
    for key in spec.obs:
        # a copy of what torch does not take: received messages, which must not be written to, and
        # flipped frames, whose strides are negative
        value = np.require(read_observation(spec, key, obs[key]), requirements=["C", "W"])
        kept = key in spec.images or key in spec.precise
        tensors[key] = torch.as_tensor(value, dtype=None if kept else dtype, device=device)
    return tensors
