"""RegionCLIP's pretraining: a CLIP learns to match regions, instead of whole images, with texts."""

from __future__ import annotations

import logging
import math
import warnings
import zlib
from collections.abc import Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor
from torch.nn.functional import one_hot, pad

from counting_zoo.class_lists import COCO_CLASSES
from counting_zoo.errors import InputError, SupervisionError
from counting_zoo.geometry import Preprocess
from counting_zoo.metrics.counts import ImageRows
from counting_zoo.models.region_clip.concepts import (
    Ensemble,
    TemplateSet,
    Wording,
    cached_concepts,
    concept_pool,
    concepts_from_classes,
    embed_concepts,
    region_prompts,
    spelling,
    trained_concepts,
)
from counting_zoo.models.region_clip.loss import (
    Fallback,
    Gather,
    PseudoLabels,
    label_statistics,
    pretraining_losses,
    pseudo_labels,
    teacher_probabilities,
    text_logits,
)
from counting_zoo.models.region_clip.proposals import FileProposals, Size, proposal_source, random_boxes
from counting_zoo.nn.clip import CLIPSource, build_towers, tokenizer_of, towers_config
from counting_zoo.nn.pretrained import load_text, load_vision, read_pretrained, write_pretrained
from counting_zoo.nn.regions import (
    DenseMode,
    RegionEncoder,
    ResNetRegions,
    StemRegions,
    region_and_image_embeddings,
    region_encoder,
)
from counting_zoo.nn.text import TextPool, TextTower, TokenizerLike
from counting_zoo.nn.vision import STATISTICS, Stem
from counting_zoo.schedules import WarmupSteps
from counting_zoo.training import TrainingModule
from counting_zoo.types import Batch


def named_shares(
    regions: Tensor, images: Tensor, texts: Tensor, labels: Sequence[Tensor]
) -> list[tuple[Tensor, Tensor]]:
    """Compute the share of each image's regions that are nearest to their own name, by cosine.

    Args:
        regions: ``(N, D)`` in the order of images.
        images: ``(B, D)`` of whole images.
        texts: ``(C, D)`` of all names.
        labels: B tensors ``(N_i,)`` int64, the names of its regions.

    Returns:
        Of each of the B images the share of its regions that are given their name, and whether the image is given
        the name of one of them, as scalars float32. Those of an image without regions are NaN and 0.

    Example:
        >>> import torch
        >>> names = torch.eye(3)
        >>> found = named_shares(names[[0, 1]], names[[2]], names, [torch.tensor([0, 2])])
        >>> [(float(region), float(whole)) for region, whole in found]
        [(0.5, 1.0)]
    """
    nearest = text_logits(regions, texts).argmax(1).split([len(own) for own in labels])
    first = text_logits(images, texts).argmax(1)
    return [
        ((given == own).float().mean(), (own == whole).any().float())
        for given, own, whole in zip(nearest, labels, first, strict=True)
    ]


class RegionAccuracy(ImageRows):
    """:func:`named_shares`, as the mean over images that have named regions."""

    def __init__(self, **options: Any) -> None:
        super().__init__(("region", "whole"), **options)

    def update(
        self, image_ids: Sequence[str], regions: Tensor, images: Tensor, texts: Tensor, labels: Sequence[Tensor]
    ) -> None:
        """Add B images by their names; the others are as in :func:`named_shares`."""
        shares = named_shares(regions, images, texts, labels)
        for image_id, own, (region, whole) in zip(image_ids, labels, shares, strict=True):
            if len(own):
                self.append([image_id], region=region.reshape(1, 1), whole=whole.reshape(1, 1))

    def compute(self) -> dict[str, float]:
        """Compute ``region_accuracy, picture_accuracy``; nothing where no image has named regions."""
        rows = self.rows()
        if not len(rows["image_key"]):
            return {}
        return {"region_accuracy": float(rows["region"].mean()), "picture_accuracy": float(rows["whole"].mean())}


Labels = Literal["teacher", "boxes"]


CHOICES = {
    "gather": ("image_text", "all", "none"),
    "same_caption": ("positive", "negative"),
    "picture_box": ("picture", "canvas"),
    "fallback": ("none", "official"),
    "ensemble": ("normalised", "official"),
    "missing_regions": ("error", "empty"),
}
"""What settings with a few values may be."""


