"""Where a control loop runs its inferences: in the loop itself, or in a thread beside it."""

from __future__ import annotations

import logging
import queue
import sys
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol, cast

import numpy as np
from numpy.typing import NDArray

from cmpolicy.robot.metronome import clock
from cmpolicy.robot.policy import ChunkPolicy, warm_plan

Array = NDArray[Any]

_log = logging.getLogger(__name__)

UNAVAILABLE = (ConnectionError, TimeoutError)
"""What a policy raises that may be there again in a moment, such as a policy server that restarts;
a loop holds the robot and asks again. Any other error of a policy ends the run."""

_SWITCH_INTERVAL = 0.0002
"""Seconds that the inference thread may keep the interpreter once the loop is due; Python's own
5 ms are half a tick at 100 Hz."""


_SLICE = 0.02
"""Seconds between two looks whether there is a hurry."""


class NoiseSource:
    """Standard normal noise (1, T, A), one draw per plan; reproducible from ``seed``.

    The numbers are those of ``rollout`` for the same seed.
    """

    def __init__(self, shape: tuple[int, ...], seed: int | None) -> None:
        self._shape = shape
        self._noise = np.zeros((1, *shape), np.float32)
        self._seed = seed
        self.reset()

    def reset(self) -> None:
        """Start the stream again."""
        self._rng = np.random.default_rng(self._seed)

    def draw(self) -> Array:
        """(1, T, A); the next draw overwrites it."""
        self._rng.standard_normal(self._shape, dtype=np.float32, out=self._noise[0])
        return self._noise


@dataclass(frozen=True, slots=True)
class InferenceResult:
    """How an inference ended: with a plan (P, A), or with an error."""

    plan: Array | None
    error: BaseException | None
    seconds: float
    """From the call of the policy to its return."""
    finished: float
    """On the loop's clock."""


class Worker(Protocol):
    """Takes one observation history at a time, and has its plan some time later."""

    def start(self) -> None:
        """Get ready."""
        ...

    def submit(self, obs: Mapping[str, Array], running: tuple[Array, int] | None = None) -> None:
        """Begin an inference; the one before must have been polled.

        Args:
            obs: (1, To, ...) per key.
            running: the newest plan and its steps that are over (:func:`warm_plan`), if any.
        """
        ...

    def poll(self) -> InferenceResult | None:
        """The outcome, once; None while there is none."""
        ...

    def close(self, timeout: float, hurried: Callable[[], bool]) -> bool:
        """End; False if it is still busy after ``timeout`` seconds, or when it is ``hurried``."""
        ...


class InlineWorker:
    """Runs the policy within :meth:`submit`; the caller waits."""

    def __init__(self, policy: ChunkPolicy, noise: NoiseSource) -> None:
        self._policy = policy
        self._noise = noise
        self._outcome: InferenceResult | None = None

    def start(self) -> None:
        """Nothing is left of an earlier run."""
        self._outcome = None

    def submit(self, obs: Mapping[str, Array], running: tuple[Array, int] | None = None) -> None:
        start = warm_plan(self._policy, running)
        self._outcome = infer(self._policy, obs, self._noise.draw(), start)

    def poll(self) -> InferenceResult | None:
        outcome, self._outcome = self._outcome, None
        return outcome

    def close(self, timeout: float, hurried: Callable[[], bool]) -> bool:
        """Nothing to end."""
        return True


class ThreadedWorker:
    """Runs the policy in a thread. The networks' libraries release the interpreter lock meanwhile.

    The observations are copied into buffers of its own, which are free whenever nothing is under
    way, so the loop and the policy never share memory. The thread is a daemon: a policy that never
    returns cannot keep the program from ending.
    """

    def __init__(self, policy: ChunkPolicy, noise: NoiseSource) -> None:
        self._policy = policy
        self._noise = noise
        self._obs = policy.spec.zeros()
        self._start: Array | None = None
        self._busy = False
        self._requests: queue.SimpleQueue[bool] = queue.SimpleQueue()
        self._outcomes: queue.SimpleQueue[InferenceResult] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None
        self._straggler: threading.Thread | None = None
        self._switch_interval = sys.getswitchinterval()

    def start(self) -> None:
        """Start the thread.

        Raises:
            RuntimeError: the policy has still not returned from an earlier run.
        """
        if self._straggler is not None and self._straggler.is_alive():
            raise RuntimeError("the policy has not returned from its last inference; it hangs")
        self._busy = False
        self._switch_interval = sys.getswitchinterval()
        sys.setswitchinterval(min(_SWITCH_INTERVAL, self._switch_interval))
        # New queues: what an earlier thread left in the old ones is no answer to this run.
        self._requests, self._outcomes = queue.SimpleQueue(), queue.SimpleQueue()
        self._thread = threading.Thread(
            target=self._work,
            args=(self._requests, self._outcomes),
            name="cmpolicy-inference",
            daemon=True,
        )
        self._thread.start()

    def submit(self, obs: Mapping[str, Array], running: tuple[Array, int] | None = None) -> None:
        """Hand over copies."""
        if self._busy:
            raise RuntimeError("an inference is still under way")
        for key, buffer in self._obs.items():
            buffer[...] = obs[key]
        self._start = warm_plan(self._policy, running)
        self._busy = True
        self._requests.put(True)

    def poll(self) -> InferenceResult | None:
        if not self._busy or self._outcomes.empty():
            return None
        self._busy = False
        return self._outcomes.get()

    def close(self, timeout: float, hurried: Callable[[], bool]) -> bool:
        """End the thread once its inference, if there is one, is done."""
        thread, self._thread = self._thread, None
        if thread is None:
            return True
        sys.setswitchinterval(self._switch_interval)
        self._requests.put(False)
        deadline = clock() + timeout
        while thread.is_alive() and clock() < deadline and not hurried():
            thread.join(_SLICE)
        if thread.is_alive():
            _log.warning("the policy still runs after the end of the loop; nobody waits for it")
            self._straggler = thread
            return False
        return True

    def _work(
        self, requests: queue.SimpleQueue[bool], outcomes: queue.SimpleQueue[InferenceResult]
    ) -> None:
        obs = self._obs
        while requests.get():
            outcomes.put(infer(self._policy, obs, self._noise.draw(), self._start))


def ask(policy: ChunkPolicy, obs: Mapping[str, Array], noise: Array, start: Array | None) -> Array:
    """A plan (B, P, A) that starts from ``start`` (B, T, A), or from the noise alone."""
    if start is None:  # a policy without a warm start need not know the word
        return np.asarray(policy.infer_plan(obs, noise))
    return np.asarray(cast(Any, policy).infer_plan(obs, noise, plan=start))


def infer(
    policy: ChunkPolicy, obs: Mapping[str, Array], noise: Array, start: Array | None = None
) -> InferenceResult:
    """One call of the policy, timed; what it raises is in the outcome."""
    spec = policy.spec
    expected = (1, spec.n_plan_steps, spec.action_dim)
    begin = clock()
    try:
        plan = ask(policy, obs, noise, start)
        if plan.shape != expected:
            raise ValueError(
                f"{type(policy).__name__}.infer_plan returned shape {plan.shape}, expected "
                f"{expected}: (1, P, A)"
            )
    except BaseException as error:  # also what only a thread would see
        end = clock()
        return InferenceResult(None, error, end - begin, end)
    end = clock()
    return InferenceResult(plan[0], None, end - begin, end)
