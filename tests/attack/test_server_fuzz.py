"""Thousands of invalid messages to a policy server: each is answered, refused or closed.

``make attack`` sends a million (``--attack-scale``); the suite sends a thousand.
"""

from __future__ import annotations

import socket
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from typing import Any
from urllib.parse import urlsplit

import msgpack
import numpy as np
import psutil
import torch
from numpy.typing import NDArray
from websockets.exceptions import ConnectionClosed
from websockets.sync.client import ClientConnection, connect

from cmpolicy import PolicyServer, RemotePolicy
from cmpolicy.nn.unet1d import UNet1DConfig
from cmpolicy.normalize import Normalizer
from cmpolicy.policy.policy import ConsistencyPolicy
from cmpolicy.serve.wire import pack
from cmpolicy.spec import PolicySpec

Message = str | bytes
Observation = Mapping[str, NDArray[Any]]
_TIMEOUT = 30.0  # s: a server that does not answer by then has failed
_FROM_OUTSIDE_EVERY = 50  # messages, of which one is bytes on a bare socket


_SHAPES = {"agent_pos": (2,), "keypoint": (9, 2)}
_MAX_BYTES = 100_000  # of a message: a bound that the test can exceed cheaply
_GROWTH = 20e6  # bytes of resident memory


class FuzzError(ConnectionError):
    """The server did not answer, or closed the connection where it should have gone on."""


def test_invalid_messages(attack_scale: int) -> None:
    """The server survives, does not grow, and answers rightly afterwards."""
    rng = np.random.default_rng(0)
    policy = _policy()
    batch = {
        key: rng.uniform(0, 512, (1, 2, *shape)).astype(np.float32)
        for key, shape in _SHAPES.items()
    }
    step = {key: value[0, -1] for key, value in batch.items()}
    count = 1000 * attack_scale
    process, settled = psutil.Process(), 0

    def note(done: int) -> None:
        nonlocal settled
        if done == count // 10:  # buffers and caches have their size by now
            settled = process.memory_info().rss

    with PolicyServer(policy, port=0, max_message_bytes=_MAX_BYTES) as server:
        outcomes = fuzz(server.address, step, count, seed=3, after=note)
        growth = process.memory_info().rss - settled
        noise = rng.standard_normal((1, 16, 2), dtype=np.float32)
        with RemotePolicy(server.address) as remote:
            plan = remote.infer_plan(batch, noise)
    print(f"{count} messages: {dict(outcomes)}, memory grew by {growth / 1e6:.1f} MB")
    assert outcomes.total() == count
    assert outcomes["refused"] > 0.5 * count
    assert min(outcomes["closed"], outcomes["answered"], outcomes["raw"]) > 0
    assert growth < _GROWTH
    np.testing.assert_allclose(plan, policy.infer_plan(batch, noise), atol=1e-3)


def test_half_open_connections_of_one_address_keep_no_other_out(attack_scale: int) -> None:
    """Hardening: 100 half-open sockets locked 19 of 20 new clients out."""
    with PolicyServer(_policy(), port=0) as server:
        silent = []
        for _ in range(100 * min(attack_scale, 5)):
            sock = socket.create_connection(
                ("127.0.0.1", server.port), timeout=_TIMEOUT, source_address=("127.0.0.2", 0)
            )
            silent.append(sock)
        for _ in range(20):
            RemotePolicy(server.address, retries=0).close()
        for sock in silent:
            sock.close()


def _policy() -> ConsistencyPolicy:
    """A small untrained Push-T policy."""
    torch.manual_seed(0)
    rng = np.random.default_rng(0)
    arrays = {key: rng.uniform(0, 512, (64, *shape)) for key, shape in _SHAPES.items()}
    normalizer = Normalizer.fit({**arrays, "action": rng.uniform(0, 512, (64, 2))})
    spec = PolicySpec(_SHAPES, action_dim=2, horizon=16, n_obs_steps=2, n_action_steps=8)
    net = UNet1DConfig((8, 16), kernel_size=3, n_groups=4, time_dim=8)
    return ConsistencyPolicy(spec, net, normalizer).eval()