def term_weights(given: Mapping[str, float] | None) -> dict[str, float]:
    """Return the weight of each term of the loss, 1 where none is given.

    Raises:
        InputError: an unknown term, a weight that is negative or not finite, or no weight above 0.

    Example:
        >>> term_weights({"image_text": 0.3})
        {'region_text': 1.0, 'distillation': 1.0, 'image_text': 0.3}
    """
    weights = {"region_text": 1.0, "distillation": 1.0, "image_text": 1.0}
    if unknown := set(given or {}) - set(weights):
        raise InputError(f"weights names {sorted(unknown)}; expected some of {', '.join(weights)}")
    weights |= given or {}
    if not all(0 <= w < math.inf for w in weights.values()) or not any(weights.values()):
        raise InputError(f"weights are {weights}; expected finite numbers of at least 0, and one above it")
    return weights


def check_choices(**settings: str) -> None:
    """Refuse a setting that is none of its :data:`CHOICES`.

    Raises:
        InputError: names the setting and its choices.
    """
    for name, value in settings.items():
        if value not in CHOICES[name]:
            raise InputError(f"{name} is {value!r}; expected one of {', '.join(map(repr, CHOICES[name]))}")


def check_settings(
    *,
    labels: str,
    regions: str,
    concepts: str | list[str],
    train_text: bool,
    n_regions: int,
    concept_count: int,
    concept_words: int,
    concept_limit: int | None,
    caption_template: str,
    threshold: float,
    temperature: float,
) -> None:
    """Refuse numbers out of range, and settings that do not go together.

    The arguments are those of ``RegionCLIPPretraining``.

    Raises:
        InputError: names the setting, and what to set instead.
    """
    if labels not in ("teacher", "boxes"):
        raise InputError(f"labels is {labels!r}; expected 'teacher', or 'boxes' for the names of the data's boxes")
    if labels == "boxes" and (regions != "boxes" or concepts != "classes"):
        raise InputError(
            f"labels 'boxes' are names of the data's own boxes; set regions to 'boxes' (it is {regions!r}) and "
            f"concepts to 'classes' (it is {concepts!r})"
        )
    if labels == "teacher" and train_text:
        raise InputError(
            "train_text moves the concepts away from the teacher that labels regions with them; set train_text to "
            "false, or labels to 'boxes'"
        )
    if min(concept_count, concept_words) < 1 or (concept_limit is not None and concept_limit < 1):
        raise InputError(
            f"concept_count is {concept_count}, concept_words {concept_words} and concept_limit {concept_limit}; "
            "expected at least 1"
        )
    if n_regions < 1 or "{}" not in caption_template:
        raise InputError(
            f"n_regions is {n_regions} and caption_template {caption_template!r}; expected at least 1 region, and a "
            "text with {} for the names"
        )
    if not 0 <= threshold < math.inf or not 0 < temperature < math.inf:
        raise InputError(
            f"threshold is {threshold} and temperature {temperature}; expected at least 0, such as 0.1, and above 0, "
            "such as 0.01"
        )


CAPTIONS = 5
"""Captions of an image that one is drawn from at most, as in the reference."""


def image_generators(image_ids: Sequence[str]) -> list[torch.Generator]:
    """Build a generator for each image, seeded by its name, so that draws depend on no other image or process."""
    return [torch.Generator().manual_seed(zlib.crc32(image_id.encode())) for image_id in image_ids]


def padded_images(
    images: Tensor | Sequence[Tensor], mean: Tensor, std: Tensor, multiple: int
) -> tuple[Tensor, list[Size]]:
    """Pad normalised images with zeros on the right and at the bottom.

    Args:
        images: B images ``(3, H_i, W_i)`` in [0, 1] or uint8.
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
    """Draw at most ``n`` boxes of each image, in random order.

    Args:
        boxes: B tensors ``(N_i, 4)``.
        n: of each image.
        generators: B, which may be one and the same.

    Returns:
        B tensors of row numbers on the device of the boxes.
    """
    return [
        torch.randperm(len(own), generator=generator)[:n].to(own.device)
        for own, generator in zip(boxes, generators, strict=True)
    ]


def parted_rows(rows: Tensor, boxes: Sequence[Tensor], more: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Split rows of boxes from those of more boxes that came behind those of the same image.

    Args:
        rows: ``(N + M, D)``, of each image first ``boxes``, then ``more``.
        boxes, more: B tensors each, N and M in all.

    Returns:
        ``(N, D)`` and ``(M, D)``.
    """
    parts = rows.split([len(own) for pair in zip(boxes, more, strict=True) for own in pair])
    return torch.cat(parts[::2]), torch.cat(parts[1::2])


