"""Boxes from anywhere: drawn, on a grid, from files, from detectors, and from tiles of crowded pictures."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from counting_zoo.errors import InputError, WeightsError
from counting_zoo.models.region_clip.proposals import (
    DetrProposals,
    FileProposals,
    GridProposals,
    Owlv2Proposals,
    Proposed,
    kept_inside,
    proposal_source,
    random_boxes,
    tiled,
)


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def made_image(height: int = 40, width: int = 60, seed: int = 0) -> Tensor:
    return torch.randint(256, (3, height, width), dtype=torch.uint8, generator=seeded(seed))


def is_sound(found: Proposed, size: tuple[int, int]) -> bool:
    """The contract: inside the image, none empty, float32, scores in [0, 1]."""
    boxes, scores = found.boxes, found.scores
    limit = torch.tensor([size[1], size[0], size[1], size[0]])
    return (
        boxes.dtype == scores.dtype == torch.float32
        and boxes.shape == (len(scores), 4)
        and bool(((boxes >= 0) & (boxes <= limit)).all() and (boxes[:, 2:] > boxes[:, :2]).all())
        and bool(((scores >= 0) & (scores <= 1)).all())
    )


# -- drawn, and on a grid ---------------------------------------------------------------------------------------------


@settings(max_examples=30, deadline=None)
@given(
    height=st.integers(1, 70),
    width=st.integers(1, 70),
    grid=st.integers(1, 20),
    shortest=st.integers(1, 40),
    seed=st.integers(0, 99),
)
def test_random_boxes(height: int, width: int, grid: int, shortest: int, seed: int) -> None:
    options = {"grid": grid, "min_side": shortest}
    boxes = random_boxes((height, width), 50, seeded(seed), **options)
    assert is_sound(Proposed(boxes, torch.ones(50), False), (height, width))
    assert torch.equal(boxes, random_boxes((height, width), 50, seeded(seed), **options))
    sides = boxes[:, 2:] - boxes[:, :2]
    for axis, length in enumerate((width, height)):
        assert (sides[:, axis] >= min(shortest, length)).all()
        if length >= 2 * max(grid, shortest):
            assert (boxes[:, axis::2] % grid == 0).all()


def test_every_span_is_as_likely() -> None:
    """All pairs of lines, also those at both borders, none twice as often as another."""
    boxes = random_boxes((32, 50), 20000, seeded(), grid=8, min_side=16)
    spans = Counter(map(tuple, boxes[:, 1::2].tolist()))
    assert set(spans) == {(0, 16), (0, 24), (0, 32), (8, 24), (8, 32), (16, 32)}
    assert max(abs(n - 20000 / 6) for n in spans.values()) < 5 * math.sqrt(20000 / 6)
    assert boxes[:, 2].max() == 48


def test_grid_against_a_loop() -> None:
    found = GridProposals(sizes=[8, 20], ratios=[1.0, 4.0], step=0.5)([made_image(20, 30)], ["a"])[0]
    expected = []
    for high, wide in [(8, 8), (16, 4), (20, 20), (20, 10)]:  # the last is 40 x 10, in a image 20 high
        rows, columns = math.ceil((20 - high) / (high / 2)) + 1, math.ceil((30 - wide) / (wide / 2)) + 1
        for i in range(rows):
            for j in range(columns):
                y, x = (
                    (side - own) * k / max(n - 1, 1)
                    for side, own, k, n in ((20, high, i, rows), (30, wide, j, columns))
                )
                expected.append([x, y, x + wide, y + high])
    torch.testing.assert_close(found.boxes, torch.tensor(expected))
    assert is_sound(found, (20, 30))
    assert not found.saturated


@pytest.mark.parametrize("size", [(1, 1), (5, 300), (384, 550)])
def test_default_grid(size: tuple[int, int]) -> None:
    found = GridProposals()([made_image(*size)], ["a"])[0]
    assert is_sound(found, size)
    assert len(found.boxes.unique(dim=0)) == len(found.boxes)
    if size == (1, 1):
        assert found.boxes.tolist() == [[0, 0, 1, 1]]
    if size == (384, 550):
        assert 25_000 < len(found.boxes) < 36_000  # the specification counts 30,768 at this size or so
    found.boxes.zero_()  # nobody else's
    assert is_sound(GridProposals()([made_image(*size)], ["a"])[0], size)


# -- files ------------------------------------------------------------------------------------------------------------


def written(path: Path, content: Any) -> Path:
    path.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
    return path


def result(image_id: Any, bbox: Any, **more: Any) -> dict[str, Any]:
    return {"image_id": image_id, "category_id": 1, "bbox": bbox, **more}


RESULTS = [
    result(42, [1, 2, 10, 20], score=0.5),
    result(7, [0, 0, 5, 5], score=1.0),
    result(42, [30, 10, 4, 4], score=0.25),
]
ANNOTATION = {
    "images": [
        {"id": 1, "file_name": "a/x.jpg", "width": 120, "height": 80},
        {"id": 2, "file_name": "b/x.jpg"},
        {"id": 3, "file_name": "a/y.png"},
        {"id": 4, "file_name": "empty.png"},
    ],
    "annotations": [
        result(1, [20, 40, 40, 20]),
        result(2, [1, 1, 2, 2]),
        result(3, [3, 3, 3, 3]),
        result(3, [0, 0, 60, 40], iscrowd=1),
    ],
}


def test_results_by_number(tmp_path: Path) -> None:
    source = FileProposals(written(tmp_path / "r.json", RESULTS))
    for name in ("42", "val2014/COCO_val2014_000000000042.jpg", "000000000042.jpg", "42.png"):
        found = source([made_image()], [name])[0]
        assert found.boxes.tolist() == [[1, 2, 11, 22], [30, 10, 34, 14]]
        assert found.scores.tolist() == [0.5, 0.25]
        assert is_sound(found, (40, 60))
        assert not found.saturated
    for name in ("img_42.jpg", "8.jpg"):
        with pytest.raises(InputError, match=name):
            source([made_image()], [name])
    empty = FileProposals(tmp_path / "r.json", missing="empty")([made_image()], ["8.jpg"])[0]
    assert is_sound(empty, (40, 60))
    assert len(empty.boxes) == 0


def test_annotation_by_name_and_its_scale(tmp_path: Path) -> None:
    path = written(tmp_path / "a.json", ANNOTATION)
    with pytest.warns(UserWarning, match="iscrowd"):
        source = FileProposals(path)
    half = [[10, 20, 30, 30]]  # the file says 120 x 80
    assert source([made_image()], ["a/x.jpg"])[0].boxes.tolist() == half
    assert source([made_image()], ["/data/a/x.jpg"], [(80, 120)])[0].boxes.tolist() == half
    assert source([made_image()], ["a/x.jpg"], [(800, 1200)])[0].boxes.tolist() == half
    assert source([made_image()], ["b/x.jpg"])[0].boxes.tolist() == [[1, 1, 3, 3]]
    assert source([made_image()], ["b/x.jpg"], [(80, 30)])[0].boxes.tolist() == [[2, 0.5, 6, 1.5]]
    assert source([made_image()], ["y.png"])[0].boxes.tolist() == [[3, 3, 6, 6]]  # its crowd is left out
    assert source([made_image()], ["a\\y.jpeg"])[0].boxes.tolist() == [[3, 3, 6, 6]]  # by its stem
    assert len(source([made_image()], ["empty.png"])[0].boxes) == 0  # named, so not missing
    assert source([made_image()], ["a/x.jpg"])[0].scores.tolist() == [1]
    with pytest.warns(UserWarning, match=r"c/y\.png"):
        source([made_image()], ["c/y.png"])
    with pytest.raises(InputError, match=r"c/x\.jpg"):
        source([made_image()], ["c/x.jpg"])
    with pytest.raises(InputError, match="80 x 120"):
        source([made_image()], ["a/x.jpg"], [(120, 80)])
    with pytest.raises(InputError, match=r"a\.json"):  # an id of the file is no name of a image
        source([made_image()], ["3"])


def test_table(tmp_path: Path) -> None:
    rows = "image,label,x1,y1,x2,y2,score\na.jpg,dot,1,2,3,4,0.5\n b.jpg ,dot,,,,,\na.jpg,dot,0,0,60,40,1\n"
    source = FileProposals(written(tmp_path / "boxes.csv", rows))
    a, b = source([made_image(), made_image()], ["images/a.jpg", "b.jpg"])
    assert a.boxes.tolist() == [[1, 2, 3, 4], [0, 0, 60, 40]]
    assert a.scores.tolist() == [0.5, 1]
    assert len(b.boxes) == 0
    plain = FileProposals(written(tmp_path / "plain.csv", "image,x1,y1,x2,y2\nd.e,1,2,3,4\n"))
    assert plain([made_image()], ["d.e.jpg"])[0].scores.tolist() == [1]


def test_what_reaches_over_the_border_stays_whole_and_what_is_empty_is_said_once(tmp_path: Path) -> None:
    boxes = [[-5, -5, 10, 10], [50, 30, 100, 100], [70, 0, 5, 5], [10, 10, 0, 5], [3, 3, 4, 4]]
    source = FileProposals(written(tmp_path / "r.json", [result("a", box) for box in boxes]))
    with pytest.warns(UserWarning, match=r"r\.json") as said:
        first, found = (source([made_image()], ["a"])[0] for _ in range(2))
    assert torch.equal(first.boxes, found.boxes)
    assert len(said) == 1
    assert found.boxes.tolist() == [[-5, -5, 5, 5], [50, 30, 150, 130], [3, 3, 7, 7]]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([result("a", [0, 0, 1, 1]), result("a", [0, 0, math.nan, 1])], "nan"),
        ([result("a", [0, 0, 1, 1]), result("a", [0, 0, 1])], r"\[0, 0, 1\]"),
        ([result("a", [0, 0, 1, 1]), result("a", "box")], "'box'"),
        ([result("a", [0, 0, 1, 1, 1])], r"\[0, 0, 1, 1, 1\]"),
        ([result("a", [9, 9, -3, 1])], "-3"),
        ([result("a", [0, 0, 1, 1]), {"bbox": [0, 0, 1, 1]}], r"\['bbox'\]"),
        ([result(None, [0, 0, 1, 1])], "image_id"),
        ([3], r"\bint\b"),
        ([result("a", [0, 0, 1, 1], score=2.5)], r"2\.5"),
        ([result("a", [0, 0, 1, 1], score=0.5), result("a", [0, 0, 1, 1])], "score"),
        ({"images": [{"id": 1, "file_name": "a"}], "annotations": [result(2, [0, 0, 1, 1])]}, r"annotations\[0\]"),
        ({"images": [{"id": 1, "file_name": "a"}] * 2, "annotations": []}, r"images\[1\]"),
        ({"images": ["a"], "annotations": []}, r"images\[0\]"),
        ({"boxes": []}, "r.json"),
        ("{", "r.json"),
        ("[" * 100_000, "r.json"),
    ],
)
def test_bad_json(tmp_path: Path, content: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        FileProposals(written(tmp_path / "r.json", content))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("image,x,y\na,1,2\n", r"\['image', 'x', 'y'\]"),
        ("", r"\[\]"),
        ("image,x1,y1,x2,y2\na,1,2,3,4\na,1,2,3\n", "line 3"),
        ("image,x1,y1,x2,y2\na,1,2,3,4\na,1,2,inf,4\n", "inf"),
        ("image,x1,y1,x2,y2\na,1,2,3,\n", "line 2"),
        ("image,x1,y1,x2,y2\na,5,2,3,4\n", "line 2"),
        ("image,x1,y1,x2,y2,score\na,1,2,3,4,high\n", "'high'"),
    ],
)
def test_bad_tables(tmp_path: Path, content: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        FileProposals(written(tmp_path / "boxes.csv", content))


def test_files_that_are_not_there(tmp_path: Path) -> None:
    for name in ("none.json", "none.csv"):
        with pytest.raises(InputError, match=name):
            FileProposals(tmp_path / name)
    with pytest.raises(InputError, match="missing"):
        FileProposals(tmp_path / "none.json", missing="skip")  # type: ignore[arg-type]


# -- detectors --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Tiny detectors with random weights, as save_pretrained writes them; 3 labels, 7 queries."""
    pytest.importorskip("PIL", reason="transformers' image processors need Pillow")
    import transformers as tf
    from transformers.models.deformable_detr.image_processing_pil_deformable_detr import DeformableDetrImageProcessorPil
    from transformers.models.detr.image_processing_pil_detr import DetrImageProcessorPil
    from transformers.models.owlv2.image_processing_pil_owlv2 import Owlv2ImageProcessorPil
    from transformers.models.rt_detr.image_processing_pil_rt_detr import RTDetrImageProcessorPil

    sides: dict[str, Any] = {
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
    }
    body: dict[str, Any] = {"embedding_size": 8, "hidden_sizes": [8] * 4, "depths": [1] * 4, "layer_type": "basic"}
    sizes: dict[str, Any] = {
        "encoder_layers": 1,
        "decoder_layers": 2,
        "encoder_attention_heads": 2,
        "decoder_attention_heads": 2,
        "encoder_ffn_dim": 16,
        "decoder_ffn_dim": 16,
        "num_queries": 7,
        "num_labels": 3,
    }
    resnet: dict[str, Any] = {"use_timm_backbone": False, "backbone_config": tf.ResNetConfig(**body)}
    stepped = {**body, "out_features": ["stage2", "stage3", "stage4"]}
    levels: dict[str, Any] = {
        "use_timm_backbone": False,
        "num_feature_levels": 3,
        "backbone_config": tf.ResNetConfig(**stepped),
    }
    rt_body = tf.RTDetrResNetConfig(**stepped)
    rt: dict[str, Any] = {
        "d_model": 32,
        "encoder_hidden_dim": 32,
        "encoder_in_channels": [8] * 3,
        "decoder_in_channels": [32] * 3,
        "num_denoising": 0,
        "backbone_config": rt_body,
    }
    shortest = {"shortest_edge": 64, "longest_edge": 100}
    square = {"height": 64, "width": 64}
    makers: dict[str, tuple[Callable[[], Any], Any]] = {
        "detr": (
            lambda: tf.DetrForObjectDetection(tf.DetrConfig(d_model=16, **resnet, **sizes)),
            DetrImageProcessorPil(size=shortest),
        ),
        "deformable_detr": (
            lambda: tf.DeformableDetrForObjectDetection(tf.DeformableDetrConfig(d_model=32, **levels, **sizes)),
            DeformableDetrImageProcessorPil(size=shortest),
        ),
        "rt_detr_v2": (
            lambda: tf.RTDetrV2ForObjectDetection(tf.RTDetrV2Config(**rt, **sizes)),
            RTDetrImageProcessorPil(size=square),
        ),
        "owlv2": (
            lambda: tf.Owlv2ForObjectDetection(
                tf.Owlv2Config(
                    text_config={**sides, "vocab_size": 50, "max_position_embeddings": 8},
                    vision_config={**sides, "image_size": 64, "patch_size": 8},
                    projection_dim=16,
                )
            ),
            Owlv2ImageProcessorPil(size=square),
        ),
    }
    root = tmp_path_factory.mktemp("detectors")
    for name, (make, processor) in makers.items():
        torch.manual_seed(0)
        model = make().eval()
        for p in model.parameters():  # so that queries and places differ
            if p.ndim > 1:
                torch.nn.init.normal_(p, std=0.3)
        model.save_pretrained(root / name)
        processor.save_pretrained(root / name)
    return {name: root / name for name in makers}


