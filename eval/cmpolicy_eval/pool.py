"""Environments in several processes, driven a chunk at a time.

Why not gymnasium's AsyncVectorEnv: it runs one environment per process, so a batch of 50 episodes
would be 50 processes of 80 MB that each import the simulator; here a process holds as many
environments as its share of the batch. It also starts workers by ``multiprocessing``, which
imports the caller's main module (and with it torch) into each worker and fails in scripts without
a ``__main__`` guard. Workers here are plain ``python -m cmpolicy_eval.worker`` processes that talk
over their stdin and stdout: a dead one reads as end of file, so it is an error at once, one that
does not answer within a time limit is ended, and they end with their parent (see the worker).
"""

import contextlib
import os
import pickle
import select
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import IO, Any

import cloudpickle

from cmpolicy_eval.episode import Array, ChunkedEpisode, ChunkOutcome, MakeEnv

DEFAULT_TIMEOUT = 120.0
"""Seconds that an environment has for a reset or for the steps of one chunk."""

#: Before every reply of a worker: its length in bytes.
LENGTH = struct.Struct("<Q")


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
    parent: int = 0
    """Process that the worker ends with."""
    dies_with_parent: bool = False
    """Whether the system may end the worker when the thread ends that started it."""


@dataclass(frozen=True)
class Spaces:
    """First reply of a worker: what its environments take and give."""

    observation: Any
    action: Any


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
        episode = self._episodes[command.env]
        if isinstance(command, Reset):
            return episode.reset(command.seed, command.options)
        return episode.step_chunk(command.actions)

    @property
    def spaces(self) -> Spaces:
        """Of each environment."""
        env = self._episodes[0].env
        return Spaces(env.observation_space, env.action_space)

    def close(self) -> None:
        for episode in self._episodes:
            episode.close()


