"""CLIP-Count as a plain torch module (Jiang et al., ACM MM 2023, arXiv 2305.07304; songrise/CLIP-Count)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor, nn
from torch.nn.functional import interpolate, softplus

from counting_zoo.errors import InputError
from counting_zoo.models.clip_count.heads import (
    FiLMHead,
    HierarchicalDecoder,
    HierarchicalInteraction,
    PlainDecoder,
    PlainInteraction,
    SimilarityHead,
    TextHead,
)
from counting_zoo.nn.text import TextPool, TextTower
from counting_zoo.nn.vision import DenseViT, PromptIndexing, Stem
from counting_zoo.types import CountOutput

if TYPE_CHECKING:
    from transformers import CLIPModel

Interaction = Literal["hierarchical", "plain", "none", "film", "similarity"]
Activation = Literal["sigmoid", "relu", "softplus", "none"]
CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)


@dataclass
class Embeddings:
    """What patches and prompts look like before they meet.

    Args:
        patches: ``(B, D, gh, gw)`` features for the density.
        contrast: ``(B, D, gh, gw)`` features for the contrastive losses.
        text: ``(B, K, D)`` one feature for each prompt.
        tokens: ``(B, K, L, D)`` token features, zero behind the end of each text.
    """

    patches: Tensor
    contrast: Tensor
    text: Tensor
    tokens: Tensor


@dataclass
class CLIPCountOutput(CountOutput):
    """Density with the embeddings the contrastive losses compare.

    Args:
        patch_embeds: ``(B, N, D)`` patches on their way to the density, row by row.
        contrast_embeds: ``(B, N, D)`` patches as the contrastive loss sees them.
        text_embeds: ``(B, K, D)``.
        raw_density: ``(B, K, h, w)`` density in the reference's scale, ``density * density_scale``.
        grid: ``(gh, gw)``, N = gh * gw.
    """

    patch_embeds: Tensor
    contrast_embeds: Tensor
    text_embeds: Tensor
    raw_density: Tensor
    grid: tuple[int, int]


class CLIPCountNet(nn.Module):
    """Frozen CLIP with visual prompts and text context, patch-text interaction, and a density decoder.

    Args:
        clip: both CLIP towers.
        window: side of the square the model looks at, in pixels of the preprocessed picture.
        input_size: side that window is resized to for the vision transformer; its native size if ``None``.
        antialias: of that resize. The reference ran torchvision 0.11, which has none.
        prompt_width, prompt_depth, prompt_indexing: see :class:`~counting_zoo.nn.vision.DenseViT`.
        n_context, text_pool: see :class:`~counting_zoo.nn.text.TextTower`.
        text_keys: what patches attend to: the ``pooled`` text feature (the paper) or all its ``tokens``.
        interaction: ``hierarchical`` (the paper), ``plain`` (one scale, ``depth`` blocks), ``none`` (the text is
            added once), ``film`` (text-modulated features and their similarity to the text, at the encoder's grid), or
            ``similarity`` (features and their similarities to the text, at the encoder's grid).
        depth: blocks of ``plain``.
        heads: attention heads of the interaction. The released checkpoint has 4, the reference's default is 8.
        activation: of the density. ``sigmoid`` is the reference's and caps a window at (its pixels / scale) objects.
        density_scale: the network's output is divided by this; 60 in the reference.
        stem: see :class:`~counting_zoo.nn.vision.DenseViT`.
        train_vision, train_text: whether CLIP's own weights train.
        contrast_proj: whether patches get a projection of their own for the contrastive loss.

    Shape:
        pictures ``(B, 3, H, W)`` in [0, 1] and B x K prompts -> :class:`CLIPCountOutput` with density
        ``(B, K, H / cell, W / cell)``.
    """

    mean: Tensor
    std: Tensor

    def __init__(
        self,
        clip: CLIPModel,
        *,
        window: int = 384,
        input_size: int | None = None,
        antialias: bool = True,
        prompt_width: int = 20,
        prompt_depth: int = 10,
        prompt_indexing: PromptIndexing = "layer",
        n_context: int = 2,
        text_pool: TextPool = "eot",
        text_keys: Literal["pooled", "tokens"] = "pooled",
        interaction: Interaction = "hierarchical",
        depth: int = 4,
        heads: int = 8,
        activation: Activation = "softplus",
        density_scale: float = 60.0,
        stem: Stem = "patch",
        train_vision: bool = False,
        train_text: bool = False,
        contrast_proj: bool = True,
    ) -> None:
        super().__init__()
        self.vision = DenseViT(
            clip,
            prompt_width=prompt_width,
            prompt_depth=prompt_depth,
            prompt_indexing=prompt_indexing,
            stem=stem,
            train=train_vision,
        )
        self.text = TextTower(clip, n_context=n_context, pool=text_pool, train=train_text)
        self.window, self.input_size = window, input_size or self.vision.native_size
        if self.input_size % self.vision.patch:
            raise InputError(f"input_size is {self.input_size}; expected a multiple of the patch, {self.vision.patch}")
        if activation not in ("sigmoid", "relu", "softplus", "none"):
            raise InputError(f"activation is {activation!r}; expected 'sigmoid', 'relu', 'softplus' or 'none'")
        self.antialias, self.activation, self.density_scale = antialias, activation, density_scale
        self.register_buffer("mean", torch.tensor(CLIP_MEAN).view(3, 1, 1))
        self.register_buffer("std", torch.tensor(CLIP_STD).view(3, 1, 1))
        dim = self.text.dim
        self.patch_proj = nn.Linear(self.vision.dim, dim)
        nn.init.xavier_normal_(self.patch_proj.weight)
        self.contrast_proj = nn.Linear(self.vision.dim, dim) if contrast_proj else None
        self.interaction: nn.Module
        self.decoder: nn.Module
        if interaction == "hierarchical":
            self.interaction = HierarchicalInteraction(dim, heads, text_keys)
            self.decoder = HierarchicalDecoder(dim)
        elif interaction in ("plain", "none"):
            self.interaction = PlainInteraction(dim, heads, depth if interaction == "plain" else 0, text_keys)
            self.decoder = PlainDecoder(dim)
        elif interaction == "film":
            self.interaction, self.decoder = nn.Identity(), FiLMHead(dim)
        elif interaction == "similarity":
            self.interaction, self.decoder = nn.Identity(), SimilarityHead(dim)
        else:
            raise InputError(
                f"interaction is {interaction!r}; expected 'hierarchical', 'plain', 'none', 'film' or 'similarity'"
            )
        if activation == "softplus" and not isinstance(self.decoder, TextHead):
            # A fresh softplus would count over a thousand objects in an empty window.
            nn.init.constant_(self.decoder.get_parameter("out.bias"), -5.0)

    @property
    def cell(self) -> int:
        """Pixels of the preprocessed picture along one side of a density cell."""
        if not isinstance(self.decoder, TextHead):
            return 1
        cells = self.input_size // self.vision.stride
        if self.window % cells:
            raise InputError(
                f"window {self.window} and input_size {self.input_size} give density cells of "
                f"{self.window / cells:.3f} pixels; choose a window that is a multiple of {cells}"
            )
        return self.window // cells

    def embed(self, image: Tensor, classes: list[list[str]]) -> Embeddings:
        """Patch and text embeddings; all that the contrastive stage needs."""
        x = image if torch.is_floating_point(image) else image.float() / 255
        size = self._input_shape(image.shape[-2], image.shape[-1])
        # An exported graph serves every size, so there the resize stays in even where it changes nothing.
        if torch.compiler.is_exporting() or size != (image.shape[-2], image.shape[-1]):
            x = interpolate(x, size, mode="bilinear", align_corners=False, antialias=self.antialias)
        features = self.vision((x - self.mean) / self.std)  # (B, C, gh, gw)
        flat = features.permute(0, 2, 3, 1)  # (B, gh, gw, C)
        k = len(classes[0])
        pooled, tokens = self.text.encode([name for names in classes for name in names])
        return Embeddings(
            patches=self.patch_proj(flat).permute(0, 3, 1, 2),
            contrast=(self.contrast_proj or self.patch_proj)(flat).permute(0, 3, 1, 2),
            text=pooled.unflatten(0, (-1, k)),
            tokens=tokens.unflatten(0, (-1, k)),
        )

    def _input_shape(self, height: int, width: int) -> tuple[int, int]:
        """The encoder's input for a picture: scaled as the window is, to the nearest multiple of the patch."""
        unit = self.window * self.vision.patch
        cells = [(2 * side * self.input_size + unit) // (2 * unit) for side in (height, width)]
        if not torch.compiler.is_exporting():
            cells = [max(1, n) for n in cells]
        return cells[0] * self.vision.patch, cells[1] * self.vision.patch

    def count(self, embeddings: Embeddings, size: tuple[int, int]) -> CLIPCountOutput:
        """Density of pictures of ``size`` (H, W) from their embeddings."""
        patches, text = embeddings.patches, embeddings.text
        grid = (patches.shape[-2], patches.shape[-1])
        if isinstance(self.decoder, TextHead):
            logits = self.decoder(patches, embeddings.contrast, text)
        else:
            maps = self.interaction(patches, text, embeddings.tokens)
            logits = self.decoder(maps)  # (B, K, h, w)
            # The last 1x1 convolution runs before this resize: both are linear, and one channel moves instead of 32.
            logits = interpolate(logits, size, mode="bilinear", align_corners=False)
        raw = self._activate(logits.float())
        return CLIPCountOutput(
            density=raw / self.density_scale,
            patch_embeds=patches.flatten(2).transpose(1, 2),
            contrast_embeds=embeddings.contrast.flatten(2).transpose(1, 2),
            text_embeds=text,
            raw_density=raw,
            grid=grid,
        )

    def forward(self, image: Tensor, classes: list[list[str]]) -> CLIPCountOutput:
        return self.count(self.embed(image, classes), (image.shape[-2], image.shape[-1]))

    def _activate(self, logits: Tensor) -> Tensor:
        if self.activation == "sigmoid":
            return logits.sigmoid()
        if self.activation == "relu":
            return logits.relu()
        return softplus(logits) if self.activation == "softplus" else logits


__all__ = ["Activation", "CLIPCountNet", "CLIPCountOutput", "Embeddings", "Interaction"]
