"""One step of RegionCLIP's pretraining; its settings, data and checkpoints are in ``pretraining.py``."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from counting_zoo.errors import SupervisionError
from counting_zoo.models.region_clip.box_sources import ProposalSource, Size, random_boxes
from counting_zoo.models.region_clip.loss import Gather, pretraining_losses
from counting_zoo.models.region_clip.pretraining_batch import (
    drawn_captions,
    drawn_rows,
    filled_rows,
    named_labels,
    padded_pictures,
    parted_rows,
    sentence_numbers,
)
from counting_zoo.models.region_clip.pretraining_settings import Labels
from counting_zoo.models.region_clip.pseudo_labels import (
    Fallback,
    PseudoLabels,
    label_statistics,
    pseudo_labels,
    teacher_probabilities,
)
from counting_zoo.nn.clip_regions import RegionEncoder, region_and_picture_embeddings
from counting_zoo.nn.text import TextTower
from counting_zoo.text_guided import TextModule
from counting_zoo.types import Batch


@dataclass(frozen=True)
class PretrainingStep:
    """Weighted ``terms`` of a batch, ``statistics`` to watch, embeddings of ``pictures`` and of ``more`` boxes."""

    terms: dict[str, Tensor]
    statistics: dict[str, Tensor]
    pictures: Tensor
    more: Tensor


class RegionTextModule(TextModule):
    """How ``RegionCLIPPretraining``, which describes these attributes, learns from a batch."""

    encoder: RegionEncoder
    teacher: RegionEncoder | None
    text: TextTower
    weights: dict[str, float]
    regions: str
    n_regions: int
    labels: Labels
    threshold: float
    fallback: Fallback
    temperature: float
    gather: Gather
    picture_box: Literal["picture", "canvas"]
    caption_template: str
    same_caption: Literal["positive", "negative"]
    mean: Tensor
    std: Tensor
    _source: ProposalSource | None

    @abstractmethod
    def _embeddings(self, names: list[str]) -> Tensor:
        """``(C, D)`` of names."""

    def forward(self, image: Tensor | Sequence[Tensor], boxes: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """The student's embeddings of boxes ``(N, D)`` and of whole pictures ``(B, D)``, not normalised.

        Args:
            image: B pictures ``(3, H_i, W_i)`` in [0, 1] or uint8, of any sizes.
            boxes: B tensors ``(N_i, 4)`` of x1, y1, x2, y2 in pixels.
        """
        images, sizes = self._padded(image)
        return region_and_picture_embeddings(self.encoder, images, boxes, self._extents(sizes))

    def _padded(self, images: Tensor | Sequence[Tensor]) -> tuple[Tensor, list[Size]]:
        return padded_pictures(images, self.mean, self.std, self.encoder.multiple)

    def _extents(self, sizes: list[Size]) -> list[Size] | None:
        return sizes if self.picture_box == "picture" else None

    def _step(
        self,
        batch: Batch,
        pool: list[str],
        generators: Sequence[torch.Generator],
        more: Sequence[Tensor] | None = None,
    ) -> PretrainingStep:
        """One pass of the student over a batch: its losses, and embeddings of ``more`` boxes of each picture.

        What is drawn for a picture is drawn from its generator: boxes of all pictures first, then captions.
        """
        images, sizes = self._padded(batch["image"])
        boxes, names = self._boxes(batch, sizes, generators)
        if not (self.weights["region_text"] or self.weights["distillation"]):
            boxes, names = [own[:0] for own in boxes], []
        every = boxes if more is None else [torch.cat(both) for both in zip(boxes, more, strict=True)]
        found, pictures = region_and_picture_embeddings(self.encoder, images, every, self._extents(sizes))
        regions, others = (found, found[:0]) if more is None else parted_rows(found, boxes, more)
        concepts = self._embeddings(pool)
        if self.teacher is None:
            pseudo = named_labels(names, pool, self.device)
        else:
            pseudo = self._taught(self.teacher, images, boxes, concepts)
        statistics = label_statistics(pseudo, regions, concepts)
        captions = drawn_captions(batch, self.caption_template, generators)
        same = sentence_numbers(captions).to(self.device) if self.same_caption == "positive" else None
        with torch.enable_grad():  # or a TextTower runs captions one by one and remembers each of them
            texts = self.text(captions) if self.training else self.text(captions).detach()
        gather = self.gather if self.training else "none"
        if gather == "all" and self._distributed():
            regions, pseudo = filled_rows(regions, pseudo, len(images) * self.n_regions)
        losses = pretraining_losses(
            regions, pseudo.probabilities, pseudo.labels, pseudo.kept, concepts, pictures, texts,
            captions=same, temperature=self.temperature, gather=gather, all_gather=self._all_gather,
        )  # fmt: skip
        terms = {name: self.weights[name] * loss for name, loss in losses.items() if self.weights[name]}
        return PretrainingStep(terms, statistics, pictures, others)

    def _boxes(
        self, batch: Batch, sizes: list[Size], generators: Sequence[torch.Generator]
    ) -> tuple[list[Tensor], list[str]]:
        """At most ``n_regions`` boxes of each picture, and where they are the data's own the name of each."""
        if self.regions == "random":
            each = zip(sizes, generators, strict=True)
            return [random_boxes(size, self.n_regions, own).to(self.device) for size, own in each], []
        if self._source is not None:
            found = self._source(list(batch["image"]), batch["image_id"], sizes=batch.get("original_size"))
            boxes = [proposed.boxes for proposed in found]
        elif "boxes" in batch and "box_labels" in batch:
            boxes = list(batch["boxes"])
        else:
            raise SupervisionError(f"regions is 'boxes', and {batch['image_id'][0]} has none; choose data with boxes "
                                   "in every split, or regions: random")  # fmt: skip
        chosen = drawn_rows(boxes, self.n_regions, generators)
        names = []
        if self.labels == "boxes":
            for asked, labels, kept in zip(batch["classes"], batch["box_labels"], chosen, strict=True):
                names += [asked[i] for i in labels[kept].tolist()]
        return [own[kept].to(self.device) for own, kept in zip(boxes, chosen, strict=True)], names

    @torch.no_grad()
    def _taught(self, teacher: RegionEncoder, images: Tensor, boxes: list[Tensor], concepts: Tensor) -> PseudoLabels:
        """What the teacher says about boxes; without any it is not asked."""
        if not any(len(own) for own in boxes):
            return pseudo_labels(concepts.new_zeros(0, len(concepts)), self.threshold, fallback=self.fallback)
        features = teacher.pool(teacher(images)[0], boxes)
        probabilities = teacher_probabilities(features, concepts, self.temperature)
        return pseudo_labels(probabilities, self.threshold, fallback=self.fallback)

    def _all_gather(self, x: Tensor) -> Tensor:
        if not self._distributed():
            return x
        if x.dtype == torch.bool:
            return self._all_gather(x.to(torch.uint8)).bool()
        gathered = self.all_gather(x, sync_grads=x.requires_grad)
        assert isinstance(gathered, Tensor)
        return gathered.flatten(0, 1)


__all__ = ["PretrainingStep", "RegionTextModule"]
