"""The policy server with real sockets: openpi's own client, many clients, bad input, limits."""

import http.client
import logging
import socket
import threading
import time
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import msgpack
import numpy as np
import pytest
import torch
from websockets.exceptions import ConnectionClosed, InvalidStatus
from websockets.sync.client import ClientConnection, connect

from cmpolicy import PolicyServer, RemotePolicy
from cmpolicy.nn.unet1d import UNet1DConfig
from cmpolicy.normalize import Normalizer
from cmpolicy.policy.policy import ConsistencyPolicy
from cmpolicy.robot.policy import Array, ChunkPolicy
from cmpolicy.serve import admission
from cmpolicy.serve import server as server_module
from cmpolicy.serve.server import ServerError
from cmpolicy.serve.wire import pack, unpack
from cmpolicy.spec import PolicySpec

SHAPES = {"agent_pos": (2,), "keypoint": (9, 2)}
T, A, TO, TA = 16, 2, 2, 8
P = T - TO + 1
WAIT = 30.0  # s: longer than anything takes, so that a hang fails instead of hanging


@pytest.fixture(scope="module")
def policy() -> ConsistencyPolicy:
    """A small untrained Push-T policy."""
    torch.manual_seed(0)
    rng = np.random.default_rng(0)
    arrays = {key: rng.uniform(0, 512, (64, *shape)) for key, shape in SHAPES.items()}
    normalizer = Normalizer.fit({**arrays, "action": rng.uniform(0, 512, (64, A))})
    spec = PolicySpec(SHAPES, action_dim=A, horizon=T, n_obs_steps=TO, n_action_steps=TA)
    net = UNet1DConfig((8, 16), kernel_size=3, n_groups=4, time_dim=8)
    return ConsistencyPolicy(spec, net, normalizer).eval()


@pytest.fixture
def server(policy: ConsistencyPolicy) -> Iterator[PolicyServer]:
    with PolicyServer(policy, port=0, name="small", max_batch=16) as server:
        yield server


class GatedPolicy:
    """A policy whose calls wait for ``gate``, and that cannot stand an agent at -1."""

    def __init__(self, policy: ConsistencyPolicy) -> None:
        self._policy = policy
        self.gate = threading.Event()
        self.entered = threading.Semaphore(0)
        self.batches: list[int] = []
        self.gate.set()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._policy, name)

    def infer_plan(self, obs: Mapping[str, Array], noise: Array | None = None) -> Array:
        self.entered.release()
        assert self.gate.wait(WAIT)
        if (obs["agent_pos"] == -1).any():
            raise RuntimeError("secret internals")
        self.batches.append(len(obs["agent_pos"]))
        return self._policy.infer_plan(obs, noise)


@pytest.fixture
def gated(policy: ConsistencyPolicy) -> GatedPolicy:
    return GatedPolicy(policy)


def _close_gate(gated: GatedPolicy) -> None:
    """From now on calls wait; the warm-up's calls are forgotten."""
    while gated.entered.acquire(blocking=False):
        pass
    gated.batches.clear()
    gated.gate.clear()


def _entered(gated: GatedPolicy) -> None:
    assert gated.entered.acquire(timeout=WAIT)


def _step(rng: np.random.Generator) -> dict[str, Any]:
    return {key: rng.uniform(0, 512, shape).astype(np.float32) for key, shape in SHAPES.items()}


def _batch(rng: np.random.Generator, rows: int = 1) -> dict[str, Any]:
    return {
        key: rng.uniform(0, 512, (rows, TO, *shape)).astype(np.float32)
        for key, shape in SHAPES.items()
    }


def _noise(rng: np.random.Generator, rows: int = 1) -> Array:
    return rng.standard_normal((rows, T, A), dtype=np.float32)


def _raw(server: PolicyServer, **kwargs: Any) -> ClientConnection:
    return connect(server.address, proxy=None, **kwargs).__enter__()


def _ask(connection: ClientConnection, message: Any) -> Any:
    connection.send(pack(message) if not isinstance(message, bytes | str) else message)
    reply = connection.recv(timeout=WAIT)
    return reply if isinstance(reply, str) else unpack(reply)


def _eventually(condition: Any) -> None:
    end = time.monotonic() + WAIT
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)


# -- openpi's client ----------------------------------------------------------------------------


@pytest.fixture
def openpi(server: PolicyServer) -> Iterator[Any]:
    """The unmodified client of PyPI's openpi-client."""
    module = pytest.importorskip("openpi_client.websocket_client_policy")
    client = module.WebsocketClientPolicy(host="127.0.0.1", port=server.port)
    yield client
    client._ws.close()


