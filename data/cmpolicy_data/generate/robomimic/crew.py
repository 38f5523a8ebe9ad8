"""Attempts made by several simulator processes, handed over in the order of their seeds."""

from __future__ import annotations

import multiprocessing
import traceback
from collections.abc import Generator, Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess

from cmpolicy_data.generate.robomimic.attempt import Attempt, Demonstrator

_GRACE = 5.0  # seconds that a process has to end by itself


class AttemptError(ChildProcessError):
    """An attempt could not be carried out; names its seed."""


def attempts(task: str, seeds: Iterable[int], workers: int) -> Generator[Attempt]:
    """An attempt from each seed, in the order of the seeds, by ``workers`` processes.

    Seeds are drawn as they are needed, a few ahead. With one worker the work is done in this
    process.

    Raises:
        AttemptError: a process died, or failed on its seed.
    """
    if workers == 1:
        demonstrator = Demonstrator(task)
        try:
            for seed in seeds:
                yield demonstrator.attempt(seed)
        finally:
            demonstrator.close()
        return
    # spawn: the caller may hold threads (torch, OpenMP) that do not survive a fork.
    context = multiprocessing.get_context("spawn")
    crew = []
    try:
        for _ in range(workers):
            ours, theirs = context.Pipe()
            process = context.Process(target=_work, args=(task, theirs), daemon=True)
            process.start()
            theirs.close()  # so that ours ends when the process does
            crew.append(_Worker(process, ours))
        yield from _in_order(crew, iter(seeds))
    finally:
        for worker in crew:
            worker.connection.close()
        for worker in crew:
            worker.process.join(_GRACE)
            if worker.process.is_alive():
                worker.process.terminate()
                worker.process.join()


@dataclass(frozen=True)
class _Failure:
    """What a process says of an attempt that raised."""

    message: str


@dataclass
class _Worker:
    process: BaseProcess
    connection: Connection
    seed: int | None = None
    """That it is at work on."""

    def start(self, seed: int) -> None:
        self.seed = seed
        with suppress(BrokenPipeError):  # it died: the next receive says so
            self.connection.send(seed)

    def receive(self) -> Attempt:
        seed, self.seed = self.seed, None
        try:
            answer: Attempt | _Failure = self.connection.recv()
        except (EOFError, ConnectionResetError):
            self.process.join(_GRACE)
            raise AttemptError(
                f"The simulator process at work on seed {seed} died (exit code "
                f"{self.process.exitcode}; killed, or out of memory?). Use fewer workers, or "
                "workers=1 to see its own message."
            ) from None
        if isinstance(answer, _Failure):
            raise AttemptError(f"The attempt with seed {seed} failed:\n{answer.message}")
        return answer


def _in_order(crew: list[_Worker], seeds: Iterator[int]) -> Generator[Attempt]:
    order: list[int] = []  # started, not yet handed over
    done: dict[int, Attempt] = {}
    for worker in crew:
        for seed in _next(seeds):
            order.append(seed)
            worker.start(seed)
    while order:
        busy = {worker.connection: worker for worker in crew if worker.seed is not None}
        for connection in wait(list(busy)):
            worker = busy[connection]  # type: ignore[index]  # connections alone are waited for
            attempt = worker.receive()
            done[attempt.seed] = attempt
        while order and order[0] in done:
            yield done.pop(order.pop(0))
        for worker in crew:
            # Not far ahead of an attempt that takes long: finished ones wait in memory.
            if worker.seed is None and len(order) < 4 * len(crew):
                for seed in _next(seeds):
                    order.append(seed)
                    worker.start(seed)


def _next(seeds: Iterator[int]) -> list[int]:
    """The next seed, or nothing."""
    for seed in seeds:
        return [seed]
    return []


def _work(task: str, connection: Connection) -> None:
    """A process: answers each seed with its attempt, until the other side closes."""
    demonstrator = None
    while True:
        try:
            seed = connection.recv()
        except (EOFError, OSError):
            break
        try:
            demonstrator = demonstrator or Demonstrator(task)
            answer: Attempt | _Failure = demonstrator.attempt(seed)
        except Exception:
            answer = _Failure(traceback.format_exc())
        with suppress(BrokenPipeError):
            connection.send(answer)
