"""The protocol that drives robots is kept by the torch policy."""

import numpy as np

from cmpolicy import ConsistencyPolicy
from cmpolicy.nn.unet1d import UNet1DConfig
from cmpolicy.normalize import Normalizer
from cmpolicy.robot.policy import ChunkPolicy
from cmpolicy.spec import PolicySpec


def test_consistency_policy_is_a_chunk_policy() -> None:
    spec = PolicySpec({"state": (3,)}, action_dim=2, horizon=8, n_obs_steps=2, n_action_steps=4)
    rng = np.random.default_rng(0)
    normalizer = Normalizer.fit({"state": rng.random((8, 3)), "action": rng.random((8, 2))})
    net = UNet1DConfig((8, 16), kernel_size=3, n_groups=4, time_dim=8)
    assert isinstance(ConsistencyPolicy(spec, net, normalizer), ChunkPolicy)
    assert not isinstance(spec, ChunkPolicy)
