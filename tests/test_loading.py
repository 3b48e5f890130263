"""Checkpoints: the whole recipe goes in and comes out, and nothing that is pickled runs."""

from __future__ import annotations

import os
import subprocess
import sys
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import tiny_clip
import torch
from asking import ask
from tiny_clip import NAMES, SETTINGS, counter, images, official_state, tokenize
from torch import Tensor

import counting_zoo
from counting_zoo import CLIPCount, load, load_official, save
from counting_zoo.errors import CheckpointError, InputError, WeightsError
from counting_zoo.loading import model_class, read_checkpoint

# -- the zoo's own checkpoints ----------------------------------------------------------------------------------------


def test_save_and_load_give_the_same_bits_in_a_fresh_process(tmp_path: Path) -> None:
    model = counter(
        window=64,
        stride=32,
        preprocess=counting_zoo.Preprocess("short", 64),
        prompt_template="many {}",
        interaction="film",
        default_classes=["forks"],
    )
    image = (images(1, 70, 90)[0] * 255).to(torch.uint8)
    expected = model.count(image, NAMES)
    save(model, tmp_path / "model.ckpt")
    torch.save(image, tmp_path / "image.pt")
    script = (
        "import sys, torch, counting_zoo\n"
        "torch.set_num_threads(int(sys.argv[1]))\n"
        "model = counting_zoo.load('model.ckpt')\n"
        f"found = model.count(torch.load('image.pt'), {NAMES!r})\n"
        "torch.save([found.density, found.counts, model.default_classes], 'found.pt')\n"
    )
    command = [sys.executable, "-c", script, str(torch.get_num_threads())]
    paths = os.pathsep.join([str(Path(counting_zoo.__file__).parents[1]), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(command, cwd=tmp_path, env=os.environ | {"PYTHONPATH": paths}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    density, counts, default = torch.load(tmp_path / "found.pt")
    assert torch.equal(density, expected.density)  # type: ignore[union-attr]
    assert torch.equal(counts, expected.counts)  # type: ignore[union-attr]
    assert default == ["forks"]


def test_checkpoint_is_plain_data_with_the_whole_recipe(tmp_path: Path) -> None:
    stored = torch.load(save(counter(heads=2), tmp_path / "a.ckpt"), weights_only=True)
    assert stored["counting_zoo"]["class"] == "counting_zoo.CLIPCount"
    assert stored["counting_zoo"]["recipe"]["tokenizer"].startswith("{")
    assert stored["hyper_parameters"]["network"]["heads"] == 2
    assert stored["hyper_parameters"]["clip"]["vision_config"]["patch_size"] == 16
    assert not {"optimizer", "scheduler"} & set(stored["hyper_parameters"])
    assert list(tmp_path.iterdir()) == [tmp_path / "a.ckpt"]


def test_tokenizer_and_clip_folders_are_not_needed_again(tmp_path: Path) -> None:
    folder = tmp_path / "clip"
    tiny_clip.tower().save_pretrained(folder)
    counter().network.text.tokenizer._hf.save_pretrained(folder)  # type: ignore[union-attr]
    model = counter(str(folder), tokens=False, tokenizer=str(folder))
    save(model, tmp_path / "a.ckpt")
    expected = model(images(1), ask([["pears"]])).density
    folder.rename(tmp_path / "moved")
    assert torch.equal(load(tmp_path / "a.ckpt")(images(1), ask([["pears"]])).density, expected)


def test_overrides(tmp_path: Path) -> None:
    path = save(counter(), tmp_path / "a.ckpt")
    assert load(path, window_batch_size=3).window_batch_size == 3
    with pytest.raises(CheckpointError, match="'colour'"):
        load(path, colour="red")
    other = counter()
    model = load(path, tokenizer=lambda prompts: torch.tensor([[2, 3, 300]] * len(prompts)))
    assert not torch.equal(model(images(1), ask([["pears"]])).density, other(images(1), ask([["pears"]])).density)


def damage(path: Path, **changes: Any) -> Path:
    content = torch.load(path, weights_only=True)
    torch.save({k: v for k, v in (content | changes).items() if v is not None}, path)
    return path


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"counting_zoo": None}, "counting_zoo"),
        ({"state_dict": None}, "counting_zoo"),
        ({"hyper_parameters": None}, "'hyper_parameters'"),
        ({"counting_zoo": {"version": "1"}}, "'class'"),
        ({"counting_zoo": {"class": "os.path.Model"}}, r"os\.path"),
        ({"counting_zoo": {"class": "evil.Model"}}, r"evil\.Model"),
        ({"counting_zoo": {"class": "counting_zoo.models.Later"}}, r"models\.Later"),
        ({"counting_zoo": {"class": "counting_zoo.types.Batch"}}, r"types\.Batch"),
    ],
)
def test_checkpoints_of_something_else(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    path = damage(save(counter(), tmp_path / "a.ckpt"), **changes)
    with pytest.raises(CheckpointError, match=message):
        load(path)


def test_weights_that_do_not_fit(tmp_path: Path) -> None:
    path = save(counter(), tmp_path / "a.ckpt")
    state = torch.load(path, weights_only=True)["state_dict"]
    del state["network.patch_proj.weight"]
    with pytest.raises(CheckpointError, match=r"network\.patch_proj\.weight"):
        load(damage(path, state_dict=state))


def test_model_class_imports_nothing_from_elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "evil_module.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(CheckpointError, match="evil_module"):
        model_class("evil_module.Model")
    assert not (tmp_path / "ran").exists()
    assert model_class("counting_zoo.CLIPCount") is CLIPCount


@pytest.mark.parametrize("content", [b"", b"hello, this is no checkpoint", b"\x80\x04garbage", b"PK\x03\x04garbage"])
@pytest.mark.parametrize("suffix", ["ckpt", "safetensors"])
def test_files_that_are_no_checkpoints(tmp_path: Path, content: bytes, suffix: str) -> None:
    path = tmp_path / f"a.{suffix}"
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=f"a.{suffix}"):
        read_checkpoint(path)


