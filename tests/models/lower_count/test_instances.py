"""Retrieval of instance masks: scores by loops over pixels, suppression by hand, counts, frames, empty input."""

from __future__ import annotations

import warnings

import cv2
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from counting_zoo.errors import InputError
from counting_zoo.geometry import Preprocess
from counting_zoo.metrics.detection import mask_iou
from counting_zoo.models.lower_count.instances import (
    Retrieval,
    _choose,
    background_maps,
    peak_response_maps,
    prepare_proposals,
    retrieval_scores,
    retrieve_instances,
    select_peaks,
)
from counting_zoo.models.lower_count.network import find_peaks, peak_scores
from counting_zoo.models.lower_count.proposals import segment_proposals

FRAME, GRID, STORED = (24, 32), (4, 5), (30, 26)


class ColourNet(nn.Module):
    """Class maps of how red and how blue a picture is, a cell for 8 pixels."""

    def __init__(self) -> None:
        super().__init__()
        self.hue, self.pool = nn.Conv2d(3, 2, 1, bias=False), nn.Conv2d(2, 2, 24, 8, 8, groups=2, bias=False)
        self.hue.weight.data = torch.tensor([[1.0, -0.5, -0.5], [-0.5, -0.5, 1.0]])[:, :, None, None]
        bump = torch.signal.windows.gaussian(24, std=5.0)
        self.pool.weight.data = (bump[:, None] * bump / bump.sum() ** 2 * 20).expand(2, 1, 24, 24).clone()

    def forward(self, x: Tensor) -> Tensor:
        return self.pool(self.hue(x).relu())


def test_from_a_image_to_masks_in_its_own_pixels() -> None:
    """Peaks of a network that sees a warped photo, its response maps, proposals from the photo, masks."""
    size, discs = (150, 220), [(40, 45, 0), (110, 100, 0), (180, 50, 0), (50, 115, 1), (175, 115, 1)]
    photo, truth = np.full((*size, 3), 128, np.uint8), []
    for x, y, kind in discs:
        cv2.circle(photo, (x, y), 17, (220, 40, 40) if kind == 0 else (40, 40, 220), cv2.FILLED)
        truth.append(cv2.circle(np.zeros(size, np.uint8), (x, y), 17, 1, cv2.FILLED))
    image = Preprocess("warp", 128)(torch.from_numpy(photo).permute(2, 0, 1))[None].float() / 255
    net = ColourNet().eval()
    with torch.no_grad():
        maps = net(image)
    raw = maps[0] * 2.5 / maps[0].mean((1, 2), keepdim=True)  # two and a half objects on average
    cells = find_peaks(maps)
    peaks = select_peaks(maps[0], cells[0], peak_scores(maps, cells)[0])
    assert peaks[:, 0].bincount().tolist() == [3, 2]
    responses = peak_response_maps(net, image, peaks)
    found = retrieve_instances(segment_proposals(photo), peaks, responses, maps[0], raw)
    assert found.masks.shape == (5, *size)
    iou = mask_iou(torch.from_numpy(np.stack(truth)).bool(), found.masks)
    assert (iou.amax(1) > 0.8).all(), iou
    assert found.labels[iou.argmax(1)].tolist() == [kind for _, _, kind in discs]
    assert ((found.responses * found.masks).sum((1, 2)) > 0.6).all()


def rectangles(*boxes: tuple[int, int, int, int], size: tuple[int, int] = STORED) -> Tensor:
    """Masks of x1, y1, x2, y2."""
    masks = torch.zeros(len(boxes), *size, dtype=torch.bool)
    for mask, (x1, y1, x2, y2) in zip(masks, boxes, strict=True):
        mask[y1:y2, x1:x2] = True
    return masks


def drawn(seed: int, n_peaks: int = 4, n_proposals: int = 9) -> dict[str, Tensor]:
    rng = np.random.default_rng(seed)
    corners = np.sort(rng.integers(0, 27, (n_proposals, 2, 2)), axis=1)
    boxes = [(int(a[0]), int(a[1]), int(b[0]) + 1, int(b[1]) + 1) for a, b in corners]
    responses = torch.from_numpy(rng.random((n_peaks, *FRAME), dtype=np.float32) ** 4)
    return {
        "proposals": rectangles(*boxes),
        "peaks": torch.from_numpy(rng.integers(0, (3, *GRID), (n_peaks, 3))),
        "responses": responses / responses.sum((1, 2), keepdim=True),
        "class_maps": torch.from_numpy(rng.normal(size=(3, *GRID)).astype(np.float32)),
        "raw_density": torch.from_numpy(rng.normal(1, 2, (3, *GRID)).astype(np.float32)),
    }


