"""Losses against naive second implementations, closed forms and special cases."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from counting_zoo.models.clip_count.loss import density_mse, patch_text_contrastive, region_text


def naive_contrastive(patches: Tensor, text: Tensor, positive: Tensor, *, divided: bool = False) -> float:
    rows = []
    for b in range(len(patches)):
        for k in range(text.shape[1]):
            inside = outside = 0.0
            for n in range(patches.shape[1]):
                p, t = patches[b, n], text[b, k]
                s = math.exp(float(p @ t / (p.norm() * t.norm())) / 0.07)
                inside, outside = (inside + s, outside) if positive[b, k, n] else (inside, outside + s)
            loss = -math.log((inside + 1e-5) / (inside + outside + 2e-5))
            rows.append(loss / max(1, int(positive[b, k].sum())) if divided else loss)
    return sum(rows) / len(rows)


@pytest.mark.parametrize("divided", [False, True])
def test_contrastive_against_a_loop(divided: bool) -> None:
    torch.manual_seed(0)
    patches, text, positive = torch.randn(3, 7, 5), torch.randn(3, 2, 5), torch.rand(3, 2, 7) < 0.4
    positive[0, 0], positive[1, 1] = False, True
    found = patch_text_contrastive(patches, text, positive, normalize_positives=divided)
    assert float(found) == pytest.approx(naive_contrastive(patches, text, positive, divided=divided), rel=1e-5)


def test_contrastive_in_closed_form() -> None:
    patches = torch.tensor([[[2.0, 0.0], [0.0, 3.0]]])  # one along the text, one across it
    text, positive = torch.tensor([[[5.0, 0.0]]]), torch.tensor([[[True, False]]])
    e = math.exp(1 / 0.07)
    assert float(patch_text_contrastive(patches, text, positive)) == pytest.approx(math.log((e + 1) / e), abs=1e-5)
    assert float(patch_text_contrastive(patches, text, ~positive)) == pytest.approx(math.log(e + 1), rel=1e-5)
    everything = torch.ones_like(positive)
    assert float(patch_text_contrastive(patches, text, everything)) == pytest.approx(0.0, abs=1e-6)


def test_contrastive_of_a_image_without_objects_is_finite_and_pushes() -> None:
    torch.manual_seed(0)
    patches = torch.randn(1, 6, 5, requires_grad=True)
    text = torch.randn(1, 1, 5, requires_grad=True)
    loss = patch_text_contrastive(patches, text, torch.zeros(1, 1, 6, dtype=torch.bool))
    loss.backward()
    assert torch.isfinite(loss)
    for gradient in (patches.grad, text.grad):
        assert gradient is not None
        assert torch.isfinite(gradient).all()
        assert gradient.any()


def naive_region_text(
    features: Tensor, points: list[Tensor], targets: list[Tensor], text: Tensor, size: tuple[int, int], cap: int
) -> float:
    """Bilinear reading at each point, one point after the other."""
    height, width = features.shape[-2:]
    total = weights = 0.0
    for b, (own, classes) in enumerate(zip(points, targets, strict=True)):
        for (x, y), target in zip(own.tolist(), classes.tolist(), strict=True):
            u = min(max(x / size[1] * width - 0.5, 0), width - 1)
            v = min(max(y / size[0] * height - 0.5, 0), height - 1)
            c, r = min(int(u), width - 2), min(int(v), height - 2)
            du, dv = u - c, v - r
            f = features[b]
            value = (1 - dv) * ((1 - du) * f[:, r, c] + du * f[:, r, c + 1])
            value = value + dv * ((1 - du) * f[:, r + 1, c] + du * f[:, r + 1, c + 1])
            logits = [14 * float(value @ t / (value.norm() * t.norm())) for t in text]
            n = int((classes == target).sum())
            weight = min(n, cap) / n
            total += weight * (math.log(sum(math.exp(z) for z in logits)) - logits[target])
            weights += weight
    return total / weights


@pytest.mark.parametrize("cap", [1, 3, 12])
def test_region_text_against_a_loop(cap: int) -> None:
    torch.manual_seed(0)
    features, text, size = torch.randn(3, 6, 4, 5), torch.randn(4, 6), (32, 40)
    points = [torch.rand(n, 2) * torch.tensor([40.0, 32.0]) for n in (7, 0, 2)]
    points[2] = torch.tensor([[0.0, 0.0], [40.0, 32.0]])  # corners of the closed frame
    targets = [torch.tensor([0, 0, 0, 0, 1, 2, 2]), torch.zeros(0, dtype=torch.int64), torch.tensor([3, 3])]
    found = region_text(features, points, targets, text, size, cap=cap)
    assert float(found) == pytest.approx(naive_region_text(features, points, targets, text, size, cap), rel=1e-5)


def test_region_text_without_any_object_is_zero_and_stays_in_the_graph() -> None:
    features, text = torch.randn(2, 6, 4, 4, requires_grad=True), torch.randn(3, 6, requires_grad=True)
    nothing = [torch.zeros(0, 2)] * 2
    loss = region_text(features, nothing, [torch.zeros(0, dtype=torch.int64)] * 2, text, (32, 32))
    loss.backward()
    assert float(loss) == 0.0
    assert features.grad is not None
    assert text.grad is not None  # or DDP would wait for it on a rank without objects
    assert not features.grad.any()
    assert not text.grad.any()


def test_density_losses() -> None:
    torch.manual_seed(0)
    raw, target = torch.rand(2, 2, 300, 300), torch.rand(2, 2, 300, 300)
    plain = float(((raw - target) ** 2).mean())
    assert float(density_mse(raw, target)) == pytest.approx(plain, rel=1e-6)
    assert float(density_mse(raw, target, "pixel")) == pytest.approx(plain, rel=0.02)
    assert float(density_mse(raw, target, "official")) == pytest.approx(0.8 * plain, rel=0.02)


def test_masks_drop_what_they_say() -> None:
    raw, target = torch.zeros(1, 2, 50, 50, requires_grad=True), torch.ones(1, 2, 50, 50)
    density_mse(raw, target, "pixel", keep=0.5).backward()
    assert raw.grad is not None
    dropped = raw.grad == 0
    assert 0.4 < float(dropped.float().mean()) < 0.6
    assert not torch.equal(dropped[0, 0], dropped[0, 1])  # every map has its own
    raw.grad = None
    density_mse(raw, target, "official", keep=0.5).backward()
    assert len(raw.grad.unique()) == 1  # the reference's mask only scales
