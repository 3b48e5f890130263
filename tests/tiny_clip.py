"""CLIP-Count at the size of tests: random models, and the reference's state dict filled by a formula."""

from __future__ import annotations

import math
import zlib
from typing import Any

import numpy as np
import torch
from asking import ask
from torch import Tensor

from counting_zoo import CLIPCount
from counting_zoo.nn.clip import random_clip
from counting_zoo.nn.text import word_tokenizer
from counting_zoo.types import Batch

NAMES = ["red apples", "green apples", "pears", "sea shells", "forks", "spoons"]


def config(patch: int = 16, image: int = 32, *, layers: int = 2, text_layers: int = 2) -> dict[str, Any]:
    """A CLIP ViT with random weights; 128 is the narrowest joint space that the published decoder takes."""
    tower = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 2, "projection_dim": 128}
    return {
        "projection_dim": 128,
        "vision_config": tower | {"num_hidden_layers": layers, "image_size": image, "patch_size": patch},
        "text_config": tower | {"num_hidden_layers": text_layers, "vocab_size": 320, "max_position_embeddings": 24},
    }


def resnet_config() -> dict[str, Any]:
    """A CLIP with a ResNet and random weights."""
    return config() | {"vision_config": {"layers": [1, 1, 1, 1], "width": 8, "image_size": 64}}


def counter(clip: Any = None, *, tokens: bool = True, seed: int = 0, **options: Any) -> CLIPCount:
    """A small random CLIPCount in evaluation mode, which knows NAMES."""
    torch.manual_seed(seed)
    small = {"window": 32, "prompt_width": 2, "prompt_depth": 2, "heads": 4, "contrast_epochs": 1}
    model = CLIPCount(config() if clip is None else clip, **CLIPCount.nested({**small, **options}))
    if tokens:
        model.set_tokenizer(word_tokenizer(NAMES, 320))
    return model.eval()


def tower(**options: Any) -> Any:
    """A random CLIP of the transformers library."""
    torch.manual_seed(0)
    return random_clip(config(**options))


def images(n: int, height: int = 32, width: int = 32, seed: int = 0) -> Tensor:
    """``(n, 3, height, width)`` in [0, 1]."""
    return torch.rand(n, 3, height, width, generator=torch.Generator().manual_seed(seed))


def training_batch(names: list[list[str]], side: int = 32, seed: int = 0, *, empty: tuple[int, ...] = ()) -> Batch:
    """Random pictures with three objects of every name; those in ``empty`` have none."""
    g = torch.Generator().manual_seed(seed)
    points, labels = [], []
    for i, asked in enumerate(names):
        n = 0 if i in empty else 3 * len(asked)
        points.append(torch.rand(n, 2, generator=g) * side)
        labels.append(torch.arange(n) % len(asked))
    counts = torch.stack([torch.bincount(own, minlength=len(names[0])) for own in labels]).float()
    return {
        "image": images(len(names), side, side, seed),
        "queries": ask(names),
        "points": points,
        "labels": labels,
        "counts": counts,
        "image_id": [f"{i}.png" for i in range(len(names))],
    }


def relative(found: Any, expected: Any) -> float:
    """Largest difference over the largest expected value."""
    found, expected = np.asarray(found, np.float64), np.asarray(expected, np.float64)
    assert found.shape == expected.shape, (found.shape, expected.shape)
    return float(np.abs(found - expected).max() / np.abs(expected).max())


# -- the reference's state dict ---------------------------------------------------------------------------------------


