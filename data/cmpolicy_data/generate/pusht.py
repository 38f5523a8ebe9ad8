"""Scripted Push-T demonstrations: the data set that cmpolicy brings along.

Episode k is a pure function of its seed, of ``astray`` and of ``VERSION``: the block and the agent
start where Diffusion Policy's evaluation law puts them for seed k, and the unsteadiness of the
demonstrator's hand comes from ``default_rng([VERSION, k])``. So a data set does not depend on how
many processes made it.

A share ``astray`` of the episodes begins where random pushes have left the block, often at a wall
or with the hand on it. The demonstrator never goes there by itself but a policy that errs does,
and learns from these episodes how to come back (the idea of Laskey et al. 2017, "DART", of noise
in the demonstrations, but with nothing wrong recorded). Or a policy leads astray itself: episodes
begin where it has got to, most of them where it is lost, and the next policy learns the way on from
there (the idea of Ross et al. 2011, "DAgger").
"""

from __future__ import annotations

import itertools
import multiprocessing
import shlex
import shutil
import tempfile
import time
from collections import deque
from collections.abc import Callable, Generator, Mapping
from concurrent.futures import Future, ProcessPoolExecutor
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from cmpolicy_data.chunks import ReplayBufferError
from cmpolicy_data.generate.demonstrator import Demonstrator, NoPushError
from cmpolicy_data.generate.request import FIRST_EVALUATION_SEED, check_request
from cmpolicy_data.generate.route import clearance, inside_walls
from cmpolicy_data.generate.tee import AGENT_RADIUS, Pose
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
_ASTRAY_SPEED = 8.0  # px per step, the pace of the demonstrator's pushes
# Failed attempts in a row after which something is wrong with the simulator, not with the luck.
_PATIENCE = 50
# Attempts in a row that a policy made good by itself, after which it leads nowhere worth showing.
_LEAD_PATIENCE = 500

Array = NDArray[np.float32]
Act = Callable[[Mapping[str, NDArray[Any]]], ArrayLike]


@dataclass(frozen=True)
class Lead:
    """A policy that leads attempts astray.

    Attributes:
        name: as the archive's command tells it.
        start: for a seed, what chooses the actions (2,) of one episode from what ``PushTEnv``
            shows. It is pickled for more than one worker.
    """

    name: str
    start: Callable[[int], Act]


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


def demonstrate(
    seed: int,
    astray: float = 0.0,
    lead: Lead | None = None,
    *,
    start: ArrayLike | None = None,
) -> Episode | None:
    """One attempt; it ends at coverage 0.975, after 300 steps, or when no push can be made.

    None where ``lead`` has succeeded by itself before it could be taken over.

    At the end the hand stays where it is for a few steps: windows of training reach beyond the
    decision, so without these the last decisions would have none.

    Args:
        seed: of the start and of the hand.
        astray: probability in [0, 1] that it starts where random pushes have left the block.
        lead: it starts where this policy has got to after a random number of steps instead.
        start: a row (5,) of ``data/state`` at which it starts, whatever else is said.
    """
    env = PushTEnv()
    _, info = env.reset(options={"reset_to_state": dp_initial_state(seed)})
    if start is not None:
        env.set_pose(start)
        info["state"] = np.asarray(start, np.float32)
    elif _is_astray(seed, astray):
        rng = np.random.default_rng([VERSION, seed, 2])
        if lead is None:
            info["state"] = _go_astray(env, rng)
        elif not _follow(env, lead.start(seed), int(rng.integers(MAX_STEPS))):
            return None
        else:
            info["state"] = _move(env, env.agent.position)
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


def _is_astray(seed: int, astray: float) -> bool:
    return bool(np.random.default_rng([VERSION, seed, 1]).random() < astray)


def _go_astray(env: PushTEnv, rng: np.random.Generator) -> Array:
    """Push the block where it should not be; all is at rest then, in the state (5,) returned."""
    for _ in range(rng.integers(1, 3)):
        hand = _free_place(env, rng, near=170.0)
        block = env.block.local_to_world(env.block.center_of_gravity)
        way = np.asarray(block) + rng.uniform(-40, 40, 2) - hand
        _move(env, hand)
        steps = np.linalg.norm(way) / _ASTRAY_SPEED
        for step in range(1, int(steps) + rng.integers(0, 25)):
            env.step(np.clip(hand + step / steps * way, 20.0, ARENA - 20.0))
    if rng.random() < 0.3:  # the hand is on its way elsewhere
        return _move(env, _free_place(env, rng, near=ARENA))
    return _move(env, env.agent.position)


def _follow(env: PushTEnv, act: Act, steps: int) -> bool:
    """Let a policy act for so many steps; false if it succeeds meanwhile."""
    for _ in range(steps):
        *_, info = env.step(np.clip(act(env.get_obs()), 0.0, ARENA))
        if info["is_success"]:
            return False
    return True


