"""Write bundled_actions.json: what the bundled policies answer to fixed observations and noise.

Run from the root of the checkout: ``python tests/golden/make_bundled_actions.py``. The numbers in
the repository were made by the code of format version 1, before the encoder left the network, and
those of all but ``lift`` and ``can`` when their present bundles were published.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from cmpolicy import ConsistencyPolicy

FILE = Path(__file__).with_name("bundled_actions.json")
NAMES = ("pusht", "pusht_scripted", "pusht_image", "lift", "can", "square")


def inputs(policy: Any, batch: int = 2) -> tuple[dict[str, Any], Any]:
    """Observations of the range of the training data, and noise, by numpy's generator alone."""
    rng = np.random.default_rng(7)
    spec, arrays = policy.spec, policy.normalizer.to_arrays()
    obs = {}
    for key in sorted(spec.obs):
        if key in spec.images:
            size = (batch, spec.n_obs_steps, *spec.obs[key])
            obs[key] = rng.integers(0, 256, size, dtype=np.uint8)
            continue
        shape = (batch, spec.n_obs_steps, *arrays[f"{key}.scale"].shape)
        unit = rng.uniform(-1, 1, shape)
        scale, offset = arrays[f"{key}.scale"].numpy(), arrays[f"{key}.offset"].numpy()
        obs[key] = ((unit - offset) / scale).astype(np.float32)
    noise = rng.standard_normal((batch, spec.horizon, spec.action_dim)).astype(np.float32)
    return obs, noise


def main() -> None:
    """One plan per policy and number of evaluations."""
    found = {}
    for name in NAMES:
        policy = ConsistencyPolicy.from_pretrained(name)
        obs, noise = inputs(policy)
        plans = {}
        for nfe in (1, 4):
            policy.nfe = nfe
            plans[str(nfe)] = np.round(policy.infer_plan(obs, noise).astype(float), 7).tolist()
        found[name] = plans
    FILE.write_text(json.dumps(found) + "\n")


if __name__ == "__main__":
    main()
