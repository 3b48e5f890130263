"""CLIP-Count as a plain torch module (Jiang et al., ACM MM 2023, arXiv 2305.07304; songrise/CLIP-Count)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Literal, get_args

import torch
from torch import Tensor, nn
from torch.nn.functional import gelu, interpolate, normalize, softplus

from counting_zoo.errors import InputError
from counting_zoo.nn.text import TextPool, TextTower
from counting_zoo.nn.vision import MLP, DenseViT, DropPath, PromptIndexing, SelfAttention, Stem, TextAttention, TextBias
from counting_zoo.types import CountOutput

if TYPE_CHECKING:
    from transformers import CLIPModel

TextKeys = Literal["pooled", "tokens"]


def position_table(n: int, dim: int, device: torch.device | None = None) -> Tensor:
    """Compute ``(n, dim)`` fixed sinusoids over patches in reading order, sine and cosine interleaved.

    Not cached: a table first made while the network is exported would be a symbol and not numbers.

    Example:
        >>> position_table(2, 4)[0]
        tensor([0., 1., 0., 1.])
    """
    rate = torch.exp(torch.arange(0, dim, 2, dtype=torch.float64, device=device) * (-math.log(10000.0) / dim))
    angle = torch.arange(n, dtype=torch.float64, device=device)[:, None] * rate
    return torch.stack([angle.sin(), angle.cos()], -1).flatten(1).float()


class InteractionBlock(nn.Module):
    """Self-attention over patches, the text, and an MLP, each as a residual; optionally at twice the resolution.

    Args:
        dim: width of patches and text.
        heads: attention heads.
        text_keys: ``pooled`` or ``tokens``.
        upsample: convolve and double the grid first.
    """

    def __init__(self, dim: int, heads: int, text_keys: TextKeys, *, upsample: bool = False) -> None:
        super().__init__()
        self.conv = nn.Conv2d(dim, dim, 3, padding=1) if upsample else None
        self.norm_self = nn.LayerNorm(dim)
        self.self_attn = SelfAttention(dim, heads)
        self.norm_cross = nn.LayerNorm(dim) if text_keys == "tokens" else None
        self.cross_attn: nn.Module = TextAttention(dim, heads) if text_keys == "tokens" else TextBias(dim)
        self.norm_mlp = nn.LayerNorm(dim)
        self.mlp = MLP(dim)
        self.drop_path = DropPath()

    def forward(self, x: Tensor, text: Tensor, tokens: Tensor, grid: tuple[int, int]) -> tuple[Tensor, tuple[int, int]]:
        """Run one layer on ``(B, N, D)`` patches that no text has met yet, or ``(B K, N, D)`` that have.

        Args:
            x: patches in reading order.
            text: ``(B, K, D)``.
            tokens: ``(B, K, L, D)``.
            grid: (gh, gw) of the patches.

        Returns:
            ``(B K, N', D)`` patches and their grid.
        """
        b, k, _ = text.shape
        if self.conv is not None:
            plane = x.transpose(1, 2).unflatten(2, grid)
            plane = plane + gelu(self.conv(plane))
            grid = (2 * grid[0], 2 * grid[1])
            x = interpolate(plane, grid, mode="bilinear", align_corners=False).flatten(2).transpose(1, 2)
        # The first self-attention sees no text: it runs once an image, however many prompts are asked.
        x = x + self.drop_path(self.self_attn(self.norm_self(x)))
        if x.shape[0] != b * k:
            x = x.repeat_interleave(k, 0)
        if self.norm_cross is not None:
            attended = self.cross_attn(self.norm_cross(x), tokens.flatten(0, 1))
        else:
            attended = self.cross_attn(text.flatten(0, 1)[:, None])
        x = x + self.drop_path(attended)
        return x + self.drop_path(self.mlp(self.norm_mlp(x))), grid


class HierarchicalInteraction(nn.Module):
    """Two interaction blocks, the second at twice the resolution (paper, section 3.4).

    Shape:
        patches ``(B, D, gh, gw)``, text ``(B, K, D)`` -> maps ``(B, K, D, gh, gw)`` and ``(B, K, D, 2 gh, 2 gw)``.
    """

    def __init__(self, dim: int, heads: int, text_keys: TextKeys) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([InteractionBlock(dim, heads, text_keys, upsample=i > 0) for i in range(2)])

    def forward(self, patches: Tensor, text: Tensor, tokens: Tensor) -> list[Tensor]:
        return _run_blocks(self.blocks, patches, text, tokens)


class PlainInteraction(nn.Module):
    """``depth`` interaction blocks at one resolution; with depth 0 the text is simply added."""

    def __init__(self, dim: int, heads: int, depth: int, text_keys: TextKeys) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([InteractionBlock(dim, heads, text_keys) for _ in range(depth)])
        self.norm = nn.LayerNorm(dim)

    def forward(self, patches: Tensor, text: Tensor, tokens: Tensor) -> list[Tensor]:
        if len(self.blocks):
            mixed = _run_blocks(self.blocks, patches, text, tokens)[-1]
        else:
            mixed = patches[:, None] + text[..., None, None]
        return [self.norm(mixed.movedim(2, -1)).movedim(-1, 2)]


def _run_blocks(blocks: nn.ModuleList, patches: Tensor, text: Tensor, tokens: Tensor) -> list[Tensor]:
    b, k, dim = text.shape
    grid = (patches.shape[-2], patches.shape[-1])
    x = patches.flatten(2).transpose(1, 2)
    x = x + position_table(x.shape[1], dim, x.device).to(x)
    maps = []
    for block in blocks:
        x, grid = block(x, text, tokens, grid)
        maps.append(x.transpose(1, 2).unflatten(2, grid).unflatten(0, (b, k)))  # (B, K, D, h, w)
    return maps


class ConvStage(nn.Module):
    """Convolution, group norm, GELU."""

    def __init__(self, inside: int, out: int, kernel: int = 3) -> None:
        super().__init__()
        if out % 8:
            raise InputError(
                f"a decoder stage of {out} channels cannot be normalised in 8 groups; expected a CLIP whose "
                "projection_dim is a multiple of 128 for the hierarchical interaction, of 32 for 'plain' and 'none'"
            )
        self.conv = nn.Conv2d(inside, out, kernel, padding=kernel // 2)
        if kernel > 1:
            nn.init.xavier_normal_(self.conv.weight)
        self.norm = nn.GroupNorm(8, out)

    def forward(self, x: Tensor) -> Tensor:
        return gelu(self.norm(self.conv(x)))


def _double(x: Tensor) -> Tensor:
    return interpolate(x, scale_factor=2.0, mode="bilinear", align_corners=False)


class HierarchicalDecoder(nn.Module):
    """Four stages that halve the channels; the finer map joins through a 1x1 convolution before the second.

    Shape:
        ``[(B, K, D, gh, gw), (B, K, D, 2 gh, 2 gw)]`` -> logits ``(B, K, 8 gh, 8 gw)``.
    """

    def __init__(self, dim: int) -> None:
        super().__init__()
        widths = [dim, dim // 2, dim // 4, dim // 8, dim // 16]
        self.stages = nn.ModuleList([ConvStage(a, b) for a, b in pairwise(widths)])
        self.lateral = ConvStage(dim, dim // 2, kernel=1)
        self.out = nn.Conv2d(widths[-1], 1, 1)

    def forward(self, maps: list[Tensor]) -> Tensor:
        b, k = maps[0].shape[:2]
        coarse, fine = (m.flatten(0, 1) for m in maps)
        x = _double(self.stages[0](coarse))
        x = _double(self.stages[1](x + self.lateral(fine)))
        x = _double(self.stages[2](x))
        return self.out(self.stages[3](x)).unflatten(0, (b, k))[:, :, 0]


class PlainDecoder(nn.Module):
    """Two stages for one map: ``[(B, K, D, gh, gw)]`` -> logits ``(B, K, 2 gh, 2 gw)``."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.stages = nn.ModuleList([ConvStage(dim, dim // 2), ConvStage(dim // 2, dim // 4)])
        self.out = nn.Conv2d(dim // 4, 1, 1)

    def forward(self, maps: list[Tensor]) -> Tensor:
        b, k = maps[0].shape[:2]
        x = _double(self.stages[0](maps[0].flatten(0, 1)))
        return self.out(self.stages[1](x)).unflatten(0, (b, k))[:, :, 0]


class TextHead(nn.Module):
    """Density at the encoder's grid from patches and how similar they are to each text.

    Late fusion: a further prompt costs one small head, so training asks for several names in each image.

    Shape:
        patches and contrast features ``(B, D, h, w)``, text ``(B, K, D)`` -> logits ``(B, K, h, w)``.
    """

    mix: nn.Conv2d
    out: nn.Conv2d

    def _decode(self, x: Tensor) -> Tensor:
        """Decode ``(B, K, inside, h, w)`` to logits."""
        b, k = x.shape[:2]
        x = self.mix(x.flatten(0, 1).contiguous(memory_format=torch.channels_last)).relu()
        return self.out(self._between(x)).unflatten(0, (b, k))[:, :, 0]

    def _between(self, x: Tensor) -> Tensor:
        return x


class FiLMHead(TextHead):
    """Patches are scaled and shifted by the text, beside their similarity to it.

    It learns fast, but how much of an object counts may come to depend on its name, and so be off for new names.
    """

    def __init__(self, dim: int, hidden: int = 64) -> None:
        super().__init__()
        self.modulation = nn.Linear(dim, 2 * dim)
        self.similarity_scale = nn.Parameter(torch.tensor(5.0))
        self.mix = nn.Conv2d(dim + 1, hidden, 1)
        self.out = nn.Conv2d(hidden, 1, 3, padding=1)

    def forward(self, patches: Tensor, contrast: Tensor, text: Tensor) -> Tensor:
        gain, shift = self.modulation(text)[..., None, None].chunk(2, 2)  # (B, K, D, 1, 1)
        x = patches[:, None] * (1 + gain) + shift
        similarity = cosines(contrast, text, 1) * self.similarity_scale
        return self._decode(torch.cat([x, similarity.to(x.dtype)], 2).relu())


class SimilarityHead(TextHead):
    """The text enters through similarities alone, so an object counts the same under every name that it matches.

    Convolutions that see eight cells around each then make one object of each blob of similar cells, as they have
    learned from the names of training.

    Args:
        dim: width of patches and text.
        groups: beside the cosine of the whole, those of this many learned parts: one may come to tell colours, one
            shapes.
        hidden: channels in between.
        dilations: of the convolutions, each of which is a residual.
    """

    def __init__(self, dim: int, groups: int = 8, hidden: int = 64, dilations: Sequence[int] = (1, 2, 4)) -> None:
        super().__init__()
        if dim % groups:
            raise InputError(
                f"the CLIP's projection_dim is {dim}, and interaction 'similarity' compares {groups} parts; "
                f"expected a multiple of {groups}"
            )
        self.groups = groups
        self.query, self.key = nn.Linear(dim, dim), nn.Linear(dim, dim)
        self.similarity_scale = nn.Parameter(torch.full((groups + 1,), 5.0))
        self.mix = nn.Conv2d(dim + groups + 1, hidden, 1)
        convs = [nn.Conv2d(hidden, hidden, 3, padding=n, dilation=n) for n in dilations]
        for conv in convs:
            nn.init.kaiming_normal_(conv.weight, a=3**0.5)  # half of what relu asks for: residuals begin small
            nn.init.zeros_(conv.bias)  # type: ignore[arg-type]
        self.spread = nn.ModuleList(convs)
        self.out = nn.Conv2d(hidden, 1, 3, padding=1)

    def forward(self, patches: Tensor, contrast: Tensor, text: Tensor) -> Tensor:
        query = self.query(contrast.movedim(1, -1)).movedim(-1, 1)
        parts = [cosines(contrast, text, 1), cosines(query, self.key(text), self.groups)]
        similarity = torch.cat(parts, 2) * self.similarity_scale[:, None, None]
        x = patches.relu()[:, None].expand(-1, text.shape[1], -1, -1, -1)
        return self._decode(torch.cat([x, similarity.to(x.dtype)], 2))

    def _between(self, x: Tensor) -> Tensor:
        for conv in self.spread:
            x = x + conv(x).relu()
        return x


def cosines(features: Tensor, text: Tensor, groups: int) -> Tensor:
    """Compute the cosine of every cell with every text, in ``groups`` equal parts of the channels.

    Args:
        features: ``(B, D, h, w)``.
        text: ``(B, K, D)``.
        groups: a divisor of D.

    Returns:
        ``(B, K, groups, h, w)``.
    """
    cells = normalize(features.unflatten(1, (groups, -1)), dim=2)
    return torch.einsum("bgdhw,bkgd->bkghw", cells, normalize(text.unflatten(-1, (groups, -1)), dim=-1))


Interaction = Literal["hierarchical", "plain", "none", "film", "similarity"]


Activation = Literal["sigmoid", "relu", "softplus", "none"]


CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)


CLIP_STD = (0.26862954, 0.26130258, 0.27577711)


@dataclass
class Embeddings:
    """Embeddings of patches and prompts before they interact.

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


@dataclass(frozen=True)
class CLIPCountConfig:
    """Options of :class:`CLIPCountNet`.

    Args:
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

    Raises:
        InputError: an option that is none of its choices.
    """

    input_size: int | None = None
    antialias: bool = True
    prompt_width: int = 20
    prompt_depth: int = 10
    prompt_indexing: PromptIndexing = "layer"
    n_context: int = 2
    text_pool: TextPool = "eot"
    text_keys: Literal["pooled", "tokens"] = "pooled"
    interaction: Interaction = "hierarchical"
    depth: int = 4
    heads: int = 8
    activation: Activation = "softplus"
    density_scale: float = 60.0
    stem: Stem = "patch"
    train_vision: bool = False
    train_text: bool = False

    def __post_init__(self) -> None:
        for name, choices in (("activation", get_args(Activation)), ("interaction", get_args(Interaction))):
            if (value := getattr(self, name)) not in choices:
                raise InputError(f"{name} is {value!r}; expected one of {', '.join(map(repr, choices))}")


class CLIPCountNet(nn.Module):
    """Frozen CLIP with visual prompts and text context, patch-text interaction, and a density decoder.

    Args:
        clip: both CLIP towers.
        config: options.
        window: side of the square the model sees, in pixels of the preprocessed image.
        contrast_proj: whether patches get a projection of their own for the contrastive loss.

    Shape:
        images ``(B, 3, H, W)`` in [0, 1] and B x K prompts -> :class:`CLIPCountOutput` with density
        ``(B, K, H / cell, W / cell)``.
    """

    mean: Tensor
    std: Tensor

    def __init__(
        self, clip: CLIPModel, config: CLIPCountConfig, *, window: int = 384, contrast_proj: bool = True
    ) -> None:
        super().__init__()
        self.config, self.window = config, window
        self.vision = DenseViT(
            clip,
            prompt_width=config.prompt_width,
            prompt_depth=config.prompt_depth,
            prompt_indexing=config.prompt_indexing,
            stem=config.stem,
            train=config.train_vision,
        )
        self.text = TextTower(clip, n_context=config.n_context, pool=config.text_pool, train=config.train_text)
        self.input_size = config.input_size or self.vision.native_size
        if self.input_size % self.vision.patch:
            raise InputError(f"input_size is {self.input_size}; expected a multiple of the patch, {self.vision.patch}")
        self.register_buffer("mean", torch.tensor(CLIP_MEAN).view(3, 1, 1))
        self.register_buffer("std", torch.tensor(CLIP_STD).view(3, 1, 1))
        dim = self.text.dim
        self.patch_proj = nn.Linear(self.vision.dim, dim)
        nn.init.xavier_normal_(self.patch_proj.weight)
        self.contrast_proj = nn.Linear(self.vision.dim, dim) if contrast_proj else None
        self.interaction: nn.Module
        self.decoder: nn.Module
        if config.interaction == "hierarchical":
            self.interaction = HierarchicalInteraction(dim, config.heads, config.text_keys)
            self.decoder = HierarchicalDecoder(dim)
        elif config.interaction in ("plain", "none"):
            depth = config.depth if config.interaction == "plain" else 0
            self.interaction = PlainInteraction(dim, config.heads, depth, config.text_keys)
            self.decoder = PlainDecoder(dim)
        else:
            self.interaction = nn.Identity()
            self.decoder = FiLMHead(dim) if config.interaction == "film" else SimilarityHead(dim)
        if config.activation == "softplus" and not isinstance(self.decoder, TextHead):
            # A fresh softplus would count over a thousand objects in an empty window.
            nn.init.constant_(self.decoder.get_parameter("out.bias"), -5.0)

    @property
    def cell(self) -> int:
        """Pixels of the preprocessed image along one side of a density cell."""
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
        """Embed patches and texts; all that the contrastive stage needs."""
        x = image if torch.is_floating_point(image) else image.float() / 255
        size = self._input_shape(image.shape[-2], image.shape[-1])
        # An exported graph serves every size, so there the resize stays in even where it changes nothing.
        if torch.compiler.is_exporting() or size != (image.shape[-2], image.shape[-1]):
            x = interpolate(x, size, mode="bilinear", align_corners=False, antialias=self.config.antialias)
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
        """Compute the encoder's input for an image: scaled as the window is, to the nearest multiple of the patch."""
        unit = self.window * self.vision.patch
        cells = [(2 * side * self.input_size + unit) // (2 * unit) for side in (height, width)]
        if not torch.compiler.is_exporting():
            cells = [max(1, n) for n in cells]
        return cells[0] * self.vision.patch, cells[1] * self.vision.patch

    def count(self, embeddings: Embeddings, size: tuple[int, int]) -> CLIPCountOutput:
        """Compute the density of images of ``size`` (H, W) from their embeddings."""
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
            density=raw / self.config.density_scale,
            patch_embeds=patches.flatten(2).transpose(1, 2),
            contrast_embeds=embeddings.contrast.flatten(2).transpose(1, 2),
            text_embeds=text,
            raw_density=raw,
            grid=grid,
        )

    def forward(self, image: Tensor, classes: list[list[str]]) -> CLIPCountOutput:
        return self.count(self.embed(image, classes), (image.shape[-2], image.shape[-1]))

    def _activate(self, logits: Tensor) -> Tensor:
        if self.config.activation == "sigmoid":
            return logits.sigmoid()
        if self.config.activation == "relu":
            return logits.relu()
        return softplus(logits) if self.config.activation == "softplus" else logits
