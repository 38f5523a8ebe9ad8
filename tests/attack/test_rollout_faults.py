"""Environments that hang, lie or outlive their parent: an error that names the seed, no wait."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import cloudpickle
import gymnasium
import numpy as np
import pytest
from gymnasium import spaces

from cmpolicy_eval import RolloutError, rollout
from cmpolicy_eval.rollout import try_out

cloudpickle.register_pickle_by_value(sys.modules[__name__])


class Faulty(gymnasium.Env[Any, Any]):
    """Goes wrong in the episode of seed 3, at its third step."""

    observation_space = spaces.Dict(
        {"x": spaces.Box(-9, 9, (2,), np.float32), "y": spaces.Box(-9, 9, (1,), np.float32)}
    )
    action_space = spaces.Box(-1, 1, (1,), np.float32)

    def __init__(self, fault: str) -> None:
        self.fault, self.count = fault, 0

    def reset(self, *, seed: int | None = None, options: Any = None) -> Any:
        self.wrong, self.count = seed == 3, 0
        if self.wrong and self.fault == "hang in reset":
            time.sleep(1000)
        return self.observation(), {}

    def observation(self) -> Any:
        obs = {"x": np.zeros(2, np.float32), "y": np.zeros(1, np.float32)}
        if self.wrong and self.count == 3:
            if self.fault == "nan":
                obs["x"][1] = np.nan
            elif self.fault == "shape":
                obs["x"] = np.zeros(3, np.float32)
            elif self.fault == "key":
                del obs["y"]
            elif self.fault == "no mapping":
                return obs["x"]
        return obs

    def step(self, action: Any) -> Any:
        self.count += 1
        wrong = self.wrong and self.count == 3
        if wrong and self.fault == "hang":
            time.sleep(1000)
        if wrong and self.fault == "never back in Python":
            sum(range(10**12))
        if wrong and self.fault == "stop":
            os.kill(os.getpid(), signal.SIGSTOP)
        reward = float("nan") if wrong and self.fault == "reward" else 0.0
        return self.observation(), reward, False, self.count == 8, {"is_success": False}


class Still:
    n_obs_steps, n_action_steps = 1, 2

    def infer(self, obs: Any) -> Any:
        return np.zeros((len(obs["x"]), 2, 1), np.float32)


def run(fault: str, workers: int, timeout: float = 30.0) -> None:
    rollout(
        lambda: Faulty(fault),
        Still(),
        [1, 2, 3, 4],
        max_steps=8,
        n_workers=workers,
        batch_size=4,
        env_timeout=timeout,
    )


@pytest.mark.parametrize("workers", [1, 2])
@pytest.mark.parametrize(
    ("fault", "words"),
    [
        ("hang", r"seed 3, from step 2 on: the environment did not answer within 5 s.*env_timeout"),
        ("hang in reset", r"seed 3, reset: the environment did not answer within 5 s"),
        ("never back in Python", r"seed 3, from step 2 on: the environment did not answer"),
        ("stop", r"seed 3, from step 2 on: the environment did not answer within 5 s"),
    ],
)
def test_hanging_environments(fault: str, words: str, workers: int) -> None:
    with pytest.raises(RolloutError, match=words):
        run(fault, workers, timeout=5.0)


@pytest.mark.parametrize("workers", [1, 2])
@pytest.mark.parametrize(
    ("fault", "words"),
    [
        ("nan", "step 3: the observation 'x' holds NaN or infinite numbers"),
        ("shape", r"step 3: the observation 'x' has shape \(3,\); the environment declares \(2,\)"),
        ("key", r"step 3: the observation lacks the key 'y'; it has \['x'\]"),
        ("no mapping", "step 3: the observation is a ndarray, expected a mapping"),
        ("reward", "step 3: the reward is nan"),
    ],
)
def test_observations_and_rewards_that_are_none(fault: str, words: str, workers: int) -> None:
    with pytest.raises(RolloutError, match=f"seed 3, from step 2 on: .*{words}"):
        run(fault, workers)


def test_a_trial_before_training() -> None:
    try_out(lambda: Faulty("nan"), Still(), 1, None, timeout=20.0)
    with pytest.raises(RolloutError, match="seed 3, reset: the environment did not answer within"):
        try_out(lambda: Faulty("hang in reset"), Still(), 3, None, timeout=5.0)


def test_an_environment_that_cannot_be_made_in_time() -> None:
    def make() -> Any:
        time.sleep(1000)

    with pytest.raises(RolloutError, match="cannot be made: the environment did not answer within"):
        try_out(make, Still(), 3, None, timeout=5.0)


_PARENT = """
import signal
import sys
signal.signal(signal.SIGHUP, signal.SIG_DFL)  # nohup hands down that it is ignored
sys.path.insert(0, sys.argv[1])
from test_rollout_faults import Faulty, Still
from cmpolicy_eval import pool
from cmpolicy_eval.rollout import rollout
opened = pool.EnvPool.__init__
def show(self, *args, **kwargs):
    opened(self, *args, **kwargs)
    print(*[worker._process.pid for worker in self._workers], flush=True)
pool.EnvPool.__init__ = show
fault = sys.argv[2]
rollout(lambda: Faulty(fault), Still(), [1, 2, 3], max_steps=8, n_workers=3, batch_size=3,
        env_timeout=1000)
"""


def is_alive(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):  # gone before, or while it is read
        return False
    return state != "Z"


@pytest.mark.skipif(not Path("/proc").is_dir(), reason="reads the process list of Linux")
@pytest.mark.parametrize("fault", ["hang", "stop"])
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGHUP])
def test_workers_end_with_their_parent(number: signal.Signals, fault: str) -> None:
    """The signal reaches the parent alone; one worker hangs, or is stopped."""
    here = str(Path(__file__).parent)
    parent = subprocess.Popen(
        [sys.executable, "-c", _PARENT, here, fault], stdout=subprocess.PIPE, text=True
    )
    assert parent.stdout is not None
    workers = [int(word) for word in parent.stdout.readline().split()]
    assert len(workers) == 3
    time.sleep(1.5)  # the third hangs by now
    assert all(map(is_alive, workers))
    parent.send_signal(number)
    parent.wait(timeout=300)  # at once, but on a machine that is busy
    end = time.monotonic() + 60
    while any(map(is_alive, workers)) and time.monotonic() < end:
        time.sleep(0.05)
    assert not any(map(is_alive, workers))
