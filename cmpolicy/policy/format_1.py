"""Policy bundles of format version 1: the encoder inside the network, no number of evaluations."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor


def from_format_1(
    config: dict[str, Any], weights: dict[str, Tensor]
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The present form of a bundle whose network held its encoder, as ``obs``."""
    net, spec = dict(config["net"]), dict(config["spec"])
    encoder = {"kind": "mlp", "dim": net.pop("obs_dim")}
    metadata = config.get("metadata", {})
    spec["action_rotations"] = _rotations(metadata, spec.get("action_dim"))
    _rename_samples(metadata)
    changed = {
        "spec": spec,
        "net": {"kind": "unet1d", **net},
        "encoder": encoder,
        "nfe": metadata.get("nfe", 1),
        "metadata": metadata,
    }
    renamed = {
        name.replace("obs.", "encoder.", 1) if name.startswith("obs.") else f"net.{name}": value
        for name, value in weights.items()
    }
    return config | changed, renamed


def _rotations(metadata: Mapping[str, Any], size: Any) -> list[Any] | None:
    """Which action dimensions are rotations, told by the task; None where nothing is known."""
    protocol = metadata.get("config", {}).get("task", {}).get("protocol")
    actions = metadata.get("simulator", {}).get("actions")
    if str(protocol).startswith("pusht-") or actions == "delta":
        return []  # positions; relative commands, which may be averaged
    if actions == "absolute" and isinstance(size, int):  # per arm: position, 6-D rotation, gripper
        arms = range(0, size, 10)
        return [{"kind": "rotation_6d", "dims": list(range(a + 3, a + 9))} for a in arms]
    return None


def _rename_samples(metadata: dict[str, Any]) -> None:
    """Format version 1 called training examples "samples"."""
    for facts in (metadata, metadata.get("config", {})):
        if "samples" in facts:
            facts["examples"] = facts.pop("samples")
    if "start" in metadata:
        _rename_samples(metadata["start"])
