"""Sharing a policy server: idle sessions, large batches and guessed tokens hurt nobody else."""

import logging
import socket
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
from websockets.exceptions import ConnectionClosed, InvalidStatus
from websockets.sync.client import ClientConnection, connect

from cmpolicy import PolicyServer, RemotePolicy
from cmpolicy.robot.policy import Array
from cmpolicy.serve import admission
from cmpolicy.serve import server as server_module
from cmpolicy.serve.admission import FailedTokens, address_of
from cmpolicy.serve.client import RemotePolicyError
from cmpolicy.serve.wire import pack, unpack
from cmpolicy.spec import PolicySpec

WAIT = 30.0  # s: longer than anything takes, so that a hang fails instead of hanging
MAX_ROWS = 4


class GatedPolicy:
    """A policy that answers with its newest state, once ``gate`` is open; notes its calls."""

    spec = PolicySpec({"state": (2,)}, action_dim=2, horizon=2, n_obs_steps=1, n_action_steps=2)
    n_obs_steps, n_action_steps = 1, 2

    def __init__(self) -> None:
        self.gate = threading.Event()
        self.gate.set()
        self.lets_one_through = False  # per opening of the gate
        self.entered = threading.Semaphore(0)
        self.calls: list[list[float]] = []  # a state per row

    def infer(self, obs: Mapping[str, Array], noise: Array | None = None) -> Array:
        return self.infer_plan(obs, noise)

    def infer_plan(self, obs: Mapping[str, Array], noise: Array | None = None) -> Array:
        self.entered.release()
        assert self.gate.wait(WAIT)
        if self.lets_one_through:
            self.gate.clear()
        self.calls.append(obs["state"][:, -1, 0].tolist())
        return np.repeat(obs["state"], 2, axis=1)

    def close_gate(self) -> None:
        """From now on calls wait; those of the warm-up are forgotten."""
        while self.entered.acquire(blocking=False):
            pass
        self.calls.clear()
        self.gate.clear()


@pytest.fixture
def policy() -> GatedPolicy:
    return GatedPolicy()


@pytest.fixture
def guarded(policy: GatedPolicy) -> Iterator[PolicyServer]:
    """A server with a token."""
    with PolicyServer(policy, port=0, token="s3cret") as server:
        yield server


def _obs(rows: int = 1, value: float = 0.0) -> dict[str, Array]:
    return {"state": np.full((rows, 1, 2), value, np.float32)}


def _raw(server: PolicyServer, **settings: Any) -> ClientConnection:
    connection = connect(server.address, proxy=None, **settings).__enter__()
    connection.recv(timeout=WAIT)  # the greeting
    return connection


def _eventually(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + WAIT
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)


# -- idle sessions ------------------------------------------------------------------------------


def test_idle_sessions_are_closed_and_their_places_are_free(policy: GatedPolicy) -> None:
    with PolicyServer(policy, port=0, max_sessions=2, idle_timeout=0.5) as server:
        idle = [_raw(server) for _ in range(2)]
        RemotePolicy(server.address, retries=200, backoff=0.05).close()  # finds a place
        for connection in idle:
            with pytest.raises(ConnectionClosed) as closed:
                connection.recv(timeout=WAIT)
            assert closed.value.rcvd is not None
            assert closed.value.rcvd.code == 3008
            reason = "no request for 0.5 s, the session is closed; connect again to go on"
            assert closed.value.rcvd.reason == reason


def test_a_client_that_waits_for_its_answer_is_not_idle(policy: GatedPolicy) -> None:
    with PolicyServer(policy, port=0, idle_timeout=2.0) as server:
        busy = _raw(server)
        policy.close_gate()
        busy.send(pack(_obs()))
        assert policy.entered.acquire(timeout=WAIT)
        idle = _raw(server)  # idle from later on than the other has waited
        with pytest.raises(ConnectionClosed):
            idle.recv(timeout=WAIT)
        policy.gate.set()
        assert unpack(busy.recv(timeout=WAIT))["plan"].shape == (1, 2, 2)
        busy.close()


