"""A policy as what a bundle holds, and back."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, TypeVar, cast

import torch

from cmpolicy.flow.sampler import SamplerKind
from cmpolicy.normalize import Normalizer
from cmpolicy.policy.bundle import Bundle

if TYPE_CHECKING:
    from cmpolicy.policy.policy import ConsistencyPolicy

    Policy = TypeVar("Policy", bound=ConsistencyPolicy)


def pack(policy: ConsistencyPolicy, metadata: Mapping[str, Any]) -> Bundle:
    """The policy with its weights as they are."""
    modules = {"net": policy.net, "encoder": policy.encoder}
    weights = {
        f"{name}.{key}": value
        for name, module in modules.items()
        for key, value in module.state_dict().items()
    }
    return Bundle(
        spec=policy.spec,
        net=policy.net_config,
        encoder=policy.encoder_config,
        path=policy.path_name,
        sampler=policy.sampler,
        nfe=policy.nfe,
        noise_scale=policy.noise_scale,
        control_hz=policy.control_hz,
        weights=weights,
        normalizer=policy.normalizer.to_arrays(),
        metadata=dict(metadata),
        warm_start=policy.warm_start,
    )


def unpack(bundle: Bundle, kind: type[Policy]) -> Policy:
    """The inverse of :func:`pack`.

    Raises:
        BundleError: configuration and tensors do not fit together.
    """
    with bundle.errors_named():
        _check_sizes(bundle)  # before anything of that size is allocated
        policy = kind(
            bundle.spec,
            bundle.net,
            Normalizer.from_arrays(bundle.normalizer),
            encoder=bundle.encoder,
            path=bundle.path,
            sampler=cast(SamplerKind, bundle.sampler),
            nfe=bundle.nfe,
        )
        policy.noise_scale, policy.control_hz = bundle.noise_scale, bundle.control_hz
        policy.warm_start, policy.metadata = bundle.warm_start, bundle.metadata
        for name, module in {"net": policy.net, "encoder": policy.encoder}.items():
            start = f"{name}."
            module.load_state_dict(
                {
                    key.removeprefix(start): value
                    for key, value in bundle.weights.items()
                    if key.startswith(start)
                }
            )
    return policy


def _check_sizes(bundle: Bundle) -> None:
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
