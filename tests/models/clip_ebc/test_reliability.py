"""CLIP-EBC under the reliability battery: tiles, totals at every resolution, strange pictures, export."""

from __future__ import annotations

import importlib
import importlib.util
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from asking import ask
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.functional import avg_pool2d

from counting_zoo import CLIPEBC, EBC, Prediction
from counting_zoo.ops import resize_density


class BlockMeans(nn.Module):
    """An encoder whose blocks see nothing but themselves, so that tiles cannot change what it says."""

    dim, stride, multiple = 3, 8, 8

    def forward(self, x: Tensor) -> Tensor:
        return avg_pool2d(x, 8)


def blockwise(**options: Any) -> EBC:
    torch.manual_seed(0)
    model = EBC(encoder="vgg11", representatives="middle", **options)
    model.network.encoder = BlockMeans()
    head = torch.nn.Conv2d(3, len(model.bins), 1)
    model.network.head.logits.layers = nn.Sequential(head)
    return model.eval()


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 130), st.integers(1, 130), st.integers(1, 6), st.integers(1, 6))
def test_tiles_change_nothing(height: int, width: int, window: int, stride: int) -> None:
    """I1, for windows and strides that are any multiples of the block."""
    model = MODEL
    image = torch.rand(1, 3, height, width, generator=torch.Generator().manual_seed(height * 131 + width))
    window, stride = 8 * window, 8 * min(stride, window)
    # What lies beyond the image is black in tiles and mean grey without, so blocks that reach there may differ.
    inner = (height // 8, width // 8)
    with torch.inference_mode():
        (whole,) = model.count_images(list(image), ask([["people"]]))
        (tiled,) = model.count_images(list(image), ask([["people"]]), window=window, stride=stride)
    assert whole.density.shape == tiled.density.shape == (1, 1, -(-height // 8), -(-width // 8))
    torch.testing.assert_close(
        tiled.density[..., : inner[0], : inner[1]],
        whole.density[..., : inner[0], : inner[1]],
        rtol=1e-4,
        atol=1e-5,
    )


MODEL = blockwise()


@pytest.mark.parametrize("size", [(200, 300), (500, 700), (1, 5000), (1, 1), (33, 47)])
@pytest.mark.parametrize("window", [None, 224])
def test_any_image_is_counted_and_its_map_sums_to_the_count(size: tuple[int, int], window: int | None) -> None:
    """F7 and I2: at every output resolution."""
    torch.manual_seed(1)
    model = EBC(encoder="small", width=4, representatives="middle", window=window).eval()
    image = torch.randint(0, 256, (3, *size), dtype=torch.uint8)
    found = model.count(image, "people")
    assert isinstance(found, Prediction)
    assert torch.isfinite(found.counts).all()
    assert float(found.density.sum()) == pytest.approx(found["people"], rel=1e-5)
    for to in ((7, 5), size, (64, 96)):
        resized = resize_density(found.density, to, found.extent)
        assert float(resized.sum()) == pytest.approx(found["people"], rel=1e-5)
    assert all(((p >= 0) & (p <= torch.tensor([size[1], size[0]]))).all() for p in found.points)
    assert found.overlay().ndim == 3


@pytest.mark.parametrize("value", [0, 255, None])
def test_blank_and_noise_images_have_finite_counts(value: int | None) -> None:
    """I3."""
    model = EBC(encoder="small", width=4, representatives="middle", head="zip").eval()
    noise = torch.randint(0, 256, (3, 64, 64), dtype=torch.uint8)
    found = model.count(noise if value is None else torch.full_like(noise, value), "people")
    assert 0 <= found["people"] <= 64 * 4  # type: ignore[index]


class Density(nn.Module):
    """What leaves Python: the density alone."""

    def __init__(self, model: EBC | CLIPEBC) -> None:
        super().__init__()
        self.network = model.network

    def forward(self, image: Tensor) -> Tensor:
        return self.network(image).density


EXPORTED = {
    "small": lambda: EBC(encoder="small", width=8, representatives="middle"),
    "zip": lambda: EBC(encoder="small", width=8, head="zip", representatives="middle"),
    "vit": lambda: CLIPEBC(tiny.clip_config(), visual_prompts=2, representatives="middle", decoder=[8]),
    "resnet": lambda: CLIPEBC(tiny.resnet_config(), representatives="middle", decoder=[8]),
}


@pytest.mark.parametrize("kind", EXPORTED)
def test_export(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """I5: the same numbers outside Python for any batch and size (ONNX where installed)."""
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    network = Density(EXPORTED[kind]().eval()).eval()
    side = {name: 32 * torch.export.Dim(name, min=2, max=32) for name in ("rows", "columns")}
    free = {"image": {0: torch.export.Dim("batch", min=1, max=64), 2: side["rows"], 3: side["columns"]}}
    images = [torch.rand(*shape) for shape in ((2, 3, 64, 96), (1, 3, 96, 64), (5, 3, 128, 160))]
    with torch.no_grad():
        exported = torch.export.export(network, (images[0],), dynamic_shapes=free, strict=False)
        for image in images:
            torch.testing.assert_close(exported.module()(image), network(image), rtol=1e-4, atol=1e-6)
        if not (importlib.util.find_spec("onnxruntime") and importlib.util.find_spec("onnxscript")):
            return
        torch.onnx.export(exported, (), "model.onnx", dynamo=True)
        session = importlib.import_module("onnxruntime").InferenceSession("model.onnx")
        for image in images:
            (found,) = session.run(None, {session.get_inputs()[0].name: image.numpy()})
            torch.testing.assert_close(torch.from_numpy(found), network(image), rtol=1e-4, atol=1e-5)