def _free_place(env: PushTEnv, rng: np.random.Generator, near: float) -> NDArray[np.float64]:
    """A place for the hand (2,), px, clear of the block and at most so far from it in x and y."""
    block = env.block
    pose = Pose(block.position.x, block.position.y, block.angle)
    while True:
        place = np.asarray(block.position) + rng.uniform(-near, near, 2)
        if clearance(place, pose) > AGENT_RADIUS and inside_walls(place):
            return place


def _move(env: PushTEnv, hand: ArrayLike) -> Array:
    """Put the hand there, all at rest, in a state (5,) that single precision holds exactly."""
    block = env.block
    pose = [*block.position, block.angle % (2 * np.pi)]
    state = np.concatenate([np.asarray(hand), pose]).astype(np.float32)
    env.set_pose(state)
    return state


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
    astray: float = 0.0,
    lead: Lead | None = None,
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
        astray: share in [0, 1] of attempts that begin where random pushes have left the block.
        lead: a policy that leads them astray in place of random pushes, see :func:`demonstrate`.
        workers: processes.
        progress: called with (kept, attempted) after each attempt.

    Raises:
        ValueError: bad arguments. FileExistsError: `out` is not a file of this generator.
        FileNotFoundError: the folder of `out` is not there.
        RuntimeError: too many attempts in a row failed, or were made good by ``lead``.
    """
    out = Path(out).expanduser()
    check_request("pusht", out, (".zip",), episodes, seed, workers, _is_ours)
    if not 0.0 <= astray <= 1.0:
        raise ValueError(f"astray must be a share in [0, 1], got {astray}.")
    began = time.monotonic()
    kept: list[Episode] = []
    attempted = failed = led = 0
    with closing(_attempts(seed, astray, lead, workers)) as attempts:
        for episode in attempts:
            attempted += 1
            if episode is None:
                led += 1
            elif episode.succeeds:
                kept.append(episode)
                failed = led = 0
            else:
                failed += 1
            if progress is not None:
                progress(len(kept), attempted)
            if len(kept) == episodes:
                break
            last = f"(last seed {seed + attempted - 1})"
            if failed == _PATIENCE:
                raise RuntimeError(
                    f"{failed} attempts in a row did not reach coverage {SUCCESS_COVERAGE} {last}. "
                    "Check the installed gym-pusht and pymunk versions."
                )
            if lead is not None and led == _LEAD_PATIENCE:
                raise RuntimeError(
                    f"{lead.name} succeeded by itself in {led} attempts in a row {last}, so it "
                    "leads nowhere astray. Take a policy that fails more often or less astray."
                )
    if len(kept) < episodes:
        raise RuntimeError(f"Only {len(kept)} of {episodes} succeeded before seeds ran out.")
    words = [f"episodes={episodes}", f"seed={seed}"]
    words += [f"astray={astray:g}"] if astray else []
    words += [f"astray_by={lead.name}"] if lead else []
    _write(out, kept, seed, shlex.join(["cmpolicy", "data", "generate", "pusht", *words]))
    steps = sum(len(episode.action) for episode in kept)
    return GenerateReport(attempted, len(kept), steps, time.monotonic() - began, out)


def _attempt(seed: int, astray: float, lead: Lead | None) -> Episode | None:
    """Demonstrate, then make sure that the stored numbers alone succeed too."""
    episode = demonstrate(seed, astray, lead)
    if episode is not None and episode.succeeds:
        again = replay(episode.action, episode.state[0], exact_pose=True)
        if not _is_astray(seed, astray):
            again = min(again, replay(episode.action, dp_initial_state(seed)))
        if again <= SUCCESS_COVERAGE:
            return Episode(seed, episode.action, episode.state, np.array([again]))
    return episode


def _attempts(
    seed: int, astray: float, lead: Lead | None, workers: int
) -> Generator[Episode | None]:
    """Attempts in the order of their seeds, made by `workers` processes."""
    seeds = range(seed, FIRST_EVALUATION_SEED)
    if workers == 1:
        yield from (_attempt(s, astray, lead) for s in seeds)
        return
    # spawn: the caller may hold threads (torch, OpenMP) that do not survive a fork.
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(workers, mp_context=context)
    try:
        remaining = iter(seeds)
        attempt = partial(_attempt, astray=astray, lead=lead)
        queue: deque[Future[Episode | None]] = deque(
            pool.submit(attempt, s) for s in itertools.islice(remaining, 2 * workers)
        )
        while queue:
            yield queue.popleft().result()
            queue.extend(pool.submit(attempt, s) for s in itertools.islice(remaining, 1))
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _is_ours(path: Path) -> bool:
    try:
        return ReplayBuffer.open(path).attrs.get("generator") == GENERATOR
    except (ReplayBufferError, OSError):
        return False


def _write(out: Path, episodes: list[Episode], seed: int, command: str) -> None:
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