def fill(name: str, shape: tuple[int, ...], salt: str = "") -> Tensor:
    """A tensor that is a function of its name and shape, of the size that keeps activations in range."""
    seed = zlib.crc32((salt + name).encode())
    values = np.random.RandomState(seed).standard_normal(math.prod(shape)).astype(np.float32).reshape(shape)
    last = name.split(".")[-1]
    if last == "num_batches_tracked":
        return torch.zeros(shape, dtype=torch.int64)
    if last == "running_mean":
        values = np.float32(0.1) * values
    elif last == "running_var":
        values = np.exp(np.float32(0.1) * values)
    elif last == "logit_scale":
        values = np.full(shape, math.log(1 / 0.07), np.float32)
    elif "embedding" in name or last.startswith("vpt_") or "visual_prompt" in name or "learnable_context" in name:
        values = np.float32(0.1) * values
    elif last in ("text_projection", "proj"):
        values = values / np.float32(math.sqrt(shape[0]))
    elif len(shape) == 4:
        values = values * np.float32(math.sqrt(2.0 / math.prod(shape[1:])))
    elif len(shape) >= 2:
        values = values / np.float32(math.sqrt(math.prod(shape[1:])))
    elif last == "weight":
        values = np.float32(0.3 if name.endswith("bn3.weight") else 1.0) + np.float32(0.1) * values
    else:
        values = np.float32(0.05) * values
    return torch.from_numpy(np.asarray(values, np.float32))


def clip_shapes(
    *,
    dim: int = 128,
    width: int = 64,
    text_width: int = 64,
    layers: int = 3,
    text_layers: int = 2,
    patch: int = 16,
    grid: int = 2,
    vocab: int = 40,
    context: int = 12,
) -> dict[str, tuple[int, ...]]:
    """Names and shapes of OpenAI's CLIP ViT."""
    shapes: dict[str, tuple[int, ...]] = {
        "positional_embedding": (context, text_width),
        "text_projection": (text_width, dim),
        "logit_scale": (),
        "token_embedding.weight": (vocab, text_width),
        "visual.class_embedding": (width,),
        "visual.positional_embedding": (grid * grid + 1, width),
        "visual.proj": (width, dim),
        "visual.conv1.weight": (width, 3, patch, patch),
    }
    norms = [("ln_final", text_width), ("visual.ln_pre", width), ("visual.ln_post", width)]
    for prefix, w, n in (("transformer", text_width, text_layers), ("visual.transformer", width, layers)):
        for i in range(n):
            block = f"{prefix}.resblocks.{i}"
            norms += [(f"{block}.ln_1", w), (f"{block}.ln_2", w)]
            shapes |= {
                f"{block}.attn.in_proj_weight": (3 * w, w),
                f"{block}.attn.in_proj_bias": (3 * w,),
                f"{block}.attn.out_proj.weight": (w, w),
                f"{block}.attn.out_proj.bias": (w,),
                f"{block}.mlp.c_fc.weight": (4 * w, w),
                f"{block}.mlp.c_fc.bias": (4 * w,),
                f"{block}.mlp.c_proj.weight": (w, 4 * w),
                f"{block}.mlp.c_proj.bias": (w,),
            }
    return shapes | {f"{name}.{leaf}": (w,) for name, w in norms for leaf in ("weight", "bias")}


def resnet_state(salt: str = "") -> dict[str, Tensor]:
    """OpenAI's state dict of a CLIP ResNet with 8 channels and 1, 2, 1, 1 blocks, for pictures of 64 pixels."""
    text = {name: shape for name, shape in clip_shapes().items() if not name.startswith("visual.")}
    state = {name: fill(name, shape, salt) for name, shape in text.items()}
    for i, (inside, out, side) in enumerate([(3, 4, 3), (4, 4, 3), (4, 8, 3)], 1):
        state |= _convolution(f"visual.conv{i}", f"visual.bn{i}", inside, out, side, salt)
    inside = 8
    for stage, n in enumerate((1, 2, 1, 1)):
        planes = 8 << stage
        for i in range(n):
            block = f"visual.layer{stage + 1}.{i}"
            state |= _convolution(f"{block}.conv1", f"{block}.bn1", inside, planes, 1, salt)
            state |= _convolution(f"{block}.conv2", f"{block}.bn2", planes, planes, 3, salt)
            state |= _convolution(f"{block}.conv3", f"{block}.bn3", planes, 4 * planes, 1, salt)
            if i == 0:
                state |= _convolution(f"{block}.downsample.0", f"{block}.downsample.1", inside, 4 * planes, 1, salt)
            inside = 4 * planes
    pool = "visual.attnpool"
    state[f"{pool}.positional_embedding"] = fill(f"{pool}.positional_embedding", (5, 256), salt)
    for letter, out in (("q", 256), ("k", 256), ("v", 256), ("c", 128)):
        for leaf, shape in (("weight", (out, 256)), ("bias", (out,))):
            state[f"{pool}.{letter}_proj.{leaf}"] = fill(f"{pool}.{letter}_proj.{leaf}", shape, salt)
    return state


