"""The settings of ``--policy.type=cmpolicy``."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from importlib.resources import files
from typing import Any, Literal, get_origin, get_type_hints

import draccus
import yaml
from lerobot.configs.policies import PreTrainedConfig
from lerobot.configs.types import NormalizationMode
from lerobot.optim.optimizers import AdamWConfig
from lerobot.optim.schedulers import LRSchedulerConfig
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from cmpolicy.experiment.config import parse_rotation
from cmpolicy.flow.objectives import (
    FlowMatching,
    Isd,
    Objective,
    ProgressiveSelfDistillation,
    build_objective,
)
from cmpolicy.flow.path import get_path
from cmpolicy.flow.sampler import SAMPLERS, SamplerKind, get_sampler
from cmpolicy.nn.encoders.image import CompactEncoderConfig, ResNet18EncoderConfig
from cmpolicy.nn.encoders.state import StateEncoderConfig
from cmpolicy.nn.registry import EncoderConfig, NetConfig, net_config
from cmpolicy.schema import ConfigError, at_least, choose, positive
from cmpolicy.spec import PolicySpec, SpecError
from cmpolicy.training.config import EmaConfig, OptimConfig

#: Entry of the optimizer's parameter group in which the schedule leaves the length of the run.
TOTAL_STEPS = "total_steps"

# draccus reads no Literal; the classes check them
for _settings in (ProgressiveSelfDistillation, Isd, FlowMatching, EmaConfig):
    for _hint in get_type_hints(_settings).values():
        if get_origin(_hint) is Literal:
            draccus.decode.register(_hint, lambda raw, path=(): str(raw))


@LRSchedulerConfig.register_subclass("cmpolicy")
@dataclass
class CmpolicySchedulerConfig(LRSchedulerConfig):
    """Warm-up and decay; it also tells the policy how long the run is, which ``psd`` needs.

    Args:
        num_warmup_steps: steps over which the rate rises linearly from 0.
        name: ``cosine`` falls to 0 at the end of the run, ``constant`` stays.
    """

    num_warmup_steps: int | None = 100
    name: str = "cosine"

    def build(self, optimizer: Optimizer, num_training_steps: int) -> LambdaLR:
        """The schedule of one run."""
        from diffusers.optimization import get_scheduler

        for group in optimizer.param_groups:
            group[TOTAL_STEPS] = num_training_steps
        return get_scheduler(
            "cosine" if self.name == "cosine" else "constant_with_warmup",
            optimizer,
            num_warmup_steps=self.num_warmup_steps or 0,
            num_training_steps=num_training_steps,
        )


@PreTrainedConfig.register_subclass("cmpolicy")
@dataclass
class CmpolicyConfig(PreTrainedConfig):
    """A one-step policy: what ``cmpolicy train`` has as settings, checked by the same classes.

    Args:
        n_obs_steps: observations a decision looks at.
        horizon: predicted actions; the first is at the oldest observation.
        n_action_steps: actions executed before the next decision.
        objective: ``psd`` or ``isd`` (one-step), ``fm`` (flow matching), or another one of
            cmpolicy's. The settings of these three are the groups of that name, such as
            ``isd.derivative``.
        objective_settings: of another objective, such as ``{derivative: jvp}`` of ``meanflow``.
        path: ``linear`` or ``trigonometric``.
        sampler: such as ``flow_map`` or ``diagonal``; null takes the objective's own.
        nfe: network evaluations per decision; null takes the objective's own: 1, for ``fm`` 10.
        noise_scale: factor on the noise at inference; below 1 actions are more typical.
        net: size of the network: tiny, small, base or large.
        down_dims, kernel_size, n_groups, time_dim: in place of the preset's.
        encoder: ``mlp`` (numbers only), ``compact`` or ``resnet18``; ``auto`` is ``compact`` where
            there are cameras. Its settings are the group of that name, such as ``compact.crop``.
        ema: moving average of the weights, which are those that act.
        forget_history: share in [0, 1) of the training examples that see the newest observation
            alone, for policies that only go on as they moved, or stay where they rest.
        pad_loss: whether the actions that repeat an episode's last one are trained on.
        clamp_actions: cut actions to the range that the data has.
        rotations: which action dimensions are rotations, such as ``["quaternion:3,4,5,6"]``.
        resize: bring frames of another size to the one of the data, in place of refusing them.
        keys: cmpolicy's name of a key by LeRobot's; those not named lose ``observation.``.
        optimizer_lr, ..., scheduler_warmup_steps: AdamW and the schedule of its learning rate.
        normalization_mapping: of LeRobot's processors; the normaliser is inside the policy, so all
            are ``IDENTITY``.

    Raises:
        ValueError: what is wrong with a setting.
    """

    n_obs_steps: int = 2
    horizon: int = 16
    n_action_steps: int = 8
    objective: str = "psd"
    psd: ProgressiveSelfDistillation = field(default_factory=ProgressiveSelfDistillation)
    isd: Isd = field(default_factory=Isd)
    fm: FlowMatching = field(default_factory=FlowMatching)
    objective_settings: dict[str, str] = field(default_factory=dict)
    path: str = "linear"
    sampler: str | None = None
    nfe: int | None = None
    noise_scale: float = 1.0
    net: str = "small"
    down_dims: tuple[int, ...] | None = None
    kernel_size: int | None = None
    n_groups: int | None = None
    time_dim: int | None = None
    encoder: str = "auto"
    mlp: StateEncoderConfig = field(default_factory=StateEncoderConfig)
    compact: CompactEncoderConfig = field(default_factory=CompactEncoderConfig)
    resnet18: ResNet18EncoderConfig = field(default_factory=ResNet18EncoderConfig)
    ema: EmaConfig = field(default_factory=EmaConfig)
    forget_history: float = 0.0
    pad_loss: bool = True
    clamp_actions: bool = True
    rotations: list[str] | None = None
    resize: bool = False
    keys: dict[str, str] = field(default_factory=dict)
    optimizer_lr: float = 1e-3
    optimizer_betas: tuple[float, float] = (0.9, 0.999)
    optimizer_eps: float = 1e-8
    optimizer_weight_decay: float = 1e-6
    optimizer_grad_clip_norm: float = 1.0
    scheduler_name: str = "cosine"
    scheduler_warmup_steps: int = 100
    normalization_mapping: dict[str, NormalizationMode] = field(
        default_factory=lambda: dict.fromkeys(
            ("VISUAL", "STATE", "ENV", "ACTION"), NormalizationMode.IDENTITY
        )
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least("nfe", 1 if self.nfe is None else self.nfe, 1)
        positive("noise_scale", self.noise_scale)
        if not 0 <= self.forget_history < 1:
            raise ConfigError(f"forget_history={self.forget_history} must be in [0, 1)")
        at_least("scheduler_warmup_steps", self.scheduler_warmup_steps, 0)
        positive("optimizer_grad_clip_norm", self.optimizer_grad_clip_norm)
        OptimConfig(
            lr=self.optimizer_lr,
            betas=tuple(self.optimizer_betas),
            eps=self.optimizer_eps,
            weight_decay=self.optimizer_weight_decay,
        )
        choose({"cosine": 0, "constant": 0}, self.scheduler_name, "scheduler_name")
        if self.sampler is not None:
            choose(dict.fromkeys(SAMPLERS, 0), self.sampler, "sampler")
            self.build_objective().check_sampler(self.sampler)
        get_path(self.path)
        get_sampler(self.sampler_kind).grid(self.evaluations)  # raises
        self.build_net().check_horizon(self.horizon)
        choose(dict.fromkeys((*_ENCODERS, "auto"), 0), self.encoder, "encoder")
        PolicySpec({"any": (1,)}, 1, self.horizon, self.n_obs_steps, self.n_action_steps)
        changed = [k for k, v in self.normalization_mapping.items() if v != _IDENTITY]
        if changed:
            raise ConfigError(
                f"normalization_mapping of {changed} is not IDENTITY: cmpolicy normalises inside "
                "the policy, and twice would be wrong"
            )

    # -- what LeRobot asks for ------------------------------------------------------------------

    @property
    def observation_delta_indices(self) -> list[int]:
        """Steps of the observations, relative to now."""
        return list(range(1 - self.n_obs_steps, 1))

    @property
    def action_delta_indices(self) -> list[int]:
        """Steps of the actions, relative to now."""
        return list(range(1 - self.n_obs_steps, 1 - self.n_obs_steps + self.horizon))

    @property
    def reward_delta_indices(self) -> None:
        """Rewards are not used."""
        return None

    @property
    def drop_n_last_frames(self) -> int:
        """No window begins so late that some of the executed actions would be padding."""
        return self.horizon - self.n_obs_steps - self.n_action_steps + 1

    def get_optimizer_preset(self) -> AdamWConfig:
        """AdamW."""
        return AdamWConfig(
            lr=self.optimizer_lr,
            betas=self.optimizer_betas,
            eps=self.optimizer_eps,
            weight_decay=self.optimizer_weight_decay,
            grad_clip_norm=self.optimizer_grad_clip_norm,
        )

    def get_scheduler_preset(self) -> CmpolicySchedulerConfig:
        """Warm-up and decay."""
        return CmpolicySchedulerConfig(self.scheduler_warmup_steps, self.scheduler_name)

    def validate_features(self) -> None:
        """Whether a policy can be made of the data's features.

        Raises:
            SpecError: no action, no observation, or keys that do not fit.
        """
        self.build_encoder(self.build_spec())

    # -- what the policy is made of -------------------------------------------------------------

    @property
    def key_names(self) -> dict[str, str]:
        """cmpolicy's name of every observation key, by LeRobot's."""
        names = {
            name: self.keys.get(name, name.removeprefix("observation."))
            for name in self.input_features or {}
        }
        unknown = sorted(set(self.keys) - set(names))
        if unknown:
            raise SpecError(f"keys names {unknown}, and the observations are {sorted(names)}")
        return names

    def build_spec(self) -> PolicySpec:
        """Inputs and outputs of the policy."""
        action = self.action_feature
        if action is None or len(action.shape) != 1:
            found = sorted(self.output_features or {})
            raise SpecError(f"a policy predicts the vector 'action'; the data has {found}")
        images = [self.key_names[name] for name in self.image_features]
        obs = {}
        for name, key in self.key_names.items():
            shape = tuple(self.input_features[name].shape)
            obs[key] = (*shape[1:], shape[0]) if key in images else shape
        rotations = self.rotations
        return PolicySpec(
            obs=obs,
            action_dim=int(action.shape[0]),
            horizon=self.horizon,
            n_obs_steps=self.n_obs_steps,
            n_action_steps=self.n_action_steps,
            action_rotations=None if rotations is None else tuple(map(parse_rotation, rotations)),
            images=tuple(images),
            resize=self.resize,
        )

    def build_objective(self) -> Objective:
        """What is trained."""
        groups: dict[str, Objective] = {"psd": self.psd, "isd": self.isd, "fm": self.fm}
        if self.objective not in groups:
            given = {k: yaml.safe_load(str(v)) for k, v in self.objective_settings.items()}
            return build_objective(self.objective, **given)
        if self.objective_settings:
            raise ConfigError(
                f"objective_settings={self.objective_settings} are of other objectives; those of "
                f"{self.objective} are a group, such as --policy.{self.objective}.time_a=1"
            )
        return groups[self.objective]

    def build_net(self) -> NetConfig:
        """Settings of the network."""
        known = files("cmpolicy_conf").joinpath("net")
        presets = {p.name.removesuffix(".yaml"): p for p in known.iterdir()}
        found: dict[str, Any] = yaml.safe_load(choose(presets, self.net, "net").read_text())
        own = {k: getattr(self, k) for k in ("down_dims", "kernel_size", "n_groups", "time_dim")}
        given = {k: v for k, v in own.items() if v is not None}
        return net_config({**found.get("net", found), **given})

    def build_encoder(self, spec: PolicySpec) -> EncoderConfig:
        """Settings of the encoder of observations."""
        kind = self.encoder
        if kind == "auto":
            kind = "compact" if spec.images else "mlp"
        found: EncoderConfig = getattr(self, kind)
        return found

    @property
    def sampler_kind(self) -> SamplerKind:
        """How actions are sampled."""
        return self.sampler or self.build_objective().sampler  # type: ignore[return-value]

    @property
    def evaluations(self) -> int:
        """Network evaluations per decision."""
        return self.nfe or self.build_objective().nfe

    def without_download(self) -> None:
        """The weights come from a checkpoint: none have to be fetched to start from."""
        self.resnet18 = replace(self.resnet18, pretrained=False)


_IDENTITY = NormalizationMode.IDENTITY
_ENCODERS = ("mlp", "compact", "resnet18")
