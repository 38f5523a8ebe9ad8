"""One policy for many clients: requests that wait at the same time share one policy call.

No request waits in order to be batched. While a call runs, requests queue; when it ends, the next
call takes as many of them as fit into a number of rows, in turn the oldest first and the smallest
first. Turns of the smallest keep a robot that asks for one row from waiting behind large batches:
it waits for the call in progress and at most one more, as long as the requests of its size fit into
one call. Turns of the oldest keep a large batch from waiting for ever behind small requests.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np

from cmpolicy.observation import NonFiniteActionError
from cmpolicy.robot.policy import Array, ChunkPolicy
from cmpolicy.robot.worker import ask
from cmpolicy.serve.requests import Answer, Request

_logger = logging.getLogger(__name__)


class InferenceError(RuntimeError):
    """The policy failed on a request that looked right; the text is for whoever sent it."""


class StoppedError(Exception):
    """The batcher was closed before the policy answered."""


@dataclass(frozen=True, eq=False)
class _Waiting:
    request: Request
    answer: asyncio.Future[Answer]
    since: float


class Batcher:
    """Runs the policy in a thread of its own, one call at a time. Belongs to one event loop.

    Args:
        policy: not used by anyone else meanwhile.
        max_rows: largest batch of one policy call; a single request may be as large.
    """

    def __init__(self, policy: ChunkPolicy, max_rows: int) -> None:
        self._policy = policy
        self._max_rows = max_rows
        self._queue: list[_Waiting] = []  # oldest first; a session has at most one
        self._is_turn_of_oldest = True
        self._running: list[_Waiting] = []
        self._loop = asyncio.get_running_loop()
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="cmpolicy-server-policy")

    async def infer(self, request: Request) -> Answer:
        """Wait for the decision.

        Raises:
            InferenceError: the policy raised, or gave something that is no finite plan.
            StoppedError: :meth:`close` was called meanwhile.
        """
        answer: asyncio.Future[Answer] = self._loop.create_future()
        self._queue.append(_Waiting(request, answer, time.perf_counter()))
        self._next_call()
        return await answer

    async def warm_up(self) -> None:
        """Let a policy that cannot work fail now, and the first client not wait.

        Raises:
            InferenceError: as :meth:`infer`, for observations of zeros.
        """
        spec = self._policy.spec
        obs = spec.zeros()
        noise = np.zeros((1, *spec.noise_shape), np.float32)
        for _ in range(3):
            await self.infer(Request(obs, noise, is_batch=False))

    def close(self) -> None:
        """Refuse what still waits; a running call ends in its thread, and nobody waits for it."""
        for waiting in (*self._running, *self._queue):
            if not waiting.answer.done():
                waiting.answer.set_exception(StoppedError())
        self._queue.clear()
        self._pool.shutdown(wait=False, cancel_futures=True)

    def _next_call(self) -> None:
        if self._running:
            return
        batch = self._take()
        if batch:
            self._running = batch
            call = self._pool.submit(self._call, batch)
            call.add_done_callback(lambda done: self._hand_over(batch, done))

    def _take(self) -> list[_Waiting]:
        """Take the requests of one call from the queue: the first in any case, then what fits."""
        queue = [waiting for waiting in self._queue if not waiting.answer.done()]
        by_size = sorted(queue, key=lambda waiting: waiting.request.rows)
        batch: list[_Waiting] = []
        rows = 0
        for waiting in queue if self._is_turn_of_oldest else by_size:
            if not batch or rows + waiting.request.rows <= self._max_rows:
                batch.append(waiting)
                rows += waiting.request.rows
        self._is_turn_of_oldest = not self._is_turn_of_oldest
        self._queue = [waiting for waiting in queue if waiting not in batch]
        return batch

    def _hand_over(
        self, batch: list[_Waiting], done: Future[list[Answer | InferenceError]]
    ) -> None:
        # in the worker thread; the loop is closed when the server did not wait for this call
        try:
            self._loop.call_soon_threadsafe(self._finish, batch, done)
        except RuntimeError:
            _logger.debug("a policy call ended after its server")

    def _finish(self, batch: list[_Waiting], done: Future[list[Answer | InferenceError]]) -> None:
        self._running = []
        if not done.cancelled():
            for waiting, answer in zip(batch, done.result(), strict=True):
                if waiting.answer.done():
                    continue
                if isinstance(answer, InferenceError):
                    waiting.answer.set_exception(answer)
                else:
                    waiting.answer.set_result(answer)
        self._next_call()

    # -- in the worker thread -------------------------------------------------------------------

    def _call(self, batch: Sequence[_Waiting]) -> list[Answer | InferenceError]:
        begin = time.perf_counter()
        try:
            plan = self._plan([waiting.request for waiting in batch])
        except Exception as error:
            if len(batch) > 1:  # one client's observation must not fail the others: halves find it
                half = len(batch) // 2
                return [*self._call(batch[:half]), *self._call(batch[half:])]
            if isinstance(error, NonFiniteActionError):
                error = InferenceError(str(error))
            if not isinstance(error, InferenceError):
                _logger.exception("the policy failed on an observation")
                error = InferenceError(
                    f"the policy failed on this observation ({type(error).__name__}); "
                    "the server's log has the details"
                )
            return [error]
        infer_ms = (time.perf_counter() - begin) * 1e3
        answers: list[Answer | InferenceError] = []
        start = 0
        for waiting in batch:
            end = start + waiting.request.rows
            own, start = plan[start:end], end
            if np.isfinite(own).all():
                queue_ms = (begin - waiting.since) * 1e3
                answers.append(Answer(own, infer_ms, queue_ms, len(plan)))
            else:
                answers.append(
                    InferenceError(
                        "the policy's actions for this observation are not finite; is it far "
                        "outside of what the policy was trained on?"
                    )
                )
        return answers

    def _plan(self, requests: Sequence[Request]) -> Array:
        """The plan of every row, (sum of B, P, A)."""
        if len(requests) == 1:
            obs, noise = requests[0].obs, requests[0].noise
        else:
            obs = {
                key: np.concatenate([request.obs[key] for request in requests])
                for key in requests[0].obs
            }
            noise = np.concatenate([request.noise for request in requests])
        plan = ask(self._policy, obs, noise, _starts(requests))
        spec = self._policy.spec
        expected = (len(noise), spec.n_plan_steps, spec.action_dim)
        if plan.shape != expected or plan.dtype.kind != "f":
            raise InferenceError(
                f"the policy gave a plan of shape {plan.shape} and dtype {plan.dtype}, its "
                f"specification says {expected} (batch, n_plan_steps, action_dim)"
            )
        return plan


def _starts(requests: Sequence[Request]) -> Array | None:
    """What the rows start from, NaN where from noise; None where all do."""
    if all(request.plan is None for request in requests):
        return None
    plans = [
        np.full_like(request.noise, np.nan) if request.plan is None else request.plan
        for request in requests
    ]
    return plans[0] if len(plans) == 1 else np.concatenate(plans)
