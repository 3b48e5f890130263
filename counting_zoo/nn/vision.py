"""Vision transformers: attention blocks, the dense image tower, and CLIP-EBC's prompted ViT."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor, nn
from torch.nn.functional import interpolate, scaled_dot_product_attention

from counting_zoo.errors import InputError

if TYPE_CHECKING:
    from transformers import CLIPModel

Normalization = Literal["clip", "imagenet"]


#: Mean and deviation of red, green and blue in [0, 1].
STATISTICS: dict[str, tuple[tuple[float, ...], tuple[float, ...]]] = {
    "clip": ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)),
    "imagenet": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
}


def _check_heads(dim: int, heads: int) -> int:
    if heads < 1 or dim % heads:
        raise InputError(f"{heads} attention heads over a width of {dim}; expected a number that divides the width")
    return heads


class SelfAttention(nn.Module):
    """Multi-head self-attention with one fused projection; ``(B, N, dim)`` -> ``(B, N, dim)``."""

    def __init__(self, dim: int, heads: int, dropout: float = 0.1) -> None:
        super().__init__()
        self.heads = _check_heads(dim, heads)
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)  # each (B, heads, N, head_dim)
        mixed = scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        return self.dropout(self.proj(mixed))


class TextBias(nn.Module):
    """Cross-attention to one text vector.

    The softmax over a single key is 1, so the query, key and their norm cannot matter: the same vector is added to
    every patch. The reference keeps them as parameters that never train; here they do not exist.
    """

    def __init__(self, dim: int, dropout: float = 0.1) -> None:
        super().__init__()
        self.wv = nn.Linear(dim, dim)
        self.proj = nn.Linear(dim, dim)
        self.dropout = nn.Dropout(dropout)

    def forward(self, text: Tensor) -> Tensor:
        """Map ``(B, 1, dim)`` to ``(B, 1, dim)`` to add to each patch."""
        return self.dropout(self.proj(self.wv(text)))


class TextAttention(nn.Module):
    """Cross-attention of patches ``(B, N, dim)`` to all text tokens ``(B, L, dim)``; all-zero tokens are padding."""

    def __init__(self, dim: int, heads: int, dropout: float = 0.1) -> None:
        super().__init__()
        self.heads = _check_heads(dim, heads)
        self.wq, self.wk, self.wv = (nn.Linear(dim, dim) for _ in range(3))
        self.proj = nn.Linear(dim, dim)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor, text: Tensor) -> Tensor:
        q, k, v = (
            layer(source).unflatten(-1, (self.heads, -1)).transpose(1, 2)  # (B, heads, N or L, head_dim)
            for layer, source in ((self.wq, x), (self.wk, text), (self.wv, text))
        )
        real = (text != 0).any(-1)[:, None, None]  # (B, 1, 1, L)
        mixed = scaled_dot_product_attention(q, k, v, attn_mask=real).transpose(1, 2).flatten(2)
        return self.dropout(self.proj(mixed))


class MLP(nn.Module):
    """Two linear layers with GELU between."""

    def __init__(self, dim: int, ratio: int = 4, dropout: float = 0.1) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim, ratio * dim)
        self.fc2 = nn.Linear(ratio * dim, dim)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        return self.dropout(self.fc2(self.dropout(nn.functional.gelu(self.fc1(x)))))


class DropPath(nn.Module):
    """Drops a residual branch of whole samples with probability ``p`` in training; survivors are scaled by 1/(1-p)."""

    def __init__(self, p: float = 0.1) -> None:
        super().__init__()
        self.p = p

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or self.p == 0:
            return x
        keep = torch.rand(len(x), *[1] * (x.ndim - 1), device=x.device) >= self.p
        return x * keep.to(x.dtype) / (1 - self.p)


PromptIndexing = Literal["layer", "official"]


Stem = Literal["patch", "conv"]


class VisualPrompts(nn.Module):
    """Learnable tokens put behind the class token and replaced before each of the first ``depth`` layers (deep VPT).

    Args:
        width: tokens in each layer.
        depth: layers that get prompts.
        dim: token width.
        patch: patch size, which sets the initial range.
        indexing: ``layer`` gives layer i its own row. ``official`` gives layer i row i - 1 and layers 0 and 1 both
            row 0 (models/clip_count.py:308), so the reference's last row is never used and does not exist here.
        dropout: of the projected prompts, in training.
    """

    def __init__(
        self, *, width: int, depth: int, dim: int, patch: int, indexing: PromptIndexing, dropout: float = 0.1
    ) -> None:
        super().__init__()
        if indexing not in ("layer", "official"):
            raise InputError(f"prompt_indexing is {indexing!r}; expected 'layer' or 'official'")
        self.depth, self.indexing = depth, indexing
        rows = depth if indexing == "layer" else max(1, depth - 1)
        bound = (6 / (3 * patch * patch + dim)) ** 0.5  # Xavier range of the patch embedding (VPT, arXiv 2203.12119)
        self.embeddings = nn.Parameter(torch.empty(rows, width, dim).uniform_(-bound, bound))
        self.proj = nn.Linear(dim, dim)
        nn.init.kaiming_normal_(self.proj.weight, a=0, mode="fan_out")
        self.dropout = nn.Dropout(dropout)

    def forward(self, layer: int) -> Tensor:
        """Return ``(width, dim)`` prompts of one layer."""
        row = layer if self.indexing == "layer" else max(0, layer - 1)
        return self.dropout(self.proj(self.embeddings[row]))


class ConvStem(nn.Module):
    """Pixels to patch tokens by small convolutions, which learn shapes from few images.

    Args:
        dim: token width.
        width: channels of the stem.

    Shape:
        ``(B, 3, H, W)`` -> tokens ``(B, dim, H/16, W/16)`` and skip ``(B, 2 width, H/8, W/8)``.
    """

    def __init__(self, dim: int, width: int = 64) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.PixelUnshuffle(4),
            _conv(48, width),
            _conv(width, width),
            _conv(width, 2 * width, stride=2),
            ResidualBlock(2 * width),
        )
        self.to_tokens = nn.Conv2d(2 * width, dim, 2, stride=2)
        self.out_channels = 2 * width

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        # bfloat16 convolutions on a CPU are several times slower in the default memory format
        skip = self.body(x.contiguous(memory_format=torch.channels_last))
        return self.to_tokens(skip), skip


class ResidualBlock(nn.Module):
    """``x + conv(conv(x))`` with batch norm."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv1 = _conv(width, width)
        self.conv2 = nn.Sequential(nn.Conv2d(width, width, 3, padding=1, bias=False), nn.BatchNorm2d(width))

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(x + self.conv2(self.conv1(x)))