def test_openpi_client_gets_metadata_first(openpi: Any, policy: ConsistencyPolicy) -> None:
    metadata = openpi.get_server_metadata()
    assert PolicySpec.from_dict(metadata["spec"]) == policy.spec
    assert metadata["policy"] == "small"
    expected = {"n_obs_steps": TO, "n_action_steps": TA, "n_plan_steps": P, "horizon": T}
    assert expected.items() <= metadata.items()


def test_openpi_client_steps_through_an_episode(openpi: Any, policy: ConsistencyPolicy) -> None:
    """One observation a step; the server's history and noise, written out here, give the same."""
    rng, noise = np.random.default_rng(1), np.random.default_rng(5)
    openpi.infer({"seed": 5})
    for _ in range(2):  # a second episode begins with step 0
        steps: list[dict[str, Any]] = []
        for number in range(3):
            steps.append(_step(rng))
            reply = openpi.infer(steps[-1] | {"step": number})
            window = [steps[max(len(steps) - 2, 0)], steps[-1]]
            history = {key: np.stack([step[key] for step in window])[None] for key in SHAPES}
            z = noise.standard_normal((1, T, A), dtype=np.float32)
            plan = policy.infer_plan(history, z)[0]
            assert np.array_equal(reply["plan"], plan)
            assert np.array_equal(reply["actions"], plan[:TA])


def test_openpi_timing(openpi: Any) -> None:
    obs = _step(np.random.default_rng(0))
    first, second = openpi.infer(obs)["server_timing"], openpi.infer(obs)["server_timing"]
    assert "prev_total_ms" not in first
    assert second["prev_total_ms"] > first["infer_ms"] > 0
    assert first["queue_ms"] >= 0
    assert first["batch_rows"] == 1


@pytest.mark.parametrize("form", ["one step", "whole history"])
def test_openpi_action_chunk_broker(openpi: Any, policy: ConsistencyPolicy, form: str) -> None:
    """It asks once per chunk, so an observation alone stands for the whole history."""
    module = pytest.importorskip("openpi_client.action_chunk_broker")
    broker = module.ActionChunkBroker(openpi, action_horizon=TA)
    rng = np.random.default_rng(0)
    for k in range(2 * TA):
        if k % TA == 0:  # the broker asks now
            step, history, noise = _step(rng), _batch(rng), _noise(rng)
            if form == "one step":
                history = {key: np.stack([value, value])[None] for key, value in step.items()}
            chunk = policy.infer(history, noise)[0]
        obs = step if form == "one step" else {key: value[0] for key, value in history.items()}
        action = broker.infer(obs | {"noise": noise[0]})["actions"]
        assert np.array_equal(action, chunk[k % TA])


def test_openpi_client_is_told_what_is_wrong(openpi: Any) -> None:
    obs = _step(np.random.default_rng(0))
    right = openpi.infer(obs | {"seed": 1})["actions"]
    wrong: list[tuple[dict[str, Any], str]] = [
        ({}, "lacks the keys"),
        (obs | {"agent_pos": np.zeros(3)}, r"shape \(3,\), expected \(2,\)"),
        (obs | {"agent_pos": np.array([np.nan, 1])}, "'agent_pos' holds 1 NaN"),
        (obs | {"agent_pos": np.array(["a", "b"])}, "dtype <U1"),
        (obs | {"agent_pos": [[[[[[[[[1]]]]]]]]]}, "nested deeper"),
        (obs | {"agent_pos": list(range(300))}, "max_array_len"),
    ]
    for message, expected in wrong:
        with pytest.raises(RuntimeError, match=expected) as failure:
            openpi.infer(message)
        assert "Traceback" not in str(failure.value)
    assert np.array_equal(openpi.infer(obs | {"reset": True, "seed": 1})["actions"], right)


def test_openpi_client_may_send_prompt_and_images(
    openpi: Any, caplog: pytest.LogCaptureFixture
) -> None:
    """As openpi's own examples do: what the policy does not use is ignored, and logged once."""
    obs = _step(np.random.default_rng(0))
    right = openpi.infer(obs | {"seed": 1})["actions"]
    extra = {"prompt": "push", "observation/image": np.zeros((224, 224, 3), np.uint8)}
    with caplog.at_level(logging.INFO, logger="cmpolicy.serve.requests"):
        for _ in range(3):
            assert np.array_equal(openpi.infer(obs | extra | {"seed": 1})["actions"], right)
    assert [record.message.count("observation/image") for record in caplog.records] == [1]
    as_lists = {key: value.tolist() for key, value in obs.items()}
    assert np.array_equal(openpi.infer(as_lists | {"seed": 1})["actions"], right)


