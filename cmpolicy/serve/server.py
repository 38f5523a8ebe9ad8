"""A policy behind a WebSocket, in the protocol of openpi: its client works unchanged.

    client                                         server
    GET / with Upgrade, Authorization  ------->
                                       <-------   metadata (binary)
    observation (binary)               ------->
                                       <-------   {"actions", "plan", "server_timing"} (binary)
                                                  or what was wrong (text); the connection goes on

Messages are packed by :mod:`cmpolicy.serve.wire`; what a request may hold is described in
:mod:`cmpolicy.serve.requests`, who is let in by :mod:`cmpolicy.serve.admission`. ``GET /healthz``
answers 200 on the same port.
"""

from __future__ import annotations

import asyncio
import logging
import math
import signal
import threading
import time
from collections.abc import Callable
from typing import Any, cast

import numpy as np

from cmpolicy import __version__
from cmpolicy.robot.policy import ChunkPolicy
from cmpolicy.schema import at_least
from cmpolicy.serve.admission import Admission, Token, address_of
from cmpolicy.serve.batcher import Batcher, InferenceError, StoppedError
from cmpolicy.serve.conversation import GOING_AWAY, TRY_AGAIN_LATER, Conversation, InFlight
from cmpolicy.serve.requests import Session, message_bound
from cmpolicy.serve.wire import pack
from cmpolicy.spec import RESERVED

try:
    from websockets.asyncio.server import Server, ServerConnection, serve
    from websockets.exceptions import ConnectionClosed
except ImportError as error:
    raise ImportError(
        "the policy server and its client need websockets: pip install 'cmpolicy[serve]'"
    ) from error

_logger = logging.getLogger(__name__)
# The library's own lines tell of every port scanner, with a traceback; ours tell of sessions.
_library_logger = logging.getLogger(f"{__name__}.websockets")
_library_logger.setLevel(logging.CRITICAL)

_OPEN_TIMEOUT = 5.0  # s, for a whole opening handshake: a client may send it byte by byte
_CLOSE_TIMEOUT = 2.0  # s, for a client to answer our close frame
_PING_INTERVAL = 20.0  # s; a client that does not answer within as long again is gone
_MAX_FRAMES = 1  # received ahead per connection; beyond it the client's own socket fills up


class ServerError(RuntimeError):
    """The server cannot be started."""

    exit_status = 2


