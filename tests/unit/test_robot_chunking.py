"""ActionChunker on a real (tiny) policy, and the observation history it keeps."""

from typing import Any

import numpy as np
import pytest
import torch

from cmpolicy import ActionChunker, ConsistencyPolicy
from cmpolicy.nn.unet1d import UNet1DConfig
from cmpolicy.normalize import Normalizer
from cmpolicy.observation import NonFiniteObservationError, ObservationError
from cmpolicy.robot.history import ObservationHistory
from cmpolicy.spec import PolicySpec

NET = UNet1DConfig((8, 16), kernel_size=3, n_groups=4, time_dim=8)
SPEC = PolicySpec(
    {"pos": (2,), "grip": ()},
    action_dim=3,
    horizon=8,
    n_obs_steps=2,
    n_action_steps=4,
    action_rotations=(),
)


@pytest.fixture(scope="module")
def policy() -> ConsistencyPolicy:
    rng = np.random.default_rng(0)
    shapes = {**SPEC.obs, "action": (3,)}
    normalizer = Normalizer.fit({k: rng.normal(size=(32, *s)) for k, s in shapes.items()})
    torch.manual_seed(0)
    policy = ConsistencyPolicy(SPEC, NET, normalizer)
    torch.nn.init.normal_(policy.net.head[-1].weight, std=0.3)  # type: ignore[arg-type]
    return policy.eval()


def _steps(n: int, seed: int = 1) -> list[dict[str, Any]]:
    rng = np.random.default_rng(seed)
    return [{"pos": rng.normal(size=2), "grip": rng.normal()} for _ in range(n)]


def _stack(steps: list[dict[str, Any]]) -> dict[str, np.ndarray]:
    return {key: np.stack([s[key] for s in steps])[None].astype(np.float32) for key in steps[0]}


def _noise(seed: int, n: int) -> list[np.ndarray]:
    rng = np.random.default_rng(seed)
    return [rng.standard_normal((8, 3), dtype=np.float32)[None] for _ in range(n)]


def test_receding_horizon(policy: ConsistencyPolicy) -> None:
    steps, noise = _steps(10), _noise(5, 3)
    chunker = ActionChunker(policy, seed=5)
    actions = np.stack([chunker.select_action(step) for step in steps])
    first = policy.infer(_stack([steps[0], steps[0]]), noise[0])[0]
    second = policy.infer(_stack(steps[3:5]), noise[1])[0]
    third = policy.infer(_stack(steps[7:9]), noise[2])[0]
    np.testing.assert_array_equal(actions, np.concatenate([first, second, third[:2]]))
    assert actions.dtype == np.float32


def test_reset_leaves_nothing_behind(policy: ConsistencyPolicy) -> None:
    for ensemble in (None, 0.01):
        chunker = ActionChunker(policy, ensemble=ensemble, seed=3)
        fresh = [chunker.select_action(step) for step in _steps(7)]
        chunker.reset()
        for step in _steps(6, seed=9):  # ends within a chunk
            chunker.select_action(step)
        chunker.reset()
        again = [chunker.select_action(step) for step in _steps(7)]
        np.testing.assert_array_equal(again, fresh)


def test_without_a_seed_episodes_differ(policy: ConsistencyPolicy) -> None:
    chunker = ActionChunker(policy)
    first = chunker.select_action(_steps(1)[0])
    chunker.reset()
    assert not np.array_equal(chunker.select_action(_steps(1)[0]), first)


def test_an_action_is_the_callers_own(policy: ConsistencyPolicy) -> None:
    steps = _steps(4)
    clean = ActionChunker(policy, seed=0)
    expected = [clean.select_action(step) for step in steps]
    spoiled = ActionChunker(policy, seed=0)
    for step, action in zip(steps, expected, strict=True):
        given = spoiled.select_action(step)
        np.testing.assert_array_equal(given, action)
        given[...] = np.nan
        step["pos"][...] = 7.0  # the robot reuses its buffer


