"""Scripted Push-T demonstrations: the data set that cmpolicy brings along.

Episode k is a pure function of its seed and of ``VERSION``: the block and the agent start where
Diffusion Policy's evaluation law puts them for seed k, and the unsteadiness of the demonstrator's
hand comes from ``default_rng([VERSION, k])``. So a data set
depends on its first seed and size only, not on how many processes made it.
"""

from __future__ import annotations

import itertools
import multiprocessing
import shutil
import tempfile
import time
from collections import deque
from collections.abc import Callable, Generator
from concurrent.futures import Future, ProcessPoolExecutor
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import ArrayLike, NDArray

from cmpolicy_data.chunks import ReplayBufferError
from cmpolicy_data.generate.demonstrator import Demonstrator, NoPushError
from cmpolicy_data.generate.request import FIRST_EVALUATION_SEED, check_request
from cmpolicy_data.generate.tee import Pose
from cmpolicy_data.generate.world import State
from cmpolicy_data.pack import pack
from cmpolicy_data.replay_buffer import ReplayBuffer
from cmpolicy_envs import keypoints_from_pose
from cmpolicy_envs.pusht import ARENA, SUCCESS_COVERAGE, PushTEnv
from cmpolicy_envs.pusht_states import dp_initial_state

VERSION = 2
GENERATOR = "cmpolicy_data.generate.pusht"
MAX_STEPS = 300
# More than success: a policy that is less exact than its demonstrations then still succeeds.
_ENOUGH_COVERAGE = 0.975
_REST_STEPS = 8
# Failed attempts in a row after which something is wrong with the simulator, not with the luck.
_PATIENCE = 50

Array = NDArray[np.float32]


@dataclass(frozen=True)
class GenerateReport:
    """What a call of `generate` did."""

    attempted: int
    kept: int
    steps: int
    seconds: float
    path: Path


@dataclass(frozen=True)
class Episode:
    """One demonstration. Row i of ``state`` is what is seen when ``action`` i is chosen.

    action (L, 2) targets of the agent, px; state (L, 5) agent xy, block xy, block angle;
    coverage (L,) after each action.
    """

    seed: int
    action: Array
    state: Array
    coverage: NDArray[np.float64]

    @property
    def succeeds(self) -> bool:
        """Whether coverage exceeds 0.95 at some step."""
        return bool(self.coverage.max(initial=0.0) > SUCCESS_COVERAGE)


def demonstrate(seed: int) -> Episode:
    """One attempt; it ends at coverage 0.975, after 300 steps, or when no push can be made.

    At the end the hand stays where it is for a few steps: windows of training reach beyond the
    decision, so without these the last decisions would have none.
    """
    env = PushTEnv()
    _, info = env.reset(options={"reset_to_state": dp_initial_state(seed)})
    demonstrator = Demonstrator(np.random.default_rng([VERSION, seed]))
    states, actions, coverages = [], [], [0.0]

    def step(target: ArrayLike) -> None:
        nonlocal info
        # Actions are stored, hence executed, in float32 and to 1/64 px, which compresses well.
        action = np.clip(np.round(np.asarray(target) * 64) / 64, 0.0, ARENA).astype(np.float32)
        states.append(info["state"])
        actions.append(action)
        *_, info = env.step(action)
        coverages.append(info["coverage"])

    while coverages[-1] <= _ENOUGH_COVERAGE and len(actions) < MAX_STEPS - _REST_STEPS:
        try:
            step(demonstrator.act(_state(env)))
        except NoPushError:
            break
    rest = np.asarray(env.agent.position)
    for _ in range(_REST_STEPS):
        step(rest)
    return Episode(
        seed,
        np.array(actions, np.float32).reshape(-1, 2),
        np.array(states, np.float32).reshape(-1, 5),
        np.array(coverages[1:]),
    )


def _state(env: PushTEnv) -> State:
    agent, block = env.agent, env.block
    (x, y), (vx, vy) = agent.position, agent.velocity
    return State(x, y, vx, vy, Pose(block.position.x, block.position.y, block.angle))


def replay(action: Array, start: list[float] | Array, *, exact_pose: bool = False) -> float:
    """Highest coverage when `action` (L, 2) is played without looking, in a new simulator.

    `start` (5,) is given to `reset_to_state`, or is a row of ``data/state`` if `exact_pose`.
    """
    env = PushTEnv()
    if exact_pose:
        env.reset()
        env.set_pose(start)
    else:
        env.reset(options={"reset_to_state": start})
    return max(env.step(target)[-1]["coverage"] for target in action)


