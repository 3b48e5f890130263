"""Counting by open-vocabulary detection as a Lightning module: losses, a calibrated threshold, and its recipe."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize

from counting_zoo.class_lists import COCO_CLASSES
from counting_zoo.errors import InputError
from counting_zoo.models.region_clip.box_sources import Proposed
from counting_zoo.models.region_clip.calibration import THRESHOLDS, ThresholdErrors
from counting_zoo.models.region_clip.classified import ClassifiedRegions, boxes_inside
from counting_zoo.models.region_clip.concepts import Ensemble, concepts_from_classes, embed_concepts
from counting_zoo.models.region_clip.detection_loss import (
    focal_heat_loss,
    heat_target,
    region_examples,
    region_score_loss,
    size_loss,
    typical_sides,
)
from counting_zoo.models.region_clip.detections import (
    Assign,
    Fusion,
    Score,
    Suppression,
    counts_at,
    detect,
    fuse,
    text_probabilities,
)
from counting_zoo.models.region_clip.loss import text_logits
from counting_zoo.models.region_clip.network import (
    CELL,
    GRID,
    UNIT,
    RegionCLIPNet,
    RegionOutput,
    above,
    detected,
    joined,
)
from counting_zoo.models.region_clip.prompts import TemplateSet, Wording, prompt_templates, region_prompts
from counting_zoo.models.region_clip.proposals import ProposalSource, proposal_source, tiled
from counting_zoo.module import CountingModule
from counting_zoo.nn.clip import CLIPSource, build_towers, tokenizer_of, towers_config
from counting_zoo.nn.clip_regions import DenseMode, region_encoder
from counting_zoo.nn.pretrained import load_text, load_vision, read_pretrained
from counting_zoo.nn.text import TextPool, TextTower
from counting_zoo.nn.tokenizer import TokenizerLike, word_tokenizer
from counting_zoo.nn.vision import Stem
from counting_zoo.pictures import as_picture
from counting_zoo.types import Batch, CountOutput, Prediction


class RegionCLIPCounter(CountingModule):
    """Counts what it detects: proposals, their embeddings, texts, suppression (after Zhong et al., arXiv 2112.09106).

    Each object counted has a box, and a name that is not in the picture has none. The heads that propose and score are
    the zoo's own: RegionCLIP's detector caps its boxes at 100 or 300 and takes every region for a single name's object.

    Args:
        clip: CLIP weights: hub name, folder, file, or a config mapping for random weights; a vision transformer or a
            ResNet.
        pretrained_encoder: a file that ``RegionCLIPPretraining.export`` wrote, or ``small`` for the zoo's own small
            CLIP, in place of ``clip``'s weights.
        tokenizer: folder or hub name; where ``clip`` has one if ``None``. A random-weight CLIP makes its own from the
            class names of its training data.
        stem, dense, freeze_at: see :func:`~counting_zoo.nn.clip_regions.region_encoder`.
        train_vision, train_text: whether CLIP's own weights train.
        text_pool: where texts are read; see :class:`~counting_zoo.nn.text.TextTower`.
        templates, wording, ensemble: see :func:`~counting_zoo.models.region_clip.concepts.embed_concepts`.
        proposals: where boxes come from: trained ``peaks``, a ``grid`` (which needs no training, and whose boxes are
            seldom right), a ``.json`` or ``.csv`` file of boxes, or a detector (``owlv2:`` or ``detr:`` and a folder or
            hub name).
        peak_floor: heat above which a local maximum proposes a box; there is no limit to their number.
        tile_depth: how often a picture is cut into 2 x 2 magnified tiles while proposals are at their limit.
        score: ``sigmoid`` of a trained scale and bias; ``softmax`` over the names asked about and ``negatives``, for a
            CLIP that was not trained to count (zero-shot); ``official`` as the reference, see
            :func:`~counting_zoo.models.region_clip.detections.text_probabilities`.
        scale, bias: of the cosines, at the beginning of training.
        temperature: of the cosines of ``softmax`` and ``official``.
        negatives: names that compete in ``softmax``; COCO's classes if ``None``. Those asked about are left out.
        fusion: what a box scores: what its ``region`` says, or with the proposal's own score (``geometric``).
        threshold: score above which a box counts, until it is calibrated; 0.5 if ``None``. Given to a checkpoint that
            was made without it, it takes the place of the calibrated one.
        calibrate: choose the threshold of the least validation error in each validation.
        iou_threshold: overlap above which the lower of two boxes of one name goes.
        suppression, assign: see :func:`~counting_zoo.models.region_clip.detections.detect`.
        heat_weight, size_weight, text_weight: of the three losses.
        n_regions: objects of a picture, and as many boxes beside them, whose texts are trained in a step, at most.
        width: channels of the head that finds peaks.
        options: those of :class:`~counting_zoo.module.CountingModule`, without windows.
    """

    requires: ClassVar[tuple[frozenset[str], ...]] = (frozenset({"points", "labels"}),)
    text_guided: ClassVar[bool] = True
    threshold: Tensor

    def __init__(
        self,
        clip: CLIPSource = "openai/clip-vit-base-patch16",
        *,
        pretrained_encoder: str | None = None,
        tokenizer: str | None = None,
        stem: Stem = "patch",
        dense: DenseMode = "patch",
        freeze_at: int = 2,
        train_vision: bool = False,
        train_text: bool = False,
        text_pool: TextPool = "eot",
        templates: TemplateSet | list[str] = "photo",
        wording: Wording = "corrected",
        ensemble: Ensemble = "normalised",
        proposals: str = "peaks",
        peak_floor: float = 0.1,
        tile_depth: int = 1,
        score: Score = "sigmoid",
        scale: float = 14.0,
        bias: float = -7.0,
        temperature: float = 0.01,
        negatives: list[str] | None = None,
        fusion: Fusion = "region",
        threshold: float | None = None,
        calibrate: bool = True,
        iou_threshold: float = 0.5,
        suppression: Suppression = "hard",
        assign: Assign = "each",
        heat_weight: float = 1.0,
        size_weight: float = 0.1,
        text_weight: float = 1.0,
        n_regions: int = 64,
        width: int = 64,
        **options: Any,
    ) -> None:
        super().__init__(**options)
        if self.window is not None:
            raise InputError(f"window is {self.window}; a detector sees whole pictures, and cuts them itself where "
                             "its proposals are at their limit (tile_depth)")  # fmt: skip
        at_first = 0.5 if threshold is None else threshold
        for name, value in (("threshold", at_first), ("iou_threshold", iou_threshold), ("peak_floor", peak_floor)):
            if not 0 <= value <= 1:
                raise InputError(f"{name} is {value}; expected 0 to 1")
        if n_regions < 1 or tile_depth < 0 or not scale > 0:
            raise InputError(f"n_regions is {n_regions}, tile_depth {tile_depth} and scale {scale}; expected at least "
                             "1, at least 0 and above 0")  # fmt: skip
        prompt_templates(templates)
        towers = build_towers(clip)
        # The checkpoint rebuilds the shapes from this and takes the weights from its own state.
        self.hparams.update(clip=towers_config(towers), tokenizer=None, pretrained_encoder=None)
        text = TextTower(towers, n_context=0, pool=text_pool, train=train_text)
        encoder = region_encoder(towers, stem=stem, dense=dense, freeze_at=freeze_at)
        if not train_vision:
            encoder.requires_grad_(False)
        self.network = RegionCLIPNet(encoder, text, peaks=proposals == "peaks", scale=scale, bias=bias, width=width)
        self._tokenizer_is_made = False
        given = tokenizer if tokenizer is not None or pretrained_encoder else tokenizer_of(clip)
        if given is not None:
            self.set_tokenizer(given)
        if pretrained_encoder is not None:
            source = read_pretrained(pretrained_encoder)
            load_vision(encoder, source)
            load_text(text, source, tokenizer_of(clip))
        self.train_vision, self.train_text = train_vision, train_text
        self.templates, self.wording, self.ensemble = templates, wording, ensemble
        self.proposals, self.peak_floor, self.tile_depth = proposals, peak_floor, tile_depth
        self.score, self.temperature, self.fusion = score, temperature, fusion
        self.negatives = list(COCO_CLASSES) if negatives is None else negatives
        self.iou_threshold, self.suppression, self.assign = iou_threshold, suppression, assign
        self.heat_weight, self.size_weight, self.text_weight = heat_weight, size_weight, text_weight
        self.n_regions, self.calibrate = n_regions, calibrate
        self.register_buffer("threshold", torch.tensor(float(at_first)))
        self.train_classes: list[str] = []
        self.threshold_errors = ThresholdErrors()
        self._calibrated: float | None = None
        self._calibrating = False
        self._waiting: list[tuple[Any, ...]] | None = None
        self._embedded: dict[str, Tensor] = {}
        self._source: ProposalSource = self._peaks if proposals == "peaks" else proposal_source(proposals)
        self.train(self.training)

    # -- texts ----------------------------------------------------------------------------------------------------

    def set_tokenizer(self, source: TokenizerLike) -> None:
        """Use a HuggingFace tokenizer, a folder, a hub name, or a callable ``list[str] -> (B, L)`` ids."""
        self.network.text.set_tokenizer(source)
        self._embedded = {}

    def train(self, mode: bool = True) -> RegionCLIPCounter:
        super().train(mode)
        for part, trains in ((self.network.encoder, self.train_vision), (self.network.text, self.train_text)):
            if not trains:
                part.eval()
        if self.train_text:
            self._embedded = {}
        return self

    def _apply(self, *args: Any, **kwargs: Any) -> RegionCLIPCounter:
        self._embedded = {}
        return super()._apply(*args, **kwargs)

    def load_state_dict(self, *args: Any, **kwargs: Any) -> Any:
        self._embedded = {}
        return super().load_state_dict(*args, **kwargs)

    def embed_names(self, names: Sequence[str]) -> Tensor:
        """``(K, D)`` embeddings of names through the templates, of any length; remembered while texts do not train."""
        if any(not name.strip() for name in names):
            raise InputError(f"an empty name in {list(names)[:5]}; name what is to be counted")
        if self.training and self.train_text:
            prompts = [p for name in names for p in region_prompts(name, self.templates, self.wording)]
            features = self.network.text(prompts).unflatten(0, (len(names), -1))  # (K, templates, D)
            return (normalize(features.float(), dim=2) if self.ensemble == "normalised" else features).mean(1)
        if new := [name for name in dict.fromkeys(names) if name not in self._embedded]:
            # Name by name: two of them may have the same prompts, which a pool must not.
            for name in new:
                found = embed_concepts(
                    self.network.text, [name], self.templates, wording=self.wording, ensemble=self.ensemble
                )
                self._embedded[name] = found[0].clone()
        return torch.stack([self._embedded[name] for name in names])

    # -- detecting ------------------------------------------------------------------------------------------------

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
            found = self._source([image], [image_id], None if stored is None else [stored])[0]
        if found.saturated and self.tile_depth:
            step = 0 if self.network.head is None else CELL
            found = tiled(self._source, [image], [image_id], depth=self.tile_depth, step=step)[0]
        probabilities = self._probabilities(features, found.boxes.to(image.device), names)
        scores = fuse(probabilities, found.scores.to(image.device), self.fusion)
        floor = min(float(self.threshold), float(THRESHOLDS[0])) if self._calibrating else float(self.threshold)
        kept = detect(
            found.boxes.to(image.device), scores, size=size, threshold=floor, iou_threshold=self.iou_threshold,
            suppression=self.suppression, assign=self.assign,
        )  # fmt: skip
        return detected(kept.boxes, kept.scores, kept.labels, size, len(names), found.saturated)

    def _peaks(
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
            others = concepts_from_classes(names, self.negatives)[len(set(names)) :]
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

    # -- training -------------------------------------------------------------------------------------------------

    def on_validation_start(self) -> None:
        self._warn_untrained()

    def on_test_start(self) -> None:
        self._warn_untrained()

    def on_predict_start(self) -> None:
        self._warn_untrained()

    def _warn_untrained(self) -> None:
        """Not in ``setup``, which runs before the trainer restores a checkpoint with its tokenizer."""
        if self.network.text.tokenizer is None:
            warnings.warn(
                "this RegionCLIPCounter has random weights and was never trained: its counts mean nothing. Give it a "
                "checkpoint (--ckpt_path) or CLIP weights (--model.clip, a hub name or folder)",
                stacklevel=2,
            )
            self._make_tokenizer([])

    def read_facts(self, datamodule: Any) -> None:
        if self.score != "sigmoid":
            raise InputError(f"score is {self.score!r}, which trains nothing; set model.score to 'sigmoid' to train")
        self.train_classes = list(datamodule.class_names("train"))
        if self.network.text.tokenizer is None:
            self._make_tokenizer(self.train_classes)

    def _make_tokenizer(self, names: list[str]) -> None:
        prompts = [p for name in names for p in region_prompts(name, self.templates, self.wording)]
        vocab_size = self.network.text.model.embeddings.token_embedding.num_embeddings
        self.set_tokenizer(word_tokenizer(prompts, vocab_size))
        self._tokenizer_is_made = True

    def losses(self, output: CountOutput, batch: Batch) -> dict[str, Tensor]:
        assert isinstance(output, RegionOutput), f"losses of a {type(output).__name__}"
        assert output.features is not None  # as in training
        images = batch["image"]
        size = (int(images[0].shape[-2]), int(images[0].shape[-1]))
        sides = [self._sides(batch, i, size) for i in range(len(images))]
        terms: dict[str, Tensor] = {}
        if output.heat is not None and output.log_sizes is not None:
            grid = (output.heat.shape[-2], output.heat.shape[-1])
            target = torch.stack([
                heat_target(points, own.expand(len(points), 2), grid, CELL)
                for points, own in zip(batch["points"], sides, strict=True)
            ])  # fmt: skip
            terms["heat"] = self.heat_weight * focal_heat_loss(output.heat[:, 0], target)
            boxes = [self._known_boxes(batch, i) for i in range(len(images))]
            terms["size"] = self.size_weight * size_loss(output.log_sizes, boxes, CELL, UNIT)
        terms["text"] = self.text_weight * self._text_loss(output.features, batch, sides, size)
        return terms

    def _known_boxes(self, batch: Batch, i: int) -> Tensor:
        """``(E, 4)`` boxes of objects of a picture: all, or a few examples."""
        for key in ("boxes", "exemplars"):
            if key in batch and len(batch[key][i]):  # type: ignore[literal-required]
                return batch[key][i]  # type: ignore[literal-required]
        return batch["points"][i].new_zeros(0, 4)

    def _sides(self, batch: Batch, i: int, size: tuple[int, int]) -> Tensor:
        return typical_sides(batch["points"][i], self._known_boxes(batch, i), size)

    def _text_loss(self, features: Tensor, batch: Batch, sides: list[Tensor], size: tuple[int, int]) -> Tensor:
        """Regions on objects against all names of training, and regions beside them against those asked about."""
        names = list(dict.fromkeys([*self.train_classes, *(n for asked in batch["classes"] for n in asked)]))
        place = {name: i for i, name in enumerate(names)}
        generator = torch.Generator().manual_seed(int(torch.randint(1 << 62, ())))
        examples = [
            region_examples(
                points, labels, torch.tensor([place[name] for name in asked]), own, size, n_names=len(names),
                n_regions=self.n_regions, generator=generator,
            )
            for points, labels, asked, own in zip(
                batch["points"], batch["labels"], batch["classes"], sides, strict=True
            )
        ]  # fmt: skip
        boxes, targets, known = zip(*examples, strict=True)
        regions = self.network.encoder.pool(features, [own.to(self.device) for own in boxes])
        logits = text_logits(regions, self.embed_names(names), 1.0) * self.network.log_scale.exp() + self.network.bias
        return region_score_loss(logits, torch.cat(targets).to(self.device), torch.cat(known).to(self.device))

    def default_optimizer(self, groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
        """AdamW."""
        return torch.optim.AdamW(groups, lr=1e-4, weight_decay=0.05)

    def idle_parameters(self) -> list[nn.Parameter]:
        if self.network.head is None or self.text_weight:
            return []
        return [self.network.log_scale, self.network.bias]

    # -- calibration ----------------------------------------------------------------------------------------------

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
        # The few pictures of a sanity check decide nothing.
        self._waiting = [] if self.calibrate and not self.trainer.sanity_checking else None

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        self._calibrating = self._waiting is not None
        try:
            super().validation_step(batch, batch_idx)
        finally:
            self._calibrating = False  # what callbacks draw, or anybody counts after an error, is at the threshold

    def _tally(
        self,
        outputs: list[Any],
        batch: Batch,
        sizes: list[tuple[int, int]],
        extra: list[list[str]] | None,
        split: Any,
    ) -> None:
        if self._waiting is None or split != "val":
            return super()._tally(outputs, batch, sizes, extra, split)
        known: Any = {key: value for key, value in batch.items() if key != "image"}
        for output, image_id, target in zip(outputs, batch["image_id"], batch["counts"], strict=True):
            own = output.labels[0] < len(target)
            counts = counts_at(output.scores[0][own], output.labels[0][own], len(target), THRESHOLDS)
            self.threshold_errors.update(image_id, counts, target)
        self._waiting.append((outputs, known, sizes, extra))

    def on_validation_epoch_end(self) -> None:
        if self._waiting is not None:
            with warnings.catch_warnings():
                # A rank without pictures computes too, or the others would wait for it for ever.
                warnings.filterwarnings("ignore", message=".*compute.*before.*update.*")
                found = self.threshold_errors.compute()
            self.threshold_errors.reset()
            if found is not None:
                self._calibrated = found
                self.threshold.fill_(found)
            waiting, self._waiting = self._waiting, None
            for outputs, known, sizes, extra in waiting:
                kept = [above(o, float(self.threshold), s) for o, s in zip(outputs, sizes, strict=True)]
                super()._tally(kept, known, sizes, extra, "val")
            self.log("val/threshold", float(self.threshold))
        super().on_validation_epoch_end()

    # -- checkpoints ----------------------------------------------------------------------------------------------

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_save_checkpoint(checkpoint)
        if self.calibrate and self._calibrated is not None and "current_model_state" in checkpoint:  # averaged weights
            checkpoint["state_dict"]["threshold"] = torch.tensor(self._calibrated)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_load_checkpoint(checkpoint)
        state = checkpoint["state_dict"]
        if self.hparams["threshold"] != checkpoint["hyper_parameters"]["threshold"]:
            state["threshold"], self._calibrated = self.threshold.clone(), None
        if self.network.head is None:  # boxes come from elsewhere now
            for key in [key for key in state if key.startswith("network.head.")]:
                del state[key]

    def recipe(self) -> dict[str, Any]:
        tokenizer = self.network.text.tokenizer
        return {
            "tokenizer": None if tokenizer is None else tokenizer.to_json(),
            "train_classes": self.train_classes,
            "calibrated": self._calibrated,
        }

    def restore_recipe(self, recipe: dict[str, Any]) -> None:
        # A tokenizer given by the caller wins over the one that was saved, but not one made of this run's class names.
        missing = self.network.text.tokenizer is None or self._tokenizer_is_made
        if missing and recipe["tokenizer"] is not None:
            self.set_tokenizer(recipe["tokenizer"])
            self._tokenizer_is_made = False
        self.train_classes = list(recipe["train_classes"])
        self._calibrated = recipe["calibrated"]


__all__ = ["RegionCLIPCounter"]
