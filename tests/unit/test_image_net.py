"""Image networks: shapes, what they are told, forward derivatives, and sizes that do not fit."""

from typing import Any

import pytest
import torch
from torch import Tensor

from cmpolicy.flow.flow_map import FlowMap, derivative_difference, derivative_jvp
from cmpolicy.flow.path import get_path
from cmpolicy.image.net import DiTConfig, ImageNet, UNetConfig, build_net, net_config

UNET: dict[str, Any] = {"widths": (8, 16), "groups": 4, "embedding": 16, "head_dim": 8}
DIT: dict[str, Any] = {"width": 16, "depth": 2, "heads": 2}
CONFIGS = {
    "unet": UNetConfig(**UNET),
    "unet attention": UNetConfig(**UNET, attention_levels=(1,), attention="plain"),
    "dit": DiTConfig(**DIT, attention="plain"),
}


def make(config: UNetConfig | DiTConfig, channels: int = 1, size: int = 8) -> ImageNet:
    """A network with random weights everywhere, also where it starts at zero."""
    torch.manual_seed(0)
    net = build_net(config, image_size=size, channels=channels, n_classes=3)
    for parameter in net.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return net.eval()


def inputs(channels: int = 1, n: int = 4) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(n, channels, 8, 8, generator=generator)
    t = torch.rand(n, generator=generator) * 0.5 + 0.5
    return x, t, t * 0.5, torch.arange(n) % 3


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("channels", [1, 3])
def test_each_sample_is_told_its_times_and_its_class(name: str, channels: int) -> None:
    net = make(CONFIGS[name], channels)
    x, t, s, label = inputs(channels)
    with torch.no_grad():
        output = net(x, t, s, label)
        assert output.shape == x.shape
        assert net.image_shape == (channels, 8, 8)
        for changed in ((x, t * 0.9, s, label), (x, t, s * 0.5, label), (x, t, s, 2 - label)):
            other = net(*changed)
            assert not torch.allclose(other[0], output[0], atol=1e-4)
        # a change of one sample changes no other
        label2 = label.clone()
        label2[1] = 0
        other = net(x, t, s, label2)
        torch.testing.assert_close(other[[0, 2, 3]], output[[0, 2, 3]], rtol=1e-5, atol=1e-5)
        assert not torch.allclose(other[1], output[1], atol=1e-4)
        # no label is the label n_classes
        torch.testing.assert_close(net(x, t, s), net(x, t, s, torch.full_like(label, 3)))


@pytest.mark.parametrize("name", CONFIGS)
def test_a_fresh_network_predicts_zero_and_learns(name: str) -> None:
    net = build_net(CONFIGS[name], image_size=8, channels=1, n_classes=3)
    x, t, s, label = inputs()
    output = net(x, t, s, label)
    assert torch.equal(output, torch.zeros_like(x))
    (output - x).square().mean().backward()
    assert any(p.grad is not None and p.grad.abs().sum() > 0 for p in net.parameters())


def test_a_fresh_network_tells_classes_apart_as_it_tells_times_apart() -> None:
    # where classes count for little at first, thousands of steps pass before they are learned
    torch.manual_seed(0)
    net = build_net(CONFIGS["unet"], image_size=8, channels=1, n_classes=10)
    t = torch.linspace(0, 1, 100)
    spread_of_times = net.times(t, 0.5 * t).std(dim=0).mean()
    assert net.classes.weight.std(dim=0).mean() > spread_of_times


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("path", ["linear", "trigonometric"])
def test_forward_mode_and_difference_agree(name: str, path: str) -> None:
    flow_map = FlowMap(make(CONFIGS[name]).double(), get_path(path))
    x, t, s, label = (a.double() if a.is_floating_point() else a for a in inputs())
    t = t * 0.9  # away from the end, where the difference is one-sided
    u = torch.randn(x.shape, generator=torch.Generator().manual_seed(2), dtype=x.dtype)
    exact = derivative_jvp(flow_map, x, t, s, label, u)
    errors = [
        (derivative_difference(flow_map, x, t, s, label, u, epsilon) - exact).abs().max()
        for epsilon in (2e-3, 1e-3)
    ]
    assert errors[1] < 1e-3 * exact.abs().max()
    assert errors[1] < 0.3 * errors[0]  # O(e^2)


@pytest.mark.parametrize("config", [UNetConfig(**UNET, attention_levels=(1,)), DiTConfig(**DIT)])
def test_attention_kernels_agree_and_only_the_plain_one_differentiates_forward(
    config: UNetConfig | DiTConfig,
) -> None:
    fused = make(config)
    settings = {**fused.config["net"], "attention": "plain"}
    plain = make(net_config(settings))
    x, t, s, label = inputs()
    with torch.no_grad():
        torch.testing.assert_close(
            fused(x, t, s, label), plain(x, t, s, label), rtol=1e-4, atol=1e-4
        )
    assert plain.net_config.differentiates_forward
    assert not fused.net_config.differentiates_forward
    assert UNetConfig(**UNET).differentiates_forward


@pytest.mark.parametrize(
    ("settings", "size", "message"),
    [
        ({"kind": "resnet"}, 8, "net.kind='resnet' is not one of ['dit', 'unet']"),
        ({"kind": "unet", "depth": 3}, 8, "depth"),
        ({"kind": "unet", "widths": [12, 16]}, 8, "net.widths=[12, 16] must be at least one"),
        ({"kind": "unet", "widths": []}, 8, "net.widths=[] must be at least one"),
        ({"kind": "unet", "blocks": 0}, 8, "net.blocks=0 must be at least 1"),
        ({"kind": "unet", "widths": [8, 8, 8, 8]}, 12, "halves the image 3 times, which 12 pixels"),
        ({"kind": "unet", "attention_levels": [2]}, 8, "there is no resolution 2; net.widths"),
        (
            {"kind": "unet", "attention_levels": [1], "head_dim": 24},
            8,
            "multiple of net.head_dim=24",
        ),
        ({"kind": "unet", "embedding": 30}, 8, "time_dim=30 must be a multiple of 4"),
        ({"kind": "unet", "attention": "flash"}, 8, "net.attention='flash' is not one of fused"),
        ({"kind": "dit", "width": 24, "heads": 5}, 8, "must be a multiple of net.heads=5"),
        ({"kind": "dit", "depth": 0}, 8, "net.depth=0 must be at least 1"),
        ({"kind": "dit", "patch_size": 3}, 8, "net.patch_size=3 does not divide an image of 8"),
    ],
)
def test_sizes_that_do_not_fit(settings: dict[str, Any], size: int, message: str) -> None:
    with pytest.raises(ValueError) as caught:  # noqa: PT011  the message is what is tested
        build_net(net_config(settings), image_size=size, channels=1, n_classes=2)
    assert message in str(caught.value)


def test_a_network_without_classes() -> None:
    with pytest.raises(ValueError, match="a network needs classes and channels"):
        build_net(UNetConfig(**UNET), image_size=8, channels=1, n_classes=0)