class _Worker:
    """A process and the pipes to it."""

    def __init__(self, setup: Setup, timeout: float) -> None:
        self._timeout = timeout
        environ = dict(os.environ)
        # The worker must find what this process finds, and leave the cores to its siblings.
        environ["PYTHONPATH"] = os.pathsep.join(p for p in sys.path if p)
        environ.setdefault("OMP_NUM_THREADS", "1")
        self._process = subprocess.Popen(
            [sys.executable, "-m", "cmpolicy_eval.worker"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=environ,
            bufsize=0,
        )
        if self._process.stdin is None or self._process.stdout is None:
            raise RolloutError("could not open pipes to an environment process")
        self._stdin: IO[bytes] = self._process.stdin
        self._stdout: IO[bytes] = self._process.stdout
        self.send(setup)

    def send(self, message: object) -> None:
        """Send; a worker that is gone is noticed when its reply is read."""
        rest = memoryview(cloudpickle.dumps(message))
        deadline = time.monotonic() + self._timeout
        with contextlib.suppress(BrokenPipeError):
            while rest:  # a pipe takes a part at a time; a stopped worker takes none
                _, ready, _ = select.select(
                    [], [self._stdin], [], max(0.0, deadline - time.monotonic())
                )
                if not ready:
                    raise self._hung()
                rest = rest[os.write(self._stdin.fileno(), rest[: select.PIPE_BUF]) :]

    def receive(self) -> ChunkOutcome | Spaces:
        """Reply to the oldest unanswered message; RolloutError if there is none to come."""
        deadline = time.monotonic() + self._timeout
        (length,) = LENGTH.unpack(self._read(LENGTH.size, deadline))
        reply = pickle.loads(self._read(length, deadline))
        if isinstance(reply, Failure):
            raise RolloutError(f"the environment raised {reply.summary}\n{reply.traceback}")
        if not isinstance(reply, ChunkOutcome | Spaces):
            raise RolloutError(f"unexpected reply of an environment process: {reply!r}")
        return reply

    def _read(self, count: int, deadline: float) -> bytes:
        """``count`` bytes of a reply."""
        found = bytearray()
        while len(found) < count:
            left = max(0.0, deadline - time.monotonic())
            if not select.select([self._stdout], [], [], left)[0]:
                raise self._hung()
            part = os.read(self._stdout.fileno(), count - len(found))
            if not part:
                code = self._process.wait()
                raise RolloutError(f"the environment process died (exit code {code})")
            found += part
        return bytes(found)

    def _hung(self) -> RolloutError:
        self._process.kill()
        return RolloutError(
            f"the environment did not answer within {self._timeout:g} s. It hangs, or it is slow: "
            "the limit is env_timeout, for a reset or for the steps of one chunk of actions"
        )

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
    """``n_envs`` environments over ``n_workers`` processes.

    Environment ``i`` lives in worker ``i % n_workers``. Use as a context manager.

    Args:
        make_env, n_obs_steps, max_steps: see :func:`~cmpolicy_eval.rollout.rollout`.
        n_envs: environments.
        n_workers: processes; 0 means this one, in which no time limit holds.
        timeout: seconds to make the environments, for a reset, and for the steps of one chunk.

    Attributes:
        spaces: of the environments.

    Raises:
        RolloutError: an environment cannot be made.
    """

    def __init__(
        self,
        make_env: MakeEnv,
        *,
        n_envs: int,
        n_workers: int,
        n_obs_steps: int,
        max_steps: int,
        timeout: float = DEFAULT_TIMEOUT,
    ) -> None:
        is_here = n_workers == 0
        self._n_workers = max(1, min(n_workers, n_envs))
        shares = [len(range(w, n_envs, self._n_workers)) for w in range(self._n_workers)]
        is_main = threading.current_thread() is threading.main_thread()
        setups = [
            Setup(make_env, share, n_obs_steps, max_steps, os.getpid(), is_main) for share in shares
        ]
        self._local = LocalEnvs(setups[0]) if is_here else None
        self._workers: list[_Worker] = []
        if self._local is not None:
            self.spaces = self._local.spaces
            return
        try:
            self._workers += [_Worker(setup, timeout) for setup in setups]
            replies = [worker.receive() for worker in self._workers]
        except RolloutError as error:
            self.__exit__()
            raise RolloutError(f"the environments cannot be made: {error}") from None
        assert isinstance(replies[0], Spaces)
        self.spaces = replies[0]

    def __enter__(self) -> "EnvPool":
        return self

    def __exit__(self, *_: object) -> None:
        for worker in self._workers:
            worker.close()
        if self._local is not None:
            self._local.close()

    def run(
        self, commands: Sequence[Command], seeds: Sequence[int], steps: Sequence[int] | None = None
    ) -> list[ChunkOutcome]:
        """Execute commands (``env`` counts over the whole pool), one at most per environment.

        Args:
            commands: what to do.
            seeds: seed of the episode of each command, for error messages.
            steps: how many steps each episode has behind it, for error messages; None: none.

        Raises:
            RolloutError: an environment raised, gave what is no observation, or did not answer in
                time, or a process died; names the seed and the step.
        """
        outcomes: dict[int, ChunkOutcome] = {}
        per_worker: list[list[int]] = [[] for _ in range(self._n_workers)]
        for position, command in enumerate(commands):
            per_worker[command.env % self._n_workers].append(position)
        for worker, positions in zip(self._workers, per_worker, strict=False):
            # One message, which the worker reads whole before it replies: no mutual waiting.
            if not positions:
                continue
            try:
                worker.send([self._localised(commands[position]) for position in positions])
            except RolloutError as error:
                raise RolloutError(f"episode of seed {seeds[positions[0]]}: {error}") from None
        for index, positions in enumerate(per_worker):
            for position in positions:
                try:
                    if self._local is not None:
                        outcomes[position] = self._local.run(commands[position])
                    else:
                        outcome = self._workers[index].receive()
                        assert isinstance(outcome, ChunkOutcome)
                        outcomes[position] = outcome
                except Exception as error:
                    step = f", from step {steps[position]} on" if steps is not None else ", reset"
                    where = f"episode of seed {seeds[position]}{step}: "
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
