"""Encoders without CLIP: names, shapes and numbers of the reference's, and where their weights come from."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from places import GOLDEN
from reference_clip_ebc import conv
from tiny_clip import fill, relative
from tiny_clip import images as made_images
from torch import Tensor
from torch.nn.functional import adaptive_avg_pool2d, interpolate, max_pool2d

from counting_zoo import EBC
from counting_zoo.errors import InputError, WeightsError
from counting_zoo.models.clip_ebc.network import NAMES, Context, build_encoder

LISTING = GOLDEN / "clip_ebc_backbones.txt"


def listed(name: str) -> dict[str, tuple[int, ...]]:
    """``backbone.*`` of a reference state dict, as ../shared/parity/clip_ebc_state_dicts.txt lists it."""
    shapes, inside = {}, False
    for line in LISTING.read_text().splitlines():
        if line.startswith("==="):
            inside = line.split()[1].rstrip(":") == name
        elif inside and line.startswith("backbone."):
            key, shape = line.split("\t")
            shapes[key.removeprefix("backbone.")] = tuple(int(n) for n in shape.strip("()").split(",") if n.strip())
    return shapes


def filled(name: str, reduction: int = 8) -> tuple[torch.nn.Module, dict[str, Tensor]]:
    encoder = build_encoder(name, reduction).eval()
    state = {k: fill(k, tuple(v.shape)) for k, v in encoder.state_dict().items()}
    encoder.load_state_dict(state)
    return encoder, state


def vgg(x: Tensor, s: dict[str, Tensor], stages: list[int]) -> Tensor:
    index = 0
    for i, n in enumerate(stages):
        if i:
            x, index = max_pool2d(x, 2), index + 1
        for _ in range(n):
            x, index = conv(x, s, f"features.{index}").relu(), index + 2
    return x


@pytest.mark.parametrize("name", ["vgg19_ae", "csrnet", "cannet"])
def test_names_and_shapes_are_the_references(name: str) -> None:
    found = {key: tuple(value.shape) for key, value in build_encoder(name, 8).state_dict().items()}
    assert found == listed(name)
    assert len(found) > 20


@pytest.mark.parametrize(
    ("name", "millions"),
    [
        ("vgg16", 14.72),
        ("vgg19", 20.03),
        ("vgg16_ae", 16.19),
        ("vgg19_ae", 21.50),
        ("csrnet", 16.26),
        ("cannet", 18.10),
    ],
)
def test_numbers_of_parameters(name: str, millions: float) -> None:
    model = EBC(name, max_count=4, representatives="middle")  # five bins
    assert sum(p.numel() for p in model.parameters()) / 1e6 == pytest.approx(millions, abs=0.006)


@pytest.mark.parametrize("name", NAMES)
def test_every_name_keeps_the_contract(name: str) -> None:
    encoder: Any = build_encoder(name, 8).eval()
    x = torch.rand(1, 3, 32, 48)
    with torch.no_grad():
        found = encoder(x)
    assert found.shape == (1, encoder.dim, 4, 6)
    assert encoder.stride == 8
    assert 32 % encoder.multiple == 0


@pytest.mark.parametrize("reduction", [8, 16, 32])
def test_vgg_upsamples_before_its_decoder(reduction: int) -> None:
    encoder, s = filled("vgg19_ae", reduction)
    x = made_images(1, 64, 96)
    features = interpolate(vgg(x, s, [2, 2, 4, 4, 4]), (64 // reduction, 96 // reduction), mode="bilinear")
    expected = conv(conv(features, s, "reg_layer.0").relu(), s, "reg_layer.2").relu()
    assert relative(encoder(x).detach(), expected) < 1e-5


@pytest.mark.parametrize("name", ["csrnet", "cannet"])
@pytest.mark.parametrize("reduction", [8, 16])
def test_csrnet_and_cannet(name: str, reduction: int) -> None:
    encoder, s = filled(name, reduction)
    x = made_images(1, 64, 96)
    f = vgg(x, s, [2, 2, 3, 3])
    if name == "cannet":
        above, below = torch.zeros_like(f), torch.zeros_like(f)
        for j, size in enumerate((1, 2, 3, 6)):
            scale = conv(adaptive_avg_pool2d(f, size), s, f"context.scales.{j}.1")
            scale = interpolate(scale, f.shape[-2:], mode="bilinear", align_corners=False)
            weight = torch.sigmoid(conv(f - scale, s, "context.weight_net"))
            above, below = above + weight * scale, below + weight
        f = conv(torch.cat([above / (below + 1e-6), f], 1), s, "context.bottleneck").relu()
    f = interpolate(f, (64 // reduction, 96 // reduction), mode="bilinear", align_corners=False)
    for i in range(0, 12, 2):
        f = conv(f, s, f"decoder.{i}", dilation=2).relu()
    assert relative(encoder(x).detach(), f) < 1e-5


def test_context_of_a_image_smaller_than_its_regions() -> None:
    assert torch.isfinite(Context(8)(torch.rand(1, 8, 1, 2))).all()


# -- weights ----------------------------------------------------------------------------------------------------------


def torchvision_file(path: Path, name: str, drop: str = "") -> dict[str, Tensor]:
    """A file in torchvision's layout, whose classifier nobody needs."""
    encoder: Any = build_encoder(name, 8)
    state = {f"features.{k}": fill(k, tuple(v.shape)) for k, v in encoder.features.state_dict().items() if k != drop}
    torch.save(state | {"classifier.0.weight": torch.zeros(2, 2)}, path)
    return state


@pytest.mark.parametrize(
    ("name", "file"),
    [
        ("vgg11", "vgg11"),
        ("vgg11_ae", "vgg11"),
        ("vgg13_bn_ae", "vgg13_bn"),
        ("csrnet", "vgg16"),
        ("csrnet_bn", "vgg16_bn"),
        ("cannet_bn", "vgg16_bn"),
    ],
)
def test_imagenet_weights_from_torchvisions_file(name: str, file: str, tmp_path: Path) -> None:
    state = torchvision_file(tmp_path / "weights.pth", file)
    encoder: Any = build_encoder(name, 8, str(tmp_path / "weights.pth"))
    for key, value in encoder.features.state_dict().items():
        assert torch.equal(value, state[f"features.{key}"]), key


def test_weights_that_do_not_fit(tmp_path: Path) -> None:
    torchvision_file(tmp_path / "a.pth", "vgg11", drop="0.bias")
    with pytest.raises(WeightsError, match=r"0\.bias"):
        build_encoder("vgg11_ae", 8, str(tmp_path / "a.pth"))
    torchvision_file(tmp_path / "b.pth", "vgg11")
    with pytest.raises(WeightsError, match="vgg16_bn"):
        build_encoder("csrnet_bn", 8, str(tmp_path / "b.pth"))
    with pytest.raises(WeightsError, match=r"c\.pth"):
        build_encoder("vgg19_ae", 8, str(tmp_path / "c.pth"))


def test_imagenet_weights_without_a_network(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    with pytest.raises(WeightsError, match=r"vgg19-dcbb9e9d\.pth"):
        build_encoder("vgg19_ae", 8, "imagenet")


def test_unknown_names_list_the_known() -> None:
    with pytest.raises(InputError, match="vgg17"):
        build_encoder("vgg17", 8)
    with pytest.raises(InputError, match="reduction"):
        build_encoder("vgg19", 0)
    with pytest.raises(InputError, match="pretrained"):
        build_encoder("auto:a/b", 8, "imagenet")
    assert math.isfinite(float(build_encoder("csrnet_bn", 8)(torch.rand(1, 3, 16, 16)).sum().detach()))
