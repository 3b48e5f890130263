"""Any folder of pictures: for predicting, and with the usual annotation files for training and testing."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np

from counting_zoo.data.annotation_files import Marks
from counting_zoo.data.base import CountingDataModule
from counting_zoo.data.dot_pictures import Dot
from counting_zoo.data.picture_folder import PictureFolder, list_pictures, without_dots
from counting_zoo.data.records import Record, Split
from counting_zoo.data.splits import draw, read_splits, take_ranges
from counting_zoo.errors import InputError

log = logging.getLogger(__name__)

SPLIT_FOLDERS = {"train": ("train",), "val": ("val", "valid", "validation"), "test": ("test",)}


class ImageFolder(CountingDataModule):
    """Your own pictures, annotated in one of the usual ways.

    **Annotation** lies in the folder and is found by its name:

    - ``points.csv`` with the columns ``image,x,y[,label]``, or ``points.json`` ``{"a.png": [[x, y], ...]}``;
    - ``boxes.csv`` with ``image,x1,y1,x2,y2[,label]``, or COCO's ``annotations.json``; points are the box centres;
    - ``counts.csv`` with ``image,label,count``, or with a column for each class (``image,cat,dog``), or ``counts.json``
      ``{"a.png": {"cat": 2}}`` or a list of such rows; beside points they are checked against these. Counts are whole
      numbers, and where ``classes`` are given, of no other class;
    - ``a.mat`` or ``GT_a.mat`` beside ``a.jpg``, as ShanghaiTech and UCF-QNRF have it;
    - dot pictures, paired by ``picture`` and ``dots``: lossless pictures with a mark on black for each object, a
      single pixel or a small blob (``dot``); a pixel in column x, row y is the point (x + 0.5, y + 0.5).

    A row of ``points.csv`` or ``boxes.csv`` with empty coordinates says that a picture has no objects.

    **Splits** come from the first of these that is there:

    - ``splits``: a mapping of each split to a range of the sorted pictures, or a JSON or CSV (``image,split``) file;
    - folders ``train``, ``val`` and ``test``, each with its pictures and annotation;
    - ``sizes`` alone: drawn from all pictures;
    - nothing: all pictures are the test split.

    Beside ``splits``, ``sizes`` draws from the pictures that ``splits`` gives to ``train`` (from all that it gives to
    no split, where it does not name ``train``). Beside split folders, it draws only the splits that have no folder,
    from ``train``, which keeps the rest. The VGG cells protocol, 64 to train and 36 to validate drawn from
    pictures 1-100, and 101-200 to test, is ``splits={"train": [0, 100], "test": [100, 200]}, sizes={"train": 64,
    "val": 36}`` with one ``split_seed`` a draw.

    Predict reads every picture below ``predict_root`` (or ``root``), in sorted order, and needs no annotation; dot
    pictures beside their pictures are left out.

    Args:
        root: the folder; its pictures lie in ``images/``, or in itself.
        annotation: the one annotation file to read, relative to ``root`` (or to each split's folder).
        picture: pattern of the pictures' paths below ``root``, such as ``{stem}cell.png`` or ``images/{stem}.*``; with
            ``dots`` alone, every other picture.
        dots: pattern of the dot pictures' paths below ``root``, such as ``{stem}_dots.png`` or ``dots/{stem}.png``.
        dot: each marked ``pixel`` of a dot picture is one object, or each ``blob`` of pixels that touch; ``None``
            takes pixels, and raises where they look like blobs.
        splits: ranges ``[start, stop]`` by split (from 0, ``stop`` not included, ``null`` for the end), or a file.
        sizes: numbers of pictures (below 1: fractions) to draw for each split.
        split_seed: seeds the draw.
        empty: a picture that the annotation does not mention is an ``error``, or has no objects (``allow``).
        predict_root: a folder or picture to predict; ``root`` if ``None``.
        options: those of :class:`CountingDataModule`; the first of ``classes`` names objects without a label.
    """

    layout: ClassVar[str] = """\
  root/ (or root/train/, root/val/, root/test/, each like this)
    images/a.png ...         or the pictures in root itself
    points.csv               image,x,y[,label]
    or boxes.csv, counts.csv, counts.json, annotations.json (COCO), a.mat beside each picture, dot pictures
    (data.dots)"""

    def __init__(
        self,
        root: str | Path | None = None,
        *,
        annotation: str | None = None,
        picture: str | None = None,
        dots: str | None = None,
        dot: Dot | None = None,
        splits: dict[str, list[int | None]] | str | None = None,
        sizes: dict[str, float] | None = None,
        split_seed: int = 0,
        empty: Literal["error", "allow"] = "error",
        predict_root: str | Path | None = None,
        **options: Any,
    ) -> None:
        super().__init__(root, **options)
        if empty not in ("error", "allow"):
            raise InputError(f"data.empty is {empty!r}; expected 'error' or 'allow'")
        if dot not in (None, "pixel", "blob"):
            raise InputError(f"data.dot is {dot!r}; expected 'pixel' or 'blob'")
        self.annotation = annotation
        self.picture = picture
        self.dots = dots
        self.dot = dot
        self.splits = splits
        self.sizes = sizes
        self.split_seed = split_seed
        self.empty = empty
        self.predict_root = None if predict_root is None else Path(predict_root).expanduser()
        self._folders: dict[Path, PictureFolder] = {}

    def read_split(self, split: Split) -> list[Record]:
        """Every picture of a split; for ``predict`` every picture there is, without annotation."""
        if split == "predict":
            return self._predict_records()
        folder, names = self._members(split)
        pictures = self._folder(folder)
        marks = {name: pictures.marks(name) for name in names}
        if large := {name: n for name in names if (n := pictures.n_large.get(name))}:
            log.warning(
                "%s: %d blobs in the dot pictures of %s have at least 1.5 times the usual size (the first in that of "
                "%s); each counts as one object, also where several touch",
                folder, sum(large.values()), split, next(iter(large)),
            )  # fmt: skip
        silent = [name for name, found in marks.items() if found is None]
        if silent and self.empty == "error":
            raise InputError(
                f"{folder}: the annotation does not mention {len(silent)} of {len(names)} pictures of {split}: "
                f"{silent[:5]}; annotate them, or set data.empty to 'allow' if they hold no objects"
            )
        if silent:
            log.warning("%s: %d pictures of %s without annotation hold no objects", folder, len(silent), split)
        order = list(dict.fromkeys([*(self.classes or []), *pictures.all_names()]))
        kinds = [found for found in marks.values() if found is not None]
        nothing = Marks(
            points=np.zeros((0, 2), np.float32) if any(found.points is not None for found in kinds) else None,
            boxes=np.zeros((0, 4), np.float32) if any(found.boxes is not None for found in kinds) else None,
            counts={},
        )
        return [self._record(folder, name, found or nothing, nothing, order) for name, found in marks.items()]

    # -- splits ---------------------------------------------------------------------------------------------------

    def _members(self, split: Split) -> tuple[Path, list[str]]:
        """The folder of a split and its pictures, relative to the folder."""
        root = self.find_root()
        folders = {
            name: root / variant
            for name, variants in SPLIT_FOLDERS.items()
            for variant in variants
            if (root / variant).is_dir()
        }
        if folders and self.splits is None:
            drawn = {name: size for name, size in (self.sizes or {}).items() if name not in folders}
            if split not in folders and (split not in drawn or "train" not in folders):
                raise InputError(
                    f"{root}: has the folders {sorted(folders)} but none for {split}; add it, or set data.sizes "
                    f"(such as {{{split}: 0.1}}) to draw {split} from train"
                )
            folder = folders.get(split, folders.get("train", root))
            names = self._folder(folder).names
            if drawn and folder == folders.get("train"):
                dealt = draw(names, drawn, self.split_seed)
                taken = {name for found in dealt.values() for name in found}
                names = dealt[split] if split in dealt else [name for name in names if name not in taken]
            return folder, names
        splits = self._dealt(root)
        if split not in splits:
            raise InputError(
                f"{root}: nothing says which pictures are {split} (known: {sorted(splits)}); set data.splits, such as "
                "{train: [0, 80], test: [80, null]}, or data.sizes, such as {train: 0.8, val: 0.1, test: 0.1}, or "
                "make folders train, val and test"
            )
        return root, splits[split]

    def _dealt(self, root: Path) -> dict[str, list[str]]:
        """The pictures of every split, by ``splits`` and ``sizes``."""
        folder = self._folder(root)
        splits: dict[str, list[str]] = {}
        if isinstance(self.splits, str):
            path = root / self.splits
            splits = {
                split: [folder.find(name, str(path)) for name in names] for split, names in read_splits(path).items()
            }
        elif self.splits is not None:
            splits = take_ranges(folder.names, self.splits)
        if self.sizes is None:
            return splits if self.splits is not None else {"test": folder.names}
        taken = {name for names in splits.values() for name in names}
        pool = splits.pop("train", None) or [name for name in folder.names if name not in taken]
        if both := sorted(set(splits) & set(self.sizes)):
            raise InputError(f"data.splits and data.sizes both say what {both} is; leave it out of one of them")
        return {**splits, **draw(pool, self.sizes, self.split_seed)}

    def _folder(self, folder: Path) -> PictureFolder:
        if folder not in self._folders:
            unnamed = self.classes[0] if self.classes else "objects"
            self._folders[folder] = PictureFolder(
                folder, unnamed=unnamed, annotation=self.annotation, picture=self.picture, dots=self.dots, dot=self.dot,
                classes=self.classes,
            )  # fmt: skip
        return self._folders[folder]

    # -- records --------------------------------------------------------------------------------------------------

    def _record(self, folder: Path, name: str, marks: Marks, nothing: Marks, order: list[str]) -> Record:
        path = folder / name
        points, point_names = marks.points, marks.point_names
        boxes, box_names = marks.boxes, marks.box_names
        boxes = nothing.boxes if boxes is None else boxes
        if points is None and boxes is not None and (nothing.points is None or not len(boxes)):
            points, point_names = (boxes[:, :2] + boxes[:, 2:]) / 2, box_names
        points = nothing.points if points is None else points
        if boxes is not None and points is not None and sorted(point_names) != sorted(box_names):
            raise InputError(
                f"{path}: {len(points)} points but {len(boxes)} boxes, or other labels; expected both for all objects"
            )
        given = marks.counts
        if given and points is not None and len(given) == 1 and set(given) != set(point_names) and point_names:
            (total,) = given.values()  # one number without a label, beside points of several
            if set(given) == {self._folder(folder).unnamed} and total == len(points):
                given = None
        present = {*point_names, *box_names, *(label for label, n in (given or {}).items() if n > 0)}
        classes = [label for label in order if label in present] or order[:1]
        counts = np.array([(given or {}).get(label, 0) for label in classes], np.float32)
        if not given and points is not None:
            counts = np.array([point_names.count(label) for label in classes], np.float32)
        return Record(
            path.relative_to(self.root or folder).as_posix(),
            path,
            classes=classes,
            points=points,
            labels=None if points is None else _indices(point_names, classes),
            boxes=boxes,
            box_labels=None if boxes is None else _indices(box_names, classes),
            counts=counts,
            size=marks.size,
        )

    def _predict_records(self) -> list[Record]:
        place = self.predict_root or self.find_root()
        if place.is_file():
            return [Record(place.name, place)]
        names = list_pictures(place)
        if self.picture or self.dots:
            # Another folder may name its pictures as it likes; only what is surely no picture is left out there.
            names = without_dots(names, self.picture, self.dots, keep_others=self.predict_root is not None)
        return [Record(name, place / name) for name in names]


def _indices(names: list[str], classes: list[str]) -> np.ndarray:
    index = {name: i for i, name in enumerate(classes)}
    return np.array([index[name] for name in names], np.int64)


__all__ = ["ImageFolder"]
