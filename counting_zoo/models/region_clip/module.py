"""Counting by open-vocabulary detection as a Lightning module: losses, a calibrated threshold, and its recipe."""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from counting_zoo.class_lists import COCO_CLASSES
from counting_zoo.errors import InputError
from counting_zoo.geometry import boxes_inside
from counting_zoo.images import as_image
from counting_zoo.metrics.counts import ImageRows
from counting_zoo.models.region_clip.concepts import (
    concepts_from_classes,
    embed_concepts,
    region_prompts,
    trained_concepts,
)
from counting_zoo.models.region_clip.loss import (
    focal_heat_loss,
    heat_target,
    object_sides,
    region_examples,
    region_score_loss,
    size_loss,
    text_logits,
)
from counting_zoo.models.region_clip.network import (
    CELL,
    GRID,
    UNIT,
    RegionCLIPConfig,
    RegionCLIPNet,
    RegionOutput,
    above,
    best_threshold,
    counts_at,
    detect,
    detected,
    fuse,
    joined,
    text_probabilities,
)
from counting_zoo.models.region_clip.proposals import ProposalSource, Proposed, proposal_source, tiled
from counting_zoo.module import CountingModule
from counting_zoo.nn.clip import CLIPSource, build_towers, tokenizer_of, towers_config
from counting_zoo.nn.pretrained import load_text, load_vision, read_pretrained
from counting_zoo.nn.regions import region_encoder
from counting_zoo.nn.text import TextTower, TokenizerLike
from counting_zoo.prediction import Prediction
from counting_zoo.types import Batch, CountOutput, Query


@dataclass(frozen=True)
class ClassifiedRegions:
    """Probabilities of the names for each of N boxes.

    Attributes:
        names: the K names that were asked about.
        probabilities: ``(N, K)`` float32.
    """

    names: list[str]
    probabilities: Tensor

    @property
    def labels(self) -> list[str]:
        """The most probable name of each box."""
        return [self.names[i] for i in self.probabilities.argmax(1).tolist()]


THRESHOLDS = torch.arange(1, 100) / 100
"""What is chosen from."""


class ThresholdErrors(ImageRows):
    """Absolute errors of every image at every threshold."""

    def __init__(self, **options: Any) -> None:
        super().__init__(("error",), **options)

    def update(self, image_id: str, counts: Tensor, target: Tensor) -> None:
        """Add ``(T, K)`` counts of one image and its ``(K,)`` true ones."""
        self.append([image_id], error=(counts - target).abs().sum(1)[None])

    def compute(self) -> float | None:
        """Find the threshold of the least mean error; ``None`` without an image."""
        errors = self.rows()["error"].reshape(-1, len(THRESHOLDS), 1)
        return best_threshold(errors, errors.new_zeros(len(errors), 1), THRESHOLDS.to(errors)) if len(errors) else None


