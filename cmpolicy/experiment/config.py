"""The settings of a policy's training run: task, data, policy, objective, network and encoder.

``TrainConfig.from_mapping`` reads the plain mapping that the command line makes of the YAML files
in ``cmpolicy_conf``; nothing here knows Hydra. The defaults are the recipe of ``preset=quick``; the
YAML files hold only what differs from them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, Self, get_args

from cmpolicy.experiment.objective import ObjectiveConfig
from cmpolicy.flow.sampler import get_sampler
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
from cmpolicy.schema import (
    OWN,
    ConfigError,
    at_least,
    choose,
    complete,
    from_mapping,
    merge,
    positive,
)
from cmpolicy.spec import Rotation, check_warm_start
from cmpolicy.training.config import EvalConfig, LoopConfig

NormalizeMethod = Literal["auto", "minmax", "quantile", "gaussian"]


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
        path: Zarr store, or folder of a LeRobot data set, which is converted into the cache once;
            null where ``name`` alone says which.
        repo_id: of a LeRobot data set, in place of ``path``: looked for in LeRobot's cache, then in
            the hub's, then fetched.
        revision: of ``repo_id``: commit, tag or branch on the hub.
        obs: selector by observation key of the policy, e.g. ``{agent_pos: "state[:2]"}``. A plain
            list means that keys and selectors are the same. In the place of a selector may stand
            ``{key: selector, kind: image|state, layout: hwc|chw}``; a key is an image where its
            shape is (H, W, 3) and its values are whole numbers in [0, 255], or where it is uint8 of
            shape (3, H, W), unless ``kind`` says otherwise. Of a LeRobot data set it may be left
            out: every ``observation.*``.
        action: selector of the actions.
        targets: as ``obs``, numbers that the demonstrations hold and the policy will not see, such
            as the pose of an object that a simulator or motion capture knows. The features are
            trained to tell them beside the objective (``target_weight``), so a camera's learn from
            fewer examples what to look at. Nothing of it is left in the trained policy.
        episodes: which of them are used: a list of numbers, or what the store says of episodes: the
            name of ``meta/<name>`` (E,), such as ``success``, or of a mask; null uses all.
        weights: name of ``meta/<name>`` (E,), whole numbers: how often the windows of an episode
            come in an epoch; null takes each once.
        val_fraction: share of the episodes held out for validation.
        augment: what is done to the demonstrations, in this order; of Push-T: ``recentre`` (each
            episode moved so that its block comes to rest on the goal), ``mirror`` (every episode's
            mirror image is added); or what was registered under a name of one's own.
        max_pause: where nothing moves for longer, the further steps are left out; null keeps all.
            A policy stands still where its demonstrations do.
        forget_history: share in [0, 1) of the examples whose earlier observations are replaced by
            the newest one, for policies that only go on as they moved, or stay where they rest.
        normalize: how keys are scaled, all (``data.normalize=gaussian``) or one of the policy's
            (``data.normalize.action=quantile``): ``auto`` takes the range of the values, but for a
            few that are out of all bounds; ``quantile`` the percentiles 1 and 99; ``gaussian`` mean
            and standard deviation; ``minmax`` the range of all. Values out of all bounds are cut,
            but for ``minmax``.
        clamp_actions: whether the policy's actions are cut to the range of those it was trained on.
        strict: whether findings about the data are errors.
        changed: what to do when a run goes on and finds other data: ``refuse``, or ``accept``.
        short_episodes: what to do with episodes shorter than a window: ``pad`` repeats their last
            step, ``skip`` leaves them out.
        pad_loss: whether the actions that repeat an episode's first or last one are trained on;
            null: yes, unless the store says that its actions are relative (``actions: delta``).
        action_rotations: which action dimensions are rotations, e.g. ``["angle:2",
            "quaternion:3,4,5,6"]``; ``[]`` if none is; null takes what the store says. Plans are
            blended only where this is known.
        missing_chunks: what a chunk that is not in the store means: ``zero``, that its writer left
            it out because it holds only zeros (zarr 3 does so); ``error``, that it is lost;
            ``auto`` takes it for left out where nothing speaks against it.
        image_memory: GiB of frames that are kept in memory; more are decoded into a file of the
            download cache once, and read from there.
    """

    name: str = "custom"
    path: str | None = None
    repo_id: str | None = None
    revision: str | None = None
    obs: Mapping[str, Any]
    action: str = "action"
    targets: Mapping[str, Any] = field(default_factory=dict)
    episodes: Any = None
    weights: str | None = None
    val_fraction: float = 0.02
    augment: tuple[str, ...] = ()
    max_pause: int | None = None
    forget_history: float = 0.0
    normalize: Mapping[str, str] = field(default_factory=lambda: {"default": "auto"})
    clamp_actions: bool = True
    strict: bool = False
    changed: Literal["refuse", "accept"] = "refuse"
    short_episodes: Literal["pad", "skip"] = "pad"
    pad_loss: bool | None = None
    action_rotations: tuple[str, ...] | None = None
    missing_chunks: Literal["auto", "zero", "error"] = "auto"
    image_memory: float = 4.0

    def __post_init__(self) -> None:
        if self.repo_id is not None and self.path is not None:
            raise ConfigError(
                f"data.path={self.path} and data.repo_id={self.repo_id} are both set; give one"
            )
        at_least("data.max_pause", self.max_pause, 1)
        if self.revision is not None and self.repo_id is None:
            raise ConfigError("data.revision is of data.repo_id, which is not set")
        if not self.obs and not self.is_lerobot:
            raise ConfigError("data.obs is empty: name at least one key, e.g. data.obs=[state]")
        if "action" in self.obs:
            raise ConfigError(
                "data.obs has the key 'action', which is the policy's output; name the observation "
                "otherwise, e.g. data.obs={past_action: action}"
            )
        if "action" in self.targets:
            raise ConfigError(
                "data.targets has the key 'action', which is the policy's output; name the target "
                "otherwise, e.g. data.targets={next: action}"
            )
        known = {"default", "action", *self.obs}
        for key, method in self.normalize.items():
            if self.obs:  # else the data set's own keys, which are not known yet
                choose(dict.fromkeys(known), key, "key of data.normalize")
            choose(dict.fromkeys(get_args(NormalizeMethod)), method, f"data.normalize.{key}")
        for text in self.action_rotations or ():
            parse_rotation(text)
        for key, source in self.obs.items():
            _check_source(f"data.obs.{key}", source)
        for key, source in self.targets.items():
            _check_source(f"data.targets.{key}", source)
        numbers = isinstance(self.episodes, list | tuple) and all(
            isinstance(e, int) and not isinstance(e, bool) for e in self.episodes
        )
        if self.episodes is not None and not isinstance(self.episodes, str) and not numbers:
            raise ConfigError(
                f"data.episodes={self.episodes!r} must be a list of episode numbers or a name"
            )
        positive("data.image_memory", self.image_memory)
        for name in ("val_fraction", "forget_history"):
            if not 0 <= getattr(self, name) < 1:
                raise ConfigError(f"data.{name}={getattr(self, name)} must be in [0, 1)")

    @property
    def is_lerobot(self) -> bool:
        """Whether a LeRobot data set was asked for, whose keys need not be named."""
        return self.name == "lerobot" or self.repo_id is not None

    @classmethod
    def from_mapping(cls, data: Any, *, where: str = "data") -> DataConfig:
        """As any settings, and ``obs`` may be a plain list of keys."""
        if not isinstance(data, Mapping):
            return from_mapping(cls, data, where=where)  # read already, or an error
        read = dict(data)
        if read.get("obs") is None:
            read["obs"] = {}
            if read.get("name") != "lerobot" and read.get("repo_id") is None:
                raise ConfigError(
                    f"{where}.obs is not set: name the keys of the store that the policy sees, "
                    f"e.g. {where}.obs=[state]"
                )
        for name in ("obs", "targets"):
            keys = read.get(name)
            if isinstance(keys, str):
                raise ConfigError(f"{where}.{name}={keys} must be a list: {where}.{name}=[{keys}]")
            if isinstance(keys, list | tuple):
                read[name] = {str(key): str(key) for key in keys}
            elif isinstance(keys, Mapping):  # null takes a key away that a YAML file named
                read[name] = {k: v for k, v in keys.items() if v is not None}
        augment = read.get("augment") or ()
        read["augment"] = [augment] if isinstance(augment, str) else augment
        method = read.get("normalize")
        if isinstance(method, Mapping):
            read["normalize"] = _flat(method)
        if isinstance(method, str):
            read["normalize"] = {"default": method}
        return from_mapping(cls, read, where=where)