def detector(folders: dict[str, Path], kind: str, **options: Any) -> Any:
    made = Owlv2Proposals if kind == "owlv2" else DetrProposals
    return made(folders[kind], **{"threshold": 0.0, **options})


DETRS = ["detr", "deformable_detr", "rt_detr_v2"]
KINDS = [*DETRS, "owlv2"]


@pytest.mark.parametrize("kind", KINDS)
def test_batch_dtype_and_layout_do_not_matter(folders: dict[str, Path], kind: str) -> None:
    source = detector(folders, kind, together=2)
    images = [
        made_image(40, 60, 0),
        made_image(40, 60, 1),
        made_image(40, 60, 2),
        made_image(55, 20, 3),
        made_image(3, 3, 4),
    ]
    names = list("abcde")
    together = source(images, names)
    variants: list[Callable[[Tensor], Tensor]] = [
        lambda i: i,
        lambda i: i.float() / 255,
        lambda i: i.double() / 255,
        lambda i: i.permute(1, 2, 0).contiguous().permute(2, 0, 1),
    ]
    for image, name, found in zip(images, names, together, strict=True):
        assert is_sound(found, (image.shape[1], image.shape[2]))
        assert len(found.boxes)
        for change in variants:
            alone = source([change(image)], [name])[0]
            torch.testing.assert_close(alone.boxes, found.boxes, atol=1e-3, rtol=0)
            torch.testing.assert_close(alone.scores, found.scores, atol=1e-4, rtol=0)
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(source(images[:1], ["a"])[0].boxes, source(images[:1], ["a"])[0].boxes)
        torch.testing.assert_close(source(images[:1], ["a"])[0].scores, together[0].scores, atol=1e-4, rtol=0)
    assert source([], []) == []
    assert not any(p.requires_grad for p in source.model.parameters())


