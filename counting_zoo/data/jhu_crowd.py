"""JHU-Crowd++: 4,372 pictures of crowds in all weathers, with a box around every head."""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np

from counting_zoo.data.base import CountingDataModule
from counting_zoo.data.checks import inside_root
from counting_zoo.data.points import as_points
from counting_zoo.data.records import Record, Split
from counting_zoo.data.splits import check_choice, draw
from counting_zoo.errors import InputError


class JHUCrowd(CountingDataModule):
    """JHU-Crowd++ as released: 2,272 pictures to train, 500 to validate, 1,600 to test.

    Sindagi et al., "JHU-CROWD++: Large-Scale Crowd Counting Dataset and A Benchmark Method", TPAMI 2020.

    Args:
        root: the folder that holds ``train``, ``val`` and ``test``.
        class_name: what the people are called.
        val_split: validate on the release's own ``val``, on pictures ``drawn`` from ``train``, or on ``test`` as the
            reference of CLIP-EBC does (``official``).
        train_on: ``train`` alone, or ``train+val``, as that reference does; not with ``val_split: val``.
        val_fraction: how much of ``train`` is drawn.
        split_seed: seeds the draw.
        outside: what happens to points outside their picture; the release has some.
        duplicates: what happens to the same file in two splits.
        options: those of :class:`CountingDataModule`.

    Raises:
        InputError: validation pictures would be trained on.
    """

    layout: ClassVar[str] = """\
  root/ (jhu_crowd_v2.0)
    train/images/0001.jpg ...
    train/gt/0001.txt ...               x y w h o b
    train/image_labels.txt              id,count,scene,weather,distractor
    val/..., test/..."""

    def __init__(
        self,
        root: str | Path,
        *,
        class_name: str = "people",
        val_split: Literal["val", "drawn", "official"] = "val",
        train_on: Literal["train", "train+val"] = "train",
        val_fraction: float = 0.1,
        split_seed: int = 0,
        outside: Literal["error", "clamp", "drop"] = "clamp",
        duplicates: Literal["error", "warn", "ignore"] = "warn",
        **options: Any,
    ) -> None:
        super().__init__(root, outside=outside, duplicates=duplicates, **options)
        check_choice("val_split", val_split, ("val", "drawn", "official"))
        check_choice("train_on", train_on, ("train", "train+val"))
        if train_on == "train+val" and val_split == "val":
            raise InputError(
                "data.train_on is 'train+val' with data.val_split 'val', so validation pictures would be trained on; "
                "set data.val_split to 'drawn' or 'official'"
            )
        self.class_name = class_name
        self.val_split = val_split
        self.train_on = train_on
        self.val_fraction = val_fraction
        self.split_seed = split_seed

    def read_split(self, split: Split) -> list[Record]:
        """Every picture of a split; ``predict`` takes ``test`` without its annotation."""
        root = self.find_root("jhu_crowd_v2.0", "jhu_crowd", holding="train/image_labels.txt")
        if split in ("test", "predict") or (split == "val" and self.val_split == "official"):
            return self._records_of(root, "test", annotated=split != "predict")
        if split == "val" and self.val_split == "val":
            return self._records_of(root, "val")
        found = [r for folder in self.train_on.split("+") for r in self._records_of(root, folder)]
        if self.val_split != "drawn":
            return found
        held_out = set(draw([r.image_id for r in found], {"val": self.val_fraction}, self.split_seed)["val"])
        return [r for r in found if (r.image_id in held_out) == (split == "val")]

    def _records_of(self, root: Path, folder: str, annotated: bool = True) -> list[Record]:
        table = root / folder / "image_labels.txt"
        try:
            lines = table.read_text(encoding="utf-8-sig").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise InputError(f"{table}: cannot be read as UTF-8 text ({error}); expected\n{self.layout}") from None
        rows = [(i, [cell.strip() for cell in line.split(",")]) for i, line in enumerate(lines, 1) if line.strip()]
        return [self._record(root, folder, f"{table}:{i}", cells, annotated) for i, cells in rows]

    def _record(self, root: Path, folder: str, line: str, cells: list[str], annotated: bool) -> Record:
        if len(cells) < 2 or not cells[1].isdecimal():
            raise InputError(f"{line}: is {','.join(cells)!r}; expected id,count,scene,weather,distractor")
        name, count = cells[0], int(cells[1])
        path = inside_root(root, f"{folder}/images/{name}.jpg", line)
        image_id = f"{folder}/images/{name}.jpg"
        if not annotated:
            return Record(image_id, path, classes=[self.class_name])
        points = _read_points(inside_root(root, f"{folder}/gt/{name}.txt", line))
        if len(points) != count:
            raise InputError(
                f"{line}: counts {count} people, but {folder}/gt/{name}.txt has {len(points)} points; one of them is "
                "damaged"
            )
        return Record(
            image_id,
            path,
            classes=[self.class_name],
            points=points,
            labels=np.zeros(count, np.int64),
            counts=np.array([count], np.float32),
        )


def _read_points(path: Path) -> np.ndarray:
    """``(N, 2)`` centres of heads; a picture without people has an empty file."""
    try:
        rows = [line.split() for line in path.read_text(encoding="utf-8-sig").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: cannot be read as UTF-8 text ({error}); every picture needs its own") from None
    if short := next((i for i, row in enumerate(rows, 1) if len(row) < 2), None):
        raise InputError(f"{path}: row {short} is {rows[short - 1]}; expected x y w h o b")
    if not rows:
        return np.zeros((0, 2), np.float32)
    return as_points([row[:2] for row in rows], f"{path} (lines x y w h o b)")


__all__ = ["JHUCrowd"]