def test_a_bad_observation_can_be_followed_by_a_good_one(policy: ConsistencyPolicy) -> None:
    steps = _steps(6)
    expected = [ActionChunker(policy, seed=1).select_action(steps[0])]
    chunker = ActionChunker(policy, seed=1)
    with pytest.raises(NonFiniteObservationError, match="'pos' holds 1 NaN"):
        chunker.select_action({"pos": np.array([0.0, np.nan]), "grip": 0.0})
    np.testing.assert_array_equal([chunker.select_action(steps[0])], expected)


def test_what_cannot_be_chunked(policy: ConsistencyPolicy) -> None:
    with pytest.raises(TypeError, match=r"dict cannot drive a robot: it has no spec"):
        ActionChunker({})  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="ensemble=inf"):
        ActionChunker(policy, ensemble=float("inf"))


# -- history --------------------------------------------------------------------------------------


@pytest.mark.parametrize("to", [1, 2, 3, 5])
def test_history_is_the_last_steps_oldest_first(to: int) -> None:
    spec = PolicySpec({"x": (2,)}, action_dim=1, horizon=8, n_obs_steps=to, n_action_steps=1)
    history = ObservationHistory(spec)
    with pytest.raises(RuntimeError, match="no observation yet"):
        _ = history.obs
    for _ in range(2):
        for n in range(12):
            history.push({"x": np.full(2, n), "camera": np.zeros((4, 4, 3))})
            expected = [max(0, n - to + 1 + i) for i in range(to)]
            assert history.obs["x"].shape == (1, to, 2)
            assert history.obs["x"][0, :, 0].tolist() == expected
        history.reset()


def test_history_takes_what_is_an_array_of_numbers() -> None:
    history = ObservationHistory(SPEC)
    history.push({"pos": [1, 2], "grip": True})
    history.push({"pos": torch.tensor([3.0, 4.0]), "grip": np.uint8(7)})
    assert history.obs["pos"][0].tolist() == [[1, 2], [3, 4]]
    assert history.obs["grip"][0].tolist() == [1, 7]
    assert history.obs["pos"].dtype == np.float32


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"pos": None}, ["'pos'", "NoneType"]),
        ({"pos": np.zeros(3)}, ["'pos'", "(3,)", "(2,)"]),
        ({"pos": np.zeros((1, 2))}, ["'pos'", "(1, 2)", "without batch or time axis"]),
        ({"pos": np.array(["a", "b"])}, ["'pos'", "dtype <U1"]),
        ({"pos": np.zeros(2, complex)}, ["'pos'", "complex128"]),
        ({"pos": [[1.0], [2.0, 3.0]]}, ["'pos'"]),
        ({"grip": np.inf}, ["'grip'", "1 NaN or infinite"]),
        ({"pos": np.array([1e300, 0.0])}, ["'pos'", "1 NaN or infinite"]),
    ],
)
def test_wrong_observations_leave_the_history_alone(
    changes: dict[str, Any], words: list[str]
) -> None:
    history = ObservationHistory(SPEC)
    history.push({"pos": [1, 2], "grip": 0})
    with pytest.raises(ObservationError) as caught:
        history.push({"pos": [5, 6], "grip": 3} | changes)
    for word in words:
        assert word in str(caught.value)
    history.push({"pos": [3, 4], "grip": 0})
    assert history.obs["pos"][0].tolist() == [[1, 2], [3, 4]]


def test_a_missing_key_and_no_mapping() -> None:
    history = ObservationHistory(SPEC)
    with pytest.raises(ObservationError, match=r"no 'grip'.*gave \['other', 'pos'\]"):
        history.push({"pos": [1, 2], "other": 1})
    with pytest.raises(ObservationError, match="got ndarray"):
        history.push(np.zeros(3))  # type: ignore[arg-type]
