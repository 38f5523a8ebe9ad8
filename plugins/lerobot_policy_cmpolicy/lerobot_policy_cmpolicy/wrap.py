"""A bundle of cmpolicy as a checkpoint of LeRobot: ``cmpolicy-to-lerobot BUNDLE OUT``."""

from __future__ import annotations

import argparse
import sys
import warnings
from collections.abc import Mapping
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from lerobot.configs.types import FeatureType, PolicyFeature

from cmpolicy.nn.unet1d import UNet1DConfig
from cmpolicy.policy.bundle import BundleError, bundled_names, read_bundle
from cmpolicy.policy.card import with_header
from cmpolicy.policy.policy import ConsistencyPolicy
from cmpolicy.spec import PolicySpec
from cmpolicy_data.convert.lerobot.columns import feature_name
from lerobot_policy_cmpolicy.configuration_cmpolicy import CmpolicyConfig

if TYPE_CHECKING:
    from lerobot_policy_cmpolicy.modeling_cmpolicy import CmpolicyPolicy

P = TypeVar("P", bound="CmpolicyPolicy")
_ENV = "observation.environment_state"
#: Objectives whose networks predict what these samplers take; any other predicts a velocity.
_OBJECTIVES = {
    "restart": "ct",
    "regression": "regression",
    "mip": "mip",
    "ddpm": "ddpm",
    "ddim": "ddpm",
}


def is_bundle(name_or_path: str | PathLike[str]) -> bool:
    """Whether this is a bundle of cmpolicy: a folder with its normaliser, or a bundled name."""
    path = Path(name_or_path)
    return (path / "normalizer.safetensors").is_file() or (
        not path.is_dir() and str(name_or_path) in bundled_names()
    )


def config_of(policy: ConsistencyPolicy, names: Mapping[str, str] | None = None) -> CmpolicyConfig:
    """The plug-in's settings of a policy.

    Args:
        policy: its spec, networks and sampling are taken over.
        names: LeRobot's name of a key by cmpolicy's; by default ``observation.<key>``, and
            ``observation.images.<key>`` for frames whose name does not begin with ``image``.

    Raises:
        BundleError: the policy has what LeRobot's policies cannot have.
    """
    spec, net, encoder = policy.spec, policy.net_config, policy.encoder_config
    if spec.precise:
        raise BundleError(
            f"{list(spec.precise)} need float64, and LeRobot hands over float32: this policy "
            "cannot be driven by LeRobot"
        )
    if not isinstance(net, UNet1DConfig) or encoder.kind not in ("mlp", "compact", "resnet18"):
        raise BundleError(
            f"the plug-in knows the network unet1d and the encoders mlp, compact and resnet18, not "
            f"{net.kind} and {encoder.kind}"
        )
    names = _names(spec, names or {})
    inputs = {}
    for key, shape in spec.obs.items():
        kind = FeatureType.ENV if names[key] == _ENV else FeatureType.STATE
        if key in spec.images:
            kind, shape = FeatureType.VISUAL, (shape[2], *shape[:2])
        inputs[names[key]] = PolicyFeature(kind, shape)
    rotations = spec.action_rotations
    settings: dict[str, Any] = {encoder.kind: encoder}
    return CmpolicyConfig(
        n_obs_steps=spec.n_obs_steps,
        horizon=spec.horizon,
        n_action_steps=spec.n_action_steps,
        input_features=inputs,
        output_features={"action": PolicyFeature(FeatureType.ACTION, (spec.action_dim,))},
        path=policy.path_name,
        objective=_OBJECTIVES.get(policy.sampler, "psd"),  # that trains such a network further
        sampler=policy.sampler,
        nfe=policy.nfe,
        noise_scale=policy.noise_scale,
        down_dims=tuple(net.down_dims),
        kernel_size=net.kernel_size,
        n_groups=net.n_groups,
        time_dim=net.time_dim,
        encoder=encoder.kind,
        rotations=None
        if rotations is None
        else [f"{r.kind}:{','.join(map(str, r.dims))}" for r in rotations],
        resize=spec.resize,
        keys={name: key for key, name in names.items()},
        push_to_hub=False,
        **settings,
    )


