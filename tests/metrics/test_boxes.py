"""Box metrics: values by hand, a naive second implementation, repeated pictures, two processes."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, distributed
from torch import multiprocessing as mp

from counting_zoo.errors import InputError
from counting_zoo.metrics.detection import BoxPrecision, average_precision_50

NO_BOX, NO_LABEL, NO_SCORE = torch.zeros(0, 4), torch.zeros(0, dtype=torch.int64), torch.zeros(0)


def bars(*spans: tuple[float, float]) -> Tensor:
    """Boxes of height one from start to end."""
    return torch.tensor([(a, 0.0, b, 1.0) for a, b in spans])


def iou_of_spans(a: list[float], b: list[float]) -> float:
    shared = max(min(a[2], b[2]) - max(a[0], b[0]), 0.0)
    return shared / ((a[2] - a[0]) + (b[2] - b[0]) - shared)


def naive_ap50(images: list[dict]) -> float:
    """By loops over classes, pictures and boxes; distinct scores."""
    precisions = []
    for kind in sorted({k for p in images for k in p["true_labels"].tolist()}):
        ranked, n_true = [], 0
        for image in images:
            truths = image["true_boxes"][image["true_labels"] == kind].tolist()
            n_true += len(truths)
            mine = image["labels"] == kind
            taken: set[int] = set()
            scored = zip(image["scores"][mine].tolist(), image["boxes"][mine].tolist(), strict=True)
            for score, box in sorted(scored, reverse=True):
                overlaps = [iou_of_spans(box, truth) for truth in truths]
                best = int(np.argmax(overlaps)) if overlaps else -1
                hit = best >= 0 and overlaps[best] >= 0.5 and best not in taken
                taken |= {best} if hit else set()
                ranked.append((score, hit))
        ranked.sort(reverse=True)
        found = np.cumsum([hit for _, hit in ranked])
        precision = found / np.arange(1, len(ranked) + 1)
        precisions.append(sum(precision[i:].max() / n_true for i, (_, hit) in enumerate(ranked) if hit))
    return float(np.mean(precisions))


def drawn(seed: int, n: int = 4) -> list[dict]:
    rng = np.random.default_rng(seed)

    def some(count: int) -> Tensor:
        low = rng.uniform(0, 8, count)
        return bars(*zip(low, low + rng.uniform(2, 6, count), strict=True)) if count else NO_BOX

    images = []
    for _ in range(n):
        found, true = rng.integers(0, 6), rng.integers(0, 4)
        images.append(
            {
                "boxes": some(found),
                "labels": torch.from_numpy(rng.integers(0, 2, found)),
                "scores": torch.from_numpy(rng.uniform(size=found)),
                "true_boxes": some(true),
                "true_labels": torch.from_numpy(rng.integers(0, 2, true)),
            }
        )
    return images


def scored(images: list[dict], ids: list[int]) -> BoxPrecision:
    metric = BoxPrecision()
    for i in ids:
        metric.update(**images[i], image_id=str(i))
    return metric


def test_by_hand() -> None:
    """One object found at IoU 0.5 exactly behind a false alarm, one missed; the other class found at once."""
    metric = BoxPrecision()
    metric.update(
        bars((20, 24), (0, 5), (0, 4)),
        torch.tensor([0, 0, 1]),
        torch.tensor([0.9, 0.8, 0.1]),
        bars((0, 10), (30, 40), (0, 5)),
        torch.tensor([0, 0, 1]),
        "a",
    )
    metric.update(NO_BOX, NO_LABEL, NO_SCORE, NO_BOX, NO_LABEL, "empty")
    assert metric.compute() == pytest.approx(
        {"n": 2, "n_true": 3, "n_predicted": 3, "map50": (0.25 + 1) / 2, "abo": (0.25 + 0.8) / 2}
    )
    assert metric.per_class()[0]["map50"] == 0.25
    strict = BoxPrecision([0.5, 0.75])
    strict.update(bars((0, 5)), torch.tensor([0]), torch.ones(1), bars((0, 10)), torch.tensor([0]), "a")
    assert strict.compute()["map50"] == 1
    assert strict.compute()["map75"] == 0


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 10_000))
def test_the_naive_figure(seed: int) -> None:
    images = drawn(seed)
    columns = [[p[key] for p in images] for key in ("boxes", "labels", "scores", "true_boxes", "true_labels")]
    if sum(len(p["true_boxes"]) for p in images):
        assert average_precision_50(*columns) == pytest.approx(naive_ap50(images), abs=1e-12)
    else:
        with pytest.raises(InputError, match="true box"):
            average_precision_50(*columns)


def test_order_and_repetition_play_no_role() -> None:
    images = drawn(1, n=6)
    assert scored(images, [3, 0, 3, 5, 1, 0, 4, 2]).compute() == scored(images, [0, 1, 2, 3, 4, 5]).compute()


def scored_by_one_of_two(rank: int, folder: str) -> None:
    """One of two processes, which share a picture; the third is seen by the second alone."""
    distributed.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=2)
    result = scored(drawn(2, n=3), ([0], [0, 1, 2])[rank]).compute()
    Path(folder, f"{rank}.json").write_text(json.dumps(result))
    distributed.destroy_process_group()


def test_two_processes_give_what_one_gives(tmp_path: Path) -> None:
    mp.start_processes(scored_by_one_of_two, (str(tmp_path),), nprocs=2, start_method="fork")
    expected = scored(drawn(2, n=3), [0, 1, 2]).compute()
    assert "map50" in expected
    assert [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2)] == [expected] * 2


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"boxes": torch.zeros(1, 3)}, r"\(1, 3\)"),
        ({"true_labels": NO_LABEL}, "true_boxes"),
        ({"scores": torch.ones(2)}, r"\(2,\)"),
        ({"scores": torch.tensor([torch.nan])}, "scores"),
        ({"true_boxes": torch.full((1, 4), torch.inf)}, "true_boxes"),
    ],
)
def test_bad_input(change: dict[str, Tensor], message: str) -> None:
    box, one = bars((0, 2)), torch.tensor([0])
    good = {"boxes": box, "labels": one, "scores": torch.ones(1), "true_boxes": box, "true_labels": one}
    with pytest.raises(InputError, match=message):
        BoxPrecision().update(**(good | change), image_id="a.jpg")
