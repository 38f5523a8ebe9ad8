"""Proxies of the environment: for public hosts only, named, and left out when asked."""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterator

import pytest

from cmpolicy import RemotePolicy
from cmpolicy.serve.client import PolicyUnavailableError, _is_public


class Proxy:
    """Takes connections, notes what they ask for, and refuses."""

    def __init__(self) -> None:
        self.asked: list[str] = []
        self.socket = socket.create_server(("127.0.0.1", 0))
        self.port = self.socket.getsockname()[1]
        threading.Thread(target=self._run, daemon=True).start()

    def _run(self) -> None:
        while True:
            try:
                connection, _ = self.socket.accept()
            except OSError:
                return
            with connection:
                self.asked.append(connection.recv(4096).decode().splitlines()[0])
                connection.sendall(b"HTTP/1.1 403 Forbidden\r\nContent-Length: 0\r\n\r\n")


@pytest.fixture
def proxy(monkeypatch: pytest.MonkeyPatch) -> Iterator[Proxy]:
    running = Proxy()
    for name in ("http_proxy", "https_proxy", "all_proxy", "HTTPS_PROXY"):
        monkeypatch.setenv(name, f"http://user:secret@127.0.0.1:{running.port}")
    for name in ("no_proxy", "NO_PROXY"):
        monkeypatch.delenv(name, raising=False)
    yield running
    running.socket.close()


def attempt(url: str, **settings: bool) -> str:
    with pytest.raises((PolicyUnavailableError, RuntimeError, OSError)) as caught:
        RemotePolicy(url, timeout=1.0, retries=0, **settings)
    return str(caught.value)


def test_a_public_host_is_asked_for_through_the_proxy_which_is_named(proxy: Proxy) -> None:
    message = attempt("ws://policy.example.com:8000")
    assert proxy.asked == ["CONNECT policy.example.com:8000 HTTP/1.1"]
    assert f"through the proxy 127.0.0.1:{proxy.port} of the environment" in message
    assert "proxy=False" in message
    assert "secret" not in message


def test_without_the_proxy_when_asked(proxy: Proxy) -> None:
    message = attempt("ws://192.0.2.1:9", proxy=False)
    assert proxy.asked == []
    assert "proxy" not in message


def test_hosts_of_the_own_network_need_no_proxy(proxy: Proxy) -> None:
    with socket.create_server(("127.0.0.1", 0)) as closed:
        port = closed.getsockname()[1]
    for host in ("127.0.0.1", "localhost", "[::1]"):
        assert "proxy" not in attempt(f"ws://{host}:{port}")
    assert proxy.asked == []


@pytest.mark.parametrize(
    ("host", "public"),
    [
        ("127.0.0.1", False),
        ("10.1.2.3", False),
        ("192.168.0.7", False),
        ("[fe80::1]", False),
        ("robot", False),
        ("robot.local", False),
        ("gpu.lan", False),
        ("8.8.8.8", True),
        ("policy.example.com", True),
    ],
)
def test_which_hosts_are_public(host: str, public: bool) -> None:
    assert _is_public(f"ws://{host}:8000") is public
