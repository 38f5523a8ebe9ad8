"""The bundled policies answer as they did when they were published."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest

from cmpolicy import ConsistencyPolicy

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE))
from make_bundled_actions import FILE, NAMES, inputs  # noqa: E402

EXPECTED = json.loads(FILE.read_text())


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("nfe", [1, 4])
def test_same_actions(name: str, nfe: int) -> None:
    """To 1e-5 of the range of the actions (cameras 1e-4); made by make_bundled_actions.py."""
    policy = ConsistencyPolicy.from_pretrained(name)
    assert policy.nfe == 1
    obs, noise = inputs(policy)
    found = policy.infer_plan(obs, noise, nfe=nfe)
    scale = policy.normalizer.to_arrays()["action.scale"].numpy()
    expected = np.array(EXPECTED[name][str(nfe)])
    limit = 1e-4 if policy.spec.images else 1e-5
    assert np.abs((found - expected) * scale).max() < limit