def generate(
    out: str | Path,
    *,
    episodes: int,
    seed: int = 0,
    workers: int = 1,
    progress: Callable[[int, int], None] | None = None,
) -> GenerateReport:
    """Write `episodes` successful demonstrations as one Zarr archive.

    Attempts the seeds `seed`, `seed + 1`, ... and keeps those that reach 0.95 both when they are
    recorded and when the stored actions are played again from the stored start. The
    archive has data/action, data/state, data/keypoint (float32), meta/episode_ends (int64), and
    attributes generator, version, seed, seeds (one per episode), command. It appears whole or not
    at all, and is the same for any number of workers.

    Args:
        out: a path that ends in .zip. A file there is replaced only if `generate` wrote it.
        episodes: how many to keep.
        seed: first seed of the initial states, in [0, 100000).
        workers: processes.
        progress: called with (kept, attempted) after each attempt.

    Raises:
        ValueError: bad arguments. FileExistsError: `out` is not a file of this generator.
        FileNotFoundError: the folder of `out` is not there.
        RuntimeError: too many attempts in a row failed.
    """
    out = Path(out).expanduser()
    check_request("pusht", out, (".zip",), episodes, seed, workers, _is_ours)
    began = time.monotonic()
    kept: list[Episode] = []
    attempted = failed = 0
    with closing(_attempts(seed, workers)) as attempts:
        for episode in attempts:
            attempted += 1
            failed = 0 if episode.succeeds else failed + 1
            if episode.succeeds:
                kept.append(episode)
            if progress is not None:
                progress(len(kept), attempted)
            if len(kept) == episodes:
                break
            if failed == _PATIENCE:
                raise RuntimeError(
                    f"{failed} attempts in a row did not reach coverage {SUCCESS_COVERAGE} (last "
                    f"seed {episode.seed}). Check the installed gym-pusht and pymunk versions."
                )
    if len(kept) < episodes:
        raise RuntimeError(f"Only {len(kept)} of {episodes} succeeded before seeds ran out.")
    _write(out, kept, seed)
    steps = sum(len(episode.action) for episode in kept)
    return GenerateReport(attempted, len(kept), steps, time.monotonic() - began, out)


def _attempt(seed: int) -> Episode:
    """Demonstrate, then make sure that the stored numbers alone succeed too."""
    episode = demonstrate(seed)
    if episode.succeeds:
        again = min(
            replay(episode.action, dp_initial_state(seed)),
            replay(episode.action, episode.state[0], exact_pose=True),
        )
        if again <= SUCCESS_COVERAGE:
            return Episode(seed, episode.action, episode.state, np.array([again]))
    return episode


def _attempts(seed: int, workers: int) -> Generator[Episode]:
    """Attempts in the order of their seeds, made by `workers` processes."""
    seeds = range(seed, FIRST_EVALUATION_SEED)
    if workers == 1:
        yield from map(_attempt, seeds)
        return
    # spawn: the caller may hold threads (torch, OpenMP) that do not survive a fork.
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(workers, mp_context=context)
    try:
        remaining = iter(seeds)
        queue: deque[Future[Episode]] = deque(
            pool.submit(_attempt, s) for s in itertools.islice(remaining, 2 * workers)
        )
        while queue:
            yield queue.popleft().result()
            queue.extend(pool.submit(_attempt, s) for s in itertools.islice(remaining, 1))
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _is_ours(path: Path) -> bool:
    try:
        return ReplayBuffer.open(path).attrs.get("generator") == GENERATOR
    except (ReplayBufferError, OSError):
        return False


def _write(out: Path, episodes: list[Episode], seed: int) -> None:
    command = f"cmpolicy data generate pusht episodes={len(episodes)} seed={seed}"
    attrs = {
        "generator": GENERATOR,
        "version": VERSION,
        "seed": seed,
        "seeds": [episode.seed for episode in episodes],
        "command": command,
    }
    scratch = Path(tempfile.mkdtemp(prefix=f".{out.name}.", dir=out.parent))
    try:
        store = scratch / "store.zarr"
        buffer = ReplayBuffer.create(store, attrs=attrs)
        for episode in episodes:
            state = episode.state
            keypoint = keypoints_from_pose(state[:, 2:4], state[:, 4]).astype(np.float32)
            buffer.append_episode({"action": episode.action, "state": state, "keypoint": keypoint})
        pack(store, out)
    finally:
        shutil.rmtree(scratch)