@dataclass(frozen=True, kw_only=True)
class PolicyConfig:
    """The policy's window in time and its interpolant.

    Args:
        horizon: T, predicted actions. n_obs_steps: To. n_action_steps: Ta, executed actions.
        path: ``linear`` or ``trigonometric``.
        warm_start: time in (0, 1] at which decisions of the trained policy, but for the first,
            start from the plan before; null: all start from noise. Training itself is the same.
        resize: camera frames of another size than those of the demonstrations are brought to that
            size when the policy is used, proportions kept, instead of being refused.
    """

    horizon: int = 16
    n_obs_steps: int = 2
    n_action_steps: int = 8
    path: Literal["linear", "trigonometric"] = "linear"
    warm_start: float | None = None
    resize: bool = False

    def __post_init__(self) -> None:
        try:
            check_warm_start(self.warm_start)
        except ValueError as error:
            raise ConfigError(f"policy.{error}") from error
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
class TrainConfig(LoopConfig):
    """A whole training run. See the parts.

    Args:
        data: the demonstrations.
        control_hz: actions per second of the demonstrations, above 0. It travels with the policy,
            and a control loop at another rate refuses it. null takes what the store says.
        target_weight: of the loss of ``data.targets``, above 0.
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
    target_weight: float = 1.0
    init: str | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        try:
            self.net.check_horizon(self.policy.horizon)
        except ValueError as error:
            raise ConfigError(f"policy.{error}") from error
        self.objective.check_evaluations(self.eval.nfe)
        if self.policy.warm_start is not None:
            try:
                get_sampler(self.objective.sampler_kind).check_start()
            except ValueError as error:
                raise ConfigError(f"policy.warm_start={self.policy.warm_start}: {error}") from error
        positive("control_hz", self.control_hz)
        positive("target_weight", self.target_weight)

    @property
    def nfe(self) -> int:
        """Network evaluations of the policy: ``eval.nfe``, or the objective's own number."""
        return self.objective.evaluations(self.eval.nfe)

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
            kind = choose(known, given.get("kind") or default.kind, f"{name}.kind", OWN)
            filled[name] = merge({"kind": kind.kind, **complete(kind, {})}, given)
        return filled

    def to_dict(self) -> dict[str, Any]:
        """Plain values; :meth:`from_mapping` is its inverse."""
        kinds = {"net": to_mapping(self.net), "encoder": to_mapping(self.encoder)}
        return super().to_dict() | kinds


_SOURCE = {"kind": ("image", "state"), "layout": ("hwc", "chw")}


def _flat(given: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Keys with a dot in them, which the command line nests: observation.state=minmax."""
    flat: dict[str, Any] = {}
    for key, value in given.items():
        flat |= (
            _flat(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {prefix + key: value}
        )
    return flat


def _check_source(where: str, source: str | Mapping[str, str]) -> None:
    if isinstance(source, str):
        return
    if not isinstance(source, Mapping) or not {"key"} <= set(source) <= {"key", *_SOURCE}:
        raise ConfigError(
            f"{where}={source!r} must be a selector such as 'state[:7]', or a group with "
            "the setting key and perhaps kind (image, state) and layout (hwc, chw)"
        )
    if source.get("kind") == "state" and "layout" in source:
        raise ConfigError(f"{where}: layout is of images, and kind is state; leave one of them out")
    for name, choices in _SOURCE.items():
        if source.get(name, choices[0]) not in choices:
            raise ConfigError(f"{where}.{name}={source[name]!r} must be one of {list(choices)}")


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
