"""``cmpolicy bench``: what a training step, an action chunk and an evaluation cost here."""

from __future__ import annotations

import shlex
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from cmpolicy.bench import delay, gpu, latency, loop, rollout, server, step
from cmpolicy.bench.report import Report
from cmpolicy.cli.parse import describe, read, split
from cmpolicy.cli.train import COMPOSITION
from cmpolicy.experiment.config import TrainConfig
from cmpolicy.nn.registry import encoder_config, net_config
from cmpolicy.schema import ConfigError, choose

_HEADER = """\
usage: cmpolicy bench COMMAND [key=value ...]

Measure what this machine makes of cmpolicy; a table here, JSON in out=FILE.

commands:
  step      one training step of psd (or objective=...) against one of fm, in alternating pairs;
            the loader's share. Takes every setting of `cmpolicy train` as well: net=base
  latency   one decision at batch 1, normalisation included, in each runtime; beside it DDPM and
            DDIM on the same network, and the floor that memory and arithmetic set
  rollout   wall time of an evaluation; for Robomimic beside bare robosuite environments
  server    a policy server on loopback: what it adds, and many clients at once
  loop      the control loop with a robot that costs nothing: missed ticks, jitter, memory
  gpu       training steps, decisions and memory on a GPU, each row alone; minutes=8 trains instead,
            by preset=gpu and every other setting of `cmpolicy train`
  delay     Push-T with injected inference delay, synchronous against asynchronous; a plot, too

`cmpolicy bench COMMAND --help` lists its settings."""
_SETTINGS: dict[str, type[Any]] = {
    "step": step.StepSettings,
    "latency": latency.LatencySettings,
    "rollout": rollout.RolloutSettings,
    "server": server.ServerSettings,
    "loop": loop.LoopSettings,
    "delay": delay.DelaySettings,
    "gpu": gpu.GpuSettings,
}
_SIMPLE: dict[str, Callable[[Any], Report]] = {
    "rollout": rollout.measure_rollout,
    "server": server.measure_server,
    "loop": loop.measure_loop,
}
_TRAINING = replace(COMPOSITION, extra={})


def help_text(words: Sequence[str]) -> str:
    """Of the benchmark among the words, or of all."""
    if words and words[0] in _SETTINGS:
        return describe(_SETTINGS[words[0]], f"usage: cmpolicy bench {words[0]} [key=value ...]")
    return _HEADER


def run(words: Sequence[str]) -> int:
    """Measure; the exit status."""
    if not words:
        raise ConfigError(f"which benchmark? Choose one of {', '.join(_SETTINGS)}")
    name, *rest = words
    cls = choose(_SETTINGS, name, "benchmark")
    command = shlex.join(["cmpolicy", "bench", *words])
    if name == "gpu":
        return _gpu(rest, command)
    if name == "step":
        settings, others = split(cls, rest)
        _check_out(settings.out)
        report = step.measure_step(settings, *_objectives(others))
    else:
        settings = read(cls, rest)
        _check_out(settings.out)
        if name == "latency":
            report = latency.measure_latency(settings, _networks(settings))
        elif name == "delay":
            report = delay.measure_delay(settings, command)
        else:
            report = _SIMPLE[name](settings)
    print(report.table())
    print(f"written to {report.save(settings.out, command)}")
    return 0


def _check_out(out: str) -> None:
    """Before measuring, which may take hours.

    Raises:
        ConfigError: no name of a JSON file: pictures and folders get theirs from it.
    """
    if Path(out).suffix != ".json" or Path(out).is_dir():
        raise ConfigError(f"out={out} must be a JSON file, such as outputs/bench/mine.json")


def _gpu(words: Sequence[str], command: str) -> int:
    settings, others = split(gpu.GpuSettings, words)
    if settings.minutes is None:
        _check_out(settings.out)
    else:
        config = TrainConfig.from_mapping(_TRAINING.compose(["preset=gpu", *others]))
        print(gpu.train_for(config, settings.minutes, settings.out, command))
        return 0
    pairs = [(net, *_objectives([f"net={net}", *others])) for net in settings.nets]
    print(gpu.measure_gpu(settings, pairs, command).table())
    return 0


def _objectives(words: Sequence[str]) -> tuple[TrainConfig, TrainConfig]:
    """Two runs of these settings: by flow matching, and by the objective named or the default.

    Raises:
        ConfigError: what is wrong with the words.
    """
    if "objective=fm" in words:
        raise ConfigError(
            "objective=fm: each step is compared with one of fm; name another objective, or none "
            "for psd"
        )
    shared = [word for word in words if word.partition("=")[0].split(".")[0] != "objective"]
    fm, other = (
        TrainConfig.from_mapping(_TRAINING.compose(chosen))
        for chosen in ([*shared, "objective=fm"], words)
    )
    return fm, other


def _networks(settings: latency.LatencySettings) -> latency.Networks | None:
    """The networks of ``net=<size>``, as a run with that setting would train them."""
    if settings.net is None:
        return None
    words = [f"net={settings.net}"]
    if settings.encoder is not None:
        words.append(f"encoder={settings.encoder}")
    composed = _TRAINING.compose(words)
    return net_config(composed["net"]), encoder_config(composed["encoder"])
