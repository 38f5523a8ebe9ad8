"""Iterators that run ahead of their reader, each in a thread, a few of them at a time."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Generic, Self, TypeVar

T = TypeVar("T")
_DEPTH = 4
_PATIENCE = 0.1  # seconds after which a thread looks whether it should end


class _Stream(Generic[T]):
    def __init__(self) -> None:
        self._queue: queue.Queue[tuple[T | None, BaseException | None]] = queue.Queue(_DEPTH)

    def fill(self, source: Callable[[], Iterable[T]], ended: threading.Event) -> None:
        end: BaseException | None = None
        try:
            for item in source():
                if not self._put((item, None), ended):
                    return
        except BaseException as error:
            end = error
        self._put((None, end or StopIteration()), ended)

    def _put(self, entry: tuple[T | None, BaseException | None], ended: threading.Event) -> bool:
        while not ended.is_set():
            try:
                self._queue.put(entry, timeout=_PATIENCE)
            except queue.Full:
                continue
            return True
        return False

    def __iter__(self) -> Iterator[T]:
        while True:
            item, end = self._queue.get()
            if isinstance(end, StopIteration):
                return
            if end is not None:
                raise end
            yield item  # type: ignore[misc]


class Ahead:
    """Threads that fill short queues: ``workers`` at a time, in the order they are started in.

    So what is started first must be read first; sources that are read in turn need a worker each.
    """

    def __init__(self, workers: int) -> None:
        self._pool = ThreadPoolExecutor(workers, thread_name_prefix="lerobot")
        self._ended = threading.Event()

    def start(self, source: Callable[[], Iterable[T]]) -> Iterable[T]:
        """What ``source`` gives; its errors are raised where it is read."""
        stream: _Stream[T] = _Stream()
        self._pool.submit(stream.fill, source, self._ended)
        return stream

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._pool.shutdown(wait=True, cancel_futures=True)
