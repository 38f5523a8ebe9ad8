"""From a frame to the frame that answers it: what a policy server says, without any network."""

from __future__ import annotations

from typing import Any

from cmpolicy import __version__
from cmpolicy.serve.batcher import Answer, Batcher, InferenceError
from cmpolicy.serve.session import RequestError, Session
from cmpolicy.serve.wire import MAX_BYTES, WireError, pack, unpack
from cmpolicy.spec import PolicySpec

_MESSAGE_OVERHEAD = 65_536  # bytes for keys and fields


def message_bound(spec: PolicySpec, max_batch: int) -> int:
    """Bytes of the longest message that makes sense.

    As long as ``max_batch`` observations in float64 need, up to 16 MiB, but room for one at least.
    """
    row = 8 * (spec.n_obs_steps * spec.obs_dim + spec.horizon * spec.action_dim)
    fields = sum(len(key.encode()) for key in spec.obs) + _MESSAGE_OVERHEAD
    return max(row, min(max_batch * row, MAX_BYTES)) + fields


def metadata(
    spec: PolicySpec,
    name: str,
    *,
    control_hz: float | None,
    max_batch: int,
    max_message_bytes: int,
) -> bytes:
    """The frame that greets a client; ``control_hz`` is the rate of the actions, if known."""
    return pack(
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
            "control_hz": control_hz,
            "max_batch": max_batch,
            "max_message_bytes": max_message_bytes,
        }
    )


async def respond(
    data: str | bytes,
    session: Session,
    batcher: Batcher,
    *,
    max_bytes: int,
    previous_ms: float | None,
) -> str | bytes:
    """The answer to a frame: bytes, or text if something was wrong with it.

    Args:
        data: of the frame.
        session: of the connection; its history grows.
        batcher: makes the decision.
        max_bytes: longest frame.
        previous_ms: how long the message before took, its sending included.
    """
    try:
        if isinstance(data, str):
            raise RequestError("messages are binary frames of msgpack, got a text frame")
        request = session.read(unpack(data, max_bytes=max_bytes))
        if request is None:
            return pack({"server_timing": _timing(None, previous_ms)})
        answer = await batcher.infer(request)
    except (WireError, RequestError, InferenceError) as error:
        return str(error)
    plan = answer.plan if request.is_batch else answer.plan[0]
    reply: dict[str, Any] = {
        "actions": plan[..., : session.spec.n_action_steps, :],
        "plan": plan,
        "server_timing": _timing(answer, previous_ms),
    }
    return pack(reply)


def _timing(answer: Answer | None, previous_ms: float | None) -> dict[str, float]:
    """Numbers alone, no arrays: openpi's ActionChunkBroker slices every array of an answer."""
    timing: dict[str, float] = {}
    if answer is not None:
        timing["infer_ms"] = answer.infer_ms
        timing["queue_ms"] = answer.queue_ms
        timing["batch_rows"] = answer.batch_rows
    if previous_ms is not None:  # this message's own sending is not over
        timing["prev_total_ms"] = previous_ms
    return timing
