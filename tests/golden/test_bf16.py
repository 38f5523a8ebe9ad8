"""Gradients under bfloat16 autocast are those of float32, on trained networks too."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import cmpolicy
from cmpolicy import ConsistencyPolicy
from cmpolicy.experiment.data import load_training_data
from cmpolicy.experiment.train import training_loader
from cmpolicy.flow.objectives import build_objective
from cmpolicy.image.guidance import Guidance
from cmpolicy.image.model import ImageFlowModel
from cmpolicy.image.net import UNetConfig, build_net

CPU = torch.device("cpu")
B = 64


@pytest.fixture(scope="module")
def trained() -> tuple[ConsistencyPolicy, Tensor, Tensor]:
    """A trained network, normalised actions and features: neighbours on a line do end alike."""
    policy = ConsistencyPolicy.from_pretrained("pusht_scripted")
    policy.net.requires_grad_(True)
    config = cmpolicy.compose("task=pusht")
    loader = training_loader(config, load_training_data(config), policy, CPU)
    batch: Any = loader.batch(0, B)
    with torch.no_grad():
        features = policy.encode(batch["obs"])
    return policy, policy.normalizer.normalize("action", batch["action"]), features


def _cosine(net: nn.Module, loss: Any) -> float:
    """Between the gradients in float32 and under autocast of ``loss()``."""
    found = []
    for enabled in (False, True):
        net.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            value = loss()
        value.backward()
        found.append(torch.cat([p.grad.flatten() for p in net.parameters() if p.grad is not None]))
    return float(torch.cosine_similarity(*found, dim=0))


@pytest.mark.parametrize(
    ("name", "progress", "settings"),
    [
        ("dct", 0.95, {}),
        ("dct", 0.95, {"weights": "ema"}),
        ("alphaflow", 0.4, {}),
        ("alphaflow", 0.55, {}),
        ("psd", 0.9, {}),
        ("isd", 0.9, {}),
        ("isd", 0.9, {"derivative": "jvp"}),
        ("esd", 0.9, {"derivative": "jvp"}),
        ("lsd", 0.9, {"derivative": "jvp"}),
        ("imf", 0.9, {"derivative": "jvp"}),
        ("ct", 0.9, {"derivative": "jvp"}),
    ],
)
def test_policies(
    trained: tuple[ConsistencyPolicy, Tensor, Tensor],
    name: str,
    progress: float,
    settings: dict[str, Any],
) -> None:
    policy, x, features = trained
    objective = build_objective(name, **settings)
    draws = objective.draw(B, tuple(x.shape[1:]), torch.Generator().manual_seed(1), CPU)

    def loss() -> Tensor:
        held = policy.flow_map if objective.needs_ema else None
        return objective(
            policy.flow_map,
            x,
            features,
            draws,
            progress=progress,
            ema=held,
            ema_features=features if objective.needs_ema else None,
        ).loss

    assert _cosine(policy.net, loss) > 0.97


@pytest.mark.parametrize(
    ("name", "settings", "guidance"),
    [("isd", {"derivative": "jvp"}, 1.0), ("psd", {}, 1.5), ("dct", {}, 1.0)],
)
def test_images(name: str, settings: dict[str, Any], guidance: float) -> None:
    """Guided ones evaluate without gradient first: autocast may not keep those casts."""
    torch.manual_seed(0)
    widths = UNetConfig(widths=(16, 32), groups=8, embedding=32)
    net = build_net(widths, image_size=16, channels=1, n_classes=3)
    for parameter in net.parameters():
        if not parameter.any():  # the last layer begins at zero
            nn.init.normal_(parameter, std=0.05)
    model = ImageFlowModel(
        net, objective=build_objective(name, **settings), guidance=Guidance(guidance)
    )
    generator = torch.Generator().manual_seed(0)
    batch: Any = {
        "images": torch.randn(16, 1, 16, 16, generator=generator).clamp(-1, 1),
        "labels": torch.arange(16) % 3,
    }
    draws = model.draw(16, generator)
    assert _cosine(net, lambda: model(batch, draws=draws, progress=0.9, ema=model).loss) > 0.97
