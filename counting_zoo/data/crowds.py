"""Data sets of one class with a point in every object: ShanghaiTech, UCF-QNRF, NWPU-Crowd, JHU-Crowd++ and CARPK."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np

from counting_zoo.data.base import CountingDataModule
from counting_zoo.data.checks import as_boxes, as_points, inside_root
from counting_zoo.data.folder import list_images
from counting_zoo.data.records import Record, Split
from counting_zoo.data.splits import draw_split
from counting_zoo.data.tables import read_mat_points
from counting_zoo.errors import InputError, check
from counting_zoo.io import read_lines

log = logging.getLogger(__name__)


class CrowdDataModule(CountingDataModule):
    """Base of the data sets of one class: a subclass declares where its files lie.

    Paths are relative to the folder that holds the release, with ``{part}`` for a part of it (``train``, ``test``) and
    ``{stem}`` for an image's name without suffix.

    Args:
        root: the folder that holds the release, or one above it.
        class_name: what the objects are called.
        val_split: validate on images ``drawn`` from those to train on, or on the part of the release that the
            literature validates on (``official``; where that is the test part, ``test`` says the same).
        val_fraction: how much of the training images is drawn.
        split_seed: seeds the draw.
        outside: what happens to points and boxes outside their image; these releases have some.
        duplicates: what happens to the same file in two splits.
        options: those of :class:`CountingDataModule`.
    """

    variants: ClassVar[tuple[str, ...]]
    """Folders below ``root`` that may hold the release."""

    holding: ClassVar[str]
    """A file or folder in it, by which it is known."""

    parts: ClassVar[dict[str, str]]
    """The part of each split; that of ``val`` counts for ``val_split: official``."""

    images: ClassVar[str]
    """The folder of a part's images. Where all parts share one, an image's id is its file name alone."""

    listing: ClassVar[str] = ""
    """A file that lists the images of a part; the folder is listed if empty."""

    suffix: ClassVar[str] = ".jpg"
    """The suffix of images that a file lists."""

    annotations: ClassVar[tuple[str, ...]]
    """Where the annotation of an image may lie."""

    val_splits: ClassVar[tuple[str, ...]] = ("drawn", "official")

    def __init__(
        self,
        root: str | Path,
        *,
        class_name: str = "people",
        val_split: Literal["drawn", "official", "test", "val"] = "drawn",
        val_fraction: float = 0.1,
        split_seed: int = 0,
        outside: Literal["error", "clamp", "drop"] = "clamp",
        duplicates: Literal["error", "warn", "ignore"] = "warn",
        **options: Any,
    ) -> None:
        super().__init__(root, outside=outside, duplicates=duplicates, **options)
        check("data.val_split", val_split, one_of=self.val_splits)
        self.class_name = class_name
        self.val_split = val_split
        self.val_fraction = val_fraction
        self.split_seed = split_seed

    def read_split(self, split: Split) -> list[Record]:
        """Read every image of a split; ``predict`` needs no annotation."""
        parts = self.part_of(split).split("+")
        root = self.find_release(parts[0])
        images = [(part, path) for part in parts for path in self.list_part(root, part)]
        if self.val_split == "drawn" and split in ("train", "val"):
            images = draw_split(images, {"val": self.val_fraction}, self.split_seed, split)
        return [self._record(root, part, path, annotated=split != "predict") for part, path in images]

    def part_of(self, split: Split) -> str:
        """Name the part of the release that holds a split; ``a+b`` joins two."""
        return self.parts["train" if split == "val" and self.val_split == "drawn" else split]

    def find_release(self, part: str) -> Path:
        """Find the folder that all paths start from."""
        return self.find_root(*self.variants, holding=self.holding.format(part=part))

    def list_part(self, root: Path, part: str) -> list[Path]:
        """List the images of a part.

        Raises:
            InputError: a list cannot be read or names an image twice, or an annotation has no image.
        """
        if not self.listing:
            folder = root / self.images.format(part=part)
            names = list_images(folder)
            self._check_orphans(root, part, names)
            return [folder / name for name in names]
        source = root / self.listing.format(part=part)
        names = self.listed_names(source)
        if len(set(names)) < len(names):
            raise InputError(f"{source}: lists {sorted({n for n in names if names.count(n) > 1})[:3]} more than once")
        return [inside_root(root, f"{self.image_folder(root, part, n)}/{n}{self.suffix}", str(source)) for n in names]

    def listed_names(self, source: Path) -> list[str]:
        """Read the names of a list, the first word of each line."""
        return [line.split()[0] for line in read_lines(source, f"expected\n{self.layout}") if line.strip()]

    def image_folder(self, root: Path, part: str, name: str) -> str:
        """Name the folder of a listed image."""
        return self.images.format(part=part)

    def read_annotation(self, path: Path) -> dict[str, np.ndarray]:
        """Read the fields of a record; by default the points of a MATLAB file."""
        return {"points": read_mat_points(path)}

    def _record(self, root: Path, part: str, image: Path, annotated: bool) -> Record:
        image_id = image.relative_to(root).as_posix() if "{part}" in self.images else image.name
        record = Record(image_id, image, classes=[self.class_name])
        if not annotated:
            return record
        places = [root / pattern.format(part=part, stem=image.stem) for pattern in self.annotations]
        path = next((place for place in places if place.is_file()), None)
        if path is None:
            raise InputError(f"{image}: has no annotation; expected {places[0]}")
        fields: dict[str, Any] = self.read_annotation(path)
        n = len(fields["points"])
        fields |= {"labels": np.zeros(n, np.int64), "counts": np.array([n], np.float32)}
        return replace(record, box_labels=fields["labels"].copy() if "boxes" in fields else None, **fields)

    def _check_orphans(self, root: Path, part: str, names: Sequence[str]) -> None:
        """Make sure that every annotation has its image."""
        stems = {Path(name).stem for name in names}
        orphans: list[Path] = []
        for pattern in self.annotations:
            before, after = Path(pattern).name.split("{stem}")
            found = sorted(root.glob(pattern.format(part=part, stem="*")))
            orphans += [path for path in found if path.name.removeprefix(before).removesuffix(after) not in stems]
        if orphans:
            message = f"{type(self).__name__}: {len(orphans)} annotations have no image in {root}: {orphans[0]}"
            if self.missing == "error":
                raise InputError(f"{message}; complete the folder, or set data.missing to 'skip'")
            log.warning("%s; skipped (data.missing=skip)", message)


class ShanghaiTech(CrowdDataModule):
    """ShanghaiTech A or B in the layout of either release (``part_A_final`` or ``part_A``).

    Zhang et al., "Single-Image Crowd Counting via Multi-Column Convolutional Neural Network", CVPR 2016 (not the set
    of the same name for video anomalies). The release has no validation split; the reference of CLIP-EBC validates on
    the test folder (``val_split: official``).

    Args:
        root: the folder that holds the parts, or the part itself.
        part: ``A`` or ``B``.
        test_split: test and predict on the official ``test`` folder, or on all of ``train``.
        options: those of :class:`CrowdDataModule`.
    """

    layout: ClassVar[str] = """\
  root/
    part_A_final/ (or part_A/; B likewise)
      train_data/images/IMG_1.jpg ...
      train_data/ground_truth/GT_IMG_1.mat ... (or ground-truth/)
      test_data/..."""
    holding = images = "{part}/images"
    annotations = ("{part}/ground_truth/GT_{stem}.mat", "{part}/ground-truth/GT_{stem}.mat")
    val_splits = ("drawn", "official", "test")

    def __init__(
        self,
        root: str | Path,
        *,
        part: Literal["A", "B"] = "A",
        test_split: Literal["test", "train"] = "test",
        **options: Any,
    ) -> None:
        super().__init__(root, **options)
        check("data.part", part, one_of=("A", "B"))
        check("data.test_split", test_split, one_of=("test", "train"))
        self.part = part
        self.test_split = test_split

    def part_of(self, split: Split) -> str:
        """Name the folder of a split."""
        if split in ("test", "predict"):
            return f"{self.test_split}_data"
        return "train_data" if split == "train" or self.val_split == "drawn" else "test_data"

    def find_release(self, part: str) -> Path:
        """Find the folder of part A or B."""
        variants = (f"part_{self.part}_final", f"part_{self.part}", f"ShanghaiTech/part_{self.part}")
        root = self.find_root(*variants, holding=self.holding.format(part=part))
        other = "B" if self.part == "A" else "A"
        if root.resolve().name in (f"part_{other}_final", f"part_{other}"):
            raise InputError(f"ShanghaiTech: data.root is {str(root)!r}, but data.part is {self.part!r}")
        return root


class UCFQNRF(CrowdDataModule):
    """UCF-QNRF as released: 1,201 images to train, 334 to test, no validation split.

    Idrees et al., "Composition Loss for Counting, Density Map Estimation and Localization in Dense Crowds", ECCV 2018.
    The reference of CLIP-EBC validates on ``Test`` (``val_split: official``). ``root`` holds ``Train`` and ``Test``,
    or is the folder above.
    """

    layout: ClassVar[str] = """\
  root/ (UCF-QNRF_ECCV18)
    Train/img_0001.jpg, img_0001_ann.mat ...
    Test/img_0001.jpg, img_0001_ann.mat ..."""
    variants = ("UCF-QNRF_ECCV18", "UCF-QNRF")
    holding = "Train"
    parts: ClassVar = {"train": "Train", "val": "Test", "test": "Test", "predict": "Test"}
    images = "{part}"
    annotations = ("{part}/{stem}_ann.mat",)


class NWPUCrowd(CrowdDataModule):
    """NWPU-Crowd as released: lists of 3,109 images to train, 500 to validate and 1,500 without annotation to test.

    Wang et al., "NWPU-Crowd: A Large-Scale Benchmark for Crowd Counting and Localization", TPAMI 2020. ``test`` is
    scored on the validation list ("NWPU val" in papers), so validation is drawn from the training list unless
    ``val_split`` is ``official``; ``predict`` counts the test list, and
    :class:`~counting_zoo.evaluation.predictions.NWPUSubmission` writes what the server takes.
    """

    layout: ClassVar[str] = """\
  root/
    train.txt, val.txt, test.txt        the first word of each line is an id
    images_part1/0001.jpg ... images_part5/5109.jpg, or images/0001.jpg ...
    mats/0001.mat ..."""
    variants = ("NWPU-Crowd", "NWPU")
    holding = "train.txt"
    parts: ClassVar = {"train": "train", "val": "val", "test": "val", "predict": "test"}
    images = "images"
    listing = "{part}.txt"
    annotations = ("mats/{stem}.mat",)

    def image_folder(self, root: Path, part: str, name: str) -> str:
        """Name the folder of an image: a thousand ids in each of five, or all of them in one."""
        if (root / "images").is_dir() or not name.isdecimal():
            return "images"
        return f"images_part{min(5, (int(name) - 1) // 1000 + 1)}"


class JHUCrowd(CrowdDataModule):
    """JHU-Crowd++ as released: 2,272 images to train, 500 to validate, 1,600 to test.

    Sindagi et al., "JHU-CROWD++: Large-Scale Crowd Counting Dataset and A Benchmark Method", TPAMI 2020.

    Args:
        root: the folder that holds ``train``, ``val`` and ``test``, or the one above it.
        val_split: validate on the release's own ``val``, on images ``drawn`` from ``train``, or on ``test`` as the
            reference of CLIP-EBC does (``official``).
        train_on: ``train`` alone, or ``train+val``, as that reference does; not with ``val_split: val``.
        options: those of :class:`CrowdDataModule`.

    Raises:
        InputError: validation images would be trained on.
    """

    layout: ClassVar[str] = """\
  root/ (jhu_crowd_v2.0)
    train/images/0001.jpg ...
    train/gt/0001.txt ...               x y w h o b
    train/image_labels.txt              id,count,scene,weather,distractor
    val/..., test/..."""
    variants = ("jhu_crowd_v2.0", "jhu_crowd")
    holding = "train/image_labels.txt"
    images = "{part}/images"
    listing = "{part}/image_labels.txt"
    annotations = ("{part}/gt/{stem}.txt",)
    val_splits = ("val", "drawn", "official")

    def __init__(
        self,
        root: str | Path,
        *,
        val_split: Literal["val", "drawn", "official"] = "val",
        train_on: Literal["train", "train+val"] = "train",
        **options: Any,
    ) -> None:
        super().__init__(root, val_split=val_split, **options)
        check("data.train_on", train_on, one_of=("train", "train+val"))
        if train_on == "train+val" and val_split == "val":
            raise InputError(
                "data.train_on is 'train+val' with data.val_split 'val', so validation images would be trained on; "
                "set data.val_split to 'drawn' or 'official'"
            )
        self.train_on = train_on
        self._counts: dict[tuple[Path, str], tuple[str, int]] = {}  # of each listed image, with its place in the list

    def part_of(self, split: Split) -> str:
        """Name the part of a split."""
        if split == "train" or (split == "val" and self.val_split == "drawn"):
            return self.train_on
        return "val" if split == "val" and self.val_split == "val" else "test"

    def listed_names(self, source: Path) -> list[str]:
        """Read the names of a list, and the counts to check points against."""
        names = []
        for number, line in enumerate(read_lines(source, f"expected\n{self.layout}"), 1):
            cells = [cell.strip() for cell in line.split(",")]
            if not line.strip():
                continue
            if len(cells) < 2 or not cells[1].isdecimal():
                raise InputError(f"{source}:{number}: is {line!r}; expected id,count,scene,weather,distractor")
            names.append(cells[0])
            self._counts[source.parent / "gt", cells[0]] = f"{source}:{number}", int(cells[1])
        return names

    def read_annotation(self, path: Path) -> dict[str, np.ndarray]:
        """Read centres of heads; an image without people has an empty file."""
        rows = [line.split() for line in read_lines(path, "every image needs its own") if line.strip()]
        if short := next((i for i, row in enumerate(rows, 1) if len(row) < 2), None):
            raise InputError(f"{path}: row {short} is {rows[short - 1]}; expected x y w h o b")
        points = as_points([row[:2] for row in rows], f"{path} (lines x y w h o b)")
        place, count = self._counts[path.parent, path.stem]
        if len(points) != count:
            raise InputError(
                f"{place}: counts {count} people, but {path.parent.parent.name}/gt/{path.name} has {len(points)} "
                "points; one of them is damaged"
            )
        return {"points": points}


class CARPK(CrowdDataModule):
    """CARPK (and PUCPR+, which has the same layout) as its development kit lays it out.

    Hsieh et al., "Drone-based Object Counting by Spatially Regularized Regional Proposal Network", ICCV 2017. Points
    are the centres of the boxes. The release has no validation split; ``val_split: official`` takes the test list.

    Args:
        root: ``CARPK_devkit``, the folder above it, or its ``data`` folder.
        class_name: what the cars are called.
        options: those of :class:`CrowdDataModule`.
    """

    layout: ClassVar[str] = """\
  root/ (CARPK_devkit/data)
    ImageSets/train.txt, test.txt           one image name a line, without suffix
    Annotations/20160331_NTU_00001.txt ...  x1 y1 x2 y2 class
    Images/20160331_NTU_00001.png ..."""
    variants = ("data", "CARPK_devkit/data", "PUCPR+_devkit/data")
    holding = "ImageSets"
    parts: ClassVar = {"train": "train", "val": "test", "test": "test", "predict": "test"}
    images = "Images"
    listing = "ImageSets/{part}.txt"
    suffix = ".png"
    annotations = ("Annotations/{stem}.txt",)
    val_splits = ("drawn", "official", "test")

    def __init__(self, root: str | Path, *, class_name: str = "cars", **options: Any) -> None:
        super().__init__(root, class_name=class_name, **options)

    def read_split(self, split: Split) -> list[Record]:
        """Read every image of a split; what is left of the training list after the draw comes by name."""
        records = super().read_split(split)
        if split == "train" and self.val_split == "drawn":
            records.sort(key=lambda record: record.image_id.removesuffix(self.suffix))
        return records

    def read_annotation(self, path: Path) -> dict[str, np.ndarray]:
        """Read boxes and their centres."""
        rows = [line.split() for line in read_lines(path, "every image needs its annotation") if line.strip()]
        boxes = as_boxes([row[:4] for row in rows], f"{path} (lines x1 y1 x2 y2 class)")
        return {"points": (boxes[:, :2] + boxes[:, 2:]) / 2, "boxes": boxes}
