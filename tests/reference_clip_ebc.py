"""A second, naive implementation of the CLIP-EBC reference on its own state dict, written from its description."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from reference_clip_count import State, clip_block, n_blocks, norm
from torch import Tensor

MEAN, STD = torch.tensor([0.485, 0.456, 0.406])[:, None, None], torch.tensor([0.229, 0.224, 0.225])[:, None, None]


def batch_norm(x: Tensor, s: State, name: str) -> Tensor:
    mean, var = s[f"{name}.running_mean"], s[f"{name}.running_var"]
    x = (x - mean[:, None, None]) / torch.sqrt(var[:, None, None] + 1e-5)
    return x * s[f"{name}.weight"][:, None, None] + s[f"{name}.bias"][:, None, None]


def conv(x: Tensor, s: State, name: str, stride: int = 1, dilation: int = 1) -> Tensor:
    weight = s[f"{name}.weight"]
    padding = dilation * (weight.shape[-1] // 2)
    return F.conv2d(x, weight, s.get(f"{name}.bias"), stride=stride, padding=padding, dilation=dilation)


def text_features(s: State, tokens: Tensor) -> Tensor:
    """(N, E): read at the first end of text, which has the largest id."""
    t = {k.removeprefix("text_encoder."): v for k, v in s.items() if k.startswith("text_encoder.")}
    x = t["token_embedding.weight"][tokens] + t["positional_embedding"][: tokens.shape[1]]
    mask = torch.full((x.shape[1], x.shape[1]), -math.inf).triu(1)
    for i in range(n_blocks(t, "transformer.resblocks")):
        x = clip_block(x, t, f"transformer.resblocks.{i}", mask)
    return norm(x, t, "ln_final")[torch.arange(len(x)), tokens.argmax(-1)] @ t["text_projection"]


def vit(x: Tensor, s: State) -> Tensor:
    v = {k.removeprefix("image_encoder."): t for k, t in s.items() if k.startswith("image_encoder.")}
    patch = v["conv1.weight"].shape[-1]
    x = F.conv2d(x, v["conv1.weight"], stride=patch)
    h, w = x.shape[-2:]
    tokens = torch.cat([v["class_embedding"].expand(len(x), 1, -1), x.flatten(2).transpose(1, 2)], 1)
    table = v["positional_embedding"]
    side = round(math.sqrt(len(table) - 1))
    plane = table[1:].reshape(1, side, side, -1).permute(0, 3, 1, 2)
    plane = F.interpolate(plane, (h, w), mode="bicubic", align_corners=False).flatten(2).transpose(1, 2)[0]
    tokens = norm(tokens + torch.cat([table[:1], plane]), v, "ln_pre")
    n_rows = sum(k.startswith("vpt_") for k in s)
    prompts = s["vpt_0"].expand(len(x), -1, -1) if n_rows else tokens[:, :0]
    for i in range(n_blocks(v, "transformer.resblocks")):
        if n_rows > 1:
            prompts = s[f"vpt_{i}"].expand(len(x), -1, -1)
        n = prompts.shape[1]
        out = clip_block(torch.cat([tokens[:, :1], prompts, tokens[:, 1:]], 1), v, f"transformer.resblocks.{i}")
        prompts, tokens = out[:, 1 : 1 + n], torch.cat([out[:, :1], out[:, 1 + n :]], 1)
    return norm(tokens, v, "ln_post")[:, 1:].transpose(1, 2).unflatten(2, (h, w))


def resnet(x: Tensor, s: State, last_stride: int) -> Tensor:
    p = "image_encoder."
    for i, stride in ((1, 2), (2, 1), (3, 1)):
        x = batch_norm(conv(x, s, f"{p}conv{i}", stride), s, f"{p}bn{i}").relu()
    x = F.avg_pool2d(x, 2)
    for stage, stride in ((1, 1), (2, 2), (3, 2), (4, last_stride)):
        for i in range(n_blocks(s, f"{p}layer{stage}")):
            b, step = f"{p}layer{stage}.{i}", stride if i == 0 else 1
            y = batch_norm(conv(x, s, f"{b}.conv1"), s, f"{b}.bn1").relu()
            y = batch_norm(conv(y, s, f"{b}.conv2"), s, f"{b}.bn2").relu()
            y = F.avg_pool2d(y, step) if step > 1 else y
            y = batch_norm(conv(y, s, f"{b}.conv3"), s, f"{b}.bn3")
            if f"{b}.downsample.0.weight" in s:
                x = F.avg_pool2d(x, step) if step > 1 else x
                x = batch_norm(conv(x, s, f"{b}.downsample.0"), s, f"{b}.downsample.1")
            x = (y + x).relu()
    return x


def decode(x: Tensor, s: State) -> Tensor:
    for i in range(n_blocks(s, "image_decoder")):
        b = f"image_decoder.{i}"
        y, last = x, 3 if f"{b}.conv3.weight" in s else 2
        for k in range(1, last + 1):
            y = batch_norm(conv(y, s, f"{b}.conv{k}"), s, f"{b}.bn{k}")
            y = y.relu() if k < last else y
        if f"{b}.downsample.0.weight" in s:
            x = batch_norm(conv(x, s, f"{b}.downsample.0"), s, f"{b}.downsample.1")
        x = (x + y).relu()
    return x


def clip_ebc(s: State, image: Tensor, texts: Tensor, anchors: Tensor, reduction: int) -> tuple[Tensor, Tensor]:
    """Logits (B, N, h, w) and density (B, 1, h, w) of pictures in [0, 1]."""
    x = (image - MEAN) / STD
    x = vit(x, s) if "image_encoder.class_embedding" in s else resnet(x, s, 1 if reduction <= 16 else 2)
    stride = image.shape[-1] // x.shape[-1]
    if stride != reduction:
        x = F.interpolate(x, scale_factor=stride / reduction, mode="bilinear", align_corners=False)
    x = conv(decode(x, s), s, "projection")
    logits = torch.stack([(F.normalize(x, dim=1) * F.normalize(t, dim=0)[:, None, None]).sum(1) for t in texts], 1)
    logits = s["logit_scale"].exp() * logits
    return logits, (logits.softmax(1) * anchors[:, None, None]).sum(1, keepdim=True)
