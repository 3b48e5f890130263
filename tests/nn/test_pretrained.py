"""Exported encoders: what counters start from is what was pretrained, and what does not fit is refused by name."""

from __future__ import annotations

import importlib
import json
import sys
from importlib import resources
from pathlib import Path
from typing import Any

import pytest
import tiny_clip
import torch
import yaml
from asking import ask
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tiny import run
from torch import Tensor

from counting_zoo import CLIPEBC, CLIPCount, RegionCLIPCounter, RegionCLIPPretraining, SyntheticScenes, load, save
from counting_zoo.cli import main
from counting_zoo.errors import InputError, WeightsError
from counting_zoo.nn.clip import build_towers, random_clip, random_clip_resnet
from counting_zoo.nn.clip_resnet import CLIPResNet
from counting_zoo.nn.pretrained import load_text, load_vision, read_pretrained, write_pretrained
from counting_zoo.nn.regions import FrozenBatchNorm2d, ResNetRegions, region_encoder
from counting_zoo.nn.text import TextTower, word_tokenizer
from counting_zoo.nn.vision import DenseViT, PromptedViT
from counting_zoo.quickstart import config

NAMES = tiny_clip.NAMES
KINDS: dict[str, dict[str, Any]] = {
    "vit": {"clip": tiny_clip.config()},
    "resnet": {"clip": tiny_clip.resnet_config()},
    "stem": {
        "clip": tiny_clip.config(),
        "stem": "conv",
        "labels": "boxes",
        "regions": "boxes",
        "concepts": "classes",
        "train_text": True,
        "text_pool": "words",
    },
}
each_kind = pytest.mark.parametrize("kind", KINDS)


def student(kind: str, **options: Any) -> Any:
    """In evaluation, with statistics of batch norms that are not those of new ones."""
    torch.manual_seed(3)
    model = RegionCLIPPretraining(**{**KINDS[kind], "concepts": "classes", **options})
    model.set_tokenizer(word_tokenizer(NAMES, 320))
    g = torch.Generator().manual_seed(1)
    for key, value in model.encoder.state_dict().items():
        if key.endswith(("running_mean", "running_var")):
            value.copy_(torch.rand(value.shape, generator=g) + 0.5)
    return model.eval()


