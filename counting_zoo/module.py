"""The LightningModule base of every counting model: counting, training, scoring and its recipe."""

from __future__ import annotations

import json
import math
import warnings
from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from counting_zoo.data.records import Split, present_names, unasked_objects
from counting_zoo.errors import InputError, NamesError, listed
from counting_zoo.geometry import Preprocess, boxes_inside
from counting_zoo.images import as_image, as_uint8_array
from counting_zoo.metrics.counts import CountTable, PromptErrors, grid_errors
from counting_zoo.metrics.intervals import IntervalCalibration
from counting_zoo.ops import peak_points
from counting_zoo.prediction import Prediction
from counting_zoo.queries import check_data, check_query, wrong_prompts
from counting_zoo.tiling import count_images
from counting_zoo.training import TrainingModule
from counting_zoo.types import Batch, CountOutput, Query


class CountingModule(TrainingModule):
    """The base of every counter: it counts, trains and scores; a model implements ``forward`` and :meth:`losses`.

    Args:
        preprocess: geometry of whole images before the model sees them; stored in the checkpoint.
        window: side of the square tiles an image is counted in; ``None`` counts it in one piece.
        stride: distance of neighbouring tiles; the window if ``None``.
        window_batch_size: tiles that go through the network together.
        blend: how overlapping tiles are mixed, ``average`` or the ``official`` sigmoid ramp of CLIP-Count.
        pad: ``minimal`` pads only images smaller than a tile; ``official`` pads a stride on the right.
        default_classes: names to count where nobody names any; the training classes where there are few.
        training: those of :class:`~counting_zoo.module.TrainingModule`.
    """

    trains_on: ClassVar[tuple[frozenset[str], ...]] = (frozenset({"points"}),)
    #: Parts of a query that the model cannot do without: ``names``, ``exemplars``, both or none of them.
    asks_for: ClassVar[frozenset[str]] = frozenset()
    #: Parts of a query that it uses where they are given: ``exemplars``, ``negatives``.
    accepts: ClassVar[frozenset[str]] = frozenset()
    #: Whether the count depends on the text of the name.
    text_guided: ClassVar[bool] = False
    #: Whether the model counts without names: K is 1 and it is scored on the sum over all names.
    class_blind: ClassVar[bool] = False
    #: Whether the head predicts a distribution over counts, so that outputs have a variance.
    predicts_distribution: bool = False
    #: Errors of counts on validation images (:func:`counting_zoo.calibrate`); kept in checkpoints.
    interval_calibration: IntervalCalibration | None = None

    def __init__(
        self,
        *,
        preprocess: Preprocess | None = None,
        window: int | None = None,
        stride: int | None = None,
        window_batch_size: int = 16,
        blend: Literal["average", "official"] = "average",
        pad: Literal["minimal", "official"] = "minimal",
        default_classes: list[str] | None = None,
        **training: Any,
    ) -> None:
        super().__init__(**training)
        if stride is not None and (window is None or not 0 < stride <= window):
            raise InputError(f"stride is {stride} with window {window}; expected 0 < stride <= window")
        self.preprocess = Preprocess.of(preprocess)
        self.window, self.stride, self.window_batch_size = window, stride, window_batch_size
        self.blend, self.pad = blend, pad
        self.default_classes = default_classes
        self.train_classes: list[str] = []
        self.val_counts, self.test_counts = CountTable(), CountTable()
        self.val_prompts, self.test_prompts = PromptErrors(), PromptErrors()

    # -- what a model implements ----------------------------------------------------------------------------------

    @abstractmethod
    def forward(self, images: Tensor, queries: Sequence[Query]) -> CountOutput:
        """Count in ``(B, 3, H, W)`` images in [0, 1] what B queries of K names each ask; normalise inside."""

    @abstractmethod
    def losses(self, output: CountOutput, batch: Batch) -> dict[str, Tensor]:
        """Compute named, weighted terms of the loss; their sum is what is minimised."""

    def training_losses(self, batch: Batch) -> dict[str, Tensor]:
        """Compute the terms of one step; override where a stage needs only part of the network."""
        images = batch["image"]
        assert isinstance(images, Tensor), "training images come as one tensor"
        return self.losses(self(images, batch["queries"]), batch)

    @property
    def cell(self) -> int:
        """Pixels along one side of a density cell, which tiles must be multiples of."""
        return 1

    @property
    def vocabulary(self) -> list[str] | None:
        """The only names it can count; ``None`` where there is no such list."""
        return None

    def prompts_of(self, name: str) -> list[str]:
        """Write a name into the texts that are embedded for it."""
        return [name]

    def encode_exemplars(self, image: Tensor, boxes: Tensor) -> Tensor:
        """Encode ``(E, 4)`` example boxes of one image ``(3, H, W)`` to ``(E, D)`` features.

        Raises:
            InputError: the model cannot be asked by examples that are encoded beforehand, as tiles need.
        """
        raise InputError(
            f"{type(self).__name__} cannot encode examples by themselves, so it cannot count in tiles by them; set "
            "window to 0"
        )

    def reported(self, counts: Tensor) -> Tensor:
        """Post-process counts for reporting (identity by default; a model may round or clamp)."""
        return counts

    def uses(self, part: str) -> bool:
        """Tell if a part of a query (``names``, ``exemplars``, ``negatives``) changes the count."""
        return part in self.asks_for | self.accepts

    # -- counting -------------------------------------------------------------------------------------------------

    def interval(self, output: CountOutput) -> Tensor | None:
        """Bound the true counts: ``(B, K, 2)`` float64 low and high on the CPU; ``None`` if not calibrated."""
        calibration = self.interval_calibration
        if calibration is None:
            return None
        deviation = output.deviation if calibration.width == "bins" else None
        spread = None if deviation is None else deviation.detach().cpu().numpy()
        counts = self.reported(output.counts).detach().cpu().numpy()
        return torch.from_numpy(calibration.bounds(counts, spread))

    def extent(self, density: Tensor, size: tuple[int, int]) -> tuple[float, float] | None:
        """Measure height and width of an image in the cells of its density, whose last ones may reach beyond it.

        Args:
            density: ``(..., h, w)``.
            size: (H, W) of the image as the model saw it.

        Returns:
            ``(H / cell, W / cell)`` for a density of ``ceil(H / cell) x ceil(W / cell)`` cells, and ``None`` for
            every other one: it covers exactly the image.
        """
        (height, width), cell = size, self.cell
        if cell == 1 or tuple(density.shape[-2:]) != (-(-height // cell), -(-width // cell)):
            return None
        return height / cell, width / cell

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
        """Count in whole images, in tiles where the recipe or the arguments say so.

        Args:
            images: B images ``(3, H_i, W_i)`` of any size, uint8 or float in [0, 1].
            queries: B queries.
            window, stride: override the recipe's; a window of 0 is none.
            image_ids, sizes: ids of the images and (H, W) as they are stored, for models whose boxes come from a file.

        Returns:
            One output of batch 1 for each image.

        Raises:
            QueryError: an image lacks a part of its query that the model cannot do without.
        """
        ids = [f"image {i}" for i in range(len(images))] if image_ids is None else image_ids
        for image_id, query in zip(ids, queries, strict=True):
            check_query(self, query, image_id)
        return count_images(self, images, queries, window, stride)

    @torch.inference_mode()
    def count(
        self,
        images: Any,
        names: str | Sequence[str] | None = None,
        *,
        exemplars: Any = None,
        negatives: Sequence[str] = (),
        window: int | None = None,
        stride: int | None = None,
    ) -> Any:
        """Count in images as people have them.

        Args:
            images: a path, PIL image, ``(H, W[, C])`` array or ``(3, H, W)`` tensor, or a list of these.
            names: class names or prompts; the model's default classes if ``None``.
            exemplars: ``(E, 4)`` example boxes x1, y1, x2, y2 of the first name, in pixels of the image; for a list of
                images a list with the boxes of each.
            negatives: names that must not be counted, for models that compare names.
            window, stride: override the recipe's; a window of 0 is none.

        Returns:
            One :class:`~counting_zoo.prediction.Prediction`, or a list for a list. It has an interval where the model
            is calibrated and neither window nor stride differs from the recipe's, which it was calibrated with.

        Raises:
            InputError: no name, an empty name, boxes without area, or something that is no image.
            QueryError: the model cannot do without examples, or cannot use what it is given.
            ImageError: a file that cannot be read.
        """
        asked = [names] if isinstance(names, str) else list(names) if names is not None else self.default_classes
        if not asked and "names" not in self.asks_for:
            asked = ["objects"]
        if not asked:
            raise InputError("no name to count: count(image, ['apples', ...]); this model has no default classes")
        if len(set(asked)) != len(asked):
            raise InputError(f"a name is asked about twice: {asked}")
        many = isinstance(images, list | tuple)
        sources = list(images) if many else [images]
        boxes = [None] * len(sources) if exemplars is None else list(exemplars) if many else [exemplars]
        if len(boxes) != len(sources):
            raise InputError(f"exemplars hold boxes of {len(boxes)} images for {len(sources)} images; give one of each")
        training = self.training
        if training:
            self.eval()
        try:
            predictions = []
            for source, shown in zip(sources, boxes, strict=True):
                image, image_id = as_image(source)  # (3, H, W) uint8
                size, seen = (image.shape[1], image.shape[2]), self.preprocess(image)
                examples = None if shown is None else boxes_inside(shown, size, (seen.shape[1], seen.shape[2]))
                query = Query(tuple(asked), exemplars=examples, negatives=tuple(negatives))
                output = self.count_images([seen], [query], window, stride, image_ids=[image_id], sizes=[size])[0]
                predictions.append(self.to_prediction(output, asked, size, image_id, seen))
                if not torch.isfinite(predictions[-1].counts).all():
                    warnings.warn(
                        f"{image_id}: the count is not finite ({predictions[-1].counts.tolist()}); the image or the "
                        "weights hold values that are not, or too large ones",
                        stacklevel=2,
                    )
        finally:
            if training:
                self.train()
        if window not in (None, self.window or 0) or stride not in (None, self.stride or self.window):
            for prediction in predictions:
                prediction.interval = None
        return predictions if many else predictions[0]

    def to_prediction(
        self, output: CountOutput, names: list[str], size: tuple[int, int], image_id: str, seen: Tensor
    ) -> Prediction:
        """Bring one image's output to the CPU as plain data; points are density peaks.

        Args:
            output: of batch 1.
            names: the names asked about.
            size: (H, W) of the image given, which the points are in pixels of.
            image_id: what the image is called.
            seen: ``(3, h, w)`` image as the model saw it.
        """
        density = output.density[0].float()
        extent = self.extent(density, (seen.shape[1], seen.shape[2]))
        interval = self.interval(output)
        return Prediction(
            counts=self.reported(output.counts)[0].cpu(),
            names=list(names) if len(density) == len(names) else [" + ".join(names)],
            density=density.cpu(),
            points=[p.cpu() for p in peak_points(density, size, extent=extent)],
            interval=None if interval is None else interval[0].float(),
            image_id=image_id,
            image=as_uint8_array(seen),
            size=size,
            extent=extent,
        )

    def predict_step(self, batch: Batch, batch_idx: int) -> list[Prediction]:
        if not batch["image_id"]:
            return []
        queries = [q if q.names else replace(q, names=tuple(self.default_classes or ())) for q in batch["queries"]]
        if not all(query.names for query in queries):
            raise InputError(
                f"no name to count in {batch['image_id'][0]!r}: name it with --data.classes '[apples]'; this model "
                "has no default classes"
            )
        images = list(batch["image"])
        sizes = batch.get("original_size") or [(int(i.shape[-2]), int(i.shape[-1])) for i in images]
        outputs = self.count_images(images, queries, image_ids=batch["image_id"], sizes=sizes)
        return [
            self.to_prediction(output, list(query.names), size, image_id, image)
            for output, query, size, image_id, image in zip(
                outputs, queries, sizes, batch["image_id"], images, strict=True
            )
        ]

    # -- steps ----------------------------------------------------------------------------------------------------

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        self._score(batch, "val")

    def test_step(self, batch: Batch, batch_idx: int) -> None:
        self._score(batch, "test")

    def on_validation_epoch_end(self) -> None:
        self._log_scores("val")

    def on_test_epoch_end(self) -> None:
        self._log_scores("test")

    def _metrics(self, split: Split) -> tuple[CountTable, PromptErrors]:
        return (self.val_counts, self.val_prompts) if split == "val" else (self.test_counts, self.test_prompts)

    def _score(self, batch: Batch, split: Split) -> None:
        if "counts" not in batch:
            raise InputError(f"the {split} data of {batch['image_id'][:3]} carry no counts, so nothing can be scored")
        if not batch["image_id"]:
            return  # none of them asked about a name that the model knows
        queries, k = batch["queries"], len(batch["queries"][0].names)
        extra = wrong_prompts(batch, self._datamodule_names(split)) if self.text_guided and k == 1 else None
        if extra is not None:
            queries = [replace(q, names=(*q.names, *wrong)) for q, wrong in zip(queries, extra, strict=True)]
        images = batch["image"]
        outputs = self.count_images(
            list(images), queries, image_ids=batch["image_id"], sizes=batch.get("original_size")
        )
        sizes = [(int(i.shape[-2]), int(i.shape[-1])) for i in images]
        self.tally(outputs, batch, sizes, extra, split)

    def tally(
        self,
        outputs: list[Any],
        batch: Batch,
        sizes: list[tuple[int, int]],
        extra: list[list[str]] | None,
        split: Split,
    ) -> None:
        """Add one output for each image of a batch, whose images may be gone by now, to the scores.

        Args:
            outputs: of the names asked about and then of ``extra``.
            batch: what is known of the images.
            sizes: (H, W) of the images as the model saw them.
            extra: wrong names that were asked about too, or ``None``.
            split: whose scores.
        """
        table, prompts = self._metrics(split)
        table.update(batch["image_id"], **self.table_columns(outputs, batch, sizes))
        self.score_more(outputs, batch, split)
        if extra is not None:
            counts = self.reported(torch.cat([o.counts for o in outputs]))  # (B, 1 + 3)
            asked = [query.names for query in batch["queries"]]
            own = torch.tensor([[name == a[0] for name in e] for a, e in zip(asked, extra, strict=True)])
            wrong = counts[:, 1:4].masked_fill(own.to(counts.device), math.nan)
            prompts.update(batch["image_id"], counts[:, 0], batch["counts"][:, 0], *wrong.unbind(1))

    def table_columns(self, outputs: list[CountOutput], batch: Batch, sizes: list[tuple[int, int]]) -> dict[str, Any]:
        """Compare outputs with the truth: the arguments of :meth:`CountTable.update` behind the image ids.

        Args:
            outputs: one for each image, of the names asked about and perhaps of more.
            batch: what is known of the images.
            sizes: (H, W) of the images as the model saw them.
        """
        names = [list(query.names) for query in batch["queries"]]
        target = batch["counts"]
        if self.class_blind:
            names, target = [[" + ".join(own)] for own in names], target.sum(1, keepdim=True)
        k = target.shape[1]
        bounds = [bounds[:, :k] for output in outputs if (bounds := self.interval(output)) is not None]
        deviations = [output.deviation[:, :k] for output in outputs if output.deviation is not None]
        game = None
        if "points" in batch and "labels" in batch:
            grids = []
            for i, (output, size) in enumerate(zip(outputs, sizes, strict=True)):
                density, labels = output.density[0, :k], None if self.class_blind else batch["labels"][i]
                grids.append(grid_errors(density, batch["points"][i], size, labels, self.extent(density, size)))
            game = torch.stack(grids)
        return {
            "names": names,
            "predicted": self.reported(torch.cat([output.counts[:, :k] for output in outputs])),
            "target": target,
            "game": game,
            "interval": torch.cat(bounds) if bounds else None,
            "deviation": torch.cat(deviations) if deviations else None,
        }

    def _log_scores(self, split: Split) -> None:
        table, prompts = self._metrics(split)
        table.constants = {f"train_{name}": value for name, value in self._constants(split).items()}
        with warnings.catch_warnings():
            # A rank without images computes too, or the others would wait for it for ever.
            warnings.filterwarnings("ignore", message=".*compute.*before.*update.*")
            scores = prompts.compute() | table.compute() | self.more_scores(split)
        if split == "val" and not math.isfinite(scores.get("mae", 0.0)) and scores.get("n"):
            raise FloatingPointError(
                f"counts of validation images are not finite at step {self.global_step}: val/mae is "
                f"{scores['mae']}, which is no score, and no checkpoint is written of these weights. Lower the "
                "learning rate, clip gradients, or start again from the last checkpoint before"
            )
        if self.interval_calibration is not None:
            scores["interval_level"] = self.interval_calibration.level
        self.log_dict({f"{split}/{name}": float(value) for name, value in scores.items() if not name.startswith("n_")})
        table.reset()
        prompts.reset()

    def score_more(self, outputs: list[CountOutput], batch: Batch, split: Split) -> None:
        """Keep what a model's own scores need of a batch, one output for each image."""

    def more_scores(self, split: Split) -> dict[str, float]:
        """Compute a model's own scores of a split and forget their state; all processes call it."""
        return {}

    def _constants(self, split: Split) -> dict[str, float | list[float]]:
        """Collect the constant predictions of the names that this model is scored on."""
        datamodule: Any = getattr(self.trainer, "datamodule", None)
        if not hasattr(datamodule, "constant_predictors"):
            return {}
        constants = datamodule.constant_predictors(total=self.class_blind)
        if self.vocabulary is None or not any(isinstance(value, list) for value in constants.values()):
            return constants
        asked = datamodule.asked_names(split) or []
        kept = [k for k, name in enumerate(asked) if name in self.vocabulary]
        return {name: [value[k] for k in kept] for name, value in constants.items()}

    def _datamodule_names(self, split: str) -> list[str]:
        datamodule: Any = getattr(self.trainer, "datamodule", None)
        return list(datamodule.class_names(split)) if hasattr(datamodule, "class_names") else []

    # -- intervals ------------------------------------------------------------------------------------------------

    def drop_intervals(self, changed: str) -> None:
        """Forget how far counts are off, with a warning, where something has changed that they depend on."""
        if self.interval_calibration is None:
            return
        warnings.warn(
            f"the intervals of this model were calibrated with other {changed}, and are dropped; calibrate it again "
            "(counting-zoo calibrate)",
            stacklevel=3,
        )
        self.interval_calibration = None

    def on_fit_start(self) -> None:
        super().on_fit_start()
        self.drop_intervals("weights than those that training now gives it")

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_save_checkpoint(checkpoint)
        if self.interval_calibration is not None:
            checkpoint["counting_zoo"]["intervals"] = self.interval_calibration.to_dict()

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_load_checkpoint(checkpoint)
        stored = checkpoint["counting_zoo"].get("intervals")
        self.interval_calibration = None if stored is None else IntervalCalibration.from_dict(stored)
        if changed := self._changed(self.nested(checkpoint.get("hyper_parameters", {}))):
            self.drop_intervals(f"settings than it is loaded with ({', '.join(changed)})")

    def _changed(self, stored: dict[str, Any]) -> list[str]:
        """List the settings that differ from those of a checkpoint, among those that may change a count."""
        settings = set(stored) & set(self.hparams) - _NOT_COUNTING
        return sorted(name for name in settings if _as_text(stored[name]) != _as_text(self.hparams[name]))

    # -- text-guided models ---------------------------------------------------------------------------------------

    def read_facts(self, datamodule: Any) -> None:
        if not self.text_guided:
            return
        self.train_classes = list(datamodule.class_names("train")) if hasattr(datamodule, "class_names") else []
        if self.text_tower is not None and self.text_tower.tokenizer is None:
            self.make_tokenizer([prompt for name in self.train_classes for prompt in self.prompts_of(name)])

    def on_validation_start(self) -> None:
        self._warn_untrained()

    def on_test_start(self) -> None:
        self._warn_untrained()

    def on_predict_start(self) -> None:
        self._warn_untrained()

    def _warn_untrained(self) -> None:
        """Warn of weights as initialised; ``setup`` would be too early, before the trainer restores a checkpoint."""
        if self.text_guided and self.text_tower is not None and self.text_tower.tokenizer is None:
            warnings.warn(
                f"this {type(self).__name__} has random weights and was never trained: its counts mean nothing. Give "
                "it a checkpoint (--ckpt_path) or CLIP weights (--model.clip, a hub name or folder)",
                stacklevel=2,
            )
            self.make_tokenizer([])

    def recipe(self) -> dict[str, Any]:
        return super().recipe() | ({"train_classes": self.train_classes} if self.text_guided else {})

    def restore_recipe(self, recipe: dict[str, Any]) -> None:
        super().restore_recipe(recipe)
        self.train_classes = list(recipe.get("train_classes", []))

    # -- set-up ---------------------------------------------------------------------------------------------------

    def setup(self, stage: str) -> None:
        datamodule: Any = getattr(self.trainer, "datamodule", None)
        if self.class_blind and hasattr(datamodule, "asked_counts"):
            splits: dict[str, tuple[Split, ...]] = {"fit": ("train", "val"), "validate": ("val",), "test": ("test",)}
            for split in splits.get(stage, ()):
                self._warn_of_names(datamodule, split)
        if hasattr(datamodule, "class_names"):
            self._check_names(datamodule, stage)
        super().setup(stage)
        if hasattr(datamodule, "records"):
            splits = {"fit": ("train", "val"), "validate": ("val",), "test": ("test",), "predict": ("predict",)}
            for split in splits[stage]:
                check_data(self, datamodule, split)
        if stage == "fit" and hasattr(datamodule, "class_names") and self.default_classes is None:
            known = datamodule.class_names("train")
            if self.class_blind or not self.text_guided or len(known) == 1:
                self.default_classes = self.hparams["default_classes"] = list(known)

    def _warn_of_names(self, datamodule: Any, split: Split) -> None:
        """Warn where a class-blind model counts objects whose names are not asked about."""
        asked = datamodule.asked_counts(split, total=True)[:, 0]
        left_out, every = unasked_objects(datamodule.records(split), asked)
        if left_out > 0:
            warnings.warn(
                f"{type(self).__name__} counts without names, but {left_out:.0f} of {every:.0f} objects "
                f"in the {split} images have names that are not asked about, so counting them is taken for an error; "
                "use --data.merge_classes objects to give all of them one name",
                stacklevel=2,
            )

    def _check_names(self, datamodule: Any, stage: str) -> None:
        """Check that a model with a fixed list of names shares some of them with the data."""
        if self.vocabulary is None:
            return
        splits: dict[str, tuple[Split, ...]] = {
            "fit": ("train", "val"),
            "validate": ("val",),
            "test": ("test",),
            "predict": ("predict",),
        }
        for split in splits[stage]:
            asked = list(datamodule.class_names(split))
            left_out = [name for name in asked if name not in self.vocabulary]
            if asked and len(left_out) == len(asked):
                raise NamesError(
                    f"{type(self).__name__} counts {listed(self.vocabulary)} and nothing else, and the {split} images "
                    f"of {type(datamodule).__name__} are asked about {listed(asked)}: no name in common. Train it on "
                    "data with these names, or rename the data's"
                )
            if split == "train" and (unseen := [name for name in self.vocabulary if name not in asked]):
                warnings.warn(
                    f"{len(unseen)} of the {len(self.vocabulary)} classes of the model are not among the names of the "
                    f"training images, so nothing is learnt of them: {listed(unseen)}",
                    stacklevel=2,
                )
            if left_out and split == "train":
                where = {name: r.image_id for r in reversed(datamodule.records(split)) for name in present_names(r)}
                places = [f"{name!r} (in {where[name]})" if name in where else repr(name) for name in left_out]
                raise NamesError(
                    f"the training images of {type(datamodule).__name__} name {listed(places)}, which is not among "
                    f"the classes of the model, {listed(self.vocabulary)}; correct the annotation, leave them out of "
                    "the data, or train a model of all these names (without model.classes)"
                )
            if left_out:
                warnings.warn(
                    f"{type(self).__name__} does not know {len(left_out)} of the {len(asked)} names of the {split} "
                    f"images, and they are left out: {listed(left_out)}",
                    stacklevel=2,
                )


_NOT_COUNTING = {"window_batch_size", "default_classes", "non_finite", "max_skipped_steps", "decay", "tokenizer"}
"""Settings that change no count."""


def _as_text(value: Any) -> str:
    """Print a setting; lists and tuples, of which YAML knows only the first, print alike."""
    return json.dumps(value, sort_keys=True, default=str)
