"""The settings of a training run, as frozen dataclasses that are valid once they exist.

``TrainConfig.from_mapping`` reads the plain mapping that the command line makes of the YAML files
in ``cmpolicy_conf``; nothing here knows Hydra. The defaults are the recipe of ``preset=quick``; the
YAML files hold only what differs from them. All lengths of a run (``examples``, ``warmup``,
``every``) count training examples, never steps or epochs.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, Self

from cmpolicy.flow.objectives import OBJECTIVES, Objective, build_objective
from cmpolicy.flow.sampler import SamplerKind
from cmpolicy.nn.encoders.state import StateEncoderConfig
from cmpolicy.nn.registry import (
    ENCODERS,
    NETS,
    EncoderConfig,
    NetConfig,
    encoder_config,
    load_built_in,
    net_config,
    to_mapping,
)
from cmpolicy.nn.unet1d import UNet1DConfig
from cmpolicy.schema import ConfigError, choose, complete, from_mapping, merge, plain
from cmpolicy.spec import Rotation

Precision = Literal["auto", "fp32", "bf16"]


@dataclass(frozen=True, kw_only=True)
class OptimConfig:
    """AdamW with warm-up and a learning-rate schedule.

    Args:
        lr: highest learning rate.
        betas, eps, weight_decay: of AdamW (Loshchilov and Hutter 2019).
        warmup: examples over which the rate rises linearly from 0.
        schedule: ``cosine`` falls to 0 at the end of the run, ``constant`` stays.
        grad_clip: the gradient is scaled down to this norm; null leaves it.
    """

    lr: float = 1e-3
    betas: tuple[float, ...] = (0.9, 0.999)
    eps: float = 1e-8
    weight_decay: float = 1e-6
    warmup: int = 12_800
    schedule: Literal["cosine", "constant"] = "cosine"
    grad_clip: float | None = 1.0

    def __post_init__(self) -> None:
        _positive("optim.lr", self.lr)
        _positive("optim.eps", self.eps)
        at_least("optim.weight_decay", self.weight_decay, 0)
        at_least("optim.warmup", self.warmup, 0)
        if len(self.betas) != 2 or not all(0 <= b < 1 for b in self.betas):
            raise ConfigError(f"optim.betas must be two numbers in [0, 1), got {list(self.betas)}")
        if self.grad_clip is not None:
            _positive("optim.grad_clip", self.grad_clip)


@dataclass(frozen=True, kw_only=True)
class EmaConfig:
    """Moving average of the weights, ``diffusers.training_utils.EMAModel``'s schedule.

    At step k the decay is ``1 - (1 + k / inv_gamma)^-power``, kept within [min_decay, decay].

    Args:
        decay: the longest memory, reached after the warm-up.
        min_decay: the shortest.
        inv_gamma, power: how fast the memory grows.
    """

    decay: float = 0.998
    min_decay: float = 0.0
    inv_gamma: float = 1.0
    power: float = 0.75

    def __post_init__(self) -> None:
        if not 0 <= self.min_decay <= self.decay < 1:
            raise ConfigError(
                f"ema.min_decay={self.min_decay} and ema.decay={self.decay} must be in order and "
                "in [0, 1)"
            )
        _positive("ema.inv_gamma", self.inv_gamma)
        _positive("ema.power", self.power)


@dataclass(frozen=True, kw_only=True)
class EvalSchedule:
    """Evaluation during training; always of the EMA weights.

    Args:
        every: examples between evaluations; one more is made at the end.
        nfe: network evaluations per generated sample; it is saved with the model. null takes the
            objective's own number: 1, and 10 for flow matching.
    """

    every: int = 128_000
    nfe: int | None = None

    def __post_init__(self) -> None:
        for name in ("every", "nfe"):
            at_least(f"eval.{name}", 1 if getattr(self, name) is None else getattr(self, name), 1)


@dataclass(frozen=True, kw_only=True)
class EvalConfig(EvalSchedule):
    """Evaluation of a policy during training.

    Args:
        episodes: rollouts per evaluation, 0 for none; a task without a simulator makes none.
        first_seed: rollouts use the seeds first_seed, first_seed + 1, ... They are for tuning and
            for choosing the best policy, so they must not be those of the protocol.
        workers: simulator processes.
        windows: at most this many held-out windows are scored.
    """

    episodes: int = 20
    first_seed: int = 500_000
    workers: int = 2
    windows: int = 1024

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("workers", "windows"):
            at_least(f"eval.{name}", getattr(self, name), 1)
        at_least("eval.episodes", self.episodes, 0)
        at_least("eval.first_seed", self.first_seed, 0)


@dataclass(frozen=True, kw_only=True)
class LogConfig:
    """What is written while training. The JSON lines (``log.jsonl``) always are.

    Args:
        every: examples between entries; device numbers are read only then.
        trackers: where the numbers go beside the JSON lines: ``tensorboard``, ``wandb``; both need
            their package.
        progress: a progress bar; null shows one on a terminal only.
    """

    every: int = 12_800
    trackers: tuple[Literal["tensorboard", "wandb"], ...] = ("tensorboard",)
    progress: bool | None = None

    def __post_init__(self) -> None:
        at_least("log.every", self.every, 1)


@dataclass(frozen=True, kw_only=True)
class LoopConfig:
    """What the training loop itself needs; the same for policies and for any other model.

    Args:
        examples: training examples seen in the whole run.
        batch_size: examples per step and process; with R processes a step sees R times as many.
        seed: of weights, data order, noise and times.
        precision: ``bf16`` runs the network under autocast; ``auto`` is bf16 on GPUs and CPUs
            that multiply in it (a quarter faster on a CPU with AVX512-BF16).
        device: ``auto`` takes the GPU if there is one.
        compile: torch.compile the network; takes minutes once, pays off in long runs.
        save_every: examples between training states on disk.
    """

    examples: int = 256_000
    batch_size: int = 128
    seed: int = 0
    precision: Precision = "auto"
    device: Literal["auto", "cpu", "cuda"] = "auto"
    compile: bool = False
    save_every: int = 64_000
    optim: OptimConfig = field(default_factory=OptimConfig)
    ema: EmaConfig = field(default_factory=EmaConfig)
    eval: EvalSchedule = field(default_factory=EvalSchedule)
    log: LogConfig = field(default_factory=LogConfig)

    def __post_init__(self) -> None:
        for name in ("examples", "batch_size", "save_every"):
            at_least(name, getattr(self, name), 1)
        at_least("seed", self.seed, 0)
        if self.examples < self.batch_size:
            raise ConfigError(
                f"examples={self.examples} is less than one batch (batch_size={self.batch_size}); "
                "raise examples or lower batch_size"
            )
        if self.optim.warmup >= self.examples:
            raise ConfigError(
                f"optim.warmup={self.optim.warmup} leaves nothing of examples={self.examples}; "
                "it counts examples, not steps"
            )

    @classmethod
    def from_mapping(cls, data: Mapping[str, Any]) -> Self:
        """Read and check a whole configuration.

        Raises:
            ConfigError: with the dotted key, the value, and what to do.
        """
        return from_mapping(cls, data)

    def to_dict(self) -> dict[str, Any]:
        """Plain values; :meth:`from_mapping` is its inverse."""
        values: dict[str, Any] = plain(self)
        return values


@dataclass(frozen=True, kw_only=True)
class TaskConfig:
    """What is to be learned.

    Args:
        name: shown in results.
        protocol: the simulator protocol that the policy is rolled out in while training: a name, or
            ``module:PROTOCOL`` of one's own; null for a task that has only data.
    """

    name: str = "custom"
    protocol: str | None = None


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Demonstrations, and which of their arrays the policy sees.

    Args:
        name: ``pusht_scripted`` (comes with cmpolicy), ``pusht_human``, ``custom``, ...
        path: Zarr store; null where ``name`` alone says which.
        obs: selector by observation key of the policy, e.g. ``{agent_pos: "state[:2]"}``. A plain
            list means that keys and selectors are the same. In the place of a selector may stand
            ``{key: selector, kind: image|state, layout: hwc|chw}``; a key is an image where its
            shape is (H, W, 3) and its values are whole numbers in [0, 255], unless ``kind`` says
            otherwise.
        action: selector of the actions.
        val_fraction: share of the episodes held out for validation.
        augment: what is done to the demonstrations, in this order; of Push-T: ``recentre`` (each
            episode moved so that its block comes to rest on the goal), ``mirror`` (every episode's
            mirror image is added).
        short_episodes: what to do with episodes shorter than a window: ``pad`` repeats their last
            step, ``skip`` leaves them out.
        pad_loss: whether the actions that repeat an episode's first or last one are trained on;
            null: yes, unless the store says that its actions are relative (``actions: delta``).
        action_rotations: which action dimensions are rotations, e.g. ``["angle:2",
            "quaternion:3,4,5,6"]``; ``[]`` if none is; null takes what the store says. Plans are
            blended only where this is known.
        image_memory: GiB of frames that are kept in memory; more are decoded into a file of the
            download cache once, and read from there.
    """

    name: str = "custom"
    path: str | None = None
    obs: Mapping[str, Any]
    action: str = "action"
    val_fraction: float = 0.02
    augment: tuple[str, ...] = ()
    short_episodes: Literal["pad", "skip"] = "pad"
    pad_loss: bool | None = None
    action_rotations: tuple[str, ...] | None = None
    image_memory: float = 4.0

    def __post_init__(self) -> None:
        if not self.obs:
            raise ConfigError("data.obs is empty: name at least one key, e.g. data.obs=[state]")
        if "action" in self.obs:
            raise ConfigError(
                "data.obs has the key 'action', which is the policy's output; name the observation "
                "otherwise, e.g. data.obs={past_action: action}"
            )
        for text in self.action_rotations or ():
            parse_rotation(text)
        for key, source in self.obs.items():
            _check_source(key, source)
        if not self.image_memory > 0:
            raise ConfigError(f"data.image_memory={self.image_memory} must be above 0 GiB")
        if not 0 <= self.val_fraction < 1:
            raise ConfigError(f"data.val_fraction={self.val_fraction} must be in [0, 1)")

    @classmethod
    def from_mapping(cls, data: Mapping[str, Any], *, where: str = "data") -> DataConfig:
        """As any settings, and ``obs`` may be a plain list of keys."""
        obs = data.get("obs") if isinstance(data, Mapping) else None
        if isinstance(data, Mapping) and obs is None:
            raise ConfigError(
                f"{where}.obs is not set: name the keys of the store that the policy sees, e.g. "
                f"{where}.obs=[state]"
            )
        if isinstance(obs, str):
            raise ConfigError(f"{where}.obs={obs} must be a list: {where}.obs=[{obs}]")
        if isinstance(obs, list | tuple):
            data = {**data, "obs": {str(key): str(key) for key in obs}}
        elif isinstance(obs, Mapping):  # null takes a key away that a YAML file named
            data = {**data, "obs": {k: v for k, v in obs.items() if v is not None}}
        if isinstance(data, Mapping):
            augment = data.get("augment") or ()
            data = {**data, "augment": [augment] if isinstance(augment, str) else augment}
        return from_mapping(cls, data, where=where)


