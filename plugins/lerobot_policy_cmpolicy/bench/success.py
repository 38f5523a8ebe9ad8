"""Push-T from state after the same training time: cmpolicy and LeRobot's DiffusionPolicy.

``python success.py DATA OUT SECONDS [NET [KIND]]`` in LeRobot's environment; DATA is what
pusht_data.py writes, KIND ``cmpolicy`` or ``diffusion`` trains that one alone. Both learn in turn,
step by step, from the same windows in memory (LeRobot's loader would take half of the time), each
until it has used SECONDS of the processor on one thread: the loss of its own class, the optimizer
of its own preset, the rate of cmpolicy with a cosine over its seconds.
The checkpoints are then for ``lerobot-eval`` (see README.md).
"""

from __future__ import annotations

import json
import math
import sys
import time
from pathlib import Path

import numpy as np
import torch
from both import Learner, machine

from cmpolicy_data import ReplayBuffer, window_index
from cmpolicy_data.convert.lerobot.cached import as_store

BATCH, WARMUP, HORIZON, OBS, ACT = 64, 100, 16, 2, 8


def windows(data: Path) -> dict[str, torch.Tensor]:
    """All windows by LeRobot's names: observations (N, 2, ...), actions (N, 16, 2)."""
    buffer = ReplayBuffer.open(as_store(data))
    index = window_index(buffer.episode_ends, horizon=HORIZON, n_obs_steps=OBS, n_action_steps=ACT)
    found = {"action": torch.from_numpy(buffer.load("action")[index.action])}
    for key in ("state", "environment_state"):
        found[f"observation.{key}"] = torch.from_numpy(buffer.load(key)[index.obs])
    found["action_is_pad"] = torch.from_numpy(np.asarray(index.action_is_pad))
    return found


def step(learner: Learner, batch: dict[str, torch.Tensor], share: float, done: int) -> float:
    """One step with the rate for this share of the training; the loss."""
    group = learner.optimizer.param_groups[0]
    group["total_steps"] = int(max(done, 1) / max(share, 1e-3))  # the schedule goes by it
    for each in learner.optimizer.param_groups:
        each.setdefault("initial_lr", each["lr"])
        ramp = min(1.0, (done + 1) / WARMUP)
        each["lr"] = each["initial_lr"] * ramp * (1 + math.cos(math.pi * min(share, 1))) / 2
    loss, _ = learner.policy.forward(learner.before(dict(batch)))
    loss.backward()
    torch.nn.utils.clip_grad_norm_(learner.policy.parameters(), 1.0)
    learner.optimizer.step()
    learner.optimizer.zero_grad()
    if hasattr(learner.policy, "update"):
        learner.policy.update()
    return float(loss.detach())


def main(data: Path, out: Path, seconds: float, net: str = "tiny", *kinds: str) -> None:
    """Train both and save them."""
    torch.set_num_threads(1)
    everything = windows(data)
    count = len(everything["action"])
    kinds = kinds or ("cmpolicy", "diffusion")
    learners = {kind: Learner.make(kind, data, net) for kind in kinds}
    used = dict.fromkeys(learners, 0.0)
    done = dict.fromkeys(learners, 0)
    for learner in learners.values():
        learner.policy.train()
    rng = np.random.default_rng(0)
    while min(used.values()) < seconds:
        rows = torch.from_numpy(rng.integers(0, count, BATCH))
        batch = {name: values[rows] for name, values in everything.items()}
        for kind, learner in learners.items():
            if used[kind] >= seconds:
                continue
            began = time.process_time()
            loss = step(learner, batch, used[kind] / seconds, done[kind])
            used[kind] += time.process_time() - began
            done[kind] += 1
            if done[kind] % 200 == 0:
                print(kind, done[kind], f"{used[kind]:.0f} s", f"loss {loss:.4f}", flush=True)
    for kind, learner in learners.items():
        folder = out / kind
        learner.policy.save_pretrained(folder)
        learner.before.save_pretrained(folder)
        learner.after.save_pretrained(folder)
    facts = {"machine": machine(), "net": net, "seconds": used, "steps": done, "batch": BATCH}
    (out / "training.json").write_text(json.dumps(facts, indent=1) + "\n")
    print(facts)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), float(sys.argv[3]), *sys.argv[4:])
