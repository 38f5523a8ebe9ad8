"""The proof of a conversion: the stored actions, played without looking, still succeed.

Each episode is put into its recorded scene and first state, and its actions are executed one after
the other. Small differences add up in such a replay (actions are stored in float32, contacts are
chaotic), so a few of the episodes may fail; many failures say that the actions, the controller or
the simulator are not those of the recording.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from cmpolicy_data.chunks import read_rows
from cmpolicy_data.convert.scenes import read_scenes
from cmpolicy_data.convert.workers import map_in_order
from cmpolicy_data.replay_buffer import ReplayBuffer
from cmpolicy_envs.robomimic_args import EnvArgs

WANTED = ("task", "env_args", "actions")


class ReplayError(ValueError):
    """A store that cannot be replayed."""


@dataclass(frozen=True)
class ReplayReport:
    """How many episodes succeed again.

    Attributes:
        path: of the store. task: its task. actions: ``delta`` or ``absolute``.
        episodes: how many were replayed. failed: numbers of those that did not succeed.
    """

    path: Path
    task: str
    actions: str
    episodes: int
    failed: tuple[int, ...]
    seconds: float

    @property
    def success_rate(self) -> float:
        return 1.0 - len(self.failed) / self.episodes


@dataclass(frozen=True)
class _Episode:
    number: int
    start: npt.NDArray[np.float64]
    model: str | None
    action: npt.NDArray[np.float32]


def replay(
    path: str | Path,
    *,
    episodes: int | None = None,
    workers: int = 1,
    progress: Callable[[int, int], None] | None = None,
) -> ReplayReport:
    """Replay the first ``episodes`` (default all) of a converted store.

    Args:
        path: of a store that `cmpolicy_data.convert` wrote.
        episodes: how many. workers: simulator processes.
        progress: called with (done, failed) after each episode.

    Raises:
        FileNotFoundError, ReplayBufferError: the store cannot be read.
        ReplayError: it holds no simulator states, or does not say how to build its environment.
        ImportError: robosuite is not installed.
        ChildProcessError: a simulator process died.
    """
    began = time.monotonic()
    if workers < 1:
        raise ValueError(f"workers must be at least 1, got {workers}.")
    buffer = ReplayBuffer.open(path)
    settings = _settings(buffer)
    count = buffer.n_episodes if episodes is None else min(episodes, buffer.n_episodes)
    if count < 1:
        raise ReplayError(f"{buffer.path}: there are no episodes to replay (episodes={episodes}).")
    failed: list[int] = []
    chosen = itertools.islice(_episodes(buffer), count)
    results = map_in_order(partial(_open, settings), chosen, workers)
    for number, success in enumerate(results):
        if not success:
            failed.append(number)
        if progress is not None:
            progress(number + 1, len(failed))
    return ReplayReport(
        path=buffer.path,
        task=settings["task"],
        actions=settings["actions"],
        episodes=count,
        failed=tuple(failed),
        seconds=time.monotonic() - began,
    )


def _settings(buffer: ReplayBuffer) -> dict[str, Any]:
    attrs = buffer.attrs
    missing = [key for key in WANTED if not isinstance(attrs.get(key), str)]
    if missing or "state" not in buffer:
        lacks = [f"the attribute {key}" for key in missing]
        lacks += ["data/state"] * ("state" not in buffer)
        raise ReplayError(
            f"{buffer.path} cannot be replayed: it lacks {', '.join(lacks)}. Stores that "
            "`cmpolicy data convert` makes of files with simulator states have them."
        )
    for key in ("state", "action"):
        buffer.check(key)
    return {"task": attrs["task"], "env_args": attrs["env_args"], "actions": attrs["actions"]}


def _episodes(buffer: ReplayBuffer) -> Iterator[_Episode]:
    scenes = read_scenes(buffer.path, buffer.n_episodes)
    start = 0
    for number, end in enumerate(buffer.episode_ends.tolist()):
        yield _Episode(
            number,
            read_rows(buffer["state"], start, start + 1, buffer.path)[0],
            None if scenes is None else scenes[number],
            read_rows(buffer["action"], start, end, buffer.path),
        )
        start = end


def _open(settings: dict[str, Any]) -> Callable[[_Episode], bool]:
    """A function that replays one episode, holding one simulator."""
    from cmpolicy_envs.robomimic import RobomimicEnv

    env = RobomimicEnv(
        task=settings["task"],
        env_args=EnvArgs.from_json(settings["env_args"], "attribute env_args"),
        actions=settings["actions"],
    )

    def succeeds(episode: _Episode) -> bool:
        env.reset_to(episode.start, episode.model)
        return any(env.step(action)[-1]["is_success"] for action in episode.action)

    return succeeds
