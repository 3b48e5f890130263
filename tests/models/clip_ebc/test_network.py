"""Decoder, heads and the blockwise network: against naive second implementations, at any size."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.functional import batch_norm, conv2d, interpolate, relu

from counting_zoo.errors import InputError
from counting_zoo.models.clip_ebc.heads import (
    BinHead,
    EBCOutput,
    LinearHead,
    RegressionHead,
    Representatives,
    TextHead,
    ZeroInflatedHead,
    ZIPOutput,
)
from counting_zoo.models.clip_ebc.network import BlockwiseNet, Decoder
from counting_zoo.nn.backbones import SmallEncoder
from counting_zoo.types import CountOutput


def randomised(module: nn.Module, seed: int = 0) -> nn.Module:
    """With batch statistics and shifts that show, in evaluation mode."""
    g = torch.Generator().manual_seed(seed)
    for m in module.modules():
        if isinstance(m, nn.BatchNorm2d):
            for t in (m.weight.data, m.bias.data, m.running_mean):
                t.copy_(torch.randn(t.shape, generator=g) * 0.5 + 0.3)  # type: ignore[union-attr]
            m.running_var.copy_(torch.rand(m.running_var.shape, generator=g) + 0.5)  # type: ignore[union-attr]
    return module.eval()


class Cells(nn.Module):
    """An encoder that says which pixels it has seen: the mean of each cell."""

    def __init__(self, stride: int, multiple: int) -> None:
        super().__init__()
        self.dim, self.stride, self.multiple = 3, stride, multiple

    def forward(self, x: Tensor) -> Tensor:
        assert not x.shape[-1] % self.multiple
        assert not x.shape[-2] % self.multiple
        return nn.functional.avg_pool2d(x, self.stride)


def identity_head() -> RegressionHead:
    head = RegressionHead(3, "none")
    nn.init.constant_(head.out.weight, 1 / 3)
    return head


# -- decoder ----------------------------------------------------------------------------------------------------------


def norm(state: dict[str, Tensor], name: str, x: Tensor) -> Tensor:
    parts = [state[f"{name}.{k}"] for k in ("running_mean", "running_var", "weight", "bias")]
    return batch_norm(x, *parts)


@pytest.mark.parametrize("block", ["basic", "bottleneck"])
def test_decoder_upsamples_first_and_then_convolves(block: str) -> None:
    torch.manual_seed(0)
    decoder = randomised(Decoder(6, [6, 4], block))  # type: ignore[arg-type]
    s = decoder.state_dict()
    x = torch.randn(2, 6, 3, 5)
    y = interpolate(x, (6, 10), mode="bilinear", align_corners=False)
    for i in "01":
        shortcut = y
        if f"{i}.downsample.0.weight" in s:
            shortcut = norm(s, f"{i}.downsample.1", conv2d(y, s[f"{i}.downsample.0.weight"]))
        if block == "basic":
            z = relu(norm(s, f"{i}.bn1", conv2d(y, s[f"{i}.conv1.weight"], padding=1)))
            z = norm(s, f"{i}.bn2", conv2d(z, s[f"{i}.conv2.weight"], padding=1))
        else:
            z = relu(norm(s, f"{i}.bn1", conv2d(y, s[f"{i}.conv1.weight"])))
            z = relu(norm(s, f"{i}.bn2", conv2d(z, s[f"{i}.conv2.weight"], padding=1)))
            z = norm(s, f"{i}.bn3", conv2d(z, s[f"{i}.conv3.weight"]))
        y = relu(z + shortcut)
    torch.testing.assert_close(decoder(x, (6, 10)), y, rtol=1e-4, atol=1e-5)
    assert [k for k in s if "downsample.0" in k] == ["1.downsample.0.weight"]


def test_decoder_may_shrink_and_may_do_nothing() -> None:
    x = torch.randn(1, 4, 8, 8)
    assert Decoder(4, [], "basic")(x, (8, 8)) is x
    assert Decoder(4, [], "basic")(x, (4, 4)).shape == (1, 4, 4, 4)
    with pytest.raises(InputError, match="decoder_block"):
        Decoder(4, [4], "wide")  # type: ignore[arg-type]


# -- heads ------------------------------------------------------------------------------------------------------------


def test_expected_count_is_the_mean_of_the_representatives() -> None:
    values = Representatives(3, [0.0, 1.0, 2.5])
    logits = torch.log(torch.tensor([0.2, 0.3, 0.5]))[None, :, None, None].expand(2, 3, 4, 5)
    torch.testing.assert_close(values(logits), torch.full((2, 1, 4, 5), 0.3 + 1.25))
    assert values(torch.zeros(1, 3, 1, 1).bfloat16()).dtype == torch.float32


def test_representatives_that_were_never_set_are_an_error() -> None:
    values = Representatives(3)
    with pytest.raises(InputError, match="representatives"):
        values(torch.zeros(1, 3, 1, 1))
    values.load_state_dict({"values": torch.tensor([0.0, 1.0, 2.0])})
    assert float(values(torch.zeros(1, 3, 1, 1))) == pytest.approx(1.0)


def test_text_head_compares_directions() -> None:
    torch.manual_seed(1)
    head = TextHead(5, 4, ["none", "one", "two"])
    head.text_features.copy_(torch.randn(3, 4))
    x = torch.randn(2, 5, 3, 3)
    logits = head(x)
    features = conv2d(x, head.projection.weight, head.projection.bias)
    for b, i, j, n in [(0, 0, 0, 0), (1, 2, 1, 2)]:
        cosine = torch.cosine_similarity(features[b, :, i, j], head.text_features[n], 0)
        assert float(logits[b, n, i, j]) == pytest.approx(float(cosine) / 0.07, rel=1e-4)
    head.text_features.mul_(7)  # only directions count
    torch.testing.assert_close(head(x), logits)
    assert math.exp(head.logit_scale.item()) == pytest.approx(1 / 0.07)


def test_linear_head_narrows_wide_features_first() -> None:
    assert list(LinearHead(512, 5).state_dict()) == ["layers.0.weight", "layers.0.bias"]
    wide = LinearHead(513, 5)
    assert wide.layers[0].out_channels == 512
    assert wide(torch.zeros(1, 513, 2, 2)).shape == (1, 5, 2, 2)


def test_zero_inflated_expectation() -> None:
    torch.manual_seed(2)
    head = ZeroInflatedHead(LinearHead(3, 2), LinearHead(3, 2), Representatives(2, [1.0, 2.5]))
    x = torch.randn(1, 3, 2, 2)
    found = head(x)
    assert isinstance(found, ZIPOutput)
    p, q = head.zero(x).softmax(1), head.rate(x).softmax(1)
    torch.testing.assert_close(found.density[:, 0], p[:, 1] * (q[:, 0] * 1.0 + q[:, 1] * 2.5))
    torch.testing.assert_close(found.counts, found.density.sum((-2, -1)))


# -- the network ------------------------------------------------------------------------------------------------------


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 70), st.integers(1, 70), st.sampled_from([(4, 4, 4), (8, 8, 4), (4, 12, 8), (16, 16, 8)]))
def test_every_size_gives_every_block_and_loses_no_pixel(height: int, width: int, kind: tuple[int, int, int]) -> None:
    stride, multiple, reduction = kind
    net = BlockwiseNet(
        Cells(stride, multiple), Decoder(3, [], "basic"), identity_head(), reduction=reduction, normalization="clip"
    )
    image = torch.rand(1, 3, height, width)
    with torch.no_grad():
        found = net(image).density
        assert found.shape == (1, 1, -(-height // reduction), -(-width // reduction))
        moved = image.clone()
        moved[..., -1, -1] += 0.5  # the last pixel is seen
        assert not torch.equal(net(moved).density, found)


def test_padding_is_mean_grey_and_what_lies_in_it_is_cut_off() -> None:
    net = BlockwiseNet(Cells(8, 16), Decoder(3, [], "basic"), identity_head(), reduction=8, normalization="imagenet")
    with torch.no_grad():
        found = net(torch.rand(1, 3, 20, 12).mul_(0).add_(net.mean)).density
    assert found.shape == (1, 1, 3, 2)
    torch.testing.assert_close(found, torch.zeros_like(found))  # mean grey is zero everywhere


def test_normalization() -> None:
    with pytest.raises(InputError, match="normalization"):
        BlockwiseNet(Cells(8, 8), Decoder(3, [], "basic"), identity_head(), reduction=8, normalization="none")  # type: ignore[arg-type]
    net = BlockwiseNet(Cells(8, 8), Decoder(3, [], "basic"), identity_head(), reduction=8, normalization="clip")
    assert isinstance(net(torch.rand(2, 3, 8, 8)), CountOutput)
    torch.testing.assert_close(net.mean.flatten(), torch.tensor([0.48145466, 0.4578275, 0.40821073]))


@pytest.mark.parametrize("reduction", [2, 4, 8, 16, 32])
def test_small_encoder_keeps_its_contract(reduction: int) -> None:
    torch.manual_seed(0)
    encoder = SmallEncoder(reduction, width=4)
    x = torch.rand(2, 3, 2 * encoder.multiple, 3 * encoder.multiple, requires_grad=True)
    found = encoder(x)
    assert encoder.stride == reduction
    assert found.shape == (2, encoder.dim, x.shape[2] // reduction, x.shape[3] // reduction)
    found.sum().backward()
    assert all(p.grad is not None for p in encoder.parameters())
    with torch.autocast("cpu", torch.bfloat16):
        assert encoder(x).isfinite().all()


def test_small_encoder_has_no_other_reduction() -> None:
    with pytest.raises(InputError, match="reduction"):
        SmallEncoder(6)


def test_bins_of_a_whole_image_sum_to_its_count() -> None:
    torch.manual_seed(0)
    head = BinHead(LinearHead(3, 5), Representatives(5, [0.0, 1.0, 2.0, 3.0, 4.2]))
    net = BlockwiseNet(Cells(8, 8), Decoder(3, [], "basic"), head, reduction=8, normalization="clip")
    found = net(torch.rand(2, 3, 30, 50))
    assert isinstance(found, EBCOutput)
    assert found.logits.shape == (2, 5, 4, 7)
    expected = (found.logits.softmax(1) * torch.tensor([0.0, 1.0, 2.0, 3.0, 4.2])[:, None, None]).sum((1, 2, 3))
    torch.testing.assert_close(found.counts[:, 0], expected)
