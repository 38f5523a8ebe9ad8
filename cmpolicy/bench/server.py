"""What the policy server costs on loopback, and whether it serves many clients alike."""

from __future__ import annotations

import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from cmpolicy.bench.report import Cell, Report
from cmpolicy.export.plan_map import example_inputs
from cmpolicy.policy.policy import ConsistencyPolicy
from cmpolicy.schema import at_least, positive
from cmpolicy.serve.client import RemotePolicy, RemotePolicyError
from cmpolicy.training.device import describe_device

_WARMUP = 50
_START_TIMEOUT = 120.0  # s: torch is loaded


@dataclass(frozen=True, kw_only=True)
class ServerSettings:
    """Of ``server``; policy and server run on one CPU thread each.

    Args:
        policy: bundle directory, bundled name or hub id.
        nfe: network evaluations per chunk; null: the policy's own.
        pairs: measured pairs of one call here and one round trip.
        clients: at once.
        seconds: that they ask for.
        seed: of observations and noise.
        out: JSON file.
    """

    policy: str
    nfe: int | None = None
    pairs: int = 2000
    clients: int = 16
    seconds: float = 10.0
    seed: int = 0
    out: str = "outputs/bench/server.json"

    def __post_init__(self) -> None:
        at_least("nfe", self.nfe, 1)
        for name in ("pairs", "clients"):
            at_least(name, getattr(self, name), 1)
        at_least("seed", self.seed, 0)
        positive("seconds", self.seconds)


class ServerFailedError(ConnectionError):
    """The server under test does not do what it is tested for."""


def measure_server(settings: ServerSettings) -> Report:
    """Round trips beside the policy's own time, and many clients at once.

    Raises:
        BundleError: the policy cannot be loaded.
        ServerFailedError: the server did not start, or did not serve.
    """
    policy = ConsistencyPolicy.from_pretrained(settings.policy)
    policy.nfe = settings.nfe or policy.nfe
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        where = describe_device(torch.device("cpu"))
        with serving(settings) as url:
            inputs, _ = example_inputs(policy, 1, settings.seed)
            obs = {k: v.numpy() for k, v in zip(policy.spec.obs, inputs, strict=True)}
            alone, remote, inside = _pairs(policy, url, obs, settings)
            clients = _crowd(url, obs, settings)
            with RemotePolicy(url) as last:  # still there, and still right
                noise = np.zeros((1, *policy.spec.noise_shape), np.float32)
                error = np.abs(last.infer(obs, noise) - policy.infer(obs, noise)).max()
    except RemotePolicyError as failure:
        raise ServerFailedError(str(failure)) from failure
    finally:
        torch.set_num_threads(before)
    added, beyond = remote - alone, remote - inside
    rows: list[tuple[Cell, ...]] = [
        _row("policy, here", alone),
        _row("round trip", remote),
        _row("added: round trip - policy here", added),
        _row("added: round trip - policy there", beyond),
        *(_row(f"client {i} of {len(clients)}", ms) for i, ms in enumerate(clients, 1)),
    ]
    served = [len(ms) for ms in clients]
    summary = {
        "policy_ms_p50": _p50(alone),
        "round_trip_ms_p50": _p50(remote),
        "round_trip_ms_p99": float(np.quantile(remote, 0.99)),
        "added_ms_p50": _p50(added),
        "added_to_servers_policy_ms_p50": _p50(beyond),
        "served_fewest": float(min(served)),
        "served_most": float(max(served)),
        "slowest_ms": float(max(ms.max() for ms in clients)),
        "error_after": float(error),
    }
    return Report(
        benchmark="server",
        title=f"policy server with {settings.policy} on loopback\n  on {where}",
        columns=("what", "calls", "p50 ms", "p99 ms", "max ms"),
        rows=tuple(rows),
        summary=summary,
        closing=(
            f"the round trip adds {summary['added_ms_p50']:.2f} ms (p50 of paired differences)",
            f"{len(clients)} clients in {settings.seconds:g} s: {min(served)} to {max(served)} "
            f"answers each, the slowest took {summary['slowest_ms']:.1f} ms",
        ),
        settings=asdict(settings),
        device=where,
    )


