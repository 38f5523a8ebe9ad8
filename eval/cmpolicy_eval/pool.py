"""Environments in several processes, driven a chunk at a time.

Why not gymnasium's AsyncVectorEnv: it runs one environment per process, so a batch of 50 episodes
would be 50 processes of 80 MB that each import the simulator; here a process holds as many
environments as its share of the batch. It also starts workers by ``multiprocessing``, which
imports the caller's main module (and with it torch) into each worker and fails in scripts without
a ``__main__`` guard. Workers here are plain ``python -m cmpolicy_eval.worker`` processes that talk
over their stdin and stdout: a dead one reads as end of file, so it is an error at once, and they
end with their parent.
"""

import contextlib
import os
import pickle
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import IO, Any

import cloudpickle

from cmpolicy_eval.episode import Array, ChunkedEpisode, ChunkOutcome, MakeEnv


class RolloutError(RuntimeError):
    """An environment or its process failed; the message names the seed."""

    exit_status = 1


@dataclass(frozen=True)
class Setup:
    """First message to a worker."""

    make_env: MakeEnv
    n_envs: int
    n_obs_steps: int
    max_steps: int


@dataclass(frozen=True)
class Reset:
    """Start the episode of ``seed`` in environment ``env`` of the worker."""

    env: int
    seed: int
    options: dict[str, Any] | None


@dataclass(frozen=True)
class Step:
    """Execute ``actions`` (Ta, A) in environment ``env`` of the worker."""

    env: int
    actions: Array


Command = Reset | Step


@dataclass(frozen=True)
class Failure:
    """Reply of a worker whose environment raised."""

    summary: str
    traceback: str


class LocalEnvs:
    """The environments of one process, all episodes in one place."""

    def __init__(self, setup: Setup) -> None:
        self._episodes = [
            ChunkedEpisode(
                setup.make_env(), n_obs_steps=setup.n_obs_steps, max_steps=setup.max_steps
            )
            for _ in range(setup.n_envs)
        ]

    def run(self, command: Command) -> ChunkOutcome:
        """Execute one command."""
        episode = self._episodes[command.env]
        if isinstance(command, Reset):
            return episode.reset(command.seed, command.options)
        return episode.step_chunk(command.actions)

    def close(self) -> None:
        """Close all environments."""
        for episode in self._episodes:
            episode.close()


class _Worker:
    """A process and the pipes to it."""

    def __init__(self, setup: Setup) -> None:
        environ = dict(os.environ)
        # The worker must find what this process finds, and leave the cores to its siblings.
        environ["PYTHONPATH"] = os.pathsep.join(p for p in sys.path if p)
        environ.setdefault("OMP_NUM_THREADS", "1")
        self._process = subprocess.Popen(
            [sys.executable, "-m", "cmpolicy_eval.worker"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=environ,
        )
        if self._process.stdin is None or self._process.stdout is None:
            raise RolloutError("could not open pipes to an environment process")
        self._stdin: IO[bytes] = self._process.stdin
        self._stdout: IO[bytes] = self._process.stdout
        self.send(setup)

    def send(self, message: object) -> None:
        """Send; a worker that is gone is noticed when its reply is read."""
        with contextlib.suppress(BrokenPipeError):
            self._stdin.write(cloudpickle.dumps(message))
            self._stdin.flush()

    def receive(self) -> ChunkOutcome:
        """Reply to the oldest unanswered command; RolloutError if there is none to come."""
        try:
            reply = pickle.load(self._stdout)
        except (EOFError, pickle.UnpicklingError):
            code = self._process.wait()
            raise RolloutError(f"the environment process died (exit code {code})") from None
        if isinstance(reply, Failure):
            raise RolloutError(f"the environment raised {reply.summary}\n{reply.traceback}")
        if not isinstance(reply, ChunkOutcome):
            raise RolloutError(f"unexpected reply of an environment process: {reply!r}")
        return reply

    def close(self) -> None:
        """End the process: it leaves at end of file, or is ended after a moment."""
        for pipe in (self._stdin, self._stdout):
            with contextlib.suppress(BrokenPipeError):
                pipe.close()
        try:
            self._process.wait(timeout=5)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()


class EnvPool:
    """``n_envs`` environments over ``n_workers`` processes; one worker means this process.

    Environment ``i`` lives in worker ``i % n_workers``. Use as a context manager.
    """

    def __init__(
        self, make_env: MakeEnv, *, n_envs: int, n_workers: int, n_obs_steps: int, max_steps: int
    ) -> None:
        self._n_workers = max(1, min(n_workers, n_envs))
        shares = [len(range(w, n_envs, self._n_workers)) for w in range(self._n_workers)]
        setups = [Setup(make_env, share, n_obs_steps, max_steps) for share in shares]
        self._local = LocalEnvs(setups[0]) if self._n_workers == 1 else None
        self._workers: list[_Worker] = []
        if self._local is None:
            self._workers = [_Worker(setup) for setup in setups]

    def __enter__(self) -> "EnvPool":
        return self

    def __exit__(self, *_: object) -> None:
        for worker in self._workers:
            worker.close()
        if self._local is not None:
            self._local.close()

    def run(self, commands: Sequence[Command], seeds: Sequence[int]) -> list[ChunkOutcome]:
        """Execute commands (``env`` counts over the whole pool), one at most per environment.

        Args:
            commands: what to do.
            seeds: seed of the episode of each command, for error messages.

        Raises:
            RolloutError: an environment raised or a process died; names the seed.
        """
        outcomes: dict[int, ChunkOutcome] = {}
        per_worker: list[list[int]] = [[] for _ in range(self._n_workers)]
        for position, command in enumerate(commands):
            per_worker[command.env % self._n_workers].append(position)
        for worker, positions in zip(self._workers, per_worker, strict=False):
            # One message, which the worker reads whole before it replies: no mutual waiting.
            worker.send([self._localised(commands[position]) for position in positions])
        for index, positions in enumerate(per_worker):
            for position in positions:
                try:
                    if self._local is not None:
                        outcomes[position] = self._local.run(commands[position])
                    else:
                        outcomes[position] = self._workers[index].receive()
                except Exception as error:
                    where = f"episode of seed {seeds[position]}: "
                    if isinstance(error, RolloutError):
                        raise RolloutError(where + str(error)) from None
                    summary = f"{type(error).__name__}: {error}"
                    raise RolloutError(f"{where}the environment raised {summary}") from error
        return [outcomes[position] for position in range(len(commands))]

    def _localised(self, command: Command) -> Command:
        env = command.env // self._n_workers
        if isinstance(command, Reset):
            return Reset(env, command.seed, command.options)
        return Step(env, command.actions)
