"""What every counting model shares; a subclass says how it counts and what it loses."""

from __future__ import annotations

import json
import math
import warnings
from abc import abstractmethod
from collections.abc import Sequence
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from counting_zoo.class_metrics import ClassCountErrors
from counting_zoo.counter import Counter
from counting_zoo.data.asking import unasked_objects
from counting_zoo.data.records import Split, present_names
from counting_zoo.errors import InputError, NamesError
from counting_zoo.evaluation.intervals import IntervalCalibration, IntervalScores
from counting_zoo.geometry import Preprocess
from counting_zoo.metrics import GAME, CountErrors, PromptErrors
from counting_zoo.prompts import wrong_prompts
from counting_zoo.training import TrainingModule
from counting_zoo.types import Batch, CountOutput


class CountingModule(Counter, TrainingModule):
    """Trains, scores and counts; subclasses implement ``forward`` and :meth:`losses`.

    Args:
        preprocess: geometry of whole pictures before the model sees them; stored in the checkpoint.
        window: side of the square tiles a picture is counted in; ``None`` counts it in one piece.
        stride: distance of neighbouring tiles; the window if ``None``.
        window_batch_size: tiles that go through the network together.
        blend: how overlapping tiles are mixed, ``average`` or the ``official`` sigmoid ramp of CLIP-Count.
        pad: ``minimal`` pads only pictures smaller than a tile; ``official`` pads a stride on the right.
        default_classes: names to count where nobody names any; the training classes where there are few.
        training: those of :class:`~counting_zoo.training.TrainingModule`.
    """

    requires: ClassVar[tuple[frozenset[str], ...]] = (frozenset({"points"}),)
    #: Whether the count depends on the name asked about.
    text_guided: ClassVar[bool] = False

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
        self.val_errors, self.test_errors = CountErrors(), CountErrors()
        self.val_classes, self.test_classes = ClassCountErrors(present_1=True), ClassCountErrors(present_1=True)
        self.val_game, self.test_game = GAME(), GAME()
        self.val_prompts, self.test_prompts = PromptErrors(), PromptErrors()
        self.val_intervals, self.test_intervals = IntervalScores(), IntervalScores()

    # -- what a model implements ----------------------------------------------------------------------------------

    @abstractmethod
    def losses(self, output: CountOutput, batch: Batch) -> dict[str, Tensor]:
        """Named, weighted terms of the loss; their sum is what is minimised."""

    def training_losses(self, batch: Batch) -> dict[str, Tensor]:
        """The terms of one step; override where a stage needs only part of the network."""
        images = batch["image"]
        assert isinstance(images, Tensor), "training pictures come as one tensor"
        return self.losses(self(images, batch["classes"]), batch)

    # -- steps ----------------------------------------------------------------------------------------------------

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        self._score(batch, "val")

    def test_step(self, batch: Batch, batch_idx: int) -> None:
        self._score(batch, "test")

    def on_validation_epoch_end(self) -> None:
        self._log_scores("val")

    def on_test_epoch_end(self) -> None:
        self._log_scores("test")

    def _metrics(self, split: Split) -> tuple[CountErrors, ClassCountErrors, GAME, PromptErrors]:
        if split == "val":
            return self.val_errors, self.val_classes, self.val_game, self.val_prompts
        return self.test_errors, self.test_classes, self.test_game, self.test_prompts

    def _intervals(self, split: Split) -> IntervalScores:
        return self.val_intervals if split == "val" else self.test_intervals

    def _score(self, batch: Batch, split: Split) -> None:
        if "counts" not in batch:
            raise InputError(f"the {split} data of {batch['image_id'][:3]} carry no counts, so nothing can be scored")
        if not batch["image_id"]:
            return  # none of them asked about a name that the model knows
        asked, k = batch["classes"], len(batch["classes"][0])
        extra = wrong_prompts(batch, self._datamodule_names(split)) if self.text_guided and k == 1 else None
        names = asked if extra is None else [a + e for a, e in zip(asked, extra, strict=True)]
        images = batch["image"]
        outputs = self.count_batch(list(images), names, image_ids=batch["image_id"], sizes=batch.get("original_size"))
        assert isinstance(outputs, list)
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
        """Add one output for each picture of a batch, whose pictures may be gone by now, to the scores.

        Args:
            outputs: of the names asked about and then of ``extra``.
            batch: what is known of the pictures.
            sizes: (H, W) of the pictures as the model saw them.
            extra: wrong names that were asked about too, or ``None``.
            split: whose scores.
        """
        errors, classes, game, prompts = self._metrics(split)
        asked = batch["classes"]
        counts = self.reported(torch.cat([o.counts for o in outputs]))  # (B, K [+ 3])
        target = batch["counts"].sum(1, keepdim=True) if self.class_blind else batch["counts"]
        errors.update(counts[:, : target.shape[1]], target, batch["image_id"])
        bounds = [bounds for output in outputs if (bounds := self.interval(output)) is not None]
        if bounds:
            self._intervals(split).update(torch.cat(bounds)[:, : target.shape[1]], target, batch["image_id"])
        if target.shape[1] > 1 and asked[0] == (classes.classes or asked[0]) and len({tuple(n) for n in asked}) == 1:
            classes.classes = list(asked[0])
            classes.update(counts[:, : target.shape[1]], target, batch["image_id"])
        if "points" in batch and "labels" in batch:
            density = [o.density[0, : target.shape[1]] for o in outputs]
            labels = None if self.class_blind else batch["labels"]
            extents = [self.extent(d, size) for d, size in zip(density, sizes, strict=True)]
            game.update(density, batch["points"], sizes, batch["image_id"], labels=labels, extents=extents)
        self.score_more(outputs, batch, split)
        if extra is not None:
            own = torch.tensor([[name == a[0] for name in e] for a, e in zip(asked, extra, strict=True)])
            wrong = counts[:, 1:4].masked_fill(own.to(counts.device), math.nan)
            prompts.update(batch["image_id"], counts[:, 0], batch["counts"][:, 0], *wrong.unbind(1))

    def _log_scores(self, split: Split) -> None:
        errors, classes, game, prompts = self._metrics(split)
        constants = self._constants(split)
        errors.constants = {f"train_{name}": value for name, value in constants.items()}
        classes.constants = dict(errors.constants)
        with warnings.catch_warnings():
            # A rank without pictures computes too, or the others would wait for it for ever.
            warnings.filterwarnings("ignore", message=".*compute.*before.*update.*")
            scores = prompts.compute() | game.compute() | classes.compute() | errors.compute() | self.more_scores(split)
            if self.interval_calibration is not None:
                scores |= self._intervals(split).compute() | {"interval_level": self.interval_calibration.level}
        self.log_dict({f"{split}/{name}": float(value) for name, value in scores.items() if not name.startswith("n_")})
        for metric in (errors, classes, game, prompts, self._intervals(split)):
            metric.reset()
        classes.classes = None

    def score_more(self, outputs: list[CountOutput], batch: Batch, split: Split) -> None:
        """Keep what a model's own scores need of a batch, one output for each picture."""

    def more_scores(self, split: Split) -> dict[str, float]:
        """A model's own scores of a split, which they then forget; all processes call it."""
        return {}

    def _constants(self, split: Split) -> dict[str, float | list[float]]:
        """What constant predictors say, of the names that this model is scored on."""
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
        if changed := self._changed(checkpoint.get("hyper_parameters", {})):
            self.drop_intervals(f"settings than it is loaded with ({', '.join(changed)})")

    def _changed(self, stored: dict[str, Any]) -> list[str]:
        """Settings that differ from those of a checkpoint, among those that may change a count."""
        settings = set(stored) & set(self.hparams) - _NOT_COUNTING
        return sorted(name for name in settings if _as_text(stored[name]) != _as_text(self.hparams[name]))

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
        if stage == "fit" and hasattr(datamodule, "class_names") and self.default_classes is None:
            known = datamodule.class_names("train")
            if self.class_blind or not self.text_guided or len(known) == 1:
                self.default_classes = self.hparams["default_classes"] = list(known)

    def _warn_of_names(self, datamodule: Any, split: Split) -> None:
        """A model without names counts every object it sees, so all of them must be asked about."""
        asked = datamodule.asked_counts(split, total=True)[:, 0]
        left_out, every = unasked_objects(datamodule.records(split), asked)
        if left_out > 0:
            warnings.warn(
                f"{type(self).__name__} counts without names, but {left_out:.0f} of {every:.0f} objects "
                f"in the {split} pictures have names that are not asked about, so counting them is taken for an error; "
                "use --data.merge_classes objects to give all of them one name",
                stacklevel=2,
            )

    def _check_names(self, datamodule: Any, stage: str) -> None:
        """A model with a fixed list of names is used on those that it shares with the data."""
        if self.vocabulary is None:
            return
        splits: dict[str, tuple[Split, ...]] = {
            "fit": ("train", "val"), "validate": ("val",), "test": ("test",), "predict": ("predict",),
        }  # fmt: skip
        for split in splits[stage]:
            asked = list(datamodule.class_names(split))
            left_out = [name for name in asked if name not in self.vocabulary]
            if asked and len(left_out) == len(asked):
                raise NamesError(
                    f"{type(self).__name__} counts {_some(self.vocabulary)} and nothing else, and the {split} pictures "
                    f"of {type(datamodule).__name__} are asked about {_some(asked)}: no name in common. Train it on "
                    "data with these names, or rename the data's"
                )
            if split == "train" and (unseen := [name for name in self.vocabulary if name not in asked]):
                warnings.warn(
                    f"{len(unseen)} of the {len(self.vocabulary)} classes of the model are not among the names of the "
                    f"training pictures, so nothing is learnt of them: {_some(unseen)}",
                    stacklevel=2,
                )
            if left_out and split == "train":
                where = {name: r.image_id for r in reversed(datamodule.records(split)) for name in present_names(r)}
                places = [f"{name!r} (in {where[name]})" if name in where else repr(name) for name in left_out]
                raise NamesError(
                    f"the training pictures of {type(datamodule).__name__} name {_some(places)}, which is not among "
                    f"the classes of the model, {_some(self.vocabulary)}; correct the annotation, leave them out of "
                    "the data, or train a model of all these names (without model.classes)"
                )
            if left_out:
                warnings.warn(
                    f"{type(self).__name__} does not know {len(left_out)} of the {len(asked)} names of the {split} "
                    f"pictures, and they are left out: {_some(left_out)}",
                    stacklevel=2,
                )


_NOT_COUNTING = {"window_batch_size", "default_classes", "non_finite", "decay", "tokenizer"}
"""Settings that change no count."""


def _as_text(value: Any) -> str:
    """The same for lists and tuples, of which YAML knows only the first."""
    return json.dumps(value, sort_keys=True, default=str)


def _some(names: Sequence[str], n: int = 12) -> str:
    return ", ".join(names[:n]) + (f" and {len(names) - n} more" if len(names) > n else "")


__all__ = ["CountingModule"]
