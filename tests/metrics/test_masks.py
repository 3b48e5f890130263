"""Mask metrics: values by hand, a naive second implementation, ties, repeated pictures, two processes."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, distributed
from torch import multiprocessing as mp

from counting_zoo.errors import InputError
from counting_zoo.metrics.detection import MaskPrecision, average_precision, mask_iou, match_masks

NOTHING = torch.zeros(0, 4, 4, dtype=torch.bool), torch.zeros(0, dtype=torch.int64)


def strip(*spans: tuple[int, int], width: int = 20) -> Tensor:
    """Masks ``(N, 1, width)`` from start to end."""
    column = torch.arange(width)
    return torch.stack([(column >= a) & (column < b) for a, b in spans])[:, None]


def naive(images: list[dict], threshold: float) -> tuple[float, float]:
    """mAP^r and ABO by loops: predictions one by one, the curve as a list of points, the area by steps."""
    precisions, overlaps = [], []
    for kind in sorted({k for p in images for k in p["true_labels"].tolist()}):
        ranked, n_true, best = [], 0, []
        for image in images:
            truths = [m for m, k in zip(image["true_masks"], image["true_labels"].tolist(), strict=True) if k == kind]
            rows = zip(image["masks"], image["labels"].tolist(), image["scores"].tolist(), strict=True)
            mine = sorted(((m, s) for m, k, s in rows if k == kind), key=lambda pair: -pair[1])
            n_true += len(truths)
            ious = [[((m & t).sum() / (m | t).sum()).item() if (m | t).any() else 0.0 for t in truths] for m, _ in mine]
            best += [max((row[j] for row in ious), default=0.0) for j in range(len(truths))]
            had: set[int] = set()
            for (_, score), row in zip(mine, ious, strict=True):
                j = int(np.argmax(row)) if row else -1
                hit = j >= 0 and row[j] >= threshold and j not in had
                had |= {j} if hit else set()
                ranked.append((score, hit))
        points = []
        for level in sorted({score for score, _ in ranked}, reverse=True):
            above = [hit for score, hit in ranked if score >= level]
            points.append((sum(above) / n_true, sum(above) / len(above)))
        area, before = 0.0, 0.0
        for i, (recall, _) in enumerate(points):
            area += (recall - before) * max(p for _, p in points[i:])
            before = recall
        precisions.append(area)
        overlaps.append(float(np.mean(best)))
    return float(np.mean(precisions)), float(np.mean(overlaps))


def drawn(seed: int, n: int = 5, ties: bool = False) -> list[dict]:
    rng = np.random.default_rng(seed)
    images = []
    for _ in range(n):
        n_predicted, n_true = rng.integers(0, 5), rng.integers(0, 4)
        spans = [sorted(rng.integers(0, 20, 2)) for _ in range(n_predicted + n_true)]
        masks = strip(*[(int(a), int(b) + 1) for a, b in spans]) if spans else torch.zeros(0, 1, 20, dtype=torch.bool)
        scores = rng.integers(0, 3, n_predicted) if ties else rng.normal(size=n_predicted)
        images.append(
            {
                "masks": masks[:n_predicted],
                "labels": torch.from_numpy(rng.integers(0, 3, n_predicted)),
                "scores": torch.from_numpy(scores.astype(np.float32)),
                "true_masks": masks[n_predicted:],
                "true_labels": torch.from_numpy(rng.integers(0, 3, n_true)),
            }
        )
    return images


def test_by_hand() -> None:
    """Two classes: one found twice over and once missed, one found at IoU 0.5 only behind a false alarm."""
    metric = MaskPrecision()
    metric.update(
        strip((0, 10), (0, 9), (12, 20), (15, 20)),
        torch.tensor([0, 0, 1, 1]),
        torch.tensor([0.9, 0.8, 0.7, 0.6]),
        strip((0, 10), (12, 16), (10, 20)),
        torch.tensor([0, 0, 1]),
        "a",
    )
    metric.update(*NOTHING, torch.zeros(0), *NOTHING, "empty")
    # class 0: right at every IoU, then a second find of the same object; one of two objects missed: AP 0.5 at each.
    # class 1: IoU 0.8, then 0.5 on the same object: AP 1 at 0.25, 0.5 and 0.75.
    assert metric.compute() == pytest.approx(
        {"n": 2, "n_true": 3, "n_predicted": 4, "map25": 0.75, "map50": 0.75, "map75": 0.75, "abo": (0.5 + 0.8) / 2}
    )
    assert metric.per_class()[0] == pytest.approx(
        {"n_true": 2, "n_predicted": 2, "map25": 0.5, "map50": 0.5, "map75": 0.5, "abo": 0.5}
    )


def test_a_mask_is_right_from_the_threshold_on() -> None:
    metric = MaskPrecision()
    one = torch.tensor([0])
    metric.update(strip((0, 5)), one, torch.ones(1), strip((0, 10)), one, "half")
    assert metric.compute() == {"n": 1, "n_true": 1, "n_predicted": 1, "map25": 1, "map50": 1, "map75": 0, "abo": 0.5}


def test_the_object_overlapped_most_decides() -> None:
    """PASCAL's rule: the second finder of an object is wrong even where it also overlaps a free one."""
    iou = torch.tensor([[0.9, 0.0], [0.6, 0.3]])
    assert match_masks(iou, torch.tensor([2.0, 1.0]), [0.25]).tolist() == [[True], [False]]
    assert match_masks(iou, torch.tensor([1.0, 2.0]), [0.25]).tolist() == [[False], [True]]
    # A higher one that misses the threshold does not take the object away.
    assert match_masks(torch.tensor([[0.4], [0.8]]), torch.tensor([2.0, 1.0]), [0.5]).tolist() == [[False], [True]]


