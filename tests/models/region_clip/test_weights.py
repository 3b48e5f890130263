"""Released weights of the RegionCLIP reference: its features come out, what is left over is named, nothing runs."""

from __future__ import annotations

import json
import os
import random
import re
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from fakes import shared_data
from places import GOLDEN
from torch import Tensor

from counting_zoo import CLIPEBC, RegionCLIPCounter, load, load_official, save
from counting_zoo.cli import main
from counting_zoo.errors import CheckpointError, InputError, WeightsError
from counting_zoo.geometry import Preprocess
from counting_zoo.models.region_clip import weights
from counting_zoo.nn.clip import random_clip_resnet, resnet_config_of_openai, to_openai
from counting_zoo.nn.pretrained import write_pretrained
from counting_zoo.nn.regions import region_embeddings

State = dict[str, Tensor]

GOLDEN_FILE = GOLDEN / "region_clip.pt"
SETTINGS = {"transformer_heads": 2, "proposals": "grid"}
#: Of a released file: one key of each kind, numbers written as N, where ``pretrain_rn50`` of the reference has them.
KINDS = {
    "backbone.convN.weight",
    "backbone.bnN.running_var",
    "backbone.layerN.N.convN.weight",
    "backbone.layerN.N.bnN.bias",
    "backbone.layerN.N.downsample.N.running_mean",
    "backbone.attnpool.positional_embedding",
    "backbone.attnpool.c_proj.weight",
    "lang_encoder.token_embedding.weight",
    "lang_encoder.positional_embedding",
    "lang_encoder.transformer.resblocks.N.attn.in_proj_bias",
    "lang_encoder.ln_final.weight",
    "lang_encoder.text_projection",
    "teacher_backbone.layerN.N.bnN.running_mean",
    "offline_backbone.fpn_lateralN.weight",
    "offline_backbone.bottom_up.resN.N.convN.norm.running_var",
    "offline_proposal_generator.rpn_head.anchor_deltas.bias",
}


def tokenize(prompts: list[str]) -> Tensor:
    """Begin, one id a word, end with the largest id, padded with 0."""
    rows = [[118, *(1 + sum(map(ord, word)) % 110 for word in p.split()), 119] for p in prompts]
    return torch.tensor([row + [0] * (16 - len(row)) for row in rows])


@pytest.fixture(scope="module")
def golden() -> dict[str, Any]:
    return torch.load(GOLDEN_FILE, weights_only=True)["pretrain"]


@pytest.fixture(scope="module")
def released(golden: dict[str, Any]) -> State:
    """As pretraining saves it: student, texts, teacher and proposal network."""
    state = {f"backbone.{k}": v for k, v in golden["student"].items()}
    state |= {f"lang_encoder.{k}": v for k, v in golden["lang_encoder"].items()}
    state |= {f"teacher_backbone.{k}": torch.full_like(v, 7.0) for k, v in golden["student"].items()}
    state["offline_backbone.fpn_lateral2.weight"] = torch.zeros(2, 2, 1, 1)
    state["offline_backbone.bottom_up.stem.conv1.norm.running_mean"] = torch.zeros(2)
    state["offline_proposal_generator.rpn_head.conv.bias"] = torch.zeros(2)
    return state


@pytest.fixture(scope="module")
def fine_tuned(released: State) -> State:
    """As fine-tuning saves it: without texts, with a predictor."""
    state = {k: v for k, v in released.items() if not k.startswith(("lang_encoder.", "teacher_"))}
    predictor: dict[str, tuple[int, ...]] = {
        "cls_score.weight": (65, 32),
        "cls_bg_score.weight": (1, 32),
        "test_cls_score.weight": (80, 32),
    }
    predictor |= {"bbox_pred.weight": (4, 32), "bbox_pred.bias": (4,)}
    return state | {f"roi_heads.box_predictor.{name}": torch.ones(shape) for name, shape in predictor.items()}