def _conv(inside: int, out: int, stride: int = 1) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(inside, out, 3, stride=stride, padding=1, bias=False), nn.BatchNorm2d(out), nn.ReLU(inplace=True)
    )


def grid_positions(table: Tensor, native: int, grid: tuple[int, int]) -> Tensor:
    """Interpolate position embeddings for any grid, bicubic where it is not the native one.

    Args:
        table: ``(1 + native * native, dim)``, the first row for the token that has no place.
        native: side of the grid the table was made for.
        grid: ``(gh, gw)`` rows and columns.

    Returns:
        ``(1, 1 + gh * gw, dim)``.
    """
    if not torch.compiler.is_exporting() and grid == (native, native):
        return table[None]
    plane = table[1:].T.unflatten(1, (native, native))[None]  # (1, dim, native, native)
    plane = interpolate(plane, grid, mode="bicubic", align_corners=False)
    return torch.cat([table[None, :1], plane.flatten(2).transpose(1, 2)], 1)


class DenseViT(nn.Module):
    """Patch features of a CLIP ViT at any size that is a multiple of the patch, with or without visual prompts.

    Args:
        clip: gives the vision transformer.
        prompt_width: visual prompts in each layer; 0 for none.
        prompt_depth: how many layers get prompts; 0 for none, all layers at most.
        prompt_indexing: see :class:`VisualPrompts`.
        stem: ``patch`` is CLIP's patch embedding; ``conv`` a :class:`ConvStem` whose stride-8 features join the
            transformer's at the end, so that the grid is twice as fine.
        train: whether the transformer trains. A ``conv`` stem always does.

    Shape:
        ``(B, 3, H, W)`` normalised -> ``(B, dim, H / stride, W / stride)``.

    Raises:
        InputError: prompts deeper than the transformer.
    """

    def __init__(
        self,
        clip: CLIPModel,
        *,
        prompt_width: int = 0,
        prompt_depth: int = 0,
        prompt_indexing: PromptIndexing = "layer",
        stem: Stem = "patch",
        train: bool = False,
    ) -> None:
        super().__init__()
        self.model = clip.vision_model
        config = self.model.config
        layers, dim, self.patch = config.num_hidden_layers, config.hidden_size, config.patch_size
        self.native_size: int = config.image_size
        if prompt_width and prompt_depth > layers:
            raise InputError(f"prompt_depth is {prompt_depth}, but the vision transformer has {layers} layers")
        # Neither is on the way to the patches, and a parameter that never gets a gradient stops DDP.
        self.model.post_layernorm = nn.Identity()
        for p in self.model.parameters():
            p.requires_grad_(train)
        self.prompts = None
        if prompt_width and prompt_depth:
            self.prompts = VisualPrompts(
                width=prompt_width, depth=prompt_depth, dim=dim, patch=self.patch, indexing=prompt_indexing
            )
            # The reference normalises its prompted tokens once more, with timm's epsilon.
            self.norm: nn.Module = nn.LayerNorm(dim, eps=1e-6)
        else:
            self.norm = nn.Identity()
        self.stem: ConvStem | None = None
        if stem == "conv":
            if self.patch != 16:
                raise InputError(f"stem='conv' makes patches of 16 pixels; vision_config.patch_size is {self.patch}")
            self.stem = ConvStem(dim)
            self.model.embeddings.patch_embedding = nn.Identity()
            self.lateral = nn.Conv2d(dim, self.stem.out_channels, 1)
            self.fuse = ResidualBlock(self.stem.out_channels)
        elif stem != "patch":
            raise InputError(f"stem is {stem!r}; expected 'patch' or 'conv'")
        self.dim: int = dim if self.stem is None else self.stem.out_channels
        self.stride: int = self.patch if self.stem is None else self.patch // 2

    def forward(self, x: Tensor) -> Tensor:
        height, width = x.shape[-2:]
        if not torch.compiler.is_exporting() and (height % self.patch or width % self.patch):
            raise InputError(f"input of {height} x {width} pixels; expected multiples of the patch, {self.patch}")
        embeddings = self.model.embeddings
        if self.stem is None:
            patches, skip = embeddings.patch_embedding(x), None
        else:
            patches, skip = self.stem(x)
        grid = patches.shape[-2:]
        tokens = patches.flatten(2).transpose(1, 2)  # (B, N, dim)
        tokens = torch.cat([embeddings.class_embedding.to(tokens.dtype).expand(x.shape[0], 1, -1), tokens], 1)
        table = embeddings.position_embedding.weight
        tokens = tokens + grid_positions(table, self.native_size // self.patch, (grid[0], grid[1]))
        tokens = self._transform(tokens)[:, 1:]
        features = tokens.transpose(1, 2).unflatten(2, grid)  # (B, dim, h, w)
        if self.stem is None or skip is None:
            return features
        lateral = self.lateral(features.contiguous(memory_format=torch.channels_last))
        return self.fuse(skip + interpolate(lateral, scale_factor=2.0, mode="nearest"))

    def _transform(self, tokens: Tensor) -> Tensor:
        """Run ``(B, 1 + N, dim)`` through the transformer; prompts come and go inside."""
        width, depth, batch = 0, 0, tokens.shape[0]
        if self.prompts is not None:
            depth, width = self.prompts.depth, self.prompts.embeddings.shape[1]
            first = self.prompts(0).to(tokens.dtype).expand(batch, -1, -1)
            tokens = torch.cat([tokens[:, :1], first, tokens[:, 1:]], 1)
        hidden = self.model.pre_layrnorm(tokens)
        for i, layer in enumerate(self.model.encoder.layers):
            if self.prompts is not None and 0 < i < depth:
                fresh = self.prompts(i).to(hidden.dtype).expand(batch, -1, -1)
                hidden = torch.cat([hidden[:, :1], fresh, hidden[:, 1 + width :]], 1)
            elif i == depth and width:
                hidden = torch.cat([hidden[:, :1], hidden[:, 1 + width :]], 1)
            hidden = layer(hidden, None)
        if width and depth == len(self.model.encoder.layers):
            hidden = torch.cat([hidden[:, :1], hidden[:, 1 + width :]], 1)
        return self.norm(hidden)


PromptInit = Literal["xavier", "official"]


class PromptedViT(nn.Module):
    """Patch features of a CLIP ViT whose layers also see visual prompts (VPT, arXiv 2203.12119; arXiv 2403.09281).

    Unlike in :class:`~counting_zoo.nn.vision.DenseViT`, the prompts have neither position nor first normalisation:
    they join behind it, between the class token and the patches, as they are. The last normalisation, which CLIP
    itself applies to its class token alone, is applied to every patch.

    Args:
        clip: gives the vision transformer.
        n_prompts: visual prompts in each layer; 0 for none.
        deep: each layer has prompts of its own, and what the layer before made of its prompts is dropped. Otherwise
            only the first layer gets prompts, and what becomes of them is carried on (shallow).
        dropout: of the prompts, in training.
        init: range of the uniform values prompts start from: ``xavier`` takes the fan of the patch embedding,
            ``3 * patch ** 2 + dim`` (VPT); ``official`` ``3 * patch + dim`` (models/clip/model.py:71).
        train: whether the transformer trains along. Otherwise it is frozen, but passes gradients to the prompts.

    Attributes:
        prompts: ``(layers or 1, n_prompts, dim)``, or ``None`` without prompts.
        dim: channels out.
        stride: pixels along a side of a cell, the patch.
        multiple: sides of the input are multiples of it, the patch.

    Shape:
        ``(B, 3, H, W)`` normalised -> ``(B, dim, H / stride, W / stride)``.

    Raises:
        InputError: a setting out of range, or an input that is no multiple of the patch.
    """

    def __init__(
        self,
        clip: CLIPModel,
        *,
        n_prompts: int = 32,
        deep: bool = True,
        dropout: float = 0.0,
        init: PromptInit = "xavier",
        train: bool = False,
    ) -> None:
        super().__init__()
        if n_prompts < 0:
            raise InputError(f"n_prompts is {n_prompts}; expected 0 (none) or more")
        if not 0 <= dropout < 1:
            raise InputError(f"dropout of the visual prompts is {dropout}; expected at least 0 and below 1")
        if init not in ("xavier", "official"):
            raise InputError(f"init of the visual prompts is {init!r}; expected 'xavier' or 'official'")
        self.model = clip.vision_model
        config = self.model.config
        self.native_size: int = config.image_size
        self.dim: int = config.hidden_size
        self.stride: int = config.patch_size
        self.multiple: int = config.patch_size
        self.frozen = not train
        self.model.requires_grad_(train)
        self.prompts: nn.Parameter | None = None
        if n_prompts:
            fan = 3 * (self.stride**2 if init == "xavier" else self.stride) + self.dim
            bound = (6 / fan) ** 0.5
            rows = len(self.model.encoder.layers) if deep else 1
            self.prompts = nn.Parameter(torch.empty(rows, n_prompts, self.dim).uniform_(-bound, bound))
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        height, width = x.shape[-2:]
        if not torch.compiler.is_exporting() and (height % self.stride or width % self.stride):
            raise InputError(f"input of {height} x {width} pixels; expected multiples of the patch, {self.stride}")
        embeddings = self.model.embeddings
        patches = embeddings.patch_embedding(x)  # (B, dim, h, w)
        grid = (patches.shape[-2], patches.shape[-1])
        tokens = patches.flatten(2).transpose(1, 2)  # (B, h * w, dim)
        tokens = torch.cat([embeddings.class_embedding.to(tokens.dtype).expand(x.shape[0], 1, -1), tokens], 1)
        table = embeddings.position_embedding.weight
        tokens = tokens + grid_positions(table, self.native_size // self.stride, grid)
        tokens = self._transform(self.model.pre_layrnorm(tokens))
        return tokens.transpose(1, 2).unflatten(2, grid)

    def _transform(self, hidden: Tensor) -> Tensor:
        """Map ``(B, 1 + N, dim)`` class token and patches to ``(B, N, dim)`` patches; prompts come and go inside."""
        kept = 1  # tokens in front of the patches
        for i, layer in enumerate(self.model.encoder.layers):
            if self.prompts is not None and i < len(self.prompts):
                fresh = self.dropout(self.prompts[i].to(hidden.dtype).expand(hidden.shape[0], -1, -1))
                hidden = torch.cat([hidden[:, :1], fresh, hidden[:, kept:]], 1)
                kept = 1 + self.prompts.shape[1]
            hidden = layer(hidden, None)
        return self.model.post_layernorm(hidden[:, kept:])

    def train(self, mode: bool = True) -> PromptedViT:
        super().train(mode)
        if self.frozen:
            self.model.eval()
        return self
