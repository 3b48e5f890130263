"""CLIP-EBC's image encoder: a frozen CLIP ViT, adapted by learnable tokens beside its patches."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor, nn

from counting_zoo.errors import InputError
from counting_zoo.nn.vision import grid_positions

if TYPE_CHECKING:
    from transformers import CLIPModel

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
        """``(B, 1 + N, dim)`` class token and patches to ``(B, N, dim)`` patches; prompts come and go inside."""
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


__all__ = ["PromptInit", "PromptedViT"]