@pytest.fixture(scope="module")
def vocabulary(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A folder with a tokenizer of the sizes of the reference's small texts."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel({"<s>": 0, "</s>": 119, "?": 1}, unk_token="?"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    words.post_processor = processors.TemplateProcessing("<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 119)])
    folder = tmp_path_factory.mktemp("tokenizer")
    PreTrainedTokenizerFast(tokenizer_object=words, bos_token="<s>", eos_token="</s>").save_pretrained(folder)
    return str(folder)


def counter(source: Any, config: dict[str, Any] | None = None, clip: Any = None) -> RegionCLIPCounter:
    return load_official("region_clip", source, SETTINGS | (config or {}), clip, tokenize)  # type: ignore[return-value]


def region_features(model: RegionCLIPCounter, golden: dict[str, Any]) -> Tensor:
    """Of pictures normalised by the model itself, and padded as the reference pads its batch."""
    images = torch.zeros(3, 3, 144, 160)
    for own, image in zip(images, golden["images"], strict=True):
        x = model.network.normalised(image[None])[0]
        own[:, : x.shape[1], : x.shape[2]] = x
    with torch.no_grad():
        return region_embeddings(model.network.encoder, images, golden["boxes"])


def relative(found: Tensor, expected: Tensor) -> float:
    assert found.shape == expected.shape
    return float((found - expected).abs().max() / expected.abs().max())


# -- numbers of the reference -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("wrap", ["bare", "model", "module", "file"])
def test_a_released_checkpoint_gives_the_references_features(
    golden: dict[str, Any], released: State, tmp_path: Path, wrap: str
) -> None:
    source: Any = released
    if wrap == "module":
        source = {"model": {f"module.{k}": v for k, v in released.items()}, "iteration": 3}
    elif wrap != "bare":
        source = {"model": released, "optimizer": {"state": {}}, "iteration": 599999, "__author__": "someone"}
    if wrap == "file":
        torch.save(source, tmp_path / "released.pth")
        source = tmp_path / "released.pth"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model = counter(source)
    assert not model.training
    assert relative(region_features(model, golden), golden["region_feats"]) < 1e-4


@torch.no_grad()
def test_its_texts_are_the_references(golden: dict[str, Any], released: State) -> None:
    model = counter(released)

    def tokens(texts: list[str]) -> Tensor:
        return torch.stack([golden["tokens"][int(text)] for text in texts])

    model.set_tokenizer(tokens)
    assert relative(model.network.text(["0", "1", "2"]), golden["text_feats"]) < 1e-4
    wrong: Any = load_official(
        "region_clip", released, {"proposals": "grid"}, None, tokenize
    )  # one head of 32, where there were two
    wrong.set_tokenizer(tokens)
    assert relative(wrong.network.text(["0", "1", "2"]), golden["text_feats"]) > 1e-2


def test_batch_statistics_arrive_and_stay(released: State) -> None:
    """The reference's own loading resets them to 0 and 1 when it reads a second file."""
    model = counter(released)
    for mode in (True, False):
        own = {k: v for k, v in model.train(mode).network.encoder.state_dict().items() if ".running_" in k}
        assert len(own) == 2 * (3 + 3 * 6 + 4)
        for key, value in own.items():
            assert torch.equal(value, released[key.replace("visual.", "backbone.")]), key
    means = [v for k, v in released.items() if k.startswith("backbone.") and k.endswith(".running_mean")]
    assert all(bool(mean.any()) for mean in means)


def test_a_file_that_has_lost_its_statistics_is_warned_about(released: State) -> None:
    lost = {k: torch.zeros_like(v) if k.endswith(".running_mean") else v for k, v in released.items()}
    with pytest.warns(UserWarning, match="statistics"):
        counter(lost)


def test_zero_shot_as_the_reference_but_for_what_counting_needs(released: State) -> None:
    model = counter(released)
    assert (model.config.score, model.config.proposals, model.config.temperature) == ("softmax", "grid", 0.01)
    assert (model.config.templates, model.config.wording, model.config.ensemble) == (
        "region_clip",
        "official",
        "official",
    )
    found = model.classify_regions(torch.rand(3, 60, 80), [[0, 0, 30, 30], [10, 10, 80, 60]], ["a_b", "c, d"])
    assert found.probabilities.shape == (2, 2)
    assert bool((found.probabilities.sum(1) < 1).all())  # names of other things compete
    official = counter(released, {"score": "official", "temperature": 1.0})
    regions = official.classify_regions(torch.rand(3, 60, 80), [[0, 0, 30, 30]], ["a_b"]).probabilities
    assert 0.25 < float(regions) < 0.75  # a cosine against the zero vector's


def test_images_have_the_size_that_detectrons_rule_gives(released: State) -> None:
    preprocess = counter(released).preprocess
    assert (preprocess.interpolation, preprocess.antialias, preprocess.multiple) == ("bicubic", True, 1)
    draw = random.Random(0)
    for _ in range(300):
        height, width = draw.randint(20, 3000), draw.randint(20, 3000)
        scale = 800 / min(height, width)
        sides = [800.0, scale * width] if height < width else [scale * height, 800.0]
        if max(sides) > 1333:
            sides = [side * 1333 / max(sides) for side in sides]
        expected = [int(side + 0.5) for side in sides]
        assert list(preprocess.target_size(height, width)) == expected, (height, width)


def test_it_counts_and_its_checkpoint_counts_the_same(released: State, tmp_path: Path) -> None:
    config = {"proposals": str(tmp_path / "boxes.csv"), "negatives": ["grass"], "templates": "photo"}
    (tmp_path / "boxes.csv").write_text("image,x1,y1,x2,y2\nphoto.png,0,0,30,30\nphoto.png,40,10,80,60\n")
    torch.save({"model": released}, tmp_path / "released.pth")
    image = (torch.rand(3, 60, 80, generator=torch.Generator().manual_seed(0)) * 255).to(torch.uint8)
    from PIL import Image

    Image.fromarray(image.permute(1, 2, 0).numpy()).save(tmp_path / "photo.png")
    model = counter(tmp_path / "released.pth", config | {"threshold": 0.0})
    expected: Any = model.count(tmp_path / "photo.png", ["cat", "dog"])
    assert expected.counts.tolist() == [2.0, 2.0]  # nothing is below 0
    assert expected.boxes is not None
    torch.testing.assert_close(expected.boxes[0].sort(0).values[0], torch.tensor([0.0, 0.0, 30.0, 30.0]))
    again = load(save(model, tmp_path / "zoo.ckpt"))
    assert again.preprocess == model.preprocess
    found: Any = again.count(tmp_path / "photo.png", ["cat", "dog"])
    assert torch.equal(found.density, expected.density)
    assert all(torch.equal(a, b) for a, b in zip(found.scores, expected.scores, strict=True))


def test_convert(
    golden: dict[str, Any], released: State, vocabulary: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    torch.save({"model": released}, tmp_path / "released.pth")
    settings = tmp_path / "settings.yaml"
    settings.write_text("transformer_heads: 2\nMODEL: {ROI_HEADS: {NMS_THRESH_TEST: 0.3}}\nproposals: grid\n")
    words = ["convert", "region_clip", str(tmp_path / "released.pth"), str(tmp_path / "zoo.ckpt")]
    assert main([*words, "--config", str(settings), "--tokenizer", vocabulary]) == 0
    assert "wrote" in capsys.readouterr().out
    model = load(tmp_path / "zoo.ckpt")
    assert isinstance(model, RegionCLIPCounter)
    assert (model.config.iou_threshold, model.config.proposals) == (0.3, "grid")
    assert relative(region_features(model, golden), golden["region_feats"]) < 1e-4


def test_its_image_tower_goes_into_clip_ebc(released: State, vocabulary: str, tmp_path: Path) -> None:
    model: Any = load_official("region_clip", released, SETTINGS, tokenizer=vocabulary)
    clip = model.hparams["clip"]
    path = write_pretrained(tmp_path / "encoder.safetensors", model.network.encoder, model.network.text, {"clip": clip})
    options: dict[str, Any] = {"reduction": 32, "bins": [[0, 0], [1, None]], "representatives": [0.0, 2.0]}
    blocks: Any = CLIPEBC(clip, pretrained_encoder=str(path), **options).eval()
    images = torch.randn(1, 3, 128, 96)
    with torch.no_grad():
        expected = model.network.encoder.visual.layer4(model.network.encoder(images)[0])
        found = blocks.network.encoder(images)
    assert relative(found, expected) < 1e-5


# -- keys -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("section", "name"), [("pretrain_rn50", "resnet50"), ("pretrain_rn50x4", "resnet50x4")])
def test_all_keys_of_released_files(section: str, name: str) -> None:
    path = shared_data().parent / "parity" / "regionclip_keys.json"
    if not path.exists():
        pytest.skip(f"the reference's names are not there: {path}")
    keys = json.loads(path.read_text())[section]
    assert {re.sub(r"\d+", "N", key) for key in keys} >= KINDS
    state = {key: torch.empty(shape, device="meta") for key, shape in keys.items()}
    vision, text, has_boxes = weights._parts(state)
    assert len(vision) + len(text) == sum(key.startswith(("backbone.", "lang_encoder.")) for key in keys)
    assert not has_boxes
    config = weights._checked_config({**vision, **text}, None, "lang_encoder.")
    width = {"resnet50": 512, "resnet50x4": 640}[name]
    assert config["text_config"]["hidden_size"] == width
    assert config["text_config"]["num_attention_heads"] == width // 64
    assert weights._published(vision) == name


def test_all_keys_of_an_evaluated_file() -> None:
    path = shared_data().parent / "parity" / "regionclip_keys.json"
    if not path.exists():
        pytest.skip(f"the reference's names are not there: {path}")
    keys = json.loads(path.read_text())["zsinf_rn50"]
    vision, text, has_boxes = weights._parts({key: torch.empty(shape, device="meta") for key, shape in keys.items()})
    assert len(vision) == 284
    assert not text
    assert has_boxes


@pytest.mark.parametrize("source", ["mapping", "prefixed", "file of the reference"])
def test_texts_from_elsewhere(golden: dict[str, Any], released: State, tmp_path: Path, source: str) -> None:
    without = {k: v for k, v in released.items() if not k.startswith("lang_encoder.")}
    clip: Any = golden["lang_encoder"] | {
        "visual.conv1.weight": torch.zeros(1),
        "logit_scale": torch.tensor(4.6),
        "context_length": torch.tensor(77),
    }
    if source == "prefixed":
        clip = {f"lang_encoder.{k}": v for k, v in golden["lang_encoder"].items()}
    elif source != "mapping":
        clip = tmp_path / "pretrained.pth"
        torch.save({"model": released}, clip)
    model, expected = counter(without, clip=clip), counter(released)
    for key, value in expected.state_dict().items():
        assert torch.equal(model.state_dict()[key], value), key


def test_texts_of_openais_clip_of_the_same_sizes(released: State) -> None:
    without = {k: v for k, v in released.items() if not k.startswith("lang_encoder.")}
    with pytest.raises(WeightsError, match="lang_encoder"):
        counter(without)
    layers = {
        f"visual.layer{i}.{k}.conv1.weight": torch.zeros(1)
        for i, n in ((1, 4), (2, 6), (3, 10), (4, 6))
        for k in range(n)
    }
    assert weights._published(layers) == "resnet50x4"


def test_a_fine_tuned_file_and_its_predictor(golden: dict[str, Any], fine_tuned: State) -> None:
    with pytest.warns(UserWarning, match="bbox_pred"):
        model = counter(fine_tuned, clip=golden["lang_encoder"])
    assert relative(region_features(model, golden), golden["region_feats"]) < 1e-4


@pytest.mark.parametrize(
    "key",
    [
        "backbone.layer3.1.bn2.running_var",
        "backbone.attnpool.c_proj.bias",
        "lang_encoder.transformer.resblocks.1.attn.in_proj_weight",
        "lang_encoder.ln_final.bias",
    ],
)
def test_missing_keys_are_listed(released: State, key: str) -> None:
    other = "backbone.layer2.0.conv1.weight"
    with pytest.raises(WeightsError, match=re.escape(key)) as caught:
        counter({k: v for k, v in released.items() if k not in (key, other)})
    assert other in str(caught.value)


def test_missing_keys_that_tell_the_sizes(released: State) -> None:
    gone = ("backbone.conv3.weight", "backbone.layer4.", "lang_encoder.text_projection")
    with pytest.raises(WeightsError) as caught:
        counter({k: v for k, v in released.items() if not k.startswith(gone)})
    assert "backbone.conv3.weight, lang_encoder.text_projection, backbone.layer4.*" in str(caught.value)


@pytest.mark.parametrize(
    "key",
    [
        "backbone.layer3.7.bn2.scale",
        "backbone.fc.weight",
        "lang_encoder.extra",
        "roi_heads.keypoint_head.weight",
        "proposal_generator.rpn_head.conv.bias",
        "pixel_mean",
    ],
)
def test_unknown_keys_are_listed(released: State, key: str) -> None:
    with pytest.raises(WeightsError, match=re.escape(key)):
        counter(released | {key: torch.zeros(3)})


def test_shapes_are_listed(released: State) -> None:
    changed = {key: torch.zeros(5) for key in ("backbone.bn2.weight", "lang_encoder.ln_final.bias")}
    with pytest.raises(WeightsError, match=r"backbone\.bn2\.weight") as caught:
        counter(released | changed)
    assert "lang_encoder.ln_final.bias (5,)" in str(caught.value)


def test_a_vit_of_the_zero_shot_branch_is_refused() -> None:
    state = {
        "backbone.patch_embed.proj.weight": torch.zeros(4, 3, 16, 16),
        "lang_encoder.ln_final.bias": torch.zeros(4),
    }
    with pytest.raises(WeightsError, match=r"backbone\.conv3\.weight"):
        counter(state)


def test_counts_of_batch_norms_may_come_along(golden: dict[str, Any], released: State) -> None:
    counts = {
        k.replace("running_mean", "num_batches_tracked"): torch.tensor(5)
        for k in released
        if k.startswith("backbone.") and k.endswith("running_mean")
    }
    assert relative(region_features(counter(released | counts), golden), golden["region_feats"]) < 1e-4


def test_half_precision(golden: dict[str, Any], released: State) -> None:
    model = counter({k: v.half() for k, v in released.items()})
    assert relative(region_features(model, golden), golden["region_feats"]) < 0.01


# -- settings ---------------------------------------------------------------------------------------------------------


def test_settings_of_the_reference_and_of_the_counter(released: State) -> None:
    nested = {
        "MODEL": {
            "ROI_HEADS": {"SCORE_THRESH_TEST": 0.02, "NMS_THRESH_TEST": 0.4, "SOFT_NMS_ENABLED": True},
            "CLIP": {"CLSS_TEMP": 0.02},
        },
        "INPUT.MIN_SIZE_TEST": 400,
        "INPUT.MAX_SIZE_TEST": 600,
    }
    model = counter(released, nested | {"assign": "best"})
    assert float(model.threshold) == pytest.approx(0.02)
    assert (model.config.iou_threshold, model.config.suppression, model.config.temperature, model.config.assign) == (
        0.4,
        "soft",
        0.02,
        "best",
    )
    assert model.preprocess == Preprocess("short", 400, max_long=600, interpolation="bicubic", rounding="nearest")
    assert counter(released, {"MODEL.ROI_HEADS.SOFT_NMS_ENABLED": False}).config.suppression == "hard"
    assert counter(released, {"threshold": 0.3, **nested}).threshold == pytest.approx(0.3)  # ours win
    with pytest.warns(UserWarning, match="colour"):
        counter(released, {"SOLVER": {"IMS_PER_BATCH": 16}, "colour": 3})


def test_without_proposals_there_is_a_grid_and_a_warning(released: State) -> None:
    with pytest.warns(UserWarning, match="proposals"):
        model = load_official("region_clip", released, {"transformer_heads": 2}, tokenizer=tokenize)
    assert model.config.proposals == "grid"  # type: ignore[attr-defined]


def test_heads_that_do_not_divide_the_width(released: State) -> None:
    with pytest.raises(InputError, match="transformer_heads"):
        counter(released, {"transformer_heads": 3})


def test_peaks_only_to_be_trained(released: State) -> None:
    with pytest.raises(InputError, match="'peaks'"):
        counter(released, {"proposals": "peaks"})
    model = counter(released, {"proposals": "peaks", "score": "sigmoid"})
    assert model.network.head is not None


def test_pickled_code_never_runs(tmp_path: Path, released: State) -> None:
    class Planted:
        def __reduce__(self) -> tuple[object, tuple[str]]:
            return os.system, (f"touch {tmp_path / 'ran'}",)

    torch.save({"model": released | {"trap": Planted()}}, tmp_path / "evil.pth")
    for source, clip in ((tmp_path / "evil.pth", None), (released, tmp_path / "evil.pth")):
        with pytest.raises(CheckpointError, match=r"evil\.pth"):
            counter(source, clip=clip)
    assert not (tmp_path / "ran").exists()


def test_the_key_map_is_the_inverse_of_the_export(golden: dict[str, Any], released: State) -> None:
    """What is read under the reference's names is written under OpenAI's, value for value."""
    state = {f"visual.{k}": v for k, v in golden["student"].items()} | golden["lang_encoder"]
    config = resnet_config_of_openai(state)
    towers = weights._towers(state, 2, "lang_encoder.")
    written = to_openai(towers.state_dict())
    assert all(torch.equal(written[key], value) for key, value in state.items())
    assert set(to_openai(random_clip_resnet(config).state_dict())) == set(written)