class PolicyServer:
    """Serves a policy to several clients at once, each with its own history and noise.

    ::

        with PolicyServer(policy, port=0) as server:  # in a thread
            print(server.address)
        PolicyServer(policy).run()  # until SIGINT or SIGTERM

    Args:
        policy: called in one worker thread, for all requests that wait together.
        host: address to listen on; other machines can only reach it if it is another than the
            default, and then give a ``token``.
        port: 0 takes a free one, see :attr:`address`.
        token: clients have to send it as ``Authorization: Api-Key <token>`` or ``Bearer <token>``.
            It is not encrypted on the way: across networks, put a TLS proxy or a tunnel before it.
        name: of the policy, told to clients.
        max_sessions: connections at once; further ones get HTTP 503.
        idle_timeout: seconds; a session that sends no request for so long is closed with code 3008
            and its place is free. :class:`RemotePolicy` connects again by itself. None or 0: never.
        max_batch: observations per policy call and per message.
        max_message_bytes: larger messages are refused with a text; messages of more than twice the
            bound close their connection with code 1009. None: 16 MiB, or as much as ``max_batch``
            observations in float64 need.
        seed: of the sessions' noise; None takes one from the operating system.
        grace: seconds that running requests get to end when the server stops.

    Raises:
        ValueError: a token that no header can hold, a limit below 1, an ``idle_timeout`` below 0,
            or a policy with an observation key that the protocol uses itself.
    """

    def __init__(
        self,
        policy: ChunkPolicy,
        host: str = "127.0.0.1",
        port: int = 8000,
        *,
        token: str | None = None,
        name: str = "policy",
        max_sessions: int = 64,
        idle_timeout: float | None = 300.0,
        max_batch: int = 64,
        max_message_bytes: int | None = None,
        seed: int | None = None,
        grace: float = 10.0,
    ) -> None:
        spec = policy.spec
        clash = sorted(set(RESERVED) & spec.obs.keys())
        if clash:
            raise ValueError(
                f"observation keys {clash} are words of the protocol; train the policy with "
                f"other names: data.obs={{another_name: {clash[0]}}}"
            )
        if max_message_bytes is None:
            max_message_bytes = message_bound(spec, max_batch)
        at_least("max_sessions", max_sessions, 1)
        at_least("max_batch", max_batch, 1)
        at_least("max_message_bytes", max_message_bytes, 1)
        if idle_timeout is not None and not 0 <= idle_timeout < math.inf:
            raise ValueError(
                "idle_timeout must be a number of seconds, or 0 or None for no limit, "
                f"got {idle_timeout}"
            )
        if not host:  # asyncio would listen everywhere
            raise ValueError("host is empty; give 127.0.0.1, or 0.0.0.0 to listen everywhere")
        if not 0 <= port <= 65535:
            raise ValueError(f"port must lie in [0, 65535], got {port}")
        self._policy = policy
        self.spec = spec
        self._host, self._port = host, port
        self._token = None if token is None else Token(token)
        self._max_sessions = max_sessions
        self._idle_timeout = idle_timeout or None
        self._max_batch = max_batch
        self._max_bytes = max_message_bytes
        self._grace = grace
        self._greeting = pack(
            {
                "server": "cmpolicy",
                "cmpolicy_version": __version__,
                "policy": name,
                "spec": spec.to_dict(),
                "n_obs_steps": spec.n_obs_steps,
                "n_action_steps": spec.n_action_steps,
                "n_plan_steps": spec.n_plan_steps,
                "horizon": spec.horizon,
                "action_dim": spec.action_dim,
                "control_hz": getattr(policy, "control_hz", None),
                "warm_start": getattr(policy, "warm_start", None),
                "max_batch": max_batch,
                "max_message_bytes": max_message_bytes,
            }
        )
        self._seeds = np.random.SeedSequence(seed)
        self._admission: Admission
        self._batcher: Batcher
        self._in_flight: InFlight
        self._stop: asyncio.Event
        self._loop: asyncio.AbstractEventLoop | None = None
        self._thread: threading.Thread | None = None
        self._failures: list[BaseException] = []  # of that thread

    # -- starting and stopping ------------------------------------------------------------------

    @property
    def address(self) -> str:
        """``ws://host:port``, with the real port once it listens."""
        host = f"[{self._host}]" if ":" in self._host else self._host
        return f"ws://{host}:{self._port}"

    @property
    def port(self) -> int:
        """The real one once it listens."""
        return self._port

    def run(self, on_ready: Callable[[PolicyServer], None] | None = None) -> None:
        """Serve in this, the main, thread until SIGINT or SIGTERM; a second one interrupts.

        Args:
            on_ready: called once it listens.

        Raises:
            ServerError: it cannot listen there.
        """
        asyncio.run(self._main(on_ready or _nothing, handle_signals=True))

    def start(self) -> PolicyServer:
        """Serve in a thread; returns once it listens.

        Raises:
            ServerError: it cannot listen there, or it serves already.
        """
        if self._thread is not None:
            raise ServerError(f"the server at {self.address} is already started")
        ready = threading.Event()
        self._failures.clear()

        def serve_here() -> None:
            try:
                asyncio.run(self._main(lambda _: ready.set(), handle_signals=False))
            except BaseException as error:
                self._failures.append(error)
            finally:
                ready.set()

        self._thread = threading.Thread(target=serve_here, name="cmpolicy-server", daemon=True)
        self._thread.start()
        ready.wait()
        if self._failures:
            self._thread.join()
            self._thread = None
            raise self._failures[0]
        return self

    def stop(self) -> None:
        """End what :meth:`start` began: running requests end, connections close with 1001.

        Raises:
            ServerError: it had failed meanwhile.
        """
        thread, self._thread = self._thread, None
        if thread is None:
            return
        loop = self._loop
        if thread.is_alive() and loop is not None:
            loop.call_soon_threadsafe(self._stop.set)
        thread.join()
        if self._failures:
            failure = self._failures[0]
            raise ServerError(f"the server failed: {failure!r}") from failure

    def __enter__(self) -> PolicyServer:
        return self.start()

    def __exit__(self, *_: object) -> None:
        self.stop()

    async def _main(
        self, on_ready: Callable[[PolicyServer], None], *, handle_signals: bool
    ) -> None:
        self._loop = asyncio.get_running_loop()
        self._stop, self._in_flight = asyncio.Event(), InFlight()
        self._admission = Admission(self._token, self._max_sessions, self._stop)
        self._batcher = Batcher(self._policy, self._max_batch)
        try:
            try:
                await self._batcher.warm_up()
            except InferenceError as error:
                raise ServerError(f"the policy cannot be served: {error}") from error
            server = await self._listen()
            if handle_signals:
                for number in (signal.SIGINT, signal.SIGTERM):
                    self._loop.add_signal_handler(number, self._on_signal)
            try:
                on_ready(self)
                await self._stop.wait()
            finally:
                await self._shut_down(server)
        finally:
            self._batcher.close()

    def _on_signal(self) -> None:
        assert self._loop is not None
        for number in (signal.SIGINT, signal.SIGTERM):
            self._loop.remove_signal_handler(number)  # a second one has its usual effect
        self._stop.set()

    async def _listen(self) -> Server:
        try:
            server = await serve(
                self._serve,
                self._host,
                self._port,
                # No browsers: any web page could talk to a server on its visitor's machine.
                origins=[None],
                process_request=self._admission.answer,
                compression=None,  # no bombs, and less latency
                open_timeout=_OPEN_TIMEOUT,
                close_timeout=_CLOSE_TIMEOUT,
                ping_interval=_PING_INTERVAL,
                ping_timeout=_PING_INTERVAL,
                max_size=2 * self._max_bytes,  # up to here, the refusal is a text
                max_queue=_MAX_FRAMES,
                server_header=f"cmpolicy/{__version__}",
                logger=_library_logger,
                create_connection=self._connection_class(),
            )
        except (OSError, UnicodeError) as error:
            raise ServerError(
                f"cannot listen on {self.address}: {_reason(error)}; choose another port, or "
                "port=0 for any that is free"
            ) from error
        self._port = next(iter(server.sockets)).getsockname()[1]
        return server

    async def _shut_down(self, server: Server) -> None:
        """Answer what is being worked on, then close all connections with 1001."""
        self._stop.set()
        try:
            async with asyncio.timeout(self._grace):
                await self._in_flight.wait_for_none()
        except TimeoutError:
            _logger.warning("stopped with %d requests unanswered", self._in_flight.count)
        self._batcher.close()
        server.close()  # with 1001
        await server.wait_closed()

    # -- a connection ---------------------------------------------------------------------------

    def _connection_class(self) -> type[ServerConnection]:
        """Connections that are counted from the first packet, handshake or not."""
        admission = self._admission

        class Connection(ServerConnection):
            is_waiting = True  # for the end of its handshake

            def connection_made(self, transport: asyncio.BaseTransport) -> None:
                super().connection_made(transport)
                self.address = address_of(transport.get_extra_info("peername"))
                if not admission.connected(self.address):
                    self.transport.abort()

            def opened(self) -> None:
                if self.is_waiting:
                    self.is_waiting = False
                    admission.opened(self.address)

            def connection_lost(self, exc: Exception | None) -> None:
                admission.connections -= 1
                self.opened()
                super().connection_lost(exc)

        return Connection

    async def _serve(self, connection: ServerConnection) -> None:
        cast(Any, connection).opened()
        if self._admission.is_full:  # several were admitted at the same moment
            await connection.close(TRY_AGAIN_LATER, "this server has no session left")
            return
        self._admission.sessions += 1
        session = Session(
            self.spec,
            max_batch=self._max_batch,
            seed=self._seeds.spawn(1)[0],
            is_warm=getattr(self._policy, "warm_start", None) is not None,
        )
        conversation = Conversation(
            session, self._batcher, max_bytes=self._max_bytes, idle_timeout=self._idle_timeout
        )
        begin = time.monotonic()
        try:
            await connection.send(self._greeting)
            await conversation.run(connection, self._in_flight, self._stop)
        except ConnectionClosed:
            pass  # also in the middle of a request: its answer is dropped
        except StoppedError:  # of a policy that took longer than the grace
            await connection.close(GOING_AWAY, "the server is shutting down")
        except Exception:
            _logger.exception("a session failed")
            await connection.close(1011, "internal error")
        finally:
            self._admission.sessions -= 1
            _logger.info(
                "%s: %d answered, %d refused in %.1f s, closed with %s",
                _peer(connection),
                conversation.answered,
                conversation.refused,
                time.monotonic() - begin,
                connection.close_code,
            )


def _peer(connection: ServerConnection) -> str:
    address = connection.remote_address
    return f"{address[0]}:{address[1]}" if isinstance(address, tuple) else "a client"


def _reason(error: Exception) -> str:
    return (getattr(error, "strerror", None) or str(error)).lower()


def _nothing(server: PolicyServer) -> None:
    pass