def test_openpi_client_with_a_token(policy: ConsistencyPolicy) -> None:
    module = pytest.importorskip("openpi_client.websocket_client_policy")
    with PolicyServer(policy, port=0, token="s3cret") as server:
        client = module.WebsocketClientPolicy("127.0.0.1", server.port, api_key="s3cret")
        assert client.infer(_step(np.random.default_rng(0)))["actions"].shape == (TA, A)
        client._ws.close()


# -- answers ------------------------------------------------------------------------------------


def test_remote_policy_is_the_policy(server: PolicyServer, policy: ConsistencyPolicy) -> None:
    with RemotePolicy(server.address) as remote:
        assert isinstance(remote, ChunkPolicy)
        assert remote.spec == policy.spec
        assert (remote.n_obs_steps, remote.n_action_steps) == (TO, TA)
        assert remote.spec.noise_shape == policy.spec.noise_shape
        for rows in (1, 5, 16, 37):  # 37 is more than the server takes in one message
            rng = np.random.default_rng(rows)
            obs, noise = _batch(rng, rows), _noise(rng, rows)
            plan = remote.infer_plan(obs, noise)
            assert plan.shape == (rows, P, A)
            np.testing.assert_allclose(plan, policy.infer_plan(obs, noise), atol=1e-3)
            assert np.array_equal(remote.infer(obs, noise), plan[:, :TA])
            assert plan.flags.writeable
        drawn = remote.infer(obs), remote.infer(obs)
        assert not np.array_equal(*drawn)  # noise of its own
        assert remote.server_timing["infer_ms"] > 0


def test_remote_policy_refuses_what_the_policy_would(server: PolicyServer) -> None:
    obs = _batch(np.random.default_rng(0))
    with RemotePolicy(server.address) as remote:
        with pytest.raises(ValueError, match="missing"):
            remote.infer({})
        with pytest.raises(ValueError, match="'agent_pos' holds 4 NaN"):
            remote.infer(obs | {"agent_pos": np.full((1, TO, 2), np.nan)})
        with pytest.raises(ValueError, match=r"noise has shape \(1, 3\)"):
            remote.infer(obs, np.zeros((1, 3)))
        assert remote.infer(obs).shape == (1, TA, A)


def test_what_waits_together_is_one_call_with_the_same_answers(
    gated: GatedPolicy, policy: ConsistencyPolicy
) -> None:
    """Four rows at most: of six clients behind a busy policy the first four share a call."""
    with PolicyServer(gated, port=0, max_batch=4) as server, ThreadPoolExecutor(8) as pool:
        clients = [RemotePolicy(server.address) for _ in range(7)]
        rngs = [np.random.default_rng(i) for i in range(7)]
        asked = [(_batch(rng), _noise(rng)) for rng in rngs]
        _close_gate(gated)
        calls = [pool.submit(clients[0].infer_plan, *asked[0])]
        _entered(gated)
        for i in range(1, 7):
            calls.append(pool.submit(clients[i].infer_plan, *asked[i]))
            _eventually(lambda i=i: len(server._batcher._queue) == i)
        gated.gate.set()
        for (obs, noise), call in zip(asked, calls, strict=True):
            expected = policy.infer_plan(obs, noise)
            np.testing.assert_allclose(call.result(WAIT), expected, atol=1e-3)
        assert gated.batches == [1, 4, 2]
        for client in clients:
            client.close()


def test_one_client_s_failure_is_not_the_others(
    gated: GatedPolicy, policy: ConsistencyPolicy, caplog: pytest.LogCaptureFixture
) -> None:
    rng = np.random.default_rng(0)
    fine, bad = _step(rng), _step(rng) | {"agent_pos": np.full(2, -1.0)}
    with PolicyServer(gated, port=0) as server:
        first, second, third = _raw(server), _raw(server), _raw(server)
        for connection in (first, second, third):
            connection.recv(timeout=WAIT)
        _close_gate(gated)
        first.send(pack(fine))
        _entered(gated)
        second.send(pack(bad))
        third.send(pack(fine))
        _eventually(lambda: len(server._batcher._queue) == 2)
        gated.gate.set()
        assert unpack(first.recv(timeout=WAIT))["actions"].shape == (TA, A)
        refused = second.recv(timeout=WAIT)
        assert isinstance(refused, str)
        assert "the policy failed on this observation (RuntimeError)" in refused
        assert "secret internals" not in refused
        assert unpack(third.recv(timeout=WAIT))["actions"].shape == (TA, A)
        assert _ask(second, fine)["actions"].shape == (TA, A)  # the connection goes on
        for connection in (first, second, third):
            connection.close()
    assert "secret internals" in caplog.text  # whoever runs the server sees it


