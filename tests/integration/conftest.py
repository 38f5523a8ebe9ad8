"""Fixtures of the tests that put the parts together."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch

from cmpolicy.nn.unet1d import UNet1DConfig
from cmpolicy.normalize import Normalizer
from cmpolicy.policy.policy import ConsistencyPolicy
from cmpolicy.spec import PolicySpec

OBS = {"agent_pos": (2,), "keypoint": (9, 2)}


@pytest.fixture(scope="session")
def untrained_pusht() -> Callable[[], ConsistencyPolicy]:
    """Makes small Push-T policies, all alike, whose actions differ with observation and noise."""

    def make() -> ConsistencyPolicy:
        torch.manual_seed(0)
        rng = np.random.default_rng(0)
        arrays = {key: rng.uniform(0, 512, (64, *shape)) for key, shape in OBS.items()}
        normalizer = Normalizer.fit({**arrays, "action": rng.uniform(0, 512, (64, 2))})
        spec = PolicySpec(OBS, action_dim=2, horizon=16, n_obs_steps=2, n_action_steps=8)
        net = UNet1DConfig((8, 16), kernel_size=3, n_groups=4, time_dim=8)
        policy = ConsistencyPolicy(spec, net, normalizer)
        torch.nn.init.normal_(policy.net.head[-1].weight, std=0.3)  # type: ignore[arg-type]
        return policy.eval()

    return make