@dataclass(frozen=True, kw_only=True)
class PolicyConfig:
    """The policy's window in time and its interpolant.

    Args:
        horizon: T, predicted actions. n_obs_steps: To. n_action_steps: Ta, executed actions.
        path: ``linear`` or ``trigonometric``.
    """

    horizon: int = 16
    n_obs_steps: int = 2
    n_action_steps: int = 8
    path: Literal["linear", "trigonometric"] = "linear"

    def __post_init__(self) -> None:
        for name in ("horizon", "n_obs_steps", "n_action_steps"):
            at_least(f"policy.{name}", getattr(self, name), 1)
        needed = self.n_obs_steps - 1 + self.n_action_steps
        if self.horizon < needed:
            raise ConfigError(
                f"policy.horizon={self.horizon} is too short: it starts at the oldest of "
                f"policy.n_obs_steps={self.n_obs_steps} observations and must hold "
                f"policy.n_action_steps={self.n_action_steps} executed actions, so at least "
                f"{needed} are needed"
            )


@dataclass(frozen=True, kw_only=True)
class ObjectiveConfig:
    """An objective by name, how its policies are sampled, and the objective's own settings.

    ``sampler`` null takes the objective's own.
    """

    name: str = "isd"
    sampler: SamplerKind | None = None
    settings: Mapping[str, Any] = field(default_factory=dict)

    def build(self) -> Objective:
        """The objective."""
        return build_objective(self.name, **self.settings)

    @property
    def sampler_kind(self) -> SamplerKind:
        """How policies of this objective are sampled."""
        return self.sampler or choose(OBJECTIVES, self.name, "objective").sampler

    def __post_init__(self) -> None:
        try:
            self.build()
        except (ValueError, TypeError) as error:
            raise ConfigError(str(error)) from error

    @classmethod
    def from_mapping(cls, data: Mapping[str, Any], *, where: str = "objective") -> ObjectiveConfig:
        """``name`` and ``sampler``; all else is a setting of the objective."""
        own = {k: v for k, v in data.items() if k in ("name", "sampler")}
        rest = {k: v for k, v in data.items() if k not in ("name", "sampler", "settings")}
        settings = {**data.get("settings", {}), **rest}
        return from_mapping(cls, {**own, "settings": settings}, where=where)

    @classmethod
    def complete(cls, data: Mapping[str, Any]) -> dict[str, Any]:
        """The settings with the defaults of the objective, side by side."""
        name = str(data.get("name") or "isd")
        own = complete(choose(OBJECTIVES, name, "objective"), {})
        rest = {k: v for k, v in data.items() if k not in ("name", "sampler", "settings")}
        given = {**data.get("settings", {}), **rest}
        return {"name": name, "sampler": data.get("sampler"), **merge(own, given)}