def test_who_made_a_shared_call_fail_is_found_in_few_calls(gated: GatedPolicy) -> None:
    rng = np.random.default_rng(0)
    with PolicyServer(gated, port=0) as server:
        clients = [_raw(server) for _ in range(17)]
        for connection in clients:
            connection.recv(timeout=WAIT)
        _close_gate(gated)
        clients[0].send(pack(_step(rng)))
        _entered(gated)
        for number, connection in enumerate(clients[1:]):
            bad = {"agent_pos": np.full(2, -1.0)} if number == 5 else {}
            connection.send(pack(_step(rng) | bad))
        _eventually(lambda: len(server._batcher._queue) == 16)
        gated.gate.set()
        for number, connection in enumerate(clients):
            assert isinstance(connection.recv(timeout=WAIT), str) == (number == 6)
            connection.close()
    # of sixteen, one bad: the good halves of each cut, 8, 4, 2 and 1 rows, in the order of clients
    assert sorted(gated.batches[1:]) == [1, 2, 4, 8]


def test_a_client_that_leaves_while_it_waits(gated: GatedPolicy) -> None:
    obs = _step(np.random.default_rng(0))
    with PolicyServer(gated, port=0) as server:
        leaver, stayer = _raw(server), _raw(server)
        for connection in (leaver, stayer):
            connection.recv(timeout=WAIT)
        _close_gate(gated)
        leaver.send(pack(obs))
        _entered(gated)
        stayer.send(pack(obs))
        leaver.socket.shutdown(socket.SHUT_RDWR)
        _eventually(lambda: server._admission.connections == 1)
        gated.gate.set()
        assert unpack(stayer.recv(timeout=WAIT))["actions"].shape == (TA, A)
        _eventually(lambda: server._admission.sessions == 1)
        assert _ask(stayer, obs)["actions"].shape == (TA, A)
        stayer.close()
        leaver.close()


def test_a_plan_that_is_not_finite_is_not_sent(policy: ConsistencyPolicy) -> None:
    with PolicyServer(policy, port=0) as server:
        connection = _raw(server)
        connection.recv(timeout=WAIT)
        obs = _step(np.random.default_rng(0)) | {"agent_pos": np.full(2, 3e38, np.float32)}
        reply = _ask(connection, obs)
        assert isinstance(reply, str)
        assert "are not finite" in reply
        connection.close()


def test_many_clients_are_all_served(server: PolicyServer, policy: ConsistencyPolicy) -> None:
    def ask(seed: int) -> None:
        rng = np.random.default_rng(seed)
        with RemotePolicy(server.address) as remote:
            for _ in range(10):
                obs, noise = _batch(rng), _noise(rng)
                expected = policy.infer_plan(obs, noise)
                np.testing.assert_allclose(remote.infer_plan(obs, noise), expected, atol=1e-3)

    with ThreadPoolExecutor(16) as pool:
        for done in [pool.submit(ask, seed) for seed in range(16)]:
            done.result(WAIT)


# -- limits and bad input -----------------------------------------------------------------------


def test_healthz_and_plain_http(policy: ConsistencyPolicy) -> None:
    with PolicyServer(policy, port=0, token="s3cret") as server:
        for path, status in (("/healthz", 200), ("/", 401)):
            plain = http.client.HTTPConnection("127.0.0.1", server.port, timeout=WAIT)
            plain.request("GET", path)
            assert plain.getresponse().status == status
            plain.close()


