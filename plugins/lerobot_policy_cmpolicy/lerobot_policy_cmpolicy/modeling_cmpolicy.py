"""The policy of ``--policy.type=cmpolicy``: LeRobot's interface around ConsistencyPolicy.

Legend: B batch, To observation steps, T horizon, Ta executed actions, A action size.
"""

from __future__ import annotations

import copy
import warnings
from collections import deque
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
from lerobot.configs.policies import PreTrainedConfig
from lerobot.policies.pretrained import PreTrainedPolicy
from torch import Tensor

from cmpolicy.normalize import Normalizer
from cmpolicy.policy.policy import ConsistencyPolicy
from cmpolicy.spec import SpecError
from cmpolicy.training.optim import ModelEma
from lerobot_policy_cmpolicy.configuration_cmpolicy import TOTAL_STEPS, CmpolicyConfig

#: Folder inside a LeRobot checkpoint that holds the policy as a bundle of cmpolicy.
BUNDLE = "cmpolicy"
ACTION = "action"
#: Where a checkpoint comes from, in LeRobot's from_pretrained.
_HUB = ("force_download", "resume_download", "proxies", "token", "cache_dir", "local_files_only")
_HUB += ("revision", "cli_overrides")


class CmpolicyPolicy(PreTrainedPolicy):
    """A one-step policy: one network evaluation per chunk of actions.

    It holds two sets of weights: those that are trained and their moving average, which acts. Both
    are in ``model.safetensors``, with the normaliser.

    Args:
        config: the settings, with the features of the data.
        dataset_stats: minimum and maximum by key; they make the normaliser. None where the weights,
            and the normaliser with them, are about to be loaded.
        dataset_meta: LeRobot's description of the data set; its rate is kept in the bundle.

    Raises:
        SpecError: features that do not fit.
        ValueError: statistics of a key are missing.
    """

    config_class = CmpolicyConfig
    name = "cmpolicy"

    def __init__(
        self,
        config: CmpolicyConfig,
        dataset_stats: Mapping[str, Mapping[str, Any]] | None = None,
        dataset_meta: Any = None,
        **_: Any,
    ) -> None:
        super().__init__(config)
        spec = config.build_spec()
        self._names = config.key_names
        shapes = {**spec.states, ACTION: (spec.action_dim,)}
        if dataset_stats is None:
            normalizer = Normalizer.identity(shapes)
        else:
            normalizer = _fit(self._names, shapes, dataset_stats, config.clamp_actions)
        self.policy = ConsistencyPolicy(
            spec,
            config.build_net(),
            normalizer,
            encoder=config.build_encoder(spec),
            path=config.path,
            sampler=config.sampler_kind,
            nfe=config.evaluations,
            objective=config.build_objective(),
        )
        self.policy.pad_loss = config.pad_loss
        self.policy.noise_scale = config.noise_scale
        fps = getattr(dataset_meta, "fps", None)
        self.policy.control_hz = None if fps is None else float(fps)
        self.averaged = copy.deepcopy(self.policy).eval().requires_grad_(False)
        self.register_buffer("steps", torch.zeros((), dtype=torch.int64))
        self.register_buffer("rate", torch.tensor(float(fps or 0.0)))
        self._normalises = dataset_stats is not None
        self._average: ModelEma | None = None
        self._metrics: dict[str, Tensor] = {}
        self._group: dict[str, Any] = {}
        self.reset()

    # -- training -------------------------------------------------------------------------------

    def get_optim_params(self) -> list[dict[str, Any]]:
        """The weights that are trained."""
        self._group = {"params": list(self.policy.parameters())}
        return [self._group]

    def forward(
        self, batch: dict[str, Tensor], reduction: str = "mean"
    ) -> tuple[Tensor, dict[str, float]]:
        """Loss of a batch of windows, and its parts; on a GPU the parts are of the call before.

        So no step waits for the GPU in its middle.

        Args:
            batch: LeRobot's keys with To observations and T actions each.
            reduction: ``mean``, or ``none`` for the loss per example.

        Raises:
            SpecError: keys or shapes that do not fit.
            ValueError: the policy was made without statistics of the data.
        """
        if not self._normalises:
            raise ValueError(
                "this policy was made without statistics of the data, so it cannot be trained: "
                "hand in dataset_stats, or load a trained one with from_pretrained"
            )
        obs = self._observations(batch, history=True)
        self.policy.spec.check_obs(obs)
        action = batch[ACTION]
        shape = (len(action), self.policy.spec.horizon, self.policy.spec.action_dim)
        if tuple(action.shape) != shape:
            raise SpecError(
                f"'action' has shape {tuple(action.shape)}, expected {shape} (batch, horizon, "
                "action_dim); the data is to be read with the policy's action_delta_indices"
            )
        padded = batch.get("action_is_pad")
        if padded is None:
            padded = torch.zeros(shape[:2], dtype=torch.bool, device=action.device)
        if self.config.forget_history and self.training:
            forgets = torch.rand(len(action), device=action.device) < self.config.forget_history
            for name, steps in obs.items():
                of_each = forgets.view(-1, *[1] * (steps.ndim - 1))
                obs[name] = torch.where(of_each, steps[:, -1:], steps)
        window: Any = {"obs": obs, "action": action, "action_is_pad": padded}
        n_augment = getattr(self.policy.encoder, "n_augment", 0)
        if n_augment and self.training:
            window["augment"] = torch.rand(len(action), n_augment, device=action.device)
        output = self.policy.compute_loss(window, progress=self.progress, ema=self.averaged)
        metrics, self._metrics = self._metrics or output.metrics, output.metrics
        if action.device.type == "cpu":
            metrics = output.metrics
        loss = output.per_example if reduction == "none" else output.loss
        return loss, {name: float(value) for name, value in metrics.items()}

    def update(self) -> None:
        """Move the average of the weights; ``lerobot-train`` calls it after every step."""
        if self._average is None:
            self._average = ModelEma(self.policy, self.config.ema, self.averaged)
            self._average.counter = int(self.steps)
        self._average.step(self.policy)
        self.steps += 1

    @property
    def progress(self) -> float:
        """Share of the run that is done, which the schedules of objectives go by."""
        total = self._group.get(TOTAL_STEPS)
        if total is None:
            late = getattr(self.policy.objective, "sd_begin", 1) > 0
            if self.config.objective != "fm" and late and self._group:
                warnings.warn(
                    "the length of the run is not known, since its schedule is not the one of "
                    "cmpolicy (scheduler.type=cmpolicy); the objective is taken to be at its end, "
                    "as after its sd_begin",
                    stacklevel=2,
                )
                self._group[TOTAL_STEPS] = 0
            return 1.0
        done = self._average.counter if self._average is not None else int(self.steps)
        return min(1.0, done / max(total, 1))

    # -- acting ---------------------------------------------------------------------------------

    def reset(self) -> None:
        """Forget the episode."""
        self._history: dict[str, deque[Tensor]] = {
            key: deque(maxlen=self.policy.n_obs_steps) for key in self.policy.spec.obs
        }
        self._actions: deque[Tensor] = deque()

    @torch.no_grad()
    def select_action(self, batch: dict[str, Tensor], noise: Tensor | None = None) -> Tensor:
        """The next action (B, A); a new chunk is predicted every Ta calls.

        Args:
            batch: one observation (B, ...) per key. At the start of an episode it stands for the
                ones before, too.
            noise: (B, T, A) standard normal; drawn here if not given.
        """
        self._remember(batch)
        if not self._actions:
            seen = {key: torch.stack(list(steps), 1) for key, steps in self._history.items()}
            chunk = self._predict(seen, noise)
            self._actions.extend(chunk.transpose(0, 1))
        return self._actions.popleft()

    @torch.no_grad()
    def predict_action_chunk(
        self, batch: dict[str, Tensor], noise: Tensor | None = None, **others: Any
    ) -> Tensor:
        """The actions to execute now, (B, Ta, A).

        Args:
            batch: To observations (B, To, ...) per key; or one, (B, ...), which then stands for
                those before it, too: LeRobot's server hands over one now and then, and never says
                that an episode is over.
            noise: (B, T, A) standard normal; drawn here if not given.

        Raises:
            ValueError: real-time chunking was asked for.
        """
        given = sorted(name for name, value in others.items() if value is not None)
        if given:
            raise ValueError(_no_chunking(given))
        name = next(iter(self._names))
        size = len(self.config.input_features[name].shape)
        whole = name not in batch or batch[name].ndim == size + 2
        obs = self._observations(batch, history=whole)
        if not whole:
            steps = self.policy.n_obs_steps
            obs = {k: torch.stack([value] * steps, dim=1) for k, value in obs.items()}
        return self._predict(obs, noise)

    def init_rtc_processor(self) -> None:
        """Called by LeRobot where real-time chunking is switched on, or off.

        Raises:
            ValueError: on.
        """
        if getattr(getattr(self.config, "rtc_config", None), "enabled", False):
            raise ValueError(_no_chunking(["rtc_config"]))

    def _predict(self, obs: dict[str, Tensor], noise: Tensor | None) -> Tensor:
        # a clone is no tensor of inference mode, so LeRobot may change it
        return self.averaged.predict_action_chunk(obs, noise=noise).clone()

    def _remember(self, batch: Mapping[str, Tensor]) -> None:
        for key, value in self._observations(batch, history=False).items():
            steps = self._history[key]
            if steps and steps[-1].shape != value.shape:
                raise SpecError(
                    f"observation {key!r} has shape {tuple(value.shape)}, the one before had "
                    f"{tuple(steps[-1].shape)}; call reset() between episodes"
                )
            steps.extend([value] * (1 if steps else self.policy.n_obs_steps))

    def _observations(self, batch: Mapping[str, Tensor], *, history: bool) -> dict[str, Tensor]:
        """cmpolicy's keys, shapes and frames: (B, To, ...) each with ``history``, else (B, ...)."""
        missing = sorted(self._names.keys() - batch.keys())
        if missing:
            raise SpecError(
                f"observation keys are missing: {missing}; the policy was trained on "
                f"{sorted(self._names)}, got {sorted(map(str, batch))}"
            )
        spec = self.policy.spec
        found = {}
        for name, key in self._names.items():
            value = batch[name]
            size = len(self.config.input_features[name].shape)
            if history and value.ndim == size + 1 and spec.n_obs_steps == 1:
                value = value.unsqueeze(1)
            if value.ndim != size + 1 + history:
                wanted = "(batch, n_obs_steps, ...)" if history else "(batch, ...)"
                raise SpecError(
                    f"observation {name!r} has shape {tuple(value.shape)}, expected {wanted} with "
                    f"{tuple(self.config.input_features[name].shape)}"
                )
            if key in spec.images:
                found[key] = to_frames(value)
            else:
                found[key] = value.to(torch.float32).reshape(
                    *value.shape[: value.ndim - size], *spec.obs[key]
                )
        return found

    # -- files ----------------------------------------------------------------------------------

    def _save_pretrained(self, save_directory: Path) -> None:
        """LeRobot's two files, and the acting weights as a bundle of cmpolicy in a sub-folder."""
        super()._save_pretrained(save_directory)
        self.averaged.save_pretrained(
            save_directory / BUNDLE,
            card=_CARD,
            metadata={"lerobot": {"keys": self._names, "steps": int(self.steps)}},
        )

    @classmethod
    def from_pretrained(
        cls,
        pretrained_name_or_path: str | Path,
        *,
        config: CmpolicyConfig | None = None,
        strict: bool = True,
        **kwargs: Any,
    ) -> Self:
        """A checkpoint of LeRobot (folder or hub id), or a bundle of cmpolicy (folder or name).

        The normaliser is the one of the file, whatever statistics are handed in: the weights mean
        actions in its units.

        Raises:
            BundleError, FileNotFoundError: there is none, or it is damaged.
        """
        from lerobot_policy_cmpolicy.wrap import from_bundle, is_bundle

        if is_bundle(pretrained_name_or_path):
            return from_bundle(cls, pretrained_name_or_path, config)
        if config is None:
            hub = {name: value for name, value in kwargs.items() if name in _HUB}
            config = PreTrainedConfig.from_pretrained(pretrained_name_or_path, **hub)
        config.without_download()
        policy = super().from_pretrained(
            pretrained_name_or_path, config=config, strict=strict, **kwargs
        )
        policy.take_loaded()
        return policy

    def take_loaded(self) -> None:
        """What the loaded weights say about the rest of the policy."""
        self._normalises = True
        rate = float(self.rate)
        for policy in (self.policy, self.averaged):
            policy.control_hz = rate or None
        self.averaged.lay_out_for_inference()

    def _apply(self, fn: Any, *args: Any, **kwargs: Any) -> Self:
        """Move; the average holds references to the weights where they were."""
        super()._apply(fn, *args, **kwargs)
        self._average = None
        return self

    def train(self, mode: bool = True) -> Self:
        """As ever, but the average never trains."""
        super().train(mode)
        self.averaged.eval()
        return self


