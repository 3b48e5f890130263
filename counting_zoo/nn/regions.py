"""Regions of feature maps: RoIAlign, box overlap, suppression, and CLIP's towers as region encoders."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor, nn
from torch.nn.functional import avg_pool2d, batch_norm, relu

from counting_zoo.errors import InputError
from counting_zoo.geometry import box_iou
from counting_zoo.nn.vision import DenseViT, Stem

if TYPE_CHECKING:
    from transformers import CLIPModel

    from counting_zoo.nn.clip_resnet import CLIPResNetModel

TILE = 1 << 22
"""Numbers in one temporary array: of pairs of boxes, or of samples of regions."""


PRODUCT = 1 << 24
"""Numbers between the two products of :func:`roi_align`."""


TOGETHER = 8
"""Regions that :func:`roi_align` reads from one part of the map."""


BLOCK = 1024
"""Boxes that :func:`nms` decides about together."""


def roi_align(
    features: Tensor,
    boxes: Tensor | Sequence[Tensor],
    output_size: int | tuple[int, int],
    spatial_scale: float = 1.0,
    sampling_ratio: int = -1,
    aligned: bool = False,
) -> Tensor:
    """Average features over a grid of bins in each box (He et al., Mask R-CNN, ICCV 2017).

    A bin is the mean of bilinear samples at the centres of its ``g_y x g_x`` parts. That is separable, so a region is
    ``W_y F W_x^T`` with the weights of the rows and columns of the map: two matrix products, whose backward is
    deterministic too. A sample more than one cell outside the map counts as zero, a nearer one as the cell at the edge.
    An inverted box has no samples where their number adapts to its size, and gives zeros.

    Args:
        features: ``(B, C, H, W)``. Calculated in float32 at least, also under autocast.
        boxes: ``(K, 5)`` rows of image index, x1, y1, x2, y2, or B tensors ``(L_i, 4)``; in pixels of the image.
            No gradient flows into them.
        output_size: P, or ``(P, Q)``, bins.
        spatial_scale: cells per pixel of the boxes.
        sampling_ratio: samples per bin and axis; 0 or less takes ``ceil(size of a bin in cells)``.
        aligned: whether cell ``i`` spans ``[i, i + 1]``. Without it, its centre is at ``i`` and sides are at least 1.

    Returns:
        ``(K, C, P, Q)`` in the type of ``features``.

    Raises:
        InputError: shapes that do not fit, an image index outside the batch, coordinates that are not finite.

    Example:
        >>> ramp = torch.arange(4.0).expand(1, 1, 4, 4)
        >>> roi_align(ramp, [torch.tensor([[0.0, 0.0, 4.0, 4.0]])], (1, 2), aligned=True)
        tensor([[[[0.5000, 2.5000]]]])
    """
    rows, columns = (output_size, output_size) if isinstance(output_size, int) else output_size
    if features.ndim != 4 or not features.is_floating_point() or min(*features.shape[1:], rows, columns) < 1:
        raise InputError(
            f"features are {features.dtype} {tuple(features.shape)} for {rows} x {columns} bins; expected floating "
            "(B, C, H, W) with at least one channel and cell, and at least one bin"
        )
    n, channels, height, width = features.shape
    exact = features if features.dtype == torch.float64 else features.float()
    image, xyxy = _flat_boxes(boxes, n, exact)
    if not len(xyxy):
        return features.flatten()[:0].reshape(0, channels, rows, columns)  # still a function of the features
    start, end = (xyxy * spatial_scale - (0.5 if aligned else 0.0)).split(2, 1)
    size = end - start if aligned else (end - start).clamp(min=1)
    one = rows == columns == 1
    step = PRODUCT // (height * width) if one else min(TOGETHER, PRODUCT // (channels * height * columns))
    # Neighbours go together, so that the products need only the part of the map that they share.
    order = (start + size / 2)[:, 0].argsort()
    order = order[image[order].argsort(stable=True)]
    pieces = []
    maps = exact.unbind()  # whose gradients are put together once, where those of a slice of all fill the whole batch
    with torch.autocast(features.device.type, enabled=False):
        for own, mine in zip(maps, order.split(image.bincount(minlength=n).tolist()), strict=True):
            for part in mine.split(max(1, step)) if len(mine) else ():
                along_x = _bin_weights(start[part, 0], size[part, 0], columns, width, sampling_ratio)  # (R, Q, W)
                along_y = _bin_weights(start[part, 1], size[part, 1], rows, height, sampling_ratio)  # (R, P, H)
                (left, right), (top, bottom) = _support(along_x), _support(along_y)
                along_x, along_y = along_x[..., left:right], along_y[..., top:bottom]
                if one:  # a single product, as the two cost no less
                    weights = (along_y.transpose(1, 2) * along_x).flatten(1)  # (R, H * W)
                    means = weights @ own[:, top:bottom, left:right].flatten(1).T  # (R, C)
                    pieces.append(means[..., None, None])
                    continue
                lines = own[:, top:bottom, left:right] @ along_x.flatten(0, 1).T  # (C, H, R * Q)
                lines = lines.unflatten(2, (-1, columns)).permute(2, 1, 0, 3).flatten(2)  # (R, H, C * Q)
                pieces.append((along_y @ lines).unflatten(2, (channels, columns)).transpose(1, 2))  # (R, C, P, Q)
    return torch.cat(pieces)[order.argsort()].to(features.dtype)


def _flat_boxes(boxes: Tensor | Sequence[Tensor], n: int, like: Tensor) -> tuple[Tensor, Tensor]:
    """Return image indices ``(K,)`` and corners ``(K, 4)`` in the type and on the device of ``like``."""
    if isinstance(boxes, Tensor):
        if boxes.ndim != 2 or boxes.shape[1] != 5:
            raise InputError(f"boxes are {tuple(boxes.shape)}; expected (K, 5), image index first, or a list")
        image, corners = boxes[:, 0].long(), boxes[:, 1:]
    else:
        if len(boxes) != n or any(own.ndim != 2 or own.shape[1] != 4 for own in boxes):
            shapes = [tuple(own.shape) for own in boxes]
            raise InputError(f"boxes are {shapes} for {n} images; expected one (L, 4) tensor for each image")
        image = torch.tensor([i for i, own in enumerate(boxes) for _ in range(len(own))], dtype=torch.int64)
        corners = torch.cat([own.to(like) for own in boxes]) if len(boxes) else like.new_zeros(0, 4)
    image, corners = image.to(like.device), corners.detach().to(like)
    if len(corners) and not 0 <= int(image.min()) <= int(image.max()) < n:
        raise InputError(f"boxes name images {int(image.min())} to {int(image.max())} of a batch of {n}")
    _check_finite(corners, "boxes")
    return image, corners


def _check_finite(values: Tensor, name: str) -> None:
    finite = values.isfinite()
    if not bool(finite.all()):
        index = [int(i) for i in (~finite).nonzero()[0]]
        raise InputError(f"{name}{index} is {float(values[tuple(index)])}; expected finite numbers: drop such {name}")


def _bin_weights(start: Tensor, size: Tensor, bins: int, length: int, sampling_ratio: int) -> Tensor:
    """Compute ``(R, bins, length)``: what each cell of one axis contributes to each bin of R regions."""
    bin_size = size / bins
    samples = bin_size.ceil() if sampling_ratio <= 0 else torch.full_like(size, sampling_ratio)
    most = max(int(samples.max()), 0)
    cells = torch.arange(length, dtype=start.dtype, device=start.device)
    left = start[:, None] + bin_size[:, None] * torch.arange(bins, dtype=start.dtype, device=start.device)
    per_bin = samples.clamp(min=1)[:, None, None]
    weights = left.new_zeros(*left.shape, length)
    # Usually one pass; a box of many times the image takes more, so that memory does not grow with it.
    together = max(1, TILE // weights.numel())
    for first in range(0, most, together):
        index = torch.arange(first, min(first + together, most), dtype=start.dtype, device=start.device)
        place = left[:, :, None] + (index + 0.5) * bin_size[:, None, None] / per_bin  # (R, bins, samples)
        counted = (index < samples[:, None, None]) & (place >= -1) & (place <= length)
        distance = (place.clamp(0, length - 1)[..., None] - cells).abs_()  # (R, bins, samples, length)
        weights += (1 - distance).clamp_(min=0).mul_(counted[..., None]).sum(2)
    return weights / per_bin


def _support(weights: Tensor) -> tuple[int, int]:
    """Find first and last + 1 of the cells that have a weight in any bin, at least one cell."""
    used = weights.flatten(0, 1).any(0).nonzero()
    return (int(used[0]), int(used[-1]) + 1) if len(used) else (0, 1)


def nms(boxes: Tensor, scores: Tensor, iou_threshold: float) -> Tensor:
    """Suppress non-maxima greedily: a box stays unless it overlaps a kept one of higher score too much.

    Whether a box stays depends on those before it alone, so repeating ``keep[j] = not any(keep[i] and iou[i, j] >
    threshold for i < j)`` for all boxes together ends where the greedy loop does. It is done a block at a time, and
    what a block suppresses is not looked at again: memory is bounded.

    Args:
        boxes: ``(N, 4)`` x1, y1, x2, y2.
        scores: ``(N,)``; of equal ones the first comes first.
        iou_threshold: overlap above which the lower box goes.

    Returns:
        ``(kept,)`` int64 indices, highest score first.

    Raises:
        InputError: shapes that do not fit, values that are not finite, a threshold outside [0, 1].

    Example:
        >>> boxes = torch.tensor([[0.0, 0.0, 4.0, 4.0], [0.0, 0.0, 4.0, 5.0], [6.0, 0.0, 9.0, 3.0]])
        >>> nms(boxes, torch.tensor([0.5, 0.9, 0.1]), 0.5)
        tensor([1, 2])
    """
    return batched_nms(boxes, scores, torch.zeros(len(scores), dtype=torch.int64, device=boxes.device), iou_threshold)


def batched_nms(boxes: Tensor, scores: Tensor, idxs: Tensor, iou_threshold: float) -> Tensor:
    """Apply :func:`nms` within each group: boxes of different groups leave each other alone.

    Args:
        boxes, scores, iou_threshold: as in :func:`nms`.
        idxs: ``(N,)`` group of each box, such as its class or image.

    Returns:
        ``(kept,)`` int64 indices, highest score first over all groups.
    """
    _check_scored(boxes, scores, idxs, iou_threshold)
    rest, kept = scores.argsort(descending=True, stable=True), []
    while len(rest):
        block, rest = rest[:BLOCK], rest[BLOCK:]
        above = _suppresses(boxes, idxs, block, block, iou_threshold).triu(1).float()
        keep = torch.ones_like(above[0])
        while not torch.equal(new := (keep @ above == 0).float(), keep):
            keep = new
        kept.append(block[keep > 0])
        parts = rest.split(max(1, TILE // BLOCK))
        free = [~_suppresses(boxes, idxs, kept[-1], part, iou_threshold).any(0) for part in parts]
        rest = rest[torch.cat(free)]
    return torch.cat([scores.new_zeros(0, dtype=torch.int64), *kept])


def _suppresses(boxes: Tensor, idxs: Tensor, first: Tensor, second: Tensor, threshold: float) -> Tensor:
    """Tell ``(N, M)`` if the boxes of one index overlap those of the other, in their group, by more than allowed."""
    iou = box_iou(boxes[first], boxes[second])
    limit = torch.tensor(threshold, dtype=iou.dtype)
    if float(limit) > threshold:  # as though the IoU were compared in float64, which torchvision does
        limit = limit.nextafter(limit.new_tensor(-1.0))
    return (iou > limit.to(iou.device)) & (idxs[first][:, None] == idxs[second])


def _check_scored(boxes: Tensor, scores: Tensor, idxs: Tensor, threshold: float) -> None:
    if boxes.ndim != 2 or boxes.shape[1] != 4 or not scores.shape == idxs.shape == boxes.shape[:1]:
        raise InputError(
            f"boxes are {tuple(boxes.shape)}, scores {tuple(scores.shape)} and idxs {tuple(idxs.shape)}; expected "
            "(N, 4), (N,) and (N,)"
        )
    if not 0 <= threshold <= 1:
        raise InputError(f"iou_threshold is {threshold}; expected 0 to 1")
    _check_finite(boxes, "boxes")
    _check_finite(scores, "scores")


def soft_nms(
    boxes: Tensor,
    scores: Tensor,
    idxs: Tensor | None = None,
    *,
    method: Literal["gaussian", "linear"] = "gaussian",
    sigma: float = 0.5,
    iou_threshold: float = 0.3,
    prune: float = 0.001,
) -> tuple[Tensor, Tensor]:
    """Suppress non-maxima softly: overlap lowers a score in place of removing the box (Bodla et al., ICCV 2017).

    The highest box is taken, and scores of the rest fall by ``exp(-iou^2 / sigma)`` or, above the threshold, by
    ``1 - iou``; those not above ``prune`` go. There is one step for each box kept, as each needs the last one's scores.

    Args:
        boxes: ``(N, 4)`` x1, y1, x2, y2.
        scores: ``(N,)``; of equal ones the first comes first.
        idxs: ``(N,)`` groups that leave each other alone, or one group if ``None``.
        method: the function of the overlap.
        sigma: of the Gaussian; above 0.
        iou_threshold: overlap above which ``linear`` lowers a score.
        prune: scores up to this one are dropped.

    Returns:
        ``(kept,)`` int64 indices and ``(kept,)`` lowered scores, highest first. The highest of all stays whatever its
        score is, as in the reference.

    Raises:
        InputError: as in :func:`nms`; a method that does not exist, ``sigma`` not above 0.
    """
    groups = torch.zeros_like(scores, dtype=torch.int64) if idxs is None else idxs
    _check_scored(boxes, scores, groups, iou_threshold)
    if method not in ("gaussian", "linear") or not sigma > 0:
        raise InputError(f"method is {method!r} and sigma {sigma}; expected 'gaussian' or 'linear', and above 0")
    left = scores.detach() * 1.0
    places, values = list[Tensor](), list[Tensor]()
    for _ in range(len(left)):
        value, top = left.max(0)
        if places and not bool(value > prune):
            break
        places.append(top)
        values.append(value)
        iou = box_iou(boxes[top][None], boxes)[0] * (groups == groups[top])
        decay = torch.exp(-iou.square() / sigma) if method == "gaussian" else 1 - iou * (iou > iou_threshold)
        left = (left * decay.to(left.dtype)).index_fill(0, top, -torch.inf)
        left = left.where(left > prune, -torch.inf)
    if not places:
        return groups.new_zeros(0, dtype=torch.int64), left
    return torch.stack(places), torch.stack(values)


DenseMode = Literal["patch", "value"]


BOXES_TOGETHER = 256
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
        """Encode ``(B, 3, H, W)`` normalised images to ``(B, C, H / 16, W / 16)``; whole images are regions too."""
        _check_size(images, self.multiple)
        visual, x = self.visual, images
        for conv, norm in ((visual.conv1, visual.bn1), (visual.conv2, visual.bn2), (visual.conv3, visual.bn3)):
            x = relu(norm(conv(x)))
        return visual.layer3(visual.layer2(visual.layer1(avg_pool2d(x, 2)))), None

    def pool(self, features: Tensor, boxes: Sequence[Tensor]) -> Tensor:
        """Embed all boxes, ``(N, D)``, in the order of the images; see :func:`region_embeddings`."""
        bins = 2 * self.attnpool.grid
        return torch.cat(
            [
                self.attnpool(self.visual.layer4(roi_align(features, part, bins, 1 / self.stride, 0, aligned=True)))
                for part in _indexed(boxes, features).split(BOXES_TOGETHER)
            ]
        )


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
        """Encode normalised images to a map, and to what CLIP itself makes of them.

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
        """Embed all boxes, ``(N, D)``, in the order of the images; see :func:`region_embeddings`."""
        # The projection is linear, so the mean of projected patches is the projected mean, which costs less.
        return self.visual_projection(_means(features, boxes, self.stride))