@pytest.mark.parametrize("kept", [0.01, 0.5, 0.9, 0.999])
def test_truncated_checkpoint(tmp_path: Path, kept: float) -> None:
    path = save(counter(), tmp_path / "a.ckpt")
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * kept)])
    with pytest.raises(CheckpointError, match=r"a\.ckpt"):
        load(path)


def test_a_tensor_is_no_checkpoint(tmp_path: Path) -> None:
    torch.save(torch.zeros(2), tmp_path / "a.ckpt")
    with pytest.raises(CheckpointError, match="Tensor"):
        load(tmp_path / "a.ckpt")


class Planted:
    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.system, (f"touch {self.marker}",)


@pytest.mark.parametrize("old_format", [False, True])
def test_pickled_code_never_runs(tmp_path: Path, old_format: bool) -> None:
    path, marker = tmp_path / "evil.ckpt", tmp_path / "ran"
    content = {"state_dict": {"w": torch.zeros(1)}, "hyper_parameters": {"x": Planted(marker)}}
    torch.save(content, path, _use_new_zipfile_serialization=not old_format)
    for attempt in (
        lambda: load(path),
        lambda: load_official("clip_count", path),
        lambda: load_official("clip_count", official_state(), SETTINGS, clip=path),
    ):
        with pytest.raises(CheckpointError, match=r"evil\.ckpt"):
            attempt()
    with pytest.raises(WeightsError):  # a folder's tokenizer.json is data
        load_official("clip_count", official_state(), SETTINGS, tokenizer=str(tmp_path))
    assert not marker.exists()
    torch.load(path, weights_only=False)
    assert marker.exists()  # the plant works


# -- the reference's checkpoints --------------------------------------------------------------------------------------


def official(source: Any, config: Any = SETTINGS, clip: Any = None) -> Tensor:
    model = load_official("clip_count", source, config, clip, tokenize)
    assert not model.training
    return model(images(1, 384, 384), ask([["cats", "hot dogs"]])).raw_density.detach()  # type: ignore[attr-defined]


@pytest.fixture(scope="module")
def expected() -> Tensor:
    return official(official_state())


