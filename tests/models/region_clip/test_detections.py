"""Scores, boxes and counts: what the reference's inference heads gave, loops, closed forms, and empty input.

``golden/region_clip_head.pt`` holds what inference needs of the entry ``head`` of a file made by running the
reference: 40 boxes with features and RPN logits, five texts, and what is detected in four settings. The values of its
fine-tuning losses (``loss_*``) are left out, as those losses are.
"""

from __future__ import annotations

import math
import warnings
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from places import GOLDEN
from torch import Tensor

from counting_zoo.errors import InputError
from counting_zoo.geometry import box_iou
from counting_zoo.models.region_clip.network import (
    Detections,
    best_threshold,
    counts_at,
    detect,
    fuse,
    text_probabilities,
)

GOLDEN_FILE = GOLDEN / "region_clip_head.pt"
SIZE = (60, 80)


@pytest.fixture(scope="module")
def golden() -> dict[str, Any]:
    return torch.load(GOLDEN_FILE, weights_only=True)


def draw(n: int = 12, k: int = 3, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Boxes that overlap in a picture of SIZE, some across its border, and scores."""
    g = torch.Generator().manual_seed(seed)
    corner = torch.rand(n, 2, generator=g) * torch.tensor([70.0, 50.0])
    boxes = torch.cat([corner, corner + 2 + 30 * torch.rand(n, 2, generator=g)], 1)
    return boxes, torch.rand(n, k, generator=g)


def overlap(a: list[float], b: list[float]) -> float:
    shared = max(0.0, min(a[2], b[2]) - max(a[0], b[0])) * max(0.0, min(a[3], b[3]) - max(a[1], b[1]))
    union = (a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - shared
    return shared / union


def naive_detect(
    boxes: Tensor, scores: Tensor, threshold: float, suppression: str, assign: str, limit: int | None
) -> list[tuple[int, int, float]]:
    """(proposal, name, score), a name and a box at a time."""
    corners, found = boxes.tolist(), []
    for k in range(scores.shape[1]):
        left = {i: float(scores[i, k]) for i in range(len(boxes)) if float(scores[i, k]) > threshold}
        if assign == "best":
            left = {i: s for i, s in left.items() if s == float(scores[i].max())}
        while left:
            top = max(left, key=left.__getitem__)
            found.append((top, k, left.pop(top)))
            for i in list(left):
                iou = overlap(corners[top], corners[i])
                left[i] *= math.exp(-iou * iou / 0.5) if suppression == "soft" else iou <= 0.5
                if left[i] <= threshold:
                    del left[i]
    return sorted(found, key=lambda row: -row[2])[:limit]


# -- what the reference gave ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", ["plain", "mult", "soft", "delta"])
def test_reference_detections(golden: dict[str, Any], case: str) -> None:
    """With the values for COCO: scores above 0.001, IoU 0.5 or a Gaussian of 0.5, at most 100, a background of zeros.

    Other thresholds (1e-4, 0.01, 0.02, 0.05) and overlaps (0.3, 0.7, 0.9) give other boxes. ``mult`` and ``soft``
    multiply by raw RPN logits, 20 of 40 below 0; ``delta`` regresses the boxes.
    """
    expected = golden[case]
    found = text_probabilities(golden["x"], golden["cls_emb"], score="official")
    scores = fuse(found, golden["objectness_logits"], "official" if case in ("mult", "soft") else "region")
    options: dict[str, Any] = {"suppression": "soft"} if case == "soft" else {"iou_threshold": 0.5}
    if case == "delta":
        options["deltas"] = golden["deltas"]
    size = tuple(golden["image_size"])
    detections = detect(golden["boxes"], scores, size=size, threshold=0.001, limit=100, **options)
    torch.testing.assert_close(detections.scores, expected["scores"], rtol=1e-4, atol=0)
    # In one order: scores of 1 and 1 - 1e-7 may change places from one processor to another.
    mine = (detections.source * 10 + detections.labels).argsort()
    theirs = (expected["kept"] * 10 + expected["classes"]).argsort()
    assert detections.source[mine].tolist() == expected["kept"][theirs].tolist()
    assert detections.labels[mine].tolist() == expected["classes"][theirs].tolist()
    torch.testing.assert_close(detections.scores[mine], expected["scores"][theirs], rtol=1e-4, atol=0)
    torch.testing.assert_close(detections.boxes[mine], expected["boxes"][theirs], rtol=1e-4, atol=1e-4)


def test_raw_logits_give_scores_above_one_and_lose_half_of_the_regions(golden: dict[str, Any]) -> None:
    probabilities = text_probabilities(golden["x"], golden["cls_emb"], score="official")
    scores = fuse(probabilities, golden["objectness_logits"], "official")
    assert float(scores.max()) > 2.4
    assert torch.equal(scores.amax(1) > 0, golden["objectness_logits"] > 0)
    repaired = fuse(probabilities, golden["objectness_logits"].sigmoid(), "geometric")
    assert 0 < float(repaired.amax(1).min()) <= float(repaired.max()) <= 1


# -- probabilities ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("score", "n_negatives"), [("sigmoid", 0), ("softmax", 0), ("softmax", 2), ("official", 0), ("official", 2)]
)
def test_probabilities_against_a_loop(score: Any, n_negatives: int) -> None:
    torch.manual_seed(0)
    features, texts, negatives = torch.randn(4, 6), 3 * torch.randn(3, 6), torch.randn(n_negatives, 6)
    found = text_probabilities(
        features,
        texts,
        score=score,
        scale=5.0,
        bias=torch.tensor(-1.0),
        temperature=0.2,
        negatives=negatives if n_negatives else None,
    )
    assert found.shape == (4, 3)
    for i in range(4):
        cosines = [float(torch.cosine_similarity(features[i], text, dim=0)) for text in (*texts, *negatives)]
        weights = [math.exp(c / 0.2) for c in cosines] + [1.0] * (score == "official")
        for k in range(3):
            competing = weights[k] / sum(weights)
            expected = 1 / (1 + math.exp(-(5 * cosines[k] - 1))) if score == "sigmoid" else competing
            assert float(found[i, k]) == pytest.approx(expected, rel=1e-5)


def test_one_name_and_the_zero_vector_reject_nothing() -> None:
    """Cosines of 0.05, 0.1 and 0.2 with the only name: closed forms, all above 0.99."""
    cosines = torch.tensor([0.05, 0.1, 0.2])
    features = torch.stack([cosines, (1 - cosines**2).sqrt()], 1)
    found = text_probabilities(features, torch.tensor([[1.0, 0.0]]), score="official")[:, 0]
    assert found.tolist() == pytest.approx([1 / (1 + math.exp(-c / 0.01)) for c in cosines.tolist()], rel=1e-5)
    assert found.tolist() == pytest.approx([0.993307, 0.9999546, 1], abs=1e-6)
    # What competes decides: the second text is nearer to all three.
    competing = text_probabilities(
        features, torch.tensor([[1.0, 0.0]]), score="softmax", negatives=torch.tensor([[0.0, 1.0]])
    )
    assert float(competing.max()) < 1e-6


def test_a_region_of_zeros_resembles_nothing() -> None:
    texts = torch.eye(3)
    assert torch.equal(
        text_probabilities(torch.zeros(1, 3), texts, score="sigmoid", scale=9.0, bias=0.0), torch.full((1, 3), 0.5)
    )
    torch.testing.assert_close(text_probabilities(torch.zeros(1, 3), texts, score="official"), torch.full((1, 3), 0.25))


def test_probabilities_are_float32_also_in_half_precision() -> None:
    features, texts = torch.randn(5, 8, generator=torch.Generator().manual_seed(0)).bfloat16(), torch.eye(8)[:2]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = text_probabilities(features, texts, score="softmax")
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, text_probabilities(features.float(), texts, score="softmax"))


@pytest.mark.parametrize("score", ["sigmoid", "softmax", "official"])
def test_no_region(score: Any) -> None:
    found = text_probabilities(torch.zeros(0, 4), torch.randn(2, 4), score=score, scale=1.0, bias=0.0)
    assert found.shape == (0, 2)


def test_fusions() -> None:
    probabilities, objectness = torch.tensor([[0.81, 0.0], [0.25, 1.0]]), torch.tensor([1.0, 0.04])
    assert torch.equal(fuse(probabilities, None, "region"), probabilities)
    torch.testing.assert_close(fuse(probabilities, objectness, "geometric"), torch.tensor([[0.9, 0], [0.1, 0.2]]))
    torch.testing.assert_close(
        fuse(probabilities, torch.tensor([4.0, -1.0]), "official"), torch.tensor([[1.8, 0.0], [0.0, 0.0]])
    )


# -- detections -------------------------------------------------------------------------------------------------------


@settings(max_examples=30, deadline=None)
@given(
    n=st.integers(0, 14),
    k=st.integers(1, 4),
    seed=st.integers(0, 999),
    threshold=st.floats(0, 1),
    suppression=st.sampled_from(["hard", "soft"]),
    assign=st.sampled_from(["each", "best"]),
    limit=st.sampled_from([None, 1, 5]),
)
def test_against_a_loop(
    n: int, k: int, seed: int, threshold: float, suppression: Any, assign: Any, limit: int | None
) -> None:
    boxes, scores = draw(n, k, seed)
    found = detect(boxes, scores, size=SIZE, threshold=threshold, suppression=suppression, assign=assign, limit=limit)
    expected = naive_detect(boxes, scores, threshold, suppression, assign, limit)
    assert list(zip(found.source.tolist(), found.labels.tolist(), strict=True)) == [row[:2] for row in expected]
    assert found.scores.tolist() == pytest.approx([row[2] for row in expected], rel=1e-5)
    if len(found.boxes):
        assert float(found.boxes.min()) >= 0
        assert bool((found.boxes.amax(0) <= torch.tensor([80.0, 60.0, 80.0, 60.0])).all())


@settings(max_examples=20, deadline=None)
@given(
    seed=st.integers(0, 999), suppression=st.sampled_from(["hard", "soft"]), assign=st.sampled_from(["each", "best"])
)
def test_counts_at_all_thresholds_are_those_of_detecting_again(seed: int, suppression: Any, assign: Any) -> None:
    boxes, scores = draw(20, 2, seed)
    thresholds = torch.linspace(0.1, 0.9, 9)

    def found(threshold: float) -> Detections:
        return detect(boxes, scores, size=SIZE, threshold=threshold, suppression=suppression, assign=assign)

    once = found(0.1)
    counts = counts_at(once.scores, once.labels, 2, thresholds)
    again = [torch.bincount(found(float(t)).labels, minlength=2).tolist() for t in thresholds]
    assert counts.tolist() == again


def test_no_cap_and_no_loss_of_separate_objects() -> None:
    """1,200 objects side by side stay 1,200; the reference's 100 would be its count of them."""
    y, x = torch.meshgrid(torch.arange(30.0), torch.arange(40.0), indexing="ij")
    corner = 10 * torch.stack([x.flatten(), y.flatten()], 1)
    boxes, scores = torch.cat([corner, corner + 10], 1), torch.ones(1200, 1)
    assert len(detect(boxes, scores, size=(300, 400), threshold=0.5).scores) == 1200
    assert len(detect(boxes, scores, size=(300, 400), threshold=0.5, limit=100).scores) == 100


def test_the_best_name_only() -> None:
    boxes, scores = torch.tensor([[0.0, 0, 10, 10], [20, 0, 30, 10]]), torch.tensor([[0.9, 0.8], [0.6, 0.6]])
    every = detect(boxes, scores, size=SIZE, threshold=0.5)
    assert (every.source.tolist(), every.labels.tolist()) == ([0, 0, 1, 1], [0, 1, 0, 1])
    best = detect(boxes, scores, size=SIZE, threshold=0.5, assign="best")
    assert (best.source.tolist(), best.labels.tolist()) == ([0, 1], [0, 0])


def test_a_score_of_the_threshold_does_not_pass() -> None:
    boxes, scores = torch.tensor([[0.0, 0, 10, 10], [20, 0, 30, 10]]), torch.tensor([[0.3], [0.4]])
    for threshold in (0.3, 0.4):  # neither is a float32, and both compare as one
        found = detect(boxes, scores, size=SIZE, threshold=threshold)
        assert len(found.scores) == (1 if threshold == 0.3 else 0)
        assert float(counts_at(scores[:, 0], torch.tensor([0, 0]), 1, torch.tensor([threshold]).double())) == len(
            found.scores
        )


def test_boxes_are_regressed_then_clipped() -> None:
    boxes, scores = torch.tensor([[10.0, 20.0, 30.0, 30.0]]), torch.ones(1, 1)
    growth = torch.tensor([[5.0, -10.0, 5 * math.log(2.0), 5 * math.log(0.5)]])
    found = detect(boxes, scores, size=SIZE, threshold=0.5, deltas=growth)
    # The centre (20, 25) moves by half a width and minus a whole height; 20 x 10 becomes 40 x 5.
    torch.testing.assert_close(found.boxes, torch.tensor([[10.0, 12.5, 50.0, 17.5]]))
    huge = detect(boxes, scores, size=SIZE, threshold=0.5, deltas=torch.tensor([[0.0, 0.0, 1e30, 1e30]]))
    torch.testing.assert_close(huge.boxes, torch.tensor([[0.0, 0.0, 80.0, 60.0]]))
    still = detect(boxes, scores, size=SIZE, threshold=0.5, deltas=torch.zeros(1, 4))
    torch.testing.assert_close(still.boxes, boxes)


def test_objects_that_the_border_cuts_stay_two() -> None:
    """Whole they overlap by 0.43, and what the picture shows of them by 0.56."""
    boxes = torch.tensor([[-10.0, 10.0, 10.0, 30.0], [-2.0, 10.0, 18.0, 30.0]])
    assert float(box_iou(boxes[:1], boxes[1:])) < 0.5 < float(box_iou(boxes[:1].clamp(min=0), boxes[1:].clamp(min=0)))
    found = detect(boxes, torch.ones(2, 1), size=SIZE, threshold=0.5)
    assert found.boxes.tolist() == [[0, 10, 10, 30], [0, 10, 18, 30]]  # clipped in the end


def test_boxes_without_area_in_the_image_are_left_out_and_counted() -> None:
    boxes = torch.tensor([[0.0, 0, 10, 10], [5, 5, 5, 9], [100, 0, 120, 10], [30, 30, 20, 40], [70, 50, 99, 99]])
    with pytest.warns(UserWarning, match="3 of 5"):
        found = detect(boxes, torch.ones(5, 1), size=SIZE, threshold=0.5)
    assert found.source.tolist() == [0, 4]
    assert found.boxes[1].tolist() == [70, 50, 80, 60]
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # regressed out of the image, as a network may
        moved = detect(boxes[:1], torch.ones(1, 1), size=SIZE, threshold=0.5, deltas=torch.tensor([[-99.0, 0, 0, 0]]))
    assert moved.boxes.shape == (0, 4)


@pytest.mark.parametrize("suppression", ["hard", "soft"])
def test_nothing_to_detect(suppression: Any) -> None:
    for boxes, scores in ((torch.zeros(0, 4), torch.zeros(0, 3)), draw()):
        options: dict[str, Any] = {"suppression": suppression, "assign": "best"}
        found = detect(boxes, scores, size=SIZE, threshold=1.0, **options)
        assert [tuple(v.shape) for v in vars(found).values()] == [(0, 4), (0,), (0,), (0,)]
        assert found.labels.dtype == found.source.dtype == torch.int64
        assert torch.equal(counts_at(found.scores, found.labels, 3, torch.tensor([0.1, 0.2])), torch.zeros(2, 3))


# -- calibration ------------------------------------------------------------------------------------------------------


def naive_threshold(counts: Tensor, targets: Tensor, thresholds: Tensor) -> float:
    images, steps, names = counts.shape
    errors = [
        sum(abs(float(counts[p, t, k]) - float(targets[p, k])) for p in range(images) for k in range(names))
        for t in range(steps)
    ]
    runs: list[list[int]] = [[]]
    for t, error in enumerate(errors):
        if error == min(errors):
            runs[-1].append(t)
        elif runs[-1]:
            runs.append([])
    run = max(runs, key=len)
    return float(thresholds[run[(len(run) - 1) // 2]])


@settings(max_examples=30, deadline=None)
@given(images=st.integers(1, 3), steps=st.integers(1, 9), names=st.integers(1, 2), seed=st.integers(0, 999))
def test_best_threshold_against_a_loop(images: int, steps: int, names: int, seed: int) -> None:
    g = torch.Generator().manual_seed(seed)
    counts = torch.randint(3, (images, steps, names), generator=g).float()
    targets = torch.randint(3, (images, names), generator=g).float()
    thresholds = torch.linspace(0.05, 0.95, steps)
    assert best_threshold(counts, targets, thresholds) == naive_threshold(counts, targets, thresholds)


def test_the_middle_of_the_longest_run() -> None:
    thresholds = torch.arange(10) / 10
    for counts, expected in (
        ([7, 5, 6, 5, 5, 5, 5, 5, 4, 5], 0.5),
        ([5, 5, 6, 6, 6, 6, 6, 5, 5, 6], 0.0),  # of two runs the first, and the lower of its two
        ([4, 6, 4, 6, 4, 6, 4, 6, 4, 6], 0.4),  # errors are equal on both sides
        ([9, 8, 7, 6, 5, 4, 3, 2, 1, 0], 0.4),
    ):
        found = best_threshold(torch.tensor(counts)[None, :, None].float(), torch.tensor([[5.0]]), thresholds)
        assert found == float(thresholds[round(expected * 10)])


def test_a_threshold_that_separates_objects_from_the_rest_is_found() -> None:
    """Objects score 0.6 to 0.9 and everything else 0.1 to 0.3: the middle between is as far from either as can be."""
    g = torch.Generator().manual_seed(0)
    thresholds, counts, targets = torch.arange(0, 101) / 100, [], []
    for objects in (0, 3, 8):
        scores = torch.cat([0.6 + 0.3 * torch.rand(objects, generator=g), 0.1 + 0.2 * torch.rand(20, generator=g)])
        counts.append(counts_at(scores, torch.zeros(len(scores), dtype=torch.int64), 1, thresholds))
        targets.append([float(objects)])
    found = best_threshold(torch.stack(counts), torch.tensor(targets), thresholds)
    assert found == pytest.approx(0.46, abs=0.03)


# -- what does not fit ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"score": "softmax"}, "softmax"),
        ({"score": "softmax", "negatives": torch.zeros(0, 4)}, "softmax"),
        ({"score": "sigmoid", "scale": 1.0}, "bias"),
        ({"score": "sigmoid", "scale": float("nan"), "bias": 0.0}, r"probabilities\[0, 0\]"),
        ({"score": "sigmoid", "scale": 1.0, "bias": 0.0, "negatives": torch.ones(1, 4)}, "sigmoid"),
        ({"score": "max"}, "'max'"),
        ({"score": "official", "temperature": 0.0}, "temperature"),
        ({"score": "official", "texts": torch.zeros(0, 4)}, "texts"),
        ({"score": "official", "texts": torch.ones(1, 5)}, r"\(2, 5\)"),
        ({"score": "official", "negatives": torch.ones(1, 5)}, r"\(1, 5\)"),
        ({"score": "official", "negatives": torch.full((1, 4), torch.nan)}, r"negatives\[0, 0\]"),
        ({"score": "official", "texts": torch.full((1, 4), torch.inf)}, r"texts\[0, 0\]"),
        (
            {"score": "official", "features": torch.tensor([[1.0, 2, 3, 4], [1, torch.nan, 3, 4]])},
            r"features\[1, 1\]",
        ),
    ],
)
def test_probabilities_that_cannot_be(options: dict[str, Any], message: str) -> None:
    features, texts = options.pop("features", torch.ones(2, 4)), options.pop("texts", torch.ones(1, 4))
    with pytest.raises(InputError, match=message):
        text_probabilities(features, texts, **options)


@pytest.mark.parametrize(
    ("objectness", "fusion", "message"),
    [
        (torch.tensor([0.5, 2.0]), "geometric", "objectness"),
        (torch.tensor([0.5, torch.nan]), "official", r"objectness\[1\]"),
        (None, "geometric", "'geometric'"),
        (torch.rand(3), "official", r"\(3,\)"),
        (torch.rand(2), "mean", "'mean'"),
    ],
)
def test_fusions_that_cannot_be(objectness: Tensor | None, fusion: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        fuse(torch.rand(2, 3), objectness, fusion)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"boxes": torch.ones(12, 5)}, r"\(12, 5\)"),
        ({"scores": torch.ones(11, 3)}, r"\(11, 3\)"),
        ({"scores": torch.ones(12, 0)}, r"\(12, 0\)"),
        ({"scores": torch.full((12, 3), torch.nan)}, r"scores\[0, 0\]"),
        ({"boxes": torch.full((12, 4), -torch.inf)}, r"boxes\[0, 0\]"),
        ({"deltas": torch.zeros(12, 12)}, r"\(12, 12\)"),
        ({"deltas": torch.full((12, 4), torch.nan)}, r"deltas\[0, 0\]"),
        ({"threshold": -0.1}, "threshold"),
        ({"threshold": float("nan")}, "threshold"),
        ({"iou_threshold": 1.5}, "iou_threshold"),
        ({"suppression": "none"}, "suppression"),
        ({"assign": "all"}, "assign"),
        ({"limit": 0}, "limit"),
        ({"size": (0, 80)}, r"\(0, 80\)"),
    ],
)
def test_detections_that_cannot_be(options: dict[str, Any], message: str) -> None:
    boxes, scores = draw()
    given = {"boxes": boxes, "scores": scores, "size": SIZE, "threshold": 0.5} | options
    with pytest.raises(InputError, match=message):
        detect(given.pop("boxes"), given.pop("scores"), **given)