class StemRegions(nn.Module):
    """A small CLIP ViT behind a convolutional stem, whose cells of 8 pixels are averaged over boxes and projected.

    The features are those that counters with ``stem="conv"`` read. A whole image is a box around everything.

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
        """Encode ``(B, 3, H, W)`` normalised images to ``(B, C, H / 8, W / 8)``."""
        _check_size(images, self.multiple)
        return self.vision(images), None

    def pool(self, features: Tensor, boxes: Sequence[Tensor]) -> Tensor:
        """Embed all boxes, ``(N, D)``, in the order of the images; see :func:`region_embeddings`."""
        return self.visual_projection(_means(features, boxes, self.stride))


def _means(features: Tensor, boxes: Sequence[Tensor], stride: int) -> Tensor:
    """Average the features over boxes: ``(N, C)``."""
    return roi_align(features, _indexed(boxes, features), 1, 1 / stride, 0, aligned=True).flatten(1)


RegionEncoder = ResNetRegions | ViTRegions | StemRegions


def region_encoder(
    clip: CLIPModel | CLIPResNetModel, *, stem: Stem = "patch", dense: DenseMode = "patch", freeze_at: int = 2
) -> RegionEncoder:
    """Build the encoder of regions for a CLIP, which gives its modules away.

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
    """Embed boxes, to be compared with texts by their cosine.

    What of a box lies outside its image counts as the nearest cell, or as zeros from one cell beyond the edge on; a
    box without area, or one that is inverted, has the embedding of an empty map. None of it is NaN.

    Args:
        encoder: a :class:`ResNetRegions`, :class:`ViTRegions` or :class:`StemRegions`.
        images: ``(B, 3, H, W)`` normalised; sides are multiples of ``encoder.multiple``. Pad behind the normalisation,
            on the right and at the bottom.
        boxes: B tensors ``(N_i, 4)`` of x1, y1, x2, y2 in pixels, some of them empty.

    Returns:
        ``(N, D)``, not normalised, in the order of images and boxes.

    Raises:
        InputError: sizes that are no multiple, one list of boxes too many or too few, coordinates that are not finite.
    """
    return encoder.pool(encoder(images)[0], boxes)