@pytest.mark.parametrize("kind", DETRS)
def test_detr_as_its_own_processor_has_it(folders: dict[str, Path], kind: str) -> None:
    """Softmax or sigmoid, and the geometry of a image that is not square: what transformers makes of the output."""
    source, image = detector(folders, kind), made_image(40, 60)
    found = source([image], ["a"])[0]
    inputs = source.processor(images=[image.numpy()], input_data_format="channels_first", return_tensors="pt")
    with torch.no_grad():
        output = source.model(**inputs)
    theirs = source.processor.post_process_object_detection(output, threshold=0.0, target_sizes=[(40, 60)])[0]
    clipped = kept_inside(theirs["boxes"], theirs["scores"], (40, 60))
    best: dict[tuple[float, ...], float] = {}  # theirs may list a query once for each of its classes
    for box, score in zip(clipped.boxes, clipped.scores, strict=True):
        key = tuple(round(x, 2) for x in box.tolist())
        best[key] = max(best.get(key, 0.0), float(score))
    mine = {
        tuple(round(x, 2) for x in box.tolist()): float(s) for box, s in zip(found.boxes, found.scores, strict=True)
    }
    assert set(best) <= set(mine)
    assert len(mine) == len(found.boxes) == 7
    for key, score in best.items():
        assert mine[key] == pytest.approx(score, abs=1e-5)