def test_counts_and_thresholds_that_cannot_be() -> None:
    scores, labels, thresholds = torch.rand(3), torch.tensor([0, 1, 2]), torch.tensor([0.1, 0.5])
    with pytest.raises(InputError, match="2 names"):
        counts_at(scores, labels, 2, thresholds)
    with pytest.raises(InputError, match="0 names"):
        counts_at(scores[:0], labels[:0], 0, thresholds)
    with pytest.raises(InputError, match=r"labels \(2,\)"):
        counts_at(scores, labels[:2], 3, thresholds)
    with pytest.raises(InputError, match=r"scores\[0\]"):
        counts_at(torch.full((3,), torch.nan), labels, 3, thresholds)
    counts, targets = torch.ones(4, 2, 3), torch.ones(4, 3)
    for bad, message in (
        ((counts, targets[:3], thresholds), r"\(3, 3\)"),
        ((counts[:, :1], targets, thresholds), r"\(4, 1, 3\)"),
        ((counts[:0], targets[:0], thresholds), r"\(0, 2, 3\)"),
        ((counts, torch.full_like(targets, torch.nan), thresholds), r"targets\[0, 0\]"),
        ((torch.full_like(counts, torch.inf), targets, thresholds), r"counts\[0, 0, 0\]"),
        ((counts, targets, thresholds.flip(0)), "thresholds"),
        ((counts, targets, torch.tensor([0.1, 0.1])), "thresholds"),
    ):
        with pytest.raises(InputError, match=message):
            best_threshold(*bad)
