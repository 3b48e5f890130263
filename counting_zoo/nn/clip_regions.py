"""CLIP's image towers as encoders of regions: embeddings of boxes in the space that texts are in."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor, nn
from torch.nn.functional import avg_pool2d, batch_norm, relu

from counting_zoo.errors import InputError
from counting_zoo.nn.vision import DenseViT, Stem
from counting_zoo.regions import roi_align

if TYPE_CHECKING:
    from transformers import CLIPModel

    from counting_zoo.nn.clip_resnet import CLIPResNetModel

DenseMode = Literal["patch", "value"]

TOGETHER = 256
"""Regions that go through the last stage of a ResNet together."""


class FrozenBatchNorm2d(nn.Module):
    """Batch norm that stays as it is: its statistics, weight and bias are buffers, in training too.

    Names in its state dict are those of ``nn.BatchNorm2d``, so weights go from one to the other.

    Args:
        norm: what it takes values and epsilon from.
    """

    def __init__(self, norm: nn.BatchNorm2d) -> None:
        super().__init__()
        self.eps = norm.eps
        for name, value in norm.state_dict().items():
            self.register_buffer(name, value)
        if getattr(self, "running_mean", None) is None or getattr(self, "weight", None) is None:
            raise InputError(f"{norm} cannot be frozen: it keeps no statistics, or has no weight and bias")

    def forward(self, x: Tensor) -> Tensor:
        return batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias, eps=self.eps)  # type: ignore[arg-type]


def freeze_batch_norms(module: nn.Module) -> None:
    """Put a :class:`FrozenBatchNorm2d` in the place of every batch norm inside a module."""
    for name, child in module.named_children():
        if isinstance(child, nn.BatchNorm2d):
            setattr(module, name, FrozenBatchNorm2d(child))
        else:
            freeze_batch_norms(child)


class ResNetRegions(nn.Module):
    """A CLIP ResNet cut behind its third stage: what comes then runs on each region (RegionCLIP, arXiv 2112.09106).

    A region is aligned to twice the grid of the attention pool, goes through the fourth stage, which halves it, and is
    pooled. It takes over the CLIP's own modules: batch norms are frozen, and the fourth stage gets its stride of 2.

    Args:
        clip: gives ``visual`` and ``attnpool``, under which names they are in the state dict.
        freeze_at: parts that do not train, of the stem and four stages in that order; 2 is the reference's.

    Attributes:
        dim: width D of the embeddings.
        stride: pixels along a side of a cell, 16.
        multiple: sides of the input are multiples of it, 16.

    Raises:
        InputError: a CLIP without attention pool, or ``freeze_at`` outside 0 to 5.
    """

    def __init__(self, clip: CLIPResNetModel, *, freeze_at: int = 2) -> None:
        super().__init__()
        if clip.attnpool is None:
            raise InputError("this CLIP ResNet has no attention pool, which regions need (visual.attnpool.*)")
        if not 0 <= freeze_at <= 5:
            raise InputError(f"freeze_at is {freeze_at}; expected 0 (all trains) to 5 (only the attention pool)")
        self.visual, self.attnpool = clip.visual, clip.attnpool
        self.visual.set_last_stride(2)
        freeze_batch_norms(self.visual)
        stages = (self.visual.layer1, self.visual.layer2, self.visual.layer3, self.visual.layer4)
        stem = nn.ModuleList([self.visual.conv1, self.visual.conv2, self.visual.conv3])
        for part in (stem, *stages)[:freeze_at]:
            part.requires_grad_(False)
        self.dim = self.attnpool.c_proj.out_features
        self.stride = self.multiple = 16

    def forward(self, images: Tensor) -> tuple[Tensor, None]:
        """``(B, 3, H, W)`` normalised pictures to ``(B, C, H / 16, W / 16)``; whole pictures are regions too."""
        _check_size(images, self.multiple)
        visual, x = self.visual, images
        for conv, norm in ((visual.conv1, visual.bn1), (visual.conv2, visual.bn2), (visual.conv3, visual.bn3)):
            x = relu(norm(conv(x)))
        return visual.layer3(visual.layer2(visual.layer1(avg_pool2d(x, 2)))), None

    def pool(self, features: Tensor, boxes: Sequence[Tensor]) -> Tensor:
        """``(N, D)`` embeddings of all boxes, in the order of the pictures; see :func:`region_embeddings`."""
        bins = 2 * self.attnpool.grid
        return torch.cat([
            self.attnpool(self.visual.layer4(roi_align(features, part, bins, 1 / self.stride, 0, aligned=True)))
            for part in _indexed(boxes, features).split(TOGETHER)
        ])  # fmt: skip


class ViTRegions(nn.Module):
    """A CLIP ViT whose patches are averaged over boxes and projected as CLIP projects its class token.

    Args:
        clip: gives ``vision_model`` and ``visual_projection``, under which names they are in the state dict.
        dense: how the last layer makes patches. ``patch`` as any other layer does, which is what counters read and
            therefore what to train. ``value`` without mixing places, ``h + out(v(norm(h)))`` and then the MLP: better
            in a CLIP that has never seen regions (MaskCLIP, arXiv 2112.01071; CLIPSelf, arXiv 2310.01403).

    Attributes:
        dim: width D of the embeddings.
        stride: pixels along a side of a cell, the patch.
        multiple: sides of the input are multiples of it, the patch.

    Raises:
        InputError: a CLIP without projection, or an unknown mode.
    """

    def __init__(self, clip: CLIPModel, *, dense: DenseMode = "patch") -> None:
        super().__init__()
        if clip.visual_projection is None:
            raise InputError("this CLIP ViT has no projection, which regions need (visual.proj)")
        if dense not in ("patch", "value"):
            raise InputError(f"dense is {dense!r}; expected 'patch' or 'value'")
        self.vision_model, self.visual_projection, self.dense = clip.vision_model, clip.visual_projection, dense
        if dense == "value":  # a parameter that never gets a gradient stops DDP
            attention = self.vision_model.encoder.layers[-1].self_attn
            attention.q_proj.requires_grad_(False)
            attention.k_proj.requires_grad_(False)
        self.dim: int = self.visual_projection.out_features
        self.stride: int = self.vision_model.config.patch_size
        self.multiple = self.stride

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor | None]:
        """Normalised pictures to a map, and to what CLIP itself makes of them.

        Args:
            images: ``(B, 3, H, W)``.

        Returns:
            ``(B, C, H / stride, W / stride)`` behind the last normalisation, and ``(B, D)`` of the class token. In
            ``value`` mode the class token saw nothing in the last layer, and ``None`` stands for it.
        """
        _check_size(images, self.multiple)
        model = self.vision_model
        hidden = model.pre_layrnorm(model.embeddings(images, interpolate_pos_encoding=True))  # (B, 1 + h * w, C)
        for layer in model.encoder.layers[:-1]:
            hidden = layer(hidden, None)
        last = model.encoder.layers[-1]
        if self.dense == "patch":
            hidden = last(hidden, None)
        else:
            hidden = hidden + last.self_attn.out_proj(last.self_attn.v_proj(last.layer_norm1(hidden)))
            hidden = hidden + last.mlp(last.layer_norm2(hidden))
        hidden = model.post_layernorm(hidden)
        grid = (images.shape[-2] // self.stride, images.shape[-1] // self.stride)
        whole = self.visual_projection(hidden[:, 0]) if self.dense == "patch" else None
        return hidden[:, 1:].transpose(1, 2).unflatten(2, grid), whole

    def pool(self, features: Tensor, boxes: Sequence[Tensor]) -> Tensor:
        """``(N, D)`` embeddings of all boxes, in the order of the pictures; see :func:`region_embeddings`."""
        # The projection is linear, so the mean of projected patches is the projected mean, which costs less.
        return self.visual_projection(_means(features, boxes, self.stride))


class StemRegions(nn.Module):
    """A small CLIP ViT behind a convolutional stem, whose cells of 8 pixels are averaged over boxes and projected.

    The features are those that counters with ``stem="conv"`` read. A whole picture is a box around everything.

    Args:
        clip: gives the transformer, whose patch embedding is dropped.

    Attributes:
        dim: width D of the embeddings.
        stride: pixels along a side of a cell, 8.
        multiple: sides of the input are multiples of it, 16.
    """

    def __init__(self, clip: CLIPModel) -> None:
        super().__init__()
        self.dim = int(clip.config.projection_dim or 0)
        self.vision = DenseViT(clip, stem="conv", train=True)
        self.visual_projection = nn.Linear(self.vision.dim, self.dim, bias=False)
        nn.init.xavier_uniform_(self.visual_projection.weight)
        self.stride, self.multiple = self.vision.stride, self.vision.patch

    def forward(self, images: Tensor) -> tuple[Tensor, None]:
        """``(B, 3, H, W)`` normalised pictures to ``(B, C, H / 8, W / 8)``."""
        _check_size(images, self.multiple)
        return self.vision(images), None

    def pool(self, features: Tensor, boxes: Sequence[Tensor]) -> Tensor:
        """``(N, D)`` embeddings of all boxes, in the order of the pictures; see :func:`region_embeddings`."""
        return self.visual_projection(_means(features, boxes, self.stride))


def _means(features: Tensor, boxes: Sequence[Tensor], stride: int) -> Tensor:
    """``(N, C)`` means of the features over boxes."""
    return roi_align(features, _indexed(boxes, features), 1, 1 / stride, 0, aligned=True).flatten(1)


RegionEncoder = ResNetRegions | ViTRegions | StemRegions


def region_encoder(
    clip: CLIPModel | CLIPResNetModel, *, stem: Stem = "patch", dense: DenseMode = "patch", freeze_at: int = 2
) -> RegionEncoder:
    """The encoder of regions for a CLIP, which gives its modules away.

    Args:
        clip: a vision transformer or a ResNet.
        stem: ``conv`` for :class:`StemRegions`.
        dense: of a vision transformer, see :class:`ViTRegions`.
        freeze_at: of a ResNet, see :class:`ResNetRegions`.

    Raises:
        InputError: a stem for a ResNet, or an unknown one.
    """
    resnet = not hasattr(clip, "vision_model")
    if stem not in ("patch", "conv") or (stem == "conv" and resnet):
        raise InputError(f"stem is {stem!r}; expected 'patch', or 'conv' with a CLIP ViT")
    if resnet:
        return ResNetRegions(clip, freeze_at=freeze_at)  # type: ignore[arg-type]
    return StemRegions(clip) if stem == "conv" else ViTRegions(clip, dense=dense)  # type: ignore[arg-type]


def region_embeddings(encoder: RegionEncoder, images: Tensor, boxes: Sequence[Tensor]) -> Tensor:
    """Embeddings of boxes, to be compared with texts by their cosine.

    What of a box lies outside its picture counts as the nearest cell, or as zeros from one cell beyond the edge on; a
    box without area, or one that is inverted, has the embedding of an empty map. None of it is NaN.

    Args:
        encoder: a :class:`ResNetRegions`, :class:`ViTRegions` or :class:`StemRegions`.
        images: ``(B, 3, H, W)`` normalised; sides are multiples of ``encoder.multiple``. Pad behind the normalisation,
            on the right and at the bottom.
        boxes: B tensors ``(N_i, 4)`` of x1, y1, x2, y2 in pixels, some of them empty.

    Returns:
        ``(N, D)``, not normalised, in the order of pictures and boxes.

    Raises:
        InputError: sizes that are no multiple, one list of boxes too many or too few, coordinates that are not finite.
    """
    return encoder.pool(encoder(images)[0], boxes)


def region_and_picture_embeddings(
    encoder: RegionEncoder, images: Tensor, boxes: Sequence[Tensor], sizes: Sequence[tuple[int, int]] | None = None
) -> tuple[Tensor, Tensor]:
    """Embeddings of boxes and of whole pictures, from one pass over the pictures.

    Args:
        encoder, images, boxes: as in :func:`region_embeddings`.
        sizes: height and width of each picture without its padding. ``None`` takes the padding along, as the
            reference does. A class token has no extent, and sees the padding.

    Returns:
        ``(N, D)`` of the boxes, and ``(B, D)`` of the pictures: the class token's, or that of a box around everything.
    """
    features, pictures = encoder(images)
    if pictures is None:
        height, width = images.shape[-2:]
        extents = [(height, width)] * len(images) if sizes is None else sizes
        corners = [images.new_tensor([[0, 0, w, h]], dtype=torch.float32) for h, w in extents]
        pictures = encoder.pool(features, corners)
    return encoder.pool(features, boxes), pictures


def _check_size(images: Tensor, multiple: int) -> None:
    height, width = images.shape[-2:]
    if not torch.compiler.is_exporting() and (height % multiple or width % multiple):
        raise InputError(f"input of {height} x {width} pixels; expected multiples of {multiple}: pad it")


def _indexed(boxes: Sequence[Tensor], features: Tensor) -> Tensor:
    """``(N, 5)`` rows of picture index and corners."""
    if len(boxes) != len(features) or any(own.ndim != 2 or own.shape[1] != 4 for own in boxes):
        shapes = [tuple(own.shape) for own in boxes]
        raise InputError(f"boxes are {shapes} for {len(features)} pictures; expected one (N, 4) tensor for each")

    corners = torch.cat([own.to(features.device, torch.float32) for own in boxes])
    index = [i for i, own in enumerate(boxes) for _ in range(len(own))]
    return torch.cat([corners.new_tensor(index)[:, None], corners], 1)


__all__ = [
    "DenseMode", "FrozenBatchNorm2d", "RegionEncoder", "ResNetRegions", "StemRegions", "ViTRegions",
    "freeze_batch_norms", "region_and_picture_embeddings", "region_embeddings", "region_encoder",
]  # fmt: skip
