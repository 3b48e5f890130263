"""Peaks, scores and pseudo-masks: the reference's cases, and a second implementation with loops."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from places import GOLDEN
from torch import Tensor

from counting_zoo.models.lower_count.network import find_peaks, highest_peaks, peak_positions, peak_scores

CASES = torch.load(GOLDEN / "lower_count_small.pt", weights_only=True)["peak"]
NAMES = [f"{case['case']}-{case['win']}-{case['filter']}" for case in CASES]


def peaks_of_plane(plane: list[list[float]], radius: int, median: bool) -> list[tuple[int, int]]:
    """One map, one cell after the other."""
    values = sorted(v for row in plane for v in row)
    floor = values[(len(values) - 1) // 2] if median else -float("inf")
    found = []
    for y, row in enumerate(plane):
        for x, value in enumerate(row):
            around = [
                (plane[v][u], -v, -u)  # of equal ones the first in reading order is the greatest
                for v in range(max(0, y - radius), min(len(plane), y + radius + 1))
                for u in range(max(0, x - radius), min(len(row), x + radius + 1))
            ]
            if max(around) == (value, -y, -x) and value >= floor:
                found.append((y, x))
    return found


@pytest.mark.parametrize("case", CASES, ids=NAMES)
def test_the_references_cases(case: dict[str, Any]) -> None:
    maps = case["input"].clone().requires_grad_()
    peaks = find_peaks(maps, radius=case["win"] // 2, above_median=case["filter"] == "median")
    assert torch.equal(peaks.nonzero(), case["peak_list"])
    scores = peak_scores(maps, peaks, gradient="sum")
    torch.testing.assert_close(scores.detach(), case["agg"], rtol=1e-6, atol=1e-6)
    assert torch.equal(highest_peaks(maps, peaks, case["target"], limit=200), case["mask"].bool())
    (scores * case["grad_weight"]).sum().backward()
    torch.testing.assert_close(maps.grad, case["grad"], rtol=1e-6, atol=1e-7)


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 9), st.integers(1, 9), st.integers(1, 3), st.booleans(), st.integers(0, 2**16))
def test_peaks_against_loops(height: int, width: int, radius: int, median: bool, seed: int) -> None:
    draw = torch.Generator().manual_seed(seed)
    maps = torch.randint(-3, 4, (1, 2, height, width), generator=draw).float()  # many ties
    peaks = find_peaks(maps, radius=radius, above_median=median)
    for c in range(2):
        wanted = peaks_of_plane(maps[0, c].tolist(), radius, median)
        assert [tuple(yx) for yx in peaks[0, c].nonzero().tolist()] == wanted
        assert wanted, "every map has a peak"


def test_the_score_is_a_mean_and_its_gradient_that_of_the_mean() -> None:
    maps = torch.randn(2, 3, 6, 6, dtype=torch.float64).requires_grad_()
    peaks = find_peaks(maps)
    scores = peak_scores(maps, peaks)
    for b in range(2):
        for c in range(3):
            assert scores[b, c].item() == pytest.approx(maps[b, c][peaks[b, c]].mean().item(), rel=1e-5)
    (gradient,) = torch.autograd.grad(scores.sum(), maps)
    expected = peaks / peaks.sum((-2, -1), keepdim=True)
    torch.testing.assert_close(gradient, expected.to(gradient))
    summed = peak_scores(maps, peaks, gradient="sum")
    torch.testing.assert_close(summed, scores)  # the same value
    torch.testing.assert_close(torch.autograd.grad(summed.sum(), maps)[0], peaks.to(gradient))


def test_pseudo_masks_hold_as_many_peaks_as_were_counted() -> None:
    maps = torch.randn(4, 5, 14, 14)
    peaks = find_peaks(maps)
    counts = torch.randint(0, 7, (4, 5)).float()
    chosen = highest_peaks(maps, peaks, counts, limit=4)
    assert torch.equal(chosen.sum((-2, -1)), counts.clamp(max=4).long())
    assert (chosen <= peaks).all()
    lowest_in = maps.masked_fill(~chosen, torch.inf).amin((-2, -1))
    highest_out = maps.masked_fill(chosen | ~peaks, -torch.inf).amax((-2, -1))
    assert (lowest_in >= highest_out)[counts > 0].all()
    few = torch.zeros(1, 1, 2, 2)  # one peak, asked for three
    assert highest_peaks(few, find_peaks(few), torch.tensor([[3.0]]), limit=4).sum() == 1


def test_positions_are_the_highest_peaks_in_cells() -> None:
    maps = torch.tensor([[[5.0, 0.0, 0.0, 7.0], [0.0, 0.0, 0.0, 0.0], [6.0, 0.0, 0.0, 0.0]]]).repeat(3, 1, 1)
    peaks = find_peaks(maps[None])[0]
    found = peak_positions(maps, peaks, torch.tensor([2.4, -1.0, 99.0]))
    assert found[0].tolist() == [[3.5, 0.5], [0.5, 2.5]]
    assert found[1].shape == (0, 2)
    assert len(found[2]) == int(peaks[2].sum())


def test_low_precision_maps_are_compared_in_float32() -> None:
    maps = torch.randn(1, 2, 8, 8).bfloat16()
    peaks = find_peaks(maps)
    assert torch.equal(peaks, find_peaks(maps.float()))
    assert peak_scores(maps, peaks).dtype == torch.float32
    assert isinstance(highest_peaks(maps, peaks, torch.ones(1, 2), limit=4), Tensor)