def fuzz(
    url: str, obs: Observation, count: int, seed: int, *, after: Callable[[int], None] | None = None
) -> Counter[str]:
    """Send ``count`` messages; each must be answered, refused by a text, or close its connection.

    Args:
        url: of the server.
        obs: a right observation, one step per key.
        count: messages.
        seed: what they are.
        after: called with the number of messages so far.

    Returns:
        How many were ``answered``, ``refused``, or ``closed`` their connection (which only messages
        that are too long may), and how many were ``raw`` bytes on a socket.

    Raises:
        FuzzError: something else happened.
    """
    outcomes: Counter[str] = Counter()
    rng = np.random.default_rng(seed)
    connection, greeting = _open(url)
    bound = int(greeting["max_message_bytes"])
    messages = _messages(rng, obs, bound)
    for number in range(1, count + 1):
        if number % _FROM_OUTSIDE_EVERY == 0:
            _raw(url, rng)
            outcomes["raw"] += 1
        else:
            kind, message = next(messages)
            outcome = _outcome(connection, kind, message, bound)
            outcomes[outcome] += 1
            if outcome == "closed":
                connection, _ = _open(url)
        if after is not None:
            after(number)
    connection.close()
    return outcomes


def _outcome(connection: ClientConnection, kind: str, message: Message, bound: int) -> str:
    try:
        connection.send(message)
        reply = connection.recv(timeout=_TIMEOUT)
    except ConnectionClosed as error:
        code = None if error.rcvd is None else error.rcvd.code
        if len(message) > 2 * bound and code == 1009:
            return "closed"
        raise FuzzError(f"a message of kind {kind!r} closed its connection: {error}") from error
    except TimeoutError as error:
        raise FuzzError(f"no answer to a message of kind {kind!r}") from error
    if isinstance(reply, str):
        if not reply or "Traceback" in reply:
            raise FuzzError(f"a message of kind {kind!r} was refused with {reply[:200]!r}")
        return "refused"
    return "answered"


def _open(url: str) -> tuple[ClientConnection, dict[str, Any]]:
    # entered and never left: it is closed by the server's refusal or at the end
    connection = connect(url, compression=None, proxy=None, open_timeout=_TIMEOUT).__enter__()
    return connection, msgpack.unpackb(connection.recv(timeout=_TIMEOUT))


def _raw(url: str, rng: np.random.Generator) -> None:
    """Bytes on a bare socket: noise, half a handshake, or a frame that never ends."""
    parts = urlsplit(url)
    assert parts.hostname is not None
    request = (
        b"GET / HTTP/1.1\r\nHost: x\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
        b"Sec-WebSocket-Key: AAAAAAAAAAAAAAAAAAAAAA==\r\nSec-WebSocket-Version: 13\r\n\r\n"
    )
    frames = [b"\x82\xfe\x10\x00", b"\x82\xff" + b"\xff" * 8, b"\x8f\x80\0\0\0\0", b"\xff" * 20]
    choice = int(rng.integers(3))
    if choice == 0:
        data = rng.bytes(int(rng.integers(1, 300)))
    elif choice == 1:
        data = request[: int(rng.integers(1, len(request)))]
    else:
        data = request + frames[int(rng.integers(len(frames)))] + rng.bytes(int(rng.integers(40)))
    with socket.create_connection((parts.hostname, parts.port or 80), timeout=_TIMEOUT) as sock:
        sock.sendall(data)