def test_detr_geometry_and_saturation(folders: dict[str, Path]) -> None:
    """Boxes put into the model's output come out as cx, cy, w, h of width and height."""
    source = detector(folders, "detr", threshold=0.5, saturation=0.75)
    boxes = torch.tensor([[0.5, 0.5, 0.2, 0.5], [0.1, 0.9, 0.4, 0.4], [0.25, 0.25, 0.1, 0.1], [0.9, 0.1, 0.1, 0.1]])
    logits = torch.tensor([[4.0, 0, 0, 0], [0, 0, 5, 0], [0, 6, 0, 0], [0, 0, 0, 9]])

    def output(**_: Any) -> Any:
        return type("Output", (), {"logits": logits[None], "pred_boxes": boxes[None]})

    source.model.forward = output
    found = source([made_image(100, 200)], ["a"])[0]
    expected = torch.tensor([[80.0, 25, 120, 75], [0, 70, 60, 100], [40, 20, 60, 30]])
    torch.testing.assert_close(found.boxes, expected, atol=1e-4, rtol=0)
    torch.testing.assert_close(found.scores, logits.softmax(1)[:3, :3].amax(1))
    assert found.saturated  # three of four queries
    source.saturation = 0.8
    assert not source([made_image(100, 200)], ["a"])[0].saturated
    logits = torch.zeros(4, 9)
    with pytest.raises(WeightsError, match="9 logits"):
        source([made_image()], ["a"])


