"""RegionCLIP's losses: what the reference gave, loops, closed forms, underflow, and two processes against one."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from places import GOLDEN
from torch import Tensor
from torch.autograd import gradcheck

from counting_zoo.errors import InputError
from counting_zoo.models.region_clip.loss import (
    contrastive_loss,
    distillation_loss,
    image_text_loss,
    pretraining_losses,
    region_text_loss,
    text_logits,
)

GOLDEN_FILE = GOLDEN / "region_clip.pt"


@pytest.fixture(scope="module")
def golden() -> dict[str, Any]:
    """Values only; how the file was cut is said in test_region_clip_features.py."""
    return torch.load(GOLDEN_FILE, weights_only=True)


def draw(n: int = 6, pool: int = 5, dim: int = 8, seed: int = 0) -> dict[str, Tensor]:
    """Regions of which one or more are not kept, a pool, and as many pictures and captions."""
    g = torch.Generator().manual_seed(seed)
    kept = torch.rand(n, generator=g) < 0.7
    return {
        "regions": torch.randn(n, dim, generator=g),
        "probabilities": (3 * torch.randn(n, pool, generator=g)).softmax(1),
        "labels": torch.randint(pool, (n,), generator=g),
        "kept": kept,
        "concepts": 3 * torch.randn(pool, dim, generator=g),
        "images": torch.randn(n, dim, generator=g),
        "texts": torch.randn(n, dim, generator=g),
    }


def cosine(a: Tensor, b: Tensor) -> float:
    return float((a.double() * b.double()).sum() / (a.double().norm() * b.double().norm()))


def naive_region_text(regions: Tensor, labels: Tensor, kept: Tensor, concepts: Tensor, tau: float) -> float:
    mine = [i for i in range(len(regions)) if kept[i]]
    total = 0.0
    for i in mine:
        weights = {j: math.exp(cosine(regions[i], concepts[labels[j]]) / tau) for j in mine}
        same = sum(weight for j, weight in weights.items() if labels[j] == labels[i])
        total -= math.log(same / sum(weights.values()))
    return total / max(len(mine), 1)


def naive_distillation(regions: Tensor, probabilities: Tensor, kept: Tensor, concepts: Tensor, tau: float) -> float:
    total = 0.0
    for i in range(len(regions)):
        if kept[i]:
            weights = [math.exp(cosine(regions[i], c) / tau) for c in concepts]
            p = probabilities[i].double().tolist()
            total += sum(a * math.log(a * sum(weights) / b) for a, b in zip(p, weights, strict=True) if a)
    return total / max(int(kept.sum()), 1)


def naive_image_text(images: Tensor, texts: Tensor, tau: float) -> float:
    n, total = len(images), 0.0
    for one, other in ((images, texts), (texts, images)):
        for i in range(n):
            weights = [math.exp(cosine(one[i], other[j]) / tau) for j in range(n)]
            total -= math.log(weights[i] / sum(weights)) / (2 * n)
    return total


# -- what the reference gave ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("threshold", ["0.1", "0.3", "0.5", "0.9", "2.0"])
def test_reference_values(golden: dict[str, Any], threshold: str) -> None:
    """Of the reference's own features, probabilities and labels; at the first threshold 14 of 18 regions are kept."""
    data, case = golden["pretrain"], golden["pretrain"]["pseudo"][threshold]
    kept, concepts, regions = case["keep"], data["concept_emb"], data["region_feats"]
    labels = torch.zeros(len(kept), dtype=torch.int64)
    labels[kept] = case["target_inds"]
    probabilities = data["pseudo"]["2.0"]["concept_scores"]
    found = region_text_loss(regions, labels, kept, concepts)
    assert float(found) == pytest.approx(float(case["losses"]["loss_concept_contrastive"]), rel=1e-5)
    found = distillation_loss(regions, probabilities, kept, concepts)
    assert float(found) == pytest.approx(float(case["losses"]["loss_region_distill"]), rel=1e-5)


def test_reference_value_of_images_and_captions(golden: dict[str, Any]) -> None:
    data = golden["pretrain"]
    found = image_text_loss(data["global_feats"], data["text_feats"])
    assert float(found) == pytest.approx(float(data["losses"]["loss_img_txt_level"]), rel=1e-5)


