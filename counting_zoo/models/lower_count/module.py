"""Lower-Count as a Lightning module: counts of a fixed list of classes, learnt from image-level counts."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar, get_args

import torch
from torch import Tensor

from counting_zoo.errors import InputError
from counting_zoo.geometry import Preprocess
from counting_zoo.images import as_image
from counting_zoo.metrics.counts import reported_counts
from counting_zoo.metrics.detection import PointHits
from counting_zoo.models.lower_count.instances import Instances, Retrieval, proposed_masks, traced_instances
from counting_zoo.models.lower_count.loss import LowerCountLoss, Mean, SpatialNorm, image_uniform, total_count_terms
from counting_zoo.models.lower_count.network import (
    LowerCountConfig,
    LowerCountNet,
    LowerCountOutput,
    build_encoder,
    find_peaks,
    highest_peaks,
    peak_positions,
)
from counting_zoo.models.lower_count.proposals import Proposals
from counting_zoo.module import CountingModule
from counting_zoo.prediction import Prediction
from counting_zoo.queries import known_names
from counting_zoo.types import Batch, CountOutput, Query


class LowerCount(CountingModule):
    """Counts a fixed list of classes, trained on "how many of each" alone, and only up to four.

    Cholakkal, Sun, Khan, Shao: "Object Counting and Instance Segmentation with Image-level Supervision", CVPR 2019.
    The defaults mend what the reference gets wrong; ``load_official`` chooses its behaviour.

    Args:
        encoder: ``resnet50`` (18, 34, 101, 152), ``small`` (from scratch on a CPU), ``auto:`` with a hub name or
            folder, or a config mapping with ``model_type``, for any transformers ``AutoBackbone``.
        pretrained: weights of a ResNet by name: ``imagenet``, a file in torchvision's layout, or ``None``.
        width: of the ``small`` encoder.
        reduction: side of a cell of the maps in pixels.
        classes: the names it counts, in the order of its maps; those of the training data if ``None``.
        limit: the highest count that training tells apart; above it, only "more" is known.
        rank_target: what the count of a class above the limit should reach; ``limit + 1`` if ``None``.
        rank_weight: lambda of the paper.
        spatial_norm: mean of L_sp+ for each class of an image first (``per_class``, paper) or over all peaks at once
            (``pooled``, reference).
        negatives: share of absent classes that the density learns from, drawn anew in each step; all if ``None``.
        negatives_share: absent classes are always learnt from where this share of the batch has them.
        first_stage: epochs without the spatial losses.
        network: options of the network's branches and peaks.
        counted_classes: names whose counts are used; of the others only whether they are present. All if ``None``.
        round_counts: report whole numbers, halves to the even ones, as the reference does.
        clamp_counts: report no counts below zero.
        backbone_lr: learning rate of the encoder as a share of that of the branches; 0.01 in the reference.
        preprocess: 448 x 448 pixels whatever the aspect ratio, as in the reference, if ``None``.
        options: those of :class:`~counting_zoo.module.CountingModule`.

    Raises:
        InputError: options that do not fit.
    """

    config_class: ClassVar[type | None] = LowerCountConfig
    trains_on: ClassVar[tuple[frozenset[str], ...]] = (frozenset({"counts"}),)
    asks_for: ClassVar[frozenset[str]] = frozenset({"names"})
    network: LowerCountNet

    def __init__(
        self,
        encoder: str | dict[str, Any] = "resnet50",
        *,
        pretrained: str | None = None,
        width: int = 32,
        reduction: int = 32,
        classes: list[str] | None = None,
        limit: int = 4,
        rank_target: float | None = None,
        rank_weight: float = 0.1,
        spatial_norm: SpatialNorm = "per_class",
        negatives: float | None = None,
        negatives_share: float = 0.3,
        first_stage: int = 20,
        network: LowerCountConfig | None = None,
        counted_classes: list[str] | None = None,
        round_counts: bool = False,
        clamp_counts: bool = False,
        backbone_lr: float = 0.01,
        preprocess: Preprocess | None = None,
        **options: Any,
    ) -> None:
        rule = Preprocess("warp", 448) if preprocess is None else Preprocess.of(preprocess)
        super().__init__(preprocess=rule, **options)
        self.hparams["preprocess"] = rule.to_dict()
        self.config = self.network_config(network)
        if spatial_norm not in get_args(SpatialNorm):
            raise InputError(f"spatial_norm is {spatial_norm!r}; expected one of {', '.join(get_args(SpatialNorm))}")
        if not isinstance(limit, int) or limit < 0:
            raise InputError(f"limit is {limit}; expected the highest count that is told apart, 4 in the paper")
        if negatives is not None and not 0 <= negatives <= 1:
            raise InputError(f"negatives is {negatives}; expected a share between 0 and 1, or null for all")
        if rank_weight < 0 or (rank_target is not None and rank_target <= 0):
            raise InputError(
                f"rank_weight is {rank_weight} and rank_target {rank_target}; expected a weight of at least 0 and a "
                "count above 0"
            )
        for name, names in (("classes", classes), ("counted_classes", counted_classes)):
            if isinstance(names, str):
                raise InputError(f"{name} is {names!r}; expected a list of names, such as [{names}]")
        if counted_classes is not None and self.config.density_branch == "own":
            warnings.warn(
                "counted_classes with density_branch 'own': nothing teaches the density of the other classes, and they "
                "will count about 0; density_branch 'modulated' derives it from those that are counted",
                stacklevel=2,
            )
        if first_stage < 0 or backbone_lr < 0:
            raise InputError(f"first_stage is {first_stage} and backbone_lr {backbone_lr}; expected at least 0")
        self.loss = LowerCountLoss(limit, rank_target, rank_weight, spatial_norm, negatives, negatives_share)
        self.first_stage, self.backbone_lr = first_stage, backbone_lr
        self.counted_classes = counted_classes
        self.round_counts, self.clamp_counts = round_counts, clamp_counts
        body: Any = build_encoder(encoder, reduction, pretrained, width)
        self.hparams["pretrained"] = None  # the checkpoint brings the weights along
        if (config := getattr(body, "config_dict", None)) is not None:
            self.hparams["encoder"] = config
        self._encoder: tuple[Any, ...] = (body,)  # until the classes are known; a tuple keeps it out of the state dict
        self.reduction = reduction
        self.val_hits, self.test_hits = PointHits(), PointHits()
        self.classes: list[str] | None = None
        if classes is not None:
            self._name_classes(classes)

    def _name_classes(self, classes: list[str]) -> None:
        if len(set(classes)) != len(classes) or not all(name.strip() for name in classes):
            raise InputError(f"classes is {classes}; expected names that are not empty, each once")
        unknown = sorted(set(self.counted_classes or []) - set(classes))
        if unknown:
            raise InputError(f"counted_classes has {unknown}, which are not among the classes {classes}")
        self.classes = self.hparams["classes"] = list(classes)
        if self.default_classes is None:
            self.default_classes = self.hparams["default_classes"] = list(classes)
        self._column = {name: i for i, name in enumerate(classes)}
        self.network = LowerCountNet(self._encoder[0], len(classes), self.config)
        self._encoder = ()

    @property
    def vocabulary(self) -> list[str] | None:
        return self.classes

    @property
    def cell(self) -> int:
        return self.reduction

    def configure_model(self) -> None:
        """Build the branches once the classes are known; averages of weights are made before ``setup``."""
        datamodule: Any = getattr(self.trainer, "datamodule", None)
        if self.classes is None and hasattr(datamodule, "class_names") and (names := datamodule.class_names("train")):
            self._name_classes(names)

    def setup(self, stage: str) -> None:
        if stage == "fit":
            self.check_supervision(
                getattr(self.trainer, "datamodule", None)
            )  # says more than that there are no classes
        self.configure_model()
        if self.classes is None:
            raise InputError("this model has no classes, and the data do not name any: give it model.classes")
        super().setup(stage)

    def on_after_batch_transfer(self, batch: Batch, dataloader_idx: int) -> Batch:
        # Training is told of every name, so that "none" differs from "not said".
        return batch if self.classes is None or self.training else known_names(batch, self.classes)

    def forward(self, images: Tensor, queries: Sequence[Query]) -> LowerCountOutput:
        columns = [self._columns(query.names) for query in queries]
        output = self.network(images)
        if all(row == list(range(len(self._column))) for row in columns):
            return output
        return output.of(torch.tensor(columns, device=images.device))

    def _columns(self, names: Sequence[str]) -> list[int]:
        if self.classes is None:
            raise InputError("this model has no classes yet: give it model.classes, or train it")
        unknown = [name for name in names if name not in self._column]
        if unknown:
            raise InputError(f"{unknown} cannot be counted: this model counts {self.classes} and nothing else")
        return [self._column[name] for name in names]

    # -- losses ---------------------------------------------------------------------------------------------------

    def training_losses(self, batch: Batch) -> dict[str, Tensor]:
        """Compute the losses of all of the model's classes, those that the data does not speak of as unknown."""
        images = batch["image"]
        assert isinstance(images, Tensor), "training images come as one tensor"
        assert self.classes is not None, "setup names them"
        given, rest = batch["counts"], len(self.classes)
        # Names that the model does not know are written to a column of their own, which is cut off.
        columns = torch.tensor([[self._column.get(name, rest) for name in query.names] for query in batch["queries"]])
        counts = given.new_full((len(given), rest + 1), torch.nan)
        counts = counts.scatter_(1, columns.to(given.device), given)[:, :rest]
        whole: Batch = {
            "image": images,
            "image_id": batch["image_id"],
            "queries": [Query(tuple(self.classes))] * len(given),
            "counts": counts,
        }
        return self.losses(self(images, whole["queries"]), whole)

    def losses(self, output: CountOutput, batch: Batch) -> dict[str, Tensor]:
        assert isinstance(output, LowerCountOutput)
        counts = self.loss.seen(batch["counts"])
        wanted = set((self.classes or ()) if self.counted_classes is None else self.counted_classes)
        counted = torch.tensor([[n in wanted for n in query.names] for query in batch["queries"]], device=counts.device)
        spatial = self.current_epoch >= self.first_stage if self._trainer is not None else True
        net = self.network
        peaks = find_peaks(output.class_maps, radius=net.config.radius, above_median=net.config.above_median)
        highest = highest_peaks(output.class_maps, peaks, counts.nan_to_num(0.0), limit=self.loss.limit)
        kept = self._kept(counts, batch["image_id"])
        if output.total_map is not None:
            # Of a class without counts only zeros are known; with them the perceptron learns to give it nothing else.
            kept = counted if kept is None else kept & counted
        terms = self.loss.terms(
            output.class_scores, output.raw_density, highest, counts, spatial=spatial, counted=counted, kept=kept
        )
        if output.total_map is not None:
            terms |= total_count_terms(output.total_map, counts, counted, self.loss)
        return self._whole_batch(terms)

    def _kept(self, counts: Tensor, image_ids: list[str]) -> Tensor | None:
        if self.loss.negatives is None:
            return None
        present = torch.cat([(counts > 0).sum(0), counts.new_tensor([len(counts)])])
        *positive, n = self._summed(present.float())
        step = self.global_step if self._trainer is not None else 0
        drawn = torch.from_numpy(image_uniform(image_ids, counts.shape[1], step)).to(counts.device)
        return self.loss.kept_negatives(torch.stack(positive) / n, drawn)

    def _whole_batch(self, terms: dict[str, Mean]) -> dict[str, Tensor]:
        """Average over the images of all processes, whose gradients DDP averages."""
        n = torch.stack([term.n.float() for term in terms.values()])
        total = self._summed(n)
        world = self.trainer.world_size if self._distributed() else 1
        return {
            name: world * Mean(term.total, count).value()
            for (name, term), count in zip(terms.items(), total, strict=True)
        }

    def _summed(self, values: Tensor) -> Tensor:
        if not (self._distributed() and torch.distributed.is_initialized()):
            return values
        values = values.clone()
        torch.distributed.all_reduce(values)
        return values

    def lr_factor(self, name: str) -> float:
        return self.backbone_lr if name.startswith("network.encoder.") else 1.0

    def default_optimizer(self, groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
        """Build SGD with momentum (reference: config_counting_pascal07.yml)."""
        return torch.optim.SGD(groups, lr=1e-2, momentum=0.9, weight_decay=1e-4)

    def default_scheduler(self, optimizer: torch.optim.Optimizer) -> Any:
        """Halve the rate every 50 epochs (reference: config_counting_pascal07.yml)."""
        return torch.optim.lr_scheduler.StepLR(optimizer, 50, 0.5)

    # -- what is reported -----------------------------------------------------------------------------------------

    def reported(self, counts: Tensor) -> Tensor:
        return reported_counts(counts, self.round_counts, self.clamp_counts)

    def to_prediction(
        self, output: CountOutput, names: list[str], size: tuple[int, int], image_id: str, seen: Tensor
    ) -> Prediction:
        """Convert to plain data; points are the highest peaks of the class maps, as many as were counted."""
        prediction = super().to_prediction(output, names, size, image_id, seen)
        if isinstance(output, LowerCountOutput):
            prediction.points = [p.cpu() for p in self._points(output, size, prediction.extent)]
        return prediction

    def _points(
        self, output: LowerCountOutput, size: tuple[int, int], extent: tuple[float, float] | None
    ) -> list[Tensor]:
        """Find K tensors ``(N_k, 2)`` of x, y in an image of ``size``: the highest peaks, as many as were counted."""
        maps, net = output.class_maps[0].float(), self.network
        peaks = find_peaks(maps[None], radius=net.config.radius, above_median=net.config.above_median)[0]
        cells = extent or maps.shape[-2:]
        scale = maps.new_tensor([size[1] / cells[1], size[0] / cells[0]])
        edge = maps.new_tensor([size[1], size[0]])
        return [torch.minimum(xy * scale, edge) for xy in peak_positions(maps, peaks, output.counts[0])]

    def score_more(self, outputs: list[CountOutput], batch: Batch, split: str) -> None:
        """Score peaks by boxes, which are used here alone."""
        if "boxes" not in batch or "box_labels" not in batch:
            return
        for i, output in enumerate(outputs):
            if not isinstance(output, LowerCountOutput):
                continue  # tiles have densities alone
            size = (int(batch["image"][i].shape[-2]), int(batch["image"][i].shape[-1]))
            points = self._points(output, size, self.extent(output.density[0], size))
            kinds = torch.arange(len(points), device=self.device).repeat_interleave(
                torch.tensor([len(p) for p in points], device=self.device)
            )
            found = (torch.cat(points), kinds, batch["boxes"][i], batch["box_labels"][i])
            self._hits(split).update(*found, image_id=batch["image_id"][i])

    def more_scores(self, split: str) -> dict[str, float]:
        scores = self._hits(split).compute()
        self._hits(split).reset()
        return scores

    def _hits(self, split: str) -> PointHits:
        return self.val_hits if split == "val" else self.test_hits

    # -- instance masks -------------------------------------------------------------------------------------------

    def instances(
        self,
        image: Any,
        names: str | Sequence[str] | None = None,
        *,
        proposals: Tensor | Proposals | str | Path | None = None,
        retrieval: Retrieval | None = None,
        by_count: bool = True,
        together: int = 1,
    ) -> Instances:
        """Find a mask for each object of one image, from the peaks of the class maps (section 3.4 of the paper).

        About half a second for each peak of a ResNet-50 at 448 x 448 on one core.

        Args:
            image: as for :meth:`count`.
            names: of which classes; all of the model's if ``None``.
            proposals: what the masks are chosen from: ``(N, H, W)`` bool in the pixels of the image, a file or folder
                of proposals, or ``None`` for those found in the image itself
                (:func:`~counting_zoo.models.lower_count.proposals.segment_proposals`).
            retrieval: weights and limits; all proposals are looked at if ``None``.
            by_count: as many instances of a class as it is counted; otherwise every peak above the thresholds of
                ``retrieval``, as in the reference.
            together: peaks that are traced back at once.

        Returns:
            Masks in the pixels of the image given; labels index ``names``.

        Raises:
            InputError: an unknown name, no image, or proposals that do not fit it.
        """
        stored, image_id = as_image(image)
        asked = [names] if isinstance(names, str) else list(names or self.default_classes or [])
        masks = proposed_masks(proposals, stored, image_id)
        return self.instances_of(self.preprocess(stored), asked, masks, retrieval, by_count, together)

    def instances_of(
        self,
        seen: Tensor,
        names: list[str],
        masks: Tensor,
        retrieval: Retrieval | None = None,
        by_count: bool = True,
        together: int = 1,
    ) -> Instances:
        """Find :meth:`instances` of a preprocessed image ``(3, h, w)`` uint8, with ``(N, H, W)`` bool masks."""
        rule = retrieval or Retrieval(max_proposals=None)
        training = self.training
        self.eval()
        try:
            return traced_instances(
                self.network,
                seen.to(self.device),
                self._columns(names),
                masks,
                retrieval=rule,
                by_count=by_count,
                together=together,
            )
        finally:
            self.train(training)
