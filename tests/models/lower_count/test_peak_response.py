"""Peak response maps against window-by-window sharing in float64, and what they leave alone."""

from __future__ import annotations

import itertools
import threading

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from counting_zoo.errors import InputError
from counting_zoo.models.lower_count.instances import ProbabilisticBackward, peak_response_maps


class Small(nn.Module):
    """Stride, padding, groups, dilation, batch norm, a residual sum, in-place ReLU, a head."""

    def __init__(self, channels: int = 4) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, channels, 3, stride=2, padding=1)
        self.norm = nn.BatchNorm2d(channels)
        self.body = nn.Conv2d(channels, channels, 3, padding=1, groups=2, bias=False)
        self.head = nn.Conv2d(channels, 2, 2, dilation=2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.stem(x)).relu_()
        return self.head((self.body(x) + x).relu())


def small(seed: int = 0) -> Small:
    torch.manual_seed(seed)
    net = Small().double().eval()
    with torch.no_grad():
        net.norm.weight.uniform_(0.5, 1.5)
        net.norm.bias.normal_()
        net.norm.running_mean.normal_()
        net.norm.running_var.uniform_(0.5, 2)
    return net


def shared_out(conv: nn.Conv2d, x: np.ndarray, grad: np.ndarray) -> np.ndarray:
    """Each output's gradient shared out among its window's taps, one by one."""
    weight = conv.weight.detach().numpy().clip(min=0)
    value, result = x - x.min(), np.zeros_like(x)
    per_in, per_out = weight.shape[1], len(weight) // conv.groups
    for o, row, column in np.ndindex(*grad.shape):
        taps = []
        for i, a, b in itertools.product(range(per_in), *map(range, conv.kernel_size)):
            y = row * conv.stride[0] - conv.padding[0] + a * conv.dilation[0]
            z = column * conv.stride[1] - conv.padding[1] + b * conv.dilation[1]
            if 0 <= y < x.shape[1] and 0 <= z < x.shape[2]:
                at = (o // per_out * per_in + i, y, z)
                taps.append((at, value[at] * weight[o, i, a, b]))
        total = sum(part for _, part in taps)
        if total >= 1e-10:
            for at, part in taps:
                result[at] += grad[o, row, column] * part / total
    return result


def naive_map(net: Small, image: Tensor, peak: tuple[int, int, int]) -> np.ndarray:
    with torch.no_grad():
        stem = net.stem(image)
        first = net.norm(stem).relu()
        last = (net.body(first) + first).relu()
        grad = torch.zeros_like(net.head(last))[0].numpy()
    grad[peak] = 1
    grad = shared_out(net.head, last[0].numpy(), grad) * (last[0] > 0).numpy()
    grad = grad + shared_out(net.body, first[0].numpy(), grad)
    scale = (net.norm.weight / (net.norm.running_var + net.norm.eps).sqrt()).detach().numpy()
    grad = grad * (first[0] > 0).numpy() * scale[:, None, None]
    response = shared_out(net.stem, image[0].numpy(), grad).sum(0).clip(min=0)
    return response / response.sum() if response.sum() > 0 else response


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("together", [1, 2, 5])
def test_maps_are_the_naive_ones(seed: int, together: int) -> None:
    net, image = small(seed), torch.randn(1, 3, 11, 9, dtype=torch.float64)
    peaks = torch.tensor([[0, 0, 0], [1, 3, 2], [1, 0, 1], [0, 2, 2], [1, 3, 2]])
    maps = peak_response_maps(net, image, peaks, together=together)
    assert maps.shape == (5, 11, 9)
    for found, peak in zip(maps, peaks.tolist(), strict=True):
        np.testing.assert_allclose(found.numpy(), naive_map(net, image, tuple(peak)), rtol=1e-9, atol=1e-14)


@pytest.mark.filterwarnings("ignore:Using padding=.same")  # torch's own remark on speed
@settings(max_examples=20, deadline=None)
@given(
    stride=st.integers(1, 3),
    padding=st.one_of(st.integers(0, 2), st.sampled_from(["valid", "same"])),
    kernel=st.integers(1, 4),
    dilation=st.integers(1, 2),
    groups=st.sampled_from([1, 3]),
    seed=st.integers(0, 99),
)
def test_one_convolution_in_every_geometry(
    stride: int, padding: int | str, kernel: int, dilation: int, groups: int, seed: int
) -> None:
    torch.manual_seed(seed)
    conv = nn.Conv2d(3, 3, kernel, 1 if padding == "same" else stride, padding, dilation, groups).double()
    image = torch.randn(1, 3, 8, 9, dtype=torch.float64, requires_grad=True)
    with ProbabilisticBackward():
        out = conv(image)
    assert torch.equal(out, conv(image))
    seed_grad = torch.randn_like(out)
    (grad,) = torch.autograd.grad(out, image, seed_grad)
    value = (image - image.min()).detach().requires_grad_()  # the formula by torch's own backward
    same = nn.Conv2d(3, 3, kernel, conv.stride, padding, dilation, groups, bias=False).double()
    same.weight.data = conv.weight.data.clamp(min=0)
    norm = same(value)
    ratio = torch.where(norm < 1e-10, 0.0, seed_grad / norm)
    (expected,) = torch.autograd.grad(norm, value, ratio)
    torch.testing.assert_close(grad, value * expected, rtol=1e-10, atol=1e-12)


def test_all_of_a_positive_network_reaches_the_image() -> None:
    """Without negative weights nothing is lost on the way: the gradient itself sums to one."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 4, 3, 2), nn.ReLU(), nn.Conv2d(4, 1, 3))
    for parameter in net.parameters():
        parameter.data.abs_()
    image = torch.rand(1, 3, 17, 17, requires_grad=True)
    with ProbabilisticBackward():
        out = net(image)
    (grad,) = torch.autograd.grad(out[0, 0, 2, 1], image)
    assert grad.sum().item() == pytest.approx(1, abs=1e-5)
    assert (grad >= 0).all()
    assert not grad[..., 15:, :].any()  # outside the peak's field of view: rows 4 to 14, columns 2 to 12
    assert not grad[..., :4, :].any()


def test_where_nothing_arrives_the_map_is_zero() -> None:
    net = nn.Conv2d(3, 1, 3, padding=1)
    net.weight.data.abs_().neg_()
    maps = peak_response_maps(net, torch.rand(1, 3, 5, 5), torch.tensor([[0, 2, 2]]))
    assert torch.equal(maps, torch.zeros(1, 5, 5))
    constant = peak_response_maps(nn.Conv2d(3, 1, 3), torch.full((1, 3, 5, 5), 0.7), torch.tensor([[0, 2, 2]]))
    assert torch.equal(constant, torch.zeros(1, 5, 5))  # no pixel stands out, not NaN


def test_no_peaks_no_maps() -> None:
    assert peak_response_maps(small(), torch.zeros(1, 3, 8, 6), torch.zeros(0, 3, dtype=torch.int64)).shape == (0, 8, 6)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, torch.enable_grad])
@pytest.mark.parametrize("together", [1, 2])
def test_the_callers_mode_and_the_network_are_left_alone(mode: type, together: int) -> None:
    net = small()
    before = {name: value.clone() for name, value in net.state_dict().items()}
    torch.manual_seed(3)
    image, peaks = torch.randn(1, 3, 11, 9, dtype=torch.float64), torch.tensor([[0, 1, 1], [1, 2, 0]])
    expected = peak_response_maps(net, image, peaks)
    with mode():
        inside = image + 0  # an inference tensor in inference mode
        found = peak_response_maps(net, inside, peaks + 0, together=together)
        assert not inside.requires_grad
    torch.testing.assert_close(found, expected)
    assert all(parameter.grad is None and parameter.requires_grad for parameter in net.parameters())
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())
    image.requires_grad_()
    net(image).sum().backward()  # the usual backward again
    assert image.grad is not None
    assert (image.grad < 0).any()


def test_an_error_inside_leaves_nothing_behind() -> None:
    net, image = small(), torch.randn(1, 3, 11, 9, dtype=torch.float64, requires_grad=True)

    def broken(x: Tensor) -> Tensor:
        net(x)
        raise RuntimeError("broken")

    with pytest.raises(RuntimeError, match="broken"):
        peak_response_maps(broken, image, torch.tensor([[0, 0, 0]]))
    plain = torch.autograd.grad(net(image).sum(), image)[0]
    fresh = torch.autograd.grad(small()(image).sum(), image)[0]
    assert torch.equal(plain, fresh)


def test_another_thread_keeps_its_gradient() -> None:
    conv = nn.Conv2d(1, 1, 1, bias=False)
    conv.weight.data.fill_(-2.0)
    grads = []

    def other() -> None:
        x = torch.ones(1, 1, 2, 2, requires_grad=True)
        conv(x).sum().backward()
        grads.append(x.grad)

    with ProbabilisticBackward():
        thread = threading.Thread(target=other)
        thread.start()
        thread.join()
    assert torch.equal(grads[0], torch.full((1, 1, 2, 2), -2.0))


def test_what_cannot_be_answered_is_an_error() -> None:
    net, image, peaks = small(), torch.zeros(1, 3, 11, 9, dtype=torch.float64), torch.tensor([[0, 0, 0]])
    with pytest.raises(InputError, match="batch_norm"):
        peak_response_maps(small().train(), image, peaks)
    with pytest.raises(InputError, match="dropout"):
        peak_response_maps(nn.Sequential(net, nn.Dropout2d()), image, peaks)
    with pytest.raises(InputError, match=r"\(2, 3, 11, 9\)"):
        peak_response_maps(net, image.expand(2, -1, -1, -1), peaks)
    with pytest.raises(InputError, match=r"\(3,\)"):
        peak_response_maps(net, image, peaks[0])
    with pytest.raises(InputError, match=r"peaks\[1\]"):
        peak_response_maps(net, image, torch.tensor([[1, 3, 2], [0, 4, 0]]))
    with pytest.raises(InputError, match="convolution"):
        peak_response_maps(nn.Identity(), image, peaks)
    with pytest.raises(InputError, match="convolution"):
        peak_response_maps(lambda x: net(x).detach(), image, peaks)
    with pytest.raises(InputError, match="together"):
        peak_response_maps(net, image, peaks, together=0)
