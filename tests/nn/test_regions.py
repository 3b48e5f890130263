"""RoIAlign and suppression: loops over samples and boxes as second implementations, the reference's values, edges."""

from __future__ import annotations

import importlib.util

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from places import BENCHMARKS, GOLDEN
from torch import Tensor

from counting_zoo.errors import InputError
from counting_zoo.geometry import box_iou
from counting_zoo.nn import regions
from counting_zoo.nn.regions import batched_nms, nms, roi_align, soft_nms

#: Entry ``ops`` of the parity file of RegionCLIP, whole but for the maps, of which the first two channels are kept.
GOLDEN_FILE = GOLDEN / "region_clip_ops.pt"
BENCHMARK = BENCHMARKS / "regions.py"

ODD = torch.tensor(
    [
        [0.0, 0.0, 12.0, 9.0],  # the whole map
        [-5.0, -3.0, 4.0, 4.0],  # partly outside
        [9.0, 7.0, 30.0, 40.0],
        [-20.0, -20.0, -10.0, -10.0],  # outside
        [3.0, 3.0, 3.0, 3.0],  # no area
        [2.0, 1.0, 2.2, 7.0],  # thinner than a cell
        [8.0, 2.0, 5.0, 6.0],  # inverted along x
        [8.0, 6.0, 5.0, 2.0],  # and along both
        [10.0, 7.0, 14.0, 11.0],  # samples exactly one cell outside
    ],
    dtype=torch.float64,
)


@pytest.fixture(scope="module")
def golden() -> dict:
    return torch.load(GOLDEN_FILE, weights_only=True)


def naive_sample(plane: np.ndarray, y: float, x: float) -> float:
    height, width = plane.shape
    if y < -1 or y > height or x < -1 or x > width:
        return 0.0
    y, x = min(max(y, 0.0), height - 1.0), min(max(x, 0.0), width - 1.0)
    top, left = int(y), int(x)
    bottom, right = min(top + 1, height - 1), min(left + 1, width - 1)
    upper = plane[top, left] * (1 - (x - left)) + plane[top, right] * (x - left)
    lower = plane[bottom, left] * (1 - (x - left)) + plane[bottom, right] * (x - left)
    return upper * (1 - (y - top)) + lower * (y - top)


def naive_roi_align(
    features: Tensor, boxes: Tensor, bins: tuple[int, int], scale: float, ratio: int, aligned: bool
) -> Tensor:
    """Region by region, bin by bin, sample by sample."""
    maps, shift = features.numpy(), 0.5 if aligned else 0.0
    out = np.zeros((len(boxes), features.shape[1], *bins))
    for r, (index, *corners) in enumerate(boxes.tolist()):
        x1, y1, x2, y2 = (value * scale - shift for value in corners)
        width, height = (x2 - x1, y2 - y1) if aligned else (max(x2 - x1, 1.0), max(y2 - y1, 1.0))
        rows = ratio if ratio > 0 else int(np.ceil(height / bins[0]))
        columns = ratio if ratio > 0 else int(np.ceil(width / bins[1]))
        for c, p, q in np.ndindex(features.shape[1], *bins):
            values = [
                naive_sample(
                    maps[int(index), c],
                    y1 + (p + (i + 0.5) / rows) * height / bins[0],
                    x1 + (q + (j + 0.5) / columns) * width / bins[1],
                )
                for i in range(rows)
                for j in range(columns)
            ]
            out[r, c, p, q] = sum(values) / max(len(values), 1)
    return torch.from_numpy(out)


def naive_nms(boxes: Tensor, scores: Tensor, groups: Tensor, threshold: float) -> list[int]:
    corners, kept = boxes.numpy(), []
    for j in sorted(range(len(scores)), key=lambda k: -scores[k].item()):
        if not any(groups[i] == groups[j] and naive_iou(corners[i], corners[j]) > threshold for i in kept):
            kept.append(j)
    return kept