def test_remote_policy_goes_on_after_an_idle_time(policy: GatedPolicy) -> None:
    """At once: also one that makes no second attempt."""
    with (
        PolicyServer(policy, port=0, idle_timeout=2.0) as server,
        RemotePolicy(server.address, retries=0) as remote,
    ):
        for value in (1.0, 2.0):
            assert (remote.infer(_obs(value=value)) == value).all()
            _eventually(lambda: server._admission.sessions == 0)


@pytest.mark.parametrize("limit", [None, 0])
def test_no_idle_limit(policy: GatedPolicy, limit: float | None) -> None:
    with PolicyServer(policy, port=0, idle_timeout=limit) as server:
        connection = _raw(server)
        with pytest.raises(TimeoutError):
            connection.recv(timeout=0.5)
        connection.close()


# -- large batches ------------------------------------------------------------------------------


def test_a_small_request_waits_for_one_call_beside_the_one_in_progress(policy: GatedPolicy) -> None:
    with (
        PolicyServer(policy, port=0, max_batch=MAX_ROWS) as server,
        ThreadPoolExecutor(10) as pool,
    ):
        clients = [RemotePolicy(server.address) for _ in range(10)]
        policy.close_gate()
        answers = []
        for number, client in enumerate(clients):  # the last one to ask is the small one
            rows = MAX_ROWS if number < 9 else 1
            answers.append(pool.submit(client.infer, _obs(rows, number)))
            _eventually(lambda n=number: len(server._batcher._queue) == n)
            if not number:
                assert policy.entered.acquire(timeout=WAIT)
        policy.gate.set()
        for number, answer in enumerate(answers):
            assert (answer.result(WAIT) == number).all()
        assert policy.calls.index([9.0]) <= 2
        assert sorted(policy.calls) == [[number] * MAX_ROWS for number in range(9)] + [[9.0]]
        for client in clients:
            client.close()


def test_small_requests_without_end_do_not_keep_a_large_one_waiting(policy: GatedPolicy) -> None:
    """Before each call ends, every client waits again: there are always small requests."""
    done = threading.Event()

    def flood(server: PolicyServer, rows: int) -> None:
        with RemotePolicy(server.address, timeout=WAIT) as client:
            while not done.is_set():
                client.infer(_obs(rows, value=rows))

    with (
        PolicyServer(policy, port=0, max_batch=MAX_ROWS) as server,
        ThreadPoolExecutor(6) as pool,
    ):
        policy.close_gate()
        policy.lets_one_through = True
        flooding = [pool.submit(flood, server, rows) for rows in (1, 1, 1, 1, 1, MAX_ROWS)]
        try:
            for _ in range(10):
                assert policy.entered.acquire(timeout=WAIT)
                batcher = server._batcher
                _eventually(lambda b=batcher: len(b._queue) + len(b._running) == 6)
                policy.gate.set()
        finally:
            policy.lets_one_through = False
            done.set()
            policy.gate.set()
        for each in flooding:
            each.result(WAIT)
    assert [MAX_ROWS] * MAX_ROWS in policy.calls[1:10]  # the first may have been alone


# -- guessed tokens -----------------------------------------------------------------------------


@pytest.fixture
def short_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(admission, "FIRST_PAUSE", 0.01)
    monkeypatch.setattr(admission, "MAX_PAUSE", 0.04)


@pytest.mark.usefixtures("short_pauses")
def test_wrong_tokens_are_counted_and_logged_without_the_token(
    guarded: PolicyServer, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO, "cmpolicy"):
        for _ in range(9):
            with pytest.raises(RemotePolicyError, match="refused the token"):
                RemotePolicy(guarded.address, token="gue55")
    told = [r.getMessage() for r in caplog.records if r.name == admission.__name__]
    assert [line.partition(";")[0] for line in told] == [
        f"127.0.0.1: no token or a wrong one, {count} in all" for count in (1, 2, 4, 8)
    ]
    assert told[0].endswith("its next one is looked at after 0 s")
    assert told[-1].endswith("its next one is looked at after 0.04 s")
    assert "gue55" not in caplog.text
    with RemotePolicy(guarded.address, token="s3cret") as remote:  # slowed, not locked out
        assert remote.infer(_obs()).shape == (1, 2, 2)


