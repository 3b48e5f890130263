"""RegionCLIP's pretraining: a CLIP learns to match regions, instead of whole pictures, with texts."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Mapping
from copy import deepcopy
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from counting_zoo.class_lists import COCO_CLASSES
from counting_zoo.errors import InputError, SupervisionError
from counting_zoo.geometry import Preprocess
from counting_zoo.models.region_clip.concepts import (
    Ensemble,
    cached_concepts,
    concept_pool,
    concepts_from_classes,
    embed_concepts,
    trained_concepts,
)
from counting_zoo.models.region_clip.loss import Gather
from counting_zoo.models.region_clip.pretraining_batch import named_labels, picture_generators
from counting_zoo.models.region_clip.pretraining_settings import Labels, check_choices, check_settings, term_weights
from counting_zoo.models.region_clip.pretraining_step import RegionTextModule
from counting_zoo.models.region_clip.prompts import TemplateSet, Wording, region_prompts
from counting_zoo.models.region_clip.proposals import FileProposals, proposal_source
from counting_zoo.models.region_clip.pseudo_labels import Fallback
from counting_zoo.models.region_clip.region_accuracy import RegionAccuracy
from counting_zoo.nn.clip import CLIPSource, build_towers, tokenizer_of, towers_config
from counting_zoo.nn.clip_regions import DenseMode, RegionEncoder, ResNetRegions, StemRegions, region_encoder
from counting_zoo.nn.normalization import STATISTICS
from counting_zoo.nn.pretrained import load_text, load_vision, read_pretrained, write_pretrained
from counting_zoo.nn.text import TextPool, TextTower
from counting_zoo.nn.tokenizer import TokenizerLike
from counting_zoo.nn.vision import Stem
from counting_zoo.schedules import WarmupSteps
from counting_zoo.types import Batch

log = logging.getLogger(__name__)


class RegionCLIPPretraining(RegionTextModule):
    """Region-text pretraining (Zhong et al., "RegionCLIP", CVPR 2022, arXiv 2112.09106).

    A student embeds regions of a picture; a teacher, which is the student as it was before, says which concept of a
    pool each of them shows. The student is drawn to the concept, to the teacher's opinion of all concepts, and whole
    pictures to their captions. What comes out is :meth:`export`: a CLIP that counters start from.

    Args:
        clip: CLIP weights: hub name, folder, file, or a config mapping for random weights. Its image tower is a vision
            transformer or a ResNet.
        pretrained_encoder: a file that :meth:`export` wrote, or ``small``, to go on from; in place of ``clip``'s
            weights.
        tokenizer: folder or hub name; where ``clip`` has one if ``None``. A random-weight CLIP makes its own from
            captions and concepts of its training data.
        stem: ``conv`` puts small convolutions in the place of a ViT's patch embedding, which learn from scratch.
        dense: how a ViT makes patches of its last layer; see :class:`~counting_zoo.nn.clip_regions.ViTRegions`.
        teacher_dense: the same of the teacher, which never saw regions.
        freeze_at: parts of a ResNet that do not train; see :class:`~counting_zoo.nn.clip_regions.ResNetRegions`.
        train_text: whether the text tower trains along, as it must from scratch.
        text_pool: where texts are read; see :class:`~counting_zoo.nn.text.TextTower`.
        concepts: the pool: frequent words of the training ``captions``, the ``classes`` of the data beside
            ``distractors``, a file with one name in each line, or a list of names.
        concept_count, concept_words, concept_limit: of ``captions``: how many a concept is in at least, words of the
            longest one, and how many are kept, the most frequent ones (``None``: all).
        distractors: names beside ``classes``; COCO's if ``None``.
        templates, wording, ensemble: see :func:`~counting_zoo.models.region_clip.concepts.embed_concepts`.
        cache: folder in which embeddings of the pool are kept between runs; ``None`` calculates them anew.
        regions: where boxes come from: ``random``, the data's own ``boxes``, a file of boxes, or a detector of
            transformers (``owlv2:`` or ``detr:`` and a folder or hub name).
        missing_regions: a picture that the file of boxes does not name is an ``error``, or has no boxes (``empty``).
        n_regions: boxes of each picture, drawn at random where there are more.
        labels: what says which concept a region shows: the ``teacher``, or the names of the data's own ``boxes``,
            which needs no teacher.
        threshold: the teacher's probability above which its label is believed; it depends on the size of the pool.
        fallback: what is kept where no region of a batch passes; see
            :func:`~counting_zoo.models.region_clip.pseudo_labels.pseudo_labels`.
        temperature: of all cosines.
        weights: of ``region_text``, ``distillation`` and ``image_text``; 1 each. A term of weight 0 is not calculated.
        gather: what sees the pictures of every process; see
            :func:`~counting_zoo.models.region_clip.loss.pretraining_losses`.
        picture_box: what a ResNet, or a ``conv`` stem, takes for a whole picture: the ``picture``, or as the reference
            the ``canvas``, with the padding that a larger picture of the batch brings. A class token sees the canvas.
        caption_template: the caption of a picture without captions; ``{}`` becomes the names that are in it.
        same_caption: equal captions in a batch are positives of each other (``positive``), or negatives as in the
            reference (``negative``).
        preprocess: geometry of whole pictures before the model sees them.
        training: those of :class:`~counting_zoo.training.TrainingModule`.
    """

    requires: ClassVar[tuple[frozenset[str], ...]] = (frozenset({"captions"}), frozenset({"counts"}))
    pads: ClassVar[bool] = True
    monitored: ClassVar[str] = "val/loss"

    def __init__(
        self,
        clip: CLIPSource = "openai/clip-vit-base-patch16",
        *,
        pretrained_encoder: str | None = None,
        tokenizer: str | None = None,
        stem: Stem = "patch",
        dense: DenseMode = "patch",
        teacher_dense: DenseMode = "value",
        freeze_at: int = 2,
        train_text: bool = False,
        text_pool: TextPool = "eot",
        concepts: str | list[str] = "captions",
        concept_count: int = 100,
        concept_words: int = 2,
        concept_limit: int | None = None,
        distractors: list[str] | None = None,
        templates: TemplateSet | list[str] = "region_clip",
        wording: Wording = "corrected",
        ensemble: Ensemble = "normalised",
        cache: str | None = None,
        regions: str = "random",
        missing_regions: Literal["error", "empty"] = "error",
        n_regions: int = 100,
        labels: Labels = "teacher",
        threshold: float = 0.1,
        fallback: Fallback = "none",
        temperature: float = 0.01,
        weights: dict[str, float] | None = None,
        gather: Gather = "image_text",
        picture_box: Literal["picture", "canvas"] = "picture",
        caption_template: str = "a photo of {}.",
        same_caption: Literal["positive", "negative"] = "positive",
        preprocess: Preprocess | None = None,
        **training: Any,
    ) -> None:
        super().__init__(**training)
        self.weights = term_weights(weights)
        check_settings(
            labels=labels, regions=regions, concepts=concepts, train_text=train_text, n_regions=n_regions,
            concept_count=concept_count, concept_words=concept_words, concept_limit=concept_limit,
            caption_template=caption_template, threshold=threshold, temperature=temperature,
        )  # fmt: skip
        check_choices(
            gather=gather, same_caption=same_caption, picture_box=picture_box, fallback=fallback, ensemble=ensemble,
            missing_regions=missing_regions,
        )  # fmt: skip
        region_prompts("a name", templates, wording)  # refuses what is no template or wording
        towers = build_towers(clip)
        # The checkpoint rebuilds the shapes from this and takes the weights from its own state.
        self.hparams.update(clip=towers_config(towers), tokenizer=None, pretrained_encoder=None)
        self.preprocess = Preprocess.of(preprocess)
        self._embedded: dict[tuple[str, ...], Tensor] = {}
        self.text = TextTower(towers, n_context=0, pool=text_pool, train=train_text)
        self.teacher: RegionEncoder | None = None
        if labels == "teacher":
            self.teacher = region_encoder(deepcopy(towers), stem=stem, dense=teacher_dense, freeze_at=freeze_at)
        self.encoder = region_encoder(towers, stem=stem, dense=dense, freeze_at=freeze_at)
        self.settings = {"clip": self.hparams["clip"], "stem": stem}
        given = tokenizer if tokenizer is not None or pretrained_encoder else tokenizer_of(clip)
        if given is not None:
            self.set_tokenizer(given)
        if pretrained_encoder is not None:
            source = read_pretrained(pretrained_encoder)
            load_vision(self.encoder, source)
            load_text(self.text, source, tokenizer_of(clip))
        if self.teacher is not None:
            self.teacher.load_state_dict(self.encoder.state_dict())
            self.teacher.requires_grad_(False)
        for name, values in zip(("mean", "std"), STATISTICS["clip"], strict=True):
            self.register_buffer(name, torch.tensor(values)[:, None, None])
        self.concept_source = concepts
        self.distractors = COCO_CLASSES if distractors is None else distractors
        self.concept_limits: dict[str, Any] = {
            "min_count": concept_count, "max_words": concept_words, "limit": concept_limit,
        }  # fmt: skip
        self.templates, self.wording, self.ensemble, self.cache = templates, wording, ensemble, cache
        self.regions, self.n_regions, self.labels = regions, n_regions, labels
        self.missing_regions, self.picture_box = missing_regions, picture_box
        self.threshold, self.fallback, self.temperature = threshold, fallback, temperature
        self.gather, self.caption_template, self.same_caption = gather, caption_template, same_caption
        self.train_text = train_text
        self.concepts: list[str] = []
        self.accuracy = RegionAccuracy()
        self._validated: list[str] = []
        self._warned = False
        # Of a checkpoint's weights they are none; see _load_from_state_dict.
        self._random_teacher = pretrained_encoder is None and (isinstance(clip, Mapping) or stem == "conv")
        self._source: Any = None

    @property
    def text_tower(self) -> TextTower:
        return self.text

    def set_tokenizer(self, source: TokenizerLike) -> None:
        super().set_tokenizer(source)
        self._embedded.clear()

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        self._embedded.clear()
        self._random_teacher = False
        super()._load_from_state_dict(*args, **kwargs)

    def train(self, mode: bool = True) -> RegionCLIPPretraining:
        super().train(mode)
        if self.train_text:
            self._embedded.clear()  # weights move in training alone
        if self.teacher is not None:
            self.teacher.eval()
        if not self.train_text:
            self.text.eval()
        return self

    def setup(self, stage: str) -> None:
        if stage in ("test", "predict"):
            raise InputError(
                "RegionCLIPPretraining counts nothing, so it has nothing to test or predict; validate it, or write its "
                "CLIP (counting-zoo export-encoder) and start a counter from that (model.pretrained_encoder)"
            )
        if self._source is None and self.regions not in ("random", "boxes"):
            self._source = proposal_source(self.regions, missing=self.missing_regions)
        super().setup(stage)

    def on_fit_start(self) -> None:
        super().on_fit_start()
        if self.teacher is not None and self._random_teacher:
            self._random_teacher = False
            warnings.warn(
                "labels is 'teacher', and the teacher's image tower has random weights, so what it says about regions "
                "is noise; give clip a name or file with weights, or pretrained_encoder, or set labels to 'boxes'",
                stacklevel=2,
            )

    def default_optimizer(self, groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
        """The reference's SGD for a ResNet (arXiv 2112.09106), CLIPSelf's AdamW for a ViT (arXiv 2310.01403).

        A ``conv`` stem, which nobody published, has the AdamW of all models here.
        """
        if isinstance(self.encoder, ResNetRegions):
            return torch.optim.SGD(groups, lr=2e-3, momentum=0.9, weight_decay=1e-4)
        if isinstance(self.encoder, StemRegions):
            return super().default_optimizer(groups)
        return torch.optim.AdamW(groups, lr=1e-5, weight_decay=0.1)

    def default_scheduler(self, optimizer: torch.optim.Optimizer) -> Any:
        """The reference's for a ResNet: warm-up, then a tenth of the rate from step 300000 on, and from 525000 on."""
        return WarmupSteps(optimizer) if isinstance(self.encoder, ResNetRegions) else None

    # -- concepts -------------------------------------------------------------------------------------------------

    def read_facts(self, datamodule: Any) -> None:
        provides = datamodule.provides
        if self.regions == "boxes" and not {"boxes", "box_labels"} <= provides:
            raise SupervisionError(
                f"regions is 'boxes', and {type(datamodule).__name__} gives {sorted(provides)} for training; choose "
                "data with boxes, or regions: random"
            )
        captions = [text for record in datamodule.records("train") for text in record.captions or ()]
        if not self.concepts:  # a run that is taken up again has them
            names = datamodule.class_names("train")
            self.concepts = concept_pool(
                self.concept_source, captions, names, distractors=self.distractors, **self.concept_limits
            )
        if self.text.tokenizer is None:
            prompts = [p for name in self.concepts for p in region_prompts(name, self.templates, self.wording)]
            self.make_tokenizer([*captions, *prompts, self.caption_template])
        if isinstance(self._source, FileProposals) and datamodule.augmentation is not None:
            raise InputError(
                f"regions are those of the file {self.regions!r}, which do not move along when pictures are flipped or "
                "cropped; set data.augmentation to null, or regions to 'random'"
            )

    def _embeddings(self, names: list[str]) -> Tensor:
        """``(C, D)`` embeddings of names, calculated once where texts do not train, else once in each validation."""
        options: Any = {"wording": self.wording, "ensemble": self.ensemble}
        if self.train_text and self.training:
            return trained_concepts(self.text, names, self.templates, **options)
        key = tuple(names)
        if key in self._embedded:
            return self._embedded[key].to(self.device)
        # What is kept must not depend on the precision of the run that happened to be first.
        with torch.autocast(self.device.type, enabled=False):
            if self.cache is None or self.train_text:
                found = embed_concepts(self.text, names, self.templates, **options)
            else:
                found = cached_concepts(self.cache, self.text, names, self.templates, **options)
        self._embedded[key] = found
        return found

    # -- steps ----------------------------------------------------------------------------------------------------

    def training_losses(self, batch: Batch) -> dict[str, Tensor]:
        # Lightning's and this module's seeds decide about torch's generator, so a run taken up again is the same run.
        generator = torch.Generator().manual_seed(int(torch.randint(1 << 62, ())))
        size = len(batch["image_id"])
        found = self._step(batch, self.concepts, [generator] * size)
        statistics = found.statistics
        self.log_dict({f"train/{name}": value.float() for name, value in statistics.items()}, batch_size=size)
        if statistics["distinct_concepts"] < 2 and not self._warned and self.weights["region_text"]:
            self._warned = True
            log.warning(
                "the kept regions of a batch show fewer than two concepts, so its region-text loss is 0; if it goes on "
                "(train/distinct_concepts), lower threshold, or give concepts that are in the pictures"
            )
        return found.terms

    def test_step(self, batch: Batch, batch_idx: int) -> None:
        """Is never reached, see :meth:`setup`; without it Lightning would say something less helpful."""

    def on_validation_epoch_start(self) -> None:
        datamodule: Any = self.trainer.datamodule  # type: ignore[attr-defined]
        self._validated = list(datamodule.class_names("val"))

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        image_ids, named = batch["image_id"], "boxes" in batch and "box_labels" in batch
        names = concepts_from_classes(self._validated, ()) if named or self.labels == "boxes" else []
        more = [own.to(self.device) for own in batch["boxes"]] if named else None
        pool = names if self.labels == "boxes" else self.concepts
        step = self._step(batch, pool, picture_generators(image_ids), more)
        found = step.terms | step.statistics | {"loss": torch.stack(list(step.terms.values())).sum()}
        # A picture that evens out the processes counts twice here, and once in the accuracies.
        found = {f"val/{name}": value.float() for name, value in found.items()}
        self.log_dict(found, batch_size=len(image_ids), sync_dist=True)
        if named:
            asked = zip(batch["classes"], batch["box_labels"], strict=True)
            labels = [named_labels([own[i] for i in ids.tolist()], names, self.device).labels for own, ids in asked]
            self.accuracy.update(image_ids, step.more, step.pictures, self._embeddings(names), labels)

    def on_validation_epoch_end(self) -> None:
        with warnings.catch_warnings():
            # A rank without pictures computes too, or the others would wait for it for ever.
            warnings.filterwarnings("ignore", message=".*compute.*before.*update.*")
            scores = self.accuracy.compute()
        self.log_dict({f"val/{name}": value for name, value in scores.items()})
        self.accuracy.reset()

    # -- checkpoints ----------------------------------------------------------------------------------------------

    def recipe(self) -> dict[str, Any]:
        return super().recipe() | {"concepts": self.concepts}

    def restore_recipe(self, recipe: dict[str, Any]) -> None:
        super().restore_recipe(recipe)
        self.concepts = list(recipe["concepts"])

    def export(self, path: str | Path, *, half: bool = False) -> Path:
        """Write the student and its texts as a CLIP that counters load through ``pretrained_encoder``.

        Args:
            path: a ``.safetensors`` file; its names are OpenAI's.
            half: in half precision.
        """
        dtype = torch.float16 if half else torch.float32
        return write_pretrained(path, self.encoder, self.text, self.settings, temperature=self.temperature, dtype=dtype)


__all__ = ["RegionCLIPPretraining"]