@dataclass(frozen=True, kw_only=True)
class TrainConfig(LoopConfig):
    """A whole training run. See the parts.

    Args:
        data: the demonstrations.
        control_hz: actions per second of the demonstrations, above 0. It travels with the policy,
            and a control loop at another rate refuses it. null takes what the store says.
        init: a policy (bundle, bundled name or hub id) whose weights and normaliser the run starts
            from; null starts from scratch.
    """

    data: DataConfig
    task: TaskConfig = field(default_factory=TaskConfig)
    control_hz: float | None = None
    objective: ObjectiveConfig = field(default_factory=ObjectiveConfig)
    net: NetConfig = field(default_factory=UNet1DConfig)
    encoder: EncoderConfig = field(default_factory=StateEncoderConfig)
    policy: PolicyConfig = field(default_factory=PolicyConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)
    init: str | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        try:
            self.net.check_horizon(self.policy.horizon)
        except ValueError as error:
            raise ConfigError(f"policy.{error}") from error
        if self.control_hz is not None:
            _positive("control_hz", self.control_hz)

    @property
    def nfe(self) -> int:
        """Network evaluations of the policy: ``eval.nfe``, or the objective's own number."""
        if self.eval.nfe is not None:
            return self.eval.nfe
        return choose(OBJECTIVES, self.objective.name, "objective").nfe

    @classmethod
    def from_mapping(cls, data: Mapping[str, Any]) -> Self:
        """As any settings; ``net.kind`` and ``encoder.kind`` say whose settings those two hold."""
        readers = {"net": net_config, "encoder": encoder_config}
        return from_mapping(cls, {k: readers[k](v) if k in readers else v for k, v in data.items()})

    @classmethod
    def complete(cls, data: Mapping[str, Any]) -> dict[str, Any]:
        """``data`` with the defaults of every setting it leaves out."""
        rest = {k: v for k, v in data.items() if k not in ("net", "encoder")}
        parts: dict[str, tuple[Mapping[str, Any], Any]] = {
            "net": (NETS, UNet1DConfig),
            "encoder": (ENCODERS, StateEncoderConfig),
        }
        filled = complete(cls, {**rest, "net": {}, "encoder": {}})
        for name, (known, default) in parts.items():
            load_built_in()
            given = dict(data.get(name) or {})
            kind = choose(known, given.get("kind") or default.kind, f"{name}.kind")
            filled[name] = merge({"kind": kind.kind, **complete(kind, {})}, given)
        return filled

    def to_dict(self) -> dict[str, Any]:
        """Plain values; :meth:`from_mapping` is its inverse."""
        kinds = {"net": to_mapping(self.net), "encoder": to_mapping(self.encoder)}
        return super().to_dict() | kinds