def naive_iou(a: np.ndarray, b: np.ndarray) -> float:
    """In the boxes' precision; compared with a threshold in float64."""
    zero = a.dtype.type(0)
    shared = max(min(a[2], b[2]) - max(a[0], b[0]), zero) * max(min(a[3], b[3]) - max(a[1], b[1]), zero)
    union = (a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - shared
    return float(shared / union) if union > 0 else 0.0


def naive_soft_nms(boxes: Tensor, scores: Tensor, method: str, prune: float = 0.001) -> tuple[list[int], list[float]]:
    corners, left, kept, values = boxes.numpy(), dict(enumerate(scores.tolist())), [], []
    while left:
        top = max(left, key=lambda k: left[k])
        kept.append(top)
        values.append(left.pop(top))
        for k in list(left):
            iou = naive_iou(corners[top], corners[k])
            left[k] *= np.exp(-iou * iou / 0.5) if method == "gaussian" else 1 - iou if iou > 0.3 else 1
            if left[k] <= prune:
                del left[k]
    return kept, values


def drawn_boxes(seed: int, n: int, coarse: bool = False) -> tuple[Tensor, Tensor, Tensor]:
    """Boxes, scores and groups; ``coarse`` ones coincide, and their scores tie."""
    rng = np.random.default_rng(seed)
    low, size = rng.uniform(0, 20, (n, 2)), rng.uniform(0, 15, (n, 2))
    boxes, scores = np.concatenate([low, low + size], 1), rng.uniform(size=n)
    if coarse:
        boxes, scores = boxes.round(-1), scores.round(1)
    return torch.from_numpy(boxes).float(), torch.from_numpy(scores).float(), torch.from_numpy(rng.integers(0, 3, n))


# --- RoIAlign


@pytest.mark.parametrize("aligned", [True, False])
@pytest.mark.parametrize("ratio", [-1, 0, 1, 2, 3])
@pytest.mark.parametrize("bins", [(1, 1), (2, 3), (7, 7)])
def test_roi_align_by_loops(bins: tuple[int, int], ratio: int, aligned: bool) -> None:
    features = torch.randn(2, 2, 9, 12, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    boxes = torch.cat([torch.arange(len(ODD), dtype=torch.float64)[:, None] % 2, ODD], 1)
    for scale in (1.0, 0.3):
        ours = roi_align(features, boxes, bins, scale, ratio, aligned)
        torch.testing.assert_close(
            ours, naive_roi_align(features, boxes, bins, scale, ratio, aligned), atol=1e-12, rtol=0
        )


@settings(max_examples=25, deadline=None)
@given(
    corners=st.lists(st.tuples(*[st.floats(-30, 30, width=16)] * 4), min_size=1, max_size=5),
    bins=st.tuples(st.integers(1, 4), st.integers(1, 4)),
    ratio=st.integers(0, 2),
    aligned=st.booleans(),
    size=st.tuples(st.integers(1, 6), st.integers(1, 6)),
)
def test_roi_align_of_any_boxes(
    corners: list[tuple[float, ...]], bins: tuple[int, int], ratio: int, aligned: bool, size: tuple[int, int]
) -> None:
    features = torch.randn(1, 1, *size, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    boxes = torch.tensor([(0.0, *own) for own in corners], dtype=torch.float64)
    ours = roi_align(features, boxes, bins, 0.5, ratio, aligned)
    torch.testing.assert_close(ours, naive_roi_align(features, boxes, bins, 0.5, ratio, aligned), atol=1e-11, rtol=0)


@pytest.mark.parametrize("ratio", [0, 2])
@pytest.mark.parametrize("bins", [1, 7, 14, 18])
def test_roi_align_of_the_reference(golden: dict, bins: int, ratio: int) -> None:
    expected = golden[f"roi_{bins}_{ratio}"]
    ours = roi_align(golden["feature"], golden["boxes"], bins, 1 / 16, ratio, aligned=True)
    assert (ours - expected).abs().max() <= 1e-5 * expected.abs().max()
    if (bins, ratio) == (14, 0):
        expected = golden["roi_14_0_unaligned"]
        ours = roi_align(golden["feature"], golden["boxes"], bins, 1 / 16)
        assert (ours - expected).abs().max() <= 1e-5 * expected.abs().max()


def test_a_box_of_constant_features_and_of_a_ramp() -> None:
    ramp = torch.arange(8.0).expand(1, 1, 6, 8)
    box = [torch.tensor([[2.0, 1.0, 6.0, 5.0]])]
    assert roi_align(torch.full_like(ramp, 3.0), box, 4, aligned=True).unique().tolist() == [3.0]
    # Cell i has its centre at i + 0.5: the four bins are the cells 2, 3, 4 and 5 themselves.
    assert roi_align(ramp, box, 4, aligned=True)[0, 0, 0].tolist() == [2, 3, 4, 5]
    assert roi_align(ramp, box, 4, sampling_ratio=1)[0, 0, 0].tolist() == [2.5, 3.5, 4.5, 5.5]
    assert roi_align(ramp, [box[0] * 16], 4, 1 / 16, aligned=True)[0, 0, 0].tolist() == [2, 3, 4, 5]


def test_both_ways_to_give_boxes() -> None:
    features = torch.randn(3, 2, 6, 6, generator=torch.Generator().manual_seed(2))
    own = [torch.tensor([[0.0, 0.0, 3.0, 4.0], [1.0, 1.0, 5.0, 5.0]]), torch.zeros(0, 4), torch.tensor([[2, 2, 6, 6]])]
    together = torch.cat([torch.tensor([[0.0], [0.0], [2.0]]), torch.cat([boxes.float() for boxes in own])], 1)
    expected = roi_align(features, own, 2)
    assert torch.equal(roi_align(features, together, 2), expected)
    back = [2, 0, 1]  # images in any order
    assert torch.equal(roi_align(features, together[back], 2), expected[back])


@pytest.mark.parametrize("ratio", [0, 2])
@pytest.mark.parametrize("aligned", [True, False])
def test_gradients_are_exact(ratio: int, aligned: bool) -> None:
    features = torch.randn(2, 2, 4, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(3)).requires_grad_()
    boxes = [ODD[:5] / 3, ODD[5:] / 3]
    assert torch.autograd.gradcheck(lambda f: roi_align(f, boxes, (2, 3), 1.0, ratio, aligned), features)
    moving = ODD.clone().requires_grad_()
    assert not roi_align(features.detach(), [moving, moving], 2).requires_grad


def test_gradient_of_the_reference_boxes_is_the_transpose(golden: dict) -> None:
    """<g, A f> = <A^T g, f> for the linear map of features that RoIAlign is, in float64."""
    features = golden["feature"].double().requires_grad_()
    out = roi_align(features, golden["boxes"], 14, 1 / 16, 0, aligned=True)
    given_back = torch.randn_like(out)
    out.backward(given_back)
    assert features.grad is not None
    torch.testing.assert_close((features.grad * features).sum(), (given_back * out).sum(), rtol=1e-11, atol=1e-9)


def test_no_boxes_keep_the_graph() -> None:
    features = torch.randn(2, 3, 4, 4, requires_grad=True)
    for boxes in (torch.zeros(0, 5), [torch.zeros(0, 4)] * 2):
        out = roi_align(features, boxes, (2, 5))
        assert out.shape == (0, 3, 2, 5)
        out.sum().backward()
    assert features.grad is not None
    assert not features.grad.any()
    assert roi_align(torch.zeros(0, 3, 4, 4), [], 2).shape == (0, 3, 2, 2)


def test_pieces_play_no_role(monkeypatch: pytest.MonkeyPatch) -> None:
    """Few regions at a time, few samples at a time; and a box of a thousand times the map."""
    features = torch.randn(1, 2, 9, 12, dtype=torch.float64, generator=torch.Generator().manual_seed(4))
    boxes = [torch.cat([ODD, torch.tensor([[-9e3, -5e3, 9e3, 7e3]], dtype=torch.float64)])]
    expected = roi_align(features, boxes, 3, aligned=True)
    monkeypatch.setattr(regions, "TOGETHER", 100)
    torch.testing.assert_close(roi_align(features, boxes, 3, aligned=True), expected, rtol=0, atol=1e-14)
    monkeypatch.setattr(regions, "PRODUCT", 1)
    monkeypatch.setattr(regions, "TILE", 500)
    torch.testing.assert_close(roi_align(features, boxes, 3, aligned=True), expected, rtol=0, atol=1e-14)


def test_half_precision_is_calculated_in_single() -> None:
    features = torch.randn(1, 3, 8, 8, generator=torch.Generator().manual_seed(5)).bfloat16()
    boxes = [torch.tensor([[0.3, 0.4, 7.7, 6.1], [1.03, 2.2, 3.3, 4.4]])]
    expected = roi_align(features.float(), boxes, 4, aligned=True)
    assert torch.equal(roi_align(features, boxes, 4, aligned=True), expected.bfloat16())
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(roi_align(features.float(), boxes, 4, aligned=True), expected)


@pytest.mark.parametrize(
    ("features", "boxes", "message"),
    [
        (torch.zeros(3, 4, 4), [torch.zeros(1, 4)], r"\(B, C, H, W\)"),
        (torch.zeros(1, 3, 4, 4, dtype=torch.uint8), [torch.zeros(1, 4)], "floating"),
        (torch.zeros(1, 3, 0, 4), [torch.zeros(1, 4)], r"\(1, 3, 0, 4\)"),
        (torch.zeros(1, 3, 4, 4), torch.zeros(2, 4), r"\(K, 5\)"),
        (torch.zeros(1, 3, 4, 4), [torch.zeros(1, 4)] * 2, r"\(1, 4\), \(1, 4\)"),
        (torch.zeros(1, 3, 4, 4), [torch.zeros(1, 5)], r"\(1, 5\)"),
        (torch.zeros(1, 3, 4, 4), torch.tensor([[1.0, 0, 0, 1, 1]]), "1 to 1"),
        (torch.zeros(1, 3, 4, 4), torch.tensor([[-1.0, 0, 0, 1, 1]]), "-1 to -1"),
        (torch.zeros(1, 3, 4, 4), [torch.tensor([[0, 0, 1, torch.nan]])], r"boxes\[0, 3\]"),
    ],
)
def test_bad_regions(features: Tensor, boxes: Tensor | list[Tensor], message: str) -> None:
    with pytest.raises(InputError, match=message):
        roi_align(features, boxes, 2)


# --- suppression


def test_iou_by_hand() -> None:
    boxes = torch.tensor([[0, 0, 2, 2], [1, 1, 3, 3], [1, 1, 1, 1], [3, 3, 1, 1]])
    expected = torch.tensor([[1, 1 / 7, 0, 0], [1 / 7, 1, 0, 0], [0, 0, 0, 0], [0, 0, 0, 0]])
    torch.testing.assert_close(box_iou(boxes, boxes), expected)
    assert box_iou(boxes.double(), boxes[:0]).shape == (4, 0)
    with pytest.raises(InputError, match=r"\(N, 4\)"):
        box_iou(boxes, boxes[:, :3])


@settings(max_examples=30, deadline=None)
@given(
    seed=st.integers(0, 10_000),
    n=st.integers(0, 40),
    threshold=st.sampled_from([0.0, 0.3, 0.5, 0.7, 1.0]),
    coarse=st.booleans(),
    block=st.sampled_from([3, 16, 1024]),
)
def test_nms_by_loops(seed: int, n: int, threshold: float, coarse: bool, block: int) -> None:
    boxes, scores, groups = drawn_boxes(seed, n, coarse)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(regions, "BLOCK", block)
        patch.setattr(regions, "TILE", 5 * block)
        assert nms(boxes, scores, threshold).tolist() == naive_nms(boxes, scores, torch.zeros_like(groups), threshold)
        assert batched_nms(boxes, scores, groups, threshold).tolist() == naive_nms(boxes, scores, groups, threshold)


def test_nms_of_the_reference(golden: dict) -> None:
    boxes, scores, groups = golden["nms_boxes"], golden["nms_scores"], golden["nms_idx"]
    assert torch.equal(batched_nms(boxes, scores, groups, 0.5), golden["nms_keep"])
    kept, values = soft_nms(boxes, scores, groups)
    assert torch.equal(kept, golden["soft"][0])
    torch.testing.assert_close(values, golden["soft"][1], rtol=1e-4, atol=0)


def test_a_chain_of_overlaps() -> None:
    """Each box overlaps the next: every second one stays, which takes the fixed point as many rounds as boxes."""
    start = torch.arange(300.0)
    boxes = torch.stack([start, torch.zeros(300), start + 2, torch.ones(300)], 1)
    assert nms(boxes, -start, 0.3).tolist() == list(range(0, 300, 2))


def test_an_overlap_of_the_threshold_itself_stays() -> None:
    boxes = torch.tensor([[0.0, 0.0, 1.0, 10.0], [0.0, 0.0, 1.0, 5.0]])  # IoU 0.5
    assert nms(boxes, torch.tensor([0.9, 0.8]), 0.5).tolist() == [0, 1]
    assert nms(boxes, torch.tensor([0.9, 0.8]), 0.4999).tolist() == [0]
    boxes[1, 3] = 3  # 0.3 in float32 is above 0.3 in float64, which torchvision compares it with
    assert nms(boxes, torch.tensor([0.9, 0.8]), 0.3).tolist() == [0]
    boxes[1, 3] = 7  # and 0.7 is below
    assert nms(boxes, torch.tensor([0.9, 0.8]), 0.7).tolist() == [0, 1]


def test_equal_scores_keep_their_order() -> None:
    boxes = torch.tensor([[0.0, 0.0, 1.0, 1.0], [5.0, 5.0, 6.0, 6.0], [0.0, 0.0, 1.0, 1.0]])
    assert nms(boxes, torch.ones(3), 0.5).tolist() == [0, 1]
    assert soft_nms(boxes, torch.ones(3), method="linear")[0].tolist() == [0, 1]


def test_many_boxes() -> None:
    """Twenty thousand, in two copies: exactly the first copy stays of boxes that lie apart."""
    side = torch.arange(100.0) * 10
    corner = torch.cartesian_prod(side, side)
    boxes = torch.cat([corner, corner + 8], 1).repeat(2, 1)
    scores = torch.rand(10_000, generator=torch.Generator().manual_seed(6))
    kept = nms(boxes, torch.cat([scores, scores / 2]), 0.5)
    assert torch.equal(kept, scores.argsort(descending=True, stable=True))


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 10_000), n=st.integers(0, 25), method=st.sampled_from(["gaussian", "linear"]))
def test_soft_nms_by_loops(seed: int, n: int, method: str) -> None:
    boxes, scores, groups = drawn_boxes(seed, n)
    kept, values = soft_nms(boxes, scores, method=method)
    expected, lowered = naive_soft_nms(boxes, scores, method)
    assert kept.tolist() == expected
    assert values.tolist() == pytest.approx(lowered, rel=1e-4)
    kept, values = soft_nms(boxes, scores, groups, method=method)
    assert len(kept) >= len(expected)
    assert torch.equal(values, values.sort(descending=True).values)


def test_soft_nms_prunes() -> None:
    boxes = torch.tensor([[0.0, 0.0, 1.0, 1.0], [0.0, 0.0, 1.0, 1.0], [5.0, 5.0, 6.0, 6.0]])
    scores = torch.tensor([0.9, 0.8, 0.05])
    kept, values = soft_nms(boxes, scores, prune=0.1)
    assert kept.tolist() == [0, 1]
    assert values.tolist() == pytest.approx([0.9, 0.8 * np.exp(-2)])
    assert soft_nms(boxes, scores, prune=0.2)[0].tolist() == [0]
    assert soft_nms(boxes[:0], scores[:0])[0].tolist() == []
    assert torch.equal(scores, torch.tensor([0.9, 0.8, 0.05]))  # what was given is left alone


def test_bad_boxes() -> None:
    boxes, scores, groups = drawn_boxes(0, 4)
    with pytest.raises(InputError, match="iou_threshold"):
        nms(boxes, scores, 1.5)
    with pytest.raises(InputError, match="idxs"):
        batched_nms(boxes, scores, groups[:3], 0.5)
    with pytest.raises(InputError, match=r"scores\[2\]"):
        nms(boxes, scores.index_fill(0, torch.tensor([2]), torch.nan), 0.5)
    with pytest.raises(InputError, match=r"boxes\[0, 0\]"):
        soft_nms(boxes.index_fill(0, torch.tensor([0]), torch.inf), scores)
    with pytest.raises(InputError, match="sigma"):
        soft_nms(boxes, scores, sigma=0.0)


def test_benchmark_runs_and_agrees(capsys: pytest.CaptureFixture[str]) -> None:
    spec = importlib.util.spec_from_file_location("benchmark_regions", BENCHMARK)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    module.main(["--repeats", "1", "--regions", "4", "--channels", "8", "--boxes", "100"])
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 7
    assert all(float(line.split()[-1]) < 1e-4 for line in lines[1:])


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA")
def test_the_same_on_a_gpu(golden: dict) -> None:
    boxes = [own.cuda() for own in golden["boxes"]]
    ours = roi_align(golden["feature"].cuda(), boxes, 14, 1 / 16, 0, aligned=True).cpu()
    assert (ours - golden["roi_14_0"]).abs().max() <= 1e-5 * golden["roi_14_0"].abs().max()
    given_boxes = (golden[name].cuda() for name in ("nms_boxes", "nms_scores", "nms_idx"))
    assert torch.equal(batched_nms(*given_boxes, 0.5).cpu(), golden["nms_keep"])
