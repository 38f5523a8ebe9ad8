"""What one client's messages mean: forms, history, noise, and that a refusal changes nothing."""

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cmpolicy.serve.requests import Request, RequestError, Session
from cmpolicy.spec import PolicySpec

SPEC = PolicySpec(
    {"pos": (2,), "grip": ()}, action_dim=2, horizon=8, n_obs_steps=3, n_action_steps=4
)


def _session(seed: int = 0) -> Session:
    return Session(SPEC, max_batch=4, seed=np.random.SeedSequence(seed))


def _step(value: float) -> dict[str, Any]:
    return {"pos": np.full(2, value), "grip": value}


def _read(session: Session, message: Any) -> Request:
    request = session.read(message)
    assert request is not None
    return request


def _seen(request: Request) -> list[float]:
    """The history of the one row, by the value of each step."""
    assert request.rows == 1
    pos, grip = request.obs["pos"], request.obs["grip"]
    assert pos.shape == (1, 3, 2)
    assert grip.shape == (1, 3)
    assert np.array_equal(pos[0, :, 0], grip[0])
    return [float(value) for value in grip[0]]


@given(st.lists(st.one_of(st.none(), st.integers(0, 99)), max_size=12))
def test_history_is_that_of_the_episode(script: list[int | None]) -> None:
    """A number is the next step's observation, None a reset; compared with the episode itself."""
    session, episode = _session(), []
    for item in script:
        if item is None:
            assert session.read({"reset": True}) is None
            episode = []
        else:
            episode.append(float(item))
            padded = [episode[0]] * 2 + episode
            message = _step(item) | {"step": len(episode) - 1}
            assert _seen(_read(session, message)) == padded[-3:]


@given(st.lists(st.integers(0, 3), min_size=1, max_size=12))
def test_missing_steps_are_taken_from_the_nearest_older(gaps: list[int]) -> None:
    """Each observation's value is its step, so the history tells which steps it is made of."""
    session, number, seen = _session(), 0, [0]
    assert _seen(_read(session, _step(0) | {"step": 0})) == [0, 0, 0]
    for gap in gaps:
        number += gap  # 0: the same step once more
        seen.append(number)
        window = range(number - 2, number + 1)
        known = [s for s in seen if s in window]
        expected = [max((s for s in known if s <= w), default=min(known)) for w in window]
        assert _seen(_read(session, _step(number) | {"step": number})) == expected


def test_a_smaller_step_begins_an_episode() -> None:
    session = _session()
    for number in (5, 6):
        _read(session, _step(number) | {"step": number})
    assert _seen(_read(session, _step(60) | {"step": 6})) == [5, 5, 60]  # in place of the first
    assert _seen(_read(session, _step(0) | {"step": 5})) == [0, 0, 0]
    assert _seen(_read(session, _step(1) | {"step": np.int64(6)})) == [0, 0, 1]
    assert _seen(_read(session, _step(9) | {"step": 7, "reset": True})) == [9, 9, 9]


def test_a_chunk_old_observation_is_no_history() -> None:
    """openpi's broker: with ``step`` or without, the step before is not the chunk before."""
    session = _session()
    for number in (0, 8, 16):
        assert _seen(_read(session, _step(number) | {"step": number})) == [number] * 3
    for number in (0, 8):
        assert _seen(_read(session, _step(number))) == [number] * 3


def test_other_forms_leave_the_history_alone() -> None:
    session = _session()
    _read(session, _step(1) | {"step": 0})
    whole = {"pos": np.zeros((3, 2), np.uint8), "grip": np.arange(3)}
    request = _read(session, whole)
    assert not request.is_batch
    assert request.obs["pos"].dtype == request.obs["grip"].dtype == np.float32
    assert request.obs["grip"].tolist() == [[0, 1, 2]]
    batch = _read(session, {"pos": np.zeros((4, 3, 2)), "grip": np.zeros((4, 3))})
    assert batch.is_batch
    assert batch.rows == 4
    assert batch.noise.shape == (4, 8, 2)
    _read(session, _step(5))
    assert _seen(_read(session, _step(2) | {"step": 1})) == [1, 1, 2]


def test_noise_is_the_session_s_own_or_the_client_s() -> None:
    first = _read(_session(1), _step(0)).noise
    assert first.dtype == np.float32
    assert first.shape == (1, 8, 2)
    assert np.array_equal(first, _read(_session(1), _step(0)).noise)
    assert not np.array_equal(first, _read(_session(2), _step(0)).noise)
    session = _session(1)
    assert session.read({"seed": 7}) is None
    seeded = _read(session, _step(0)).noise
    assert np.array_equal(seeded, _read(_session(2), _step(0) | {"seed": 7}).noise)
    assert not np.array_equal(seeded, _read(session, _step(0)).noise)  # it goes on
    mine = np.random.default_rng(0).standard_normal((8, 2))
    assert np.array_equal(
        _read(session, _step(0) | {"noise": mine}).noise[0], mine.astype(np.float32)
    )


