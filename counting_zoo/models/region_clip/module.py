"""Counting by open-vocabulary detection as a Lightning module: losses, a calibrated threshold, and its recipe."""

from __future__ import annotations

import math
from typing import Any, ClassVar, Literal, get_args

import torch
from torch import Tensor

from counting_zoo.class_lists import COCO_CLASSES
from counting_zoo.errors import InputError
from counting_zoo.models.region_clip.concepts import Ensemble
from counting_zoo.models.region_clip.detecting import RegionDetector
from counting_zoo.models.region_clip.detection_loss import (
    focal_heat_loss,
    heat_target,
    object_sides,
    region_examples,
    region_score_loss,
    size_loss,
)
from counting_zoo.models.region_clip.detections import Assign, Score, Suppression
from counting_zoo.models.region_clip.loss import text_logits
from counting_zoo.models.region_clip.network import CELL, UNIT, RegionCLIPNet, RegionOutput
from counting_zoo.models.region_clip.prompts import TemplateSet, Wording, region_prompts
from counting_zoo.nn.clip import CLIPSource, build_towers, tokenizer_of, towers_config
from counting_zoo.nn.clip_regions import DenseMode, region_encoder
from counting_zoo.nn.pretrained import load_text, load_vision, read_pretrained
from counting_zoo.nn.text import TextPool, TextTower
from counting_zoo.nn.vision import Stem
from counting_zoo.types import Batch, CountOutput


class RegionCLIPCounter(RegionDetector):
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
        missing_proposals: a picture that the file of boxes does not name is an ``error``, or has no boxes (``empty``).
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
        boxes: what training learns sizes from: ``all`` boxes where the data has them, or only its ``examples``.
        heat_weight, size_weight, text_weight: of the three losses; 0 gives a term no gradient.
        n_regions: objects of a picture, and as many boxes beside them, whose texts are trained in a step, at most.
        width: channels of the head that finds peaks.
        options: those of :class:`~counting_zoo.module.CountingModule`, without windows.
    """

    requires: ClassVar[tuple[frozenset[str], ...]] = (frozenset({"points", "labels"}),)

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
        missing_proposals: Literal["error", "empty"] = "error",
        peak_floor: float = 0.1,
        tile_depth: int = 1,
        score: Score = "sigmoid",
        scale: float = 14.0,
        bias: float = -7.0,
        temperature: float = 0.01,
        negatives: list[str] | None = None,
        fusion: Literal["region", "geometric"] = "region",
        threshold: float | None = None,
        calibrate: bool = True,
        iou_threshold: float = 0.5,
        suppression: Suppression = "hard",
        assign: Assign = "each",
        boxes: Literal["all", "examples"] = "all",
        heat_weight: float = 1.0,
        size_weight: float = 0.1,
        text_weight: float = 1.0,
        n_regions: int = 64,
        width: int = 64,
        **options: Any,
    ) -> None:
        super().__init__(threshold=0.5 if threshold is None else threshold, calibrate=calibrate, **options)
        if self.window is not None:
            raise InputError(f"window is {self.window}; a detector sees whole pictures, and cuts them itself where "
                             "its proposals are at their limit (tile_depth)")  # fmt: skip
        for name, value in (("iou_threshold", iou_threshold), ("peak_floor", peak_floor)):
            if not 0 <= value <= 1:
                raise InputError(f"{name} is {value}; expected 0 to 1")
        if n_regions < 1 or tile_depth < 0 or not scale > 0:
            raise InputError(f"n_regions is {n_regions}, tile_depth {tile_depth} and scale {scale}; expected at least "
                             "1, at least 0 and above 0")  # fmt: skip
        for name, choice, choices in (
            ("missing_proposals", missing_proposals, ("error", "empty")),
            ("boxes", boxes, ("all", "examples")), ("score", score, get_args(Score)),
            ("fusion", fusion, ("region", "geometric")), ("suppression", suppression, get_args(Suppression)),
            ("assign", assign, get_args(Assign)),
        ):  # fmt: skip
            if choice not in choices:
                raise InputError(f"{name} is {choice!r}; expected one of {', '.join(map(repr, choices))}")
        if proposals == "random":
            raise InputError("proposals are 'random', which suits pretraining; expected 'peaks', 'grid', a file of "
                             "boxes, or a detector ('owlv2:' or 'detr:' and a folder or hub name)")  # fmt: skip
        weights = {"heat": heat_weight, "size": size_weight, "text": text_weight}
        if not all(0 <= weight < math.inf for weight in weights.values()) or not text_weight + heat_weight:
            raise InputError(f"weights of the losses are {weights}; expected finite numbers of at least 0, and that of "
                             "texts or heat above it")  # fmt: skip
        region_prompts("a name", templates, wording)  # refuses what is no template or wording
        towers = build_towers(clip)
        # The checkpoint rebuilds the shapes from this and takes the weights from its own state.
        self.hparams.update(clip=towers_config(towers), tokenizer=None, pretrained_encoder=None)
        text = TextTower(towers, n_context=0, pool=text_pool, train=train_text)
        encoder = region_encoder(towers, stem=stem, dense=dense, freeze_at=freeze_at)
        if not train_vision:
            encoder.requires_grad_(False)
        self.network = RegionCLIPNet(encoder, text, peaks=proposals == "peaks", scale=scale, bias=bias, width=width)
        given = tokenizer if tokenizer is not None or pretrained_encoder else tokenizer_of(clip)
        if given is not None:
            self.set_tokenizer(given)
        if pretrained_encoder is not None:
            source = read_pretrained(pretrained_encoder)
            load_vision(encoder, source)
            load_text(text, source, tokenizer_of(clip))
        self.train_vision, self.train_text = train_vision, train_text
        self.templates, self.wording, self.ensemble = templates, wording, ensemble
        self.proposals, self.missing_proposals = proposals, missing_proposals
        self.peak_floor, self.tile_depth = peak_floor, tile_depth
        self.score, self.temperature, self.fusion = score, temperature, fusion
        self.negatives = list(COCO_CLASSES) if negatives is None else negatives
        self.iou_threshold, self.suppression, self.assign = iou_threshold, suppression, assign
        self.weights = weights
        self.boxes, self.n_regions = boxes, n_regions
        self.train_classes: list[str] = []
        self.embedded: dict[str, Tensor] = {}
        # Another source is made when it is needed: a checkpoint is loaded where its file of boxes is not.
        self._source = self.peaks if proposals == "peaks" else None
        self.train(self.training)

    # -- training -------------------------------------------------------------------------------------------------

    def read_facts(self, datamodule: Any) -> None:
        if self.score != "sigmoid":
            raise InputError(f"score is {self.score!r}, which trains nothing; set model.score to 'sigmoid' to train")
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
        """``(E, 4)`` boxes of objects of a picture, all or a few examples, and ``(E,)`` which name each has."""
        if self.boxes == "all" and "boxes" in batch and "box_labels" in batch:
            return batch["boxes"][i], batch["box_labels"][i]
        points = batch["points"][i]
        examples = batch["exemplars"][i] if "exemplars" in batch else points.new_zeros(0, 4)
        return examples, torch.zeros(len(examples), dtype=torch.int64, device=points.device)

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


__all__ = ["RegionCLIPCounter"]
