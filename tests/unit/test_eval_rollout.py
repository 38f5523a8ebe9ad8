"""Rollouts: order, freezing, reproducibility, independence of processes, failures that name seeds.

A point that walks on a line stands in for a robot: every rule of the rollout can be read off it.
"""

import os
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from types import SimpleNamespace
from typing import Any

import cloudpickle
import gymnasium
import numpy as np
import pytest
from gymnasium import spaces

from cmpolicy_eval import (
    EpisodeResult,
    PolicyMismatchError,
    RolloutError,
    get_protocol,
    rollout,
)

# Environment processes cannot import this file, so its classes travel by value.
cloudpickle.register_pickle_by_value(sys.modules[__name__])


class Walk(gymnasium.Env[dict[str, np.ndarray], np.ndarray]):
    """Starts at the seed; an action is added to the position; ends after ``seed % 5 + 3`` steps.

    The reward of a step is its action, success is an action above 2.
    """

    observation_space = spaces.Dict({"x": spaces.Box(-1e6, 1e6, (1,), np.float32)})
    action_space = spaces.Box(-9, 9, (1,), np.float32)

    def __init__(self, *, raises_at: int | None = None, dies_at: int | None = None) -> None:
        self._raises_at, self._dies_at = raises_at, dies_at
        self._left = -1

    def _obs(self) -> dict[str, np.ndarray]:
        return {"x": np.array([self._x], np.float32)}

    def reset(self, *, seed: int | None = None, options: Any = None) -> Any:
        super().reset(seed=seed)
        self._seed = seed or 0
        self._x = float(self._seed) + float((options or {}).get("shift", 0.0))
        self._left = self._seed % 5 + 3
        return self._obs(), {"is_success": False}

    def step(self, action: np.ndarray) -> Any:
        if self._left <= 0:
            raise RuntimeError("stepped after its end")
        if self._seed == self._raises_at:
            raise ZeroDivisionError("the motor is on fire")
        if self._seed == self._dies_at:
            os._exit(17)
        self._x += float(action[0])
        self._left -= 1
        info = {"is_success": bool(action[0] > 2)}
        return self._obs(), float(action[0]), self._left == 0, False, info


@dataclass
class Constant:
    """Acts 1, 2, ..., Ta; keeps what it was shown."""

    n_obs_steps: int = 2
    n_action_steps: int = 2
    seen: list[np.ndarray] = field(default_factory=list)

    def infer(self, obs: Mapping[str, np.ndarray]) -> np.ndarray:
        self.seen.append(obs["x"].copy())
        ramp = np.arange(1, self.n_action_steps + 1, dtype=np.float32)
        return np.broadcast_to(ramp[None, :, None], (len(obs["x"]), self.n_action_steps, 1))


@dataclass
class Noisy:
    """Acts as its noise says."""

    n_obs_steps: int = 1
    n_action_steps: int = 2
    spec = SimpleNamespace(obs={"x": (1,)}, action_dim=1, noise_shape=(4, 1))

    def infer(self, obs: Mapping[str, np.ndarray], noise: np.ndarray | None = None) -> np.ndarray:
        assert noise is not None
        assert noise.shape == (len(obs["x"]), 4, 1)
        return noise[:, :2]


def untimed(results: list[EpisodeResult]) -> list[EpisodeResult]:
    return [replace(result, infer_ms=()) for result in results]


def run(policy: Any, seeds: list[int], **kwargs: Any) -> list[EpisodeResult]:
    settings = {"max_steps": 50, "n_workers": 1, "batch_size": 3, **kwargs}
    make_env: Callable[[], Any] = settings.pop("make_env", Walk)
    return rollout(make_env, policy, seeds, **settings)


def test_results_come_in_the_order_of_the_seeds() -> None:
    results = run(Constant(), [9, 0, 4, 3, 12])
    assert [r.seed for r in results] == [9, 0, 4, 3, 12]
    assert [r.length for r in results] == [7, 3, 7, 6, 5]
    assert {r.score for r in results} == {2.0}
    assert not any(r.success for r in results)


def test_score_is_the_largest_reward_and_success_any_success() -> None:
    policy = Constant(n_action_steps=4)
    short, long = run(policy, [0, 1])  # 3 and 4 steps: actions up to 3, up to 4
    assert (short.score, short.success) == (3.0, True)
    assert (long.score, long.success) == (4.0, True)


