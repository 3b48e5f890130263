"""The one LightningDataModule base: a reader only says which records each split has."""

from __future__ import annotations

from abc import abstractmethod
from functools import partial
from pathlib import Path
from typing import Any, Literal

import lightning as L
import numpy as np
import torch
from torch.utils.data import DataLoader

from counting_zoo.data.checks import check_duplicates, check_records
from counting_zoo.data.dataset import CountingDataset, collate
from counting_zoo.data.records import Record, Split
from counting_zoo.data.sampling import EvaluationSampler, TrainingSampler
from counting_zoo.data.transforms import Augmentation
from counting_zoo.errors import InputError
from counting_zoo.geometry import Preprocess

Prompts = int | Literal["target", "all"]


class CountingDataModule(L.LightningDataModule):
    """Base of every data module: subclasses implement :meth:`read_split` and nothing else of the pipeline.

    Args:
        root: where the data set lies.
        batch_size: pictures in a training batch, on each rank.
        eval_batch_size: pictures handed to evaluation at once; they may differ in size.
        num_workers: loader processes; results do not depend on it.
        augmentation: what is done to training pictures; ``None`` for nothing.
        prompts: which names are asked about: ``target`` (the first class of a picture), ``all`` (every class of the
            data set, in one fixed order), or in training that many: the target, other classes of the picture, and at
            least one that is absent; evaluation then asks for the target.
        classes: the names to ask about for pictures that carry none (predict), and the fixed list for ``all``.
        outside: points outside their picture are an ``error``, or ``clamp``ed to its border, or ``drop``ped; what
            was touched is counted and reported.
        missing: an annotated picture that is not there is an ``error``, or ``skip``ped and reported.
        duplicates: the same file in two splits is an ``error``, a ``warn``ing, or ``ignore``d.
        seed: seeds the order and augmentation of training pictures.

    Raises:
        InputError: a value is out of range.
    """

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
        outside: Literal["error", "clamp", "drop"] = "error",
        missing: Literal["error", "skip"] = "error",
        duplicates: Literal["error", "warn", "ignore"] = "error",
        seed: int = 0,
    ) -> None:
        super().__init__()
        for name, value in (("batch_size", batch_size), ("eval_batch_size", eval_batch_size)):
            if value < 1:
                raise InputError(f"data.{name} is {value}; expected at least 1")
        if isinstance(prompts, int) and prompts < 1:
            raise InputError(f"data.prompts is {prompts}; expected 'target', 'all' or a number of at least 1")
        self.root = None if root is None else Path(root).expanduser()
        self.batch_size = batch_size
        self.eval_batch_size = eval_batch_size
        self.num_workers = num_workers
        self.augmentation = augmentation
        self.prompts = prompts
        self.classes = classes
        self.outside = outside
        self.missing = missing
        self.duplicates = duplicates
        self.seed = seed
        self._records: dict[str, list[Record]] = {}
        self._class_names: dict[str, list[str]] = {}

    # -- what a reader implements ---------------------------------------------------------------------------------

    @abstractmethod
    def read_split(self, split: Split) -> list[Record]:
        """Every picture of a split with its annotation; opens no picture."""

    def read_bytes(self, record: Record) -> bytes:
        """The encoded picture of a record."""
        assert record.path is not None, f"{record.image_id}: a record without a path needs its own read_bytes"
        return record.path.read_bytes()

    # -- what models and reports ask for --------------------------------------------------------------------------

    def records(self, split: Split) -> list[Record]:
        """The checked records of a split, read once.

        Raises:
            InputError: the annotation is inconsistent or the split is empty.
        """
        if split not in self._records:
            records = check_records(
                self.read_split(split), split, outside=self.outside, missing=self.missing, source=type(self).__name__
            )
            if not records:
                raise InputError(
                    f"{type(self).__name__}({str(self.root)!r}) has no picture in its {split!r} split; "
                    "check data.root and the split options"
                )
            self._records[split] = records
        return self._records[split]

    @property
    def provides(self) -> frozenset[str]:
        """The batch keys that every training picture comes with, such as ``counts``, ``points``, ``boxes``."""
        keys = ("points", "labels", "boxes", "box_labels", "exemplars", "captions", "counts")
        records = self.records("train")
        found = {key for key in keys if all(getattr(record, key) is not None for record in records)}
        return frozenset(found | ({"counts"} if "points" in found else set()))

    def class_names(self, split: Split = "train") -> list[str]:
        """Every name annotated in a split, in a fixed order; ``data.classes`` if given."""
        if self.classes is not None:
            return list(self.classes)
        if split not in self._class_names:
            self._class_names[split] = sorted({name for record in self.records(split) for name in record.classes})
        return self._class_names[split]

    def train_points(self) -> list[np.ndarray]:
        """``(N_i, 2)`` points of every training picture, from the annotation alone.

        Raises:
            InputError: the data has no points.
        """
        if "points" not in self.provides:
            raise InputError(f"{type(self).__name__} gives {sorted(self.provides)} for training, but no points")
        return [record.points for record in self.records("train") if record.points is not None]

    def train_counts(self) -> np.ndarray:
        """``(N,)`` count of the target of every training picture: what a constant predictor knows."""
        return np.array([float(_asked_counts(record)) for record in self.records("train")], np.float64)

    # -- Lightning ------------------------------------------------------------------------------------------------

    def setup(self, stage: str) -> None:
        """Read the annotation, so that its errors come before the first step."""
        splits: dict[str, tuple[Split, ...]] = {
            "fit": ("train", "val"), "validate": ("val",), "test": ("test",), "predict": ("predict",),
        }  # fmt: skip
        for split in splits[stage]:
            self.records(split)
        if stage == "fit" and self.duplicates != "ignore":
            check_duplicates(self._records, action=self.duplicates)

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

    def _dataset(self, split: Split, *, training: bool) -> CountingDataset:
        model = self.trainer.lightning_module if self.trainer is not None else None
        return CountingDataset(
            self.records(split),
            self.read_bytes,
            partial(self._choose_names, split),
            preprocess=Preprocess.of(getattr(model, "preprocess", None)),
            augmentation=self.augmentation,
            training=training,
            outside=self.outside,
            tolerate=split == "predict",
        )

    def _loader(self, data: CountingDataset, sampler: Any, batch_size: int, *, training: bool) -> DataLoader:
        return DataLoader(
            data,
            batch_size=batch_size,
            sampler=sampler,
            num_workers=self.num_workers,
            collate_fn=partial(collate, training=training),
            pin_memory=torch.cuda.is_available(),
            persistent_workers=self.num_workers > 0,
            drop_last=False,
        )

    def _place(self) -> dict[str, int]:
        trainer = self.trainer
        return {"rank": trainer.global_rank, "world_size": trainer.world_size} if trainer is not None else {}

    # -- prompts --------------------------------------------------------------------------------------------------

    def _choose_names(self, split: Split, record: Record, rng: np.random.Generator | None) -> list[str]:
        if split == "predict" and not record.classes:
            return list(self.classes or [])
        if self.prompts == "all":
            return self.class_names("predict" if split == "predict" else "train")
        if self.prompts == "target" or rng is None:
            return record.classes[:1]
        others = [record.classes[i] for i in rng.permutation(np.arange(1, len(record.classes)))]
        names = [*record.classes[:1], *others][: max(1, self.prompts - 1)]
        return names + self._absent(record, self.prompts - len(names), rng)

    def _absent(self, record: Record, n: int, rng: np.random.Generator) -> list[str]:
        """``n`` training names not in the picture; each is with even odds one that shares words with the target."""
        pool = [name for name in self.class_names("train") if name not in record.classes]
        target = set(record.classes[0].split())
        near = [name for name in pool if target & set(name.split())]
        chosen: list[str] = []
        for _ in range(min(n, len(pool))):
            choices = [c for c in (near if near and rng.random() < 0.5 else pool) if c not in chosen]
            choices = choices or [c for c in pool if c not in chosen]
            chosen.append(choices[int(rng.integers(len(choices)))])
        return chosen


def _asked_counts(record: Record) -> float:
    """The count of a record's target."""
    if record.labels is not None:
        return float((record.labels == 0).sum())
    return float(record.counts[0]) if record.counts is not None else float("nan")


__all__ = ["CountingDataModule", "Prompts"]
