"""Crops, augmentation and spatial softmax in closed form; encoders of cameras in a policy."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import numpy as np
import pytest
import torch
from torch import nn

from cmpolicy.nn.encoders.image import (
    Backbone,
    CompactEncoderConfig,
    ImageEncoder,
    ImageEncoderConfig,
    ResNet18EncoderConfig,
    SpatialSoftmax,
    centre_crop,
    crop_windows,
)
from cmpolicy.nn.encoders.state import StateEncoderConfig
from cmpolicy.nn.registry import encoder_config, to_mapping
from cmpolicy.nn.unet1d import UNet1DConfig
from cmpolicy.normalize import Normalizer
from cmpolicy.policy.policy import ConsistencyPolicy
from cmpolicy.spec import PolicySpec

OBS = {"top": (32, 40, 3), "arm": (2,), "wrist": (24, 24, 3)}
SPEC = PolicySpec(
    OBS, action_dim=2, horizon=8, n_obs_steps=2, n_action_steps=4, images=("top", "wrist")
)


def _obs(batch: int = 3, seed: int = 0) -> dict[str, torch.Tensor]:
    torch.manual_seed(seed)
    return {
        key: torch.randint(256, (batch, 2, *shape), dtype=torch.uint8)
        if key in SPEC.images
        else torch.randn(batch, 2, *shape)
        for key, shape in OBS.items()
    }


def test_crop_of_every_window_is_where_its_numbers_say() -> None:
    frames = _obs(64)["top"]
    corner = torch.stack([torch.randint(5, (64,)), torch.randint(6, (64,))], dim=-1)
    corner[0], corner[1] = 0, torch.tensor([4, 5])  # the very corners
    found = crop_windows(frames, corner, 28, 35)
    assert found.shape == (64, 2, 28, 35, 3)
    for b in range(64):
        top, left = corner[b].tolist()
        assert torch.equal(found[b], frames[b, :, top : top + 28, left : left + 35])
    assert torch.equal(found[1], frames[1, :, 4:, 5:])


def test_centre_crop() -> None:
    frames = _obs()["top"]
    assert torch.equal(centre_crop(frames, 28, 36), frames[..., 2:30, 2:38, :])
    assert torch.equal(centre_crop(frames, 32, 40), frames)


def test_view_in_inference_and_training() -> None:
    encoder = CompactEncoderConfig(crop=0.75, jitter=0.4).build(SPEC)
    frames = _obs()["top"]
    plain, middle = encoder.view(0, frames)
    assert torch.equal(plain, centre_crop(frames, 24, 30).float() / 127.5 - 1)
    assert torch.equal(middle, torch.zeros(1, 2))
    same = torch.full((3, 4), 0.5)  # no change of brightness and contrast
    found, middle = encoder.view(0, frames, same)
    torch.testing.assert_close(found, plain, rtol=0, atol=1e-6)
    assert torch.equal(middle, torch.zeros(3, 2))
    brighter, _ = encoder.view(0, frames, torch.tensor([[0.5, 0.5, 1.0, 0.5]] * 3))
    torch.testing.assert_close(brighter, plain + 0.4, rtol=0, atol=1e-6)
    contrast, _ = encoder.view(0, frames, torch.tensor([[0.5, 0.5, 0.5, 1.0]] * 3))
    mean = plain.mean(dim=(1, 2, 3, 4), keepdim=True)
    torch.testing.assert_close(contrast, (plain - mean) * 1.4 + mean, rtol=0, atol=1e-5)


def test_random_crops_say_where_they_are() -> None:
    encoder = CompactEncoderConfig(crop=0.75).build(SPEC)
    frames = _obs()["top"]  # 32 x 40, seen 24 x 30
    place = torch.tensor([[0.0, 0.0], [0.5, 0.5], [1 - 2**-24, 1 - 2**-24]])
    augment = torch.cat([place, torch.full((3, 2), 0.5)], dim=1)
    found, middle = encoder.view(0, frames, augment)
    assert torch.equal(found[2], frames[2, :, 8:, 10:].float() / 127.5 - 1)
    expected = torch.tensor([[-4 / 16, -5 / 20], [0, 0], [4 / 16, 5 / 20]])
    torch.testing.assert_close(middle, expected)


def test_spatial_softmax_finds_a_peak() -> None:
    layer = SpatialSoftmax(1, 2, stride=8)
    with torch.no_grad():
        layer.maps.weight.copy_(torch.tensor([100.0, 0]).view(2, 1, 1, 1))
        layer.maps.bias.zero_()  # type: ignore[union-attr]
    x = torch.zeros(3, 1, 5, 9)
    for n, (row, column) in enumerate([(0, 8), (2, 4), (4, 0)]):
        x[n, 0, row, column] = 1
    found = layer(x, (64, 128))  # in halves of the frame: 32 and 64 pixels
    expected = torch.tensor([[-16 / 32, 32 / 64], [0, 0], [16 / 32, -32 / 64]])
    torch.testing.assert_close(found[:, 0], expected)
    torch.testing.assert_close(found[:, 1], torch.zeros(3, 2))  # active all over: the middle


def test_places_keep_single_precision_under_bf16() -> None:
    """bf16 knows no place between 0.5 and 0.504 of half the frame."""
    layer = SpatialSoftmax(1, 1, stride=8)
    layer.maps.weight.data.fill_(1)
    layer.maps.bias.data.zero_()  # type: ignore[union-attr]
    x = torch.zeros(1, 1, 4, 4)
    x[0, 0, 1, 2] = 6
    camera = (
        CompactEncoderConfig(width=8)
        .build(PolicySpec({"top": (64, 64, 3)}, 1, 8, 1, 4, images=("top",)))
        .cameras[0]
    )
    frames = torch.rand(1, 1, 56, 56, 3)
    place = torch.tensor([[0.5, 0.5]])

    def moved() -> torch.Tensor:
        return camera(frames, place + 1e-3, (64, 64)) - camera(frames, place, (64, 64))

    exact, exact_move = layer(x, (64, 64)), moved()
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(layer(x, (64, 64)), exact)
        torch.testing.assert_close(moved(), exact_move, rtol=0.05, atol=1e-5)


def test_features_do_not_depend_on_where_the_crop_was() -> None:
    """A dot on plain ground; moves of the crop by whole cells, so the network sees the same."""
    spec = PolicySpec({"top": (64, 64, 3)}, 2, 8, 1, 4, images=("top",))
    torch.manual_seed(0)
    encoder = CompactEncoderConfig(width=8, crop=0.75).build(spec)
    encoder.cameras[0].backbone = nn.MaxPool2d(8)
    encoder.cameras[0].softmax.maps = nn.Conv2d(3, 32, 1)
    encoder.cameras[0].softmax.maps.weight.data.fill_(30)  # sharp: the dot alone counts
    encoder.cameras[0].out = nn.Linear(64 + 3, 64)
    frames = torch.full((2, 1, 64, 64, 3), 99, dtype=torch.uint8)
    frames[:, 0, 24:32, 32:40] = 255
    augment = torch.tensor([[0.01, 0.01, 0.5, 0.5], [0.5, 0.99, 0.5, 0.5]])  # by (0, 0) and (8, 16)
    features = encoder({"top": frames}, augment)
    torch.testing.assert_close(features[0], features[1])
    assert features[0].abs().max() > 0.1


@pytest.mark.parametrize(
    "config", [CompactEncoderConfig(width=8, camera_dim=5, dim=7), ResNet18EncoderConfig(7, 5)]
)
def test_features_of_cameras_and_numbers(config: ImageEncoderConfig) -> None:
    torch.manual_seed(0)
    encoder = config.build(SPEC).eval()
    assert encoder.feature_dim == 2 * 2 * 5 + 7
    assert encoder.n_augment == 8
    assert encoder_config(to_mapping(config)) == config
    obs = _obs()
    features = encoder(obs)
    assert features.shape == (3, encoder.feature_dim)
    # each frame and number matters to its own features alone
    changed = {key: value.clone() for key, value in obs.items()}
    changed["wrist"][:, 0] = 255 - changed["wrist"][:, 0]
    moved = (encoder(changed) - features).abs().amax(0)
    assert (moved[:17] == 0).all()
    assert moved[17:22].max() > 0
    assert (moved[22:] == 0).all()
    # rows do not know of each other, and training sees other crops than inference
    torch.testing.assert_close(encoder({k: v[1:2] for k, v in obs.items()}), features[1:2])
    assert not torch.allclose(encoder(obs, torch.zeros(3, 8)), features)
    encoder(obs, torch.rand(3, 8)).square().mean().backward()
    assert all(p.grad is not None for p in encoder.parameters())
    assert sum(p.grad.abs().max() > 0 for p in encoder.parameters()) > 0.9 * len(  # type: ignore[union-attr]
        list(encoder.parameters())
    )


def test_shared_network_of_cameras_of_different_size() -> None:
    encoder = CompactEncoderConfig(width=8, shared=True).build(SPEC)
    assert len(encoder.cameras) == 1
    assert encoder(_obs()).shape == (3, encoder.feature_dim)


def test_compact_encoder_is_small() -> None:
    spec = PolicySpec({"top": (96, 96, 3)}, 2, 16, 2, 8, images=("top",))
    encoder = CompactEncoderConfig().build(spec)
    assert sum(p.numel() for p in encoder.parameters()) < 1_000_000
    assert encoder.crops == [(84, 84)]


def test_half_precision_weights() -> None:
    encoder = CompactEncoderConfig(width=8).build(SPEC).to(torch.bfloat16)
    obs = {k: v if v.dtype == torch.uint8 else v.bfloat16() for k, v in _obs().items()}
    assert torch.isfinite(encoder(obs)).all()


def test_a_backbone_of_ones_own_is_a_class() -> None:
    @dataclass(frozen=True)
    class Mean(ImageEncoderConfig):
        kind: ClassVar[str] = "mean"

        def backbone(self) -> Backbone:
            return Backbone(nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Conv2d(3, 64, 1)), 64, 1)

    assert Mean().build(SPEC)(_obs()).shape == (3, 4 * 64 + 64)


def test_bad_settings() -> None:
    with pytest.raises(ValueError, match=r"crop=0.5 sees less than 60% .* small_crop=true"):
        CompactEncoderConfig(crop=0.5)
    assert CompactEncoderConfig(crop=0.5, small_crop=True).crop == 0.5
    for wrong in ({"crop": 1.5}, {"jitter": 1.0}, {"camera_dim": 0}, {"width": 12}, {"blocks": 0}):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            CompactEncoderConfig(**wrong)  # type: ignore[arg-type]
    numbers = PolicySpec({"arm": (2,)}, 2, 8, 2, 4)
    with pytest.raises(ValueError, match=r"no camera frames .* choose encoder=mlp"):
        CompactEncoderConfig().build(numbers)
    with pytest.raises(ValueError, match=r"mlp takes no camera frames.* encoder=compact"):
        StateEncoderConfig().build(SPEC)


def test_pretrained_weights_that_cannot_be_had(
    monkeypatch: pytest.MonkeyPatch, tmp_path: object
) -> None:
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setenv("https_proxy", "http://127.0.0.1:9")
    with pytest.raises(ValueError, match=r"ImageNet weights.*checkpoints.*pretrained=false"):
        ResNet18EncoderConfig(pretrained=True).build(SPEC)


def test_encoder_is_an_image_encoder() -> None:
    assert isinstance(ResNet18EncoderConfig().build(SPEC), ImageEncoder)
    assert np.prod(OBS["top"]) == 3840


def test_a_bundle_with_pretrained_weights_downloads_nothing(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """A robot without a network loads it: the weights are in the bundle."""
    spec = PolicySpec({"top": (32, 32, 3)}, 2, 8, 1, 4, images=("top",))
    normalizer = Normalizer.identity({"action": (2,)})
    net = UNet1DConfig((8, 16), kernel_size=3, n_groups=4, time_dim=8)
    policy = ConsistencyPolicy(spec, net, normalizer, encoder=ResNet18EncoderConfig(camera_dim=4))
    policy.encoder_config = ResNet18EncoderConfig(camera_dim=4, pretrained=True)
    policy.save_pretrained(tmp_path / "bundle")
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setenv("https_proxy", "http://127.0.0.1:9")
    loaded = ConsistencyPolicy.from_pretrained(tmp_path / "bundle")
    obs = {"top": np.full((1, 1, 32, 32, 3), 9, np.uint8)}
    noise = np.zeros((1, 8, 2), np.float32)
    assert np.array_equal(loaded.infer(obs, noise), policy.eval().infer(obs, noise))