@pytest.fixture
def long_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    """From the second wrong token on, longer than a test."""
    monkeypatch.setattr(admission, "FREE_FAILURES", 1)
    monkeypatch.setattr(admission, "FIRST_PAUSE", 4 * WAIT)
    monkeypatch.setattr(admission, "MAX_PAUSE", 4 * WAIT)
    monkeypatch.setattr(server_module, "_OPEN_TIMEOUT", 8 * WAIT)


@pytest.mark.usefixtures("long_pauses")
def test_an_address_that_guesses_holds_nobody_else_up(guarded: PolicyServer) -> None:
    """Its guesses are still waiting when other addresses and open sessions have been served."""
    headers = {"Authorization": "Bearer s3cret"}
    before = _raw(guarded, source_address=("127.0.0.2", 0), additional_headers=headers)
    guarded._admission._failed.add("127.0.0.2")
    with ThreadPoolExecutor(8) as pool:

        def guess() -> None:
            with pytest.raises(InvalidStatus) as refused:
                _raw(guarded, source_address=("127.0.0.2", 0), open_timeout=WAIT)
            assert refused.value.response.status_code == 401

        guesses = [pool.submit(guess) for _ in range(8)]
        _eventually(lambda: guarded._admission._unopened["127.0.0.2"] == 8)
        with RemotePolicy(guarded.address, token="s3cret") as remote:
            assert remote.infer(_obs()).shape == (1, 2, 2)
        before.send(pack(_obs()))
        assert unpack(before.recv(timeout=WAIT))["plan"].shape == (1, 2, 2)
        assert guarded._admission._unopened["127.0.0.2"] == 8
        guarded.stop()  # which ends their pauses
        for each in guesses:
            each.result(WAIT)
    before.close()


@pytest.mark.usefixtures("long_pauses")
def test_a_guess_that_hangs_up_is_counted_and_a_stopping_server_waits_for_none(
    policy: GatedPolicy,
) -> None:
    request = (
        b"GET / HTTP/1.1\r\nHost: x\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
        b"Sec-WebSocket-Key: AAAAAAAAAAAAAAAAAAAAAA==\r\nSec-WebSocket-Version: 13\r\n\r\n"
    )
    server = PolicyServer(policy, port=0, token="s3cret").start()
    failed = server._admission._failed
    failed.add("127.0.0.1")
    with socket.create_connection(("127.0.0.1", server.port), timeout=WAIT) as sock:
        sock.sendall(request)
        _eventually(lambda: server._admission._unopened["127.0.0.1"] == 1)
    _eventually(lambda: failed._table["127.0.0.1"].count == 2)
    with socket.create_connection(("127.0.0.1", server.port), timeout=WAIT) as sock:
        sock.sendall(request)
        _eventually(lambda: server._admission._unopened["127.0.0.1"] == 1)
        server.stop()
    assert failed._table["127.0.0.1"].count == 3


def test_pauses_double_up_to_a_bound_and_the_table_is_bounded(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(admission, "MAX_ADDRESSES", 3)
    failed = FailedTokens()
    pauses = []
    for _ in range(12):
        pauses.append(failed.pause("192.0.2.1"))
        failed.add("192.0.2.1")
    assert pauses == [0, 0, 0, 0, 0, 0.25, 0.5, 1, 2, 3, 3, 3]
    for number in range(2, 5):
        assert failed.pause(f"192.0.2.{number}") == 0
        failed.add(f"192.0.2.{number}")
    assert len(failed) == 3
    assert failed.pause("192.0.2.1") == 0  # the one whose last failure is the oldest is forgotten
    monkeypatch.setattr(admission, "FREE_FAILURES", 1)
    assert failed.pause("192.0.2.4") == 0.25
    monkeypatch.setattr(admission, "FORGET_AFTER", -1.0)
    assert failed.pause("192.0.2.4") == 0


@pytest.mark.parametrize(
    ("peer", "address"),
    [
        (("192.0.2.1", 5000), "192.0.2.1"),
        (("::ffff:192.0.2.1", 5000, 0, 0), "192.0.2.1"),
        (("2001:db8::5", 5000, 0, 0), "2001:db8::/64"),
        (("fe80::1%eth0", 5000, 0, 2), "fe80::/64"),
        ("", ""),
        (None, ""),
    ],
)
def test_addresses(peer: object, address: str) -> None:
    assert address_of(peer) == address
