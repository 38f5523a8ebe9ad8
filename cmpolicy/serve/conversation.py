"""One session's messages, answered one after the other, until its client leaves or falls silent."""

from __future__ import annotations

import asyncio
import time
from typing import TYPE_CHECKING

from cmpolicy.serve.batcher import Batcher, InferenceError
from cmpolicy.serve.requests import Request, RequestError, Session, reply
from cmpolicy.serve.wire import WireError, unpack

if TYPE_CHECKING:
    from websockets.asyncio.server import ServerConnection

#: Close codes; the last is "Timeout" in IANA's registry.
GOING_AWAY, TRY_AGAIN_LATER, TIMEOUT = 1001, 1013, 3008


class InFlight:
    """Counts the requests that are being answered, so that a stopping server can wait for them."""

    def __init__(self) -> None:
        self.count = 0
        self._none = asyncio.Event()
        self._none.set()

    def __enter__(self) -> None:
        self.count += 1
        self._none.clear()

    def __exit__(self, *_: object) -> None:
        self.count -= 1
        if not self.count:
            self._none.set()

    async def wait_for_none(self) -> None:
        """Wait until every request is answered."""
        await self._none.wait()


class Conversation:
    """Answers the messages of one session.

    Args:
        session: what its messages mean.
        batcher: where they are answered.
        max_bytes: of a message; a longer one is refused.
        idle_timeout: seconds without a message after which the session is closed; None: never.
    """

    def __init__(
        self, session: Session, batcher: Batcher, *, max_bytes: int, idle_timeout: float | None
    ) -> None:
        self._session = session
        self._batcher = batcher
        self._max_bytes = max_bytes
        self._idle_timeout = idle_timeout
        self.answered = self.refused = 0

    async def run(
        self, connection: ServerConnection, in_flight: InFlight, stopping: asyncio.Event
    ) -> None:
        """Answer until the session is idle for too long or the server stops, and close it.

        Raises:
            ConnectionClosed: the client left.
            StoppedError: the server stopped before the policy answered.
        """
        previous_ms: float | None = None
        while True:
            try:
                async with asyncio.timeout(self._idle_timeout):
                    data = await connection.recv()
            except TimeoutError:
                why = f"no request for {self._idle_timeout:g} s, the session is closed"
                await connection.close(TIMEOUT, f"{why}; connect again to go on")
                return
            if stopping.is_set():
                await connection.close(GOING_AWAY, "the server is shutting down")
                return
            begin = time.perf_counter()
            with in_flight:
                answer = await self._answer(data, previous_ms)
                if isinstance(answer, str):
                    self.refused += 1
                else:
                    self.answered += 1
                await connection.send(answer)
            previous_ms = (time.perf_counter() - begin) * 1e3

    def _read(self, data: bytes) -> Request | None:
        return self._session.read(unpack(data, max_bytes=self._max_bytes))

    async def _answer(self, data: str | bytes, previous_ms: float | None) -> str | bytes:
        """The answer to a frame: bytes, or text that says what is wrong with it."""
        try:
            if isinstance(data, str):
                raise RequestError("messages are binary frames of msgpack, got a text frame")
            # A file of megapixels would keep the other sessions waiting.
            if self._session.spec.images:
                request = await asyncio.to_thread(self._read, data)
            else:
                request = self._read(data)
            answer = None if request is None else await self._batcher.infer(request)
            if request is not None and answer is not None:
                self._session.answered(request, answer)
        except (WireError, RequestError, InferenceError) as error:
            return str(error)
        return reply(request, answer, self._session.spec, previous_ms)