@pytest.fixture(scope="module")
def exports(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("exports")
    return {kind: student(kind).export(folder / f"{kind}.safetensors") for kind in KINDS}


def images(seed: int = 0) -> Tensor:
    return torch.randn(2, 3, 64, 32, generator=torch.Generator().manual_seed(seed))


def other_clip(kind: str) -> Any:
    """The same shapes and other weights."""
    torch.manual_seed(99)
    return random_clip_resnet(tiny_clip.resnet_config()) if kind == "resnet" else random_clip(tiny_clip.config())


# -- files ------------------------------------------------------------------------------------------------------------


@each_kind
def test_files_are_in_openais_layout(kind: str, exports: dict[str, Path]) -> None:
    keys = set(load_file(exports[kind]))
    towers: Any = {"vit": tiny_clip.clip_shapes(layers=2), "resnet": tiny_clip.resnet_state()}.get(kind)
    if towers is not None:  # the fixture has a block more in its second stage
        assert keys == {k for k in towers if not k.startswith("visual.layer2.1.")}
    else:
        assert {k.split(".")[1] for k in keys if k.startswith("visual.")} == {
            "class_embedding",
            "positional_embedding",
            "ln_pre",
            "transformer",
            "proj",
            "stem",
            "lateral",
            "fuse",
        }
    with safe_open(exports[kind], framework="pt") as file:
        settings = json.loads(file.metadata()["counting_zoo"])
    assert settings.keys() == {"clip", "stem", "text_pool", "temperature", "tokenizer"}
    found = read_pretrained(exports[kind])
    assert found.settings == settings
    assert float(found.state["logit_scale"].exp()) == pytest.approx(100)
    assert all(value.dtype == torch.float32 for key, value in found.state.items() if not key.endswith("_tracked"))


def test_half_precision_is_half_the_size_and_rounds(exports: dict[str, Path], tmp_path: Path) -> None:
    model = student("vit")
    path = model.export(tmp_path / "new folder" / "half.safetensors", half=True)
    assert path.stat().st_size < 0.65 * exports["vit"].stat().st_size  # the tokenizer is not rounded
    vision = DenseViT(other_clip("vit"))
    load_vision(vision.eval(), read_pretrained(path))
    found, expected = vision(images()), DenseViT(_copy(model))(images())
    assert 0 < tiny_clip.relative(found.detach(), expected.detach()) < 5e-3
    assert list(path.parent.iterdir()) == [path]  # nothing unfinished


def _copy(model: Any) -> Any:
    """The student's CLIP, built from its own modules' weights without a file."""
    clip = other_clip("vit")
    clip.vision_model.load_state_dict(model.encoder.vision_model.state_dict())
    return clip


def test_a_file_appears_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = student("vit")
    with pytest.raises(InputError, match=r"other\.pt"):
        model.export(tmp_path / "other.pt")

    def full(*_: Any) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr("os.replace", full)
    with pytest.raises(OSError, match="no space left"):
        model.export(tmp_path / "clip.safetensors")
    assert not list(tmp_path.iterdir())


def test_files_that_are_none(tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match="no/file"):
        read_pretrained("no/file")
    (tmp_path / "broken.safetensors").write_bytes(b"\x09\0\0\0\0\0\0\0{nothing}")
    with pytest.raises(WeightsError, match=r"broken\.safetensors"):
        read_pretrained(tmp_path / "broken.safetensors")
    torch.save({"a": torch.zeros(1)}, tmp_path / "pickle.safetensors")
    with pytest.raises(WeightsError, match=r"pickle\.safetensors"):
        read_pretrained(tmp_path / "pickle.safetensors")
    save_file({"conv1.weight": torch.zeros(1)}, tmp_path / "other.safetensors")
    with pytest.raises(WeightsError, match=r"conv1\.weight"):
        read_pretrained(tmp_path / "other.safetensors")


# -- into encoders ----------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_into_dense_vit(exports: dict[str, Path]) -> None:
    """Prompts are the counter's own, and stay; without them the features are the student's."""
    model, x = student("vit"), images()
    plain = DenseViT(other_clip("vit")).eval()
    before = plain(x)
    load_vision(plain, read_pretrained(exports["vit"]))
    expected = DenseViT(_copy(model))(x)
    assert torch.equal(plain(x), expected)
    assert tiny_clip.relative(before, expected) > 0.1
    prompted = DenseViT(other_clip("vit"), prompt_width=2, prompt_depth=2)
    assert prompted.prompts is not None
    own = prompted.prompts.embeddings.clone()
    load_vision(prompted, read_pretrained(exports["vit"]))
    assert torch.equal(prompted.prompts.embeddings, own)
    assert torch.equal(prompted.model.pre_layrnorm.weight, plain.model.pre_layrnorm.weight)


@torch.no_grad()
def test_into_dense_vit_with_a_stem(exports: dict[str, Path]) -> None:
    model, x = student("stem"), images()
    vision = DenseViT(other_clip("stem"), stem="conv").eval()
    load_vision(vision, read_pretrained(exports["stem"]))
    assert torch.equal(vision(x), model.encoder(x)[0])


@torch.no_grad()
def test_into_prompted_vit(exports: dict[str, Path]) -> None:
    model, x = student("vit"), images()
    vision = PromptedViT(other_clip("vit"), n_prompts=0).eval()
    load_vision(vision, read_pretrained(exports["vit"]))
    torch.testing.assert_close(vision(x), model.encoder(x)[0])


@torch.no_grad()
def test_into_clip_resnet(exports: dict[str, Path]) -> None:
    """At either stride of its last stage; batch norms are those of the student, which were frozen."""
    model, x = student("resnet"), images()
    assert isinstance(model.encoder, ResNetRegions)
    assert any(isinstance(m, FrozenBatchNorm2d) for m in model.encoder.modules())
    for reduction in (32, 16):
        body = other_clip("resnet").image_encoder(reduction).eval()
        assert isinstance(body, CLIPResNet)
        load_vision(body, read_pretrained(exports["resnet"]))
        body.set_last_stride(2)
        torch.testing.assert_close(body(x), model.encoder.visual.layer4(model.encoder(x)[0]), rtol=1e-4, atol=1e-5)


@torch.no_grad()
@each_kind
def test_into_an_encoder_of_regions(kind: str, exports: dict[str, Path]) -> None:
    model, x = student(kind), images()
    found = student(kind, pretrained_encoder=str(exports[kind]))
    fresh = RegionCLIPPretraining(**{**KINDS[kind], "concepts": "classes", "pretrained_encoder": str(exports[kind])})
    boxes = [torch.tensor([[3.0, 4, 20, 40]]), torch.tensor([[0.0, 0, 32, 64]])]
    expected = model.encoder.pool(model.encoder(x)[0], boxes)
    fresh.eval()
    for encoder in filter(None, (fresh.encoder, fresh.teacher)):
        if encoder is fresh.encoder:
            assert torch.equal(encoder.pool(encoder(x)[0], boxes), expected)
        assert all(torch.equal(v, model.encoder.state_dict()[k]) for k, v in encoder.state_dict().items())
    assert torch.equal(fresh.text(NAMES), model.text(NAMES))  # with the tokenizer of the file
    assert fresh.hparams["pretrained_encoder"] is None
    assert torch.equal(found.text.projection.weight, model.text.projection.weight)


# -- into counters ----------------------------------------------------------------------------------------------------


def small_counter(clip: Any = None, **options: Any) -> CLIPCount:
    return tiny_clip.counter(clip, tokens=False, seed=50, n_context=0, **options)


@torch.no_grad()
def test_clip_count_starts_from_it_and_its_checkpoint_stands_alone(exports: dict[str, Path], tmp_path: Path) -> None:
    path = tmp_path / "clip.safetensors"
    path.write_bytes(exports["vit"].read_bytes())
    model, x = student("vit"), torch.rand(1, 3, 32, 32)
    counter = small_counter(pretrained_encoder=str(path), prompt_width=0, prompt_depth=0)
    assert torch.equal(counter.network.vision(x), DenseViT(_copy(model))(x))
    assert torch.equal(counter.network.text(NAMES), model.text(NAMES))
    expected = counter(x, ask([NAMES[:2]])).counts
    save(counter, tmp_path / "counter.ckpt")
    path.unlink()
    assert torch.equal(load(tmp_path / "counter.ckpt")(x, ask([NAMES[:2]])).counts, expected)
    assert load(tmp_path / "counter.ckpt").hparams["pretrained_encoder"] is None


@torch.no_grad()
@pytest.mark.parametrize("own", [{}, {"stem": "conv", "prompt_width": 0, "text_pool": "words", "interaction": "film"}])
def test_clip_count_starts_from_another_one_without_its_head(own: dict[str, Any], tmp_path: Path) -> None:
    trained = tiny_clip.counter(seed=7, n_context=0 if own else 2, **own)
    file = str(save(trained, tmp_path / "trained.ckpt"))
    counter = (
        small_counter(pretrained_encoder=file, **own)
        if own
        else tiny_clip.counter(tokens=False, seed=50, pretrained_encoder=file)
    )
    x = torch.rand(1, 3, 32, 32)
    found, expected = (model.network.embed(x, [NAMES[:2]]) for model in (counter, trained))
    assert torch.equal(found.patches, expected.patches)
    assert torch.equal(found.contrast, expected.contrast)
    assert torch.equal(found.text, expected.text)
    assert not torch.equal(
        counter(x, ask([NAMES[:2]])).counts, trained(x, ask([NAMES[:2]])).counts
    )  # a head of its own
    Path(file).unlink()
    save(counter, tmp_path / "counter.ckpt")
    assert torch.equal(load(tmp_path / "counter.ckpt")(x, ask([NAMES[:2]])).counts, counter(x, ask([NAMES[:2]])).counts)


def test_another_counter_that_does_not_fit_is_refused(tmp_path: Path) -> None:
    file = str(save(tiny_clip.counter(), tmp_path / "trained.ckpt"))
    heads = tiny_clip.config()
    heads["vision_config"] |= {"num_attention_heads": 1}
    for other in (tiny_clip.config(layers=3), heads):
        with pytest.raises(WeightsError, match=r"trained\.ckpt"):
            tiny_clip.counter(other, tokens=False, pretrained_encoder=file)
    with pytest.raises(InputError, match="text_pool"):
        small_counter(pretrained_encoder=file, text_pool="official")
    for own in ({"prompt_width": 3}, {"prompt_width": 0}, {"n_context": 0}, {"contrast": "none"}):
        with pytest.raises(WeightsError, match=r"trained\.ckpt"):
            tiny_clip.counter(tokens=False, pretrained_encoder=file, **own)
    elsewhere = str(save(student("stem"), tmp_path / "pretraining.ckpt"))
    with pytest.raises(WeightsError, match="RegionCLIPPretraining"):
        tiny_clip.counter(tokens=False, pretrained_encoder=elsewhere)


@torch.no_grad()
def test_clip_count_with_a_stem_takes_the_projection_too(exports: dict[str, Path]) -> None:
    model, x = student("stem"), torch.rand(1, 3, 32, 32)
    options: dict[str, Any] = {"stem": "conv", "text_pool": "words", "prompt_width": 0, "prompt_depth": 0}
    counter = small_counter(pretrained_encoder=str(exports["stem"]), **options)
    features = counter.network.vision(x)
    assert torch.equal(features, model.encoder(x)[0])
    for projection in (counter.network.patch_proj, counter.network.contrast_proj):
        assert projection is not None
        found = projection(features.flatten(2).transpose(1, 2))
        expected = model.encoder.visual_projection(features.flatten(2).transpose(1, 2))
        torch.testing.assert_close(found, expected)


@torch.no_grad()
@pytest.mark.parametrize("kind", ["vit", "resnet"])
def test_clip_ebc_starts_from_it(kind: str, exports: dict[str, Path], tmp_path: Path) -> None:
    model, x = student(kind), images()
    options: dict[str, Any] = {"window": 64, "representatives": "middle"}
    options |= {"visual_prompts": 0} if kind == "vit" else {}
    torch.manual_seed(50)
    counter = CLIPEBC(KINDS[kind]["clip"], pretrained_encoder=str(exports[kind]), **options).eval()
    body: Any = counter.network.encoder
    if kind == "resnet":
        assert torch.equal(body.layer1[0].conv1.weight, model.encoder.visual.layer1[0].conv1.weight)
    else:
        torch.testing.assert_close(body(x), model.encoder(x)[0])
    save(counter, tmp_path / "counter.ckpt")
    expected = counter(x, ask([["people"]] * 2)).counts
    assert torch.equal(load(tmp_path / "counter.ckpt")(x, ask([["people"]] * 2)).counts, expected)
    torch.manual_seed(50)
    without = CLIPEBC(KINDS[kind]["clip"], **options).eval()
    assert not torch.allclose(without(x, ask([["people"]] * 2)).counts, expected)


def test_clip_itself_may_be_an_export(exports: dict[str, Path]) -> None:
    """With the heads that its file says: by OpenAI's rule a width of 32 would have one."""
    model, x = student("vit"), images()
    towers: Any = build_towers(str(exports["vit"]))
    assert towers.config.vision_config.num_attention_heads == 2
    encoder = region_encoder(towers).eval()
    assert torch.equal(encoder(x)[0], model.encoder(x)[0])
    again = RegionCLIPPretraining(str(exports["vit"]), concepts="classes").eval()
    assert torch.equal(again.text(NAMES), model.text(NAMES))  # the tokenizer came along
    counter: Any = CLIPEBC(str(exports["resnet"]), window=64)
    assert torch.equal(
        counter.network.encoder.conv1.weight,
        student("resnet").encoder.visual.conv1.weight,
    )
    with pytest.raises(WeightsError, match=r"stem\.safetensors"):
        build_towers(str(exports["stem"]))


# -- what does not fit ------------------------------------------------------------------------------------------------


def wider(**vision: Any) -> dict[str, Any]:
    config = tiny_clip.config()
    return config | {"vision_config": config["vision_config"] | vision}


@pytest.mark.parametrize(
    ("kind", "clip", "said"),
    [
        ("vit", tiny_clip.config(layers=3), r"encoder\.layers\.2"),
        ("vit", tiny_clip.config(layers=1), r"encoder\.layers\.1"),
        ("vit", tiny_clip.config(image=64), "position_embedding"),
        ("vit", wider(num_attention_heads=4), "num_attention_heads"),
        ("vit", wider(hidden_act="gelu"), "hidden_act"),
        ("resnet", tiny_clip.config(), r"visual\."),
        ("stem", tiny_clip.config(), r"fuse\."),
        ("vit", tiny_clip.config(text_layers=1), r"text_model\.encoder\.layers\.1"),
    ],
)
def test_another_architecture(kind: str, clip: dict[str, Any], said: str, exports: dict[str, Path]) -> None:
    with pytest.raises(WeightsError, match=said):
        small_counter(clip, pretrained_encoder=str(exports[kind]), prompt_depth=1)


def test_another_architecture_of_other_models(exports: dict[str, Path]) -> None:
    with pytest.raises(WeightsError, match="vision_model"):
        CLIPEBC(tiny_clip.resnet_config(), pretrained_encoder=str(exports["vit"]), window=64)
    with pytest.raises(WeightsError, match=r"fuse\."):
        RegionCLIPPretraining(**KINDS["stem"] | {"pretrained_encoder": str(exports["vit"])})


def test_texts_are_read_where_they_were_trained(exports: dict[str, Path]) -> None:
    with pytest.raises(InputError, match="text_pool"):
        small_counter(pretrained_encoder=str(exports["stem"]), stem="conv")
    with pytest.raises(InputError, match="text_pool"):
        small_counter(pretrained_encoder=str(exports["vit"]), text_pool="words")


def test_words_need_their_tokenizer(exports: dict[str, Path], tmp_path: Path) -> None:
    """From a file of somebody else's: a tokenizer made of the data's names would give its ids another meaning."""
    bare = tmp_path / "bare.safetensors"
    save_file(load_file(exports["vit"]), bare)
    for build in (
        lambda **options: small_counter(**options),
        lambda **options: CLIPEBC(tiny_clip.config(), window=64, **options),
        lambda **options: RegionCLIPPretraining(tiny_clip.config(), concepts="classes", **options),
    ):
        with pytest.raises(InputError, match="tokenizer"):
            build(pretrained_encoder=str(bare))
    word_tokenizer(NAMES, 320).save_pretrained(tmp_path / "words")
    counter = small_counter(pretrained_encoder=str(bare), tokenizer=str(tmp_path / "words"))
    assert torch.equal(counter.network.text(NAMES), student("vit").text(NAMES))
    CLIPEBC(tiny_clip.config(), window=64, pretrained_encoder=str(bare), tokenizer=str(tmp_path / "words"))


def test_what_is_written_is_what_is_read(tmp_path: Path) -> None:
    """A text tower's learnable context belongs to no CLIP and is not written."""
    clip = random_clip(tiny_clip.config())
    tower = TextTower(clip, n_context=2, pool="eot", train=False)
    path = write_pretrained(tmp_path / "a.safetensors", region_encoder(clip), tower, {"note": 1}, temperature=0.07)
    found = read_pretrained(path)
    assert found.settings == {"note": 1, "text_pool": "eot", "temperature": 0.07}
    expected = {key: value for key, value in clip.state_dict().items() if key != "logit_scale"}
    assert found.state.keys() - {"logit_scale"} == expected.keys()
    assert all(torch.equal(value, found.state[key]) for key, value in expected.items())
    with pytest.raises(InputError, match="tokenizer"):
        load_text(tower, found)


# -- the command ------------------------------------------------------------------------------------------------------


def test_export_encoder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("COUNTING_ZOO_DEBUG", "1")
    monkeypatch.chdir(tmp_path)
    model = student("stem")
    save(model, "pretraining.ckpt")  # type: ignore[arg-type]
    assert run("export-encoder", "pretraining.ckpt", "clip.safetensors") == 0
    assert "clip.safetensors" in capsys.readouterr().out
    expected = load_file(model.export("direct.safetensors"))
    found = load_file("clip.safetensors")
    assert found.keys() == expected.keys()
    assert all(torch.equal(value, expected[key]) for key, value in found.items())
    assert run("export-encoder", "pretraining.ckpt", "half.safetensors", "--half") == 0
    assert load_file("half.safetensors")["visual.proj"].dtype == torch.float16
    save(tiny_clip.counter(), "counter.ckpt")
    with pytest.raises(InputError, match=r"counter\.ckpt"):
        run("export-encoder", "counter.ckpt", "x.safetensors")
    assert not Path("x.safetensors").exists()
    monkeypatch.delenv("COUNTING_ZOO_DEBUG")
    assert run("export-encoder", "nothing.ckpt", "x.safetensors") == 2
    assert "nothing.ckpt" in capsys.readouterr().err


def test_export_encoder_of_ones_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    code = "from counting_zoo import RegionCLIPPretraining\nclass Mine(RegionCLIPPretraining): pass\n"
    (tmp_path / "my_pretraining.py").write_text(code)
    monkeypatch.syspath_prepend(tmp_path)
    model = importlib.import_module("my_pretraining").Mine(**KINDS["stem"])
    model.set_tokenizer(word_tokenizer(NAMES, 320))
    save(model, tmp_path / "mine.ckpt")
    words = ["export-encoder", str(tmp_path / "mine.ckpt"), str(tmp_path / "clip.safetensors")]
    monkeypatch.delitem(sys.modules, "my_pretraining")
    assert main(words) == 2
    assert main([*words, "--allow_packages=my_pretraining"]) == 0
    assert (tmp_path / "clip.safetensors").is_file()


def test_the_small_clip_of_the_package() -> None:
    """Small, with its tokenizer and card, and it knows the words it was trained on: colours, textures and shapes."""
    folder = Path(str(resources.files("counting_zoo"))) / "weights"
    assert (folder / "small_clip.safetensors").stat().st_size <= 8e6
    assert "small_clip.safetensors" in (folder / "README.md").read_text(encoding="utf-8")
    found = read_pretrained("small")
    assert found.settings["text_pool"] == "words"
    assert found.settings["stem"] == "conv"
    recipe = config("model/region_clip_counter_small.yaml").read_text(encoding="utf-8")
    settings = yaml.safe_load(recipe)["model"]["init_args"]
    del settings["optimizer"], settings["scheduler"]
    model = RegionCLIPCounter(
        **RegionCLIPCounter.nested({**settings, "proposals": "grid", "score": "softmax", "negatives": []})
    )
    model.eval()
    scenes = SyntheticScenes(preset="easy", sizes={"train": 1, "val": 1, "test": 12})
    names = scenes.class_names("test")
    right = total = 0
    for record in scenes.records("test"):
        others = [name for name in names if name not in record.classes]
        shown = model.classify_regions(record.path, record.boxes, [*record.classes, *others])
        right += sum(label == record.classes[i] for label, i in zip(shown.labels, record.box_labels, strict=True))
        total += len(record.boxes)
    assert right > 0.6 * total  # of twelve pairs of shape and colour that it never saw
