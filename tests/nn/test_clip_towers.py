"""A CLIP of either kind from every source there is."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import tiny_clip
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import CLIPModel

from counting_zoo.errors import InputError, WeightsError
from counting_zoo.nn import clip as nn_clip
from counting_zoo.nn.clip import (
    PUBLISHED,
    build_towers,
    load_openai_clip,
    load_openai_towers,
    random_clip,
    text_to_openai,
    tokenizer_of,
    towers_config,
)
from counting_zoo.nn.clip_resnet import CLIPResNetModel

State = dict[str, Tensor]


def vit_state() -> State:
    return {name: tiny_clip.fill(name, shape) for name, shape in tiny_clip.clip_shapes().items()}


def equal(found: nn.Module, expected: nn.Module) -> bool:
    one, other = found.state_dict(), expected.state_dict()
    return one.keys() == other.keys() and all(torch.equal(value, other[key]) for key, value in one.items())


def scripted(state: State) -> torch.jit.ScriptModule:
    """A TorchScript module whose weights have these names, as OpenAI's archives have theirs."""
    root = nn.Module()
    for key, value in state.items():
        *path, leaf = key.split(".")
        place = root
        for name in path:
            if name not in dict(place.named_children()):
                place.add_module(name, nn.Module())
            place = place.get_submodule(name)
        if value.is_floating_point():
            place.register_parameter(leaf, nn.Parameter(value))
        else:
            place.register_buffer(leaf, value)
    return torch.jit.script(root)


KINDS = {"vit": (vit_state, CLIPModel), "resnet": (tiny_clip.resnet_state, CLIPResNetModel)}


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("kind", KINDS)
def test_files_and_folders(tmp_path: Path, kind: str) -> None:
    make, expected_type = KINDS[kind]
    state = make()
    expected = load_openai_towers(state)
    assert isinstance(expected, expected_type)
    extras = {"input_resolution": torch.tensor(64), "context_length": torch.tensor(12), "vocab_size": torch.tensor(40)}
    torch.jit.save(scripted(state | extras), tmp_path / "RN50.pt")
    torch.save(state, tmp_path / "plain.pt")
    save_file({k: v.contiguous() for k, v in state.items()}, tmp_path / "plain.safetensors")
    folder = tmp_path / "folder"
    folder.mkdir()
    torch.save(state, folder / "open_clip_pytorch_model.bin")
    for source in ("RN50.pt", "plain.pt", "plain.safetensors", "folder"):
        assert equal(build_towers(tmp_path / source), expected), source
        assert equal(build_towers(str(tmp_path / source)), expected), source


def test_configs_and_models() -> None:
    vit, resnet = build_towers(tiny_clip.config()), build_towers(tiny_clip.resnet_config())
    assert isinstance(vit, CLIPModel)
    assert isinstance(resnet, CLIPResNetModel)
    for model in (vit, resnet):
        again = build_towers(towers_config(model))
        assert {k: v.shape for k, v in again.state_dict().items()} == {
            k: v.shape for k, v in model.state_dict().items()
        }
        assert build_towers(model) is model
    with pytest.raises(InputError, match="text_config"):
        build_towers({"vision_config": {}})


def test_folder_of_transformers_is_preferred(tmp_path: Path) -> None:
    clip = random_clip(tiny_clip.config())
    clip.save_pretrained(tmp_path)
    assert equal(build_towers(tmp_path), clip)
    torch.save(vit_state(), tmp_path / "open_clip_pytorch_model.bin")
    assert equal(build_towers(tmp_path), clip)
    (tmp_path / "config.json").write_text('{"architecture": "resnet50_clip"}')
    assert equal(build_towers(tmp_path), load_openai_clip(vit_state()))
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(WeightsError, match=r"config\.json"):
        build_towers(tmp_path)


@pytest.mark.parametrize(
    ("folder", "stated", "expected"),
    [
        ("some", {"quick_gelu": True}, "quick_gelu"),
        ("some", {}, "gelu"),
        ("some", None, "quick_gelu"),
        ("resnet50_clip.openai", {}, "quick_gelu"),
    ],
)
def test_activation_that_open_clip_states(tmp_path: Path, folder: str, stated: Any, expected: str) -> None:
    path = tmp_path / folder
    path.mkdir()
    torch.save(tiny_clip.resnet_state(), path / "open_clip_pytorch_model.bin")
    if stated is not None:
        (path / "open_clip_config.json").write_text(json.dumps({"model_cfg": stated}))
    for source in (path, path / "open_clip_pytorch_model.bin"):
        assert towers_config(build_towers(source))["text_config"]["hidden_act"] == expected


