"""A policy ready to be scored: from a bundle, an exported file, or an object of the caller's."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from cmpolicy.experiment.protocols import Simulator, own_protocol
from cmpolicy.export.runtime import ExportedRuntime, ExportFacts, is_exported, open_exported
from cmpolicy.flow.sampler import check_sampler, get_sampler
from cmpolicy.schema import ConfigError
from cmpolicy_eval.policy import ActionChunkPolicy

if TYPE_CHECKING:
    from cmpolicy.experiment.evaluate import EvalSettings


@dataclass(frozen=True)
class ScoredPolicy:
    """A policy ready to be scored: its label in tables, the data it was trained on, its device.

    ``nfe`` is its own number of evaluations, ``protocol`` and ``simulator`` tell of its task.
    """

    policy: ActionChunkPolicy
    nfe: int
    set_nfe: Callable[[int], None]
    label: str
    data: str | None = None
    device: str = "cpu"
    protocol: str | None = None
    simulator: Simulator = field(default_factory=Simulator)


def open_policy(settings: EvalSettings) -> ScoredPolicy:
    """What ``settings.policy`` names."""
    return _open_exported(settings) if is_exported(settings.policy) else _open_bundle(settings)


def given_policy(policy: Any, settings: EvalSettings) -> ScoredPolicy:
    """A policy object of the caller's; its settings are put back by nobody, so none are changed."""
    for name in ("sampler", "noise_scale", "time_floor", "n_action_steps", "warm_start"):
        if getattr(settings, name) is not None:
            raise ConfigError(f"{name}={getattr(settings, name)}: set it on the policy itself")
    own = int(getattr(policy, "nfe", 1))
    if settings.nfe is not None and settings.nfe != (own,):
        if not hasattr(policy, "nfe"):
            raise ConfigError(f"nfe={settings.nfe[0]}, but {type(policy).__name__} has no nfe")
        policy = _WithNfe(policy, settings.nfe[0])
    metadata = getattr(policy, "metadata", None)
    if not isinstance(metadata, Mapping):  # of another kind of policy
        metadata = {}
    return ScoredPolicy(
        policy,
        own,
        lambda nfe: None,
        settings.name or settings.policy,
        device=str(getattr(policy, "device", "cpu")),
        **(_told_by(policy.facts) if isinstance(policy, ExportedRuntime) else _told(metadata)),
    )


def _told(metadata: Mapping[str, Any]) -> dict[str, Any]:
    """What a bundle tells of its task."""
    return {
        "data": metadata.get("data"),
        "protocol": own_protocol(metadata),
        "simulator": Simulator.from_mapping(metadata.get("simulator", {})),
    }


def _told_by(facts: ExportFacts) -> dict[str, Any]:
    """What an exported file tells of its task."""
    simulator = Simulator.from_mapping(facts.simulator)
    return {"data": facts.data, "protocol": facts.protocol, "simulator": simulator}


class _WithNfe:
    """A policy asked with another number of evaluations than its own, without changing it."""

    def __init__(self, policy: Any, nfe: int) -> None:
        self._policy, self._nfe = policy, nfe

    def __getattr__(self, name: str) -> Any:
        return getattr(self._policy, name)

    @property
    def spec(self) -> Any:
        """The policy's, with the noise that so many evaluations take."""
        spec = self._policy.spec
        kind = getattr(self._policy, "sampler", None)
        if kind is None:
            return spec
        return replace(spec, n_noises=get_sampler(kind).n_noises(self._nfe))

    def infer(self, obs: Any, noise: Any = None) -> Any:
        return self._policy.infer(obs, noise, nfe=self._nfe)

    def infer_plan(self, obs: Any, noise: Any = None, plan: Any = None) -> Any:
        return self._policy.infer_plan(obs, noise, nfe=self._nfe, plan=plan)


def _open_bundle(settings: EvalSettings) -> ScoredPolicy:
    import torch

    from cmpolicy.policy.policy import ConsistencyPolicy
    from cmpolicy.training.device import choose_device

    device = choose_device(settings.device)
    policy = ConsistencyPolicy.from_pretrained(settings.policy, device)
    label = settings.name or settings.policy
    if settings.sampler is not None and settings.sampler != policy.sampler:
        check_sampler(settings.sampler, policy.sampler)
        label += f" [{settings.sampler}]"
        policy.sampler = settings.sampler
    words = {"noise_scale": "noise", "n_action_steps": "steps", "warm_start": "warm"}
    for name, word in words.items():
        value = getattr(settings, name)
        if value is not None and value != getattr(policy, name):
            label += f" [{word} {value}]"
            setattr(policy, name, value)
    if settings.time_floor is not None:
        label += f" [floor {settings.time_floor}]"
        policy.time_floor = settings.time_floor
    is_gpu = device.type == "cuda"
    return ScoredPolicy(
        policy,
        policy.nfe,
        lambda nfe: setattr(policy, "nfe", nfe),
        label,
        device=f"cuda ({torch.cuda.get_device_name(policy.device)})" if is_gpu else "cpu",
        **_told(policy.metadata),
    )


def _open_exported(settings: EvalSettings) -> ScoredPolicy:
    """What was fixed at export cannot be set here."""
    policy = open_exported(settings.policy)
    facts = policy.facts
    again = f"export it again: cmpolicy export policy=<bundle> out={settings.policy}"
    if settings.nfe not in (None, (facts.nfe,)):
        raise ConfigError(
            f"{settings.policy} makes {facts.nfe} evaluation(s), not nfe={list(settings.nfe or ())}"
            f"; leave nfe out, or {again} nfe=..."
        )
    for name in ("sampler", "noise_scale", "n_action_steps", "warm_start"):
        own = getattr(policy if name == "n_action_steps" else facts, name)
        if getattr(settings, name) not in (None, own):
            raise ConfigError(
                f"{settings.policy} has {name}={own}, not {getattr(settings, name)}; set it in the "
                f"bundle and {again}"
            )
    if settings.time_floor is not None:
        raise ConfigError(
            f"{settings.policy} has fixed times; leave out time_floor, or give a bundle"
        )
    if settings.device == "cuda":
        raise ConfigError(f"{settings.policy} runs on the CPU; give device=cpu or a bundle")
    return ScoredPolicy(
        policy,
        facts.nfe,
        lambda nfe: None,
        settings.name or settings.policy,
        **_told_by(facts),
    )
