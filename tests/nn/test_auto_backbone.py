"""Backbones of the transformers library as encoders, at tiny sizes with random weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from asking import ask

from counting_zoo import EBC, load, save
from counting_zoo.errors import InputError, WeightsError
from counting_zoo.models.clip_ebc.network import build_encoder
from counting_zoo.nn.backbones import HubBackbone

CONFIGS: dict[str, dict[str, Any]] = {
    "resnet": {"embedding_size": 8, "hidden_sizes": [8, 8, 16, 16], "depths": [1, 1, 1, 1]},
    "convnext": {"hidden_sizes": [8, 8, 16, 16], "depths": [1, 1, 1, 1]},
    "swin": {"embed_dim": 8, "depths": [1, 1, 1, 1], "num_heads": [1, 1, 2, 2], "window_size": 4, "image_size": 32},
    "dinov2": {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 28},
}


def made(kind: str, reduction: int = 8) -> Any:
    torch.manual_seed(0)
    return build_encoder({"model_type": kind, **CONFIGS[kind]}, reduction)


@pytest.mark.parametrize("kind", CONFIGS)
@pytest.mark.parametrize("reduction", [8, 16])
def test_any_image_through_a_model(kind: str, reduction: int) -> None:
    torch.manual_seed(0)
    model = EBC(
        {"model_type": kind, **CONFIGS[kind]}, reduction=reduction, max_count=4, representatives="middle"
    ).eval()
    for height, width in ((64, 96), (50, 70), (9, 130)):
        with torch.inference_mode():
            found = model(torch.rand(1, 3, height, width), ask([["people"]]))
        assert found.density.shape == (1, 1, -(-height // reduction), -(-width // reduction))
        assert torch.isfinite(found.counts).all()


@pytest.mark.parametrize("kind", CONFIGS)
def test_every_weight_that_trains_gets_a_gradient(kind: str) -> None:
    encoder = made(kind).train()
    side = 2 * encoder.multiple * (1 if encoder.multiple % 8 == 0 else 8)
    with torch.autocast("cpu", torch.bfloat16):
        found = encoder(torch.rand(2, 3, side, side))
    assert found.shape[1] == encoder.dim
    found.float().square().sum().backward()
    idle = [name for name, p in encoder.named_parameters() if p.requires_grad and p.grad is None]
    assert not idle  # or DDP would wait for them for ever


@pytest.mark.parametrize("kind", CONFIGS)
def test_a_checkpoint_needs_no_download(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made(kind).body.save_pretrained(tmp_path / "folder")
    model = EBC(f"auto:{tmp_path / 'folder'}", max_count=4, representatives="middle").eval()
    image = torch.rand(1, 3, 64, 64)
    with torch.inference_mode():
        expected = model(image, ask([["x"]])).density
    save(model, tmp_path / "a.ckpt")
    for file in (tmp_path / "folder").iterdir():
        file.unlink()
    again = load(tmp_path / "a.ckpt")
    with torch.inference_mode():
        assert torch.equal(again(image, ask([["x"]])).density, expected)


def test_folder_gives_the_weights_that_were_saved(tmp_path: Path) -> None:
    encoder = made("convnext").eval()
    encoder.body.save_pretrained(tmp_path)
    again = HubBackbone(str(tmp_path), 8).eval()
    image = torch.rand(1, 3, 64, 64)
    assert torch.equal(again(image), encoder(image))


def test_incomplete_weights_are_an_error(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    made("resnet").body.save_pretrained(tmp_path)
    state = load_file(tmp_path / "model.safetensors")
    removed = sorted(state)[0]
    save_file({k: v for k, v in state.items() if k != removed}, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(WeightsError, match=r"convolution\.weight"):
        HubBackbone(str(tmp_path), 8)


def test_what_cannot_be_had(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(WeightsError, match="auto:nobody/nothing"):
        build_encoder("auto:nobody/nothing", 8)
    (tmp_path / "empty").mkdir()
    with pytest.raises(WeightsError, match="auto:"):
        build_encoder(f"auto:{tmp_path / 'empty'}", 8)
    with pytest.raises(InputError, match="nonsense"):
        build_encoder({"model_type": "nonsense"}, 8)
    with pytest.raises(InputError, match="model_type"):
        build_encoder({"hidden_sizes": [8]}, 8)


def test_norms_that_no_classifier_has_begin_as_ones(tmp_path: Path) -> None:
    """Swin's and ConvNeXt's backbones add a norm on their feature maps."""
    from safetensors.torch import load_file, save_file

    made("convnext").body.save_pretrained(tmp_path)
    state = load_file(tmp_path / "model.safetensors")
    kept = {k: v for k, v in state.items() if "hidden_states_norms" not in k}
    assert len(kept) < len(state)
    save_file(kept, tmp_path / "model.safetensors", {"format": "pt"})
    norms = {k: v for k, v in HubBackbone(str(tmp_path), 8).state_dict().items() if "hidden_states_norms" in k}
    assert all(torch.equal(v, torch.full_like(v, float(k.endswith("weight")))) for k, v in norms.items())
