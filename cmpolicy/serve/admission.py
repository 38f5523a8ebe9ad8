"""Who is let in: the token, what one address may hold, and what becomes of guessed tokens.

Connections count from their first packet. In their opening handshake they are bounded per address,
so that one address keeps no other out; after it they are sessions, which are bounded in all.

A wrong token is counted for its address. From an address with several of them, the token of a new
connection is looked at only after a pause that doubles with every further one, up to
:data:`MAX_PAUSE`: right or wrong, so that hanging up early tells nothing. Other addresses, and
sessions that are open already, do not wait. An address is forgotten :data:`FORGET_AFTER` seconds
after its last wrong token, or when :data:`MAX_ADDRESSES` others had one since.
"""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import ipaddress
import logging
import time
from collections import Counter, OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from http import HTTPStatus
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from websockets.asyncio.server import ServerConnection
    from websockets.http11 import Request, Response

_logger = logging.getLogger(__name__)

_UNOPENED = 128  # TCP connections beyond max_sessions, for handshakes and /healthz
_UNOPENED_PER_ADDRESS = 32  # of these: one that only connects keeps no other address out

#: Wrong tokens of one address that cost it nothing.
FREE_FAILURES = 5
#: Seconds of the first pause, and of the longest; a handshake may last 5 s with it.
FIRST_PAUSE, MAX_PAUSE = 0.25, 3.0
#: Seconds, and addresses.
FORGET_AFTER, MAX_ADDRESSES = 600.0, 1024


class Token:
    """A bearer token. Only its digest is kept.

    Raises:
        ValueError: the text is empty or does not fit into an HTTP header.
    """

    def __init__(self, text: str) -> None:
        if not text or not all("!" <= character <= "~" for character in text):
            raise ValueError(
                "the token must be of visible ASCII characters without spaces, at least one"
            )
        self._digest = _digest(text)

    def allows(self, authorization: Sequence[str]) -> bool:
        """Whether the ``Authorization`` headers of a request are one header with this token.

        ``Bearer <token>``, or openpi's ``Api-Key <token>``. Digests of one length are compared in
        constant time, so the duration tells nothing about the token.
        """
        value = authorization[0] if len(authorization) == 1 else ""
        scheme, _, text = value.strip().partition(" ")
        is_equal = hmac.compare_digest(_digest(text.strip()), self._digest)
        return is_equal and scheme.lower() in ("bearer", "api-key")


def _digest(text: str) -> bytes:
    return hashlib.sha256(text.encode(errors="surrogateescape")).digest()


@dataclass
class _Failures:
    count: int
    latest: float  # s, monotonic


class FailedTokens:
    """Wrong tokens by address, in a table of bounded size."""

    def __init__(self) -> None:
        self._table: OrderedDict[str, _Failures] = OrderedDict()  # the latest last

    def __len__(self) -> int:
        """Addresses."""
        return len(self._table)

    def pause(self, address: str) -> float:
        """Seconds until a token from there is looked at, in [0, MAX_PAUSE]."""
        failures = self._table.get(address)
        if failures is None or time.monotonic() - failures.latest > FORGET_AFTER:
            return 0.0
        beyond = failures.count - FREE_FAILURES
        if beyond < 0:
            return 0.0
        return min(MAX_PAUSE, FIRST_PAUSE * 2.0 ** min(beyond, 32))

    def add(self, address: str) -> None:
        """Count one, and log it; of many from one address, every count that is a power of two."""
        now = time.monotonic()
        failures = self._table.pop(address, None)
        if failures is None or now - failures.latest > FORGET_AFTER:
            failures = _Failures(0, now)
        failures.count, failures.latest = failures.count + 1, now
        self._table[address] = failures
        if len(self._table) > MAX_ADDRESSES:
            self._table.popitem(last=False)
        if failures.count.bit_count() == 1:
            _logger.warning(
                "%s: no token or a wrong one, %d in all; its next one is looked at after %g s",
                address,
                failures.count,
                self.pause(address),
            )


class Admission:
    """Counts connections and sessions, and answers those that are not to become a session.

    Args:
        token: that clients have to send, if any.
        max_sessions: at once.
        stopping: set once the server stops; belongs to the event loop that this is used in.
    """

    def __init__(self, token: Token | None, max_sessions: int, stopping: asyncio.Event) -> None:
        self._token = token
        self._max_sessions = max_sessions
        self._stopping = stopping
        self._failed = FailedTokens()
        self._unopened: Counter[str] = Counter()  # connections in their handshake, by address
        self.connections = 0
        self.sessions = 0

    @property
    def is_full(self) -> bool:
        """Whether there is no place for a further session."""
        return self.sessions >= self._max_sessions

    def connected(self, address: str) -> bool:
        """Count a TCP connection; whether it may stay."""
        self.connections += 1
        self._unopened[address] += 1
        return (
            self.connections <= self._max_sessions + _UNOPENED
            and self._unopened[address] <= _UNOPENED_PER_ADDRESS
        )

    def opened(self, address: str) -> None:
        """The handshake of a connection is over, well or not."""
        self._unopened[address] -= 1
        if not self._unopened[address]:
            del self._unopened[address]

    async def answer(self, connection: ServerConnection, request: Request) -> Response | None:
        """The answer to an HTTP request that is not to become a session, None to one that is."""
        if request.path.partition("?")[0] == "/healthz":
            return connection.respond(HTTPStatus.OK, "OK\n")
        if self._token is not None:
            address = address_of(connection.remote_address)
            await self._wait(connection, self._failed.pause(address))
            if not self._token.allows(request.headers.get_all("Authorization")):
                self._failed.add(address)
                response = connection.respond(
                    HTTPStatus.UNAUTHORIZED,
                    "this server needs its token, as 'Authorization: Bearer <token>'\n",
                )
                response.headers["WWW-Authenticate"] = "Bearer"
                return response
        if self._stopping.is_set() or self.is_full:
            why = "is shutting down" if self._stopping.is_set() else "has no session left"
            return connection.respond(HTTPStatus.SERVICE_UNAVAILABLE, f"this server {why}\n")
        return None

    async def _wait(self, connection: ServerConnection, seconds: float) -> None:
        """Wait, but not for a client that has hung up, nor when the server stops."""
        if not seconds:
            return
        ends = [
            asyncio.ensure_future(self._stopping.wait()),
            asyncio.ensure_future(connection.wait_closed()),
        ]
        try:
            await asyncio.wait(ends, timeout=seconds, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for end in ends:
                end.cancel()


def address_of(peer: Any) -> str:
    """The address of a socket's peer; of IPv6 the /64 network, all of which one client may have."""
    if not isinstance(peer, tuple):
        return ""
    address = ipaddress.ip_address(peer[0])
    if isinstance(address, ipaddress.IPv4Address):
        return str(address)
    if address.ipv4_mapped is not None:
        return str(address.ipv4_mapped)
    return str(ipaddress.ip_network((int(address), 64), strict=False))
