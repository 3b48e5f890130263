"""RegionCLIP's counter as plain torch: targets, losses and examples against loops, peaks on drawn maps, densities."""

from __future__ import annotations

import math
from typing import Any

import pytest
import tiny
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits

from counting_zoo import RegionCLIPCounter
from counting_zoo.errors import InputError
from counting_zoo.models.region_clip import loss as detection_loss
from counting_zoo.models.region_clip.loss import (
    around,
    away_from,
    cells_of,
    focal_heat_loss,
    heat_target,
    object_sides,
    region_examples,
    region_score_loss,
    size_loss,
    typical_sides,
)
from counting_zoo.models.region_clip.network import (
    CELL,
    FULL,
    GRID,
    UNIT,
    PeakHead,
    RegionCLIPNet,
    above,
    detected,
    joined,
)
from counting_zoo.models.region_clip.proposals import Proposed

NO_BOXES = torch.zeros(0, 4)


def drawn(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def scattered(n: int, size: tuple[int, int], seed: int = 0) -> Tensor:
    """``(n, 2)`` points of a picture, the first two in its corners."""
    points = torch.rand(n, 2, generator=drawn(seed)) * torch.tensor([size[1], size[0]])
    points[:1] = 0.0
    points[1:2] = torch.tensor([size[1], size[0]], dtype=torch.float32)
    return points


# -- heat -------------------------------------------------------------------------------------------------------------


@settings(max_examples=25, deadline=None)
@given(
    n=st.integers(0, 6),
    height=st.integers(1, 40),
    width=st.integers(1, 40),
    cell=st.sampled_from([1, 4, 8]),
    seed=st.integers(0, 99),
)
def test_heat_target_against_a_loop(n: int, height: int, width: int, cell: int, seed: int) -> None:
    points, sizes = scattered(n, (height, width), seed), 1 + 30 * torch.rand(n, 2, generator=drawn(seed))
    grid = (-(-height // cell), -(-width // cell))
    expected = torch.zeros(grid)
    for (x, y), (w, h) in zip(points.tolist(), sizes.tolist(), strict=True):
        column, row = min(int(x // cell), grid[1] - 1), min(int(y // cell), grid[0] - 1)
        across, down = max(w / 6 / cell, 0.3), max(h / 6 / cell, 0.3)
        for i in range(grid[0]):
            for j in range(grid[1]):
                value = math.exp(-((j - column) ** 2) / (2 * across**2) - (i - row) ** 2 / (2 * down**2))
                expected[i, j] = max(float(expected[i, j]), value)
    found = heat_target(points, sizes, grid, cell)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)
    places = cells_of(points, grid, cell)
    assert (found[places[:, 1], places[:, 0]] == 1).all()  # exactly, as the loss asks for it
    assert (found == 1).sum() == len(places.unique(dim=0))


def test_heat_target_of_many_objects_is_made_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    points, sizes = scattered(50, (64, 64)), torch.full((50, 2), 12.0)
    whole = heat_target(points, sizes, (16, 16), 4)
    monkeypatch.setattr(detection_loss, "PLANE", 16 * 16 * 3)
    assert torch.equal(heat_target(points, sizes, (16, 16), 4), whole)


def test_focal_loss_is_its_formula() -> None:
    logits = 3 * torch.randn(2, 5, 6, generator=drawn(0), dtype=torch.float64)
    target = torch.rand(2, 5, 6, generator=drawn(1), dtype=torch.float64)
    target[0, 1, 2] = target[1, 4, 5] = target[1, 0, 0] = 1
    expected = 0.0
    for z, t in zip(logits.flatten().tolist(), target.flatten().tolist(), strict=True):
        p = 1 / (1 + math.exp(-z))
        expected -= (1 - p) ** 2 * math.log(p) if t == 1 else (1 - t) ** 4 * p**2 * math.log(1 - p)
    assert float(focal_heat_loss(logits, target)) == pytest.approx(expected / 3, rel=1e-5)


@pytest.mark.parametrize("empty", [True, False])
def test_focal_loss_is_finite_everywhere(empty: bool) -> None:
    """Without a centre, and at logits whose probability is 0 or 1 in any precision."""
    logits = torch.tensor([[[-1e4, 1e4, 0.0], [1e4, -1e4, 60.0]]], requires_grad=True)
    target = torch.zeros(1, 2, 3) if empty else torch.eye(2, 3)[None]
    loss = focal_heat_loss(logits, target)
    loss.backward()
    assert torch.isfinite(loss)
    assert logits.grad is not None
    assert torch.isfinite(logits.grad).all()


# -- sizes ------------------------------------------------------------------------------------------------------------


def test_size_loss_reads_the_cells_of_centres() -> None:
    log_sizes = torch.randn(2, 2, 4, 5, generator=drawn(0))
    boxes = [torch.tensor([[0.0, 0.0, 8.0, 4.0], [12.0, 10.0, 28.0, 22.0]]), torch.tensor([[3.0, 3.0, 5.0, 9.0]])]
    cells = [(0, 0, 1), (0, 3, 4), (1, 1, 1)]  # image, row, column; the second's row 4 is the last one, 3
    errors = [
        abs(float(log_sizes[b, axis, row, column]) - math.log(side / 16))
        for (b, row, column), sides in zip(cells, [(8, 4), (16, 12), (2, 6)], strict=True)
        for axis, side in enumerate(sides)
    ]
    cells_expected = cells_of(torch.tensor([[4.0, 2.0], [20.0, 16.0], [4.0, 6.0]]), (4, 5), 4).tolist()
    assert [[column, row] for _, row, column in cells] == cells_expected
    assert float(size_loss(log_sizes, boxes, 4, 16.0)) == pytest.approx(sum(errors) / 6, rel=1e-5)


def test_size_loss_without_boxes_or_area() -> None:
    log_sizes = torch.randn(2, 2, 4, 4, requires_grad=True)
    flat = torch.tensor([[4.0, 4.0, 4.0, 9.0], [5.0, 9.0, 9.0, 5.0]])
    for boxes in ([NO_BOXES, NO_BOXES], [flat, NO_BOXES]):
        loss = size_loss(log_sizes, boxes, 4, 16.0)
        assert loss.item() == 0
        loss.backward()  # still a function of the sizes, as processes that train together need
    good = torch.tensor([[0.0, 0.0, 16.0, 16.0]])
    one = size_loss(log_sizes, [good, NO_BOXES], 4, 16.0)
    assert float(size_loss(log_sizes, [torch.cat([flat, good]), NO_BOXES], 4, 16.0)) == pytest.approx(float(one))


@pytest.mark.parametrize("n", [2, 5, 40, 900])
def test_typical_sides_without_boxes_are_distances(n: int) -> None:
    """Also of so many points that distances come from matrix products, in which none is exactly 0."""
    size = (700, 2000)
    points = 300 + torch.rand(n, 2, generator=drawn(n)) * 300
    some = points[:: max(1, -(-n // 512))]
    nearest = sorted(min(math.dist(a, b) for b in points.tolist() if a != b) for a in some.tolist())
    expected = min(max(nearest[(len(nearest) - 1) // 2], 8.0), 175.0)
    found = typical_sides(points, NO_BOXES, size)
    assert found.tolist() == pytest.approx([expected] * 2, rel=1e-4)


@pytest.mark.parametrize(
    ("points", "boxes", "expected"),
    [
        ([], [], [24.0, 24.0]),  # a quarter of the shorter side
        ([[3.0, 3.0]], [], [24.0, 24.0]),
        ([[3.0, 3.0], [3.0, 3.0]], [], [24.0, 24.0]),  # all in one place
        ([[0.0, 0.0], [1.0, 0.0]], [], [8.0, 8.0]),
        ([[0.0, 0.0], [90.0, 0.0]], [], [24.0, 24.0]),
        ([[0.0, 0.0]], [[0.0, 0.0, 4.0, 6.0], [10.0, 10.0, 16.0, 12.0], [5.0, 5.0, 5.0, 9.0]], [5.0, 4.0]),
        ([[0.0, 0.0]], [[5.0, 5.0, 5.0, 9.0]], [24.0, 24.0]),  # a box without area says nothing
    ],
)
def test_typical_sides(points: list[Any], boxes: list[Any], expected: list[float]) -> None:
    found = typical_sides(torch.tensor(points).reshape(-1, 2), torch.tensor(boxes).reshape(-1, 4), (96, 128))
    assert found.tolist() == expected
    assert found.dtype == torch.float32


def test_typical_sides_of_a_tiny_image() -> None:
    assert typical_sides(torch.zeros(0, 2), NO_BOXES, (5, 300)).tolist() == [8.0, 8.0]


# -- regions ----------------------------------------------------------------------------------------------------------


def test_away_from_against_a_loop() -> None:
    points, boxes = scattered(7, (60, 80)), around(scattered(40, (60, 80), 1), torch.tensor([10.0, 20.0]))
    expected = [
        all(
            abs((x1 + x2) / 2 - x) > (x2 - x1) / 2 or abs((y1 + y2) / 2 - y) > (y2 - y1) / 2 for x, y in points.tolist()
        )
        for x1, y1, x2, y2 in boxes.tolist()
    ]
    assert away_from(boxes, points).tolist() == expected
    assert 0 < sum(expected) < 40
    assert away_from(boxes, points[:0]).all()


def test_objects_have_the_size_of_their_own_box() -> None:
    """Of their name and around them; else what is typical of the name, or of all."""
    boxes = torch.tensor([[0.0, 0, 8, 4], [20, 20, 40, 60], [10, 0, 14, 2], [5, 5, 5, 9]])
    points = torch.tensor([[4.0, 2.0], [4.0, 2.0], [30.0, 40.0], [70.0, 50.0], [12.0, 1.0], [1.0, 1.0]])
    labels = torch.tensor([0, 1, 1, 0, 0, 2])
    found = object_sides(points, labels, boxes, torch.tensor([0, 1, 0, 0]), (60, 80))
    everywhere = [(8 + 20 + 4) / 3, (4 + 40 + 2) / 3]  # the empty box has no size
    expected = [[8, 4], [20, 40], [20, 40], [6, 3], [4, 2], everywhere]
    torch.testing.assert_close(found, torch.tensor(expected, dtype=torch.float32))
    assert object_sides(points[:0], labels[:0], boxes, torch.tensor([0, 1, 0, 0]), (60, 80)).shape == (0, 2)


def examples(points: Tensor, labels: Tensor, columns: list[int], n_regions: int = 6, **options: Any) -> Any:
    sides = torch.tensor([8.0, 12.0]).expand(len(points), 2)
    return region_examples(
        points,
        labels,
        torch.tensor(columns),
        sides,
        (60, 80),
        n_names=5,
        n_regions=n_regions,
        generator=drawn(options.get("seed", 0)),
    )


def test_examples_are_objects_and_places_beside_them() -> None:
    points, labels = scattered(10, (60, 80)), torch.tensor([0, 1] * 5)
    boxes, target, known = examples(points, labels, [4, 2])
    assert len(boxes) == len(target) == len(known) == 12
    places = {
        tuple(p): int(label)
        for p, label in zip(around(points, torch.tensor([8.0, 12.0])).tolist(), labels, strict=True)
    }
    for box, row in zip(boxes[:6].tolist(), target[:6], strict=True):
        assert row.tolist() == torch.nn.functional.one_hot(torch.tensor([4, 2][places[tuple(box)]]), 5).tolist()
    assert len({tuple(box) for box in boxes[:6].tolist()}) == 6
    assert known[:6].all()  # an object is none of the other names, also of those nobody asked about
    assert not target[6:].any()
    assert (known[6:] == torch.tensor([False, False, True, False, True])).all()  # beside it may be anything else
    assert away_from(boxes[6:], points).all()
    sides = boxes[6:, 2:] - boxes[6:, :2]
    growth = sides / torch.tensor([8.0, 12.0])
    assert ((growth >= 0.5 - 1e-5) & (growth <= 1.5 + 1e-5)).all()
    assert growth.std() > 0.05
    again = examples(points, labels, [4, 2])
    assert all(torch.equal(a, b) for a, b in zip((boxes, target, known), again, strict=True))
    assert not torch.equal(boxes, examples(points, labels, [4, 2], seed=1)[0])


def test_examples_of_an_empty_image_and_of_a_full_one() -> None:
    nothing, no_labels = torch.zeros(0, 2), torch.zeros(0, dtype=torch.long)
    boxes, target, known = examples(nothing, no_labels, [3])
    assert len(boxes) == 6
    assert not target.any()
    assert known.sum(1).tolist() == [1] * 6
    y, x = torch.meshgrid(torch.arange(0.0, 60, 4), torch.arange(0.0, 80, 4), indexing="ij")
    crowd = torch.stack([x.flatten(), y.flatten()], 1)
    boxes, target, _ = examples(crowd, torch.zeros(len(crowd), dtype=torch.long), [3])
    assert len(boxes) == 6  # nowhere is beside them
    assert target[:, 3].all()


def test_region_score_loss_against_a_loop() -> None:
    logits, target = torch.randn(4, 3, generator=drawn(0)), torch.eye(4, 3)
    known = torch.rand(4, 3, generator=drawn(1)) > 0.4
    expected = (
        sum(
            float(binary_cross_entropy_with_logits(logits[i, k], target[i, k]))
            for i in range(4)
            for k in range(3)
            if known[i, k]
        )
        / 4
    )
    assert float(region_score_loss(logits, target, known)) == pytest.approx(expected, rel=1e-5)
    none = torch.zeros(0, 3, requires_grad=True)
    loss = region_score_loss(none, torch.zeros(0, 3), torch.zeros(0, 3, dtype=torch.bool))
    loss.backward()
    assert loss.item() == 0


# -- peaks ------------------------------------------------------------------------------------------------------------


class Drawn(nn.Module):
    """A head that says what it is told."""

    def __init__(self, heat: Tensor, log_sizes: Tensor) -> None:
        super().__init__()
        self.heat, self.log_sizes = heat, log_sizes

    def forward(self, features: Tensor, images: Tensor) -> tuple[Tensor, Tensor]:
        return self.heat, self.log_sizes


@pytest.fixture(scope="module")
def net() -> RegionCLIPNet:
    torch.manual_seed(0)
    return RegionCLIPCounter(**RegionCLIPCounter.nested(tiny.SHRUNK["region_clip_counter_small"])).network


def peaks(
    net: RegionCLIPNet,
    marks: dict[tuple[int, int], float],
    size: tuple[int, int],
    *,
    side: float = 12.0,
    padded: tuple[int, int] = (16, 16),
    floor: float = 0.1,
) -> Proposed:
    """What is proposed where the heat has these logits at (row, column), and -9 elsewhere, in padded cells."""
    heat = torch.full((1, 1, *padded), -9.0)
    for (row, column), value in marks.items():
        heat[0, 0, row, column] = value
    net.head = Drawn(heat, torch.full((1, 2, *padded), math.log(side / UNIT)))  # type: ignore[assignment]
    return net.proposed(torch.zeros(1), torch.zeros(1), [size], floor)[0]


def centres(found: Proposed) -> set[tuple[float, ...]]:
    return {tuple(c) for c in ((found.boxes[:, :2] + found.boxes[:, 2:]) / 2).tolist()}


def test_a_peak_is_a_box_of_its_size(net: RegionCLIPNet) -> None:
    found = peaks(net, {(3, 5): 2.0, (9, 9): -1.0, (9, 10): -1.5, (12, 1): -2.5}, (64, 64))
    assert centres(found) == {(22.0, 14.0), (38.0, 38.0)}  # one is lower than its neighbour, and one than the floor
    assert found.scores.tolist() == pytest.approx([1 / (1 + math.exp(-2)), 1 / (1 + math.exp(1))])
    torch.testing.assert_close(found.boxes[:, 2:] - found.boxes[:, :2], torch.full((2, 2), 12.0))
    assert not found.saturated


def test_any_floor(net: RegionCLIPNet) -> None:
    assert centres(peaks(net, {(3, 5): 2.0}, (64, 64), floor=0.0)) == {(22.0, 14.0), (4.0, 4.0)}  # the flat rest is one
    assert not centres(peaks(net, {(3, 5): 2.0}, (64, 64), floor=1.0))


def test_equal_neighbours_are_one_peak(net: RegionCLIPNet) -> None:
    """As half precision makes them; those of small objects overlap too little to be suppressed later."""
    plateau = {(3, 5): 2.0, (3, 6): 2.0, (4, 6): 2.0}
    assert centres(peaks(net, plateau, (64, 64), side=4.0)) == {(22.0, 14.0)}
    # Of logits whose probability is 1 in float32 the higher one is the peak.
    found = peaks(net, {(3, 5): 30.0, (3, 6): 31.0}, (64, 64), side=4.0)
    assert centres(found) == {(26.0, 14.0)}
    assert found.scores.tolist() == [1.0]


def test_padding_proposes_nothing_and_hides_nothing(net: RegionCLIPNet) -> None:
    marks = {(3, 8): 5.0, (3, 7): 2.0, (11, 3): 6.0, (10, 3): 1.0, (15, 15): 3.0}  # 32 wide and 44 high: 8 and 11 cells
    assert centres(peaks(net, marks, (44, 32), side=4.0)) == {(30.0, 14.0), (14.0, 42.0)}


@pytest.mark.parametrize("extra", [1, 2, 3, 4])
def test_objects_in_a_cut_cell_at_the_border(net: RegionCLIPNet, extra: int) -> None:
    """A picture 1 to 3 pixels wider than its whole cells: an object there has its own cell in the target, too."""
    size = (32, 32 + extra)
    object_at = torch.tensor([[32.0 + extra, 10.0]])
    (place,) = cells_of(object_at, (8, 9), CELL).tolist()
    found = peaks(net, {(place[1], place[0]): 2.0}, size)
    assert len(found.boxes) == 1
    ((x, y),) = centres(found)
    assert x < size[1]
    assert y == 10.0
    assert (found.boxes <= torch.tensor([size[1], size[0]]).repeat(2)).all()


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_broken_weights_are_not_an_empty_image(net: RegionCLIPNet, value: float) -> None:
    with pytest.raises(InputError, match="finite"):
        peaks(net, {(3, 5): value}, (64, 64))


def test_sizes_out_of_all_bounds(net: RegionCLIPNet) -> None:
    for side in (1e-9, 1e9):
        found = peaks(net, {(3, 5): 2.0}, (64, 64), side=side)
        assert len(found.boxes) == 1
        assert torch.isfinite(found.boxes).all()


def test_saturated_where_peaks_are_dense(net: RegionCLIPNet) -> None:
    """Every fourth cell along x and y is one of sixteen, and not yet too many."""
    sparse = {(row, column): 2.0 for row in range(0, 16, 4) for column in range(0, 16, 4)}
    assert len(sparse) == FULL * 16 * 16
    assert not peaks(net, sparse, (64, 64)).saturated
    assert peaks(net, sparse | {(2, 2): 2.0}, (64, 64)).saturated
    assert len(peaks(net, sparse | {(2, 2): 2.0}, (64, 64)).boxes) == 17  # and nothing is left out


def test_several_images_at_once(net: RegionCLIPNet) -> None:
    heat = torch.full((2, 1, 8, 8), -9.0)
    heat[0, 0, 2, 2] = heat[1, 0, 5, 6] = heat[1, 0, 1, 7] = 1.0
    net.head = Drawn(heat, torch.zeros(2, 2, 8, 8))  # type: ignore[assignment]
    first, second = net.proposed(torch.zeros(1), torch.zeros(1), [(32, 32), (32, 28)], 0.1)
    assert (len(first.boxes), len(second.boxes)) == (1, 1)  # the last column is padding of the second


@pytest.mark.parametrize("stride", [8, 14, 16, 32])
def test_heads_of_every_stride(stride: int) -> None:
    head = PeakHead(6, width=8).eval()  # ViT-L has patches of 14
    heat, log_sizes = head(torch.randn(2, 6, -(-64 // stride), -(-96 // stride)), torch.randn(2, 3, 64, 96))
    assert heat.shape == (2, 1, 16, 24)
    assert log_sizes.shape == (2, 2, 16, 24)
    assert float(heat.sigmoid().mean()) < 0.1  # few cells hold a centre


# -- what is detected -------------------------------------------------------------------------------------------------


@settings(max_examples=30, deadline=None)
@given(height=st.integers(1, 70), width=st.integers(1, 70), n=st.integers(0, 20), seed=st.integers(0, 99))
def test_density_is_the_number_of_boxes(height: int, width: int, n: int, seed: int) -> None:
    low = scattered(n, (height, width), seed)
    boxes = torch.cat([low, torch.tensor([width, height]).float().expand(n, 2)], 1)
    labels = torch.randint(3, (n,), generator=drawn(seed))
    scores = torch.rand(n, generator=drawn(seed))
    found = detected(boxes, scores, labels, (height, width), 3, saturated=True)
    assert found.density.shape == (1, 3, -(-height // GRID), -(-width // GRID))
    assert found.counts[0].tolist() == labels.bincount(minlength=3).tolist()
    kept = above(found, 0.5, (height, width))
    assert kept.counts[0].tolist() == labels[scores > 0.5].bincount(minlength=3).tolist()
    assert torch.equal(kept.scores[0], scores[scores > 0.5])
    assert kept.saturated == [True]
    both = joined([found, kept])
    assert torch.equal(both.counts, torch.cat([found.counts, kept.counts]))
    assert [len(b) for b in both.boxes] == [n, len(kept.boxes[0])]
    assert both.saturated == [True, True]