def named_labels(names: Sequence[str], pool: Sequence[str], device: torch.device | str = "cpu") -> PseudoLabels:
    """Build labels that are known: all are kept, with the probability 1.

    Args:
        names: of N regions.
        pool: C concepts; a name is the one that differs from it in spelling only.
        device: of the result.

    Raises:
        SupervisionError: a name that is no concept.
    """
    place = {spelling(name): i for i, name in enumerate(pool)}
    if unknown := [name for name in names if spelling(name) not in place]:
        raise SupervisionError(
            f"boxes are called {unknown[0]!r}, which is not among the {len(pool)} "
            f"concepts, such as {list(pool[:5])}: the training data had other classes"
        )
    labels = torch.tensor([place[spelling(name)] for name in names], dtype=torch.int64, device=device)
    return PseudoLabels(one_hot(labels, len(pool)).float(), labels, torch.ones_like(labels, dtype=torch.bool))


def drawn_captions(batch: Batch, template: str, generators: Sequence[torch.Generator]) -> list[str]:
    """Draw one caption for each image: one of its first :data:`CAPTIONS`, or the names in it.

    Args:
        batch: with ``captions``, ``present`` or ``classes``.
        template: the caption of an image without captions; ``{}`` becomes the names that are in it.
        generators: B, which may be one and the same.

    Raises:
        InputError: an image with neither caption nor name.
    """
    chosen = []
    for i, (image_id, generator) in enumerate(zip(batch["image_id"], generators, strict=True)):
        texts = batch["captions"][i][:CAPTIONS] if "captions" in batch else []
        if texts:
            chosen.append(texts[int(torch.randint(len(texts), (), generator=generator))])
        elif names := batch["present"][i] if "present" in batch else batch["queries"][i].names:
            chosen.append(template.replace("{}", ", ".join(names)))
        else:
            raise InputError(
                f"{image_id} has neither a caption nor a name of anything in it; leave it out of the "
                "training images, or give it a caption"
            )
    return chosen


def sentence_numbers(sentences: Sequence[str]) -> Tensor:
    """Number sentences ``(B,)`` int64, equal for equal ones: hashes, so that those of other processes have the same."""
    return torch.tensor([int.from_bytes(blake2b(text.encode(), digest_size=7).digest()) for text in sentences])


def filled_rows(regions: Tensor, pseudo: PseudoLabels, rows: int) -> tuple[Tensor, PseudoLabels]:
    """Fill regions and their labels with rows that are not kept, so that every process has as many.

    Args:
        regions: ``(N, D)``.
        pseudo: their labels.
        rows: at least N.
    """

    def fill(x: Tensor) -> Tensor:
        return torch.cat([x, x.new_zeros(rows - len(x), *x.shape[1:])])

    return fill(regions), PseudoLabels(*(fill(x) for x in (pseudo.probabilities, pseudo.labels, pseudo.kept)))


@dataclass(frozen=True)
class PretrainingStep:
    """Weighted ``terms`` of a batch, ``statistics`` to watch, embeddings of ``images`` and of ``more`` boxes."""

    terms: dict[str, Tensor]
    statistics: dict[str, Tensor]
    images: Tensor
    more: Tensor


log = logging.getLogger(__name__)