def from_bundle(
    cls: type[P],
    name_or_path: str | PathLike[str],
    config: CmpolicyConfig | None = None,
    names: Mapping[str, str] | None = None,
) -> P:
    """The plug-in's policy with the weights and the normaliser of a bundle.

    Raises:
        BundleError: there is none, it is damaged, or ``config`` is of another policy.
    """
    source = ConsistencyPolicy.from_pretrained(name_or_path)
    if source.warm_start is not None:
        warnings.warn(
            f"{name_or_path} starts decisions from the plan before (warm_start="
            f"{source.warm_start}), which LeRobot does not hand on: here each starts from noise",
            stacklevel=2,
        )
    found = cls(config_of(source, names) if config is None else config)
    for policy in (found.policy, found.averaged):
        if policy.spec != source.spec or [*policy.spec.obs] != [*source.spec.obs]:
            raise BundleError(
                f"{name_or_path} has {source.spec}, and the settings ask for {policy.spec}"
            )
        policy.load_state_dict(source.state_dict())
    found.rate.fill_(source.control_hz or 0.0)
    found.take_loaded()
    return found.to(found.config.device).eval()


def to_lerobot(
    bundle: str | PathLike[str],
    out: str | PathLike[str],
    names: Mapping[str, str] | None = None,
) -> Path:
    """Write a bundle as a checkpoint for ``lerobot-eval --policy.path=OUT`` and ``lerobot-record``.

    Args:
        bundle: a folder, a bundled name such as ``pusht``, or a hub id.
        out: a folder that is not there yet.
        names: LeRobot's name of a key by cmpolicy's, see :func:`config_of`.

    Returns:
        The folder.

    Raises:
        BundleError: there is no such bundle, or LeRobot cannot drive it.
        FileExistsError: ``out`` is there already.
    """
    from lerobot_policy_cmpolicy.modeling_cmpolicy import CmpolicyPolicy
    from lerobot_policy_cmpolicy.processor_cmpolicy import make_cmpolicy_pre_post_processors

    folder = Path(out)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise FileExistsError(f"{folder} is there already; choose another folder, or remove it")
    policy = from_bundle(CmpolicyPolicy, bundle, names=names)
    policy.save_pretrained(folder)
    for pipeline in make_cmpolicy_pre_post_processors(policy.config):
        pipeline.save_pretrained(folder)
    card = f"# {folder.name}\n\nA policy of cmpolicy as a LeRobot checkpoint.\n"
    (folder / "README.md").write_text(with_header(card, read_bundle(bundle).metadata, "lerobot"))
    return folder


def _names(spec: PolicySpec, given: Mapping[str, str]) -> dict[str, str]:
    unknown = sorted(set(given) - set(spec.obs))
    if unknown:
        raise BundleError(f"there are no keys {unknown}; the policy has {sorted(spec.obs)}")
    named = {}
    for key in spec.obs:
        named[key] = given.get(key) or feature_name(key, frames=key in spec.images)
    return named


def main() -> int:
    """The command."""
    parser = argparse.ArgumentParser(
        prog="cmpolicy-to-lerobot", description="A policy bundle of cmpolicy for LeRobot's tools."
    )
    parser.add_argument("bundle", help="folder, bundled name such as pusht, or hub id")
    parser.add_argument("out", help="folder to write")
    parser.add_argument(
        "names",
        nargs="*",
        metavar="KEY=NAME",
        help="LeRobot's name of an observation, such as agent_pos=observation.state",
    )
    words = parser.parse_args()
    names = dict(word.split("=", 1) for word in words.names if "=" in word)
    if len(names) != len(words.names):
        parser.error("names are given as KEY=NAME, such as agent_pos=observation.state")
    try:
        folder = to_lerobot(words.bundle, words.out, names)
    except (OSError, ValueError) as error:
        print(f"cmpolicy-to-lerobot: {error}", file=sys.stderr)
        return 2
    print(f"{folder}: lerobot-eval --policy.path={folder} --env.type=...")
    return 0


if __name__ == "__main__":
    sys.exit(main())