class RegionCLIPCounter(CountingModule):
    """Counts what it detects: proposals, their embeddings, texts, suppression (after Zhong et al., arXiv 2112.09106).

    Each object counted has a box, and a name that is not in the image has none. The heads that propose and score are
    the zoo's own: RegionCLIP's detector caps its boxes at 100 or 300 and takes every region for a single name's object.

    Args:
        clip: CLIP weights: hub name, folder, file, or a config mapping for random weights; a vision transformer or a
            ResNet.
        pretrained_encoder: a file that ``RegionCLIPPretraining.export`` wrote, or ``small`` for the zoo's own small
            CLIP, in place of ``clip``'s weights.
        tokenizer: folder or hub name; where ``clip`` has one if ``None``. A random-weight CLIP makes its own from the
            class names of its training data.
        network: options of proposals, texts and scores.
        threshold: score above which a box counts, until it is calibrated; 0.5 if ``None``. Given to a checkpoint that
            was made without it, it takes the place of the calibrated one.
        calibrate: choose the threshold of the least validation error in each validation.
        boxes: what training learns sizes from: ``all`` boxes where the data has them, or only its ``examples``.
        heat_weight, size_weight, text_weight: of the three losses; 0 gives a term no gradient.
        n_regions: objects of an image, and as many boxes beside them, whose texts are trained in a step, at most.
        options: those of :class:`~counting_zoo.module.CountingModule`, without windows.
    """

    config_class: ClassVar[type | None] = RegionCLIPConfig
    trains_on: ClassVar[tuple[frozenset[str], ...]] = (frozenset({"points", "labels"}),)
    asks_for: ClassVar[frozenset[str]] = frozenset({"names"})
    accepts: ClassVar[frozenset[str]] = frozenset({"negatives"})
    text_guided: ClassVar[bool] = True
    threshold: Tensor

    def __init__(
        self,
        clip: CLIPSource = "openai/clip-vit-base-patch16",
        *,
        pretrained_encoder: str | None = None,
        tokenizer: str | None = None,
        network: RegionCLIPConfig | None = None,
        threshold: float | None = None,
        calibrate: bool = True,
        boxes: Literal["all", "examples"] = "all",
        heat_weight: float = 1.0,
        size_weight: float = 0.1,
        text_weight: float = 1.0,
        n_regions: int = 64,
        **options: Any,
    ) -> None:
        super().__init__(**options)
        if self.window is not None:
            raise InputError(
                f"window is {self.window}; a detector sees whole images, and cuts them itself where "
                "its proposals are at their limit (tile_depth)"
            )
        first = 0.5 if threshold is None else threshold
        if not 0 <= first <= 1:
            raise InputError(f"threshold is {threshold}; expected 0 to 1")
        if n_regions < 1:
            raise InputError(f"n_regions is {n_regions}; expected at least 1")
        if boxes not in ("all", "examples"):
            raise InputError(f"boxes is {boxes!r}; expected 'all' or 'examples'")
        self.config = config = self.network_config(network)
        weights = {"heat": heat_weight, "size": size_weight, "text": text_weight}
        if not all(0 <= weight < math.inf for weight in weights.values()) or not text_weight + heat_weight:
            raise InputError(
                f"weights of the losses are {weights}; expected finite numbers of at least 0, and that of "
                "texts or heat above it"
            )
        towers = build_towers(clip)
        # The checkpoint rebuilds the shapes from this and takes the weights from its own state.
        self.hparams.update(clip=towers_config(towers), tokenizer=None, pretrained_encoder=None)
        text = TextTower(towers, n_context=0, pool=config.text_pool, train=config.train_text)
        encoder = region_encoder(towers, stem=config.stem, dense=config.dense, freeze_at=config.freeze_at)
        if not config.train_vision:
            encoder.requires_grad_(False)
        self.network = RegionCLIPNet(encoder, text, config)
        given = tokenizer if tokenizer is not None or pretrained_encoder else tokenizer_of(clip)
        if given is not None:
            self.set_tokenizer(given)
        if pretrained_encoder is not None:
            source = read_pretrained(pretrained_encoder)
            load_vision(encoder, source)
            load_text(text, source, tokenizer_of(clip))
        self.negatives = list(COCO_CLASSES) if config.negatives is None else config.negatives
        self.weights = weights
        self.boxes, self.n_regions = boxes, n_regions
        self.embedded: dict[str, Tensor] = {}  # of names, while texts do not train
        self.calibrate = calibrate
        self.register_buffer("threshold", torch.tensor(float(first)))
        self.threshold_errors = ThresholdErrors()
        self._calibrated: float | None = None
        self._calibrating = False
        self._waiting: list[tuple[Any, ...]] | None = None
        # Another source is made when it is needed: a checkpoint is loaded where its file of boxes is not.
        self._source: ProposalSource | None = self.peaks if config.proposals == "peaks" else None
        self.train(self.training)

    # -- detection -----------------------------------------------------------------------------------------------------

    @property
    def source(self) -> ProposalSource:
        """The source of proposals."""
        if self._source is None:
            self._source = proposal_source(self.config.proposals, missing=self.config.missing_proposals)
        return self._source

    @source.setter
    def source(self, value: ProposalSource) -> None:
        self._source = value

    def setup(self, stage: str) -> None:
        super().setup(stage)
        assert self.source is not None  # what is wrong with it is said before the first image

    def set_tokenizer(self, source: TokenizerLike) -> None:
        super().set_tokenizer(source)
        self.embedded = {}

    def train(self, mode: bool = True) -> RegionCLIPCounter:
        if self.config.train_text and mode != self.training:
            self.embedded = {}
        super().train(mode)
        for part, trains in (
            (self.network.encoder, self.config.train_vision),
            (self.network.text, self.config.train_text),
        ):
            if not trains:
                part.eval()
        return self

    def _apply(self, *args: Any, **kwargs: Any) -> RegionCLIPCounter:
        self.embedded = {}
        return super()._apply(*args, **kwargs)

    def load_state_dict(self, *args: Any, **kwargs: Any) -> Any:
        self.embedded = {}
        return super().load_state_dict(*args, **kwargs)

    def embed_names(self, names: Sequence[str]) -> Tensor:
        """Embed names through the templates: ``(K, D)``, of any length; remembered while texts do not train."""
        if any(not name.strip() for name in names):
            raise InputError(f"an empty name in {list(names)[:5]}; name what is to be counted")
        options: Any = {"wording": self.config.wording, "ensemble": self.config.ensemble}
        if self.training and self.config.train_text:
            return trained_concepts(self.network.text, names, self.config.templates, **options)
        # Name by name: two of them may have the same prompts, which a pool must not.
        for name in [name for name in dict.fromkeys(names) if name not in self.embedded]:
            # What is kept must not depend on the precision of the run that happened to be first.
            with torch.autocast(self.device.type, enabled=False):
                found = embed_concepts(self.network.text, [name], self.config.templates, **options)
            self.embedded[name] = found[0].clone()
        return torch.stack([self.embedded[name] for name in names])

    def prompts_of(self, name: str) -> list[str]:
        return region_prompts(name, self.config.templates, self.config.wording)

    @property
    def text_tower(self) -> TextTower:
        return self.network.text

    @property
    def cell(self) -> int:
        return GRID

    def forward(self, images: Tensor, queries: Sequence[Query]) -> RegionOutput:
        """Detect in evaluation; in training return the maps that detections are made of, and no detection."""
        if not self.training:
            return joined([self._detect(image, query) for image, query in zip(images, queries, strict=True)])
        x = self.network.normalised(images)
        features = self.network.encoder(x)[0]
        heat, log_sizes = (None, None) if self.network.head is None else self.network.head(features, x)
        grid = (-(-images.shape[-2] // GRID), -(-images.shape[-1] // GRID))
        density = images.new_zeros(len(images), len(queries[0].names), *grid)
        return RegionOutput(density, heat=heat, log_sizes=log_sizes, features=features)

    def count_images(
        self,
        images: Sequence[Tensor],
        queries: Sequence[Query],
        window: int | None = None,
        stride: int | None = None,
        *,
        image_ids: Sequence[str] | None = None,
        sizes: Sequence[tuple[int, int]] | None = None,
    ) -> list[CountOutput]:
        """Detect in whole images; see :meth:`~counting_zoo.module.CountingModule.count_images`.

        Raises:
            InputError: a window or stride is given; saturated images are cut into tiles by themselves.
        """
        if window or stride:
            raise InputError(
                f"window {window} and stride {stride} for a detector, which sees whole images and cuts "
                "them itself where proposals are at their limit (model.tile_depth)"
            )
        ids = [""] * len(images) if image_ids is None else image_ids
        stored = [None] * len(images) if sizes is None else sizes
        return [
            self._detect(image.to(self.device), query, image_id, size)
            for image, query, image_id, size in zip(images, queries, ids, stored, strict=True)
        ]

    @torch.no_grad()
    def _detect(
        self, image: Tensor, query: Query, image_id: str = "", stored: tuple[int, int] | None = None
    ) -> RegionOutput:
        """Detect the names of a query in one image ``(3, H, W)``."""
        size = (int(image.shape[-2]), int(image.shape[-1]))
        x = self.network.normalised(image[None])
        features = self.network.encoder(x)[0]
        if self.network.head is not None:
            found = self.network.proposed(features, x, [size], self.config.peak_floor)[0]
        else:
            found = self.source([image], [image_id], None if stored is None else [stored])[0]
        if found.saturated and self.config.tile_depth:
            step = 0 if self.network.head is None else CELL
            found = tiled(self.source, [image], [image_id], first=[found], depth=self.config.tile_depth, step=step)[0]
        probabilities = self._probabilities(features, found.boxes.to(image.device), query.names, query.negatives)
        scores = fuse(probabilities, found.scores.to(image.device), self.config.fusion)
        kept = detect(
            found.boxes.to(image.device),
            scores,
            size=size,
            threshold=self.floor,
            iou_threshold=self.config.iou_threshold,
            suppression=self.config.suppression,
            assign=self.config.assign,
        )
        return detected(kept.boxes, kept.scores, kept.labels, size, len(query.names), found.saturated)

    def peaks(
        self, images: Sequence[Tensor], image_ids: Sequence[str], sizes: Sequence[tuple[int, int]] | None = None
    ) -> list[Proposed]:
        """Find peaks of images of any size; those of one size together."""
        by_size: dict[tuple[int, int], list[int]] = {}
        for i, image in enumerate(images):
            by_size.setdefault((int(image.shape[-2]), int(image.shape[-1])), []).append(i)
        found: dict[int, Proposed] = {}
        for size, places in by_size.items():
            x = self.network.normalised(torch.stack([images[i] for i in places]))
            proposed = self.network.proposed(
                self.network.encoder(x)[0], x, [size] * len(places), self.config.peak_floor
            )
            found |= dict(zip(places, proposed, strict=True))
        return [found[i] for i in range(len(images))]

    def _probabilities(
        self, features: Tensor, boxes: Tensor, names: Sequence[str], against: Sequence[str] = ()
    ) -> Tensor:
        """Compute ``(N, K)`` probabilities of the boxes of one image; names compete with ``against``."""
        if not len(boxes):
            return features.new_zeros(0, len(names), dtype=torch.float32)
        regions = self.network.encoder.pool(features, [boxes])
        texts = self.embed_names(names)
        if self.config.score == "sigmoid":
            scale, bias = self.network.log_scale.exp(), self.network.bias
            return text_probabilities(regions, texts, score="sigmoid", scale=scale, bias=bias)
        negatives = None
        if self.config.score == "softmax":
            others = concepts_from_classes(names, against or self.negatives)[len(concepts_from_classes(names, ())) :]
            negatives = self.embed_names(others) if others else None
        return text_probabilities(
            regions, texts, score=self.config.score, temperature=self.config.temperature, negatives=negatives
        )

    def classify_regions(self, image: Any, boxes: Any, prompts: str | Sequence[str]) -> ClassifiedRegions:
        """Classify given boxes of an image, by the whole image's features (not by crops).

        Args:
            image: a path, PIL image, ``(H, W[, C])`` array or ``(3, H, W)`` tensor.
            boxes: ``(N, 4)`` x1, y1, x2, y2 in its pixels; what is outside the image is clipped.
            prompts: K names.

        Returns:
            Probabilities of ``(N, K)``, as ``score`` makes them.

        Raises:
            InputError: a box without area in the image, coordinates that are not finite, or no name.
        """
        pixels, _ = as_image(image)
        size, names = (pixels.shape[1], pixels.shape[2]), [prompts] if isinstance(prompts, str) else list(prompts)
        if not names or len(set(names)) != len(names):
            raise InputError(f"prompts are {names}; expected names, each once")
        seen = self.preprocess(pixels)
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

    # -- the threshold -------------------------------------------------------------------------------------------------

    @property
    def floor(self) -> float:
        """Score above which detections are given: the threshold, or while it is chosen the lowest of the choice."""
        return min(float(self.threshold), float(THRESHOLDS[0])) if self._calibrating else float(self.threshold)

    def _set_threshold(self) -> None:
        """Weight averaging validates a copy, and averages thresholds as well: both copies have the calibrated one."""
        if self.calibrate and self._calibrated is not None:
            self.threshold.fill_(self._calibrated)

    def on_train_batch_start(self, batch: Batch, batch_idx: int) -> None:
        super().on_train_batch_start(batch, batch_idx)
        self._set_threshold()

    def on_train_end(self) -> None:
        self._set_threshold()

    def on_validation_epoch_start(self) -> None:
        self._set_threshold()
        self.threshold_errors.reset()  # of one that was interrupted
        # The few images of a sanity check decide nothing.
        self._waiting = [] if self.calibrate and not self.trainer.sanity_checking else None

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        self._calibrating = self._waiting is not None
        try:
            super().validation_step(batch, batch_idx)
        finally:
            self._calibrating = False  # what callbacks draw, or anybody counts after an error, is at the threshold

    def tally(
        self,
        outputs: list[Any],
        batch: Batch,
        sizes: list[tuple[int, int]],
        extra: list[list[str]] | None,
        split: Any,
    ) -> None:
        if self._waiting is None or split != "val":
            return super().tally(outputs, batch, sizes, extra, split)
        known: Any = {key: value for key, value in batch.items() if key != "image"}
        for output, image_id, target in zip(outputs, batch["image_id"], batch["counts"], strict=True):
            own = output.labels[0] < len(target)
            counts = counts_at(output.scores[0][own], output.labels[0][own], len(target), THRESHOLDS)
            self.threshold_errors.update(image_id, counts, target)
        # Only the detections are needed for another threshold, and densities of many names would fill the memory.
        light = [replace(o, density=o.density.new_empty(1, o.density.shape[1], 0, 0)) for o in outputs]
        self._waiting.append((light, known, sizes, extra))

    def on_validation_epoch_end(self) -> None:
        if self._waiting is not None:
            with warnings.catch_warnings():
                # A rank without images computes too, or the others would wait for it for ever.
                warnings.filterwarnings("ignore", message=".*compute.*before.*update.*")
                found = self.threshold_errors.compute()
            self.threshold_errors.reset()
            if found is not None:
                if abs(found - float(self.threshold)) > 1e-6:
                    self.drop_intervals(f"detections than those above the new threshold of {found:g}")
                self._calibrated = found
                self.threshold.fill_(found)
            waiting, self._waiting = self._waiting, None
            for outputs, known, sizes, extra in waiting:
                kept = [above(o, float(self.threshold), s) for o, s in zip(outputs, sizes, strict=True)]
                super().tally(kept, known, sizes, extra, "val")
            self.log("val/threshold", float(self.threshold))
        super().on_validation_epoch_end()

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_save_checkpoint(checkpoint)
        if self.calibrate and self._calibrated is not None and "current_model_state" in checkpoint:  # averaged weights
            checkpoint["state_dict"]["threshold"] = torch.tensor(self._calibrated)

    # -- training -------------------------------------------------------------------------------------------------

    def read_facts(self, datamodule: Any) -> None:
        if self.config.score != "sigmoid":
            raise InputError(
                f"score is {self.config.score!r}, which trains nothing; set model.score to 'sigmoid' to train"
            )
        super().read_facts(datamodule)

    def losses(self, output: CountOutput, batch: Batch) -> dict[str, Tensor]:
        assert isinstance(output, RegionOutput), f"losses of a {type(output).__name__}"
        assert output.features is not None  # as in training
        images = batch["image"]
        size = (int(images[0].shape[-2]), int(images[0].shape[-1]))
        known = [self._known_boxes(batch, i) for i in range(len(images))]
        sides = [
            object_sides(points, labels, *own, size)
            for points, labels, own in zip(batch["points"], batch["labels"], known, strict=True)
        ]
        terms: dict[str, Tensor] = {}
        if output.heat is not None and output.log_sizes is not None:
            grid = (output.heat.shape[-2], output.heat.shape[-1])
            targets = [heat_target(p, own, grid, CELL) for p, own in zip(batch["points"], sides, strict=True)]
            terms["heat"] = focal_heat_loss(output.heat[:, 0], torch.stack(targets))
            terms["size"] = size_loss(output.log_sizes, [own for own, _ in known], CELL, UNIT)
        terms["text"] = self._text_loss(output.features, batch, sides, size)
        return {name: self.weights[name] * term for name, term in terms.items()}

    def _known_boxes(self, batch: Batch, i: int) -> tuple[Tensor, Tensor]:
        """Collect ``(E, 4)`` boxes of objects of an image, all or a few examples, and ``(E,)`` which name each has."""
        if self.boxes == "all" and "boxes" in batch and "box_labels" in batch:
            return batch["boxes"][i], batch["box_labels"][i]
        points = batch["points"][i]
        query = batch["queries"][i]
        examples = points.new_zeros(0, 4) if query.exemplars is None else query.exemplars
        if query.exemplar_labels is not None:
            return examples, query.exemplar_labels
        return examples, torch.zeros(len(examples), dtype=torch.int64, device=points.device)

    def _text_loss(self, features: Tensor, batch: Batch, sides: list[Tensor], size: tuple[int, int]) -> Tensor:
        """Compare regions on objects with all names of training, and regions beside them with those asked about."""
        names = list(dict.fromkeys([*self.train_classes, *(n for query in batch["queries"] for n in query.names)]))
        place = {name: i for i, name in enumerate(names)}
        generator = torch.Generator().manual_seed(int(torch.randint(1 << 62, ())))
        examples = [
            region_examples(
                points,
                labels,
                torch.tensor([place[name] for name in query.names]),
                own,
                size,
                n_names=len(names),
                n_regions=self.n_regions,
                generator=generator,
            )
            for points, labels, query, own in zip(
                batch["points"], batch["labels"], batch["queries"], sides, strict=True
            )
        ]
        boxes, targets, known = zip(*examples, strict=True)
        regions = self.network.encoder.pool(features, [own.to(self.device) for own in boxes])
        logits = text_logits(regions, self.embed_names(names), 1.0) * self.network.log_scale.exp() + self.network.bias
        return region_score_loss(logits, torch.cat(targets).to(self.device), torch.cat(known).to(self.device))

    # -- checkpoints ----------------------------------------------------------------------------------------------

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_load_checkpoint(checkpoint)
        state = checkpoint["state_dict"]
        if self.hparams["threshold"] != checkpoint["hyper_parameters"]["threshold"]:
            state["threshold"], self._calibrated = self.threshold.clone(), None
        if self.network.head is None:  # boxes come from elsewhere now
            for key in [key for key in state if key.startswith("network.head.")]:
                del state[key]

    def recipe(self) -> dict[str, Any]:
        return super().recipe() | {"calibrated": self._calibrated}

    def restore_recipe(self, recipe: dict[str, Any]) -> None:
        super().restore_recipe(recipe)
        self._calibrated = recipe["calibrated"]
