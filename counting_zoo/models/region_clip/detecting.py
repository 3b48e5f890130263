"""Detecting in pictures with a region encoder and texts; how it is trained is in ``module.py``."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from counting_zoo.errors import InputError
from counting_zoo.models.region_clip.box_sources import ProposalSource, Proposed
from counting_zoo.models.region_clip.calibration import CalibratedModule
from counting_zoo.models.region_clip.classified import ClassifiedRegions, boxes_inside
from counting_zoo.models.region_clip.concepts import Ensemble, concepts_from_classes, embed_concepts, trained_concepts
from counting_zoo.models.region_clip.detections import (
    Assign,
    Fusion,
    Score,
    Suppression,
    detect,
    fuse,
    text_probabilities,
)
from counting_zoo.models.region_clip.network import CELL, GRID, RegionCLIPNet, RegionOutput, detected, joined
from counting_zoo.models.region_clip.prompts import TemplateSet, Wording, region_prompts
from counting_zoo.models.region_clip.proposals import proposal_source, tiled
from counting_zoo.nn.text import TextTower
from counting_zoo.nn.tokenizer import TokenizerLike
from counting_zoo.pictures import as_picture
from counting_zoo.text_guided import TextGuidedModule
from counting_zoo.types import CountOutput, Prediction


class RegionDetector(CalibratedModule, TextGuidedModule):
    """How ``RegionCLIPCounter``, which describes these attributes, detects."""

    network: RegionCLIPNet
    train_vision: bool
    train_text: bool
    templates: TemplateSet | list[str]
    wording: Wording
    ensemble: Ensemble
    peak_floor: float
    tile_depth: int
    score: Score
    temperature: float
    negatives: list[str]
    fusion: Fusion
    iou_threshold: float
    suppression: Suppression
    assign: Assign
    proposals: str
    missing_proposals: Literal["error", "empty"]
    _source: ProposalSource | None
    #: Embeddings of names, while texts do not train.
    embedded: dict[str, Tensor]

    @property
    def source(self) -> ProposalSource:
        """What proposes boxes."""
        if self._source is None:
            self._source = proposal_source(self.proposals, missing=self.missing_proposals)
        return self._source

    @source.setter
    def source(self, value: ProposalSource) -> None:
        self._source = value

    def setup(self, stage: str) -> None:
        super().setup(stage)
        assert self.source is not None  # what is wrong with it is said before the first picture

    def set_tokenizer(self, source: TokenizerLike) -> None:
        super().set_tokenizer(source)
        self.embedded = {}

    def train(self, mode: bool = True) -> RegionDetector:
        if self.train_text and mode != self.training:
            self.embedded = {}
        super().train(mode)
        for part, trains in ((self.network.encoder, self.train_vision), (self.network.text, self.train_text)):
            if not trains:
                part.eval()
        return self

    def _apply(self, *args: Any, **kwargs: Any) -> RegionDetector:
        self.embedded = {}
        return super()._apply(*args, **kwargs)

    def load_state_dict(self, *args: Any, **kwargs: Any) -> Any:
        self.embedded = {}
        return super().load_state_dict(*args, **kwargs)

    def embed_names(self, names: Sequence[str]) -> Tensor:
        """``(K, D)`` embeddings of names through the templates, of any length; remembered while texts do not train."""
        if any(not name.strip() for name in names):
            raise InputError(f"an empty name in {list(names)[:5]}; name what is to be counted")
        options: Any = {"wording": self.wording, "ensemble": self.ensemble}
        if self.training and self.train_text:
            return trained_concepts(self.network.text, names, self.templates, **options)
        # Name by name: two of them may have the same prompts, which a pool must not.
        for name in [name for name in dict.fromkeys(names) if name not in self.embedded]:
            # What is kept must not depend on the precision of the run that happened to be first.
            with torch.autocast(self.device.type, enabled=False):
                found = embed_concepts(self.network.text, [name], self.templates, **options)
            self.embedded[name] = found[0].clone()
        return torch.stack([self.embedded[name] for name in names])

    def prompts_of(self, name: str) -> list[str]:
        return region_prompts(name, self.templates, self.wording)

    @property
    def text_tower(self) -> TextTower:
        return self.network.text

    @property
    def cell(self) -> int:
        return GRID

    def forward(self, image: Tensor, classes: list[list[str]]) -> RegionOutput:
        """Detections in evaluation; in training the maps that they are made of, and no detection."""
        if not self.training:
            return joined([self._detect(one, names) for one, names in zip(image, classes, strict=True)])
        x = self.network.normalised(image)
        features = self.network.encoder(x)[0]
        heat, log_sizes = (None, None) if self.network.head is None else self.network.head(features, x)
        grid = (-(-image.shape[-2] // GRID), -(-image.shape[-1] // GRID))
        density = image.new_zeros(len(image), len(classes[0]), *grid)
        return RegionOutput(density, heat=heat, log_sizes=log_sizes, features=features)

    def count_batch(
        self,
        images: Tensor | Sequence[Tensor],
        classes: list[list[str]],
        window: int | None = None,
        stride: int | None = None,
        *,
        image_ids: Sequence[str] | None = None,
        sizes: Sequence[tuple[int, int]] | None = None,
    ) -> CountOutput | list[CountOutput]:
        """Detect in whole pictures; see :meth:`~counting_zoo.counter.Counter.count_batch`.

        Raises:
            InputError: a window or stride is given; saturated pictures are cut into tiles by themselves.
        """
        if window or stride:
            raise InputError(f"window {window} and stride {stride} for a detector, which sees whole pictures and cuts "
                             "them itself where proposals are at their limit (model.tile_depth)")  # fmt: skip
        ids = [""] * len(images) if image_ids is None else image_ids
        stored = [None] * len(images) if sizes is None else sizes
        found = [
            self._detect(image.to(self.device), names, image_id, size)
            for image, names, image_id, size in zip(images, classes, ids, stored, strict=True)
        ]
        return joined(found) if isinstance(images, Tensor) else list(found)

    @torch.no_grad()
    def _detect(
        self, image: Tensor, names: list[str], image_id: str = "", stored: tuple[int, int] | None = None
    ) -> RegionOutput:
        """What one picture ``(3, H, W)`` shows of some names."""
        size = (int(image.shape[-2]), int(image.shape[-1]))
        x = self.network.normalised(image[None])
        features = self.network.encoder(x)[0]
        if self.network.head is not None:
            found = self.network.proposed(features, x, [size], self.peak_floor)[0]
        else:
            found = self.source([image], [image_id], None if stored is None else [stored])[0]
        if found.saturated and self.tile_depth:
            step = 0 if self.network.head is None else CELL
            found = tiled(self.source, [image], [image_id], first=[found], depth=self.tile_depth, step=step)[0]
        probabilities = self._probabilities(features, found.boxes.to(image.device), names)
        scores = fuse(probabilities, found.scores.to(image.device), self.fusion)
        kept = detect(
            found.boxes.to(image.device), scores, size=size, threshold=self.floor, iou_threshold=self.iou_threshold,
            suppression=self.suppression, assign=self.assign,
        )  # fmt: skip
        return detected(kept.boxes, kept.scores, kept.labels, size, len(names), found.saturated)

    def peaks(
        self, images: Sequence[Tensor], image_ids: Sequence[str], sizes: Sequence[tuple[int, int]] | None = None
    ) -> list[Proposed]:
        """Peaks of pictures of any size; those of one size together."""
        by_size: dict[tuple[int, int], list[int]] = {}
        for i, image in enumerate(images):
            by_size.setdefault((int(image.shape[-2]), int(image.shape[-1])), []).append(i)
        found: dict[int, Proposed] = {}
        for size, places in by_size.items():
            x = self.network.normalised(torch.stack([images[i] for i in places]))
            proposed = self.network.proposed(self.network.encoder(x)[0], x, [size] * len(places), self.peak_floor)
            found |= dict(zip(places, proposed, strict=True))
        return [found[i] for i in range(len(images))]

    def _probabilities(self, features: Tensor, boxes: Tensor, names: list[str]) -> Tensor:
        """``(N, K)`` of the boxes of one picture."""
        if not len(boxes):
            return features.new_zeros(0, len(names), dtype=torch.float32)
        regions = self.network.encoder.pool(features, [boxes])
        texts = self.embed_names(names)
        if self.score == "sigmoid":
            scale, bias = self.network.log_scale.exp(), self.network.bias
            return text_probabilities(regions, texts, score="sigmoid", scale=scale, bias=bias)
        negatives = None
        if self.score == "softmax":
            others = concepts_from_classes(names, self.negatives)[len(concepts_from_classes(names, ())) :]
            negatives = self.embed_names(others) if others else None
        return text_probabilities(regions, texts, score=self.score, temperature=self.temperature, negatives=negatives)

    def classify_regions(self, picture: Any, boxes: Any, prompts: str | Sequence[str]) -> ClassifiedRegions:
        """What given boxes of a picture show, by the whole picture's features (not by crops).

        Args:
            picture: a path, PIL image, ``(H, W[, C])`` array or ``(3, H, W)`` tensor.
            boxes: ``(N, 4)`` x1, y1, x2, y2 in its pixels; what is outside the picture is clipped.
            prompts: K names.

        Returns:
            Probabilities of ``(N, K)``, as ``score`` makes them.

        Raises:
            InputError: a box without area in the picture, coordinates that are not finite, or no name.
        """
        image, _ = as_picture(picture)
        size, names = (image.shape[1], image.shape[2]), [prompts] if isinstance(prompts, str) else list(prompts)
        if not names or len(set(names)) != len(names):
            raise InputError(f"prompts are {names}; expected names, each once")
        seen = self.preprocess(image)
        inside = boxes_inside(boxes, size, (seen.shape[1], seen.shape[2])).to(self.device)
        training = self.training
        self.eval()
        try:
            with torch.no_grad():
                features = self.network.encoder(self.network.normalised(seen[None].to(self.device)))[0]
                found = self._probabilities(features, inside, names)
        finally:
            self.train(training)
        return ClassifiedRegions(names, found.cpu())

    def to_prediction(
        self, output: CountOutput, names: list[str], size: tuple[int, int], image_id: str, seen: Tensor
    ) -> Prediction:
        assert isinstance(output, RegionOutput), f"a prediction of a {type(output).__name__}"
        prediction = super().to_prediction(output, names, size, image_id, seen)
        ratio = torch.tensor([size[1] / seen.shape[2], size[0] / seen.shape[1]]).repeat(2)
        boxes, labels = output.boxes[0].float().cpu() * ratio, output.labels[0].cpu()
        prediction.boxes = [boxes[labels == k] for k in range(len(names))]
        prediction.scores = [output.scores[0].float().cpu()[labels == k] for k in range(len(names))]
        prediction.points = [(own[:, :2] + own[:, 2:]) / 2 for own in prediction.boxes]
        return prediction


__all__ = ["RegionDetector"]
