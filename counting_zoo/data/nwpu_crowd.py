"""NWPU-Crowd: 5,109 pictures of crowds and of none, whose test counts only the benchmark's server knows."""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np

from counting_zoo.data.annotation_files import read_mat_points
from counting_zoo.data.base import CountingDataModule
from counting_zoo.data.checks import inside_root
from counting_zoo.data.records import Record, Split
from counting_zoo.data.splits import check_choice, draw
from counting_zoo.errors import InputError


class NWPUCrowd(CountingDataModule):
    """NWPU-Crowd as released: lists of 3,109 pictures to train, 500 to validate and 1,500 without annotation to test.

    Wang et al., "NWPU-Crowd: A Large-Scale Benchmark for Crowd Counting and Localization", TPAMI 2020. ``test`` is
    scored on the validation list ("NWPU val" in papers); ``predict`` counts the test list, and
    :class:`~counting_zoo.evaluation.submission.NWPUSubmission` writes what the server takes.

    Args:
        root: the folder that holds the lists.
        class_name: what the people are called.
        val_split: validate on pictures ``drawn`` from the training list, so that the validation list stays unseen, or
            on that list itself (``official``).
        val_fraction: how much of the training list is drawn.
        split_seed: seeds the draw.
        outside: what happens to points outside their picture; the release has some.
        duplicates: what happens to the same file in two splits.
        options: those of :class:`CountingDataModule`.
    """

    layout: ClassVar[str] = """\
  root/
    train.txt, val.txt, test.txt        the first word of each line is an id
    images_part1/0001.jpg ... images_part5/5109.jpg, or images/0001.jpg ...
    mats/0001.mat ..."""

    def __init__(
        self,
        root: str | Path,
        *,
        class_name: str = "people",
        val_split: Literal["drawn", "official"] = "drawn",
        val_fraction: float = 0.1,
        split_seed: int = 0,
        outside: Literal["error", "clamp", "drop"] = "clamp",
        duplicates: Literal["error", "warn", "ignore"] = "warn",
        **options: Any,
    ) -> None:
        super().__init__(root, outside=outside, duplicates=duplicates, **options)
        check_choice("val_split", val_split, ("drawn", "official"))
        self.class_name = class_name
        self.val_split = val_split
        self.val_fraction = val_fraction
        self.split_seed = split_seed

    def read_split(self, split: Split) -> list[Record]:
        """Every picture of a split; ``predict`` takes the test list, which has no annotation."""
        root = self.find_root("NWPU-Crowd", "NWPU", holding="train.txt")
        official = split == "test" or (split == "val" and self.val_split == "official")
        ids = self._ids(root, "test" if split == "predict" else "val" if official else "train")
        if split in ("train", "val") and not official and self.val_split == "drawn":
            held_out = set(draw(ids, {"val": self.val_fraction}, self.split_seed)["val"])
            ids = [name for name in ids if (name in held_out) == (split == "val")]
        return [self._record(root, name, annotated=split != "predict") for name in ids]

    def _ids(self, root: Path, name: str) -> list[str]:
        path = root / f"{name}.txt"
        try:
            lines = path.read_text(encoding="utf-8-sig").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise InputError(f"{path}: cannot be read as UTF-8 text ({error}); expected\n{self.layout}") from None
        ids = [line.split()[0] for line in lines if line.strip()]
        if repeated := sorted({i for i in ids if ids.count(i) > 1} if len(set(ids)) < len(ids) else ()):
            raise InputError(f"{path}: lists {repeated[:3]} more than once")
        return ids

    def _record(self, root: Path, name: str, annotated: bool) -> Record:
        path = self._picture(root, name)
        if not annotated:
            return Record(f"{name}.jpg", path, classes=[self.class_name])
        mat = inside_root(root, f"mats/{name}.mat", f"the lists in {root}")
        if not mat.is_file():
            raise InputError(f"{path}: has no annotation; expected {mat}")
        points = read_mat_points(mat)
        return Record(
            f"{name}.jpg",
            path,
            classes=[self.class_name],
            points=points,
            labels=np.zeros(len(points), np.int64),
            counts=np.array([len(points)], np.float32),
        )

    def _picture(self, root: Path, name: str) -> Path:
        """Where a picture is: a thousand ids in each of five parts, or all of them in one folder."""
        if (root / "images").is_dir() or not name.isdecimal():
            return inside_root(root, f"images/{name}.jpg", f"the lists in {root}")
        return root / f"images_part{min(5, (int(name) - 1) // 1000 + 1)}" / f"{name}.jpg"


__all__ = ["NWPUCrowd"]