def _convolution(conv: str, norm: str, inside: int, out: int, side: int, salt: str) -> dict[str, Tensor]:
    """A convolution without bias, and the batch norm behind it."""
    state = {f"{conv}.weight": fill(f"{conv}.weight", (out, inside, side, side), salt)}
    leaves = ("weight", "bias", "running_mean", "running_var")
    state |= {f"{norm}.{leaf}": fill(f"{norm}.{leaf}", (out,), salt) for leaf in leaves}
    return state | {f"{norm}.num_batches_tracked": fill(f"{norm}.num_batches_tracked", (), salt)}


def own_shapes(
    *, dim: int = 128, width: int = 64, text_width: int = 64, vpt: tuple[int, int] = (2, 4), coop: int = 2
) -> dict[str, tuple[int, ...]]:
    """Names and shapes of what CLIP-Count adds; ``vpt`` is (depth, width)."""
    weights: dict[str, tuple[int, ...]] = {
        "img_encoder.vpt_proj": (width, width),
        "patch_feat_proj": (dim, width),
        "img_encoder.vpt_norm": (width,),
        "patch_feat_proj_contrast": (dim, width),
        "decoder_ln_pre": (dim,),
        "decoder_norm": (dim,),
        "density_decoder.final_conv.0": (1, dim // 16, 1, 1),
        "density_decoder.pyradim_conv.0": (dim // 2, dim, 1, 1),
        "density_decoder.pyradim_conv.1": (dim // 2,),
    }
    for i in range(2):
        block = f"fim_blocks.{i}"
        weights |= {f"{block}.norm{k}": (dim,) for k in range(3)} | {f"{block}.conv0": (dim, dim, 3, 3)}
        weights |= {f"{block}.selfattn.qkv": (3 * dim, dim), f"{block}.selfattn.proj": (dim, dim)}
        weights |= {f"{block}.attn.{part}": (dim, dim) for part in ("wq", "wk", "wv", "proj")}
        weights |= {f"{block}.mlp.fc1": (4 * dim, dim), f"{block}.mlp.fc2": (dim, 4 * dim)}
    for k in range(4):
        out = dim >> (k + 1)
        weights |= {f"density_decoder.convs.{k}.0": (out, dim >> k, 3, 3), f"density_decoder.convs.{k}.1": (out,)}
    shapes = {
        "img_encoder.visual_prompt": (vpt[0], vpt[1], width),
        "text_encoder.learnable_context": (coop, text_width),
    }
    for name, shape in weights.items():
        shapes |= {f"{name}.weight": shape, f"{name}.bias": (shape[0],)}
    return shapes


def official_state(salt: str = "", **sizes: Any) -> dict[str, Tensor]:
    """A released checkpoint's tensors with CLIP's under ``clip.``, at the size of tests."""
    clip = {k: v for k, v in sizes.items() if k not in ("vpt", "coop")}
    own = {k: v for k, v in sizes.items() if k in ("dim", "width", "text_width", "vpt", "coop")}
    state = {f"clip.{name}": fill(name, shape, salt) for name, shape in clip_shapes(**clip).items()}
    return state | {name: fill(name, shape, salt) for name, shape in own_shapes(**own).items()}


#: The reference's settings that go with official_state().
SETTINGS = {"vpt_width": 4, "vpt_depth": 2, "decoder_head": 8}
TOKENS = {"cats": [38, 5, 39], "hot dogs": [38, 7, 8, 39], "dogs": [38, 8, 39]}


def tokenize(prompts: list[str]) -> Tensor:
    """Ids as OpenAI's tokenizer gives them: begin 38, end 39, zeros behind."""
    ids = torch.zeros(len(prompts), 12, dtype=torch.int64)
    for row, prompt in zip(ids, prompts, strict=True):
        row[: len(TOKENS[prompt])] = torch.tensor(TOKENS[prompt])
    return ids
