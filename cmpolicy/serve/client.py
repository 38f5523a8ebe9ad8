"""A policy that runs elsewhere: the client of :class:`cmpolicy.serve.server.PolicyServer`."""

from __future__ import annotations

import ipaddress
import random
import socket
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from typing import Any
from urllib.parse import urlsplit

import numpy as np

from cmpolicy.observation import encode_jpeg, read_noise, read_observation, read_plan
from cmpolicy.robot.policy import Array
from cmpolicy.schema import at_least, positive
from cmpolicy.serve.wire import MAX_ENTRIES, MAX_LENGTH, WireError, pack, unpack
from cmpolicy.spec import PolicySpec, SpecError

try:
    from websockets.exceptions import (
        ConnectionClosed,
        InvalidHandshake,
        InvalidMessage,
        InvalidStatus,
        InvalidURI,
        WebSocketException,
    )
    from websockets.protocol import State
    from websockets.proxy import get_proxy
    from websockets.sync.client import ClientConnection, connect
    from websockets.uri import parse_uri
except ImportError as error:
    raise ImportError(
        "the policy server and its client need websockets: pip install 'cmpolicy[serve]'"
    ) from error

_MAX_REPLY = 2**26  # bytes, 64 MiB
_CLOSE_TIMEOUT = 1.0  # s
_MESSAGE_TOO_BIG = 1009
_REFUSED = {401: "refused the token", 403: "refused this client"}
_SERVICE_UNAVAILABLE = 503


class RemotePolicyError(RuntimeError):
    """The policy server refuses, answers what it should not, or is gone; the text says which."""


class PolicyUnavailableError(RemotePolicyError, ConnectionError):
    """It is gone or silent, and may be back: a control loop holds the robot and asks again."""


class _LostError(Exception):
    """The connection failed in a way that another attempt may mend."""


class _Connection(ClientConnection):
    """One that says why a handshake failed even where the server spoke before it was asked."""

    def handshake(self, *args: Any, **kwargs: Any) -> None:
        try:
            super().handshake(*args, **kwargs)
        except (ConnectionClosed, AssertionError):  # by whether it has also hung up since
            failure = self.protocol.handshake_exc
            if failure is None:
                raise
            raise failure from failure.__cause__  # which tells whether there was any answer


