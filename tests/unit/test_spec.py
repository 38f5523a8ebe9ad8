from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
import torch

from cmpolicy.spec import PolicySpec, Rotation, SpecError

PUSHT: dict[str, Any] = {
    "obs": {"agent_pos": (2,), "keypoint": (9, 2)},
    "action_dim": 2,
    "horizon": 16,
    "n_obs_steps": 2,
    "n_action_steps": 8,
}


def _spec(**changes: Any) -> PolicySpec:
    return PolicySpec(**(PUSHT | changes))


def _obs(batch: int = 3, **shapes: tuple[int, ...]) -> dict[str, np.ndarray]:
    given = {"agent_pos": (batch, 2, 2), "keypoint": (batch, 2, 9, 2)} | shapes
    return {key: np.zeros(shape, np.float32) for key, shape in given.items()}


def test_images() -> None:
    spec = _spec(obs={"top": (96, 96, 3), "force": ()}, images=("top",))
    assert spec.states == {"force": ()}
    assert spec.dtype("top") is np.uint8
    assert spec.dtype("force") is np.float32
    zeros = spec.zeros(3)
    assert zeros["top"].shape == (3, 2, 96, 96, 3)
    assert (zeros["top"].dtype, zeros["force"].dtype) == (np.uint8, np.float32)
    assert spec.message_bytes() == 2 * (96 * 96 * 3 + 8) + 2 * 8 * 16 * 2
    assert PolicySpec.from_dict(json.loads(json.dumps(spec.to_dict()))) == spec
    assert "images" not in _spec().to_dict()  # as older versions wrote it
    for obs, images in (({"a": (2,)}, ("a",)), ({"a": (2,)}, ("b",)), ({"a": (3, 8, 8)}, ("a",))):
        with pytest.raises(SpecError, match=r"expected \(height, width, 3\)"):
            _spec(obs=obs, images=images)


def test_json_round_trip() -> None:
    spec = _spec()
    assert PolicySpec.from_dict(json.loads(json.dumps(spec.to_dict()))) == spec


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"horizon": 8}, ["horizon=8", "9 actions", "n_action_steps=8"]),
        ({"n_obs_steps": 0}, ["n_obs_steps", "at least 1", "0"]),
        ({"n_action_steps": 2.5}, ["n_action_steps", "whole number", "2.5"]),
        ({"action_dim": True}, ["action_dim", "True"]),
        ({"obs": {}}, ["at least one observation key"]),
        ({"obs": {"state": (0,)}}, ["'state'", "(0,)"]),
        ({"obs": {"state": 5}}, ["'state'", "5", "whole numbers"]),
        ({"obs": {"action": (2,)}}, ["'action'", "another key"]),
    ],
)
def test_impossible_specs(changes: dict[str, Any], words: list[str]) -> None:
    with pytest.raises(SpecError) as caught:
        _spec(**changes)
    for word in words:
        assert word in str(caught.value)


def test_from_dict_names_what_is_missing() -> None:
    data = {key: value for key, value in _spec().to_dict().items() if key != "horizon"}
    with pytest.raises(SpecError, match=r"incomplete.*'horizon'"):
        PolicySpec.from_dict(data)
    with pytest.raises(SpecError, match="incomplete"):
        PolicySpec.from_dict([1, 2])  # type: ignore[arg-type]


def test_check_obs_returns_the_batch_size() -> None:
    assert _spec().check_obs(_obs(5)) == 5
    tensors = {key: torch.as_tensor(value) for key, value in _obs(4).items()}
    assert _spec().check_obs(tensors) == 4


@pytest.mark.parametrize(
    ("obs", "words"),
    [
        (
            {"agent_pos": np.zeros((1, 2, 2))},
            ["missing: ['keypoint']", "trained on ['agent_pos'"],
        ),
        (_obs(keypoint=(3, 2, 8, 2)), ["'keypoint'", "(3, 2, 8, 2)", "(batch, 2, 9, 2)"]),
        (_obs(keypoint=(3, 1, 9, 2)), ["(3, 1, 9, 2)", "n_obs_steps=2"]),
        (_obs(agent_pos=(2, 2)), ["'agent_pos'", "(2, 2)", "(batch, 2, 2)"]),
        (_obs(agent_pos=(4, 2, 2)), ["'keypoint'", "batch size 3", "4"]),
        (_obs(0), ["(0, 2, 2)"]),
        (np.zeros((3, 2, 20)), ["mapping", "ndarray"]),
    ],
)
def test_wrong_observations(obs: Any, words: list[str]) -> None:
    with pytest.raises(SpecError) as caught:
        _spec().check_obs(obs)
    for word in words:
        assert word in str(caught.value)


# -- rotations ----------------------------------------------------------------------------------


def test_rotations_round_trip() -> None:
    parts = (Rotation("angle", (2,)), Rotation("quaternion", (3, 4, 5, 6)))
    spec = PolicySpec({"state": (3,)}, 8, 4, 1, 2, action_rotations=parts)
    assert PolicySpec.from_dict(json.loads(json.dumps(spec.to_dict()))) == spec
    for nothing in ((), None):
        spec = PolicySpec({"state": (3,)}, 8, 4, 1, 2, action_rotations=nothing)
        assert PolicySpec.from_dict(json.loads(json.dumps(spec.to_dict()))) == spec


@pytest.mark.parametrize(
    ("rotations", "words"),
    [
        ([("euler", (1,))], "unknown rotation 'euler'"),
        ([("quaternion", (0, 1, 2))], "'quaternion' has 4 numbers"),
        ([("angle", (8,))], r"each must be in 0\.\.7"),
        ([("angle", (1,)), ("angle", (1,))], "belong to one rotation"),
    ],
)
def test_bad_rotations(rotations: list[Any], words: str) -> None:
    with pytest.raises(SpecError, match=words):
        PolicySpec(
            {"state": (3,)}, 8, 4, 1, 2, action_rotations=tuple(Rotation(*r) for r in rotations)
        )
