"""UCF-QNRF: 1,535 large pictures of dense crowds with a point on every head."""

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


class UCFQNRF(CountingDataModule):
    """UCF-QNRF as released: 1,201 pictures to train, 334 to test, no validation split.

    Idrees et al., "Composition Loss for Counting, Density Map Estimation and Localization in Dense Crowds", ECCV 2018.

    Args:
        root: the folder that holds ``Train`` and ``Test``, or the one above it (``UCF-QNRF_ECCV18``).
        class_name: what the people are called.
        val_split: validate on pictures ``drawn`` from ``Train``, or on ``Test``, as the reference of CLIP-EBC does
            (``official``).
        val_fraction: how much of ``Train`` is drawn.
        split_seed: seeds the draw.
        outside: what happens to points outside their picture; the release has some.
        duplicates: what happens to the same file in two splits.
        options: those of :class:`CountingDataModule`.
    """

    layout: ClassVar[str] = """\
  root/ (UCF-QNRF_ECCV18)
    Train/img_0001.jpg, img_0001_ann.mat ...
    Test/img_0001.jpg, img_0001_ann.mat ..."""

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
        """Every picture of a split; ``predict`` takes ``Test`` without its annotation."""
        root = self.find_root("UCF-QNRF_ECCV18", "UCF-QNRF", holding="Train")
        official = split in ("test", "predict") or (split == "val" and self.val_split == "official")
        folder = "Test" if official else "Train"
        names = list_pictures(root / folder)
        self._check_orphans(root / folder, names)
        if not official and self.val_split == "drawn":
            held_out = set(draw(names, {"val": self.val_fraction}, self.split_seed)["val"])
            names = [name for name in names if (name in held_out) == (split == "val")]
        return [self._record(root, folder, name, annotated=split != "predict") for name in names]

    def _check_orphans(self, folder: Path, names: list[str]) -> None:
        """Every annotation needs its picture."""
        stems = {Path(name).stem for name in names}
        orphans = [mat for mat in sorted(folder.glob("*_ann.mat")) if mat.stem.removesuffix("_ann") not in stems]
        if orphans:
            message = f"UCF-QNRF: {len(orphans)} annotations have no picture in {folder}: {orphans[0]}"
            if self.missing == "error":
                raise InputError(f"{message}; complete the folder, or set data.missing to 'skip'")
            log.warning("%s; skipped (data.missing=skip)", message)

    def _record(self, root: Path, folder: str, name: str, annotated: bool) -> Record:
        image_id, path = f"{folder}/{name}", root / folder / name
        if not annotated:
            return Record(image_id, path, classes=[self.class_name])
        mat = path.with_name(f"{path.stem}_ann.mat")
        if not mat.is_file():
            raise InputError(f"{path}: has no annotation; expected {mat}")
        points = read_mat_points(mat)
        return Record(
            image_id,
            path,
            classes=[self.class_name],
            points=points,
            labels=np.zeros(len(points), np.int64),
            counts=np.array([len(points)], np.float32),
        )


__all__ = ["UCFQNRF"]