def _messages(
    rng: np.random.Generator, obs: Observation, bound: int
) -> Iterator[tuple[str, Message]]:
    """Endless (kind, message)."""
    valid = pack(dict(obs))
    makers: dict[str, Callable[[], Message]] = {
        "random bytes": lambda: rng.bytes(int(rng.integers(0, 400))),
        "truncated": lambda: valid[: int(rng.integers(0, len(valid)))],
        "mutated": lambda: _mutated(rng, valid),
        "huge declared size": lambda: _huge(rng, obs),
        "wrong dtype": lambda: _wrong_dtype(rng, obs),
        "not finite": lambda: _not_finite(rng, obs),
        "wrong shape": lambda: _wrong_shape(rng, obs),
        "wrong keys": lambda: _wrong_keys(rng, obs),
        "nested": lambda: b"\x91" * int(rng.integers(2, 5000)) + b"\xc0",
        "many entries": lambda: msgpack.packb([[{}] * 200] * int(rng.integers(1, 100))),
        "text": lambda: rng.bytes(int(rng.integers(0, 50))).hex(),
        "valid": lambda: valid,
    }
    names = list(makers)
    while True:
        if rng.random() < 0.01:
            yield "too long", bytes(int(rng.integers(1, 3)) * bound + int(rng.integers(1, 1000)))
        else:
            name = names[int(rng.integers(len(names)))]
            yield name, makers[name]()


def _mutated(rng: np.random.Generator, valid: bytes) -> bytes:
    message = bytearray(valid)
    for _ in range(int(rng.integers(1, 8))):
        message[int(rng.integers(len(message)))] = int(rng.integers(256))
    return bytes(message)


def _changed(rng: np.random.Generator, obs: Observation, **fields: Any) -> bytes:
    """The observation with fields of one array replaced."""
    key = _any_key(rng, obs)
    array = {
        b"__ndarray__": True,
        b"data": obs[key].tobytes(),
        b"dtype": obs[key].dtype.str,
        b"shape": list(obs[key].shape),
    } | {name.encode(): value for name, value in fields.items()}
    others = {k: v.tolist() for k, v in obs.items() if k != key}
    packed: bytes = msgpack.packb({**others, key: array})
    return packed


def _huge(rng: np.random.Generator, obs: Observation) -> bytes:
    choice = int(rng.integers(6))
    if choice < 4:  # headers of array, map, bytes and text that announce four billion
        return b"\x81\xa1x" + (b"\xdd", b"\xdf", b"\xc6", b"\xdb")[choice] + b"\xff\xff\xff\xff"
    shape = [2**31, 2**31] if choice == 4 else [0, 2**40, 2**40]
    return _changed(rng, obs, shape=shape)


def _wrong_dtype(rng: np.random.Generator, obs: Observation) -> bytes:
    dtypes = ("|O8", "<c16", "<M8[ns]", "|V8", "<U2", "<i8", "i4,i4", "<f4\0", "|b1", "<f16", "")
    return _changed(rng, obs, dtype=dtypes[int(rng.integers(len(dtypes)))])


def _not_finite(rng: np.random.Generator, obs: Observation) -> bytes:
    key = _any_key(rng, obs)
    array = obs[key].astype(np.float64)
    array.flat[int(rng.integers(array.size))] = (np.nan, np.inf, -np.inf, 1e300)[rng.integers(4)]
    return pack({**obs, key: array})


def _wrong_shape(rng: np.random.Generator, obs: Observation) -> bytes:
    shape = tuple(int(n) for n in rng.integers(0, 4, size=int(rng.integers(0, 6))))
    return pack({**obs, _any_key(rng, obs): np.zeros(shape, np.float32)})


def _wrong_keys(rng: np.random.Generator, obs: Observation) -> bytes:
    key = _any_key(rng, obs)
    rest: dict[Any, Any] = {k: v for k, v in obs.items() if k != key}
    extras: list[dict[Any, Any]] = [
        {},
        {key + "x": obs[key]},
        {key: None},
        {**obs, "noise": np.zeros(3)},
        {**obs, "reset": "yes"},
        {**obs, "seed": -1},
        {**obs, b"key": 1},
    ]
    return pack(rest | extras[int(rng.integers(len(extras)))])


def _any_key(rng: np.random.Generator, obs: Observation) -> str:
    return list(obs)[int(rng.integers(len(obs)))]
