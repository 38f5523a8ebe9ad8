"""RemotePolicy when things go wrong: restarts, refusals, silence, and servers that are none."""

import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from http.server import HTTPServer, SimpleHTTPRequestHandler
from typing import Any

import numpy as np
import pytest
import torch
from websockets.client import ClientProtocol
from websockets.http11 import Request
from websockets.server import ServerProtocol
from websockets.sync.server import ServerConnection, serve

from cmpolicy import PolicyServer, RemotePolicy
from cmpolicy.nn.unet1d import UNet1DConfig
from cmpolicy.normalize import Normalizer
from cmpolicy.policy.policy import ConsistencyPolicy
from cmpolicy.robot.episode import HELD, PLANNED, Tick
from cmpolicy.robot.loop import ControlLoop
from cmpolicy.robot.safety import SafetyLimits
from cmpolicy.serve.client import PolicyUnavailableError, RemotePolicyError
from cmpolicy.serve.wire import pack
from cmpolicy.spec import PolicySpec

SPEC = PolicySpec(
    {"state": (3,)}, action_dim=2, horizon=8, n_obs_steps=1, n_action_steps=4, action_rotations=()
)
OBS = {"state": np.ones((1, 1, 3), np.float32)}
NOISE = np.ones((1, 8, 2), np.float32)
WAIT = 30.0  # s
GREETING = {"spec": SPEC.to_dict(), "max_batch": 8, "max_message_bytes": 1000}


def _policy(spec: PolicySpec) -> ConsistencyPolicy:
    torch.manual_seed(0)
    rng = np.random.default_rng(0)
    arrays = {"state": rng.normal(size=(9, 3)), "action": rng.normal(size=(9, spec.action_dim))}
    net = UNet1DConfig((8, 16), kernel_size=3, n_groups=4, time_dim=8)
    return ConsistencyPolicy(spec, net, Normalizer.fit(arrays)).eval()


@pytest.fixture(scope="module")
def policy() -> ConsistencyPolicy:
    return _policy(SPEC)