def test_reference_sum_over_positives(golden: dict[str, Any]) -> None:
    case = golden["mil_ce"]
    labels = case["label_mtx"].argmax(1)
    assert torch.equal((labels[:, None] == labels).float(), case["label_mtx"])
    found = contrastive_loss(case["logits"], labels, torch.ones(len(labels), dtype=torch.bool))
    assert float(found) == pytest.approx(float(case["out"]), rel=1e-6)


def test_underflow_of_the_reference_is_finite_here(golden: dict[str, Any]) -> None:
    """A logit of 120 beside the label's 0: the reference's quotient of exponentials is inf there."""
    case = golden["mil_ce_underflow"]
    assert torch.isinf(case["out"])
    logits = case["logits"].clone().requires_grad_()
    loss = contrastive_loss(logits, torch.arange(3), torch.ones(3, dtype=torch.bool))
    loss.backward()
    assert float(loss.detach()) == pytest.approx((120 + 2 * math.log(3)) / 3, rel=1e-5)
    assert logits.grad is not None
    assert bool(logits.grad.isfinite().all())


def test_divergence_of_certain_and_opposite_opinions_is_finite() -> None:
    """The teacher's second probability is 0, and the student's first one is exp(-200): the reference gives NaN."""
    concepts, regions = torch.eye(2), torch.tensor([[-1.0, 1.0]], requires_grad=True)
    loss = distillation_loss(regions, torch.tensor([[1.0, 0.0]]), torch.tensor([True]), concepts, 1 / (100 * 2**0.5))
    loss.backward()
    assert float(loss.detach()) == pytest.approx(200, rel=1e-5)
    assert regions.grad is not None
    assert bool(regions.grad.isfinite().all())


# -- second implementations -------------------------------------------------------------------------------------------


@settings(max_examples=25, deadline=None)
@given(n=st.integers(1, 9), pool=st.integers(1, 6), seed=st.integers(0, 2**20), tau=st.sampled_from([0.05, 0.3, 2.0]))
def test_against_loops(n: int, pool: int, seed: int, tau: float) -> None:
    x = draw(n, pool, seed=seed)
    found = pretraining_losses(**x, temperature=tau, gather="none")
    expected = {
        "region_text": naive_region_text(x["regions"], x["labels"], x["kept"], x["concepts"], tau),
        "distillation": naive_distillation(x["regions"], x["probabilities"], x["kept"], x["concepts"], tau),
        "image_text": naive_image_text(x["images"], x["texts"], tau),
    }
    assert {k: float(v) for k, v in found.items()} == pytest.approx(expected, rel=1e-4, abs=1e-5)


@pytest.mark.parametrize("name", ["region_text", "distillation", "image_text"])
def test_gradients_by_finite_differences(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Tensor, "float", Tensor.double)  # the functions calculate in float32
    x = {key: value.double() if value.is_floating_point() else value for key, value in draw(5, 4, 3).items()}
    learned = ("images", "texts") if name == "image_text" else ("regions",)

    def loss(*values: Tensor) -> Tensor:
        return pretraining_losses(**{**x, **dict(zip(learned, values, strict=True))}, temperature=0.2)[name]

    assert 0 < int(x["kept"].sum()) < 5
    assert gradcheck(loss, [x[key].requires_grad_() for key in learned])


def test_closed_forms() -> None:
    """Logits of 2 on the diagonal and 0 beside it."""
    features, all_kept = torch.eye(3), torch.ones(3, dtype=torch.bool)
    expected = math.log(math.exp(2) + 2) - 2
    assert float(image_text_loss(features, features, 0.5)) == pytest.approx(expected)
    labels = torch.arange(3)
    assert float(region_text_loss(features, labels, all_kept, features, 0.5)) == pytest.approx(expected)
    # Two regions of the first concept: each of the three rows sees that concept twice.
    labels = torch.tensor([0, 0, 2])
    found = region_text_loss(torch.eye(3)[labels], labels, all_kept, features, 0.5)
    pair, single = math.log(1 + 1 / (2 * math.exp(2))), math.log(1 + 2 / math.exp(2))
    assert float(found) == pytest.approx((2 * pair + single) / 3)
    uniform = torch.full((3, 3), 1 / 3)
    expected = sum(math.log(1 / 3) - z for z in (2, 0, 0)) / 3 + math.log(math.exp(2) + 2)
    assert float(distillation_loss(features, uniform, all_kept, features, 0.5)) == pytest.approx(expected)
    assert float(distillation_loss(features, (2 * features).softmax(1), all_kept, features, 0.5)) < 1e-7