class RemotePolicy:
    """A policy on a server, used like one that is here. Stateless: whole histories are sent.

    A lost connection is made again, with pauses that double and vary, and the request is sent
    again: the answer does not depend on what was sent before. The caller meanwhile waits, at most
    about ``retries * (timeout + max_backoff)`` seconds. One that the server closed as idle is made
    again at once.

    Args:
        url: ``ws://host:8000``, or ``wss://...`` through a TLS proxy.
        token: of the server.
        timeout: seconds for a connection to open, for the server to take more of a request, and for
            each answer.
        retries: attempts after the first, per call.
        backoff: seconds before the first of them.
        max_backoff: longest pause, seconds.
        jpeg: quality, 1 to 95, of the JPEG files that camera frames are sent as; None sends them as
            they are.
        proxy: whether a proxy of the environment (``HTTPS_PROXY`` and so on) is used where the
            server's host is a public one; hosts of one's own network are reached without it.

    Raises:
        ValueError: a ``url`` that is none, or a setting that makes no sense.
        PolicyUnavailableError: no server there.
        RemotePolicyError: another kind of server, or one that refuses the token.
    """

    def __init__(
        self,
        url: str,
        *,
        token: str | None = None,
        timeout: float = 5.0,
        retries: int = 5,
        backoff: float = 0.1,
        max_backoff: float = 2.0,
        jpeg: int | None = None,
        proxy: bool = True,
    ) -> None:
        _check_url(url)
        at_least("retries", retries, 0)
        at_least("backoff", backoff, 0)
        positive("timeout", timeout)
        if jpeg is not None and not 1 <= jpeg <= 95:
            raise ValueError(f"jpeg must be a quality from 1 to 95, got {jpeg}")
        self.url = url
        self._jpeg = jpeg
        self._proxy = get_proxy(parse_uri(url)) if proxy and _is_public(url) else None
        self._headers = {} if token is None else {"Authorization": f"Bearer {token}"}
        self._timeout = timeout
        self._retries, self._backoff, self._max_backoff = retries, backoff, max_backoff
        self._jitter = random.Random()
        self._lock = threading.Lock()  # one request at a time on the connection
        self._closed = threading.Event()
        self._connection: ClientConnection | None = None
        self._stack = ExitStack()
        self._spec: PolicySpec | None = None
        self.metadata: dict[str, Any] = {}
        #: Of the last answer: infer_ms, queue_ms, batch_rows, prev_total_ms.
        self.server_timing: dict[str, float] = {}
        self._exchange(b"")

    # -- what eval and the control loop read ----------------------------------------------------

    @property
    def spec(self) -> PolicySpec:
        """As the server told it at the first connection."""
        assert self._spec is not None  # set by the constructor
        return self._spec

    @property
    def n_obs_steps(self) -> int:
        """To."""
        return self.spec.n_obs_steps

    @property
    def n_action_steps(self) -> int:
        """Ta."""
        return self.spec.n_action_steps

    @property
    def control_hz(self) -> float | None:
        """Rate of the actions, if the server knows it."""
        rate = self.metadata.get("control_hz")
        return float(rate) if isinstance(rate, int | float) else None

    @property
    def warm_start(self) -> float | None:
        """Time at which decisions start that have a ``plan``; None: the server takes none."""
        time_ = self.metadata.get("warm_start")
        return float(time_) if isinstance(time_, int | float) else None

    def infer(
        self, obs: Mapping[str, Array], noise: Array | None = None, *, plan: Array | None = None
    ) -> Array:
        """The actions to execute now, (B, Ta, A); see :meth:`infer_plan`."""
        return self.infer_plan(obs, noise, plan=plan)[:, : self.spec.n_action_steps]

    def infer_plan(
        self, obs: Mapping[str, Array], noise: Array | None = None, *, plan: Array | None = None
    ) -> Array:
        """Every action from the newest observation on, (B, P, A), P = T - To + 1.

        Batches larger than the server's are sent in parts. Safe to call from several threads, which
        take turns.

        Args:
            obs: (B, To, ...) per key, oldest first.
            noise: (B, *spec.noise_shape) standard normal; the server draws it if it is not given.
            plan: (B, T, A) that decisions of a policy with :attr:`warm_start` start from, NaN in
                rows without one.

        Raises:
            SpecError: an observation, noise or plan that does not fit; nothing was sent.
            PolicyUnavailableError: the server is gone, or took too long.
            RemotePolicyError: it refuses, or serves another policy now.
        """
        rows = self.spec.check_obs(obs)
        arrays = {key: read_observation(self.spec, key, obs[key]) for key in self.spec.obs}
        if noise is not None:
            arrays["noise"] = read_noise(self.spec, noise, rows)
        if plan is not None:
            arrays["plan"] = read_plan(self.spec, plan, rows)
        size, parts = self._rows_at_once(rows), []
        for start in range(0, rows, size):
            part = {
                key: self._sent(key, value[start : start + size]) for key, value in arrays.items()
            }
            with self._lock:
                reply = self._exchange(pack(part))
            if isinstance(reply, str):
                raise RemotePolicyError(f"the policy server at {self.url} refused: {reply}")
            parts.append(self._plan(self._unpack(reply), min(size, rows - start)))
        return parts[0] if len(parts) == 1 else np.concatenate(parts)

    def _rows_at_once(self, rows: int) -> int:
        size = int(self.metadata.get("max_batch", rows))
        if self._jpeg is None or not self.spec.images:
            return size
        # frames as files are lists, which the wire bounds
        entries = len(self.spec.images) * (self.spec.n_obs_steps + 1)
        return max(1, min(size, MAX_LENGTH, (MAX_ENTRIES - MAX_LENGTH) // entries))

    def _sent(self, key: str, value: Array) -> Any:
        if self._jpeg is None or key not in self.spec.images:
            return value
        return [[encode_jpeg(frame, self._jpeg) for frame in history] for history in value]

    def close(self) -> None:
        """End the connection; a call that waits in another thread ends with an error."""
        self._closed.set()
        connection = self._connection
        if connection is not None:
            connection.close()
        with self._lock:
            self._disconnect()

    def __enter__(self) -> RemotePolicy:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # -- the connection -------------------------------------------------------------------------

    def _exchange(self, message: bytes) -> str | bytes:
        """Send a message and return the reply; an empty one only connects.

        Raises:
            PolicyUnavailableError, RemotePolicyError: see :meth:`infer_plan`.
        """
        begin = time.monotonic()
        cause: Exception | None = None
        for pause in self._pauses():
            if self._closed.wait(pause) if pause else self._closed.is_set():
                raise RemotePolicyError(f"this client of {self.url} is closed") from cause
            try:
                connection = self._connected()
                return self._ask(connection, message) if message else b""
            except _LostError as error:
                cause = error
                self._disconnect()
            except BaseException:  # also Ctrl-C: a late reply must not answer the next request
                self._disconnect()
                raise
        if self._closed.is_set():
            raise RemotePolicyError(f"this client of {self.url} is closed") from cause
        raise PolicyUnavailableError(
            f"no policy server at {self.url}: {self._retries + 1} attempts in "
            f"{time.monotonic() - begin:.1f} s, the last one: {cause}"
        ) from cause

    def _pauses(self) -> Iterator[float]:
        """Seconds to wait before each attempt: none, then doubling, each by a random half less."""
        yield 0.0
        for attempt in range(self._retries):
            longest = min(self._max_backoff, self._backoff * 2**attempt)
            yield longest * self._jitter.uniform(0.5, 1.0)

    def _ask(self, connection: ClientConnection, message: bytes) -> str | bytes:
        try:
            connection.send(message)
            return connection.recv(timeout=self._timeout)
        except TimeoutError as error:
            raise PolicyUnavailableError(
                f"the policy server at {self.url} gave no answer within {self._timeout:g} s"
            ) from error
        except ConnectionClosed as error:
            if error.rcvd is not None and error.rcvd.code == _MESSAGE_TOO_BIG:
                raise RemotePolicyError(
                    f"the policy server at {self.url} refused a message of {len(message)} bytes as "
                    f"too long; it takes {self.metadata.get('max_message_bytes')}"
                ) from error
            raise _LostError(f"the connection was lost ({error})") from error

    def _connected(self) -> ClientConnection:
        """The connection, made if there is none.

        Raises:
            _LostError: not now.
            RemotePolicyError: not ever.
        """
        if self._connection is not None and self._connection.protocol.state is State.OPEN:
            return self._connection
        self._disconnect()  # the server closes one that is idle for long
        try:
            connection = self._stack.enter_context(
                connect(
                    self.url,
                    create_connection=_Connection,
                    additional_headers=self._headers,
                    compression=None,
                    proxy=self._proxy,
                    open_timeout=self._timeout,
                    close_timeout=_CLOSE_TIMEOUT,
                    max_size=_MAX_REPLY,
                )
            )
            if hasattr(socket, "TCP_USER_TIMEOUT"):  # Linux; sending has no time limit of its own
                limit = max(1, round(self._timeout * 1e3))
                connection.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, limit)
            greeting = connection.recv(timeout=self._timeout)
        except InvalidStatus as error:
            status = error.response.status_code
            text = bytes(error.response.body or b"")[:200].decode(errors="replace").strip()
            if status == _SERVICE_UNAVAILABLE:
                raise _LostError(f"it is busy ({text or 'HTTP 503'})") from error
            if status in _REFUSED:
                raise RemotePolicyError(
                    f"the server at {self.url} {_REFUSED[status]} (HTTP {status}): {text}"
                ) from error
            raise self._foreign(f"it answered with HTTP {status}") from error
        except (InvalidMessage, InvalidHandshake, InvalidURI) as error:
            # a connection that ends without any answer is one of a server that is just stopping
            if isinstance(error.__cause__, EOFError | OSError):
                raise _LostError(f"{error}{self._through()}") from error
            raise self._foreign(f"{error}{self._through()}") from error
        except (OSError, WebSocketException) as error:  # TimeoutError is an OSError
            raise _LostError(f"{str(error) or type(error).__name__}{self._through()}") from error
        self._greet(greeting)
        self._connection = connection
        return connection

    def _greet(self, greeting: str | bytes) -> None:
        """Take in the server's metadata.

        Raises:
            RemotePolicyError: they are none, or tell of another policy than before.
        """
        metadata = None if isinstance(greeting, str) else self._unpack(greeting)
        if not isinstance(metadata, dict) or not isinstance(metadata.get("spec"), dict):
            raise self._foreign("its first message holds no policy specification")
        try:
            spec = PolicySpec.from_dict(metadata["spec"])
        except SpecError as error:
            raise self._foreign(str(error)) from error
        if self._spec is not None and spec != self._spec:
            now, before = spec.to_dict(), self._spec.to_dict()
            words = ", ".join(  # what is at its default is left out
                f"{name} {before.get(name)} -> {now.get(name)}"
                for name in {**before, **now}
                if now.get(name) != before.get(name)
            )
            raise RemotePolicyError(
                f"the server at {self.url} now serves another policy ({words}); connect anew with "
                "another RemotePolicy"
            )
        size = metadata.get("max_batch", 1)
        if type(size) is not int or size < 1:
            raise self._foreign(f"max_batch is {size!r}")
        self._spec, self.metadata = spec, metadata

    def _disconnect(self) -> None:
        self._connection = None
        self._stack.close()

    def _unpack(self, data: bytes) -> Any:
        try:
            return unpack(data, max_bytes=_MAX_REPLY)
        except WireError as error:
            raise self._foreign(str(error)) from error

    def _plan(self, reply: Any, rows: int) -> Array:
        plan = reply.get("plan") if isinstance(reply, dict) else None
        expected = (rows, self.spec.n_plan_steps, self.spec.action_dim)
        if not isinstance(plan, np.ndarray) or plan.shape != expected or plan.dtype.kind != "f":
            got = f"shape {plan.shape}" if isinstance(plan, np.ndarray) else type(plan).__name__
            raise self._foreign(f"its answer holds a plan of {got}, expected shape {expected}")
        if not np.isfinite(plan).all():
            raise RemotePolicyError(f"the server at {self.url} answered with actions not finite")
        timing = reply.get("server_timing")
        self.server_timing = timing if isinstance(timing, dict) else {}
        return plan.copy()  # writable, and the message is let go

    def _through(self) -> str:
        """Which proxy the connection went through, for messages."""
        if self._proxy is None:
            return ""
        place = urlsplit(self._proxy)  # without the password in it
        return (
            f" (through the proxy {place.hostname}:{place.port} of the environment; proxy=False "
            "goes without it)"
        )

    def _foreign(self, why: str) -> RemotePolicyError:
        return RemotePolicyError(f"{self.url} is no policy server of cmpolicy's: {why}")


def _check_url(url: str) -> None:
    parts = urlsplit(url)
    if parts.scheme not in ("ws", "wss") or not parts.hostname:
        raise ValueError(f"url must look like ws://host:8000, got {url!r}")


def _is_public(url: str) -> bool:
    """Whether a host is one of the internet, not of one's own network."""
    host = urlsplit(url).hostname or ""
    try:
        return ipaddress.ip_address(host).is_global
    except ValueError:
        return "." in host and not host.endswith(_OWN_NETWORK)


#: Ends of names that are given in one's own network (RFC 6762, RFC 8375, and common practice).
_OWN_NETWORK = (".local", ".lan", ".home.arpa", ".internal", ".localdomain", ".localhost")