@contextmanager
def _listening(handle: Callable[[socket.socket], None]) -> Iterator[str]:
    """A plain TCP server of one connection after the other."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        listener.settimeout(0.05)
        done = threading.Event()

        def accept() -> None:
            while not done.is_set():
                try:
                    connection, _ = listener.accept()
                except TimeoutError:
                    continue
                with connection:
                    handle(connection)

        thread = threading.Thread(target=accept)
        thread.start()
        try:
            yield f"ws://127.0.0.1:{listener.getsockname()[1]}"
        finally:
            done.set()
            thread.join()


@contextmanager
def _websocket(handler: Callable[[ServerConnection], None]) -> Iterator[str]:
    """A WebSocket server that is not ours."""
    with serve(handler, "127.0.0.1", 0) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"ws://127.0.0.1:{server.socket.getsockname()[1]}"
        server.shutdown()
        thread.join()


def _replying(reply: Any, connection: ServerConnection) -> None:
    connection.send(pack(GREETING))
    for _ in connection:
        connection.send(reply)


# -- lost and found -----------------------------------------------------------------------------


def test_reconnects_after_a_restart(policy: ConsistencyPolicy) -> None:
    first = PolicyServer(policy, port=0).start()
    with RemotePolicy(first.address) as remote:
        before = remote.infer_plan(OBS, NOISE)
        first.stop()
        with PolicyServer(policy, port=first.port):
            assert np.array_equal(remote.infer_plan(OBS, NOISE), before)


def test_waits_for_a_server_that_is_starting(policy: ConsistencyPolicy) -> None:
    server = PolicyServer(policy, port=0).start()
    remote = RemotePolicy(server.address, retries=200, backoff=0.02, max_backoff=0.05)
    server.stop()
    answers: list[Any] = []
    asking = threading.Thread(target=lambda: answers.append(remote.infer(OBS, NOISE)))
    asking.start()
    time.sleep(0.2)
    assert not answers
    with server:
        asking.join(WAIT)
        assert answers[0].shape == (1, 4, 2)
        remote.close()


def test_a_server_that_is_gone_is_an_error_in_bounded_time(policy: ConsistencyPolicy) -> None:
    server = PolicyServer(policy, port=0).start()
    remote = RemotePolicy(server.address, retries=3, backoff=0.01)
    server.stop()
    with pytest.raises(PolicyUnavailableError, match=r"no policy server at ws://.*: 4 attempts in"):
        remote.infer(OBS)
    with server:  # and when it is back, the same object goes on
        assert remote.infer(OBS).shape == (1, 4, 2)
        remote.close()


def test_nobody_there() -> None:
    with socket.create_server(("127.0.0.1", 0)) as unused:
        port = unused.getsockname()[1]
    with pytest.raises(PolicyUnavailableError, match=r"2 attempts in .*refused"):
        RemotePolicy(f"ws://127.0.0.1:{port}", retries=1, backoff=0.01)


def test_another_policy_after_a_restart(policy: ConsistencyPolicy) -> None:
    first = PolicyServer(policy, port=0).start()
    remote = RemotePolicy(first.address)
    first.stop()
    with PolicyServer(_policy(replace(SPEC, n_action_steps=2)), port=first.port):
        for _ in range(2):  # it stays refused
            with pytest.raises(RemotePolicyError, match=r"another policy .n_action_steps 4 -> 2"):
                remote.infer(OBS)
    remote.close()


@pytest.mark.parametrize("there", ["before", "after"])
def test_another_policy_in_what_only_one_of_them_says(
    policy: ConsistencyPolicy, there: str
) -> None:
    """A specification leaves out what is at its default."""
    other = _policy(replace(SPEC, action_rotations=None))
    served = [policy, other] if there == "after" else [other, policy]
    first = PolicyServer(served[0], port=0).start()
    remote = RemotePolicy(first.address)
    first.stop()
    words = r"\[\] -> None" if there == "after" else r"None -> \[\]"
    refused = pytest.raises(RemotePolicyError, match=f"another policy .action_rotations {words}")
    with PolicyServer(served[1], port=first.port), refused:
        remote.infer(OBS)
    remote.close()


def test_no_answer_in_time_and_no_late_one_either() -> None:
    """A late answer must not be taken for that of the next request."""
    asked = []
    given_up = threading.Event()

    def handle(connection: ServerConnection) -> None:
        connection.send(pack(GREETING))
        for _ in connection:
            asked.append(len(asked))
            plan = np.full((1, 8, 2), float(len(asked)))
            if len(asked) == 1:
                given_up.wait(WAIT)
            connection.send(pack({"plan": plan}))

    with _websocket(handle) as url, RemotePolicy(url, timeout=1) as remote:
        with pytest.raises(PolicyUnavailableError, match="no answer within 1 s"):
            remote.infer(OBS)
        given_up.set()
        assert remote.infer_plan(OBS)[0, 0, 0] == 2
    assert len(asked) == 2  # nor is a request that took too long sent again


@pytest.mark.skipif(not hasattr(socket, "TCP_USER_TIMEOUT"), reason="of Linux")
def test_a_server_that_stops_reading_is_an_error_in_bounded_time() -> None:
    """As one that is stopped, or behind a lost network: more is sent than sockets hold."""
    spec = PolicySpec({"top": (1000, 1000, 3)}, 2, 8, 1, 4, images=("top",))
    done = threading.Event()

    def handle(connection: socket.socket) -> None:
        protocol = ServerProtocol()
        protocol.receive_data(connection.recv(65_536))
        (request,) = protocol.events_received()
        assert isinstance(request, Request)
        protocol.send_response(protocol.accept(request))
        protocol.send_binary(pack(GREETING | {"spec": spec.to_dict()}))
        connection.sendall(b"".join(protocol.data_to_send()))
        done.wait(WAIT)

    with _listening(handle) as url:
        remote = RemotePolicy(url, timeout=2, retries=0)
        errors: list[Exception] = []

        def ask() -> None:
            try:
                remote.infer({"top": np.zeros((8, 1, 1000, 1000, 3), np.uint8)})
            except PolicyUnavailableError as error:
                errors.append(error)

        asking = threading.Thread(target=ask, daemon=True)
        asking.start()
        asking.join(WAIT / 2)
        done.set()
        assert not asking.is_alive()
        assert "connection was lost" in str(errors[0])
        remote.close()


def test_closing_ends_a_call_that_waits() -> None:
    waiting = threading.Event()

    def handle(connection: ServerConnection) -> None:
        connection.send(pack(GREETING))
        for _ in connection:
            waiting.set()

    with _websocket(handle) as url:
        remote = RemotePolicy(url, timeout=WAIT)
        errors: list[Exception] = []

        def ask() -> None:
            try:
                remote.infer(OBS)
            except RemotePolicyError as error:
                errors.append(error)

        asking = threading.Thread(target=ask)
        asking.start()
        assert waiting.wait(WAIT)
        remote.close()
        asking.join(WAIT)
        assert "is closed" in str(errors[0])
        with pytest.raises(RemotePolicyError, match="is closed"):
            remote.infer(OBS)


def test_threads_take_turns(policy: ConsistencyPolicy) -> None:
    with PolicyServer(policy, port=0) as server, RemotePolicy(server.address) as remote:
        errors: list[float] = []

        def check(seed: int) -> None:
            rng = np.random.default_rng(seed)
            for _ in range(10):
                obs = {"state": rng.normal(size=(1, 1, 3)).astype(np.float32)}
                got = remote.infer_plan(obs, NOISE)
                errors.append(float(np.abs(got - policy.infer_plan(obs, NOISE)).max()))

        threads = [threading.Thread(target=check, args=(seed,)) for seed in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(WAIT)
        assert len(errors) == 40
        assert max(errors) < 1e-4


class _Robot:
    """Remembers what happens to it."""

    def __init__(self) -> None:
        self.log: list[str] = []

    def connect(self) -> None:
        self.log.append("connect")

    def get_observation(self) -> dict[str, Any]:
        return {"state": np.ones(3)}

    def send_action(self, action: Any) -> None:
        assert np.isfinite(action).all()

    def stop(self) -> None:
        self.log.append("stop")

    def disconnect(self) -> None:
        self.log.append("disconnect")


@pytest.mark.parametrize("is_back", [True, False])
def test_a_server_gone_in_mid_episode(policy: ConsistencyPolicy, is_back: bool) -> None:
    """The loop holds the robot and asks again: the episode goes on, or ends with it at rest."""
    server, robot = PolicyServer(policy, port=0).start(), _Robot()
    # after so many ticks of a kind, more than one plan has: a busy machine may skip some
    changes = [(PLANNED, 10, server.stop)]
    if is_back:
        changes += [(HELD, 5, server.start), (PLANNED, 20, lambda: loop.stop("it went on"))]
    sources: list[str] = []  # since the last change

    def on_tick(tick: Tick) -> None:
        sources.append(tick.source)
        if changes and sources.count(changes[0][0]) >= changes[0][1]:
            sources.clear()
            changes.pop(0)[2]()

    remote = RemotePolicy(server.address, retries=0)
    safety = SafetyLimits(max_misses=1000 if is_back else 25)
    with ControlLoop(remote, robot, 50, safety=safety, on_tick=on_tick) as loop:
        report = loop.run(seconds=60)
    assert report.interventions["policy unavailable"] > 0
    assert robot.log == ["connect", "stop", "disconnect"]
    if is_back:
        assert report.stopped_by == "it went on"
    else:
        assert "ticks in a row without a usable action" in report.stopped_by
    remote.close()
    server.stop()


# -- refused ------------------------------------------------------------------------------------


def test_a_refused_token_is_not_tried_again(policy: ConsistencyPolicy) -> None:
    with PolicyServer(policy, port=0, token="right") as server:
        for token in (None, "wrong"):
            with pytest.raises(RemotePolicyError, match=r"refused the token .HTTP 401"):
                RemotePolicy(server.address, token=token)
        RemotePolicy(server.address, token="right").close()
    attempts = []

    def refuse(connection: socket.socket) -> None:
        attempts.append(connection.recv(4096))
        connection.sendall(b"HTTP/1.1 401 Unauthorized\r\nContent-Length: 0\r\n\r\n")

    with _listening(refuse) as url, pytest.raises(RemotePolicyError, match="refused the token"):
        RemotePolicy(url, token="x", retries=3, backoff=0.01)
    assert len(attempts) == 1


def test_a_message_that_the_server_finds_too_long(policy: ConsistencyPolicy) -> None:
    with (
        PolicyServer(policy, port=0, max_message_bytes=400) as server,
        RemotePolicy(server.address) as remote,
    ):
        for n, words in ((9, "at most 400 are accepted"), (30, "as too long; it takes 400")):
            rows = {"state": np.ones((n, 1, 3), np.float32)}
            with pytest.raises(RemotePolicyError, match=words):
                remote.infer(rows, np.ones((n, 8, 2), np.float32))
        assert remote.infer(OBS).shape == (1, 4, 2)


def test_what_the_server_refuses_comes_with_its_words() -> None:
    with _websocket(partial(_replying, "out of paint")) as url, RemotePolicy(url) as remote:
        for _ in range(2):
            with pytest.raises(RemotePolicyError, match="refused: out of paint"):
                remote.infer(OBS)


@pytest.mark.parametrize(
    ("reply", "message"),
    [
        (b"\xc1", "not valid msgpack"),
        (pack([1]), "holds a plan of NoneType"),
        (pack({"plan": [1.0]}), "holds a plan of list"),
        (pack({"plan": np.zeros((1, 7, 2))}), r"shape \(1, 7, 2\), expected shape \(1, 8, 2\)"),
        (pack({"plan": np.zeros((1, 8, 2), np.int64)}), "holds a plan of"),
        (pack({"plan": np.full((1, 8, 2), np.nan)}), "not finite"),
    ],
)
def test_answers_that_are_no_plan(reply: bytes, message: str) -> None:
    with (
        _websocket(partial(_replying, reply)) as url,
        RemotePolicy(url) as remote,
        pytest.raises(RemotePolicyError, match=message),
    ):
        remote.infer(OBS)


# -- servers that are none ----------------------------------------------------------------------


@pytest.mark.parametrize(
    "greeting",
    [
        "hello",
        b"\xc1",
        pack([1]),
        pack({"action_horizon": 10}),  # openpi's own server
        pack({"spec": {"obs": {}}}),
        pack({"spec": SPEC.to_dict() | {"horizon": "long"}}),
        pack(GREETING | {"max_batch": 0}),
    ],
)
def test_another_websocket_server(greeting: str | bytes) -> None:
    with (
        _websocket(lambda connection: connection.send(greeting)) as url,
        pytest.raises(RemotePolicyError, match=r"is no policy server of cmpolicy's"),
    ):
        RemotePolicy(url, backoff=60)


@pytest.mark.parametrize(
    ("version", "message"), [("HTTP/1.1", "HTTP 404"), ("HTTP/1.0", "a valid HTTP response")]
)
def test_a_web_server(version: str, message: str) -> None:
    class Handler(SimpleHTTPRequestHandler):
        protocol_version = version

    with HTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        with pytest.raises(RemotePolicyError, match=f"is no policy server .*{message}"):
            RemotePolicy(f"ws://127.0.0.1:{server.server_port}/none", backoff=60)
        server.shutdown()
        thread.join()


@pytest.fixture(params=[0.0, 0.05])
def slow_to_ask(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """The client asks so long after it has connected; by then a server may have spoken, or left."""
    ask = ClientProtocol.connect

    def later(protocol: ClientProtocol) -> Request:
        time.sleep(request.param)
        return ask(protocol)

    monkeypatch.setattr(ClientProtocol, "connect", later)


@pytest.mark.usefixtures("slow_to_ask")
@pytest.mark.parametrize("stays", [0.0, 0.2])
def test_a_server_of_another_protocol(stays: float) -> None:
    def greet(connection: socket.socket) -> None:
        connection.sendall(b"SSH-2.0-OpenSSH_9.6\r\n")
        time.sleep(stays)

    with (
        _listening(greet) as url,
        pytest.raises(RemotePolicyError, match=r"is no policy server .* a valid HTTP response"),
    ):
        RemotePolicy(url, retries=0)


@pytest.mark.usefixtures("slow_to_ask")
def test_a_server_that_hangs_up_at_once_may_be_back() -> None:
    with (
        _listening(lambda connection: None) as url,
        pytest.raises(PolicyUnavailableError, match="2 attempts"),
    ):
        RemotePolicy(url, retries=1, backoff=0.001)


def test_a_server_that_says_nothing() -> None:
    with (
        _listening(lambda connection: time.sleep(0.5)) as url,
        pytest.raises(RemotePolicyError, match="2 attempts in"),
    ):
        RemotePolicy(url, timeout=0.1, retries=1, backoff=0.01)


@pytest.mark.parametrize("url", ["localhost:8000", "http://localhost:8000", "ws://", ""])
def test_no_address(url: str) -> None:
    with pytest.raises(ValueError, match=r"url must look like ws://host:8000"):
        RemotePolicy(url)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"timeout": 0}, "timeout=0 must be above 0"),
        ({"retries": -1}, "retries=-1 must be at least 0"),
        ({"backoff": -1}, "backoff=-1 must be at least 0"),
    ],
)
def test_bad_settings(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        RemotePolicy("ws://127.0.0.1:1", **settings)


def test_a_client_is_light() -> None:
    code = "import cmpolicy, sys; cmpolicy.RemotePolicy; print([*sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    heavy = ("torch", "hydra", "omegaconf", "zarr", "gymnasium", "onnxruntime", "matplotlib")
    assert [name for name in heavy if f"'{name}'" in done.stdout] == []


@pytest.mark.parametrize("module", ["websockets", "msgpack"])
def test_without_the_extra(module: str) -> None:
    """A fresh interpreter in which the library cannot be imported."""
    code = (
        f"import sys; sys.modules[{module!r}] = None\n"
        "import cmpolicy, cmpolicy.robot\n"
        "for name in ('PolicyServer', 'RemotePolicy'):\n"
        "    try: getattr(cmpolicy, name)\n"
        "    except ImportError as error: print(error)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.count("pip install 'cmpolicy[serve]'") == 2
    assert done.stdout.count(f"need {module}:") == 2
