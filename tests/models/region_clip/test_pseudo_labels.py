"""Pseudo labels: what the reference kept at five thresholds, a loop, fallbacks and statistics."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from places import GOLDEN
from torch import Tensor

from counting_zoo.errors import InputError
from counting_zoo.models.region_clip.loss import PseudoLabels, label_statistics, pseudo_labels, teacher_probabilities

GOLDEN_FILE = GOLDEN / "region_clip.pt"
TABLE = torch.tensor([[0.7, 0.2, 0.1], [0.3, 0.4, 0.3], [0.1, 0.0, 0.9], [0.5, 0.5, 0.0]])


@pytest.fixture(scope="module")
def golden() -> dict[str, Any]:
    return torch.load(GOLDEN_FILE, weights_only=True)["pretrain"]


@pytest.mark.parametrize("threshold", ["0.1", "0.3", "0.5", "0.9", "2.0"])
def test_reference_labels(golden: dict[str, Any], threshold: str) -> None:
    """Of the reference's probabilities; from its teacher's weights on in test_region_clip_features.py."""
    expected, probabilities = golden["pseudo"][threshold], golden["pseudo"]["2.0"]["concept_scores"]
    found = pseudo_labels(probabilities, float(threshold), fallback="official")
    assert torch.equal(found.kept, expected["keep"])
    assert torch.equal(found.labels[found.kept], expected["target_inds"])
    strict = pseudo_labels(probabilities, float(threshold))
    assert int(strict.kept.sum()) == (14 if threshold == "0.1" else 0)
    assert torch.equal(strict.labels, found.labels)


def naive(table: Tensor, threshold: float, fallback: str) -> tuple[list[int], list[bool]]:
    rows = table.tolist()
    labels = [max(range(len(row)), key=row.__getitem__) for row in rows]
    kept = [max(row) > threshold for row in rows]
    return labels, [True] * len(rows) if fallback == "official" and not any(kept) else kept


@settings(max_examples=30, deadline=None)
@given(st.data())
def test_against_a_loop(data: st.DataObject) -> None:
    n, pool = data.draw(st.integers(0, 6)), data.draw(st.integers(1, 5))
    table = torch.rand(n, pool, generator=torch.Generator().manual_seed(data.draw(st.integers(0, 999)))).softmax(1)
    threshold = data.draw(st.floats(0, 1.1))
    fallback: Any = data.draw(st.sampled_from(["none", "official"]))
    found = pseudo_labels(table, threshold, fallback=fallback)
    labels, kept = naive(table.double(), threshold, fallback)
    # A probability of float32 is compared with the threshold as float32.
    if not any(abs(float(row.max()) - threshold) < 1e-6 for row in table):
        assert (found.labels.tolist(), found.kept.tolist()) == (labels, kept)


def test_a_probability_of_the_threshold_does_not_pass() -> None:
    assert pseudo_labels(TABLE, 0.5).kept.tolist() == [True, False, True, False]
    assert pseudo_labels(TABLE, 0).kept.tolist() == [True] * 4


def test_fallback_where_none_passes() -> None:
    assert not bool(pseudo_labels(TABLE, 0.95).kept.any())
    assert bool(pseudo_labels(TABLE, 0.95, fallback="official").kept.all())
    assert pseudo_labels(TABLE, 0.6, fallback="official").kept.tolist() == [True, False, True, False]


def test_teacher_probabilities() -> None:
    torch.manual_seed(0)
    regions, concepts = torch.randn(4, 6, requires_grad=True), torch.randn(3, 6)
    found = teacher_probabilities(regions, concepts, 0.1)
    for i, j in ((0, 0), (3, 2)):
        cosines = [float(torch.cosine_similarity(regions[i].detach(), c, dim=0)) for c in concepts]
        expected = torch.tensor([c / 0.1 for c in cosines]).exp()
        assert float(found[i, j]) == pytest.approx(float(expected[j] / expected.sum()), rel=1e-4)
    assert not found.requires_grad
    torch.testing.assert_close(teacher_probabilities(9 * regions, 2 * concepts, 0.1), found)
    # A region that is a zero vector resembles nothing.
    torch.testing.assert_close(teacher_probabilities(torch.zeros(1, 6), concepts), torch.full((1, 3), 1 / 3))


def test_statistics() -> None:
    concepts = torch.eye(3)
    pseudo = pseudo_labels(TABLE[:3], 0.45)
    assert pseudo.kept.tolist() == [True, False, True]
    student = torch.tensor([[1.0, 0.2, 0.0], [0.0, 1.0, 0.0], [0.0, 1.0, 0.5]])
    found = label_statistics(pseudo, student, concepts)
    assert {k: float(v) for k, v in found.items()} == pytest.approx(
        {"kept_fraction": 2 / 3, "distinct_concepts": 2, "agreement": 0.5}
    )
    same = label_statistics(pseudo, concepts[pseudo.labels], concepts)
    assert float(same["agreement"]) == 1


@pytest.mark.parametrize("n", [0, 4])
def test_statistics_of_nothing_are_zeros(n: int) -> None:
    pseudo = pseudo_labels(TABLE[:n], 2.0)
    assert isinstance(pseudo, PseudoLabels)
    found = label_statistics(pseudo, torch.randn(n, 5), torch.randn(3, 5))
    assert {k: float(v) for k, v in found.items()} == {"kept_fraction": 0, "distinct_concepts": 0, "agreement": 0}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"threshold": -0.1}, "threshold"),
        ({"threshold": float("nan")}, "threshold"),
        ({"fallback": "all"}, "fallback"),
    ],
)
def test_what_does_not_fit_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        pseudo_labels(TABLE, **options)


def test_an_empty_pool_is_refused() -> None:
    with pytest.raises(InputError, match="concept"):
        teacher_probabilities(torch.randn(2, 4), torch.zeros(0, 4))
    with pytest.raises(InputError, match=r"\(2, 0\)"):
        pseudo_labels(torch.zeros(2, 0))
