"""CARPK: 1,448 drone pictures of car parks with a box around every car."""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np

from counting_zoo.data.base import CountingDataModule
from counting_zoo.data.checks import inside_root
from counting_zoo.data.points import as_boxes
from counting_zoo.data.records import Record, Split
from counting_zoo.data.splits import check_choice, draw
from counting_zoo.errors import InputError


class CARPK(CountingDataModule):
    """CARPK (and PUCPR+, which has the same layout) as its development kit lays it out.

    Hsieh et al., "Drone-based Object Counting by Spatially Regularized Regional Proposal Network", ICCV 2017. Points
    are the centres of the boxes. The release has no validation split.

    Args:
        root: ``CARPK_devkit``, the folder above it, or its ``data`` folder.
        class_name: what the cars are called.
        val_split: validate on pictures ``drawn`` from the training list, or on the test list (``official``, or
            ``test``).
        val_fraction: how much of the training list is drawn.
        split_seed: seeds the draw.
        outside: what happens to boxes that reach over the border.
        duplicates: what happens to the same file in two splits.
        options: those of :class:`CountingDataModule`.
    """

    layout: ClassVar[str] = """\
  root/ (CARPK_devkit/data)
    ImageSets/train.txt, test.txt           one picture name a line, without suffix
    Annotations/20160331_NTU_00001.txt ...  x1 y1 x2 y2 class
    Images/20160331_NTU_00001.png ..."""

    def __init__(
        self,
        root: str | Path,
        *,
        class_name: str = "cars",
        val_split: Literal["drawn", "official", "test"] = "drawn",
        val_fraction: float = 0.1,
        split_seed: int = 0,
        outside: Literal["error", "clamp", "drop"] = "clamp",
        duplicates: Literal["error", "warn", "ignore"] = "warn",
        **options: Any,
    ) -> None:
        super().__init__(root, outside=outside, duplicates=duplicates, **options)
        check_choice("val_split", val_split, ("drawn", "official", "test"))
        self.class_name = class_name
        self.val_split = val_split
        self.val_fraction = val_fraction
        self.split_seed = split_seed

    def read_split(self, split: Split) -> list[Record]:
        """Every picture of a split; ``predict`` takes the test list without its annotation."""
        variants = ("data", "CARPK_devkit/data", "PUCPR+_devkit/data")
        root = self.find_root(*variants, holding="ImageSets")
        official = split in ("test", "predict") or (split == "val" and self.val_split in ("official", "test"))
        names = self._names(root, "test" if official else "train")
        if not official and self.val_split == "drawn":
            held_out = draw(names, {"val": self.val_fraction}, self.split_seed)["val"]
            names = held_out if split == "val" else sorted(set(names) - set(held_out))
        return [self._record(root, name, annotated=split != "predict") for name in names]

    def _names(self, root: Path, official: str) -> list[str]:
        path = root / "ImageSets" / f"{official}.txt"
        try:
            return path.read_text(encoding="utf-8-sig").split()
        except OSError as error:
            raise InputError(f"{path}: cannot be read ({error.strerror}); expected\n{self.layout}") from None

    def _record(self, root: Path, name: str, annotated: bool) -> Record:
        image = inside_root(root, f"Images/{name}.png", f"{root}/ImageSets")
        if not annotated:
            return Record(f"{name}.png", image, classes=[self.class_name])
        path = inside_root(root, f"Annotations/{name}.txt", f"{root}/ImageSets")
        try:
            rows = [line.split() for line in path.read_text(encoding="utf-8-sig").splitlines() if line.strip()]
        except OSError as error:
            raise InputError(f"{path}: cannot be read ({error.strerror}); every picture needs its annotation") from None
        boxes = as_boxes([row[:4] for row in rows], f"{path} (lines x1 y1 x2 y2 class)")
        return Record(
            f"{name}.png",
            image,
            classes=[self.class_name],
            points=(boxes[:, :2] + boxes[:, 2:]) / 2,
            labels=np.zeros(len(boxes), np.int64),
            boxes=boxes,
            box_labels=np.zeros(len(boxes), np.int64),
            counts=np.array([len(boxes)], np.float32),
        )


__all__ = ["CARPK"]
