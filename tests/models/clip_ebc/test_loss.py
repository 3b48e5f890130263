"""DACE: what the reference gave, loops, closed forms, and batches without objects."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from places import GOLDEN
from torch import Tensor
from torch.nn.functional import one_hot

from counting_zoo.errors import InputError
from counting_zoo.models.clip_ebc.loss import block_mae, block_mse, classification_loss, dm_loss, transport_gradient
from counting_zoo.ops import points_to_counts

FULL_SIZE = ["clip_ebc_csrnet.npz", "clip_ebc_resnet50.npz", "clip_ebc_vgg19_ae.npz", "clip_ebc_vit_b_16_vpt32.npz"]


def relative(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).abs().max() / expected.abs().max())


# -- what the reference gave ------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def vectors() -> dict[str, Any]:
    return torch.load(GOLDEN / "clip_ebc_vectors.pt", weights_only=True)


@pytest.mark.parametrize("kind", ["mae", "mse", "dmcount"])
def test_reference_values_and_gradients(vectors: dict[str, Any], kind: str) -> None:
    given, expected = vectors["dace_in"], vectors["dace"][kind]
    counts = points_to_counts(given["points"], (64, 64), 8, unique=True)
    anchors = torch.tensor(given["anchors"])
    logits = given["logits"].clone().requires_grad_()
    density = (logits.softmax(1) * anchors[:, None, None]).sum(1, keepdim=True)
    density.retain_grad()
    classes = classification_loss(logits, counts[:, 0].long().clamp(max=len(anchors) - 1))
    if kind == "dmcount":
        terms = dm_loss(density, counts, given["points"], 8, ot_reduction="sum")
    else:
        terms = {kind: (block_mae if kind == "mae" else block_mse)(density, counts)}
    total = classes + torch.stack(list(terms.values())).sum()
    total.backward()
    info = expected["info"]
    assert float(classes.detach()) == pytest.approx(float(info["ce_loss"]), rel=1e-6)
    assert float(total.detach()) == pytest.approx(float(expected["total"]), rel=1e-6)
    weights = {"ot": 0.1, "tv": 0.01, "count": 1.0}
    for name, term in terms.items():
        stored = weights.get(name, 1.0) * float(info[f"{name}_loss"])
        assert float(term.detach()) == pytest.approx(stored, rel=1e-6, abs=1e-3 if name == "ot" else 0)
    assert density.grad is not None
    assert logits.grad is not None
    assert relative(density.grad, expected["grad_density"]) < 1e-6
    assert relative(logits.grad, expected["grad_logits"]) < 1e-6


@pytest.mark.parametrize("name", FULL_SIZE)
def test_reference_distribution_matching_on_224_pixels(name: str) -> None:
    """The stored gradient is with respect to every fourth logit, whose own part follows from the softmax."""
    with np.load(GOLDEN / name) as file:
        stored = {key: torch.tensor(file[key]).float() for key in file.files if file[key].dtype.kind == "f"}
    points = [stored["points"], torch.zeros(0, 2)]
    counts = points_to_counts(points, (224, 224), 8, unique=True)
    density = stored["density"].clone().requires_grad_()
    terms = dm_loss(density, counts, points, 8, ot_reduction="sum")
    torch.stack(list(terms.values())).sum().backward()
    terms = {key: value.detach() for key, value in terms.items()}
    assert float(terms["tv"]) == pytest.approx(0.01 * float(stored["info_dmcount_tv_loss"]), rel=1e-5)
    assert float(terms["count"]) == pytest.approx(float(stored["info_dmcount_count_loss"]), rel=1e-5)
    assert abs(float(terms["ot"])) < 1e-3
    assert density.grad is not None
    share = stored["logits"][0].softmax(0)  # (5, 7, 7)
    anchors = stored["anchors"][:, None, None]
    classes = one_hot(counts[0, 0, ::4, ::4].long().clamp(max=4), 5).permute(2, 0, 1)
    through_density = density.grad[0, 0, ::4, ::4] * share * (anchors - (share * anchors).sum(0))
    assert relative((share - classes) / 2 + through_density, stored["grad_dmcount"]) < 1e-6


# -- second implementations -------------------------------------------------------------------------------------------


def random_batch(numbers: list[int]) -> tuple[Tensor, Tensor, list[Tensor]]:
    torch.manual_seed(0)
    points = [torch.rand(n, 2) * torch.tensor([48.0, 40.0]) for n in numbers]
    return torch.rand(len(numbers), 1, 5, 6), points_to_counts(points, (40, 48), 8), points


def test_classes_and_blocks_against_loops() -> None:
    torch.manual_seed(0)
    logits, classes = torch.randn(3, 4, 2, 5), torch.randint(4, (3, 2, 5))
    density, counts = torch.rand(3, 1, 2, 5), torch.randint(4, (3, 1, 2, 5)).float()
    entropy = absolute = squared = 0.0
    for b in range(3):
        for i in range(2):
            for j in range(5):
                z = logits[b, :, i, j].tolist()
                entropy += math.log(sum(math.exp(one) for one in z)) - z[int(classes[b, i, j])]
                error = float(density[b, 0, i, j] - counts[b, 0, i, j])
                absolute, squared = absolute + abs(error), squared + error**2
    assert float(classification_loss(logits, classes)) == pytest.approx(entropy / 3, rel=1e-5)
    assert float(block_mae(density, counts)) == pytest.approx(absolute / 3, rel=1e-5)
    assert float(block_mse(density, counts)) == pytest.approx(squared / 3, rel=1e-5)


def test_classification_in_closed_form() -> None:
    assert float(classification_loss(torch.zeros(2, 5, 3, 4), torch.ones(2, 3, 4).long())) == pytest.approx(
        12 * math.log(5), rel=1e-6
    )


def test_distribution_matching_against_a_loop() -> None:
    density, counts, points = random_batch([7, 0, 1, 90])
    terms = dm_loss(density, counts, points, 8, ot_weight=3.0, tv_weight=2.0, count_weight=0.5)
    variation = difference = 0.0
    for i, own in enumerate(points):
        predicted, true, n = density[i].double(), counts[i].double(), len(own)
        shares = predicted / (predicted.sum() + 1e-8) - true / (n + 1e-8)
        variation += n * float(shares.abs().sum())
        difference += abs(float(predicted.sum()) - n)
    assert float(terms["tv"]) == pytest.approx(2.0 * variation / 4, rel=1e-5)
    assert float(terms["count"]) == pytest.approx(0.5 * difference / 4, rel=1e-5)
    assert abs(float(terms["ot"])) < 1e-3


@pytest.mark.parametrize(("reduction", "share"), [("mean", 1 / 3), ("sum", 1.0)])
def test_transport_reduction_scales_its_gradient(reduction: Any, share: float) -> None:
    density, counts, points = random_batch([7, 0, 30])
    leaf = density.clone().requires_grad_()
    dm_loss(leaf, counts, points, 8, ot_reduction=reduction)["ot"].backward()
    assert leaf.grad is not None
    torch.testing.assert_close(leaf.grad, 0.1 * share * transport_gradient(density, points, 8))


def test_a_perfect_density_costs_nothing_but_transport_inside_blocks() -> None:
    _, counts, points = random_batch([12, 30])
    terms = dm_loss(counts.clone(), counts, points, 8)
    assert float(terms["tv"]) < 1e-6
    assert float(terms["count"]) < 1e-5


def test_coincident_points_all_count() -> None:
    """The map has one of them where pixels are unique; the count term asks for all three."""
    points = [torch.full((3, 2), 4.0)]
    counts = points_to_counts(points, (8, 16), 8, unique=True)
    terms = dm_loss(counts.clone(), counts, points, 8)
    assert float(terms["count"]) == pytest.approx(2.0)


@pytest.mark.parametrize("settings", [{"log_domain": True, "epsilon": 5.0, "iterations": 7}, {"tolerance": 1e-2}])
def test_settings_reach_the_transport(settings: dict[str, Any]) -> None:
    density, counts, points = random_batch([7, 30])
    leaf = density.clone().requires_grad_()
    dm_loss(leaf, counts, points, 8, **settings)["ot"].backward()
    assert leaf.grad is not None
    torch.testing.assert_close(leaf.grad, 0.05 * transport_gradient(density, points, 8, **settings))
    for name in settings:
        fewer = {key: value for key, value in settings.items() if key != name}
        assert relative(0.05 * transport_gradient(density, points, 8, **fewer), leaf.grad) > 1e-3


def test_unknown_reduction() -> None:
    density, counts, points = random_batch([3])
    with pytest.raises(InputError, match="ot_reduction"):
        dm_loss(density, counts, points, 8, ot_reduction="avg")  # type: ignore[arg-type]


# -- degenerate batches -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("log_domain", [False, True])
def test_a_rank_without_objects_has_finite_terms_that_stay_in_the_graph(log_domain: bool) -> None:
    """DDP waits for the gradient of every parameter on every rank, and a rank may see empty crops only."""
    network = torch.nn.Conv2d(3, 1, 1)
    density = network(torch.rand(2, 3, 4, 4)).relu() + 0.1
    terms = dm_loss(density, torch.zeros(2, 1, 4, 4), [torch.zeros(0, 2)] * 2, 8, log_domain=log_domain)
    values = {name: float(term.detach()) for name, term in terms.items()}
    assert values == {"ot": 0, "tv": 0, "count": pytest.approx(float(density.detach().sum()) / 2, rel=1e-5)}
    for name in ("ot", "tv"):
        network.zero_grad()
        terms[name].backward(retain_graph=True)
        assert network.weight.grad is not None
        assert not network.weight.grad.any()
    terms["count"].backward()
    assert network.weight.grad.isfinite().all()  # type: ignore[union-attr]
    assert network.weight.grad.any()  # type: ignore[union-attr]


def test_empty_images_do_not_touch_the_others() -> None:
    density, counts, points = random_batch([9, 0])
    both = dm_loss(density, counts, points, 8)
    alone = dm_loss(density[:1], counts[:1], points[:1], 8)
    assert float(both["tv"]) == pytest.approx(float(alone["tv"]) / 2, rel=1e-5)


def test_a_density_of_zeros_is_finite() -> None:
    _, counts, points = random_batch([9, 0])
    density = torch.zeros_like(counts, requires_grad=True)
    with pytest.warns(UserWarning, match="transport"):
        total = torch.stack(list(dm_loss(density, counts, points, 8).values())).sum()
    total.backward()
    assert float(total.detach()) == pytest.approx(0.01 * 9 / 2 + 9 / 2, rel=1e-4)
    assert density.grad is not None
    assert density.grad.isfinite().all()


def test_twenty_thousand_points() -> None:
    torch.manual_seed(0)
    points = [torch.rand(20033, 2) * 64]
    counts = points_to_counts(points, (64, 64), 8)
    terms = dm_loss(torch.rand(1, 1, 8, 8), counts, points, 8, iterations=5)
    assert all(bool(term.isfinite()) for term in terms.values())


def test_half_precision_is_summed_in_float32() -> None:
    density, counts, points = random_batch([9, 4])
    density = density.bfloat16()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = dm_loss(density, counts, points, 8)
        blocks = block_mae(density, counts), block_mse(density, counts)
        entropy = classification_loss(torch.randn(2, 5, 3, 3).bfloat16(), torch.zeros(2, 3, 3).long())
    expected = dm_loss(density.float(), counts, points, 8)
    for name, value in expected.items():
        assert found[name].dtype == torch.float32
        torch.testing.assert_close(found[name], value, rtol=1e-5, atol=1e-5)
    assert {one.dtype for one in (*blocks, entropy)} == {torch.float32}
