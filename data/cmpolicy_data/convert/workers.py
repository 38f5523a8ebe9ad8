"""Simulator processes that work through a sequence, each holding one environment."""

from __future__ import annotations

import itertools
import multiprocessing
from collections import deque
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from typing import Any, TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")


def map_in_order(
    open_work: Callable[[], Callable[[Item], Result]], items: Iterable[Item], workers: int
) -> Generator[Result]:
    """``open_work()(item)`` of each item, in the order of the items.

    Args:
        open_work: makes what a process works with (an environment) and returns what it does to an
            item; called once in each process, not before there is an item. Picklable, as are items
            and results, if there are several workers.
        items: drawn as they are needed, a few ahead.
        workers: processes; with 1 the work is done in this one.

    Raises:
        ChildProcessError: a process died. And what ``open_work`` and the work raise.
    """
    if workers == 1:
        work = None
        for item in items:
            work = work or open_work()
            yield work(item)
        return
    # spawn: the caller may hold threads (torch, OpenMP) that do not survive a fork.
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(workers, mp_context=context)
    try:
        waiting = iter(items)
        queue: deque[Future[Any]] = deque(
            pool.submit(_run, open_work, item) for item in itertools.islice(waiting, 2 * workers)
        )
        while queue:
            yield queue.popleft().result()
            queue.extend(pool.submit(_run, open_work, i) for i in itertools.islice(waiting, 1))
    except BrokenProcessPool as error:
        raise ChildProcessError(
            "A simulator process died (killed, or out of memory?). Use fewer workers, or "
            "workers=1 to see its own message."
        ) from error
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


_opened: list[Callable[[Any], Any]] = []  # of a worker process


def _run(open_work: Callable[[], Callable[[Any], Any]], item: Any) -> Any:
    if not _opened:
        _opened.append(open_work())
    return _opened[0](item)