def test_one_caption_of_several_images_is_a_positive_of_each() -> None:
    images, texts = torch.randn(4, 8), torch.randn(3, 8)[[0, 1, 1, 2]]
    plain, shared = image_text_loss(images, texts), image_text_loss(images, texts, captions=torch.tensor([0, 1, 1, 2]))
    assert torch.equal(image_text_loss(images, texts, captions=torch.arange(4)), plain)
    assert float(shared) < float(plain)
    # Two images of one sentence cannot be told apart by it, and need not be.
    both = torch.ones(2, dtype=torch.int64)
    assert float(image_text_loss(images[:2], texts[1:3], captions=both)) == pytest.approx(0, abs=1e-6)
    assert float(image_text_loss(texts[1:3], texts[1:3])) == pytest.approx(math.log(2))


def test_images_without_a_caption_are_left_out() -> None:
    x, kept = draw(), torch.tensor([True, False, True, True, False, True])
    found = image_text_loss(x["images"], x["texts"], kept=kept)
    torch.testing.assert_close(found, image_text_loss(x["images"][kept], x["texts"][kept]))


# -- edge cases -------------------------------------------------------------------------------------------------------


def backward(x: dict[str, Tensor], **options: Any) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Values, and the gradients of their sum."""
    learned = {key: x[key].clone().requires_grad_() for key in ("regions", "images", "texts")}
    values = pretraining_losses(**{**x, **learned}, **options)
    torch.stack(list(values.values())).sum().backward()
    gradients = {key: value.grad for key, value in learned.items()}
    assert all(grad is not None and bool(grad.isfinite().all()) for grad in gradients.values())
    return {key: value.detach() for key, value in values.items()}, gradients  # type: ignore[return-value]


def test_nothing_kept() -> None:
    x = draw()
    values, gradients = backward({**x, "kept": torch.zeros(6, dtype=torch.bool)})
    assert float(values["region_text"]) == float(values["distillation"]) == 0
    assert float(gradients["regions"].abs().max()) == 0
    assert float(values["image_text"]) > 0


def test_no_region_at_all() -> None:
    x = draw(4)
    none = {key: x[key][:0] for key in ("regions", "probabilities", "labels", "kept")}
    values, gradients = backward({**x, **none})
    assert float(values["region_text"]) == float(values["distillation"]) == 0
    assert gradients["regions"].shape == (0, 8)


def test_one_region_and_one_image() -> None:
    values, gradients = backward({**draw(1), "kept": torch.tensor([True])})
    assert float(values["region_text"]) == float(values["image_text"]) == 0
    assert float(values["distillation"]) > 0
    assert float(gradients["images"].abs().max()) == 0


def test_one_concept() -> None:
    values, gradients = backward(draw(6, pool=1))
    assert float(values["region_text"]) == pytest.approx(0, abs=1e-6)
    assert float(values["distillation"]) == pytest.approx(0, abs=1e-6)
    assert float(gradients["regions"].abs().max()) == pytest.approx(0, abs=1e-5)


def test_what_is_not_kept_does_not_matter() -> None:
    x = {**draw(), "kept": torch.tensor([True, False, True, True, False, True])}
    y = {key: value.clone() for key, value in x.items()}
    for i in (1, 4):
        y["regions"][i], y["probabilities"][i], y["labels"][i] = 0, 0, 0
    (values, gradients), (others, other_gradients) = backward(x), backward(y)
    torch.testing.assert_close(values, others)
    torch.testing.assert_close(gradients, other_gradients)
    assert float(gradients["regions"][[1, 4]].abs().max()) == 0
    few = {key: x[key][x["kept"]] for key in ("regions", "probabilities", "labels", "kept")}
    torch.testing.assert_close(values, backward({**x, **few})[0])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_and_autocast_calculate_in_float32(dtype: torch.dtype) -> None:
    x = draw()
    half = {key: value.to(dtype) if value.is_floating_point() else value for key, value in x.items()}
    with torch.autocast("cpu", torch.bfloat16):
        lowered = pretraining_losses(**half)
        plain = pretraining_losses(**x)
    exact = pretraining_losses(**{k: v.float() if v.is_floating_point() else v for k, v in half.items()})
    assert all(value.dtype == torch.float32 for value in lowered.values())
    torch.testing.assert_close(lowered, exact)
    torch.testing.assert_close(plain, pretraining_losses(**x))


def test_length_does_not_matter() -> None:
    x = draw()
    scaled = {key: 7 * x[key] for key in ("regions", "concepts", "images", "texts")}
    torch.testing.assert_close(pretraining_losses(**x), pretraining_losses(**{**x, **scaled}), rtol=1e-4, atol=1e-4)


def test_what_does_not_fit_is_refused() -> None:
    x = draw()
    with pytest.raises(InputError, match=r"\(5, 7\)"):
        text_logits(x["regions"], x["concepts"][:, :7])
    with pytest.raises(InputError, match="temperature"):
        text_logits(x["regions"], x["concepts"], 0)
    with pytest.raises(InputError, match=r"\(6, 4\)"):
        distillation_loss(x["regions"], x["probabilities"][:, :4], x["kept"], x["concepts"])
    with pytest.raises(InputError, match="5 captions"):
        image_text_loss(x["images"], x["texts"][:5])
    with pytest.raises(InputError, match="gather"):
        pretraining_losses(**x, gather="images")  # type: ignore[arg-type]


# -- two processes ----------------------------------------------------------------------------------------------------


def on_two(gather: Any) -> tuple[list[dict[str, Tensor]], dict[str, Tensor]]:
    """Values on each of two processes, and the mean of their gradients, which is what DDP steps with."""
    x, rows = draw(8), [slice(0, 4), slice(4, 8)]
    learned = {key: x[key].clone().requires_grad_() for key in ("regions", "images", "texts")}
    x |= learned
    per_row = {key for key in x if key != "concepts"}
    losses = []
    for mine in rows:
        own = {key: value[mine] if key in per_row else value for key, value in x.items()}
        gathered = {id(own[key]): x[key] for key in per_row}

        def all_gather(part: Tensor, known: dict[int, Tensor] = gathered) -> Tensor:
            return known[id(part)]

        losses.append(pretraining_losses(**own, gather=gather, all_gather=all_gather))
    total = torch.stack([value for found in losses for value in found.values()]).sum()
    # all_gather(sync_grads=True) sums the gradients of every process, and DDP averages over the processes.
    (total / 2).backward()
    return [{k: v.detach() for k, v in found.items()} for found in losses], {
        key: value.grad for key, value in learned.items() if value.grad is not None
    }


def test_two_processes_that_gather_all_are_one() -> None:
    (first, second), gradients = on_two("all")
    values, expected = backward(draw(8))
    torch.testing.assert_close(first, values)
    torch.testing.assert_close(second, values)
    torch.testing.assert_close(gradients, expected)


@pytest.mark.parametrize("gather", ["image_text", "none"])
def test_two_processes_that_gather_less(gather: str) -> None:
    x, found = draw(8), on_two(gather)[0]
    whole = pretraining_losses(**x)
    for i, values in enumerate(found):
        own = {key: value if key == "concepts" else value[4 * i : 4 * i + 4] for key, value in x.items()}
        expected = pretraining_losses(**own)
        if gather == "image_text":
            assert float(expected["image_text"]) != pytest.approx(float(whole["image_text"]))
            expected["image_text"] = whole["image_text"]
        torch.testing.assert_close(values, expected)


def test_a_shared_caption_is_shared_across_processes() -> None:
    x, captions = draw(4), torch.tensor([3, 1, 3, 0])
    doubled: Callable[[Tensor], Tensor] = lambda t: torch.cat([t, t])  # noqa: E731
    found = pretraining_losses(**x, captions=captions, all_gather=doubled)["image_text"]
    twice = image_text_loss(doubled(x["images"]), doubled(x["texts"]), captions=doubled(captions))
    torch.testing.assert_close(found, twice)
