"""Warm start where the parts meet: a server and its clients, a control loop, rows of an evaluation.

Everything is compared with the policy asked by hand.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from websockets.sync.client import ClientConnection, connect

import cmpolicy
from cmpolicy import ActionChunker, ConsistencyPolicy, ControlLoop, PolicyServer, RemotePolicy
from cmpolicy.cli.main import main
from cmpolicy.experiment.data import load_training_data
from cmpolicy.experiment.train import new_policy
from cmpolicy.robot import Asynchronous, SafetyLimits, Synchronous
from cmpolicy.robot.schedule import Schedule
from cmpolicy.robot.worker import ThreadedWorker
from cmpolicy.schema import ConfigError
from cmpolicy.serve.wire import pack, unpack
from cmpolicy.spec import SpecError
from cmpolicy_eval import get_protocol, rollout

T, A, TA = 16, 2, 8
SHAPES = {"agent_pos": (2,), "keypoint": (9, 2)}


@pytest.fixture
def policy(untrained_pusht: Callable[[], ConsistencyPolicy]) -> ConsistencyPolicy:
    policy = untrained_pusht()
    policy.warm_start = 0.4
    return policy


def _step(rng: np.random.Generator) -> dict[str, Any]:
    return {k: rng.uniform(0, 512, s).astype(np.float32) for k, s in SHAPES.items()}


def _noise(rng: np.random.Generator) -> Any:
    return rng.standard_normal((1, T, A), dtype=np.float32)


def _history(steps: list[dict[str, Any]]) -> dict[str, Any]:
    return {key: np.stack([step[key] for step in steps])[None] for key in SHAPES}


# -- a server -------------------------------------------------------------------------------------


def _ask(connection: ClientConnection, message: Mapping[str, Any]) -> Any:
    connection.send(pack(dict(message)))
    answer = connection.recv(timeout=30)
    assert isinstance(answer, bytes), answer
    return unpack(answer)["plan"]


def test_a_session_goes_on_from_its_plan(policy: ConsistencyPolicy) -> None:
    rng = np.random.default_rng(0)
    steps, noise = [_step(rng) for _ in range(3)], [_noise(rng) for _ in range(3)]
    with PolicyServer(policy, port=0) as server, connect(server.address) as connection:
        connection.recv(timeout=30)
        numbers = (0, 1, 5)
        plans = [
            _ask(connection, step | {"step": number, "noise": z[0]})
            for number, step, z in zip(numbers, steps, noise, strict=True)
        ]
        fresh = _ask(connection, steps[2] | {"step": 5, "noise": noise[2][0], "reset": True})
    first = policy.infer_plan(_history([steps[0]] * 2), noise[0])[0]
    start = policy.spec.shifted(first, 1)[None]
    second = policy.infer_plan(_history(steps[:2]), noise[1], plan=start)[0]
    start = policy.spec.shifted(second, 4)[None]
    third = policy.infer_plan(_history([steps[2]] * 2), noise[2], plan=start)[0]
    for got, want in zip(plans[:2], (first, second), strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-5)
    np.testing.assert_allclose(plans[2], third, rtol=1e-5)
    plain = policy.infer_plan(_history([steps[2]] * 2), noise[2])[0]
    np.testing.assert_allclose(fresh, plain, rtol=1e-5)


def test_a_remote_policy_takes_plans_row_by_row(policy: ConsistencyPolicy) -> None:
    rng = np.random.default_rng(1)
    obs = {k: rng.uniform(0, 512, (5, 2, *s)).astype(np.float32) for k, s in SHAPES.items()}
    noise = rng.standard_normal((5, T, A), dtype=np.float32)
    plan = rng.uniform(50, 450, (5, T, A))
    plan[[1, 4]] = np.nan
    with PolicyServer(policy, port=0, max_batch=2) as server, RemotePolicy(server.address) as far:
        assert far.warm_start == 0.4
        found = far.infer_plan(obs, noise, plan=plan)
        with pytest.raises(SpecError, match="plan has shape"):
            far.infer(obs, noise, plan=plan[:2])
        steps = [_step(rng) for _ in range(20)]
        actions = [
            [chunker.select_action(step) for step in steps]
            for chunker in (ActionChunker(policy, seed=3), ActionChunker(far, seed=3))
        ]
    np.testing.assert_allclose(found, policy.infer_plan(obs, noise, plan=plan), rtol=1e-5)
    np.testing.assert_allclose(actions[0], actions[1], rtol=1e-5)


# -- a control loop -------------------------------------------------------------------------------


class Watched:
    """The policy, and what it was asked with."""

    def __init__(self, policy: ConsistencyPolicy) -> None:
        self._policy = policy
        self.plans: list[Any] = []
        self.answers: list[Any] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self._policy, name)

    def infer_plan(self, obs: Mapping[str, Any], noise: Any = None, plan: Any = None) -> Any:
        self.plans.append(None if plan is None else plan.copy())
        self.answers.append(self._policy.infer_plan(obs, noise, plan=plan))
        return self.answers[-1]

    def infer(self, obs: Mapping[str, Any], noise: Any = None, plan: Any = None) -> Any:
        return self.infer_plan(obs, noise, plan)[:, :TA]


class Still:
    """A robot that stays where it is."""

    def connect(self) -> None:
        self.obs = _step(np.random.default_rng(2))

    def get_observation(self) -> dict[str, Any]:
        return self.obs

    def send_action(self, action: Any) -> None:
        pass

    def disconnect(self) -> None:
        pass


@pytest.mark.parametrize("schedule", [Synchronous(), Asynchronous(every=5, blend=0)])
def test_a_loop_goes_on_from_its_plan(policy: ConsistencyPolicy, schedule: Schedule) -> None:
    watched = Watched(policy)
    with ControlLoop(watched, Still(), 20.0, schedule=schedule, safety=SafetyLimits()) as loop:
        for _ in range(2):  # every run begins without a plan
            watched.plans.clear()
            watched.answers.clear()
            loop.run(steps=60)  # a busy machine plans seldom
            plans, answers = watched.plans[3:], watched.answers[3:]  # after those to warm up
            assert len(plans) >= 2
            assert plans[0] is None
            # A busy machine plans sooner or later than asked, and drops a plan that comes too late.
            for asked, plan in enumerate(plans[1:], 1):
                assert any(
                    np.array_equal(plan[0], policy.spec.shifted(answer[0], n))
                    for answer in answers[:asked]
                    for n in range(61)
                )


def test_a_thread_gets_a_copy(policy: ConsistencyPolicy) -> None:
    from cmpolicy.robot.worker import NoiseSource

    watched = Watched(policy)
    worker = ThreadedWorker(watched, NoiseSource(policy.spec.noise_shape, 0))
    worker.start()
    try:
        running = np.ones((15, A), np.float32)
        worker.submit(policy.spec.zeros(), (running, 2))
        running[...] = 9
        while worker.poll() is None:
            pass
    finally:
        worker.close(5, lambda: False)
    np.testing.assert_array_equal(watched.plans[0], np.ones((1, T, A)))


# -- rows of an evaluation ------------------------------------------------------------------------


def _chunks(policy: Any, seeds: list[int], **settings: Any) -> list[Any]:
    protocol = get_protocol("pusht-dp")
    results = rollout(
        protocol.make_env,
        policy,
        seeds,
        max_steps=28,
        reset_options=protocol.reset_options,
        keep_chunks=len(seeds),
        **settings,
    )
    return [result.chunks for result in results]


def test_episodes_keep_their_own_plans(policy: ConsistencyPolicy) -> None:
    seeds = [500000, 500001, 500002]
    together = _chunks(policy, seeds, batch_size=2, n_workers=0)
    apart = _chunks(policy, seeds, batch_size=2, n_workers=2)
    single = [_chunks(policy, [seed], batch_size=2, n_workers=0)[0] for seed in seeds]
    larger = _chunks(policy, seeds, batch_size=5, n_workers=0)
    for one, two, three, four in zip(together, apart, single, larger, strict=True):
        np.testing.assert_array_equal(one, two)
        # a network as small as this rounds by a row's place and the batch's size
        np.testing.assert_allclose(one[:2], three[:2], rtol=1e-4)
        np.testing.assert_allclose(one[:2], four[:2], rtol=1e-4)
    policy.warm_start = None
    plain = _chunks(policy, seeds, batch_size=2, n_workers=0)
    assert np.array_equal(plain[0][0], together[0][0])
    assert not np.array_equal(plain[0][1], together[0][1])
    policy.warm_start = 1.0
    for one, two in zip(plain, _chunks(policy, seeds, batch_size=2, n_workers=0), strict=True):
        np.testing.assert_array_equal(one, two)


def test_an_episode_is_that_of_the_chunker(policy: ConsistencyPolicy) -> None:
    protocol = get_protocol("pusht-dp")
    (chunks,) = _chunks(policy, [500003], batch_size=1, n_workers=0)
    env, chunker = protocol.make_env(), ActionChunker(policy, seed=500003)
    obs, _ = env.reset(seed=500003, options=protocol.reset_options(500003))
    actions = []
    for _ in range(28):
        actions.append(chunker.select_action(obs))
        obs, *_ = env.step(actions[-1])
    env.close()
    np.testing.assert_array_equal(chunks.reshape(-1, A)[:28], actions)


def test_the_command_line(policy: ConsistencyPolicy, tmp_path: Path, capsys: Any) -> None:
    """Published with a warm start, exported, and scored alike."""
    bundle, file = str(tmp_path / "warm"), str(tmp_path / "warm.onnx")
    words = ["policy=pusht", f"out={bundle}", "warm_start=0.3"]
    assert main(["publish", *words]) == 0
    assert ConsistencyPolicy.from_pretrained(bundle).warm_start == 0.3
    cold = str(tmp_path / "cold")
    assert main(["publish", f"policy={bundle}", f"out={cold}", "warm_start=1"]) == 0
    assert ConsistencyPolicy.from_pretrained(cold).warm_start is None
    assert main(["export", f"policy={bundle}", f"out={file}"]) == 0
    protocol, seeds = "protocol=pusht-dp", "seeds=500000"
    out = str(tmp_path / "eval")
    assert main(["eval", f"policy={file}", protocol, seeds, "workers=1", f"out={out}"]) == 0
    assert main(["eval", f"policy={file}", protocol, "warm_start=0.5", f"out={out}"]) == 2
    assert "has warm_start=0.3, not 0.5" in capsys.readouterr().err
    own = cmpolicy.evaluate(bundle, protocol="pusht-dp", seeds="500000", workers=1)
    assert own.episodes[0].length > 0
    with pytest.raises(ValueError, match="set it on the policy itself"):
        cmpolicy.evaluate(policy, protocol="pusht-dp", seeds="500000", warm_start=0.5)


def test_a_run_can_give_its_policies_one() -> None:
    config = cmpolicy.compose("task=pusht", "net=tiny", "policy.warm_start=0.5")
    assert new_policy(config, load_training_data(config)).warm_start == 0.5
    with pytest.raises(ConfigError, match=r"policy.warm_start=0.5: a warm start needs .* flow"):
        cmpolicy.compose("task=pusht", "objective=ddpm", "policy.warm_start=0.5")
