"""``cmpolicy bench``: what a training step, an action chunk and an evaluation cost here.

Exit status: 0 well, 2 the command could not be carried out.
"""

from __future__ import annotations

import shlex
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from cmpolicy.nn.registry import EncoderConfig, NetConfig
    from cmpolicy.train.config import TrainConfig

_USAGE = """\
usage: cmpolicy bench COMMAND [key=value ...]

Measure what this machine makes of cmpolicy; a table here, JSON in out=FILE.

commands:
  step      one isd training step against one fm step, in alternating pairs; the loader's share
              pairs=30 warmup=5 threads=null out=outputs/bench/step.json
              and any setting of cmpolicy train: net=base batch_size=512 device=cuda
  latency   one action chunk at batch 1, normalisation included, in each runtime; beside it DDPM
            and DDIM on the same network, and the floor that memory and arithmetic set
              policy=pusht nfe=[1,2,4,10,100] runtimes=[eager,compiled,pt2,onnx] diffusion=true
              device=cpu calls=500 seconds=30 threads=null seed=0 out=outputs/bench/latency.json
              (policy, or net=large with random weights, is required; runtimes: [eager,onnx] unless
              given; seconds ends a slow row)
  rollout   wall time of an evaluation; for Robomimic beside one bare robosuite environment
              policy=pusht protocol=null task=null episodes=50 first_seed=500000 nfe=1
              workers=null bare_steps=200 device=cpu out=outputs/bench/rollout.json
              (policy is required; protocol and task are its own unless given)
  server    a policy server on loopback: what it adds, many clients at once, and a fuzz
              policy=pusht nfe=1 pairs=2000 clients=16 seconds=10 fuzz=10000
              seed=0 out=outputs/bench/server.json (policy is required)
  loop      the control loop with a robot that costs nothing: missed ticks, jitter, memory
              policy=pusht hz=100 seconds=60 mode=async nfe=1 threads=1 device=cpu
              out=outputs/bench/loop.json (policy is required)
  delay     Push-T with injected inference delay, synchronous against asynchronous; a plot, too
              policy=pusht delays_ms=[0,50,100,150,200,300] modes=[sync,async]
              seeds=500000-500099 nfe=1 workers=2 device=cpu
              out=outputs/bench/delay.json (policy is required)
"""
_COMMANDS = ("step", "latency", "rollout", "server", "loop", "delay")


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point of ``cmpolicy bench``; returns the exit status."""
    words = list(sys.argv[1:] if argv is None else argv)
    if not words or {"-h", "--help"} & set(words):
        print(_USAGE, end="")
        return 0 if words else 2
    command, *rest = words
    if command not in _COMMANDS:
        print(
            f"cmpolicy bench: unknown command {command!r}; choose one of {', '.join(_COMMANDS)}",
            file=sys.stderr,
        )
        return 2
    try:
        _run(command, rest)
    except KeyboardInterrupt:
        print("cmpolicy bench: stopped", file=sys.stderr)
        return 130
    except (ValueError, OSError, ImportError) as error:
        # what the libraries raise on bad input, a missing extra, a server that fails
        print(f"cmpolicy bench {command}: {error}", file=sys.stderr)
        return 2
    return 0


def _run(command: str, words: Sequence[str]) -> None:
    # imported here so that --help does not wait for torch
    from cmpolicy.bench import settings as s
    from cmpolicy.cli.parse import read, split

    if command == "step":
        from cmpolicy.bench.step import measure_step

        step, others = split(s.StepSettings, words)
        report, out = measure_step(step, *_objectives(others)), step.out
    elif command == "latency":
        from cmpolicy.bench.latency import measure_latency

        latency = read(s.LatencySettings, words)
        report, out = measure_latency(latency, _networks(latency.net)), latency.out
    elif command == "server":
        from cmpolicy.bench.server import measure_server

        server = read(s.ServerSettings, words)
        report, out = measure_server(server), server.out
    elif command == "loop":
        from cmpolicy.bench.loop import LoopSettings, measure_loop

        loop = read(LoopSettings, words)
        report, out = measure_loop(loop), loop.out
    elif command == "delay":
        from cmpolicy.bench.delay import DelaySettings, measure_delay

        delay = read(DelaySettings, words)
        report = measure_delay(delay, shlex.join(["cmpolicy", "bench", command, *words]))
        out = delay.out
    else:
        from cmpolicy.bench.rollout import measure_rollout

        rollout = read(s.RolloutSettings, words)
        report, out = measure_rollout(rollout), rollout.out
    print(report.table())
    print(f"written to {report.save(out, shlex.join(['cmpolicy', 'bench', command, *words]))}")


def _objectives(words: Sequence[str]) -> tuple[TrainConfig, TrainConfig]:
    """Two runs of these settings, by flow matching and by isd.

    Raises:
        ConfigError: what is wrong with the words.
    """
    from cmpolicy.cli.parse import compose_settings
    from cmpolicy.schema import ConfigError
    from cmpolicy.train.config import TrainConfig

    if any(word.partition("=")[0] == "objective" for word in words):
        raise ConfigError(
            "step compares the objectives isd and fm; leave out objective=... "
            "(settings such as objective.sd_share=0.25 are isd's)"
        )
    shared = [word for word in words if not word.startswith("objective.")]
    configs = []
    for chosen in ([*shared, "objective=fm"], [*words, "objective=isd"]):
        settings = compose_settings("train", chosen)
        settings.pop("out")
        configs.append(TrainConfig.from_mapping(settings))
    return configs[0], configs[1]


def _networks(net: str | None) -> tuple[NetConfig, EncoderConfig] | None:
    """The networks of ``net=<size>``, as a run with that setting would train them."""
    if net is None:
        return None
    from cmpolicy.cli.parse import compose_settings
    from cmpolicy.nn.registry import encoder_config, net_config

    settings = compose_settings("train", [f"net={net}"])
    return net_config(settings["net"]), encoder_config(settings["encoder"])


if __name__ == "__main__":
    sys.exit(main())