def split(state: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """CLIP-Count's own tensors, and CLIP's under OpenAI's names."""
    own = {k: v for k, v in state.items() if not k.startswith("clip.")}
    return own, {k.removeprefix("clip."): v for k, v in state.items() if k.startswith("clip.")}


@pytest.mark.parametrize("prefix", ["", "model.", "module.", "model.module."])
@pytest.mark.parametrize("layout", ["bare", "lightning", "file", "bare file"])
def test_layouts(expected: Tensor, tmp_path: Path, prefix: str, layout: str) -> None:
    source: Any = {prefix + key: value for key, value in official_state().items()}
    config: Any = SETTINGS
    if layout in ("lightning", "file"):
        source, config = {"state_dict": source, "hyper_parameters": dict(SETTINGS), "epoch": 3}, None
    if layout.endswith("file"):
        torch.save(source, tmp_path / "official.ckpt")
        source = tmp_path / "official.ckpt" if prefix else str(tmp_path / "official.ckpt")
    assert torch.equal(official(source, config), expected)


@pytest.mark.parametrize("layout", ["mapping", "file", "folder", "prefixed", "folder path"])
def test_where_clip_comes_from(expected: Tensor, tmp_path: Path, layout: str) -> None:
    own, clip = split(official_state())
    source: Any = clip
    if layout == "file":
        source = tmp_path / "clip.pt"
        torch.save(clip, source)
    elif layout == "prefixed":
        source = {f"model.clip.{key}": value for key, value in clip.items()}
    elif layout.startswith("folder"):
        from counting_zoo.nn.clip import load_openai_clip

        load_openai_clip(clip).save_pretrained(tmp_path)
        source = tmp_path if layout == "folder path" else str(tmp_path)
    assert torch.equal(official(own, clip=source), expected)


def test_weights_in_the_file_win_over_clip(expected: Tensor) -> None:
    _, other = split(official_state(salt="another"))
    assert torch.equal(official(official_state(), clip=other), expected)


@pytest.mark.parametrize(
    "aliases", [("text_encoder.clip_model.",), ("img_encoder.clip.",), ("clip.", "img_encoder.vit.")]
)
def test_aliases_of_clip(expected: Tensor, aliases: tuple[str, ...]) -> None:
    own, clip = split(official_state())
    for alias in aliases:
        visual = alias.endswith("vit.")
        own |= {
            alias + (k.removeprefix("visual.") if visual else k): v
            for k, v in clip.items()
            if not visual or k.startswith("visual.")
        }
    assert torch.equal(official(own), expected)


def test_a_trained_image_tower_alone_is_joined_to_the_given_clip(expected: Tensor) -> None:
    own, clip = split(official_state())
    _, other = split(official_state(salt="another"))
    tower = {f"img_encoder.vit.{k.removeprefix('visual.')}": v for k, v in clip.items() if k.startswith("visual.")}
    text = {k: v for k, v in clip.items() if not k.startswith("visual.")}
    visual = {k: v for k, v in other.items() if k.startswith("visual.")}
    assert torch.equal(official(own | tower, clip=text | visual), expected)


def test_half_precision_weights(expected: Tensor) -> None:
    found = official({key: value.half() for key, value in official_state().items()})
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, expected, rtol=0, atol=0.02)


def test_fixed_positions_are_compared(expected: Tensor) -> None:
    from reference_clip_count import sinusoid

    table = {"patch_emb_pos_embed": sinusoid(4, 128)[None]}
    assert torch.equal(official(official_state() | table), expected)
    with pytest.raises(WeightsError, match="patch_emb_pos_embed"):
        official(official_state() | {"patch_emb_pos_embed": torch.zeros(1, 4, 128)})


@pytest.mark.parametrize(
    "key",
    [
        "fim_blocks.1.selfattn.qkv.weight",
        "density_decoder.convs.2.1.bias",
        "img_encoder.visual_prompt",
        "text_encoder.learnable_context",
        "patch_feat_proj_contrast.bias",
    ],
)
def test_missing_keys_are_listed(key: str) -> None:
    state = official_state()
    del state[key]
    with pytest.raises(WeightsError) as caught:
        official(state)
    assert key in str(caught.value)
    with pytest.raises(WeightsError) as without_tokenizer:
        load_official("clip_count", state, SETTINGS)
    assert key in str(without_tokenizer.value)


