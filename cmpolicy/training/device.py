"""Which device, how many processes, which precision: ``accelerate``, thinly."""

from __future__ import annotations

import os
import platform
from contextlib import suppress
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedDataParallelKwargs, InitProcessGroupKwargs

from cmpolicy.schema import ConfigError
from cmpolicy.training.config import LoopConfig

#: The other processes of a distributed run wait this long for the one that evaluates.
EVALUATION_TIMEOUT = timedelta(hours=2)


def choose_device(name: str) -> torch.device:
    """The device called ``auto`` (the GPU if there is one), ``cpu``, ``cuda`` or ``cuda:1``.

    Raises:
        ConfigError: no such device, or a GPU is asked for where there is none.
    """
    has_gpu = torch.cuda.is_available()
    if name == "auto":
        return torch.device("cuda" if has_gpu else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ConfigError(f"device={name} is no device; use auto, cpu or cuda") from error
    if device.type == "cuda" and not has_gpu:
        raise ConfigError(
            f"device={name}, but torch sees no GPU; use device=cpu, or install a torch build for "
            "your GPU"
        )
    return device


def make_accelerator(config: LoopConfig) -> Accelerator:
    """The device and the processes of a run; several when started by torchrun or accelerate.

    Raises:
        ConfigError: a GPU is asked for where there is none.
    """
    state: Any = AcceleratorState
    if state._shared_state and state().num_processes == 1:
        # of a run before in this process: it would keep that one's device
        state._reset_state(True)
    return Accelerator(
        cpu=choose_device(config.device).type == "cpu",
        mixed_precision="no",  # the trainer's own autocast: this one is global to the process
        kwargs_handlers=[
            # the only buffers are the normaliser's, which never change
            DistributedDataParallelKwargs(broadcast_buffers=False),
            InitProcessGroupKwargs(timeout=EVALUATION_TIMEOUT),
        ],
    )


def use_bf16(config: LoopConfig, device: torch.device) -> bool:
    """Whether the network runs in bfloat16.

    ``auto`` says yes on GPUs that have it and on CPUs with matrix units for it (AMX). The plain
    vector instructions (AVX512-BF16) are no reason: with them alone a step took 1.2 times as long
    as in fp32.
    """
    if config.precision != "auto":
        return config.precision == "bf16"
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported())
    ask = getattr(torch.cpu, "get_capabilities", None)  # from torch 2.11 on; lerobot has older ones
    return ask is not None and bool(ask().get("amx_bf16"))


def describe_device(device: torch.device) -> str:
    """Device in words: the processor with torch's threads and the cores, or the GPU's name."""
    if device.type == "cuda":
        return f"{device}: {torch.cuda.get_device_name(device)}"
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return f"{device}: {_processor()}, {torch.get_num_threads()} torch threads, {cores} cores"


def _processor() -> str:
    with suppress(OSError):  # Linux; elsewhere platform knows at least the architecture
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