def test_rewards_below_zero_are_scores_as_well() -> None:
    """As minus a distance: 0 would be better than any of them."""

    class Far(Walk):
        def step(self, action: np.ndarray) -> Any:
            obs, reward, *rest = super().step(action)
            return obs, reward - 10, *rest

    found = run(Constant(n_action_steps=4), [0, 1], make_env=Far)
    assert [r.score for r in found] == [-7.0, -6.0]


def test_views_of_a_state_that_goes_on_to_change_are_copied() -> None:
    """As of an environment that returns MuJoCo's own arrays."""

    class Views(Walk):
        def reset(self, *, seed: int | None = None, options: Any = None) -> Any:
            obs, info = super().reset(seed=seed, options=options)
            self._view = obs["x"].copy()
            return {"x": self._view}, info

        def step(self, action: np.ndarray) -> Any:
            obs, *rest = super().step(action)
            self._view[:] = obs["x"]
            return {"x": self._view}, *rest

    plain, views = Constant(n_obs_steps=3), Constant(n_obs_steps=3)
    run(plain, [1], batch_size=1)
    run(views, [1], batch_size=1, make_env=Views)
    for expected, seen in zip(plain.seen, views.seen, strict=True):
        np.testing.assert_array_equal(seen, expected)


def test_the_episode_ends_within_a_chunk_at_max_steps() -> None:
    (result,) = run(Constant(n_action_steps=2), [4], max_steps=5)
    assert result.length == 5
    assert len(result.infer_ms) == 3


def test_history_is_padded_with_the_first_observation_and_then_slides() -> None:
    policy = Constant(n_obs_steps=3)
    run(policy, [1], batch_size=1)
    assert [seen[0, :, 0].tolist() for seen in policy.seen] == [[1, 1, 1], [1, 2, 4]]


def test_finished_environments_are_frozen() -> None:
    policy = Constant()
    run(policy, [0, 4], batch_size=2)  # a step after the end would raise
    assert len(policy.seen) == 4
    frozen = [seen[0] for seen in policy.seen[2:]]
    np.testing.assert_array_equal(frozen[0], frozen[1])
    assert not np.array_equal(policy.seen[2][1], policy.seen[3][1])


def test_every_call_has_the_same_shape() -> None:
    policy = Constant()
    run(policy, [0, 1, 2, 3, 4, 5, 6], batch_size=4)
    assert {seen.shape for seen in policy.seen} == {(4, 2, 1)}


def test_noise_belongs_to_the_seed() -> None:
    alone = {seed: run(Noisy(), [seed])[0] for seed in (3, 8, 14)}
    expected = np.random.default_rng(8).standard_normal((4, 1), dtype=np.float32)[:2].max()
    assert alone[8].score >= float(expected)
    for batch_size in (1, 2, 5):
        together = run(Noisy(), [14, 3, 20, 8], batch_size=batch_size)
        for result in together:
            if result.seed in alone:
                assert untimed([result]) == untimed([alone[result.seed]])


def test_reset_options_reach_the_environment() -> None:
    policy = Constant()
    run(policy, [2], reset_options=lambda seed: {"shift": 10.0 * seed})
    assert policy.seen[0][0, 0, 0] == 22.0


def test_chunks_of_the_first_seeds_are_kept() -> None:
    results = run(Constant(), [4, 0, 1], keep_chunks=2)
    assert results[0].chunks is not None
    assert results[0].chunks.shape == (4, 2, 1)
    assert results[1].chunks is not None
    assert results[2].chunks is None


def test_processes_change_nothing() -> None:
    seeds = list(range(7))
    expected = untimed(run(Noisy(), seeds, n_workers=1))
    assert untimed(run(Noisy(), seeds, n_workers=2)) == expected