@contextmanager
def serving(settings: ServerSettings) -> Iterator[str]:
    """The url of a real ``cmpolicy serve`` in a process of its own, ended by SIGINT.

    Raises:
        ServerFailedError: it did not start, or did not end with status 0.
    """
    words = [f"policy={settings.policy}", "port=0", "threads=1", f"seed={settings.seed}"]
    if settings.nfe is not None:
        words.append(f"nfe={settings.nfe}")
    process = subprocess.Popen(
        [sys.executable, "-m", "cmpolicy", "serve", *words],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    watchdog = threading.Timer(_START_TIMEOUT, process.kill)
    watchdog.start()
    try:
        assert process.stdout is not None
        found = re.search(r"ws://\S+", process.stdout.readline())
        if found is None:
            raise ServerFailedError(
                "cmpolicy serve did not start; see what it says: cmpolicy serve " + " ".join(words)
            )
        watchdog.cancel()
        yield found[0]
        process.send_signal(signal.SIGINT)
        status = process.wait(timeout=30)
        if status != 0:
            raise ServerFailedError(f"cmpolicy serve ended with status {status}")
    finally:
        watchdog.cancel()
        process.kill()
        process.wait()
        if process.stdout is not None:
            process.stdout.close()


def _pairs(
    policy: ConsistencyPolicy,
    url: str,
    obs: dict[str, NDArray[np.float32]],
    settings: ServerSettings,
) -> tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.float64]]:
    """Milliseconds of the policy here, of the round trip, and of the policy call in the server."""
    rng = np.random.default_rng(settings.seed)
    alone, remote, inside = [], [], []
    with RemotePolicy(url) as client:
        for pair in range(-_WARMUP, settings.pairs):
            noise = rng.standard_normal((1, *policy.spec.noise_shape), dtype=np.float32)
            ms = {}
            both = (policy, client)
            for each in both if pair % 2 else both[::-1]:
                start = time.perf_counter()
                each.infer_plan(obs, noise)
                ms[each] = (time.perf_counter() - start) * 1e3
            if pair >= 0:
                alone.append(ms[policy])
                remote.append(ms[client])
                inside.append(client.server_timing["infer_ms"])
    return np.array(alone), np.array(remote), np.array(inside)


def _crowd(
    url: str, obs: dict[str, NDArray[np.float32]], settings: ServerSettings
) -> list[NDArray[np.float64]]:
    """Milliseconds of every answer, per client; all ask at once, each as fast as it can."""
    gate = threading.Barrier(settings.clients + 1)
    times: list[list[float]] = [[] for _ in range(settings.clients)]
    failures: list[RemotePolicyError] = []

    def ask(mine: list[float]) -> None:
        try:
            with RemotePolicy(url) as client:
                gate.wait()
                end = time.perf_counter() + settings.seconds
                while (start := time.perf_counter()) < end:
                    client.infer_plan(obs)
                    mine.append((time.perf_counter() - start) * 1e3)
        except RemotePolicyError as error:
            failures.append(error)
            gate.abort()
        except threading.BrokenBarrierError:
            pass  # another one failed, and says why

    threads = [threading.Thread(target=ask, args=(mine,)) for mine in times]
    for thread in threads:
        thread.start()
    with suppress(threading.BrokenBarrierError):
        gate.wait()
    for thread in threads:
        thread.join()
    if failures:
        raise ServerFailedError(f"a client was not served: {failures[0]}") from failures[0]
    return [np.array(mine) for mine in times]


def _row(what: str, ms: NDArray[np.float64]) -> tuple[Cell, ...]:
    return (what, len(ms), _p50(ms), float(np.quantile(ms, 0.99)), float(ms.max()))


def _p50(ms: NDArray[np.float64]) -> float:
    return float(np.median(ms))
