"""The one LightningDataModule base: a reader only says which records each split has."""

from __future__ import annotations

import logging
import math
from abc import abstractmethod
from collections.abc import Sequence
from copy import copy
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, Literal

import lightning as L
import numpy as np
import torch
from torch.utils.data import DataLoader

from counting_zoo.data.checks import OUTSIDE, Checksums, check_duplicates, check_kinds, check_records
from counting_zoo.data.dataset import CountingDataset, EvaluationSampler, TrainingSampler, collate
from counting_zoo.data.records import (
    Record,
    Split,
    ask,
    croppable,
    draw_names,
    merged,
    without_annotation,
)
from counting_zoo.data.transforms import Augmentation
from counting_zoo.errors import InputError, check, listed
from counting_zoo.geometry import Preprocess

Prompts = int | Literal["target", "all"]


log = logging.getLogger(__name__)


class CountingDataModule(L.LightningDataModule):
    """Base of every data module: subclasses implement :meth:`read_split` and nothing else of the pipeline.

    Args:
        root: where the data set lies.
        batch_size: images in a training batch, on each rank.
        eval_batch_size: images handed to evaluation at once; they may differ in size.
        num_workers: loader processes; results do not depend on it.
        augmentation: what is done to training images; ``None`` for nothing.
        prompts: which names are asked about: ``target`` (the first class of an image), ``all`` (every class of the
            data set, in one fixed order), or in training that many: the target, other classes of the image, and at
            least one that is absent; evaluation then asks for the target.
        classes: the names to ask about for images that carry none (predict), and the fixed list for ``all``.
        merge_classes: one name for every object, whatever the annotation calls it, for models that count without
            names; ``None`` keeps the names.
        outside: points outside their image are an ``error``, or ``clamp``ed to its border, or ``drop``ped; what
            was touched is counted and reported.
        missing: an annotated image that is not there is an ``error``, or ``skip``ped and reported.
        duplicates: the same file in two splits is an ``error``, a ``warn``ing, or ``ignore``d.
        checksums: file of the images' SHA-256 sums as ``sha256sum`` writes it, relative to ``root``; every image
            is compared with it when it is read. ``None`` for no comparison.
        constants: the numbers that constant predictors say, such as ``{mean: 49.96, median: 25}``; by default the
            mean and median of the training counts.
        seed: seeds the order and augmentation of training images.

    Raises:
        InputError: a value is out of range.
    """

    layout: ClassVar[str] = ""
    """The files expected below ``root``, as error messages show them."""

    def __init__(
        self,
        root: str | Path | None = None,
        *,
        batch_size: int = 8,
        eval_batch_size: int = 1,
        num_workers: int = 2,
        augmentation: Augmentation | None = None,
        prompts: Prompts = "target",
        classes: list[str] | None = None,
        merge_classes: str | None = None,
        outside: Literal["error", "clamp", "drop"] = "error",
        missing: Literal["error", "skip"] = "error",
        duplicates: Literal["error", "warn", "ignore"] = "error",
        checksums: str | None = None,
        constants: dict[str, float] | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__()
        check("data.batch_size", batch_size, at_least=1)
        check("data.eval_batch_size", eval_batch_size, at_least=1)
        check("data.num_workers", num_workers, at_least=0)
        check("data.outside", outside, one_of=OUTSIDE)
        check("data.missing", missing, one_of=("error", "skip"))
        check("data.duplicates", duplicates, one_of=("error", "warn", "ignore"))
        if prompts not in ("target", "all") and (not isinstance(prompts, int) or prompts < 1):
            raise InputError(f"data.prompts is {prompts!r}; expected 'target', 'all' or a number of at least 1")
        if classes is not None and (not all(name.strip() for name in classes) or len(set(classes)) != len(classes)):
            raise InputError(f"data.classes is {classes}; expected names that are not empty, each once")
        if merge_classes is not None and not merge_classes.strip():
            raise InputError("data.merge_classes is empty; expected a name for every object, such as 'objects'")
        if constants is not None and not all(map(math.isfinite, constants.values())):
            raise InputError(f"data.constants is {constants}; expected finite numbers by name")
        self.root = None if root is None else Path(root).expanduser()
        self.batch_size = batch_size
        self.eval_batch_size = eval_batch_size
        self.num_workers = num_workers
        self.augmentation = augmentation
        self.prompts = prompts
        self.classes = classes
        self.merge_classes = merge_classes
        self.outside = outside
        self.missing = missing
        self.duplicates = duplicates
        self.checksums = checksums
        self.constants = constants
        self.seed = seed
        self._records: dict[str, list[Record]] = {}
        self._checksums: Checksums | None = None
        self._annotated_names: dict[str, list[str]] = {}
        self._asked_names: list[str] | None = None

    # -- what a reader implements ---------------------------------------------------------------------------------

    @abstractmethod
    def read_split(self, split: Split) -> list[Record]:
        """Read every image of a split with its annotation; open no image."""

    def read_bytes(self, record: Record) -> bytes:
        """Read the encoded image of a record."""
        assert record.path is not None, f"{record.image_id}: a record without a path needs its own read_bytes"
        return record.path.read_bytes()

    def read_verified(self, record: Record) -> bytes:
        """Read the encoded image of a record, compared with its checksum where ``data.checksums`` is given.

        Raises:
            ImageError: the image is not what the checksum says.
        """
        data = self.read_bytes(record)
        if self._checksums is not None:
            self._checksums.verify(record, data)
        return data

    def find_root(self, *variants: str, holding: str = ".") -> Path:
        """Find the first of ``root / variant`` that has ``holding`` in it; a reader's first step.

        Args:
            variants: folders below the root that may be meant; ``root`` itself comes first.
            holding: a file or folder that the right one has.

        Raises:
            InputError: no root is given, or none of the folders is right; shows the expected tree and what is there.
        """
        if self.root is not None:
            for folder in (self.root, *(self.root / variant for variant in variants)):
                if (folder / holding).exists():
                    return folder
        if self.root is None:
            found = "data.root is not set"
        elif not self.root.is_dir():
            found = f"data.root is {str(self.root)!r}, which is {'a file' if self.root.exists() else 'not there'}"
        else:
            names = sorted(path.name + "/" * path.is_dir() for path in self.root.iterdir())
            found = f"data.root is {str(self.root)!r}, which holds {listed(names, 20) or 'nothing'}"
        raise InputError(f"{type(self).__name__}: {found}; expected\n{self.layout or holding}")

    # -- what models and reports ask for --------------------------------------------------------------------------

    def records(self, split: Split) -> list[Record]:
        """Return the checked records of a split, read once.

        Raises:
            InputError: the annotation is inconsistent or the split is empty.
        """
        if split not in self._records:
            found = self.read_split(split)
            if split == "predict":
                found = [without_annotation(record) for record in found]
            records = check_records(
                found, split, outside=self.outside, missing=self.missing, source=type(self).__name__
            )
            if not records:
                raise InputError(
                    f"{type(self).__name__}({str(self.root)!r}) has no image in its {split!r} split; "
                    "check data.root, data.missing and the split options"
                )
            if self.checksums is not None:
                if self._checksums is None:
                    self._checksums = Checksums((self.root or Path()) / self.checksums)
                self._checksums.check_listed(records)
            if self.merge_classes is not None:
                records = [merged(record, self.merge_classes) for record in records]
            self._records[split] = records
        return self._records[split]

    @property
    def provides(self) -> frozenset[str]:
        """The batch keys that every training image comes with, such as ``counts``, ``points``, ``boxes``."""
        keys = ("points", "labels", "boxes", "box_labels", "exemplars", "captions", "counts")
        records = self.records("train")
        found = {key for key in keys if all(getattr(record, key) is not None for record in records)}
        return frozenset(found | ({"counts"} if "points" in found else set()))

    def class_names(self, split: Split = "train") -> list[str]:
        """List the class names of a split in a fixed order: ``data.merge_classes`` or ``data.classes`` if given."""
        if self.merge_classes is not None:
            return [self.merge_classes]
        return list(self.annotated_names(split) if self.classes is None else self.classes)

    def annotated_names(self, split: Split) -> list[str]:
        """List every class name that the annotation of a split has, sorted; a reader that knows them overrides this."""
        if split not in self._annotated_names:
            self._annotated_names[split] = sorted({name for record in self.records(split) for name in record.classes})
        return self._annotated_names[split]

    def asked_names(self, split: Split) -> list[str] | None:
        """List the prompts that evaluation asks in every image of a split; ``None`` where they differ by image.

        Under ``prompts: all`` these are the names of training, else the one list that all images share.

        Raises:
            InputError: ``prompts`` is ``all``, the training split cannot be read, and the images have different names.
        """
        if self.prompts != "all":
            return None
        if split == "predict":
            return self.class_names("predict")
        if self._asked_names is None:
            try:
                self._asked_names = self.class_names("train")
            except (InputError, OSError) as error:
                lists = {tuple(record.classes) for record in self.records(split)}
                if len(lists) != 1:
                    raise InputError(
                        "data.prompts is 'all', but the training split, whose names it asks about, cannot be read, and "
                        f"the images of {split} have different names; list the names in data.classes ({error})"
                    ) from error
                self._asked_names = list(lists.pop())
        return list(self._asked_names)

    def choose_names(self, split: Split, record: Record, rng: np.random.Generator | None) -> list[str]:
        """Choose the prompts of an image; ``rng`` draws those of training, ``None`` stands for evaluation."""
        if split == "predict" and not record.classes:
            return list(self.classes or [])
        if self.prompts == "all":
            return self.asked_names(split) or []
        if self.prompts == "target" or rng is None:
            return record.classes[:1]
        return draw_names(record, self.prompts, self.class_names("train"), rng)

    def train_points(self) -> list[np.ndarray]:
        """Return ``(N_i, 2)`` points of every training image, from the annotation alone.

        Raises:
            InputError: the data has no points.
        """
        if "points" not in self.provides:
            raise InputError(f"{type(self).__name__} gives {sorted(self.provides)} for training, but no points")
        return [record.points for record in self.records("train") if record.points is not None]

    def train_sizes(self) -> list[tuple[int, int]]:
        """Return (H, W) of every training image, in the order of :meth:`train_points`.

        Raises:
            InputError: the size of an image is not known.
        """
        sizes = []
        for record in self.records("train"):
            if record.size is None:
                raise InputError(f"{record.image_id}: neither its annotation nor its file says how large the image is")
            sizes.append(record.size)
        return sizes

    def asked_counts(self, split: Split, records: Sequence[Record] | None = None, *, total: bool = False) -> np.ndarray:
        """Count the objects of the names that evaluation asks about in each image: the targets of its scores.

        Args:
            split: whose names are asked about.
            records: images other than the split's.
            total: add the counts of all names up, as for a model that counts without names.

        Returns:
            ``(N, K)`` float64: K is 1, or the number of names under ``prompts: all``; 1 with ``total``. Images
            without annotation have NaN.
        """
        rows = []
        for record in self.records(split) if records is None else records:
            counts = ask(record, self.choose_names(split, record, None)).counts
            rows.append([np.nan] if counts is None or not len(counts) else [counts.sum()] if total else counts)
        return np.array(rows, np.float64)

    def constant_predictors(self, *, total: bool = False) -> dict[str, float | list[float]]:
        """Compute constant predictions from the training counts: the baselines every result is read beside.

        Args:
            total: of the sum over all names, beside which a model is read that counts without names.

        Returns:
            ``data.constants`` if given, else mean and median of the training counts: one number, or one for each name
            under ``prompts: all``. Empty, with the reason logged, where the training split cannot be read.
        """
        if self.constants is not None:
            return {name: float(value) for name, value in self.constants.items()}
        try:
            counts = self.asked_counts("train", total=total)
        except (InputError, OSError, NotImplementedError) as error:
            log.info("no constant predictors, give data.constants to have them: %s", error)
            return {}
        counts = counts[np.isfinite(counts).all(1)]
        if not len(counts):
            return {}
        found = {"mean": counts.mean(0).tolist(), "median": np.median(counts, axis=0).tolist()}
        return {name: values[0] if len(values) == 1 else values for name, values in found.items()}

    # -- Lightning ------------------------------------------------------------------------------------------------

    def setup(self, stage: str) -> None:
        """Read the annotation, so that its errors come before the first step."""
        splits: dict[str, tuple[Split, ...]] = {
            "fit": ("train", "val"),
            "validate": ("val",),
            "test": ("test",),
            "predict": ("predict",),
        }
        for split in splits[stage]:
            check_kinds(self.records(split), f"{type(self).__name__}, {split} split")
        if stage != "predict":
            self.asked_names(splits[stage][0])
        if stage == "fit" and isinstance(self.prompts, int) and self.prompts > len(self.class_names("train")):
            raise InputError(
                f"data.prompts is {self.prompts}, but training knows only the names {self.class_names('train')}; "
                "expected no more than these"
            )
        if stage == "fit" and self.augmentation is not None and all(map(croppable, self.records("train"))):
            rule = self._preprocess()
            self.augmentation.check_sizes([rule.target_size(*size) for size in self.train_sizes()])
        if stage == "fit" and self.duplicates != "ignore":
            check_duplicates(self._separate_splits(), action=self.duplicates)

    def _separate_splits(self) -> dict[str, list[Record]]:
        """Collect the splits that must share no image; one that is validated on purpose counts once."""
        splits = {"train": self.records("train"), "val": self.records("val")}
        validated = {record.path for record in splits["val"]}
        try:
            test = self.read_split("test")
        except (InputError, OSError) as error:
            log.debug("the test split is not looked at for images of the others: %s", error)
            return splits
        return {**splits, "test": [record for record in test if record.path not in validated]}

    def train_dataloader(self) -> DataLoader:
        data = self._dataset("train", training=True)
        sampler = TrainingSampler(data, seed=self.seed, **self._place())
        return self._loader(data, sampler, self.batch_size, training=True)

    def val_dataloader(self) -> DataLoader:
        return self._evaluation_loader("val")

    def test_dataloader(self) -> DataLoader:
        return self._evaluation_loader("test")

    def predict_dataloader(self) -> DataLoader:
        return self._evaluation_loader("predict")

    def _evaluation_loader(self, split: Split) -> DataLoader:
        data = self._dataset(split, training=False)
        fitting = self.trainer is not None and self.trainer.state.fn == "fit"
        sampler = EvaluationSampler(data, even=fitting, **self._place())
        return self._loader(data, sampler, self.eval_batch_size, training=False)

    def evaluation_dataset(
        self,
        split: Split,
        preprocess: Preprocess,
        *,
        tolerate: bool = False,
        records: Sequence[Record] | None = None,
    ) -> CountingDataset:
        """Build the images of a split as evaluation sees them, for counting without a trainer.

        Args:
            split: whose names are asked about.
            preprocess: the model's geometry.
            tolerate: an unreadable image becomes an item with ``failed`` instead of an error.
            records: some of the split's images; all of them if ``None``.
        """
        every = self.records(split)  # reads the checksums too, so before the copy
        source = copy(self)  # what loader processes get; those started by spawn could not be given the trainer
        source.trainer = None
        return CountingDataset(
            every if records is None else records,
            source.read_verified,
            partial(source.choose_names, split),
            preprocess=preprocess,
            outside=self.outside,
            tolerate=tolerate,
        )

    def _dataset(self, split: Split, *, training: bool) -> CountingDataset:
        data = self.evaluation_dataset(split, self._preprocess(), tolerate=split == "predict")
        data.training = training
        data.augmentation = self.augmentation if training else None
        return data

    def _preprocess(self) -> Preprocess:
        """Return the geometry that the model asks for."""
        model = self.trainer.lightning_module if self.trainer is not None else None
        return Preprocess.of(getattr(model, "preprocess", None))

    def _loader(self, data: CountingDataset, sampler: Any, batch_size: int, *, training: bool) -> DataLoader:
        model = self.trainer.lightning_module if self.trainer is not None else None
        return DataLoader(
            data,
            batch_size=batch_size,
            sampler=sampler,
            num_workers=self.num_workers,
            collate_fn=partial(collate, training=training, ragged=getattr(model, "pads", False)),
            pin_memory=torch.cuda.is_available(),
            persistent_workers=self.num_workers > 0,
            drop_last=False,
        )

    def _place(self) -> dict[str, int]:
        trainer = self.trainer
        return {"rank": trainer.global_rank, "world_size": trainer.world_size} if trainer is not None else {}