def test_processes_change_nothing_on_push_t() -> None:
    @dataclass
    class Chase:
        n_obs_steps: int = 2
        n_action_steps: int = 8
        spec = SimpleNamespace(obs={"keypoint": (9, 2)}, action_dim=2, noise_shape=(16, 2))

        def infer(
            self, obs: Mapping[str, np.ndarray], noise: np.ndarray | None = None
        ) -> np.ndarray:
            assert noise is not None
            block = obs["keypoint"][:, -1].mean(1)
            return np.clip(block[:, None] + 40 * noise[:, :8], 0, 512)

    protocol = get_protocol("pusht-dp")
    seeds = [100_000, 100_001, 100_002, 100_003]
    runs = [
        rollout(
            protocol.make_env,
            Chase(),
            seeds,
            max_steps=24,
            reset_options=protocol.reset_options,
            n_workers=n_workers,
            batch_size=batch_size,
        )
        for n_workers, batch_size in ((1, 4), (1, 3), (2, 4))
    ]
    assert [r.length for r in runs[0]] == [24] * 4
    for other in runs[1:]:
        assert untimed(other) == untimed(runs[0])


@pytest.mark.parametrize("n_workers", [1, 2])
def test_an_exception_in_an_environment_names_the_seed(n_workers: int) -> None:
    make_env = partial(Walk, raises_at=6)
    message = "(?s)episode of seed 6.*: .*ZeroDivisionError: the motor is on fire"
    with pytest.raises(RolloutError, match=message):
        run(Constant(), list(range(9)), make_env=make_env, n_workers=n_workers)


def test_a_dead_process_names_the_seed_and_its_exit_code() -> None:
    make_env = partial(Walk, dies_at=5)
    with pytest.raises(RolloutError, match=r"episode of seed 5.*: .*died \(exit code 17\)"):
        run(Constant(), list(range(9)), make_env=make_env, n_workers=2, batch_size=9)


def test_an_environment_that_cannot_be_made_in_a_process_is_an_error() -> None:
    parent = os.getpid()

    def make() -> Walk:
        if os.getpid() != parent:
            raise OSError("no display")
        return Walk()

    with pytest.raises(RolloutError, match="OSError: no display"):
        run(Constant(), [0, 1], make_env=make, n_workers=2)


def test_a_policy_that_diverges_is_an_error() -> None:
    class Diverging(Constant):
        def infer(self, obs: Mapping[str, np.ndarray]) -> np.ndarray:
            chunk = np.array(super().infer(obs))
            chunk[obs["x"][:, -1, 0] > 4] = np.nan
            return chunk

    with pytest.raises(RolloutError, match="seed 3: the policy gave a non-finite action at step 2"):
        run(Diverging(), [0, 1, 3])


@dataclass(frozen=True)
class Spec:
    obs: dict[str, tuple[int, ...]]
    action_dim: int


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        (Spec({"y": (1,)}, 1), r"observes \{y: \(1,\)\}, but .* gives \{x: \(1,\)\}.*matching: y"),
        (Spec({"x": (2,)}, 1), r"observes \{x: \(2,\)\}, but .* gives \{x: \(1,\)\}.*matching: x"),
        (Spec({"x": (1,)}, 3), r"actions of 3 numbers, but .* shape \(1,\)"),
    ],
)
def test_a_policy_for_another_task_is_an_error_that_names_both(spec: Spec, message: str) -> None:
    policy = Constant()
    policy.spec = spec  # type: ignore[attr-defined]
    with pytest.raises(PolicyMismatchError, match=message):
        run(policy, [0])


def test_a_chunk_of_another_length_is_an_error() -> None:
    class Short(Constant):
        def infer(self, obs: Mapping[str, np.ndarray]) -> np.ndarray:
            return super().infer(obs)[:, :1]

    with pytest.raises(PolicyMismatchError, match=r"shape \(3, 1, 1\).*\(3, 2, action size\)"):
        run(Short(), [0])


@pytest.mark.parametrize(
    ("seeds", "settings", "message"),
    [
        ([], {}, "at least one seed"),
        ([1, 2, 1], {}, "seed 1 is given more than once"),
        ([1], {"max_steps": 0}, "max_steps must be at least 1, got 0"),
        ([1], {"batch_size": 0}, "batch_size must be at least 1, got 0"),
        ([1], {"n_workers": -1}, "n_workers must be at least 0, got -1"),
    ],
)
def test_impossible_settings(seeds: list[int], settings: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        run(Constant(), seeds, **settings)


def test_no_progress_bar_without_a_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    run(Constant(), [0, 1], progress="nfe=1")
    assert capsys.readouterr().err == ""