@pytest.mark.parametrize(("height", "width"), [(100, 200), (200, 50), (64, 64), (1, 64)])
def test_owlv2_geometry_and_saturation(folders: dict[str, Path], height: int, width: int) -> None:
    """A box around the centre of each patch: those over the image come out in its pixels, the rest do not."""
    source = detector(folders, "owlv2", threshold=0.5, saturation=1.0)
    side, grid = max(height, width), 8
    rows, columns = torch.meshgrid(torch.arange(grid), torch.arange(grid), indexing="ij")
    centres = (torch.stack([columns, rows], 2).flatten(0, 1) + 0.5) / grid
    source.model.box_predictor = lambda *_: torch.cat([centres, torch.full((64, 2), 0.1)], 1)[None]
    source.model.objectness_predictor = lambda *_: torch.full((1, 64), 3.0)
    found = source([made_image(height, width)], ["a"])[0]
    expected = [
        [max(x - side / 20, 0), max(y - side / 20, 0), min(x + side / 20, width), min(y + side / 20, height)]
        for x, y in (centres * side).tolist()
        if x < width and y < height
    ]
    torch.testing.assert_close(found.boxes, torch.tensor(expected).reshape(-1, 4), atol=1e-4, rtol=0)
    assert found.saturated == bool(expected)  # black is no part of the image that could be free
    low = torch.full((1, 64), 3.0)
    low[0, 0] = -3
    source.model.objectness_predictor = lambda *_: low
    assert not source([made_image(height, width)], ["a"])[0].saturated


def test_owlv2_sees_black_below_and_right(folders: dict[str, Path]) -> None:
    """What the preprocessing of the folder does, on which the geometry rests."""
    source = detector(folders, "owlv2")
    white = torch.full((3, 32, 64), 255, dtype=torch.uint8)
    pixels = source._preprocessed(white, "a")["pixel_values"][0]
    mean, std = (torch.tensor(v)[:, None, None] for v in (source.processor.image_mean, source.processor.image_std))
    shown = pixels * std + mean
    torch.testing.assert_close(shown[:, :31], torch.ones(3, 31, 64), atol=1e-4, rtol=0)
    torch.testing.assert_close(shown[:, 33:], torch.zeros(3, 31, 64), atol=1e-4, rtol=0)


def test_detectors_that_cannot_be_had(folders: dict[str, Path], tmp_path: Path, monkeypatch: Any) -> None:
    from safetensors.torch import load_file, save_file

    for made in (Owlv2Proposals, DetrProposals):
        with pytest.raises(WeightsError, match="owner/name"):
            made("owner/name")
        for name in ("./nowhere", "nowhere", str(tmp_path / "nowhere")):
            with pytest.raises(WeightsError, match="nowhere"):
                made(name)
        with pytest.raises(WeightsError, match=tmp_path.name):
            made(tmp_path)
    with pytest.raises(WeightsError, match="owlv2"):
        Owlv2Proposals(folders["detr"])
    with pytest.raises(WeightsError, match="owlv2"):
        DetrProposals(folders["owlv2"])
    broken = tmp_path / "broken"
    broken.mkdir()
    for file in folders["detr"].iterdir():
        (broken / file.name).write_bytes(file.read_bytes())
    state = load_file(broken / "model.safetensors")
    del state["class_labels_classifier.weight"]
    save_file(state, broken / "model.safetensors", {"format": "pt"})
    with pytest.raises(WeightsError, match=r"class_labels_classifier\.weight"):
        DetrProposals(broken)
    (broken / "preprocessor_config.json").unlink()
    with pytest.raises(WeightsError, match="broken"):
        DetrProposals(broken)

    import transformers

    def without_pillow(*_: Any, **__: Any) -> Any:
        raise ImportError("\nit needs Pillow")

    monkeypatch.setattr(transformers.AutoImageProcessor, "from_pretrained", without_pillow)
    with pytest.raises(WeightsError, match="timm"):
        DetrProposals(folders["detr"])


