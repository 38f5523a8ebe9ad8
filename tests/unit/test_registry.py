"""Networks and encoders are found by kind; a new one needs a class and nothing else."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from cmpolicy import ConsistencyPolicy
from cmpolicy.export.plan_map import PlanMap, example_inputs
from cmpolicy.flow.objectives import build_objective
from cmpolicy.nn.encoders.state import StateEncoder, StateEncoderConfig
from cmpolicy.nn.registry import (
    ENCODERS,
    NETS,
    encoder_config,
    net_config,
    register_encoder,
    register_net,
    to_mapping,
)
from cmpolicy.normalize import Normalizer
from cmpolicy.schema import ConfigError
from cmpolicy.spec import PolicySpec

SPEC = PolicySpec({"arm": (3,), "points": (2, 2), "grip": ()}, 2, 4, 2, 2)


@pytest.fixture
def own_kinds() -> Iterator[tuple[type[Any], type[Any]]]:
    """A network and an encoder that are not part of the package."""

    @register_net
    @dataclass(frozen=True)
    class LinearConfig:
        kind: ClassVar[str] = "linear"
        bias: bool = True

        def check_horizon(self, horizon: int) -> None:
            """Any."""

        def build(self, *, action_dim: int, feature_dim: int) -> nn.Module:
            return Linear(action_dim + 2 + feature_dim, action_dim, self.bias)

    class Linear(nn.Module):
        def __init__(self, inputs: int, outputs: int, bias: bool) -> None:
            super().__init__()
            self.layer = nn.Linear(inputs, outputs, bias)

        def forward(self, x: Tensor, t: Tensor, s: Tensor, features: Tensor) -> Tensor:
            row = torch.cat([t[:, None], s[:, None], features], dim=1)
            rows = row[:, None].expand(-1, x.shape[1], -1)
            out: Tensor = self.layer(torch.cat([x, rows], dim=-1))
            return out

    @register_encoder
    @dataclass(frozen=True)
    class NewestConfig:
        kind: ClassVar[str] = "newest"
        key: str = "arm"

        def build(self, spec: PolicySpec) -> nn.Module:
            return Newest(self.key)

    class Newest(nn.Module):
        def __init__(self, key: str) -> None:
            super().__init__()
            self.key = key
            self.feature_dim = 3

        def forward(self, obs: Mapping[str, Tensor]) -> Tensor:
            return obs[self.key][:, -1]

    yield LinearConfig, NewestConfig
    del NETS["linear"], ENCODERS["newest"]


def test_a_network_and_an_encoder_of_ones_own(
    own_kinds: tuple[type[Any], type[Any]], tmp_path: Path
) -> None:
    """They train, are saved by kind, load again and run in an export."""
    net, encoder = (kind() for kind in own_kinds)
    shapes = {**SPEC.obs, "action": (2,)}
    policy = ConsistencyPolicy(
        SPEC, net, Normalizer.identity(shapes), encoder=encoder, objective=build_objective("isd")
    )
    obs, noise = example_inputs(policy, 3)
    batch: Any = {
        "obs": dict(zip(SPEC.obs, obs, strict=True)),
        "action": noise,
        "action_is_pad": torch.zeros(3, 4, dtype=torch.bool),
    }
    policy.compute_loss(batch, progress=1.0).loss.backward()
    assert all(p.grad is not None for p in policy.parameters())

    policy.save_pretrained(tmp_path / "own")
    loaded = ConsistencyPolicy.from_pretrained(tmp_path / "own")
    assert (loaded.net_config, loaded.encoder_config) == (net, encoder)
    arrays = {key: value.numpy() for key, value in batch["obs"].items()}
    expected = policy.infer_plan(arrays, noise.numpy())
    np.testing.assert_array_equal(loaded.infer_plan(arrays, noise.numpy()), expected)
    loaded.nfe = 2
    plan = PlanMap(loaded)(obs, noise)[1]
    expected = policy.infer_plan(arrays, noise.numpy(), nfe=2)
    np.testing.assert_allclose(plan.numpy(), expected, rtol=0, atol=1e-6)


def test_unknown_kinds() -> None:
    with pytest.raises(ConfigError, match=r"unknown net\.kind 'unet'; did you mean 'unet1d'"):
        net_config({"kind": "unet"})
    with pytest.raises(ConfigError, match=r"unknown encoder\.kind 'cnn'"):
        encoder_config({"kind": "cnn"})
    with pytest.raises(ConfigError, match=r"unknown setting 'encoder\.width'"):
        encoder_config({"kind": "mlp", "width": 3})
    with pytest.raises(ConfigError, match=r"dim=0 must be at least 1"):
        encoder_config({"kind": "mlp", "dim": 0})


def test_state_encoder_reads_every_number_in_the_order_of_its_keys() -> None:
    config = StateEncoderConfig(dim=5)
    encoder = config.build(SPEC)
    assert isinstance(encoder, StateEncoder)
    assert to_mapping(config) == {"kind": "mlp", "dim": 5}
    obs = {key: torch.randn(2, 2, *shape, requires_grad=True) for key, shape in SPEC.obs.items()}
    features = encoder(dict(reversed(obs.items())))
    assert features.shape == (2, 5) == (2, encoder.feature_dim)
    features.square().sum().backward()
    for key, value in obs.items():
        assert value.grad is not None
        assert value.grad.all(), key
    rows = [
        torch.cat([obs["arm"][:, k], obs["points"][:, k].flatten(1), obs["grip"][:, k, None]], 1)
        for k in range(2)
    ]
    torch.testing.assert_close(features, encoder.mlp(torch.cat(rows, 1)))
