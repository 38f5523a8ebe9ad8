"""``cmpolicy serve``: a policy behind a WebSocket, for robots and openpi clients."""

from __future__ import annotations

import logging
import math
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from cmpolicy.cli.parse import describe, read
from cmpolicy.schema import ConfigError, at_least
from cmpolicy.spec import check_warm_start

if TYPE_CHECKING:
    from cmpolicy.robot.policy import ChunkPolicy
    from cmpolicy.serve.server import PolicyServer

_HEADER = """\
usage: cmpolicy serve policy=pusht [key=value ...]

Serve a policy over WebSocket in openpi's protocol, until Ctrl-C.

GET /healthz on the same port answers 200. An observation is a whole history per key, (To, ...), or
one step per key: with "step": 0, 1, ... the server keeps each connection's history, without it the
one step stands for all To."""
_TOKEN_VARIABLE = "CMPOLICY_TOKEN"
_LOOPBACK = ("127.0.0.1", "::1", "localhost")


@dataclass(frozen=True, kw_only=True)
class ServeSettings:
    """Of ``serve``.

    Args:
        policy: bundle directory, bundled name, hub id, or an .onnx file of `cmpolicy export`.
        port: 0 takes a free one.
        host: 0.0.0.0 lets other machines in; give a token then.
        token: that clients must send; better in the environment variable CMPOLICY_TOKEN, since a
            command line is visible to everyone on the machine.
        nfe: network evaluations per action chunk; null: the policy's own.
        warm_start: time in (0, 1] at which decisions of a session start from the plan before; null:
            the policy's own, if it has one.
        device: cpu or cuda (an exported file: cpu).
        threads: of the CPU, for one policy call.
        sessions: clients at once.
        idle_timeout: seconds after which a client that asks for nothing is disconnected; 0: never.
        batch: observations per policy call.
        max_message_mb: longest message of a client, in MiB; null: 16, or as much as `batch`
            observations need.
        seed: of the sessions' noise; null: another one each time.
    """

    policy: str
    port: int = 8000
    host: str = "127.0.0.1"
    token: str | None = None
    nfe: int | None = None
    warm_start: float | None = None
    device: str = "cpu"
    threads: int = 1
    sessions: int = 64
    idle_timeout: float | None = 300.0
    batch: int = 64
    max_message_mb: float | None = None
    seed: int | None = None

    def __post_init__(self) -> None:
        for name in ("nfe", "threads", "sessions", "batch"):
            at_least(name, getattr(self, name), 1)
        check_warm_start(self.warm_start)
        if self.idle_timeout is not None and not 0 <= self.idle_timeout < math.inf:
            raise ConfigError(
                f"idle_timeout={self.idle_timeout} must be a number of seconds, or 0 for no limit"
            )
        if self.max_message_mb is not None and not 0 < self.max_message_mb <= 1024:
            raise ConfigError(f"max_message_mb={self.max_message_mb} must lie in (0, 1024]")
        if not 0 <= self.port <= 65535:
            raise ConfigError(f"port={self.port} must lie between 0 and 65535")
        at_least("seed", self.seed, 0)


def help_text(words: Sequence[str]) -> str:
    """All settings."""
    return describe(ServeSettings, _HEADER)


def run(words: Sequence[str]) -> int:
    """Serve until a signal; the exit status."""
    logging.basicConfig(format="%(asctime)s %(message)s", level=logging.INFO)
    return _serve(read(ServeSettings, words))


def _serve(settings: ServeSettings) -> int:
    from cmpolicy.serve.server import PolicyServer

    token = _token(settings)
    if token is None and settings.host not in _LOOPBACK:
        print(
            f"cmpolicy serve: warning: anyone who can reach {settings.host} can use this server; "
            f"set {_TOKEN_VARIABLE}",
            file=sys.stderr,
        )
    policy, nfe = _load(settings)
    server = PolicyServer(
        policy,
        settings.host,
        settings.port,
        token=token,
        name=settings.policy,
        max_sessions=settings.sessions,
        idle_timeout=settings.idle_timeout,
        max_batch=settings.batch,
        max_message_bytes=(
            None if settings.max_message_mb is None else round(settings.max_message_mb * 2**20)
        ),
        seed=settings.seed,
    )
    server.run(lambda ready: _announce(ready, settings, nfe, needs_token=token is not None))
    print("cmpolicy serve: stopped", file=sys.stderr)
    return 0


def _token(settings: ServeSettings) -> str | None:
    if settings.token is not None:
        print(
            "cmpolicy serve: warning: a token on the command line is visible to everyone on this "
            f"machine; set {_TOKEN_VARIABLE} instead",
            file=sys.stderr,
        )
        return settings.token
    token = os.environ.get(_TOKEN_VARIABLE)
    if token == "":
        raise ConfigError(f"{_TOKEN_VARIABLE} is empty: give it a value, or unset it for no token")
    return token


def _load(settings: ServeSettings) -> tuple[ChunkPolicy, int]:
    """The policy and its network evaluations per chunk."""
    from cmpolicy.export.runtime import is_exported

    return _load_exported(settings) if is_exported(settings.policy) else _load_bundle(settings)


def _load_exported(settings: ServeSettings) -> tuple[ChunkPolicy, int]:
    from cmpolicy.export.runtime import open_exported

    if settings.device != "cpu":
        raise ConfigError(
            f"device={settings.device}: an exported file runs on the CPU; serve the bundle instead"
        )
    policy = open_exported(settings.policy, settings.threads)
    if settings.nfe not in (None, policy.nfe):
        raise ConfigError(
            f"nfe={settings.nfe}, but {settings.policy} was exported with nfe={policy.nfe}; "
            "leave nfe out, or export it again"
        )
    if settings.warm_start not in (None, policy.warm_start):
        raise ConfigError(
            f"warm_start={settings.warm_start}, but {settings.policy} was exported with "
            f"warm_start={policy.warm_start}; leave it out, or export it again"
        )
    return policy, policy.nfe


def _load_bundle(settings: ServeSettings) -> tuple[ChunkPolicy, int]:
    import torch

    from cmpolicy.policy.policy import ConsistencyPolicy
    from cmpolicy.training.device import choose_device

    torch.set_num_threads(settings.threads)
    device = choose_device(settings.device)
    policy = ConsistencyPolicy.from_pretrained(settings.policy, device)
    policy.nfe = settings.nfe or policy.nfe
    if settings.warm_start is not None:
        policy.warm_start = settings.warm_start
    return policy, policy.nfe


def _announce(
    server: PolicyServer, settings: ServeSettings, nfe: int, *, needs_token: bool
) -> None:
    """Where it listens, what it serves, and how to use it."""
    spec = server.spec
    shapes = ", ".join(
        f"{key!r}: {('B', spec.n_obs_steps, *shape)}".replace("'B'", "B")
        for key, shape in spec.obs.items()
    )
    token = ", token=..." if needs_token else ""
    print(
        f"serving {settings.policy} at {server.address} "
        f"({nfe} evaluation(s) per chunk, {settings.device}); Ctrl-C ends it\n"
        f'  from cmpolicy import RemotePolicy; policy = RemotePolicy("{server.address}"{token})\n'
        f"  actions = policy.infer({{{shapes}}})  "
        f"# (B, {spec.n_action_steps}, {spec.action_dim})",
        flush=True,
    )