@pytest.mark.parametrize(
    "headers",
    [
        [],
        [("Authorization", "Bearer wrong")],
        [("Authorization", "Basic s3cret")],
        [("Authorization", "s3cret")],
        [("Authorization", "Bearer")],
        [("Authorization", "Bearer s3cret x")],
        [("Authorization", "Bearer s3cret"), ("Authorization", "Bearer s3cret")],
        [("Authorization", "Bearer s3cre\u00ff")],
    ],
)
def test_wrong_tokens(policy: ConsistencyPolicy, headers: list[tuple[str, str]]) -> None:
    with PolicyServer(policy, port=0, token="s3cret") as server:
        with pytest.raises(InvalidStatus) as refused:
            _raw(server, additional_headers=headers)
        assert refused.value.response.status_code == 401
        right = _raw(server, additional_headers=[("authorization", "bEARER  s3cret")])
        assert unpack(right.recv(timeout=WAIT))["server"] == "cmpolicy"
        right.close()


def test_browsers_are_refused(server: PolicyServer) -> None:
    with pytest.raises(InvalidStatus) as refused:
        _raw(server, origin="http://evil.example")
    assert refused.value.response.status_code == 403


def test_frames_that_are_no_requests(server: PolicyServer) -> None:
    connection = _raw(server)
    connection.recv(timeout=WAIT)
    obs = _step(np.random.default_rng(0))
    for frame, expected in (
        ("hello", "got a text frame"),
        (b"", "not valid msgpack"),
        (pack(obs)[:-3], "not valid msgpack"),
        (pack([1]), "a message is a map"),
        (msgpack.packb({b"__ndarray__": True, b"data": b"", b"dtype": "O", b"shape": []}), "dtype"),
    ):
        reply = _ask(connection, frame)
        assert isinstance(reply, str)
        assert expected in reply
    assert _ask(connection, obs)["actions"].shape == (TA, A)
    connection.close()


def test_a_message_too_long_is_refused_and_a_far_longer_one_closes_its_connection_alone(
    server: PolicyServer,
) -> None:
    other = RemotePolicy(server.address)
    bound = other.metadata["max_message_bytes"]
    connection = _raw(server)
    connection.recv(timeout=WAIT)
    assert f"at most {bound} are accepted" in _ask(connection, bytes(bound + 1))
    with pytest.raises(ConnectionClosed) as closed:
        _ask(connection, bytes(2 * bound + 1))
    assert closed.value.rcvd is not None
    assert closed.value.rcvd.code == 1009
    assert other.infer(_batch(np.random.default_rng(0))).shape == (1, TA, A)
    other.close()


def test_sessions_are_bounded(policy: ConsistencyPolicy) -> None:
    with PolicyServer(policy, port=0, max_sessions=2) as server:
        first, second = RemotePolicy(server.address), RemotePolicy(server.address)
        with pytest.raises(RuntimeError, match=r"it is busy .*no session left"):
            RemotePolicy(server.address, retries=1, backoff=0.01)
        with ThreadPoolExecutor(1) as pool:
            third = pool.submit(RemotePolicy, server.address, retries=200, backoff=0.05)
            first.close()
            third.result(WAIT).close()
        second.close()