_SOURCE = {"kind": ("image", "state"), "layout": ("hwc", "chw")}


def _check_source(key: str, source: str | Mapping[str, str]) -> None:
    if isinstance(source, str):
        return
    if not isinstance(source, Mapping) or not {"key"} <= set(source) <= {"key", *_SOURCE}:
        raise ConfigError(
            f"data.obs.{key}={source!r} must be a selector such as 'state[:7]', or a group with "
            "the setting key and perhaps kind (image, state) and layout (hwc, chw)"
        )
    for name, choices in _SOURCE.items():
        if source.get(name, choices[0]) not in choices:
            raise ConfigError(
                f"data.obs.{key}.{name}={source[name]!r} must be one of {list(choices)}"
            )


def parse_rotation(text: str) -> Rotation:
    """``kind:dim,dim,...`` as a rotation of the action.

    Raises:
        ConfigError: another form, an unknown kind, or a wrong number of dimensions.
    """
    kind, _, dims = text.partition(":")
    try:
        return Rotation(kind, tuple(int(n) for n in dims.split(",")))  # type: ignore[arg-type]
    except ValueError as error:
        raise ConfigError(
            f"data.action_rotations: cannot read {text!r}: {error}; expected kind:dimensions, such "
            "as angle:2 or quaternion:3,4,5,6"
        ) from error


def at_least(name: str, value: float, least: float) -> None:
    """Raise ConfigError unless ``value`` of the setting ``name`` is at least that."""
    if value < least:
        raise ConfigError(f"{name}={value} must be at least {least}")


def _positive(name: str, value: float) -> None:
    if not value > 0:
        raise ConfigError(f"{name}={value} must be above 0")