def region_and_image_embeddings(
    encoder: RegionEncoder, images: Tensor, boxes: Sequence[Tensor], sizes: Sequence[tuple[int, int]] | None = None
) -> tuple[Tensor, Tensor]:
    """Embed boxes and whole images, from one pass over the images.

    Args:
        encoder, images, boxes: as in :func:`region_embeddings`.
        sizes: height and width of each image without its padding. ``None`` takes the padding along, as the
            reference does. A class token has no extent, and sees the padding.

    Returns:
        ``(N, D)`` of the boxes, and ``(B, D)`` of the images: the class token's, or that of a box around everything.
    """
    features, whole = encoder(images)
    if whole is None:
        height, width = images.shape[-2:]
        extents = [(height, width)] * len(images) if sizes is None else sizes
        corners = [images.new_tensor([[0, 0, w, h]], dtype=torch.float32) for h, w in extents]
        whole = encoder.pool(features, corners)
    return encoder.pool(features, boxes), whole


def _check_size(images: Tensor, multiple: int) -> None:
    height, width = images.shape[-2:]
    if not torch.compiler.is_exporting() and (height % multiple or width % multiple):
        raise InputError(f"input of {height} x {width} pixels; expected multiples of {multiple}: pad it")


def _indexed(boxes: Sequence[Tensor], features: Tensor) -> Tensor:
    """Join ``(N, 5)`` rows of image index and corners."""
    if len(boxes) != len(features) or any(own.ndim != 2 or own.shape[1] != 4 for own in boxes):
        shapes = [tuple(own.shape) for own in boxes]
        raise InputError(f"boxes are {shapes} for {len(features)} images; expected one (N, 4) tensor for each")

    corners = torch.cat([own.to(features.device, torch.float32) for own in boxes])
    index = [i for i, own in enumerate(boxes) for _ in range(len(own))]
    return torch.cat([corners.new_tensor(index)[:, None], corners], 1)