def test_connections_without_a_handshake_are_bounded_and_end(
    policy: ConsistencyPolicy, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Clients that connect and send nothing, or a byte at a time, keep nobody out for long."""
    monkeypatch.setattr(server_module, "_OPEN_TIMEOUT", 0.5)
    monkeypatch.setattr(admission, "_UNOPENED", 4)
    with PolicyServer(policy, port=0, max_sessions=4) as server:
        served = RemotePolicy(server.address)
        address = ("127.0.0.1", server.port)
        silent = [socket.create_connection(address, timeout=WAIT) for _ in range(12)]
        silent[0].sendall(b"GET / HTTP/1.1\r\nHost:")
        _eventually(lambda: server._admission.connections <= 8)
        assert served.infer(_batch(np.random.default_rng(0))).shape == (1, TA, A)
        for sock in silent:  # all end: at once beyond the bound, by the timeout within it
            try:
                while sock.recv(1000):
                    pass
            except ConnectionResetError:
                pass
            sock.close()
        _eventually(lambda: server._admission.connections == 1)
        RemotePolicy(server.address).close()
        served.close()


# -- lifecycle ----------------------------------------------------------------------------------


def test_stopping_finishes_what_runs_and_closes_with_1001(gated: GatedPolicy) -> None:
    server = PolicyServer(gated, port=0).start()
    busy, idle = _raw(server), _raw(server)
    for connection in (busy, idle):
        connection.recv(timeout=WAIT)
    _close_gate(gated)
    busy.send(pack(_step(np.random.default_rng(0))))
    _entered(gated)
    stopper = threading.Thread(target=server.stop)
    stopper.start()
    _eventually(lambda: server._stop.is_set())
    with pytest.raises(InvalidStatus) as refused:
        _raw(server)
    assert refused.value.response.status_code == 503
    gated.gate.set()
    assert unpack(busy.recv(timeout=WAIT))["actions"].shape == (TA, A)
    for connection in (busy, idle):
        with pytest.raises(ConnectionClosed) as closed:
            connection.recv(timeout=WAIT)
        assert closed.value.rcvd is not None
        assert closed.value.rcvd.code == 1001
    stopper.join(WAIT)
    assert not stopper.is_alive()
    with pytest.raises(ConnectionRefusedError):
        _raw(server)


def test_stopping_does_not_wait_for_ever(gated: GatedPolicy) -> None:
    server = PolicyServer(gated, port=0, grace=0.1).start()
    connection = _raw(server)
    connection.recv(timeout=WAIT)
    _close_gate(gated)
    connection.send(pack(_step(np.random.default_rng(0))))
    _entered(gated)
    server.stop()
    gated.gate.set()
    with pytest.raises(ConnectionClosed) as closed:
        connection.recv(timeout=WAIT)
    assert closed.value.rcvd is not None
    assert closed.value.rcvd.code == 1001
    assert server._admission.sessions == 0


def test_start_again_and_errors_of_starting(policy: ConsistencyPolicy, gated: GatedPolicy) -> None:
    server = PolicyServer(policy, port=0)
    with server:
        with pytest.raises(ServerError, match="already started"):
            server.start()
        with pytest.raises(ServerError, match="in use; choose another port"):
            PolicyServer(policy, port=server.port).start()
        with pytest.raises(ServerError, match="cannot listen"):
            PolicyServer(policy, "no.such.host.invalid", port=0).start()
        RemotePolicy(server.address).close()
    server.stop()  # a second time does nothing
    with server:
        RemotePolicy(server.address).close()
    broken = ConsistencyPolicy(policy.spec, policy.net_config, policy.normalizer).eval()
    with torch.no_grad():
        for parameter in broken.parameters():
            parameter.fill_(float("nan"))
    with pytest.raises(ServerError, match=r"the policy cannot be served: .* not finite"):
        PolicyServer(broken, port=0).start()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"token": ""}, "token must be of visible ASCII"),
        ({"token": "a b"}, "token must be of visible ASCII"),
        ({"token": "a\nb"}, "token must be of visible ASCII"),
        ({"port": 65536}, "port must lie in"),
        ({"host": ""}, "host is empty; give 127"),
        ({"idle_timeout": -1}, "idle_timeout must be a number of seconds, or 0 or None"),
        ({"idle_timeout": float("nan")}, "idle_timeout must be a number of seconds, or 0 or None"),
        ({"max_sessions": 0}, "max_sessions=0 must be at least 1"),
        ({"max_batch": 0}, "max_batch=0 must be at least 1"),
        ({"max_message_bytes": 0}, "max_message_bytes=0 must be at least 1"),
    ],
)
def test_bad_settings(policy: ConsistencyPolicy, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        PolicyServer(policy, **settings)


def test_observation_keys_of_the_protocol_are_refused() -> None:
    spec = PolicySpec({"noise": (2,)}, action_dim=2, horizon=4, n_obs_steps=1, n_action_steps=4)
    net = UNet1DConfig((8, 16), kernel_size=3, n_groups=4, time_dim=8)
    arrays = {"noise": np.eye(2), "action": np.eye(2)}
    with pytest.raises(ValueError, match=r"'noise'.* are words of the protocol"):
        PolicyServer(ConsistencyPolicy(spec, net, Normalizer.fit(arrays)))


def test_one_line_per_connection_without_secrets(
    policy: ConsistencyPolicy, caplog: pytest.LogCaptureFixture
) -> None:
    with (
        caplog.at_level(logging.INFO, "cmpolicy"),
        PolicyServer(policy, port=0, token="s3cret") as server,
    ):
        with RemotePolicy(server.address, token="s3cret") as remote:
            for _ in range(3):
                remote.infer(_batch(np.random.default_rng(0)))
        with pytest.raises(RuntimeError, match="refused the token"):
            RemotePolicy(server.address, token="other")
        _eventually(lambda: server._admission.sessions == 0)
    lines = [r.getMessage() for r in caplog.records if r.name.startswith("cmpolicy")]
    assert sum("3 answered, 0 refused" in line for line in lines) == 1
    assert sum("127.0.0.1: no token or a wrong one, 1 in all" in line for line in lines) == 1
    assert len(lines) == 2
    assert "s3cret" not in caplog.text
