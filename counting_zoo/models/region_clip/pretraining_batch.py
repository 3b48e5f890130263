"""What pretraining makes of a batch: padded pictures, drawn boxes and captions, labels out of names."""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from hashlib import blake2b

import torch
from torch import Tensor
from torch.nn.functional import one_hot, pad

from counting_zoo.errors import InputError, SupervisionError
from counting_zoo.models.region_clip.box_sources import Size
from counting_zoo.models.region_clip.concepts import spelling
from counting_zoo.models.region_clip.pseudo_labels import PseudoLabels
from counting_zoo.types import Batch

CAPTIONS = 5
"""Captions of a picture that one is drawn from at most, as in the reference."""


def picture_generators(image_ids: Sequence[str]) -> list[torch.Generator]:
    """A generator for each picture, seeded by its name: what it draws depends on no other picture, batch or process."""
    return [torch.Generator().manual_seed(zlib.crc32(image_id.encode())) for image_id in image_ids]


def padded_pictures(
    images: Tensor | Sequence[Tensor], mean: Tensor, std: Tensor, multiple: int
) -> tuple[Tensor, list[Size]]:
    """Normalised pictures with zeros on the right and at the bottom.

    Args:
        images: B pictures ``(3, H_i, W_i)`` in [0, 1] or uint8.
        mean, std: ``(3, 1, 1)``.
        multiple: of which the padded sides are one.

    Returns:
        ``(B, 3, H, W)``, and heights and widths without the padding.
    """
    sizes = [(int(i.shape[-2]), int(i.shape[-1])) for i in images]
    height, width = (-(-max(side) // multiple) * multiple for side in zip(*sizes, strict=True))
    found = [
        pad(((i if i.is_floating_point() else i.float() / 255) - mean) / std, (0, width - w, 0, height - h))
        for i, (h, w) in zip(images, sizes, strict=True)
    ]
    return torch.stack(found), sizes


def drawn_rows(boxes: Sequence[Tensor], n: int, generators: Sequence[torch.Generator]) -> list[Tensor]:
    """Which boxes of each picture are taken: at most ``n``, drawn at random, in random order.

    Args:
        boxes: B tensors ``(N_i, 4)``.
        n: of each picture.
        generators: B, which may be one and the same.

    Returns:
        B tensors of row numbers on the device of the boxes.
    """
    return [
        torch.randperm(len(own), generator=generator)[:n].to(own.device)
        for own, generator in zip(boxes, generators, strict=True)
    ]


def parted_rows(rows: Tensor, boxes: Sequence[Tensor], more: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Rows of boxes, and of more boxes that came behind those of the same picture.

    Args:
        rows: ``(N + M, D)``, of each picture first ``boxes``, then ``more``.
        boxes, more: B tensors each, N and M in all.

    Returns:
        ``(N, D)`` and ``(M, D)``.
    """
    parts = rows.split([len(own) for pair in zip(boxes, more, strict=True) for own in pair])
    return torch.cat(parts[::2]), torch.cat(parts[1::2])


def named_labels(names: Sequence[str], pool: Sequence[str], device: torch.device | str = "cpu") -> PseudoLabels:
    """Labels that are known: all are kept, with the probability 1.

    Args:
        names: of N regions.
        pool: C concepts; a name is the one that differs from it in spelling only.
        device: of the result.

    Raises:
        SupervisionError: a name that is no concept.
    """
    place = {spelling(name): i for i, name in enumerate(pool)}
    if unknown := [name for name in names if spelling(name) not in place]:
        raise SupervisionError(f"boxes are called {unknown[0]!r}, which is not among the {len(pool)} "
                               f"concepts, such as {list(pool[:5])}: the training data had other classes")  # fmt: skip
    labels = torch.tensor([place[spelling(name)] for name in names], dtype=torch.int64, device=device)
    return PseudoLabels(one_hot(labels, len(pool)).float(), labels, torch.ones_like(labels, dtype=torch.bool))


def drawn_captions(batch: Batch, template: str, generators: Sequence[torch.Generator]) -> list[str]:
    """One caption for each picture: one of its first :data:`CAPTIONS`, or the names in it.

    Args:
        batch: with ``captions``, ``present`` or ``classes``.
        template: the caption of a picture without captions; ``{}`` becomes the names that are in it.
        generators: B, which may be one and the same.

    Raises:
        InputError: a picture with neither caption nor name.
    """
    chosen = []
    for i, (image_id, generator) in enumerate(zip(batch["image_id"], generators, strict=True)):
        texts = batch["captions"][i][:CAPTIONS] if "captions" in batch else []
        if texts:
            chosen.append(texts[int(torch.randint(len(texts), (), generator=generator))])
        elif names := batch["present"][i] if "present" in batch else batch["classes"][i]:
            chosen.append(template.replace("{}", ", ".join(names)))
        else:
            raise InputError(f"{image_id} has neither a caption nor a name of anything in it; leave it out of the "
                             "training pictures, or give it a caption")  # fmt: skip
    return chosen


def sentence_numbers(sentences: Sequence[str]) -> Tensor:
    """``(B,)`` int64, equal for equal sentences: hashes, so that those of other processes have the same number."""
    return torch.tensor([int.from_bytes(blake2b(text.encode(), digest_size=7).digest()) for text in sentences])


def filled_rows(regions: Tensor, pseudo: PseudoLabels, rows: int) -> tuple[Tensor, PseudoLabels]:
    """Regions and their labels with rows behind them that are not kept, so that every process has as many.

    Args:
        regions: ``(N, D)``.
        pseudo: their labels.
        rows: at least N.
    """

    def fill(x: Tensor) -> Tensor:
        return torch.cat([x, x.new_zeros(rows - len(x), *x.shape[1:])])

    return fill(regions), PseudoLabels(*(fill(x) for x in (pseudo.probabilities, pseudo.labels, pseudo.kept)))


__all__ = [
    "CAPTIONS", "drawn_captions", "drawn_rows", "filled_rows", "named_labels", "padded_pictures", "parted_rows",
    "picture_generators", "sentence_numbers",
]  # fmt: skip
