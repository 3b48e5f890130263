"""ShanghaiTech: crowds from the web (part A) and from streets (part B), a point on every head."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np

from counting_zoo.data.annotation_files import read_mat_points
from counting_zoo.data.base import CountingDataModule
from counting_zoo.data.picture_folder import list_pictures
from counting_zoo.data.records import Record, Split
from counting_zoo.data.splits import check_choice, draw
from counting_zoo.errors import InputError

log = logging.getLogger(__name__)

TRUTH_FOLDERS = ("ground_truth", "ground-truth")


class ShanghaiTech(CountingDataModule):
    """ShanghaiTech A or B in the layout of either release (``part_A_final`` or ``part_A``).

    Zhang et al., "Single-Image Crowd Counting via Multi-Column Convolutional Neural Network", CVPR 2016 (not the set
    of the same name for video anomalies). The release has no validation split.

    Args:
        root: the folder that holds the parts, or the part itself.
        part: ``A`` or ``B``.
        class_name: what the people are called.
        val_split: validate on pictures ``drawn`` from the training folder, or on the test folder (``official``, or
            ``test``), as the reference of CLIP-EBC does.
        test_split: test and predict on the official ``test`` folder, or on all of ``train``.
        val_fraction: how much of the training folder is drawn.
        split_seed: seeds the draw.
        outside: what happens to points outside their picture; the release has some.
        duplicates: what happens to the same file in two splits.
        options: those of :class:`CountingDataModule`.
    """

    layout: ClassVar[str] = """\
  root/
    part_A_final/ (or part_A/; B likewise)
      train_data/images/IMG_1.jpg ...
      train_data/ground_truth/GT_IMG_1.mat ... (or ground-truth/)
      test_data/..."""

    def __init__(
        self,
        root: str | Path,
        *,
        part: Literal["A", "B"] = "A",
        class_name: str = "people",
        val_split: Literal["drawn", "official", "test"] = "drawn",
        test_split: Literal["test", "train"] = "test",
        val_fraction: float = 0.1,
        split_seed: int = 0,
        outside: Literal["error", "clamp", "drop"] = "clamp",
        duplicates: Literal["error", "warn", "ignore"] = "warn",
        **options: Any,
    ) -> None:
        super().__init__(root, outside=outside, duplicates=duplicates, **options)
        check_choice("part", part, ("A", "B"))
        check_choice("val_split", val_split, ("drawn", "official", "test"))
        check_choice("test_split", test_split, ("test", "train"))
        self.part = part
        self.class_name = class_name
        self.val_split = val_split
        self.test_split = test_split
        self.val_fraction = val_fraction
        self.split_seed = split_seed

    def read_split(self, split: Split) -> list[Record]:
        """Every picture of a split; ``predict`` takes the tested folder without its annotation."""
        tested = split in ("test", "predict")
        whole = self.test_split if tested else self.val_split if split == "val" else "train"
        folder = "test_data" if whole in ("test", "official") else "train_data"
        part = self._find_part(folder)
        names = list_pictures(part / folder / "images")
        if not tested and folder == "train_data" and self.val_split == "drawn":
            held_out = set(draw(names, {"val": self.val_fraction}, self.split_seed)["val"])
            names = [name for name in names if (name in held_out) == (split == "val")]
        self._check_orphans(part / folder)
        return [self._record(part, folder, name, annotated=split != "predict") for name in names]

    def _check_orphans(self, folder: Path) -> None:
        """Every annotation needs its picture."""
        pictures = {Path(name).stem for name in list_pictures(folder / "images")}
        orphans = [
            path
            for truth in TRUTH_FOLDERS
            for path in sorted((folder / truth).glob("GT_*.mat"))
            if path.stem.removeprefix("GT_") not in pictures
        ]
        if orphans:
            message = f"ShanghaiTech: {len(orphans)} annotations have no picture in {folder / 'images'}: {orphans[0]}"
            if self.missing == "error":
                raise InputError(f"{message}; complete the folder, or set data.missing to 'skip'")
            log.warning("%s; skipped (data.missing=skip)", message)

    def _find_part(self, folder: str) -> Path:
        variants = (f"part_{self.part}_final", f"part_{self.part}", f"ShanghaiTech/part_{self.part}")
        part = self.find_root(*variants, holding=f"{folder}/images")
        other = "B" if self.part == "A" else "A"
        if part.resolve().name in (f"part_{other}_final", f"part_{other}"):
            raise InputError(f"ShanghaiTech: data.root is {str(part)!r}, but data.part is {self.part!r}")
        return part

    def _record(self, part: Path, folder: str, name: str, annotated: bool) -> Record:
        image_id, path = f"{folder}/images/{name}", part / folder / "images" / name
        if not annotated:
            return Record(image_id, path, classes=[self.class_name])
        candidates = [part / folder / truth / f"GT_{Path(name).stem}.mat" for truth in TRUTH_FOLDERS]
        mat = next((candidate for candidate in candidates if candidate.is_file()), None)
        if mat is None:
            raise InputError(f"{path}: has no annotation; expected {candidates[0]}")
        points = read_mat_points(mat)
        return Record(
            image_id,
            path,
            classes=[self.class_name],
            points=points,
            labels=np.zeros(len(points), np.int64),
            counts=np.array([len(points)], np.float32),
        )


__all__ = ["ShanghaiTech"]
