"""Crowd data sets: ShanghaiTech, UCF-QNRF, NWPU-Crowd and JHU-Crowd++."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np

from counting_zoo.data.base import CountingDataModule
from counting_zoo.data.checks import as_points, inside_root
from counting_zoo.data.folder import list_pictures
from counting_zoo.data.records import Record, Split
from counting_zoo.data.splits import check_choice, draw
from counting_zoo.data.tables import read_mat_points
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


class NWPUCrowd(CountingDataModule):
    """NWPU-Crowd as released: lists of 3,109 pictures to train, 500 to validate and 1,500 without annotation to test.

    Wang et al., "NWPU-Crowd: A Large-Scale Benchmark for Crowd Counting and Localization", TPAMI 2020. ``test`` is
    scored on the validation list ("NWPU val" in papers); ``predict`` counts the test list, and
    :class:`~counting_zoo.evaluation.predictions.NWPUSubmission` writes what the server takes.

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
