"""A second, naive implementation of the CLIP-Count reference on its own state dict, written from its description."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from counting_zoo.models.clip_count.network import CLIP_MEAN, CLIP_STD

State = dict[str, Tensor]


def norm(x: Tensor, s: State, name: str, eps: float = 1e-5) -> Tensor:
    return F.layer_norm(x, x.shape[-1:], s[f"{name}.weight"], s[f"{name}.bias"], eps)


def linear(x: Tensor, s: State, name: str) -> Tensor:
    return x @ s[f"{name}.weight"].T + s[f"{name}.bias"]


def attention(q: Tensor, k: Tensor, v: Tensor, heads: int, mask: Tensor | None = None) -> Tensor:
    """(B, N, D) with explicit softmax, one head after the other."""
    out, width = [], q.shape[-1] // heads
    for h in range(heads):
        part = slice(h * width, (h + 1) * width)
        scores = q[..., part] @ k[..., part].mT / math.sqrt(width)
        out.append((scores if mask is None else scores + mask).softmax(-1) @ v[..., part])
    return torch.cat(out, -1)


def clip_block(x: Tensor, s: State, name: str, mask: Tensor | None = None) -> Tensor:
    width = x.shape[-1]
    h = norm(x, s, f"{name}.ln_1")
    q, k, v = (h @ s[f"{name}.attn.in_proj_weight"].T + s[f"{name}.attn.in_proj_bias"]).split(width, -1)
    x = x + linear(attention(q, k, v, width // 64, mask), s, f"{name}.attn.out_proj")
    h = linear(norm(x, s, f"{name}.ln_2"), s, f"{name}.mlp.c_fc")
    return x + linear(h * torch.sigmoid(1.702 * h), s, f"{name}.mlp.c_proj")


def n_blocks(s: State, prefix: str) -> int:
    return len({key.split(".")[len(prefix.split("."))] for key in s if key.startswith(prefix + ".")})


def encode_text(s: State, tokens: Tensor, *, coop: bool = True) -> Tensor:
    """(B, D): all positions of the context, read where the end of text stood before the context went in."""
    x = s["token_embedding.weight"][tokens]
    if coop:
        context = s["text_encoder.learnable_context"]
        x = torch.cat([x[:, :1], context.expand(len(x), -1, -1), x[:, 1 : -len(context)]], 1)
    x = x + s["positional_embedding"][: x.shape[1]]
    mask = torch.full((x.shape[1], x.shape[1]), -math.inf).triu(1)
    for i in range(n_blocks(s, "transformer.resblocks")):
        x = clip_block(x, s, f"transformer.resblocks.{i}", mask)
    x = norm(x, s, "ln_final")
    return x[torch.arange(len(x)), tokens.argmax(-1)] @ s["text_projection"]


def encode_image(s: State, image: Tensor, *, vpt: bool = True) -> tuple[Tensor, int]:
    """(B, N, width) patches and the side of their grid."""
    patch = s["visual.conv1.weight"].shape[-1]
    side = round(math.sqrt(len(s["visual.positional_embedding"]) - 1))
    x = F.interpolate(image, (side * patch,) * 2, mode="bilinear", align_corners=False, antialias=False)
    x = (x - torch.tensor(CLIP_MEAN).view(3, 1, 1)) / torch.tensor(CLIP_STD).view(3, 1, 1)
    x = F.conv2d(x, s["visual.conv1.weight"], stride=patch).flatten(2).mT
    x = torch.cat([s["visual.class_embedding"].expand(len(x), 1, -1), x], 1) + s["visual.positional_embedding"]
    rows = s["img_encoder.visual_prompt"] if vpt else torch.zeros(0, 0, x.shape[-1])
    depth, width = rows.shape[:2]

    def prompts(i: int) -> Tensor:
        return linear(rows[i], s, "img_encoder.vpt_proj").expand(len(x), -1, -1)

    if vpt:
        x = torch.cat([x[:, :1], prompts(0), x[:, 1:]], 1)
    x = norm(x, s, "visual.ln_pre")
    for i in range(n_blocks(s, "visual.transformer.resblocks")):
        if 1 <= i < depth:
            x = torch.cat([x[:, :1], prompts(i - 1), x[:, 1 + width :]], 1)
        elif vpt and i == depth:
            x = torch.cat([x[:, :1], x[:, 1 + width :]], 1)
        x = clip_block(x, s, f"visual.transformer.resblocks.{i}")
    if vpt:
        x = norm(x, s, "img_encoder.vpt_norm", 1e-6)
    return x[:, 1:], side


def sinusoid(n: int, dim: int) -> Tensor:
    table = torch.zeros(n, dim)
    for p in range(n):
        for k in range(dim // 2):
            w = 10000 ** (-2 * k / dim)
            table[p, 2 * k], table[p, 2 * k + 1] = math.sin(p * w), math.cos(p * w)
    return table


def stage(x: Tensor, s: State, conv: str, group: str) -> Tensor:
    x = F.conv2d(x, s[f"{conv}.weight"], s[f"{conv}.bias"], padding=s[f"{conv}.weight"].shape[-1] // 2)
    return F.gelu(F.group_norm(x, 8, s[f"{group}.weight"], s[f"{group}.bias"]))


def resize(x: Tensor, size: int) -> Tensor:
    return F.interpolate(x, (size, size), mode="bilinear", align_corners=False)


def clip_count(
    state: State, image: Tensor, tokens: Tensor, *, heads: int = 8, vpt: bool = True, coop: bool = True
) -> dict[str, Any]:
    """What the reference computes for (B, 3, S, S) pictures and B prompts; ``density`` is (B, S, S) in (0, 1)."""
    s = {key.removeprefix("clip."): value for key, value in state.items()}
    text = encode_text(s, tokens, coop=coop)
    features, side = encode_image(s, image, vpt=vpt)
    patches = linear(features, s, "patch_feat_proj")
    contrast = linear(features, s, "patch_feat_proj_contrast")
    dim = patches.shape[-1]
    x, maps = patches + sinusoid(side * side, dim), []
    for i in range(2):
        name = f"fim_blocks.{i}"
        if i == 1:
            plane = x.mT.unflatten(2, (side, side))
            plane = plane + F.gelu(F.conv2d(plane, s[f"{name}.conv0.weight"], s[f"{name}.conv0.bias"], padding=1))
            side *= 2
            x = resize(plane, side).flatten(2).mT
        q, k, v = linear(norm(x, s, f"{name}.norm0"), s, f"{name}.selfattn.qkv").split(dim, -1)
        x = x + linear(attention(q, k, v, heads), s, f"{name}.selfattn.proj")
        q = linear(norm(x, s, f"{name}.norm1"), s, f"{name}.attn.wq")
        k, v = (linear(text[:, None], s, f"{name}.attn.{part}") for part in ("wk", "wv"))
        x = x + linear(attention(q, k, v, heads), s, f"{name}.attn.proj")
        x = x + linear(F.gelu(linear(norm(x, s, f"{name}.norm2"), s, f"{name}.mlp.fc1")), s, f"{name}.mlp.fc2")
        maps.append(x.mT.unflatten(2, (side, side)))
    decoder = "density_decoder"
    x = resize(stage(maps[0], s, f"{decoder}.convs.0.0", f"{decoder}.convs.0.1"), side)
    x = x + stage(maps[1], s, f"{decoder}.pyradim_conv.0", f"{decoder}.pyradim_conv.1")
    x = resize(stage(x, s, f"{decoder}.convs.1.0", f"{decoder}.convs.1.1"), 2 * side)
    x = resize(stage(x, s, f"{decoder}.convs.2.0", f"{decoder}.convs.2.1"), 4 * side)
    x = resize(stage(x, s, f"{decoder}.convs.3.0", f"{decoder}.convs.3.1"), image.shape[-1])
    x = F.conv2d(x, s[f"{decoder}.final_conv.0.weight"], s[f"{decoder}.final_conv.0.bias"])
    density = x.sigmoid()[:, 0]
    return {
        "text": text,
        "patches": patches,
        "contrast": contrast,
        "density": density,
        "count": density.sum((1, 2)) / 60,
    }