def _no_chunking(names: list[str]) -> str:
    return (
        f"cmpolicy has no real-time chunking, so {names} cannot be used: switch it off "
        "(rtc.enabled=false, inference.type=sync). One chunk takes one network evaluation, and "
        "cmpolicy's own ControlLoop bridges delays"
    )


def to_frames(value: Tensor) -> Tensor:
    """LeRobot's frames (..., C, H, W), in [0, 1] or uint8, as (..., H, W, C) uint8."""
    if value.dtype is not torch.uint8:
        value = (value * 255).round_().clamp_(0, 255).to(torch.uint8)
    return value.movedim(-3, -1)


def _fit(
    names: Mapping[str, str],
    shapes: Mapping[str, tuple[int, ...]],
    stats: Mapping[str, Mapping[str, Any]],
    clamp_actions: bool,
) -> Normalizer:
    """The normaliser of a data set's statistics."""
    data = {}
    for name, key in {**names, ACTION: ACTION}.items():
        if key not in shapes:
            continue  # frames
        if not {"min", "max"} <= set(stats.get(name, ())):
            raise ValueError(
                f"the data set has no minimum and maximum of {name!r}; it has statistics of "
                f"{sorted(stats)}"
            )
        ends = [np.asarray(stats[name][end], np.float32) for end in ("min", "max")]
        data[key] = np.stack(ends).reshape(2, *shapes[key])
    limits = {ACTION: (data[ACTION][0], data[ACTION][1])} if clamp_actions else None
    return Normalizer.fit(data, limits=limits)


_CARD = """# A policy trained by lerobot-train

The acting weights of a LeRobot checkpoint, as a bundle of cmpolicy. It needs no LeRobot:
`ConsistencyPolicy.from_pretrained(<this folder>)`.
"""
