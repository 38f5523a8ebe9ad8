"""cmpolicy and LeRobot's DiffusionPolicy on the same data, for the figures beside this file."""

from __future__ import annotations

import platform
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from lerobot.configs.types import NormalizationMode
from lerobot.datasets.lerobot_dataset import LeRobotDatasetMetadata
from lerobot.policies.diffusion.configuration_diffusion import DiffusionConfig
from lerobot.policies.factory import make_policy, make_pre_post_processors
from lerobot.policies.pretrained import PreTrainedPolicy
from lerobot_policy_cmpolicy import CmpolicyConfig

#: Networks of the same widths.
WIDTHS = {"tiny": ((32, 64, 128), 64), "small": ((64, 128, 256), 128)}


@dataclass
class Learner:
    """A policy of LeRobot's with its processors and optimizer."""

    policy: PreTrainedPolicy
    before: Any
    after: Any
    optimizer: torch.optim.Optimizer

    @classmethod
    def make(cls, kind: str, data: Path, net: str, **settings: Any) -> Learner:
        """For ``cmpolicy`` or ``diffusion``; both learn at cmpolicy's rate."""
        torch.manual_seed(1)
        widths, embedding = WIDTHS[net]
        config: Any
        if kind == "cmpolicy":
            config = CmpolicyConfig(device="cpu", net=net, **settings)
        else:
            config = DiffusionConfig(
                device="cpu",
                down_dims=widths,
                diffusion_step_embed_dim=embedding,
                optimizer_lr=1e-3,
                **settings,
            )
            # its default leaves environment_state, pixels here, as it is, and then hardly learns
            config.normalization_mapping["ENV"] = NormalizationMode.MIN_MAX
        config.push_to_hub = False
        meta = LeRobotDatasetMetadata("me/data", root=data)
        policy = make_policy(config, ds_meta=meta)
        before, after = make_pre_post_processors(config, dataset_stats=meta.stats)
        preset = config.get_optimizer_preset()
        return cls(policy, before, after, preset.build(policy.get_optim_params()))


def delta_timestamps(config: Any, fps: float) -> dict[str, list[float]]:
    """Which steps LeRobot's data set hands over with each row."""
    seen = [i / fps for i in config.observation_delta_indices]
    told = [i / fps for i in config.action_delta_indices]
    return {**dict.fromkeys(config.input_features, seen), "action": told}


def machine() -> dict[str, str]:
    """Processor, cores, and the vector units that matter; versions."""
    text = subprocess.run(["lscpu"], capture_output=True, text=True).stdout
    found = dict(line.split(":", 1) for line in text.splitlines() if ":" in line)
    flags = found.get("Flags", "").split()
    units = [u for u in ("avx2", "avx512f", "avx512_bf16", "amx_bf16") if u in flags]
    name = f"{found['Model name'].strip()}, {found['CPU(s)'].strip()} cores, {' '.join(units)}"
    return {"cpu": name, "python": platform.python_version(), "torch": torch.__version__}