class RegionCLIPPretraining(TrainingModule):
    """Region-text pretraining (Zhong et al., "RegionCLIP", CVPR 2022, arXiv 2112.09106).

    A student embeds regions of an image; a teacher, which is the student as it was before, says which concept of a
    pool each of them shows. The student is drawn to the concept, to the teacher's opinion of all concepts, and whole
    images to their captions. What comes out is :meth:`export`: a CLIP that counters start from.

    Args:
        clip: CLIP weights: hub name, folder, file, or a config mapping for random weights. Its image tower is a vision
            transformer or a ResNet.
        pretrained_encoder: a file that :meth:`export` wrote, or ``small``, to go on from; in place of ``clip``'s
            weights.
        tokenizer: folder or hub name; where ``clip`` has one if ``None``. A random-weight CLIP makes its own from
            captions and concepts of its training data.
        stem: ``conv`` puts small convolutions in the place of a ViT's patch embedding, which learn from scratch.
        dense: how a ViT makes patches of its last layer; see :class:`~counting_zoo.nn.regions.ViTRegions`.
        teacher_dense: the same of the teacher, which never saw regions.
        freeze_at: parts of a ResNet that do not train; see :class:`~counting_zoo.nn.regions.ResNetRegions`.
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
        missing_regions: an image that the file of boxes does not name is an ``error``, or has no boxes (``empty``).
        n_regions: boxes of each image, drawn at random where there are more.
        labels: what says which concept a region shows: the ``teacher``, or the names of the data's own ``boxes``,
            which needs no teacher.
        threshold: the teacher's probability above which its label is believed; it depends on the size of the pool.
        fallback: what is kept where no region of a batch passes; see
            :func:`~counting_zoo.models.region_clip.loss.pseudo_labels`.
        temperature: of all cosines.
        weights: of ``region_text``, ``distillation`` and ``image_text``; 1 each. A term of weight 0 is not calculated.
        gather: what sees the images of every process; see
            :func:`~counting_zoo.models.region_clip.loss.pretraining_losses`.
        picture_box: what a ResNet, or a ``conv`` stem, takes for a whole image: the ``picture``, or as the reference
            the ``canvas``, with the padding that a larger image of the batch brings. A class token sees the canvas.
        caption_template: the caption of an image without captions; ``{}`` becomes the names that are in it.
        same_caption: equal captions in a batch are positives of each other (``positive``), or negatives as in the
            reference (``negative``).
        preprocess: geometry of whole images before the model sees them.
        training: those of :class:`~counting_zoo.training.TrainingModule`.
    """

    trains_on: ClassVar[tuple[frozenset[str], ...]] = (frozenset({"captions"}), frozenset({"counts"}))
    pads: ClassVar[bool] = True
    monitored: ClassVar[str] = "val/loss"
    mean: Tensor
    std: Tensor

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
            labels=labels,
            regions=regions,
            concepts=concepts,
            train_text=train_text,
            n_regions=n_regions,
            concept_count=concept_count,
            concept_words=concept_words,
            concept_limit=concept_limit,
            caption_template=caption_template,
            threshold=threshold,
            temperature=temperature,
        )
        check_choices(
            gather=gather,
            same_caption=same_caption,
            picture_box=picture_box,
            fallback=fallback,
            ensemble=ensemble,
            missing_regions=missing_regions,
        )
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
            "min_count": concept_count,
            "max_words": concept_words,
            "limit": concept_limit,
        }
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
        """Build the reference's SGD for a ResNet (arXiv 2112.09106), CLIPSelf's AdamW for a ViT (arXiv 2310.01403).

        A ``conv`` stem, which nobody published, has the AdamW of all models here.
        """
        if isinstance(self.encoder, ResNetRegions):
            return torch.optim.SGD(groups, lr=2e-3, momentum=0.9, weight_decay=1e-4)
        if isinstance(self.encoder, StemRegions):
            return super().default_optimizer(groups)
        return torch.optim.AdamW(groups, lr=1e-5, weight_decay=0.1)

    def default_scheduler(self, optimizer: torch.optim.Optimizer) -> Any:
        """Build the reference's for a ResNet: warm-up, then a tenth of the rate from steps 300000 and 525000 on."""
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
                f"regions are those of the file {self.regions!r}, which do not move along when images are flipped or "
                "cropped; set data.augmentation to null, or regions to 'random'"
            )

    def _embeddings(self, names: list[str]) -> Tensor:
        """Embed names, ``(C, D)``, once where texts do not train, else once in each validation."""
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

    def forward(self, image: Tensor | Sequence[Tensor], boxes: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """Embed boxes ``(N, D)`` and whole images ``(B, D)`` by the student, not normalised.

        Args:
            image: B images ``(3, H_i, W_i)`` in [0, 1] or uint8, of any sizes.
            boxes: B tensors ``(N_i, 4)`` of x1, y1, x2, y2 in pixels.
        """
        images, sizes = self._padded(image)
        return region_and_image_embeddings(self.encoder, images, boxes, self._extents(sizes))

    def _padded(self, images: Tensor | Sequence[Tensor]) -> tuple[Tensor, list[Size]]:
        return padded_images(images, self.mean, self.std, self.encoder.multiple)

    def _extents(self, sizes: list[Size]) -> list[Size] | None:
        return sizes if self.picture_box == "picture" else None

    def _step(
        self,
        batch: Batch,
        pool: list[str],
        generators: Sequence[torch.Generator],
        more: Sequence[Tensor] | None = None,
    ) -> PretrainingStep:
        """Run one pass of the student over a batch: its losses, and embeddings of ``more`` boxes of each image.

        What is drawn for an image is drawn from its generator: boxes of all images first, then captions.
        """
        images, sizes = self._padded(batch["image"])
        boxes, names = self._boxes(batch, sizes, generators)
        if not (self.weights["region_text"] or self.weights["distillation"]):
            boxes, names = [own[:0] for own in boxes], []
        every = boxes if more is None else [torch.cat(both) for both in zip(boxes, more, strict=True)]
        found, whole = region_and_image_embeddings(self.encoder, images, every, self._extents(sizes))
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
            regions,
            pseudo.probabilities,
            pseudo.labels,
            pseudo.kept,
            concepts,
            whole,
            texts,
            captions=same,
            temperature=self.temperature,
            gather=gather,
            all_gather=self._all_gather,
        )
        terms = {name: self.weights[name] * loss for name, loss in losses.items() if self.weights[name]}
        return PretrainingStep(terms, statistics, whole, others)

    def _boxes(
        self, batch: Batch, sizes: list[Size], generators: Sequence[torch.Generator]
    ) -> tuple[list[Tensor], list[str]]:
        """Collect at most ``n_regions`` boxes of each image, and where they are the data's own the name of each."""
        if self.regions == "random":
            each = zip(sizes, generators, strict=True)
            return [random_boxes(size, self.n_regions, own).to(self.device) for size, own in each], []
        if self._source is not None:
            found = self._source(list(batch["image"]), batch["image_id"], sizes=batch.get("original_size"))
            boxes = [proposed.boxes for proposed in found]
        elif "boxes" in batch and "box_labels" in batch:
            boxes = list(batch["boxes"])
        else:
            raise SupervisionError(
                f"regions is 'boxes', and {batch['image_id'][0]} has none; choose data with boxes "
                "in every split, or regions: random"
            )
        chosen = drawn_rows(boxes, self.n_regions, generators)
        names = []
        if self.labels == "boxes":
            for query, labels, kept in zip(batch["queries"], batch["box_labels"], chosen, strict=True):
                names += [query.names[i] for i in labels[kept].tolist()]
        return [own[kept].to(self.device) for own, kept in zip(boxes, chosen, strict=True)], names

    @torch.no_grad()
    def _taught(self, teacher: RegionEncoder, images: Tensor, boxes: list[Tensor], concepts: Tensor) -> PseudoLabels:
        """Label boxes by the teacher; without any it is not asked."""
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
                "(train/distinct_concepts), lower threshold, or give concepts that are in the images"
            )
        return found.terms

    def test_step(self, batch: Batch, batch_idx: int) -> None:
        """Refuse: never reached, see :meth:`setup`; without it Lightning's message would be less helpful."""

    def on_validation_epoch_start(self) -> None:
        datamodule: Any = self.trainer.datamodule  # type: ignore[attr-defined]
        self._validated = list(datamodule.class_names("val"))

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        image_ids, named = batch["image_id"], "boxes" in batch and "box_labels" in batch
        names = concepts_from_classes(self._validated, ()) if named or self.labels == "boxes" else []
        more = [own.to(self.device) for own in batch["boxes"]] if named else None
        pool = names if self.labels == "boxes" else self.concepts
        step = self._step(batch, pool, image_generators(image_ids), more)
        found = step.terms | step.statistics | {"loss": torch.stack(list(step.terms.values())).sum()}
        # An image that evens out the processes counts twice here, and once in the accuracies.
        found = {f"val/{name}": value.float() for name, value in found.items()}
        self.log_dict(found, batch_size=len(image_ids), sync_dist=True)
        if named:
            asked = zip(batch["queries"], batch["box_labels"], strict=True)
            labels = [named_labels([q.names[i] for i in ids.tolist()], names, self.device).labels for q, ids in asked]
            self.accuracy.update(image_ids, step.more, step.images, self._embeddings(names), labels)

    def on_validation_epoch_end(self) -> None:
        with warnings.catch_warnings():
            # A rank without images computes too, or the others would wait for it for ever.
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
