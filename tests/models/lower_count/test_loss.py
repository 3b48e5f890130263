"""The losses of Lower-Count: the reference's cases, loops, finite differences and pieces of a batch."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from places import GOLDEN
from torch import Tensor

from counting_zoo.models.lower_count.loss import LowerCountLoss, Mean, image_uniform, total_count_terms
from counting_zoo.models.lower_count.network import find_peaks, highest_peaks, peak_scores

CASES = torch.load(GOLDEN / "lower_count_small.pt", weights_only=True)["losses"]
NAMES = [f"{case['case']}-{case['name']}-{case['kw'].get('tl')}" for case in CASES]


def summed(terms: dict[str, Mean]) -> Tensor:
    return torch.stack([term.value() for term in terms.values()]).sum()


@pytest.mark.parametrize("case", CASES, ids=NAMES)
def test_the_references_cases(case: dict[str, Any]) -> None:
    """Totals and gradients; a stage without low counts is NaN there and the rest of its terms here."""
    maps, density = case["M"].clone().requires_grad_(), case["D"].clone().requires_grad_()
    first, coco = case["name"].endswith("98_6"), case["name"].endswith("96_7_6")
    limit = 0 if coco and "tl" not in case["kw"] else 4  # the released COCO configuration gives none
    loss = LowerCountLoss(limit, spatial_norm="pooled")
    peaks = find_peaks(maps)
    scores = peak_scores(maps, peaks, gradient="sum")
    kept = None
    if coco:  # which absent classes it drew shows in its gradient
        present = (case["gt"] > 0).float().mean(0)
        drawn = 1.0 - (case["grad_D"].abs().sum((-2, -1)) > 0).float()
        kept = LowerCountLoss(negatives=0.1).kept_negatives(present, drawn)
    highest = highest_peaks(maps, peaks, case["gt"], limit=limit)
    terms = loss.terms(scores, density, highest, case["gt"], spatial=not first, kept=kept)
    total = summed(terms)
    wanted = case["total"]
    if math.isnan(wanted):
        assert float(terms["count"].value()) == 0
        wanted = sum(v * (0.1 if n == "MarginRankingLoss" else 1) for n, v, _ in case["terms"] if n != "MSELoss")
    assert float(total) == pytest.approx(wanted, rel=1e-5)
    total.backward()
    torch.testing.assert_close(maps.grad, case["grad_M"], rtol=1e-4, atol=1e-8)
    torch.testing.assert_close(density.grad, case["grad_D"], rtol=1e-4, atol=1e-8)


def batch(seed: int = 0, b: int = 4, c: int = 6, side: int = 5) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    draw = torch.Generator().manual_seed(seed)
    maps = torch.randn(b, c, side, side, generator=draw, dtype=torch.float64)
    density = 3 * torch.randn(b, c, side, side, generator=draw, dtype=torch.float64)
    counts = torch.tensor([0, 0, 1, 2, 4, 7])[torch.randint(0, 6, (b, c), generator=draw)].double()
    highest = highest_peaks(maps, find_peaks(maps), counts, limit=4)
    return peak_scores(maps, find_peaks(maps)), density, highest, counts


def by_loops(
    loss: LowerCountLoss, scores: Tensor, density: Tensor, highest: Tensor, counts: Tensor
) -> dict[str, float]:
    """The formulas of the paper, one class of one picture after the other."""
    classed, squared, gaps, absent, present = [], [], [], [], []
    soft = lambda v: math.log1p(math.exp(v))  # noqa: E731
    for i in range(len(counts)):
        for c in range(counts.shape[1]):
            t, cells = float(counts[i, c]), density[i, c].flatten().tolist()
            estimate = sum(cells) / len(cells)
            classed.append(soft(-float(scores[i, c])) if t > 0 else soft(float(scores[i, c])))
            if t <= loss.limit:
                squared.append((estimate - t) ** 2)
            else:
                gaps.append(max(0.0, loss.target - estimate))
            if t == 0:
                absent.append(sum(map(soft, cells)) / len(cells))
            elif t <= loss.limit:
                at = [soft(-v) for v, h in zip(cells, highest[i, c].flatten().tolist(), strict=True) if h]
                present.append(sum(at) / len(at))
    mean = lambda values: sum(values) / len(values)  # noqa: E731
    return {
        "class": mean(classed),
        "count": mean(squared),
        "rank": loss.rank_weight * mean(gaps),
        "absent": mean(absent),
        "present": mean(present),
    }


@pytest.mark.parametrize("loss", [LowerCountLoss(), LowerCountLoss(2, rank_target=9.0, rank_weight=0.3)])
def test_against_loops(loss: LowerCountLoss) -> None:
    scores, density, highest, counts = batch()
    terms = loss.terms(scores, density, highest, counts, spatial=True)
    for name, value in by_loops(loss, scores, density, highest, counts).items():
        assert float(terms[name].value()) == pytest.approx(value, rel=1e-5), name


@pytest.mark.parametrize("norm", ["per_class", "pooled"])
def test_gradients_against_finite_differences(norm: Any) -> None:
    scores, density, highest, counts = batch(b=2, c=3, side=3)
    loss = LowerCountLoss(spatial_norm=norm)

    def total(s: Tensor, d: Tensor) -> Tensor:
        return summed(loss.terms(s, d, highest, counts, spatial=True))

    step = 1e-2  # the losses are computed in float32
    for which in range(2):
        values = [scores.clone(), density.clone()]
        values[which].requires_grad_()
        (gradient,) = torch.autograd.grad(total(*values), values[which])
        for place in range(0, values[which].numel(), 4):
            moved = [[v.detach().clone() for v in values] for _ in range(2)]
            moved[0][which].view(-1)[place] += step
            moved[1][which].view(-1)[place] -= step
            difference = (total(*moved[0]) - total(*moved[1])).item() / (2 * step)
            assert gradient.flatten()[place].item() == pytest.approx(difference, abs=2e-3)


def test_only_counts_up_to_the_limit_are_seen() -> None:
    scores, density, highest, counts = batch()
    more = counts.where(counts <= 4, 40.0)
    a = LowerCountLoss().terms(scores, density, highest, counts, spatial=True)
    b = LowerCountLoss().terms(scores, density, highest, more, spatial=True)
    assert {k: float(v.value()) for k, v in a.items()} == {k: float(v.value()) for k, v in b.items()}


@pytest.mark.parametrize("value", [0.0, 9.0, math.nan])
@pytest.mark.parametrize("spatial", [True, False])
def test_sets_without_members_cost_nothing(value: float, spatial: bool) -> None:
    scores, density, highest, counts = batch()
    scores.requires_grad_()
    density.requires_grad_()
    counts = torch.full_like(counts, value)
    terms = LowerCountLoss().terms(scores, density, torch.zeros_like(highest), counts, spatial=spatial)
    total = summed(terms)
    assert torch.isfinite(total)
    gradients = torch.autograd.grad(total, [scores, density])
    assert all(torch.isfinite(g).all() for g in gradients)
    if math.isnan(value):
        assert float(total) == 0
    if value == 9:
        assert float(terms["count"].value()) == 0
        assert float(terms["rank"].value()) > 0


def test_sums_of_two_halves_make_the_mean_of_the_whole() -> None:
    whole = batch()
    loss = LowerCountLoss(spatial_norm="pooled")
    terms = loss.terms(*whole, spatial=True)  # type: ignore[call-arg]
    halves = [loss.terms(*(x[part] for x in whole), spatial=True) for part in (slice(0, 1), slice(1, 4))]  # type: ignore[call-arg]
    for name, mean in terms.items():
        total, n = (sum(h[name][i] for h in halves) for i in (0, 1))  # type: ignore[misc]
        assert float(Mean(total, n).value()) == pytest.approx(float(mean.value()), rel=1e-6)  # type: ignore[arg-type]


def test_classes_of_which_only_presence_is_known() -> None:
    scores, density, highest, counts = batch()
    counted = torch.tensor([True, True, True, False, False, False])
    loss = LowerCountLoss()
    terms = loss.terms(scores, density, highest, counts, spatial=True, counted=counted)
    other = counts.clone()
    other[:, 3:] = other[:, 3:].clamp(max=1)  # nothing but presence
    same = loss.terms(scores, density, highest, other, spatial=True, counted=counted)
    assert {k: float(v.value()) for k, v in terms.items()} == {k: float(v.value()) for k, v in same.items()}
    assert int(terms["class"].n) == counts.numel()
    assert int(terms["present"].n) == int(((counts > 0) & (counts <= 4))[:, :3].sum())
    assert int(terms["absent"].n) == int((counts == 0).sum())  # that a class is absent is a count


def test_the_sum_of_all_counts() -> None:
    counts = torch.tensor([[1.0, 2.0, 0.0], [5.0, 1.0, 0.0], [1.0, 0.0, 3.0], [0.0, 0.0, torch.nan]])
    counted = torch.tensor([True, True, False]).expand(4, 3)
    maps = torch.full((4, 1, 2, 2), 2.0)
    terms = total_count_terms(maps, counts, counted, LowerCountLoss())
    assert float(terms["total"].total) == 1.0  # the first image: (2 - 3)^2
    assert int(terms["total"].n) == 1
    assert float(terms["total_rank"].total) == pytest.approx(0.1 * 4)  # the second: more than 4 and 1, so at least 6
    assert int(terms["total_rank"].n) == 1


def test_random_numbers_depend_on_the_image_alone() -> None:
    names = [f"{i}.jpg" for i in range(200)]
    drawn = image_uniform(names, 20, step=7)
    assert drawn.dtype == np.float32
    assert drawn.min() >= 0
    assert drawn.max() < 1
    np.testing.assert_array_equal(image_uniform(names[50:53], 20, step=7), drawn[50:53])
    assert not np.allclose(image_uniform(names, 20, step=8), drawn)
    assert abs(drawn.mean() - 0.5) < 0.01  # 4,000 uniform numbers: the mean's deviation is 0.0046
    assert abs(np.corrcoef(drawn[:, 0], drawn[:, 1])[0, 1]) < 0.25
    histogram = np.histogram(drawn, 10, (0, 1))[0]
    assert ((histogram > 320) & (histogram < 480)).all()


def test_negatives_that_are_kept() -> None:
    assert LowerCountLoss().kept_negatives(torch.rand(2), torch.rand(3, 2)) is None
    kept = LowerCountLoss(negatives=0.5).kept_negatives(
        torch.tensor([0.3, 0.0]), torch.tensor([[0.9, 0.9], [0.1, 0.2]])
    )
    assert kept is not None
    assert kept.tolist() == [[True, False], [True, True]]


@pytest.mark.parametrize("norm", ["per_class", "pooled"])
def test_gradients_in_double_precision(norm: Any) -> None:
    scores, density, highest, counts = batch(b=2, c=3, side=3)
    loss = LowerCountLoss(spatial_norm=norm)
    assert torch.autograd.gradcheck(
        lambda s, d: summed(loss.terms(s, d, highest, counts, spatial=True)),
        (scores.requires_grad_(), density.requires_grad_()),
    )
    maps = torch.randn(2, 3, 4, 4, dtype=torch.float64).requires_grad_()
    peaks = find_peaks(maps)
    assert torch.autograd.gradcheck(lambda m: peak_scores(m, peaks), maps)