def nearest(mask: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """The pixel under the centre of each new one."""
    rows = [int((i + 0.5) * mask.shape[0] / size[0]) for i in range(size[0])]
    columns = [int((j + 0.5) * mask.shape[1] / size[1]) for j in range(size[1])]
    return np.array([[mask[r, c] for c in columns] for r in rows])


def naive_score(mask: np.ndarray, response: np.ndarray, behind: np.ndarray, raw: np.ndarray) -> float:
    small, total = nearest(mask, FRAME), 0.0
    for y, x in np.ndindex(*FRAME):
        window = small[max(0, y - 2) : y + 3, max(0, x - 2) : x + 3]
        total += 0.8 * response[y, x] * small[y, x] + response[y, x] * (window.any() and not window.all())
        total -= 1e-5 * behind[y, x] * small[y, x]
    return total - 0.2 * abs(1 - (raw * nearest(mask, GRID)).sum() / raw.size)


@settings(max_examples=10, deadline=None)
@given(seed=st.integers(0, 9999))
def test_scores_are_the_naive_ones(seed: int) -> None:
    case = drawn(seed, n_peaks=3, n_proposals=4)
    retrieval = Retrieval(area=None)
    prepared = prepare_proposals(case["proposals"], FRAME, GRID, retrieval)
    kinds = case["peaks"][:, 0]
    scores = retrieval_scores(prepared, case["responses"], kinds, case["class_maps"], case["raw_density"], retrieval)
    behind = background_maps(case["class_maps"], FRAME).numpy()
    for p, n in np.ndindex(3, 4):
        kind = int(kinds[p])
        mask, response, raw = case["proposals"][n].numpy(), case["responses"][p].numpy(), case["raw_density"][kind]
        assert scores[p, n].item() == pytest.approx(naive_score(mask, response, behind[kind], raw.numpy()), abs=1e-5)


def test_background_is_what_pillow_makes_of_the_map() -> None:
    image = pytest.importorskip("PIL.Image")
    maps = drawn(1)["class_maps"]
    maps[2] = 3.0
    found = background_maps(maps, (112, 96))
    for map_, background in zip(maps[:2].numpy(), found, strict=False):
        grey = np.floor((map_ - map_.min()) * 255 / (map_.max() - map_.min()) + 0.5).astype(np.uint8)
        resized = np.asarray(image.fromarray(grey).resize((96, 112), image.Resampling.BICUBIC))
        assert (background.numpy() != (resized < 0.95 * resized.mean())).mean() < 1e-3
    assert 0 < found[0].float().mean() < 1
    assert not found[2].any()


def test_proposals_are_sampled_counted_and_limited_by_area() -> None:
    proposals = rectangles((0, 0, 26, 30), (0, 0, 13, 15), (3, 3, 3, 3), (5, 5, 6, 6), (0, 0, 26, 15))
    prepared = prepare_proposals(proposals, FRAME, GRID, Retrieval(area=(2e-5, 0.5)))
    assert prepared.kept.tolist() == [1, 3]  # the whole image and half of it are too large, nothing is too small
    assert prepared.masks[0].sum() == 12 * 16
    assert prepared.contours.shape == (2, *FRAME)
    assert prepared.cells.shape == (2, *GRID)
    first = prepare_proposals(proposals, FRAME, GRID, Retrieval(max_proposals=2, area=None))
    assert first.kept.tolist() == [0, 1]
    edges = cv2.morphologyEx(prepared.masks[0].numpy().astype(np.uint8), cv2.MORPH_GRADIENT, np.ones((5, 5), np.uint8))
    assert torch.equal(prepared.contours[0], torch.from_numpy(edges > 0))


def test_each_peak_gets_the_object_it_is_on() -> None:
    """Three objects of two classes; proposals of a part, of two together and of the whole picture lose."""
    boxes = [(2, 2, 10, 12), (15, 3, 24, 12), (4, 18, 20, 28)]
    truth = rectangles(*boxes)
    decoys = rectangles((2, 2, 24, 12), (4, 4, 7, 7), (0, 0, 26, 30), (12, 13, 14, 15))
    seen = torch.nn.functional.interpolate(truth[:, None].float(), FRAME, mode="nearest-exact")[:, 0]
    edges = torch.from_numpy(np.stack([cv2.morphologyEx(m, cv2.MORPH_GRADIENT, np.ones((3, 3))) for m in seen.numpy()]))
    responses = seen * (0.2 + edges)
    responses = responses / responses.sum((1, 2), keepdim=True)
    density = torch.nn.functional.interpolate(truth[None].float(), GRID, mode="nearest-exact")[0]
    density = density / density.sum((1, 2), keepdim=True) * 20
    raw = torch.stack([density[0] + density[1], density[2]])
    peaks = torch.tensor([[0, 1, 1], [0, 1, 3], [1, 3, 2]])
    found = retrieve_instances(torch.cat([decoys, truth]), peaks, responses, raw.clone(), raw)
    assert found.masks.shape == (3, *STORED)
    assert found.masks.dtype == torch.bool
    order = [next(i for i in range(3) if torch.equal(mask, truth[i])) for mask in found.masks]
    assert sorted(order) == [0, 1, 2]
    assert found.labels.tolist() == [[0, 0, 1][i] for i in order]
    assert (found.scores.diff() <= 0).all()
    torch.testing.assert_close(found.responses.sum((1, 2)), torch.ones(3))
    inside = (found.responses * found.masks).sum((1, 2))
    assert (inside > 0.6).all()  # the rest is the outer half of the edge


def choose(
    values: list[list[float]], kinds: list[int], quota: list[int] | None = None, **options: object
) -> list[tuple[int, int, list[int]]]:
    """Peak, proposal, merged peaks; proposals A = 0-10, B = 0-9 (overlaps A), C = 8-20 (hardly), D = 12-20 (C)."""
    masks = rectangles((0, 0, 10, 1), (0, 0, 9, 1), (8, 0, 20, 1), (12, 0, 20, 1), size=(1, 20))
    found = _choose(torch.tensor(values), kinds, masks, Retrieval(**options), quota)  # type: ignore[arg-type]
    return [(one.peak, one.proposal, one.merged) for one in found]


def test_the_better_of_two_that_overlap_stays() -> None:
    values = [[0.5, 0.0, 0.0, 0.0], [0.0, 0.9, 0.0, 0.0], [0.0, 0.0, 0.7, 0.0]]
    assert choose(values, [0, 0, 1]) == [(1, 1, [0]), (2, 2, [])]
    assert choose(values, [1, 0, 1]) == [(1, 1, [0]), (2, 2, [])]  # also across classes
    assert choose(values, [1, 0, 1], per_class=True) == [(1, 1, []), (2, 2, []), (0, 0, [])]
    assert choose(values, [0, 0, 1], overlap=0.95) == [(1, 1, []), (2, 2, []), (0, 0, [])]
    assert choose(values, [0, 0, 1], overlap=0.9) == [(1, 1, [0]), (2, 2, [])]  # an IoU of 0.9 is enough


def test_equal_values_take_the_first() -> None:
    assert choose([[0.5, 0.5, 0.5, 0.5], [0.5, 0.5, 0.5, 0.5]], [0, 1]) == [(0, 0, [1])]


def test_counts_drop_the_worst_and_bring_suppressed_ones_back() -> None:
    values = [[0.9, 0.0, 0.1, 0.2], [0.8, 0.0, 0.3, 0.1], [0.0, 0.7, 0.0, 0.6]]
    assert choose(values, [0, 0, 0]) == [(0, 0, [1, 2])]
    assert choose(values, [0, 0, 0], [1]) == [(0, 0, [1, 2])]
    # the best suppressed peak comes back with C; the last one's free proposal, D, then overlaps C
    assert choose(values, [0, 0, 0], [2]) == [(0, 0, [2]), (1, 2, [])]
    assert choose(values, [0, 0, 0], [3]) == [(0, 0, [2]), (1, 2, [])]
    assert choose(values, [0, 0, 1], [1, 1]) == [(0, 0, [1]), (2, 3, [])]
    assert choose(values, [0, 0, 1], [1, 0]) == [(0, 0, [1, 2])]
    assert choose(values, [0, 0, 0], [0]) == []
    separate = [[0.9, 0.0, 0.0, 0.0], [0.0, 0.0, 0.8, 0.0]]
    assert choose(separate, [0, 0], [1]) == [(0, 0, [])]
    # a class that counts nothing suppresses nothing
    assert choose([[0.9, 0, 0, 0], [0, 0.5, 0, 0]], [0, 1], [0, 1]) == [(1, 1, [])]


def test_counts_are_rounded_and_negative_ones_are_none() -> None:
    strips = rectangles(*[(4 * i, 0, 4 * i + 4, 30) for i in range(6)])
    responses = torch.nn.functional.interpolate(strips[:, None].float(), FRAME, mode="nearest-exact")[:, 0]
    responses = responses / responses.sum((1, 2), keepdim=True)
    peaks = torch.tensor([[kind, 0, 0] for kind in (0, 0, 0, 1, 2, 2)])
    given = (strips, peaks, responses, torch.zeros(3, *GRID), torch.ones(3, *GRID))
    assert retrieve_instances(*given).labels.bincount().tolist() == [3, 1, 2]
    few = retrieve_instances(*given, counts=torch.tensor([1.6, -2.0, 7.0]))
    assert few.labels.bincount().tolist() == [2, 0, 2]


def test_merged_responses_add_up_in_the_stored_image() -> None:
    case = drawn(3, n_peaks=5)
    case["peaks"][:, 0] = 0
    found = retrieve_instances(**case, retrieval=Retrieval(area=None, overlap=1e-9))
    assert found.responses.shape == (len(found), *STORED)
    assert found.responses.sum().item() == pytest.approx(5, rel=1e-4)  # nothing is lost where all of them meet
    for mask in found.masks:
        assert any(torch.equal(mask, proposal) for proposal in case["proposals"])


def test_which_peaks_are_kept() -> None:
    maps = torch.tensor([[[5.0, 0.0, 2.0], [0.0, 0.0, 0.0]], [[9.0, 0.0, 0.0], [0.0, 0.0, 4.0]]])
    peaks = find_peaks(maps[None])[0]
    scores = peak_scores(maps[None], peaks[None])[0]
    assert select_peaks(maps, peaks, scores).tolist() == [[0, 0, 0], [1, 0, 0], [1, 1, 2]]
    assert select_peaks(maps, peaks, torch.tensor([0.5, 0.4])).tolist() == [[0, 0, 0]]  # at least, not above
    assert select_peaks(maps, peaks, scores, peak_threshold=9.0).tolist() == [[1, 0, 0]]
    assert select_peaks(maps, peaks, scores, peak_threshold=10.0).tolist() == []


def test_an_empty_image_has_instances_only_with_the_references_fallback() -> None:
    maps, peaks = torch.full((2, 2, 3), -4.0), torch.zeros(2, 2, 3, dtype=torch.bool)
    maps[0, 1, 1], maps[1, 0, 0] = -2.0, -3.0
    peaks[0, 1, 1] = peaks[1, 0, 0] = True
    scores = torch.tensor([-2.0, -3.0])
    assert select_peaks(maps, peaks, scores).shape == (0, 3)
    assert select_peaks(maps, peaks, scores, fallback=True).tolist() == [[0, 1, 1]]
    # with a class present, only the height is lowered, to its best peak
    assert select_peaks(maps, peaks, torch.tensor([-2.0, 0.7]), fallback=True).tolist() == [[1, 0, 0]]
    assert select_peaks(maps, peaks & False, scores, fallback=True).shape == (0, 3)


def test_nothing_in_nothing_out() -> None:
    case = drawn(0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        none = retrieve_instances(**case | {"peaks": case["peaks"][:0], "responses": case["responses"][:0]})
    assert len(none) == 0
    assert none.masks.shape == none.responses.shape == (0, *STORED)
    assert none.labels.dtype == torch.int64
    with pytest.warns(UserWarning, match="4 peaks"):
        none = retrieve_instances(**case, retrieval=Retrieval(area=(0.9, 0.95)))
    assert none.masks.shape == (0, *STORED)
    with pytest.warns(UserWarning, match="0 proposals"):
        assert len(retrieve_instances(**case | {"proposals": case["proposals"][:0]})) == 0


def test_what_does_not_fit_is_named() -> None:
    case = drawn(0)
    with pytest.raises(InputError, match="3 responses"):
        retrieve_instances(**case | {"responses": case["responses"][:3]})
    with pytest.raises(InputError, match="bool"):
        retrieve_instances(**case | {"proposals": case["proposals"].float()})
    with pytest.raises(InputError, match="3 classes"):
        retrieve_instances(**case, counts=torch.ones(2))
    for options, message in (
        ({"max_proposals": 0}, "max_proposals"),
        ({"area": (0.5, 0.1)}, "area"),
        ({"overlap": 0.0}, "overlap"),
    ):
        with pytest.raises(InputError, match=message):
            Retrieval(**options)  # type: ignore[arg-type]
    assert Retrieval(area=[0.1, 0.5]).area == (0.1, 0.5)  # type: ignore[arg-type]
