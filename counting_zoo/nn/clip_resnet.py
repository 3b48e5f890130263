"""CLIP with a ResNet as its image tower (Radford et al., arXiv 2103.00020), which transformers does not have."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.functional import avg_pool2d, relu, scaled_dot_product_attention

from counting_zoo.errors import InputError
from counting_zoo.nn.vision import grid_positions


class Bottleneck(nn.Module):
    """1x1, 3x3 and 1x1 convolution beside a shortcut; a stride averages instead of skipping pixels.

    Args:
        inside: channels in.
        planes: channels of the 3x3 convolution; four times as many come out.
        stride: of the block.

    Shape:
        ``(B, inside, h, w)`` -> ``(B, 4 planes, h / stride, w / stride)``.
    """

    def __init__(self, inside: int, planes: int, stride: int) -> None:
        super().__init__()
        self.stride = stride
        self.conv1, self.bn1 = nn.Conv2d(inside, planes, 1, bias=False), nn.BatchNorm2d(planes)
        self.conv2, self.bn2 = nn.Conv2d(planes, planes, 3, padding=1, bias=False), nn.BatchNorm2d(planes)
        self.conv3, self.bn3 = nn.Conv2d(planes, 4 * planes, 1, bias=False), nn.BatchNorm2d(4 * planes)
        self.downsample: nn.Sequential | None = None
        if stride > 1 or inside != 4 * planes:
            self.downsample = nn.Sequential(nn.Conv2d(inside, 4 * planes, 1, bias=False), nn.BatchNorm2d(4 * planes))

    def forward(self, x: Tensor) -> Tensor:
        y = relu(self.bn1(self.conv1(x)))
        y = relu(self.bn2(self.conv2(y)))
        if self.stride > 1:
            x, y = avg_pool2d(x, self.stride), avg_pool2d(y, self.stride)
        y = self.bn3(self.conv3(y))
        return relu(y + (x if self.downsample is None else self.downsample(x)))


def _stage(inside: int, planes: int, n: int, stride: int) -> nn.Sequential:
    return nn.Sequential(Bottleneck(inside, planes, stride), *(Bottleneck(4 * planes, planes, 1) for _ in range(n - 1)))


class CLIPResNet(nn.Module):
    """The feature map of CLIP's ResNets: three convolutions in front, averages for strides, no attention pool.

    Names in its state dict are those of OpenAI's ``visual.*``.

    Args:
        layers: blocks of each of the four stages.
        width: channels of the first stage's 3x3 convolutions.
        last_stride: of the fourth stage. 2 is CLIP's; 1 gives a map twice as fine from the same weights.

    Attributes:
        dim: channels out, 32 * width.
        stride: pixels along a side of a cell, 16 or 32.
        multiple: sides of the input are multiples of it, the stride.

    Shape:
        ``(B, 3, H, W)`` normalised -> ``(B, dim, H / stride, W / stride)``.

    Raises:
        InputError: a setting out of range, or an input that is no multiple of the stride.
    """

    def __init__(self, layers: Sequence[int], width: int, *, last_stride: Literal[1, 2] = 2) -> None:
        super().__init__()
        if len(layers) != 4 or min(layers) < 1:
            raise InputError(f"layers of the CLIP ResNet is {list(layers)}; expected four numbers of blocks, each >= 1")
        if width < 2 or width % 2:
            raise InputError(f"width of the CLIP ResNet is {width}; expected an even number, such as 64")
        half = width // 2
        self.conv1, self.bn1 = nn.Conv2d(3, half, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(half)
        self.conv2, self.bn2 = nn.Conv2d(half, half, 3, padding=1, bias=False), nn.BatchNorm2d(half)
        self.conv3, self.bn3 = nn.Conv2d(half, width, 3, padding=1, bias=False), nn.BatchNorm2d(width)
        self.layer1 = _stage(width, width, layers[0], 1)
        self.layer2 = _stage(4 * width, 2 * width, layers[1], 2)
        self.layer3 = _stage(8 * width, 4 * width, layers[2], 2)
        self.layer4 = _stage(16 * width, 8 * width, layers[3], 2)
        self.dim = 32 * width
        self.frozen = False
        self.set_last_stride(last_stride)

    def set_last_stride(self, last_stride: Literal[1, 2]) -> None:
        """Make the map finer (1) or CLIP's own (2); no weight changes.

        Raises:
            InputError: another number.
        """
        if last_stride not in (1, 2):
            raise InputError(f"last_stride is {last_stride}; expected 1 (cells of 16 pixels) or 2 (32 pixels)")
        self.layer4[0].stride = last_stride  # type: ignore[assignment]
        self.stride = self.multiple = 16 * last_stride

    def forward(self, x: Tensor) -> Tensor:
        height, width = x.shape[-2:]
        if not torch.compiler.is_exporting() and (height % self.stride or width % self.stride):
            raise InputError(f"input of {height} x {width} pixels; expected multiples of the stride, {self.stride}")
        for conv, norm in ((self.conv1, self.bn1), (self.conv2, self.bn2), (self.conv3, self.bn3)):
            x = relu(norm(conv(x)))
        return self.layer4(self.layer3(self.layer2(self.layer1(avg_pool2d(x, 2)))))

    def train(self, mode: bool = True) -> CLIPResNet:
        return super().train(mode and not self.frozen)  # a frozen ResNet keeps its batch statistics too


class AttentionPool(nn.Module):
    """CLIP's pooling of a feature map: the mean of all places asks all places.

    Names in its state dict are those of OpenAI's ``visual.attnpool.*``. It also pools features of regions.

    Args:
        grid: side of the map that the position embeddings are for; others interpolate them.
        dim: channels in.
        heads: of the attention.
        out: channels out.

    Shape:
        ``(B, dim, h, w)`` -> ``(B, out)``.

    Raises:
        InputError: ``heads`` does not divide ``dim``.
    """

    def __init__(self, grid: int, dim: int, heads: int, out: int) -> None:
        super().__init__()
        if heads < 1 or dim % heads:
            raise InputError(f"{heads} attention heads over a width of {dim}; expected a divisor")
        self.grid, self.heads = grid, heads
        self.positional_embedding = nn.Parameter(torch.randn(grid * grid + 1, dim) / dim**0.5)
        self.q_proj, self.k_proj, self.v_proj = (nn.Linear(dim, dim) for _ in range(3))
        self.c_proj = nn.Linear(dim, out)

    def forward(self, x: Tensor) -> Tensor:
        size = (x.shape[-2], x.shape[-1])
        tokens = x.flatten(2).transpose(1, 2)  # (B, h * w, dim)
        tokens = torch.cat([tokens.mean(1, keepdim=True), tokens], 1)
        tokens = tokens + grid_positions(self.positional_embedding, self.grid, size).to(tokens.dtype)
        q, k, v = (
            proj(part).unflatten(2, (self.heads, -1)).transpose(1, 2)  # (B, heads, T, dim / heads)
            for proj, part in ((self.q_proj, tokens[:, :1]), (self.k_proj, tokens), (self.v_proj, tokens))
        )
        pooled = scaled_dot_product_attention(q, k, v)  # (B, heads, 1, dim / heads)
        return self.c_proj(pooled.flatten(1))


class CLIPResNetModel(nn.Module):
    """Both towers of a CLIP whose image tower is a ResNet; the text tower is that of ``transformers.CLIPModel``.

    Args:
        config: plain data: ``projection_dim``; ``vision_config`` with ``layers`` (four numbers of blocks), ``width``,
            ``image_size`` (224) and ``attention_pool`` (true); ``text_config`` as in ``CLIPConfig``; and
            ``attn_implementation`` of the text tower (``sdpa`` or ``eager``).

    Attributes:
        visual: the :class:`CLIPResNet`.
        attnpool: the :class:`AttentionPool` behind it, or ``None`` where the weights came without one.
        text_model, text_projection: the text tower, as :class:`~counting_zoo.nn.text.TextTower` takes it.
        logit_scale: logarithm of the scale of cosines.
        config: from which a model of the same shapes is built.

    Raises:
        InputError: the mapping is no such config; says what is missing, unknown or out of range.
    """

    def __init__(self, config: Mapping[str, Any]) -> None:
        from transformers import CLIPTextConfig, CLIPTextModel

        super().__init__()
        self.config = _checked(config)
        vision, out = self.config["vision_config"], self.config["projection_dim"]
        self.visual = CLIPResNet(vision["layers"], vision["width"])
        self.attnpool: AttentionPool | None = None
        if vision["attention_pool"]:
            heads = max(1, self.visual.dim // 64)
            self.attnpool = AttentionPool(vision["image_size"] // 32, self.visual.dim, heads, out)
        text = CLIPTextConfig(**self.config["text_config"])
        self.text_model = CLIPTextModel._from_config(text, attn_implementation=self.config["attn_implementation"])
        self.text_projection = nn.Linear(text.hidden_size, out, bias=False)
        self.logit_scale = nn.Parameter(torch.tensor(2.6592))  # log(1 / 0.07)

    def image_encoder(self, reduction: int, *, train: bool = True) -> CLIPResNet:
        """Return ``visual`` for blocks of ``reduction`` pixels: a stride of 16 for up to 16, else CLIP's 32.

        Args:
            reduction: side of a block in pixels.
            train: whether the ResNet trains, its batch statistics included.
        """
        self.visual.set_last_stride(1 if reduction <= 16 else 2)
        self.visual.requires_grad_(train)
        self.visual.frozen = not train
        return self.visual.train(self.visual.training)

    def encode_image(self, x: Tensor) -> Tensor:
        """Encode normalised images to ``(B, projection_dim)`` features, as CLIP compares them with texts.

        Raises:
            InputError: these weights came without an attention pool.
        """
        if self.attnpool is None:
            raise InputError("this CLIP ResNet has no attention pool (its weights came without visual.attnpool.*)")
        return self.attnpool(self.visual(x))


_VISION_DEFAULTS: dict[str, Any] = {"image_size": 224, "attention_pool": True}


# word_tokenizer's begin and end of text; CLIP's own are above a small vocabulary.
_TEXT_DEFAULTS = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1}


def _checked(config: Mapping[str, Any]) -> dict[str, Any]:
    """Fill in the defaults of a config, as plain data."""
    needed = {"vision_config", "text_config", "projection_dim"}
    if not needed <= set(config) <= needed | {"attn_implementation"}:
        raise InputError(f"clip as a mapping has {sorted(config)}; expected {sorted(needed)} (and attn_implementation)")
    vision = _VISION_DEFAULTS | dict(config["vision_config"])
    expected = {"layers", "width", *_VISION_DEFAULTS}
    if set(vision) != expected:
        raise InputError(
            f"clip.vision_config of a ResNet has {sorted(vision)}; expected {sorted(expected)} (a vision transformer "
            "has patch_size instead of layers)"
        )
    if not isinstance(vision["layers"], Sequence):
        raise InputError(f"clip.vision_config.layers is {vision['layers']!r}; expected four numbers of blocks")
    if vision["image_size"] < 32 or vision["image_size"] % 32:
        raise InputError(f"clip.vision_config.image_size is {vision['image_size']}; expected a multiple of 32")
    attention = config.get("attn_implementation", "sdpa")
    if attention not in ("eager", "sdpa"):  # transformers would fetch and run a kernel of any other name
        raise InputError(f"clip.attn_implementation is {attention!r}; expected 'sdpa' or 'eager'")
    return {
        "projection_dim": config["projection_dim"],
        "vision_config": vision | {"layers": [int(n) for n in vision["layers"]]},
        "text_config": _TEXT_DEFAULTS | dict(config["text_config"]),
        "attn_implementation": attention,
    }
