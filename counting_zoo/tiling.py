"""Counting images of any size with a model of one size: tiles of all images go through the model together.

Every way of joining overlapping windows is a weighted sum whose weights add up to one at every cell, so a model that
is right in each window gives the right total for every image, window, stride and overlap.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import groupby
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

from counting_zoo.errors import InputError
from counting_zoo.types import CountOutput, Query

if TYPE_CHECKING:
    from counting_zoo.module import CountingModule

Blend = Literal["average", "official"]


Pad = Literal["minimal", "official"]


Forward = Callable[[Tensor, list[Query]], CountOutput]


@dataclass(frozen=True)
class Tiling:
    """Windows that images are cut into, and the way in which their densities are joined.

    Args:
        window: height and width of a window in pixels.
        stride: step between windows in pixels, along height and width.
        cell: side of a density cell in pixels; divides window and stride.
        blend: ``average`` gives all windows at a cell the same weight; ``official`` fades from each window to the
            next with a sigmoid, as the reference of CLIP-Count does.
        pad: ``minimal`` aligns the last window to the image's end and pads only what is smaller than a window (or no
            multiple of ``cell``); ``official`` pads the width with zeros by ``stride - W % stride`` (a whole stride
            where it divides), as the reference of CLIP-Count does. Its height is one window, so height stays minimal.

    Raises:
        InputError: sizes that do not fit each other.
    """

    window: tuple[int, int]
    stride: tuple[int, int]
    cell: int = 1
    blend: Blend = "average"
    pad: Pad = "minimal"

    def __post_init__(self) -> None:
        for side, window, stride in zip(("height", "width"), self.window, self.stride, strict=True):
            if self.cell < 1:
                raise InputError(f"cell is {self.cell}; expected at least 1 pixel")
            for name, value in (("window", window), ("stride", stride)):
                if value < self.cell or value % self.cell:
                    nearest = max(1, round(value / self.cell)) * self.cell
                    raise InputError(
                        f"{name} is {value} pixels ({side}); expected multiples of the density cell of {self.cell} "
                        f"pixels: set model.{name} (or {name}= of count) to {nearest}"
                    )
            if stride > window:
                raise InputError(
                    f"stride is {stride} pixels ({side}) for a window of {window}; expected at most {window}, so that "
                    "windows leave no gap: lower model.stride or raise model.window"
                )
        if self.blend not in ("average", "official") or self.pad not in ("minimal", "official"):
            raise InputError(
                f"blend={self.blend!r}, pad={self.pad!r}; each is one of 'average' ('minimal' for pad), 'official'"
            )

    @classmethod
    def of(
        cls,
        window: int | tuple[int, int],
        stride: int | tuple[int, int] | None = None,
        cell: int = 1,
        blend: Blend = "average",
        pad: Pad = "minimal",
    ) -> Tiling:
        """Build a tiling from numbers: an integer means a square, no stride means windows side by side."""
        window = (window, window) if isinstance(window, int) else (window[0], window[1])
        if stride is None:
            stride = window
        return cls(window, (stride, stride) if isinstance(stride, int) else (stride[0], stride[1]), cell, blend, pad)

    def starts(self, height: int, width: int) -> tuple[list[int], list[int]]:
        """Compute the starts of windows in a ``height x width`` image, along height and along width, in pixels."""
        return (
            window_starts(height, self.window[0], self.stride[0], self.cell, "minimal"),
            window_starts(width, self.window[1], self.stride[1], self.cell, self.pad),
        )


def window_starts(length: int, window: int, stride: int, cell: int = 1, pad: Pad = "minimal") -> list[int]:
    """Compute the first pixels of the windows that cover ``length`` pixels.

    Args:
        length, window, stride, cell: pixels.
        pad: see :class:`Tiling`.

    Returns:
        ascending starts, multiples of ``cell``; the last window ends at or after ``length``.

    Example:
        >>> window_starts(300, 224, 112, 8), window_starts(384, 384, 128, 1, "official")
        ([0, 80], [0, 128])
    """
    if pad == "official":
        padded = length + stride - length % stride
        last = max(0, padded - window) // stride * stride
        while last + window < length:  # only where the stride does not divide the window
            last += stride
        return list(range(0, last + 1, stride))
    last = max(0, -(-length // cell) * cell - window)
    return [*range(0, last, stride), last]


def blend_weights(starts: Sequence[int], window: int, blend: Blend = "average") -> Tensor:
    """Compute the weight of each window at each place of its axis.

    The reference composites from left to right, ``(1 - r) * before + r * window`` over each overlap with
    ``r = sigmoid(linspace(-3, 3, overlap))``; what is left of a window after all that follow it is its weight.

    Args:
        starts: first places of the windows, ascending.
        window: length of a window.
        blend: see :class:`Tiling`.

    Returns:
        ``(len(starts), starts[-1] + window)`` float64; every column sums to one.

    Example:
        >>> blend_weights([0, 2], 3)
        tensor([[1.0000, 1.0000, 0.5000, 0.0000, 0.0000],
                [0.0000, 0.0000, 0.5000, 1.0000, 1.0000]], dtype=torch.float64)
    """
    start = torch.tensor(starts)[:, None]
    place = torch.arange(starts[-1] + window, dtype=torch.float64)
    inside = ((place >= start) & (place < start + window)).double()
    if blend == "average":
        return inside / inside.sum(0)
    # Share of window i in the composite of windows 0..i: 0 before it, a ramp over the overlap, 1 after it.
    overlap = torch.cat([start[:1], start[:-1] + window - start[1:]])
    ramp = torch.sigmoid(-3 + 6 * (place - start) / (overlap - 1).clamp(min=1))
    share = torch.where(place < start, 0.0, torch.where(place - start < overlap, ramp, 1.0))
    share[0] = 1.0
    kept = torch.cat([(1 - share[1:]).flip(0).cumprod(0).flip(0), torch.ones(1, len(place), dtype=torch.float64)])
    return inside * share * kept


def count_images(
    model: CountingModule,
    images: Sequence[Tensor],
    queries: Sequence[Query],
    window: int | None = None,
    stride: int | None = None,
) -> list[CountOutput]:
    """Count in whole images, in tiles where the model's recipe or the arguments say so.

    Args:
        model: asked in the mode that it is in; its recipe gives window, stride, cell, blend and padding.
        images: B images ``(3, H_i, W_i)`` of any size, uint8 or float in [0, 1].
        queries: B queries; example boxes are in pixels of their image.
        window: overrides the recipe's window; 0 for none.
        stride: overrides the recipe's stride.

    Returns:
        One output of batch 1 for each image.

    Raises:
        InputError: a stride without a window, a tiling that does not fit, or examples that the model cannot encode
            before tiles are cut.
    """
    images = [image.to(model.device) for image in images]
    queries = [query.to(model.device) for query in queries]
    if model.class_blind:
        queries = [replace(query, names=(" + ".join(query.names),)) for query in queries]
    side = (model.window or 0) if window is None else window
    step = (model.stride if window is None else None) if stride is None else stride
    if stride is not None and not side:
        raise InputError(f"stride={stride} without a window; give a window too, or no stride to count in one piece")
    if side:
        return count_tiled(
            model,
            images,
            [_encoded(model, image, query) for image, query in zip(images, queries, strict=True)],
            window=side,
            stride=step or side,
            cell=model.cell,
            window_batch_size=model.window_batch_size,
            blend=model.blend,
            pad=model.pad,
        )
    if len({image.shape for image in images}) == len({len(query.names) for query in queries}) == 1:
        return list(model(torch.stack([as_float(image) for image in images]), queries).split())
    return [model(as_float(image)[None], [query]) for image, query in zip(images, queries, strict=True)]


def _encoded(model: CountingModule, image: Tensor, query: Query) -> Query:
    """Replace example boxes by their features, since a tile does not show what lies in another one."""
    if query.exemplars is None or query.exemplar_features is not None or not model.uses("exemplars"):
        return replace(query, exemplars=None) if query.exemplars is not None else query
    return replace(query, exemplars=None, exemplar_features=model.encode_exemplars(image, query.exemplars))


def as_float(image: Tensor) -> Tensor:
    """Turn an image into contiguous float in [0, 1]."""
    image = image.contiguous()  # images from files have their colours beside each other
    return image if torch.is_floating_point(image) else image.float() / 255


def count_tiled(
    forward: Forward,
    images: Sequence[Tensor],
    queries: Sequence[Query],
    *,
    window: int | tuple[int, int],
    stride: int | tuple[int, int] | None = None,
    cell: int = 1,
    window_batch_size: int = 16,
    blend: Blend = "average",
    pad: Pad = "minimal",
) -> list[CountOutput]:
    """Count in windows of images of any sizes and join their densities.

    Windows of all images form one queue, cut into batches of at most ``window_batch_size`` and gathered batch by
    batch, so that memory does not grow with the number of windows. Images are neither copied nor padded as a whole.
    Where windows overlap, variances are averaged as densities are, which is never below the variance of the averaged
    density, however the windows depend on each other.

    Args:
        forward: takes ``(n, 3, *window)`` float and n queries of K names, gives a density of ``window / cell``.
        images: B images ``(3, H_i, W_i)``, float in [0, 1], or uint8, which becomes float in [0, 1] by window.
        queries: B queries; those with different numbers of names go through in separate batches.
        window, stride, cell, blend, pad: see :class:`Tiling`; an integer means a square, ``stride=None`` no overlap.
        window_batch_size: most windows in one call of ``forward``.

    Returns:
        B outputs of batch 1, ``(1, K_i, ceil(H_i / cell), ceil(W_i / cell))`` float32 on the images' device. Nothing
        that the model sees in the padding beyond the last cell is counted.

    Raises:
        InputError: a tiling that does not fit, or a model whose density is not ``window / cell`` in size.
    """
    tiling = Tiling.of(window, stride, cell, blend, pad)
    if len(images) != len(queries):
        raise InputError(f"{len(images)} images came with {len(queries)} queries; expected one for each")
    if window_batch_size < 1:
        raise InputError(f"window_batch_size is {window_batch_size}; expected at least 1")
    tiled = [_TiledImage(image, query, tiling) for image, query in zip(images, queries, strict=True)]
    for _, alike in groupby(sorted(tiled, key=lambda t: len(t.query.names)), key=lambda t: len(t.query.names)):
        queue = list(alike)
        first = 0  # windows of queue[0] that are done
        while queue:
            batch: list[tuple[_TiledImage, slice]] = []
            room = window_batch_size
            while queue and room:
                part = slice(first, min(first + room, queue[0].n_windows))
                batch.append((queue[0], part))
                room -= part.stop - part.start
                first = part.stop
                if first == queue[0].n_windows:
                    queue.pop(0)
                    first = 0
            _run(forward, batch, tiling)
    return [image.result() for image in tiled]


def _run(forward: Forward, batch: list[tuple[_TiledImage, slice]], tiling: Tiling) -> None:
    """Run the model once over windows of one or more images."""
    queries = [image.query for image, part in batch for _ in range(part.stop - part.start)]
    output = forward(torch.cat([image.windows(part) for image, part in batch]), queries)
    density, k = output.density.float(), len(queries[0].names)
    expected = (len(queries), k, tiling.window[0] // tiling.cell, tiling.window[1] // tiling.cell)
    if density.shape != expected:
        raise InputError(
            f"the model gave a density of shape {tuple(density.shape)} for {len(queries)} windows of {tiling.window} "
            f"pixels and {k} names; expected {expected} with a cell of {tiling.cell} pixels"
        )
    if output.variance is not None:  # joined with the same weights, as K more maps
        density = torch.cat([density, output.variance.float()], 1)
    for (image, part), piece in zip(batch, density.split([p.stop - p.start for _, p in batch]), strict=True):
        image.add(part, piece)


class _TiledImage:
    """One image on its way through :func:`count_tiled`: its windows and the canvas they are joined on."""

    def __init__(self, image: Tensor, query: Query, tiling: Tiling) -> None:
        self.query, self.tiling = query, tiling
        self.image = image
        self.height, self.width = image.shape[-2:]
        if not image.numel():
            raise InputError(f"an image of shape {tuple(image.shape)} has no pixels")
        self.starts = rows, columns = tiling.starts(self.height, self.width)
        self.n_windows = len(rows) * len(columns)
        self.canvas: Tensor | None = None

    def windows(self, part: slice) -> Tensor:
        """Cut the windows ``part``, row by row, with zeros beyond the image: ``(n, 3, *window)`` float."""
        (rows, columns), (height, width) = self.starts, self.tiling.window
        windows = torch.zeros(part.stop - part.start, len(self.image), height, width, device=self.image.device)
        # One copy of a slice for each window is several times faster than one gather by index for all.
        for window, index in zip(windows, range(part.start, part.stop), strict=True):
            y, x = rows[index // len(columns)], columns[index % len(columns)]
            piece = self.image[:, y : y + height, x : x + width]
            window[:, : piece.shape[1], : piece.shape[2]] = piece
        return windows.div_(255) if self.image.dtype == torch.uint8 else windows

    def add(self, part: slice, density: Tensor) -> None:
        """Join ``(n, K, h, w)`` maps of the windows ``part``."""
        (rows, columns), (height, width), cell = self.starts, self.tiling.window, self.tiling.cell
        if self.canvas is None:
            size = ((rows[-1] + height) // cell, (columns[-1] + width) // cell)
            self.canvas = density.new_zeros(*size, density.shape[1])
        index = torch.arange(part.start, part.stop, device=density.device)
        y, x = self._cells(index)
        weight_y = _weights(tuple(rows), height, cell, self.tiling.blend).to(density)[index // len(columns)]
        weight_x = _weights(tuple(columns), width, cell, self.tiling.blend).to(density)[index % len(columns)]
        density = density * weight_y[:, None, :, None] * weight_x[:, None, None, :]
        self.canvas.index_put_((y[:, :, None], x[:, None, :]), density.permute(0, 2, 3, 1), accumulate=True)

    def result(self) -> CountOutput:
        """Return density, and variance where there is one, without the cells that lie in the padding."""
        assert self.canvas is not None  # every image has a window
        height, width = -(-self.height // self.tiling.cell), -(-self.width // self.tiling.cell)
        maps = self.canvas[:height, :width].permute(2, 0, 1).contiguous()[None]  # (1, K or 2K, h, w)
        density, *variance = maps.split(len(self.query.names), 1)
        return CountOutput(density, variance=variance[0] if variance else None)

    def _cells(self, index: Tensor) -> tuple[Tensor, Tensor]:
        """Index the cells of n windows: rows ``(n, h)`` and columns ``(n, w)``."""
        cell, device = self.tiling.cell, index.device
        rows, columns = (torch.tensor(start, device=device) // cell for start in self.starts)
        height, width = (torch.arange(side // cell, device=device) for side in self.tiling.window)
        return (
            rows[index // len(columns), None] + height,
            columns[index % len(columns), None] + width,
        )


@lru_cache(maxsize=256)
def _weights(starts: tuple[int, ...], window: int, cell: int, blend: Blend) -> Tensor:
    """Take the part of :func:`blend_weights` that lies in each window: ``(n_windows, window / cell)`` float64."""
    cells = torch.tensor(starts) // cell
    table = blend_weights(cells.tolist(), window // cell, blend)
    return table.gather(1, cells[:, None] + torch.arange(window // cell))
