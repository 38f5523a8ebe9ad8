"""Times of a training step and of a chunk, in LeRobot and without, in turn in one process.

``python speed.py DATA OUT.json [ROUNDS]`` in LeRobot's environment; DATA is what pusht_data.py
writes. Milliseconds of the processor, one thread, since other work shares the machine (on an idle
one they are those of the clock, which are noted, too); medians, and ratios taken round by round.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from both import Learner, delta_timestamps, machine
from lerobot.datasets.lerobot_dataset import LeRobotDataset
from lerobot.scripts.lerobot_train import update_policy
from lerobot.utils.logging_utils import AverageMeter, MetricsTracker

from cmpolicy.experiment.config import TrainConfig
from cmpolicy.experiment.data import load_training_data
from cmpolicy.experiment.train import new_policy
from cmpolicy.policy.policy import ConsistencyPolicy
from cmpolicy.training.device import make_accelerator
from cmpolicy.training.trainer import Trainer

BATCH = 64


Times = dict[str, list[tuple[float, float]]]


def in_turn(runs: dict[str, Callable[[], object]], rounds: int) -> Times:
    """Milliseconds of processor and clock, round by round; two rounds before do not count."""
    took: Times = {name: [] for name in runs}
    for number in range(rounds + 2):
        for name in list(runs) if number % 2 else list(reversed(runs)):
            began, clock = time.process_time(), time.perf_counter()
            runs[name]()
            ends = time.process_time() - began, time.perf_counter() - clock
            if number >= 2:
                took[name].append((ends[0] * 1e3, ends[1] * 1e3))
    return took


def summary(took: Times) -> dict[str, Any]:
    """Medians, and the median ratio of processor times to the first one's."""
    first = next(iter(took.values()))
    return {
        name: {
            "ms": round(median(cpu for cpu, _ in values), 3),
            "clock_ms": round(median(clock for _, clock in values), 3),
            "ratio": round(median(a[0] / b[0] for a, b in zip(values, first, strict=True)), 3),
        }
        for name, values in took.items()
    }


def steps(data: Path, folder: Path) -> dict[str, Callable[[], object]]:
    """A step of ``cmpolicy train`` and one of ``lerobot-train``, half-way; and the data alone."""
    settings = {
        "data": {"name": "lerobot", "path": str(data)},
        "net": {"kind": "unet1d"},
        "batch_size": BATCH,
        "device": "cpu",
        "precision": "fp32",  # lerobot-train's
    }
    config = TrainConfig.from_mapping(TrainConfig.complete(settings))
    accelerator = make_accelerator(config)
    ours = load_training_data(config)
    loader = ours.loader(batch_size=BATCH, seed=0, device=accelerator.device)
    policy = new_policy(config, ours)
    trainer = Trainer(
        policy,
        config,
        accelerator=accelerator,
        batches=loader.batch,
        draw=policy.draw,
        run_dir=folder,
    )
    trainer.examples = config.examples // 2

    learner = Learner.make("cmpolicy", data, "small")
    learner.optimizer.param_groups[0]["total_steps"] = 2  # the run's length: half of it is over
    learner.policy.steps += 1
    theirs = LeRobotDataset(
        "me/data", root=data, delta_timestamps=delta_timestamps(learner.policy.config, 10)
    )
    batches = iter(torch.utils.data.DataLoader(theirs, BATCH, shuffle=True, num_workers=0))
    batch = learner.before(next(batches))
    names = ("loss", "grad_norm", "lr", "update_s", "dataloading_s")
    meters = {name: AverageMeter(name, ":.3f") for name in names}
    tracker = MetricsTracker(BATCH, theirs.num_frames, theirs.num_episodes, meters)
    outer = Accelerator(cpu=True)

    def update() -> None:
        update_policy(tracker, learner.policy, batch, learner.optimizer, 1.0, outer)

    return {
        "cmpolicy train: step with its data": trainer.step,
        "lerobot-train: step": update,
        "cmpolicy train: data": lambda: loader.batch(trainer.examples),
        "lerobot-train: data": lambda: learner.before(next(batches)),
    }


def chunks(data: Path, folder: Path) -> dict[str, Callable[[], object]]:
    """A chunk of actions of policies of the same widths, batch 1."""
    learner = Learner.make("cmpolicy", data, "small")
    learner.policy.save_pretrained(folder / "checkpoint")
    plugged = type(learner.policy).from_pretrained(folder / "checkpoint")
    bundle = ConsistencyPolicy.from_pretrained(folder / "checkpoint/cmpolicy")
    obs = bundle.spec.zeros()
    noise = np.random.default_rng(0).normal(size=(1, *bundle.spec.noise_shape)).astype("float32")
    seen = {
        name: torch.from_numpy(obs[name.removeprefix("observation.")][:, 0])
        for name in plugged.config.input_features
    }

    def select() -> None:
        plugged.reset()
        plugged.select_action(seen, noise=torch.from_numpy(noise))

    def diffusion(**settings: Any) -> Callable[[], object]:
        policy = Learner.make("diffusion", data, "small", **settings).policy.eval()

        def run() -> None:
            policy.reset()
            policy.select_action(dict(seen))

        return run

    return {
        "cmpolicy infer": lambda: bundle.infer(obs, noise),
        "cmpolicy select_action": select,
        "DiffusionPolicy, DDIM 10": diffusion(noise_scheduler_type="DDIM", num_inference_steps=10),
        "DiffusionPolicy, DDPM 100": diffusion(),
    }


def main(data: Path, out: Path, rounds: int = 30) -> None:
    """Both, into a file."""
    torch.set_num_threads(1)
    with TemporaryDirectory() as name:
        folder = Path(name)
        step = in_turn(steps(data, folder / "run"), rounds)
        chunk = in_turn(chunks(data, folder), rounds)
    result = {
        "command": f"python speed.py DATA OUT.json {rounds}",
        "machine": machine(),
        "batch": BATCH,
        "step": summary(step),
        "chunk": summary(chunk),
    }
    out.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), *map(int, sys.argv[3:]))