def test_average_precision_by_hand() -> None:
    right, scores = torch.tensor([False, True, True, False]), torch.tensor([4.0, 3.0, 2.0, 1.0])
    # precision 0, 1/2, 2/3, 2/4 at recall 0, 1/3, 2/3, 2/3; made to fall: 2/3 up to recall 2/3
    assert average_precision(right, scores, 3) == pytest.approx(4 / 9)
    assert average_precision(right[:0], scores[:0], 3) == 0
    with pytest.raises(InputError, match="0 objects"):
        average_precision(right, scores, 0)


def test_equal_scores_enter_together() -> None:
    right = torch.tensor([True, False, True, False])
    for order in ([0, 1, 2, 3], [3, 1, 0, 2]):
        assert average_precision(right[order], torch.zeros(4), 4) == 0.25  # one point: recall 1/2, precision 1/2


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 10_000), ties=st.booleans())
def test_the_naive_figures(seed: int, ties: bool) -> None:
    images = drawn(seed, ties=ties)
    metric = MaskPrecision()
    for i, image in enumerate(images):
        metric.update(**image, image_id=str(i))
    result = metric.compute()
    if not result["n_true"]:
        assert result.keys() == {"n", "n_true", "n_predicted"}
        return
    for threshold in (0.25, 0.5, 0.75):
        precision, overlap = naive(images, threshold)
        assert result[f"map{round(100 * threshold)}"] == pytest.approx(precision, abs=1e-12)
        assert result["abo"] == pytest.approx(overlap, abs=1e-6)


def test_order_repetition_and_distribution_play_no_role() -> None:
    images = drawn(1, n=8, ties=True)

    def scored(ids: list[int]) -> MaskPrecision:
        metric = MaskPrecision()
        for i in ids:
            metric.update(**images[i], image_id=str(i))
        return metric

    expected = scored(list(range(8))).compute()
    assert scored([5, 0, 3, 3, 7, 1, 2, 6, 4, 0]).compute() == expected
    first, second = scored([0, 1, 2, 3, 4]), scored([4, 5, 6, 7, 0])  # as a sampler evens out two processes
    for name in (f"{column}_" for column in ("image_key", "kind", "place", *first.columns)):
        joined = torch.cat([torch.cat(getattr(first, name)), torch.cat(getattr(second, name))])
        setattr(first, name, joined)
    assert first.compute() == expected


def scored_by_one_of_two(rank: int, folder: str) -> None:
    """One of two processes, which share a picture; the third is seen by the second alone."""
    distributed.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=2)
    images, metric = drawn(2, n=3), MaskPrecision()
    for i in ([0], [0, 1, 2])[rank]:
        metric.update(**images[i], image_id=str(i))
    Path(folder, f"{rank}.json").write_text(json.dumps(metric.compute()))
    distributed.destroy_process_group()


def test_two_processes_give_what_one_gives(tmp_path: Path) -> None:
    mp.start_processes(scored_by_one_of_two, (str(tmp_path),), nprocs=2, start_method="fork")
    metric = MaskPrecision()
    for i, image in enumerate(drawn(2, n=3)):
        metric.update(**image, image_id=str(i))
    expected = metric.compute()
    assert "abo" in expected
    assert [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2)] == [expected] * 2


def test_nothing_scored_and_nothing_predicted() -> None:
    with pytest.warns(UserWarning, match="update"):
        assert MaskPrecision().compute() == {"n": 0, "n_true": 0, "n_predicted": 0}
    metric = MaskPrecision()
    metric.update(*NOTHING, torch.zeros(0), torch.ones(1, 4, 4, dtype=torch.bool), torch.tensor([3]), "a")
    assert metric.compute() == {"n": 1, "n_true": 1, "n_predicted": 0, "map25": 0, "map50": 0, "map75": 0, "abo": 0}
    assert all(math.isfinite(value) for value in metric.compute().values())


def test_iou_of_many_masks_and_of_empty_ones() -> None:
    torch.manual_seed(0)
    masks, others = torch.rand(130, 5, 7) > 0.5, torch.rand(3, 5, 7) > 0.5
    masks[0] = others[0] = False
    expected = [[(m & o).sum().item() / max(1, (m | o).sum().item()) for o in others] for m in masks]
    assert mask_iou(masks, others).tolist() == expected
    assert mask_iou(masks[:0], others).shape == (0, 3)


def test_bad_input_is_named() -> None:
    metric, one = MaskPrecision(), torch.tensor([0])
    mask = torch.ones(1, 4, 4, dtype=torch.bool)
    with pytest.raises(InputError, match=r"\(4, 5\)"):
        metric.update(mask, one, torch.ones(1), torch.ones(1, 4, 5, dtype=torch.bool), one, "a.jpg")
    with pytest.raises(InputError, match="2 labels"):
        metric.update(mask, torch.tensor([0, 1]), torch.ones(1), mask, one, "a.jpg")
    with pytest.raises(InputError, match="scores"):
        metric.update(mask, one, torch.full((1,), math.nan), mask, one, "a.jpg")
    with pytest.raises(InputError, match="bool"):
        mask_iou(mask.float(), mask)