@pytest.mark.parametrize("leaf", ["open_clip_model.safetensors", "open_clip_pytorch_model.bin"])
@pytest.mark.parametrize("source", ["resnet50", "timm/resnet50_clip.openai"])
def test_local_cache_of_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, source: str, leaf: str) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(nn_clip, "hub_answers", lambda: pytest.fail("the cache has it"))
    repository = tmp_path / "models--timm--resnet50_clip.openai"
    snapshot = repository / "snapshots" / ("0" * 40)
    snapshot.mkdir(parents=True)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("0" * 40)
    state = tiny_clip.resnet_state()
    save = save_file if leaf.endswith(".safetensors") else torch.save
    save({k: v.contiguous() for k, v in state.items()}, snapshot / leaf)
    assert equal(build_towers(source), load_openai_towers(state))


@pytest.mark.parametrize("source", ["resnet50x64", "timm/resnet50_clip.nobody", "vit_l_14_336px"])
def test_missing_weights_are_said_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, source: str) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(nn_clip, "hub_answers", lambda: False)
    start = time.monotonic()
    with pytest.raises(WeightsError, match="huggingface-cli"):
        build_towers(source)
    assert time.monotonic() - start < 5


def test_no_source(tmp_path: Path) -> None:
    for source in ("RN50.pt", "./nowhere/RN50.pt", "resnet18"):
        with pytest.raises(WeightsError, match=source):
            build_towers(source)
    torch.save({"weight": torch.zeros(1)}, tmp_path / "other.pt")
    with pytest.raises(WeightsError, match=r"other\.pt"):
        build_towers(tmp_path / "other.pt")


def test_vit_without_its_projection() -> None:
    """What counting checkpoints leave out is absent, not random."""
    state = vit_state()
    del state["visual.proj"], state["logit_scale"]
    clip = load_openai_towers(state)
    assert clip.visual_projection is None
    assert build_towers(towers_config(clip)).visual_projection is not None  # type: ignore[union-attr]
    with pytest.raises(WeightsError, match="visual_projection"):
        load_openai_clip(state)


@pytest.mark.parametrize("kind", KINDS)
def test_text_tower_under_openais_names(kind: str) -> None:
    state = KINDS[kind][0]()
    found = text_to_openai(load_openai_towers(state))
    expected = {k: v for k, v in state.items() if not k.startswith("visual.") and k != "logit_scale"}
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[k], v) for k, v in expected.items())


def test_where_the_tokenizer_is(tmp_path: Path) -> None:
    shared = "openai/clip-vit-base-patch16"
    assert tokenizer_of("resnet50") == tokenizer_of("timm/resnet50_clip.openai") == shared
    assert tokenizer_of("vit_l_14") == "openai/clip-vit-large-patch14"
    assert tokenizer_of("somebody/clip") == "somebody/clip"
    assert tokenizer_of(tiny_clip.config()) is None
    file = tmp_path / "RN50.pt"
    file.touch()
    assert tokenizer_of(tmp_path) == tokenizer_of(str(file)) == shared
    (tmp_path / "tokenizer.json").touch()
    assert tokenizer_of(tmp_path) == tokenizer_of(str(file)) == str(tmp_path)


@pytest.mark.parametrize("name", [n for n, p in PUBLISHED.items() if isinstance(p.layers, int)])
def test_published_vits(name: str) -> None:
    """Millions of parameters of image encoder (without projection) and text tower, section 1.7 of the description."""
    expected = {
        "vit_b_16": (85.80, 63.43),
        "vit_b_32": (87.46, 63.43),
        "vit_l_14": (303.18, 123.65),
        "vit_l_14_336px": (303.51, 123.65),
    }[name]
    from transformers import CLIPConfig

    with torch.device("meta"):
        model = CLIPModel(CLIPConfig(**PUBLISHED[name].config()))
    text = [*model.text_model.parameters(), *model.text_projection.parameters()]
    found = [sum(p.numel() for p in part) / 1e6 for part in (model.vision_model.parameters(), text)]
    assert found == pytest.approx(expected, abs=0.006)
