"""Which device, how many processes, which precision: ``accelerate``, thinly."""

from __future__ import annotations

from datetime import timedelta

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedDataParallelKwargs, InitProcessGroupKwargs

from cmpolicy.schema import ConfigError
from cmpolicy.train.config import LoopConfig

#: The other processes of a distributed run wait this long for the one that evaluates.
EVALUATION_TIMEOUT = timedelta(hours=2)


def make_accelerator(config: LoopConfig) -> Accelerator:
    """The device and the processes of a run; several when started by torchrun or accelerate.

    Raises:
        ConfigError: a GPU is asked for where there is none.
    """
    has_gpu = torch.cuda.is_available()
    if config.device == "cuda" and not has_gpu:
        raise ConfigError(
            "device=cuda, but torch sees no GPU; use device=cpu, or install a torch build "
            "for your GPU"
        )
    return Accelerator(
        cpu=config.device == "cpu" or not has_gpu,
        mixed_precision="no",  # the trainer's own autocast: this one is global to the process
        kwargs_handlers=[
            # the only buffers are the normaliser's, which never change
            DistributedDataParallelKwargs(broadcast_buffers=False),
            InitProcessGroupKwargs(timeout=EVALUATION_TIMEOUT),
        ],
    )


def use_bf16(config: LoopConfig, device: torch.device) -> bool:
    """Whether the network runs in bfloat16 (``auto``: where the hardware multiplies in it)."""
    if config.precision != "auto":
        return config.precision == "bf16"
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported())
    capabilities = torch.cpu.get_capabilities()
    return bool(capabilities.get("avx512_bf16") or capabilities.get("amx_bf16"))