def test_missing_clip_keys_are_listed() -> None:
    state = official_state()
    del state["clip.visual.transformer.resblocks.1.mlp.c_fc.bias"]
    with pytest.raises(WeightsError, match=r"layers\.1\.mlp\.fc1\.bias"):
        official(state)


@pytest.mark.parametrize("key", ["decoder.0.weight", "fim_blocks.2.norm0.weight", "density_decoder.convs.4.0.weight"])
def test_unknown_keys_are_an_error(key: str) -> None:
    with pytest.raises(WeightsError, match=key):
        official(official_state() | {key: torch.zeros(3)})


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"decoder_head": 7}, "128"),
        ({"vpt_width": 5}, "vpt_width"),
        ({"vpt_depth": 3}, "vpt_depth"),
        ({"vpt_depth": 9}, "prompt_depth"),
        ({"coop_width": 3}, "coop_width"),
        ({"use_mixed_fim": False}, "use_mixed_fim"),
    ],
)
def test_settings_that_do_not_fit_the_weights(config: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        official(official_state(), SETTINGS | config)


def test_config_wins_over_the_file_and_heads_matter(expected: Tensor) -> None:
    source = {"state_dict": official_state(), "hyper_parameters": SETTINGS | {"decoder_head": 4}}
    assert not torch.allclose(official(source, None), expected, atol=1e-4)
    assert torch.equal(official(source, {"decoder_head": 8}), expected)


def test_warnings() -> None:
    known = {"lr": 1e-4, "exp_name": "a", "aug_prompt": True, "gpus": 1, "contrast_type": "nce"}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        official(official_state(), SETTINGS | known)
    with pytest.warns(UserWarning, match="colour"):
        official(official_state(), SETTINGS | {"colour": 3})
    with pytest.warns(UserWarning, match="decoder_head"):
        official(official_state(), {"vpt_width": 4, "vpt_depth": 2})


def test_what_is_no_reference_checkpoint() -> None:
    with pytest.raises(InputError, match="yolo"):
        load_official("yolo", {})
    with pytest.raises(CheckpointError, match="tensors"):
        load_official("clip_count", {"state_dict": {}})
    own, _ = split(official_state())
    with pytest.raises(WeightsError, match="openai/clip-vit-base-patch16"):
        load_official("clip_count", own, SETTINGS, tokenizer=tokenize)


def test_converted_model_is_an_ordinary_checkpoint(tmp_path: Path) -> None:
    image = images(1, 384, 500)[0]
    model = load_official("clip_count", official_state(), SETTINGS, tokenizer=tokenize)
    before = model.count(image, ["cats", "hot dogs"])
    again = load(save(model, tmp_path / "a.ckpt"))
    after = again.count(image, ["cats", "hot dogs"])
    assert torch.equal(before.density, after.density)  # type: ignore[union-attr]
    assert (again.window, again.stride, again.blend, again.pad) == (384, 128, "official", "official")
    with pytest.raises(InputError, match="dogs"):
        again.count(image, "dogs")
    assert load(tmp_path / "a.ckpt", tokenizer=tokenize).count(image, "dogs").counts.shape == (1,)  # type: ignore[union-attr]


def test_every_weight_of_the_reference_is_taken() -> None:
    """Each tensor that is not knowingly dropped is found again in the loaded model."""
    dropped = (
        "decoder_ln_pre",
        "decoder_norm",
        "fim_blocks.0.conv0",
        ".norm1.",
        ".attn.wq",
        ".attn.wk",
        "logit_scale",
        "visual.ln_post",
        "visual.proj",
    )
    state = official_state()
    loaded = load_official("clip_count", state, SETTINGS, tokenizer=tokenize).state_dict()
    taken = {float(v.double().sum()) for v in loaded.values()}
    for key, value in state.items():
        parts = value.chunk(3) if "in_proj" in key else [value[:-1] if "visual_prompt" in key else value]
        sums = {float(part.double().sum()) for part in parts} | {
            float(part.double().T.contiguous().sum()) for part in parts if part.ndim == 2
        }
        assert bool(sums & taken) != any(part in key for part in dropped), key