def test_half_precision_weights(folders: dict[str, Path], tmp_path: Path) -> None:
    source = detector(folders, "detr")
    source.model.half().save_pretrained(tmp_path)
    source.processor.save_pretrained(tmp_path)
    assert is_sound(DetrProposals(tmp_path, 0.0)([made_image()], ["a"])[0], (40, 60))


# -- tiles ------------------------------------------------------------------------------------------------------------


class Ideal:
    """Sees every object that lies in a picture at least in part, cut to it, but tells only the first ``cap``.

    The pictures are ramps: red is x and green y as parts of the whole, which magnifying leaves ramps, so that pixels
    tell which part of which picture they are. Blue is the number of the picture.
    """

    def __init__(self, objects: list[Tensor], size: tuple[int, int], cap: int) -> None:
        self.objects, self.size, self.cap = objects, size, cap
        self.calls: list[int] = []

    def images(self) -> list[Tensor]:
        height, width = self.size
        y, x = torch.meshgrid(
            (torch.arange(height).double() + 0.5) / height, (torch.arange(width).double() + 0.5) / width, indexing="ij"
        )
        return [torch.stack([x, y, torch.full_like(x, i / 10)]) for i in range(len(self.objects))]

    def __call__(self, images: Sequence[Tensor], image_ids: Sequence[str], sizes: Any = None) -> list[Proposed]:
        self.calls.append(len(images))
        return [self._of(image, int(name)) for image, name in zip(images, image_ids, strict=True)]

    def _of(self, image: Tensor, number: int) -> Proposed:
        height, width = image.shape[-2:]
        assert int((image[2, 0, 0] * 10).round()) == number
        a, b = height // 4, width // 4
        x_step = (image[0, a, width - b - 1] - image[0, a, b]) / (width - 2 * b - 1) * self.size[1]
        y_step = (image[1, height - a - 1, b] - image[1, a, b]) / (height - 2 * a - 1) * self.size[0]
        corner = torch.stack(
            [image[0, a, b] * self.size[1] - (b + 0.5) * x_step, image[1, a, b] * self.size[0] - (a + 0.5) * y_step]
        )
        scale = torch.stack([x_step, y_step])
        boxes = ((self.objects[number].double() - torch.cat([corner, corner])) / torch.cat([scale, scale])).float()
        found = kept_inside(boxes, torch.linspace(1, 0.1, len(boxes)), (height, width))
        return Proposed(found.boxes[: self.cap], found.scores[: self.cap], len(found.boxes) > self.cap)


def exactly_once(found: Proposed, objects: Tensor) -> bool:
    gaps = torch.cdist(found.boxes, objects, p=math.inf)
    return len(found.boxes) == len(objects) and bool((gaps.amin(0) < 0.02).all() and (gaps.amin(1) < 0.02).all())


