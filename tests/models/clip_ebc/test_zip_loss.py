"""The zero-inflated Poisson losses against loops, closed forms and PyTorch's own Poisson distribution."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from counting_zoo.errors import InputError
from counting_zoo.models.clip_ebc.loss import count_error, multiscale_mae, positive_bins_loss, zip_nll


@pytest.fixture
def blocks() -> tuple[Tensor, Tensor, Tensor]:
    """Logits, rates and counts of two pictures of 3 x 4 blocks, about half of them empty."""
    torch.manual_seed(0)
    return torch.randn(2, 2, 3, 4), torch.rand(2, 1, 3, 4) * 3, torch.randint(-3, 5, (2, 1, 3, 4)).clamp(min=0).float()


def test_likelihood_against_a_loop(blocks: tuple[Tensor, Tensor, Tensor]) -> None:
    logits, rate, counts = blocks
    total = 0.0
    for b in range(2):
        for i in range(3):
            for j in range(4):
                zero, other = (math.exp(float(logits[b, k, i, j])) for k in (0, 1))
                empty, filled = zero / (zero + other), other / (zero + other)
                r, y = float(rate[b, 0, i, j]), float(counts[b, 0, i, j])
                if y == 0:
                    total -= math.log(empty + filled * math.exp(-r) + 1e-8)
                else:
                    total -= math.log(filled + 1e-8) + y * math.log(r + 1e-8) - r
    assert float(zip_nll(logits, rate, counts)) == pytest.approx(total / 2, rel=1e-5)


def test_without_inflation_it_is_a_poisson_likelihood(blocks: tuple[Tensor, Tensor, Tensor]) -> None:
    _, rate, counts = blocks
    never_empty = torch.tensor([-30.0, 30.0]).reshape(1, 2, 1, 1).expand(2, 2, 3, 4)
    full = -torch.distributions.Poisson(rate).log_prob(counts) - torch.lgamma(counts + 1)  # without log(y!)
    assert float(zip_nll(never_empty, rate, counts)) == pytest.approx(float(full.sum() / 2), rel=1e-5)


def test_likelihood_is_lowest_at_the_true_rate() -> None:
    counts = torch.full((1, 1, 1, 1), 3.0)
    rate = torch.full_like(counts, 3.0).requires_grad_()
    zip_nll(torch.zeros(1, 2, 1, 1), rate, counts).backward()
    assert rate.grad is not None
    assert float(rate.grad) == pytest.approx(0.0, abs=1e-6)


@pytest.mark.parametrize("rate", [0.0, 1e-30, 1e4])
@pytest.mark.parametrize("logit", [-200.0, 0.0, 200.0])
def test_extremes_stay_finite(rate: float, logit: float) -> None:
    rates = torch.full((1, 1, 1, 2), rate, requires_grad=True)
    logits = torch.tensor([0.0, logit]).reshape(1, 2, 1, 1).repeat(1, 1, 1, 2).requires_grad_()
    value = zip_nll(logits, rates, torch.tensor([[[[0.0, 2.0]]]]))
    value.backward()
    for tensor in (value, logits.grad, rates.grad):
        assert tensor is not None
        assert tensor.isfinite().all()


def test_positive_bins_against_a_loop() -> None:
    torch.manual_seed(0)
    logits, classes = torch.randn(2, 4, 3, 5), torch.randint(5, (2, 3, 5))
    total = 0.0
    for b, i, j in (classes > 0).nonzero().tolist():
        total += float(cross_entropy(logits[b, :, i, j][None], classes[b, i, j][None] - 1))
    assert float(positive_bins_loss(logits, classes)) == pytest.approx(total / 2, rel=1e-5)


def test_positive_bins_of_empty_images_are_zero_and_stay_in_the_graph() -> None:
    logits = torch.randn(2, 4, 3, 5, requires_grad=True)
    loss = positive_bins_loss(logits, torch.zeros(2, 3, 5).long())
    loss.backward()
    assert float(loss.detach()) == 0
    assert logits.grad is not None
    assert not logits.grad.any()


@pytest.mark.parametrize(("height", "width"), [(8, 4), (5, 7), (1, 1)])
def test_multiscale_against_a_loop(height: int, width: int) -> None:
    torch.manual_seed(0)
    density, counts = torch.rand(2, 1, height, width) * 3, torch.randint(4, (2, 1, height, width)).float()
    total = 0.0
    for scale, weight in ((1, 0.25), (2, 0.5), (4, 1.0)):
        for b in range(2):
            for i in range(0, height, scale):
                for j in range(0, width, scale):
                    inside = (b, 0, slice(i, i + scale), slice(j, j + scale))
                    total += weight * abs(float((density[inside] - counts[inside]).sum())) / scale**2
    assert float(multiscale_mae(density, counts)) == pytest.approx(total / 2, rel=1e-5)


def test_multiscale_forgives_neighbours_at_large_scales() -> None:
    counts, moved = torch.zeros(1, 1, 4, 4), torch.zeros(1, 1, 4, 4)
    counts[..., 0, 0], moved[..., 0, 1] = 1.0, 1.0
    assert float(multiscale_mae(moved, counts, scales=(2, 4), weights=(1, 1))) == 0
    assert float(multiscale_mae(moved, counts)) == pytest.approx(0.25 * 2)


@pytest.mark.parametrize("arguments", [{"scales": (1, 2)}, {"scales": (), "weights": ()}, {"scales": (0, 1, 2)}])
def test_multiscale_settings(arguments: dict[str, tuple[int, ...]]) -> None:
    with pytest.raises(InputError, match="scales"):
        multiscale_mae(torch.ones(1, 1, 2, 2), torch.ones(1, 1, 2, 2), **arguments)


def test_count_error_is_of_whole_images() -> None:
    density = torch.tensor([[1.0, 2.0], [0.0, 0.5]]).reshape(2, 1, 1, 2)
    counts = torch.tensor([[2.0, 2.0], [0.0, 0.0]]).reshape(2, 1, 1, 2)
    assert float(count_error(density, counts)) == pytest.approx((1.0 + 0.5) / 2)


def test_half_precision_is_summed_in_float32(blocks: tuple[Tensor, Tensor, Tensor]) -> None:
    logits, rate, counts = (t.bfloat16() for t in blocks)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = zip_nll(logits, rate, counts), multiscale_mae(rate, counts), count_error(rate, counts)
    expected = (
        zip_nll(logits.float(), rate.float(), counts.float()),
        multiscale_mae(rate.float(), counts.float()),
        count_error(rate.float(), counts.float()),
    )
    assert {one.dtype for one in found} == {torch.float32}
    torch.testing.assert_close(found, expected)
