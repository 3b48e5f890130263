"""Data sets with a box around every object of many classes: COCO and PASCAL VOC."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar, Literal, NamedTuple

import numpy as np

from counting_zoo.class_lists import COCO_CLASSES, VOC_CLASSES
from counting_zoo.data.base import CountingDataModule, Prompts
from counting_zoo.data.checks import inside_root
from counting_zoo.data.detection import COCO, read_coco, read_voc_xml
from counting_zoo.data.records import Record, Split
from counting_zoo.data.splits import draw_split
from counting_zoo.errors import InputError, check, listed
from counting_zoo.io import read_lines

log = logging.getLogger(__name__)


Unlisted = Literal["error", "drop"]


class BoxedImage(NamedTuple):
    """Boxes of one image as its data set has them.

    Args:
        image_id: unique in the data set.
        path: the image.
        size: ``(height, width)``.
        names: M class names.
        boxes: ``(M, 4)`` float64 x1, y1, x2, y2.
        flat: ``(M,)`` bool: the box has no width or no height in the file.
        left_out: ``(M,)`` bool: the object does not count.
        place: file of the annotation, or of the image, for messages.
    """

    image_id: str
    path: Path
    size: tuple[int, int]
    names: list[str]
    boxes: np.ndarray
    flat: np.ndarray
    left_out: np.ndarray
    place: str


def boxed_records(images: Iterable[BoxedImage], classes: list[str], unlisted: Unlisted, where: str) -> list[Record]:
    """Make records whose points are the centres of their boxes; the classes of each are those in the image.

    Boxes without width or height count as one object each, with a warning.

    Args:
        images: with their boxes.
        classes: every class of the data set; the first stands for an image without objects.
        unlisted: objects of other classes are an ``error``, or left out (``drop``) with a warning.
        where: the file or folder, for messages.

    Raises:
        InputError: there are objects of other classes, and ``unlisted`` is ``error``.
    """
    index = {name: k for k, name in enumerate(classes)}
    records: list[Record] = []
    flat: Counter[str] = Counter()
    others: dict[str, str] = {}  # a file that has each class that is not listed
    for image in images:
        labels = np.array([index.get(name, -1) for name in image.names], np.int64)
        kept = (labels >= 0) & ~image.left_out
        for i in np.flatnonzero(labels < 0):
            others.setdefault(image.names[i], image.place)
        flat.update(f"{image.place} ({image.names[i]})" for i in np.flatnonzero(image.flat & kept))
        boxes = image.boxes[kept]
        present, indices = np.unique(labels[kept], return_inverse=True)
        indices = indices.astype(np.int64)
        records.append(
            Record(
                image.image_id,
                image.path,
                classes=[classes[k] for k in present] or classes[:1],
                points=((boxes[:, :2] + boxes[:, 2:]) / 2).astype(np.float32),
                labels=indices,
                boxes=boxes.astype(np.float32),
                box_labels=indices,
                counts=np.bincount(indices, minlength=max(len(present), 1)).astype(np.float32),
                size=image.size,
            )
        )
    if others:
        shown = listed((f"{name!r} ({place})" for name, place in others.items()), 5)
        message = f"{where}: objects of classes that data.classes does not list: {shown}"
        if unlisted == "error":
            raise InputError(
                f"{message}; it lists {listed(classes, 20)}. Correct the name, add it to data.classes, or set "
                "data.unlisted to 'drop'"
            )
        log.warning("%s; left out (data.unlisted=drop)", message)
    if flat:
        log.warning(
            "%s: %d boxes have no width or no height, in %s; each counts as one object",
            where,
            flat.total(),
            listed(flat, 5),
        )
    return records


class VOCCounts(CountingDataModule):
    """PASCAL VOC as released: counts of each class, with the boxes and their centres as points.

    Everingham et al., "The Pascal Visual Object Classes (VOC) Challenge", IJCV 2010. Each image is asked about all
    classes. ``train``, ``val`` and ``test`` of 2007 have 2,501, 2,510 and 4,952 images and are the splits of the
    counting literature (Chattopadhyay et al., "Counting Everyday Objects in Everyday Scenes", CVPR 2017).

    That literature has two ground truths. The reference of Lower-Count leaves out the objects marked as difficult, as
    VOC's own scores do, so that is the default: 12,032 objects in the test split of 2007. Chattopadhyay et al. count
    them: 14,976. Scores on one are not comparable with scores on the other, so every result says which it is.

    Args:
        root: ``VOCdevkit``, the folder above it, or the folder of the year.
        year: 2007 or 2012.
        folder: the folder below ``root`` that holds ``ImageSets``, for sets that are not VOC's own; ``VOC2007`` or
            ``VOC2012`` if ``None``.
        classes: the names to ask about, in this order; VOC's 20 if ``None``.
        difficult: ``exclude`` or ``include`` the objects that are marked as difficult.
        unlisted: objects of another class than ``classes`` are an ``error``, or left out (``drop``) and reported.
        train_split: the list of ``ImageSets/Main`` to train on, such as ``train`` or ``trainval``.
        val_split: the list to validate on, or ``drawn``: some images of ``train_split``.
        test_split: the list to test on. VOC has published the annotation of its test images for 2007 only.
        val_fraction: how much of ``train_split`` is drawn.
        split_seed: seeds the draw.
        suffix: of the images' file names.
        prompts: which names are asked about.
        outside: what happens to boxes that reach over the border.
        duplicates: what happens to the same file in two splits.
        options: those of :class:`CountingDataModule`.

    Raises:
        InputError: an option is none of its choices, or ``classes`` is empty.
    """

    layout: ClassVar[str] = """\
  root/ (VOCdevkit/VOC2007)
    ImageSets/Main/train.txt, val.txt ...   one image name a line, without suffix
    Annotations/000005.xml ...              <annotation> with <size> and <object>s: <name>, <bndbox>, <difficult>
    JPEGImages/000005.jpg ..."""

    def __init__(
        self,
        root: str | Path,
        *,
        year: Literal[2007, 2012] = 2007,
        folder: str | None = None,
        classes: list[str] | None = None,
        difficult: Literal["exclude", "include"] = "exclude",
        unlisted: Unlisted = "error",
        train_split: str = "train",
        val_split: str = "val",
        test_split: str = "test",
        val_fraction: float = 0.1,
        split_seed: int = 0,
        suffix: str = ".jpg",
        prompts: Prompts = "all",
        outside: Literal["error", "clamp", "drop"] = "clamp",
        duplicates: Literal["error", "warn", "ignore"] = "warn",
        **options: Any,
    ) -> None:
        names = list(VOC_CLASSES) if classes is None else classes
        super().__init__(root, classes=names, prompts=prompts, outside=outside, duplicates=duplicates, **options)
        check("data.year", year, one_of=(2007, 2012))
        check("data.difficult", difficult, one_of=("exclude", "include"))
        check("data.unlisted", unlisted, one_of=("error", "drop"))
        if not names:
            raise InputError("data.classes is empty; expected the names of what is annotated")
        self.names = names
        self.year = year
        self.folder = folder or f"VOC{year}"
        self.difficult = difficult
        self.unlisted: Unlisted = unlisted
        self.split_names = {"train": train_split, "val": val_split, "test": test_split, "predict": test_split}
        self.val_fraction = val_fraction
        self.split_seed = split_seed
        self.suffix = suffix
        self._lists: dict[str, list[Record]] = {}
        lists = {f"{split}_split": self.split_names[split] for split in ("train", "val", "test")}
        self.save_hyperparameters({"folder": self.folder, "difficult": difficult, **lists})  # results keep these

    def read_split(self, split: Split) -> list[Record]:
        """Read every image of a split; ``predict`` takes the test list, whose annotation need not be there."""
        root = self.find_root(self.folder, f"VOCdevkit/{self.folder}", holding="ImageSets/Main")
        if root.name in ("VOC2007", "VOC2012") and root.name != self.folder:
            raise InputError(f"data.root is {root}, but data asks for {self.folder}; set data.year to {root.name[3:]}")
        name = self.split_names[split]
        if split == "predict":
            return [Record(f"{stem}{self.suffix}", self._image(root, stem)) for stem in self._stems(root, name)]
        self._check_apart(root)
        records = self._annotated(root, self.split_names["train"] if name == "drawn" else name)
        if self.split_names["val"] != "drawn" or split == "test":
            return records
        return draw_split(records, {"val": self.val_fraction}, self.split_seed, split)

    def _check_apart(self, root: Path) -> None:
        """Make sure that no image to validate or test on is one to train on."""
        train = self.split_names["train"]
        for split in ("val", "test"):
            name = self.split_names[split]
            if name == "drawn" or not self._list_path(root, name).is_file():
                continue  # a list that is absent is missed when its split is read
            if both := sorted(set(self._stems(root, train)) & set(self._stems(root, name))):
                raise InputError(
                    f"{root}: {len(both)} images are in both {train!r} (data.train_split) and {name!r} "
                    f"(data.{split}_split), such as {both[0]}, so {split} images would be trained on; set one of the "
                    "two to another list, or data.val_split to 'drawn'"
                )

    def _annotated(self, root: Path, name: str) -> list[Record]:
        """Read the records of a list, whose files are read once."""
        if name not in self._lists:
            images = (self._boxed(root, name, stem) for stem in self._stems(root, name))
            where = f"{root / 'Annotations'}, {name} list"
            self._lists[name] = boxed_records(images, self.names, self.unlisted, where)
        return self._lists[name]

    def _boxed(self, root: Path, name: str, stem: str) -> BoxedImage:
        path = inside_root(root, f"Annotations/{stem}.xml", str(self._list_path(root, name)))
        if not path.is_file():
            raise InputError(
                f"{path}: is not there, but {name}.txt lists {stem}; complete the folder, or choose another list "
                "(the annotation of VOC 2012's test images is not public: set data.test_split to 'val')"
            )
        annotation = read_voc_xml(path)
        left_out = annotation.difficult & (self.difficult == "exclude")
        image_id, image = f"{stem}{self.suffix}", self._image(root, stem)
        return BoxedImage(
            image_id, image, annotation.size, annotation.names, annotation.boxes, annotation.flat, left_out, path.name
        )

    def _image(self, root: Path, stem: str) -> Path:
        return inside_root(root, f"JPEGImages/{stem}{self.suffix}", f"{root}/ImageSets")

    def _list_path(self, root: Path, name: str) -> Path:
        return inside_root(root, f"ImageSets/Main/{name}.txt", "data")

    def _stems(self, root: Path, name: str) -> list[str]:
        path = self._list_path(root, name)
        known = sorted(other.stem for other in path.parent.glob("*.txt") if "_" not in other.stem)
        lists = (
            f"data.train_split, data.val_split and data.test_split to lists that are there: {listed(known) or 'none'}"
        )
        lines = [line.strip() for line in read_lines(path, f"set {lists}")]
        if odd := next((i for i, line in enumerate(lines, 1) if len(line.split()) > 1), None):
            raise InputError(
                f"{path}, line {odd}: is {lines[odd - 1]!r}; expected one image name a line, as in train.txt (lists "
                "of one class, such as dog_train.txt, hold all images)"
            )
        return [line for line in lines if line]


Protocol = Literal["official", "chattopadhyay", "coco"]


class COCOCounts(CountingDataModule):
    """COCO as released: counts of each class, with the boxes and their centres as points.

    Lin et al., "Microsoft COCO: Common Objects in Context", ECCV 2014. Each image is asked about all classes. COCO
    publishes no annotation of its test images, so the counting literature halves the validation images, in two
    ways, and results on one are not comparable with results on the other. Numbers of images are those of 2014:

    - ``official``, the reference of Lower-Count: only images with at least one annotation, in the order in which the
      file's list of annotations names them first. 82,081 to train; the first half, 20,068, of ``val`` to validate and
      the rest, 20,069, to test.
    - ``chattopadhyay`` (Chattopadhyay et al., "Counting Everyday Objects in Everyday Scenes", CVPR 2017): all
      images, by id. 82,783 to train, 20,252 to validate and 20,252 to test.
    - ``coco``: all images, by id; validation and test are both the whole of ``val``, so a checkpoint that is chosen
      by validation scores is chosen on the images it is tested on.

    Args:
        root: the folder that holds ``annotations``, or the folder above it.
        year: 2014 or 2017.
        protocol: ``official``, ``chattopadhyay`` or ``coco``, see above.
        crowd: a region marked as a crowd (``iscrowd``) is one object of its class, as both protocols of the
            literature have it (``include``), or none (``exclude``). The images of a split are the same either way.
        classes: the names to ask about, in this order; COCO's 80 if ``None``.
        unlisted: objects of another class than ``classes`` are an ``error``, or left out (``drop``) and reported.
        prompts: which names are asked about.
        outside: what happens to boxes that reach over the border; COCO has some, by rounding.
        duplicates: what happens to the same file in two splits.
        options: those of :class:`CountingDataModule`.

    Raises:
        InputError: an option is none of its choices, or ``classes`` is empty.
    """

    layout: ClassVar[str] = """\
  root/
    annotations/instances_train2014.json, instances_val2014.json
    train2014/COCO_train2014_000000000009.jpg ...   or images/train2014/...
    val2014/COCO_val2014_000000000042.jpg ...       or images/val2014/..."""

    def __init__(
        self,
        root: str | Path,
        *,
        year: Literal[2014, 2017] = 2014,
        protocol: Protocol = "official",
        crowd: Literal["include", "exclude"] = "include",
        classes: list[str] | None = None,
        unlisted: Unlisted = "error",
        prompts: Prompts = "all",
        outside: Literal["error", "clamp", "drop"] = "clamp",
        duplicates: Literal["error", "warn", "ignore"] = "warn",
        **options: Any,
    ) -> None:
        names = list(COCO_CLASSES) if classes is None else classes
        super().__init__(root, classes=names, prompts=prompts, outside=outside, duplicates=duplicates, **options)
        check("data.year", year, one_of=(2014, 2017))
        check("data.protocol", protocol, one_of=("official", "chattopadhyay", "coco"))
        check("data.crowd", crowd, one_of=("include", "exclude"))
        check("data.unlisted", unlisted, one_of=("error", "drop"))
        if not names:
            raise InputError("data.classes is empty; expected the names of what is annotated")
        self.names = names
        self.year = year
        self.protocol = protocol
        self.crowd = crowd
        self.unlisted: Unlisted = unlisted
        self._files: dict[str, COCO] = {}
        self._read: dict[Split, list[Record]] = {}
        self.save_hyperparameters({"year": year, "protocol": protocol, "crowd": crowd})  # results keep these

    def read_split(self, split: Split) -> list[Record]:
        """Read every image of a split; ``predict`` takes the test split without its annotation."""
        if split in self._read:
            return self._read[split]
        root = self.find_root("coco", "COCO", f"coco{self.year}", holding="annotations")
        part = f"{'train' if split == 'train' else 'val'}{self.year}"
        path = root / "annotations" / f"instances_{part}.json"
        if part not in self._files:
            self._files[part] = _read_instances(path)
        coco = self._files[part]
        folder = next((name for name in (part, f"images/{part}") if (root / name).is_dir()), part)
        order = map(int, self._order(coco, split))
        images = [(i, inside_root(root, f"{folder}/{coco.files[i]}", str(path))) for i in order]
        if split == "predict":
            records = [Record(f"{part}/{coco.files[i]}", image) for i, image in images]
        else:
            if unknown := [name for name in self.names if name not in coco.names]:
                raise InputError(
                    f"{path}: has no category {listed(map(repr, unknown), 5)} ({len(unknown)} of data.classes are not "
                    f"there); list in data.classes only those that are: {listed(coco.names, 100)}"
                )
            records = boxed_records(self._boxed(coco, images, part), self.names, self.unlisted, str(path))
        self._read[split] = records
        return records

    def _order(self, coco: COCO, split: Split) -> np.ndarray:
        """Choose the images of a split, as indices in its order."""
        order = np.argsort(coco.ids, kind="stable")
        if self.protocol == "official":
            images, first = np.unique(coco.image, return_index=True)
            order = images[np.argsort(first)]
        if split == "train" or self.protocol == "coco":
            return order
        half = len(order) // 2
        return order[:half] if split == "val" else order[half:]

    def _boxed(self, coco: COCO, images: list[tuple[int, Path]], part: str) -> Iterator[BoxedImage]:
        flat = np.any(coco.boxes[:, 2:] <= coco.boxes[:, :2], axis=1)
        left_out = coco.crowd if self.crowd == "exclude" else np.zeros_like(coco.crowd)
        rows_of = coco.rows_by_image()
        for i, image in images:
            name, rows = coco.files[i], rows_of[coco.files[i]]
            names = [coco.names[k] for k in coco.category[rows]]
            size = (int(coco.sizes[i, 0]), int(coco.sizes[i, 1]))
            yield BoxedImage(f"{part}/{name}", image, size, names, coco.boxes[rows], flat[rows], left_out[rows], name)


def _read_instances(path: Path) -> COCO:
    """Read an annotation file of the release; its rows are let go, as loader processes need the arrays only."""
    coco = read_coco(path, "category_id", "bbox")
    if coco.ids.dtype.kind != "i" and len(coco.ids):
        raise InputError(f"{path}: images have ids such as {coco.ids[0]!r}; expected whole numbers, as COCO has them")
    if not (coco.sizes > 0).all():
        i = int(np.flatnonzero((coco.sizes < 1).any(1))[0])
        raise InputError(f"{path}, images[{i}] has no height and width of at least 1; complete it")
    return replace(coco, rows=[])