def scattered(n: int, size: tuple[int, int], seed: int, largest: float = 9.0) -> Tensor:
    """Objects anywhere, some with their centre on the lines between tiles, in one direction or both."""
    height, width = size
    centres = torch.rand(n, 2, generator=seeded(seed)) * torch.tensor([width - 10.0, height - 10.0]) + 5
    middle = torch.tensor([width // 2, height // 2]).float()
    centres[::7, 0] = middle[0]
    centres[::11, 1] = middle[1]
    half = torch.rand(n, 2, generator=seeded(seed + 1)) * (largest - 1) / 2 + 0.5
    return torch.cat([centres - half, centres + half], 1)[torch.randperm(n, generator=seeded(seed + 2))]


@pytest.mark.parametrize("seed", range(4))
def test_six_times_as_many_objects_as_a_source_can_tell(seed: int) -> None:
    size, cap = (160, 230), 40
    objects = [
        scattered(6 * cap, size, seed),
        scattered(cap // 2, size, seed + 10),
        scattered(3 * cap, size, seed + 20),
    ]
    source = Ideal(objects, size, cap)
    found = tiled(source, source.images(), ["0", "1", "2"], depth=4)
    for own, truth in zip(found, objects, strict=True):
        assert is_sound(own, size)
        assert exactly_once(own, truth)
        assert not own.saturated
    assert source.calls[:2] == [3, 8]  # two of three are cut, and their tiles go through together
    assert len(source.calls) <= 5
    alone = tiled(source, source.images(), ["0", "1", "2"], depth=0)
    assert [own.saturated for own in alone] == [True, False, True]
    assert [len(own.boxes) for own in alone] == [cap, cap // 2, cap]
    shallow = tiled(source, source.images()[:1], ["0"], depth=1)[0]
    assert shallow.saturated
    assert len(shallow.boxes) > cap


def test_objects_on_every_line_and_corner() -> None:
    """Rows of squares whose centre, end or beginning is on a line between tiles, at whole pixels and beside them."""
    size = (160, 160)
    offsets = torch.arange(-6, 6.5, 0.5)
    places = torch.arange(10.0, 150, 13)
    upright = torch.cartesian_prod(80 + offsets, places[::3])
    level = torch.cartesian_prod(places[1::3], 80 + offsets)
    centres = torch.cat([upright, level, torch.tensor([[80.0, 80], [76, 80], [80, 84], [83.5, 83.5]])])
    objects = torch.cat([centres - 2, centres + 2], 1)
    source = Ideal([objects], size, 60)
    found = tiled(source, source.images(), ["0"], depth=3)[0]
    assert not found.saturated
    assert exactly_once(found, objects)


def test_large_objects_are_those_of_the_whole() -> None:
    """No tile shows them whole; the look at the whole image does, and pieces of them are no objects."""
    size = (160, 230)
    large = torch.tensor([[10.0, 10, 200, 150], [100, 20, 140, 130], [0, 0, 230, 160]])
    objects = torch.cat([large, scattered(100, size, 5)])
    source = Ideal([objects], size, 50)  # tells those first
    found = tiled(source, source.images(), ["0"], depth=3)[0]
    assert exactly_once(found, objects)


def test_coincident_objects_stay_two() -> None:
    size = (160, 230)
    objects = scattered(60, size, 8)
    objects = torch.cat([objects, objects])
    source = Ideal([objects], size, 70)
    found = tiled(source, source.images(), ["0"], depth=3)[0]
    assert exactly_once(found, objects)
    assert len(found.boxes) == 120


class Cells:
    """Sees every object of an :class:`Ideal` source as a box of ``side`` around the middle of its cell of 4 pixels."""

    def __init__(self, ideal: Ideal, side: float) -> None:
        self.ideal, self.side = ideal, side

    def __call__(self, images: Sequence[Tensor], image_ids: Sequence[str], sizes: Any = None) -> list[Proposed]:
        found = []
        for own in self.ideal(images, image_ids):
            centres = ((own.boxes[:, :2] + own.boxes[:, 2:]) / 8).floor() * 4 + 2
            boxes = torch.cat([centres - self.side / 2, centres + self.side / 2], 1)
            found.append(Proposed(boxes, own.scores, own.saturated))
        return found


def test_small_objects_of_a_coarse_source_count_once() -> None:
    """Two tiles see the centre of an object up to a cell apart, and boxes smaller than that do not overlap."""
    size = (160, 230)
    y, x = torch.meshgrid(torch.arange(3.3, 160, 7), torch.arange(3.3, 230, 7), indexing="ij")
    places = torch.stack([x.flatten(), y.flatten()], 1)
    source = Ideal([torch.cat([places - 1, places + 1], 1)], size, cap=len(places) // 2)
    coarse = Cells(source, side=4.0)
    ignorant, found = (tiled(coarse, source.images(), ["0"], depth=1, step=step)[0] for step in (0.0, 4.0))
    assert len(ignorant.boxes) > len(places)
    assert len(found.boxes) == len(places)
    gaps, nearest = torch.cdist((found.boxes[:, :2] + found.boxes[:, 2:]) / 2, places).min(1)
    assert len(nearest.unique()) == len(places)
    assert gaps.max() < 2.5


def test_scores_come_along_and_a_blurred_look_counts_once() -> None:
    """Centres that two tiles see up to 0.4 pixels apart are one object all the same."""
    size = (160, 230)
    objects = scattered(100, size, 3)
    objects[:, 2:] += 4  # so that 0.4 pixels leave an overlap of 0.7

    class Blurred(Ideal):
        def _of(self, image: Tensor, number: int) -> Proposed:
            found = super()._of(image, number)
            noise = torch.rand(len(found.boxes), 2, generator=seeded(len(self.calls))) - 0.5
            scores = found.boxes.sum(1).remainder(1)
            return Proposed(found.boxes + 0.8 * noise.repeat(1, 2), scores, found.saturated)

    source = Blurred([objects], size, 60)
    found = tiled(source, source.images(), ["0"], depth=3)[0]
    distance = torch.cdist((found.boxes[:, :2] + found.boxes[:, 2:]) / 2, (objects[:, :2] + objects[:, 2:]) / 2)
    assert is_sound(found, size)
    assert len(found.boxes) == 100
    assert (distance.amin(0) < 1).all()


def test_files_and_small_images_are_not_cut(tmp_path: Path) -> None:
    rows = "image,x1,y1,x2,y2\n" + "a.jpg,1,2,3,4\n" * 500
    source = FileProposals(written(tmp_path / "boxes.csv", rows))
    found = tiled(source, [made_image()], ["a.jpg"], [(80, 120)])[0]
    assert len(found.boxes) == 500
    assert found.boxes[0].tolist() == [0.5, 1, 1.5, 2]
    small = Ideal([scattered(30, (20, 300), 0, largest=2)], (20, 300), 10)
    found = tiled(small, small.images(), ["0"])[0]
    assert small.calls == [1]
    assert found.saturated
    assert len(found.boxes) == 10
    assert tiled(small, [], []) == []


def test_tiles_of_a_detector(folders: dict[str, Path]) -> None:
    source = detector(folders, "detr")  # with a threshold of 0 it is always at its limit
    found = tiled(source, [made_image(64, 80)], ["a"], depth=1)[0]
    assert is_sound(found, (64, 80))
    assert found.saturated


# -- what all have in common ------------------------------------------------------------------------------------------


def test_bad_images_and_settings(folders: dict[str, Path], tmp_path: Path) -> None:
    table = written(tmp_path / "boxes.csv", "image,x1,y1,x2,y2\na,1,2,3,4\n")
    owl = detector(folders, "owlv2")
    for source in (GridProposals(), FileProposals(table), owl, lambda *given: tiled(owl, *given)):
        for image in (torch.zeros(1, 9, 9), torch.zeros(3, 0, 9), torch.zeros(3, 9, 9).long(), torch.zeros(1, 3, 9, 9)):
            with pytest.raises(InputError, match=r"\(3, H, W\)"):
                source([image], ["a"])
        with pytest.raises(InputError, match="2 image_ids"):
            source([made_image()], ["a", "b"])
        with pytest.raises(InputError, match="2 sizes"):
            source([made_image()], ["a"], [(1, 1), (1, 1)])
    for image in (made_image().float(), made_image().float() / 50 - 2, torch.full((3, 9, 9), math.nan)):
        with pytest.raises(InputError, match="pixels"):
            owl([image], ["a"])
    for options in ({"threshold": 1.5}, {"saturation": 0.0}, {"together": 0}):
        with pytest.raises(InputError, match="threshold"):
            detector(folders, "owlv2", **options)
    for wrong in ((0, 5), (5, 0)):
        with pytest.raises(InputError, match="min_side"):
            random_boxes(wrong, 3, seeded())
    for numbers in (([], [1.0]), ([1.0], []), ([0.0], [1.0]), ([1.0], [-1.0]), ([math.nan], [1.0])):
        with pytest.raises(InputError, match="GridProposals"):
            GridProposals(*numbers)
    for kept in ({"depth": -1}, {"overlap": 1.0}):
        with pytest.raises(InputError, match="depth"):
            tiled(GridProposals(), [made_image()], ["a"], **kept)  # type: ignore[arg-type]
    with pytest.raises(InputError, match="finite"):
        kept_inside(torch.full((1, 4), math.nan), torch.ones(1), (9, 9))
    with pytest.raises(InputError, match="finite"):
        kept_inside(torch.ones(1, 4), torch.full((1,), math.inf), (9, 9))


def test_by_a_text(folders: dict[str, Path], tmp_path: Path) -> None:
    table = written(tmp_path / "boxes.CSV", "image,x1,y1,x2,y2\n")
    kinds = {
        "grid": GridProposals,
        str(table): FileProposals,
        f"detr:{folders['rt_detr_v2']}": DetrProposals,
        f"owlv2:{folders['owlv2']}": Owlv2Proposals,
    }
    for text, kind in kinds.items():
        assert isinstance(proposal_source(text), kind)
    for text in ("random", "rpn", "detr:", "owlv2", "boxes.txt", ""):
        with pytest.raises(InputError, match="'grid'"):
            proposal_source(text)
    with pytest.raises(InputError, match=r"boxes\.CSV"):
        proposal_source(str(table))([made_image()], ["a"])
    assert not len(proposal_source(str(table), missing="empty")([made_image()], ["a"])[0].boxes)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("kind", KINDS)
def test_on_a_gpu(folders: dict[str, Path], kind: str) -> None:
    source, image = detector(folders, kind), made_image(64, 80)
    here = source([image], ["a"])[0]
    there = source([image.cuda()], ["a"])[0]
    assert there.boxes.is_cuda
    assert there.scores.is_cuda
    torch.testing.assert_close(there.boxes.cpu(), here.boxes, atol=0.1, rtol=0)
    grid = GridProposals()
    found = grid([image.cuda()], ["a"])[0]
    assert found.boxes.is_cuda
    assert torch.equal(found.boxes.cpu(), grid([image], ["a"])[0].boxes)
    assert is_sound(Proposed(there.boxes.cpu(), there.scores.cpu(), False), (64, 80))
    joined = tiled(source, [image.cuda()], ["a"], depth=1)[0]
    assert joined.boxes.is_cuda
