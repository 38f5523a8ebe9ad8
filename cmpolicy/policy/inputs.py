"""What a policy is made of and asked: whether it fits together, and arrays as tensors."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from cmpolicy.normalize import Normalizer
from cmpolicy.observation import read_observation
from cmpolicy.policy.bundle import Bundle
from cmpolicy.spec import PolicySpec


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


def check_sizes(bundle: Bundle) -> None:
    """Raise ValueError unless the network and the encoder are of the stored tensors' shapes."""
    with torch.device("meta"):
        encoder = bundle.encoder.build(bundle.spec)
        feature_dim = int(cast(Any, encoder).feature_dim)
        net = bundle.net.build(action_dim=bundle.spec.action_dim, feature_dim=feature_dim)
    for start, module in (("net.", net), ("encoder.", encoder)):
        for name, value in module.state_dict().items():
            stored = bundle.weights.get(start + name)
            if stored is not None and stored.shape != value.shape:
                raise ValueError(
                    f"weight {start + name!r} is of shape {tuple(stored.shape)}, the configuration "
                    f"asks for {tuple(value.shape)}"
                )


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
        # a copy of what must not be written to, such as a received message: torch would warn
        value = np.require(read_observation(spec, key, obs[key]), requirements="W")
        kept = key in spec.images or key in spec.precise
        tensors[key] = torch.as_tensor(value, dtype=None if kept else dtype, device=device)
    return tensors
