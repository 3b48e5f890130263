"""From one picture to its instances: peaks are traced back into it, and choose among proposals."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor
from torch.nn.functional import interpolate

from counting_zoo.errors import InputError
from counting_zoo.models.lower_count.instances import Instances, Retrieval, retrieve_instances, select_peaks
from counting_zoo.models.lower_count.network import LowerCountNet
from counting_zoo.models.lower_count.peak_response import peak_response_maps
from counting_zoo.models.lower_count.peaks import find_peaks, highest_peaks
from counting_zoo.models.lower_count.proposals import Proposals
from counting_zoo.models.lower_count.segments import segment_proposals


def proposed_masks(proposals: Tensor | Proposals | str | Path | None, stored: Tensor, image_id: str) -> Tensor:
    """``(N, H, W)`` bool proposals of a picture, from wherever :meth:`LowerCount.instances` takes them.

    Args:
        proposals: masks, a file or folder of them, or ``None`` for those found in the picture itself.
        stored: ``(3, H, W)`` uint8, the picture as it is stored.
        image_id: its path or name, under which a file has its proposals.

    Raises:
        InputError: the masks do not fit the picture.
    """
    size = (int(stored.shape[1]), int(stored.shape[2]))
    if proposals is None:
        return segment_proposals(stored)
    if not isinstance(proposals, Tensor):
        source = proposals if isinstance(proposals, Proposals) else Proposals(proposals)
        return source(Path(image_id).name, size)
    if proposals.ndim != 3 or tuple(proposals.shape[1:]) != size:
        raise InputError(
            f"proposals have shape {tuple(proposals.shape)} for the picture {image_id!r} of {size[0]} x {size[1]} "
            "pixels; expected (N, H, W) masks in the pixels of the picture as it is stored"
        )
    return proposals


def traced_instances(
    network: LowerCountNet,
    seen: Tensor,
    columns: list[int],
    masks: Tensor,
    *,
    retrieval: Retrieval,
    by_count: bool,
    together: int,
) -> Instances:
    """The masks that a network in evaluation finds for some of its classes.

    Args:
        network: on the device of the picture.
        seen: ``(3, h, w)`` uint8, the preprocessed picture.
        columns: K classes of the network.
        masks: ``(N, H, W)`` bool proposals in the pixels of the stored picture.
        retrieval: weights and limits.
        by_count: as many instances of a class as it is counted; otherwise every peak above the thresholds.
        together: peaks that are traced back at once.

    Returns:
        Masks whose labels index ``columns``.
    """
    # Masks are compared with maps cell by cell, so the frame must be a whole number of cells.
    cells = [max(1, round(side / network.stride)) for side in seen.shape[1:]]
    frame = (cells[0] * network.stride, cells[1] * network.stride)
    image = seen[None].float() / 255
    if tuple(seen.shape[1:]) != frame:
        image = interpolate(image, frame, mode="bilinear", antialias=True)
    x = network.normalised(image)
    with torch.no_grad():
        output = network(image).of(torch.tensor([columns], device=image.device))
    maps, raw = output.class_maps[0], output.raw_density[0]
    peaks = find_peaks(maps[None], radius=network.radius, above_median=network.above_median)[0]
    counts = None
    if by_count:
        counts = output.counts[0].round().clamp(min=0)
        limit = max(1, int(counts.max()))
        chosen = highest_peaks(maps[None], peaks[None], counts[None], limit=limit)[0].nonzero()
    else:
        chosen = select_peaks(
            maps, peaks, output.class_scores[0], class_threshold=retrieval.class_threshold,
            peak_threshold=retrieval.peak_threshold, fallback=retrieval.fallback,
        )  # fmt: skip
    responses = peak_response_maps(lambda x: network.class_maps(x)[:, columns], x, chosen, together=together)
    return retrieve_instances(masks.to(maps.device), chosen, responses, maps, raw, retrieval=retrieval, counts=counts)


__all__ = ["proposed_masks", "traced_instances"]