def test_lists_plain_numbers_and_keys_of_others_are_fine() -> None:
    spec = PolicySpec(
        {"pos": (2,), "grip": (1,)}, action_dim=2, horizon=8, n_obs_steps=3, n_action_steps=4
    )
    session = Session(spec, max_batch=4)
    message = {"pos": [1, 2.5], "grip": 0.5, "prompt": "go", b"image": np.zeros((2, 2, 3))}
    obs = _read(session, message).obs
    assert obs.keys() == {"pos", "grip"}
    assert np.array_equal(obs["pos"], np.tile([1, 2.5], (1, 3, 1)))
    assert np.array_equal(obs["grip"], np.full((1, 3, 1), 0.5))


@pytest.mark.parametrize(
    ("message", "expected"),
    [
        ([1, 2], "a message is a map with the keys .'grip', 'pos'., got list"),
        ({}, "lacks the keys .'grip', 'pos'."),
        ({"pos": np.zeros(2)}, "lacks the keys .'grip'."),
        (_step(1) | {"pos": np.zeros(3)}, r"shape \(3,\), expected \(2,\) for one step"),
        (_step(1) | {"pos": np.zeros((2, 2))}, r"\(3, 2\) for a history of n_obs_steps=3"),
        (_step(1) | {"pos": np.zeros((1, 1, 3, 2))}, r"or \(B, 3, 2\) for a batch"),
        (_step(1) | {"pos": np.zeros((3, 2))}, "'grip' is a step and 'pos' is a history"),
        ({"pos": np.zeros((0, 3, 2)), "grip": np.zeros((0, 3))}, r"shape \(0, 3, 2\)"),
        ({"pos": np.zeros((5, 3, 2)), "grip": np.zeros((5, 3))}, "batch of 5; .* at most 4"),
        ({"pos": np.zeros((2, 3, 2)), "grip": np.zeros((1, 3))}, "has batch size 1, 'pos' has 2"),
        (_step(1) | {"pos": [[1.0], [2.0, 3.0]]}, "'pos' is not an array of numbers: setting"),
        (_step(1) | {"pos": ["a", "b"]}, "has dtype <U1"),
        (_step(1) | {"pos": np.array(["a", "b"])}, "has dtype <U1"),
        (_step(1) | {"pos": {"x": 1}}, "'pos' is a dict"),
        (_step(1) | {"pos": np.array([np.nan, 1])}, "'pos' holds 1 NaN or infinite"),
        (_step(1) | {"pos": np.array([1e300, -np.inf])}, "'pos' holds 2 NaN or infinite"),
        (_step(float("nan")) | {"pos": np.zeros(2)}, "'grip' holds 1 NaN"),
        (_step(1) | {"reset": 1}, "reset must be true or false, got 1"),
        (_step(1) | {"seed": -1}, "seed must be a whole number from 0 on, got -1"),
        (_step(1) | {"seed": True}, "seed must be a whole number"),
        ({"seed": "x"}, "seed must be a whole number"),
        (_step(1) | {"step": 1.0}, "step must be a whole number from 0 on, got 1.0"),
        (_step(1) | {"step": -1}, "step must be a whole number"),
        ({"pos": np.zeros((3, 2)), "grip": np.zeros(3), "step": 2}, "step=2 belongs to one"),
        ({"step": 2}, "lacks"),
        (
            _step(1) | {"noise": np.zeros((1, 8, 2))},
            r"noise has shape \(1, 8, 2\), expected \(8, 2",
        ),
        (_step(1) | {"noise": np.full((8, 2), np.inf)}, "noise holds 16 NaN or infinite"),
        (
            {"pos": np.zeros((2, 3, 2)), "grip": np.zeros((2, 3)), "noise": np.zeros((8, 2))},
            "batch",
        ),
    ],
)
def test_a_refused_message_changes_nothing(message: Any, expected: str) -> None:
    session, untouched = _session(), _session()
    for one in (session, untouched):
        _read(one, _step(1) | {"step": 0})
    if isinstance(message, dict) and message and "seed" not in message:
        message = {"seed": 5, "reset": True, **message}  # not to be carried out either
    with pytest.raises(RequestError, match=expected):
        session.read(message)
    next_step = _step(2) | {"step": 1}
    after, without = _read(session, next_step), _read(untouched, next_step)
    assert _seen(after) == _seen(without) == [1, 1, 2]
    assert np.array_equal(after.noise, without.noise)


def test_more_files_than_frames_are_taken_are_not_decoded() -> None:
    spec = PolicySpec({"top": (6, 8, 3)}, 2, 8, n_obs_steps=2, n_action_steps=4, images=("top",))
    session = Session(spec, max_batch=4)
    message = {"top": [[b"no file", b"at all"]] * 5}
    with pytest.raises(RequestError, match=r"holds 10 files; .* at most 8 frames of a camera"):
        session.read(message)
    with pytest.raises(RequestError, match="bytes that are no JPEG or PNG"):
        session.read({"top": message["top"][:4]})
