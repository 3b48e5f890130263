"""Data sets with a box around every object: COCO, PASCAL VOC and CARPK, and readers of their files."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal
from xml.etree import ElementTree

import numpy as np

from counting_zoo.class_lists import COCO_CLASSES, VOC_CLASSES
from counting_zoo.data.base import CountingDataModule, Prompts
from counting_zoo.data.checks import as_boxes, inside_root
from counting_zoo.data.records import Record, Split
from counting_zoo.data.splits import check_choice, draw
from counting_zoo.data.tables import read_json
from counting_zoo.errors import InputError, listed

_NEEDED = {
    "categories": ("id", "name"),
    "images": ("id", "file_name", "height", "width"),
    "annotations": ("image_id", "category_id", "bbox"),
}


@dataclass(frozen=True)
class Instances:
    """The annotation of I pictures with A objects.

    Args:
        files: I file names.
        ids: ``(I,)`` int64 ids of the pictures.
        sizes: ``(I, 2)`` int64 height and width.
        names: names of the categories, by their ids.
        image: ``(A,)`` int64 index into ``files``, in the order of the file's annotations.
        category: ``(A,)`` int64 index into ``names``.
        boxes: ``(A, 4)`` float64 x1, y1, x2, y2.
        crowd: ``(A,)`` bool: the box is around a crowd of such objects.
    """

    files: list[str]
    ids: np.ndarray
    sizes: np.ndarray
    names: list[str]
    image: np.ndarray
    category: np.ndarray
    boxes: np.ndarray
    crowd: np.ndarray


def read_instances(path: Path) -> Instances:
    """Read a file such as ``instances_val2014.json``.

    Raises:
        InputError: the file is no JSON or not in COCO's layout; names the entry and the field.
    """
    content = read_json(path, object_hook=_without_outline)
    _check_layout(content, path)
    images, annotations = content["images"], content["annotations"]
    names = {category["id"]: str(category["name"]) for category in content["categories"]}
    rows = {image["id"]: i for i, image in enumerate(images)}
    kinds = {number: k for k, number in enumerate(sorted(names))}
    for what, known, given in (("images", rows, images), ("categories", names, content["categories"])):
        if len(known) < len(given):
            raise InputError(f"{path}: {len(given)} {what} have only {len(known)} different ids; expected one each")
    for field, known, what in (("image_id", rows, "image"), ("category_id", kinds, "category")):
        lost = next((i for i, one in enumerate(annotations) if one[field] not in known), None)
        if lost is not None:
            raise InputError(
                f"{path}: annotations[{lost}] has {field} {annotations[lost][field]!r}, but no {what} has this id; "
                "correct it or delete the annotation"
            )
    try:
        boxes = np.array([one["bbox"] for one in annotations], np.float64).reshape(-1, 4)
        sizes = np.array([(image["height"], image["width"]) for image in images], np.int64).reshape(-1, 2)
        ids = np.array([image["id"] for image in images], np.int64)
    except (TypeError, ValueError, OverflowError) as error:
        raise InputError(
            f"{path}: a bbox is not four numbers [x, y, width, height], or an id, height or width no whole number "
            f"({error}); correct it"
        ) from error
    bad = np.flatnonzero(~np.isfinite(boxes).all(1) | (boxes[:, 2:] < 0).any(1))
    if len(bad):
        raise InputError(
            f"{path}: annotations[{bad[0]}] has the bbox {annotations[bad[0]]['bbox']} ({len(bad)} such); expected "
            "finite [x, y, width, height] with a width and height of at least 0"
        )
    boxes[:, 2:] += boxes[:, :2]
    return Instances(
        files=[str(image["file_name"]) for image in images],
        ids=ids,
        sizes=sizes,
        names=[names[number] for number in sorted(names)],
        image=np.array([rows[one["image_id"]] for one in annotations], np.int64),
        category=np.array([kinds[one["category_id"]] for one in annotations], np.int64),
        boxes=boxes,
        crowd=np.array([bool(one.get("iscrowd")) for one in annotations], bool),
    )


def _without_outline(item: dict[str, Any]) -> dict[str, Any]:
    """Dropped while the file is parsed, which needs a fraction of the memory."""
    item.pop("segmentation", None)
    return item


def _check_layout(content: Any, path: Path) -> None:
    for part, fields in _NEEDED.items():
        listed = content.get(part) if isinstance(content, dict) else None
        if not isinstance(listed, list):
            found = sorted(content) if isinstance(content, dict) else type(content).__name__
            raise InputError(f"{path}: has no list {part!r}, only {found}; expected COCO's instances_*.json")
        for i, one in enumerate(listed):
            lacking = [field for field in fields if not isinstance(one, dict) or field not in one]
            if lacking:
                found = sorted(one) if isinstance(one, dict) else repr(one)[:60]
                raise InputError(f"{path}: {part}[{i}] has no {', '.join(lacking)}, only {found}; complete it")


XML_LIMIT = 1 << 25  # bytes; a picture with a thousand objects has half a megabyte


_CORNERS = ("xmin", "ymin", "xmax", "ymax")


@dataclass(frozen=True)
class VOCObjects:
    """What an annotation says of its picture.

    Args:
        size: ``(height, width)``.
        names: M names.
        boxes: ``(M, 4)`` float64 x1, y1, x2, y2 in continuous coordinates. The file numbers pixels from 1 and means
            both corners' pixels to be inside, so x1 = xmin - 1 and x2 = xmax.
        difficult: ``(M,)`` bool: the annotators marked the object as hard to recognise.
        flat: ``(M,)`` bool: the file's two corners share a row or column, mostly a slip of the hand.
    """

    size: tuple[int, int]
    names: list[str]
    boxes: np.ndarray
    difficult: np.ndarray
    flat: np.ndarray


def read_voc_xml(path: Path) -> VOCObjects:
    """Read the annotation of one picture.

    Files with a document type are refused before it is read: its entities can make a small file fill the memory.

    Raises:
        InputError: the file cannot be read, is no XML, declares a document type, or lacks a field that counting needs.
    """
    root = _parse(path)
    if root.tag != "annotation":
        raise InputError(f"{path}: is <{root.tag}>; expected <annotation> as VOC and its drawing tools write it")
    width, height = (_number(root, f"size/{side}", f"{path}") for side in ("width", "height"))
    if min(width, height) < 1:
        raise InputError(f"{path}: <size> is {width:g} x {height:g}; expected the picture's width and height in pixels")
    objects = root.findall("object")  # its direct children only: a person's <part>s have names and boxes of their own
    names, corners, difficult = [], [], []
    for number, item in enumerate(objects, 1):
        name = (item.findtext("name") or "").strip()
        if not name:
            raise InputError(
                f"{path}: object {number} has no <name> (found: {_children(item)}); add it or delete the object"
            )
        where = f"{path}: object {number} ({name!r})"
        names.append(name)
        corners.append([_number(item, f"bndbox/{corner}", where) for corner in _CORNERS])
        mark = (item.findtext("difficult") or "0").strip()
        if mark not in ("0", "1"):
            raise InputError(f"{where}: <difficult> is {mark!r}; expected 0 or 1")
        difficult.append(mark == "1")
    boxes = np.array(corners, np.float64).reshape(-1, 4)
    swapped = np.flatnonzero((boxes[:, 2:] < boxes[:, :2]).any(1))
    if len(swapped):
        number = int(swapped[0])
        raise InputError(
            f"{path}: object {number + 1} ({names[number]!r}): <bndbox> is {_shown(corners[number])}; expected xmax of "
            "at least xmin, and ymax of at least ymin"
        )
    flat = (boxes[:, 2:] == boxes[:, :2]).any(1)
    boxes[:, :2] -= 1
    return VOCObjects((int(height), int(width)), names, boxes, np.array(difficult, bool), flat)


class _Builder(ElementTree.TreeBuilder):
    """Stops at a document type, which comes before any entity can be used."""

    def doctype(self, name: str, pubid: str | None, system: str | None) -> None:
        raise InputError(f"has a document type (<!DOCTYPE {name}>), which annotation never needs; delete it")


def _parse(path: Path) -> ElementTree.Element:
    try:
        size = path.stat().st_size
        if size > XML_LIMIT:
            raise InputError(
                f"is {size / 1e6:.0f} MB large; expected one picture's annotation, below {XML_LIMIT >> 20} MiB"
            )
        return ElementTree.fromstring(path.read_bytes(), ElementTree.XMLParser(target=_Builder()))
    except (ElementTree.ParseError, LookupError, ValueError) as error:  # unknown encodings raise the latter two
        reason = error if isinstance(error, InputError) else f"is no well-formed XML ({error}); write it anew"
        raise InputError(f"{path}: {reason}") from error
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror}); every picture needs its annotation") from None


def _number(item: ElementTree.Element, field: str, where: str) -> float:
    """A number somewhere below an element."""
    text = item.findtext(field)
    if text is None:
        outer = field.split("/")[0]
        found = item.find(outer)
        said = f"<{outer}> (found: {_children(item)})" if found is None else f"<{field}> (found: {_children(found)})"
        raise InputError(f"{where}: has no {said}; complete the annotation")
    try:
        value = float(text)
    except ValueError:
        value = float("nan")
    if not np.isfinite(value):
        raise InputError(f"{where}: <{field}> is {text.strip()!r}; expected a finite number")
    return value


def _children(item: ElementTree.Element) -> str:
    return ", ".join(f"<{child.tag}>" for child in item) or "nothing"


def _shown(values: Sequence[float]) -> str:
    return ", ".join(f"{name} {value:g}" for name, value in zip(_CORNERS, values, strict=True))


log = logging.getLogger(__name__)


Unlisted = Literal["error", "drop"]


def boxed_record(
    image_id: str, path: Path, names: list[str], boxes: np.ndarray, labels: np.ndarray, size: tuple[int, int]
) -> Record:
    """A record whose points are the centres of its boxes; its classes are those that are in the picture.

    Args:
        image_id: unique in the data set.
        path: the picture.
        names: every class of the data set; the first stands for a picture without objects.
        boxes: ``(M, 4)`` x1, y1, x2, y2.
        labels: ``(M,)`` index into ``names``.
        size: ``(height, width)``.

    Example:
        >>> boxes, labels = np.array([[0, 0, 4, 2], [1, 1, 3, 3], [2, 2, 6, 6]]), np.array([2, 0, 2])
        >>> r = boxed_record("a.jpg", Path("a.jpg"), ["cat", "cow", "dog"], boxes, labels, (6, 6))
        >>> r.classes, r.counts.tolist(), r.labels.tolist(), r.points[0].tolist()
        (['cat', 'dog'], [1.0, 2.0], [1, 0, 1], [2.0, 1.0])
    """
    present, own = np.unique(labels, return_inverse=True)
    own = own.astype(np.int64)
    boxes = np.asarray(boxes, np.float64).reshape(-1, 4)
    return Record(
        image_id,
        path,
        classes=[names[k] for k in present] or names[:1],
        points=((boxes[:, :2] + boxes[:, 2:]) / 2).astype(np.float32),
        labels=own,
        boxes=boxes.astype(np.float32),
        box_labels=own,
        counts=np.bincount(own, minlength=max(len(present), 1)).astype(np.float32),
        size=size,
    )


def report_unlisted(found: dict[str, str], unlisted: Unlisted, classes: list[str], where: str) -> None:
    """Objects whose class nobody asks about are an error, or left out and reported.

    Args:
        found: for each such class, a place where it is.
        unlisted: ``error`` or ``drop``.
        classes: those that are asked about.
        where: the file or folder, for messages.

    Raises:
        InputError: there are such objects, and ``unlisted`` is ``error``.
    """
    if not found:
        return
    others = listed((f"{name!r} ({place})" for name, place in found.items()), 5)
    message = f"{where}: objects of classes that data.classes does not list: {others}"
    if unlisted == "error":
        raise InputError(
            f"{message}; it lists {listed(classes, 20)}. Correct the name, add it to data.classes, or set "
            "data.unlisted to 'drop'"
        )
    log.warning("%s; left out (data.unlisted=drop)", message)


def report_flat(places: list[str], where: str) -> None:
    """Boxes without width or height count as one object each, and are told about.

    Args:
        places: one for each such box.
        where: the file or folder.
    """
    if places:
        found = Counter(places)
        log.warning(
            "%s: %d boxes have no width or no height, in %s; each counts as one object",
            where,
            len(places),
            listed(found, 5),
        )


class VOCCounts(CountingDataModule):
    """PASCAL VOC as released: counts of each class, with the boxes and their centres as points.

    Everingham et al., "The Pascal Visual Object Classes (VOC) Challenge", IJCV 2010. Each picture is asked about all
    classes. ``train``, ``val`` and ``test`` of 2007 have 2,501, 2,510 and 4,952 pictures and are the splits of the
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
        val_split: the list to validate on, or ``drawn``: some pictures of ``train_split``.
        test_split: the list to test on. VOC has published the annotation of its test pictures for 2007 only.
        val_fraction: how much of ``train_split`` is drawn.
        split_seed: seeds the draw.
        suffix: of the pictures' file names.
        prompts: which names are asked about.
        outside: what happens to boxes that reach over the border.
        duplicates: what happens to the same file in two splits.
        options: those of :class:`CountingDataModule`.

    Raises:
        InputError: an option is none of its choices, or ``classes`` is empty.
    """

    layout: ClassVar[str] = """\
  root/ (VOCdevkit/VOC2007)
    ImageSets/Main/train.txt, val.txt ...   one picture name a line, without suffix
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
        if year not in (2007, 2012):
            raise InputError(f"data.year is {year!r}; expected 2007 or 2012")
        check_choice("difficult", difficult, ("exclude", "include"))
        check_choice("unlisted", unlisted, ("error", "drop"))
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
        """Every picture of a split; ``predict`` takes the test list, whose annotation need not be there."""
        root = self.find_root(self.folder, f"VOCdevkit/{self.folder}", holding="ImageSets/Main")
        if root.name in ("VOC2007", "VOC2012") and root.name != self.folder:
            raise InputError(f"data.root is {root}, but data asks for {self.folder}; set data.year to {root.name[3:]}")
        name = self.split_names[split]
        if split == "predict":
            return [Record(f"{stem}{self.suffix}", self._picture(root, stem)) for stem in self._stems(root, name)]
        self._check_apart(root)
        records = self._annotated(root, self.split_names["train"] if name == "drawn" else name)
        if self.split_names["val"] != "drawn" or split == "test":
            return records
        held_out = set(draw([r.image_id for r in records], {"val": self.val_fraction}, self.split_seed)["val"])
        return [r for r in records if (r.image_id in held_out) == (split == "val")]

    def _check_apart(self, root: Path) -> None:
        """No picture to validate or test on may be one to train on."""
        train = self.split_names["train"]
        for split in ("val", "test"):
            name = self.split_names[split]
            if name == "drawn" or not self._list_path(root, name).is_file():
                continue  # a list that is absent is missed when its split is read
            if both := sorted(set(self._stems(root, train)) & set(self._stems(root, name))):
                raise InputError(
                    f"{root}: {len(both)} pictures are in both {train!r} (data.train_split) and {name!r} "
                    f"(data.{split}_split), such as {both[0]}, so {split} pictures would be trained on; set one of the "
                    "two to another list, or data.val_split to 'drawn'"
                )

    def _annotated(self, root: Path, name: str) -> list[Record]:
        """The records of a list, whose files are read once."""
        if name in self._lists:
            return self._lists[name]
        index = {name: k for k, name in enumerate(self.names)}
        records: list[Record] = []
        flat: list[str] = []
        unlisted: dict[str, str] = {}
        for stem in self._stems(root, name):
            path = inside_root(root, f"Annotations/{stem}.xml", str(self._list_path(root, name)))
            if not path.is_file():
                raise InputError(
                    f"{path}: is not there, but {name}.txt lists {stem}; complete the folder, or choose another list "
                    "(the annotation of VOC 2012's test pictures is not public: set data.test_split to 'val')"
                )
            found = read_voc_xml(path)
            labels = np.array([index.get(name, -1) for name in found.names], np.int64)
            kept = (labels >= 0) & ~(found.difficult if self.difficult == "exclude" else np.zeros(len(labels), bool))
            picture = self._picture(root, stem)
            records.append(
                boxed_record(f"{stem}{self.suffix}", picture, self.names, found.boxes[kept], labels[kept], found.size)
            )
            flat += [f"{path.name} ({found.names[i]})" for i in np.flatnonzero(found.flat & kept)]
            for i in np.flatnonzero(labels < 0):
                unlisted.setdefault(found.names[i], path.name)
        where = f"{root / 'Annotations'}, {name} list"
        report_unlisted(unlisted, self.unlisted, self.names, where)
        report_flat(flat, where)
        self._lists[name] = records
        return records

    def _picture(self, root: Path, stem: str) -> Path:
        return inside_root(root, f"JPEGImages/{stem}{self.suffix}", f"{root}/ImageSets")

    def _list_path(self, root: Path, name: str) -> Path:
        return inside_root(root, f"ImageSets/Main/{name}.txt", "data")

    def _stems(self, root: Path, name: str) -> list[str]:
        path = self._list_path(root, name)
        try:
            lines = [line.strip() for line in path.read_text(encoding="utf-8-sig").splitlines()]
        except (OSError, UnicodeDecodeError) as error:
            known = sorted(other.stem for other in path.parent.glob("*.txt") if "_" not in other.stem)
            raise InputError(
                f"{path}: cannot be read as UTF-8 text ({error}); set data.train_split, data.val_split and "
                f"data.test_split to lists that are there: {', '.join(known) or 'none'}"
            ) from None
        if odd := next((i for i, line in enumerate(lines, 1) if len(line.split()) > 1), None):
            raise InputError(
                f"{path}, line {odd}: is {lines[odd - 1]!r}; expected one picture name a line, as in train.txt (lists "
                "of one class, such as dog_train.txt, hold all pictures)"
            )
        return [line for line in lines if line]


Protocol = Literal["official", "chattopadhyay", "coco"]


class COCOCounts(CountingDataModule):
    """COCO as released: counts of each class, with the boxes and their centres as points.

    Lin et al., "Microsoft COCO: Common Objects in Context", ECCV 2014. Each picture is asked about all classes. COCO
    publishes no annotation of its test pictures, so the counting literature halves the validation pictures, in two
    ways, and results on one are not comparable with results on the other. Numbers of pictures are those of 2014:

    - ``official``, the reference of Lower-Count: only pictures with at least one annotation, in the order in which the
      file's list of annotations names them first. 82,081 to train; the first half, 20,068, of ``val`` to validate and
      the rest, 20,069, to test.
    - ``chattopadhyay`` (Chattopadhyay et al., "Counting Everyday Objects in Everyday Scenes", CVPR 2017): all
      pictures, by id. 82,783 to train, 20,252 to validate and 20,252 to test.
    - ``coco``: all pictures, by id; validation and test are both the whole of ``val``, so a checkpoint that is chosen
      by validation scores is chosen on the pictures it is tested on.

    Args:
        root: the folder that holds ``annotations``, or the folder above it.
        year: 2014 or 2017.
        protocol: ``official``, ``chattopadhyay`` or ``coco``, see above.
        crowd: a region marked as a crowd (``iscrowd``) is one object of its class, as both protocols of the
            literature have it (``include``), or none (``exclude``). The pictures of a split are the same either way.
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
        if year not in (2014, 2017):
            raise InputError(f"data.year is {year!r}; expected 2014 or 2017")
        check_choice("protocol", protocol, ("official", "chattopadhyay", "coco"))
        check_choice("crowd", crowd, ("include", "exclude"))
        check_choice("unlisted", unlisted, ("error", "drop"))
        if not names:
            raise InputError("data.classes is empty; expected the names of what is annotated")
        self.names = names
        self.year = year
        self.protocol = protocol
        self.crowd = crowd
        self.unlisted: Unlisted = unlisted
        self._instances: dict[str, Instances] = {}
        self._read: dict[Split, list[Record]] = {}
        self.save_hyperparameters({"year": year, "protocol": protocol, "crowd": crowd})  # results keep these

    def read_split(self, split: Split) -> list[Record]:
        """Every picture of a split; ``predict`` takes the test split without its annotation."""
        if split in self._read:
            return self._read[split]
        root = self.find_root("coco", "COCO", f"coco{self.year}", holding="annotations")
        part = f"{'train' if split == 'train' else 'val'}{self.year}"
        path = root / "annotations" / f"instances_{part}.json"
        if part not in self._instances:
            self._instances[part] = read_instances(path)
        found = self._instances[part]
        order = self._order(found, split)
        folder = next((name for name in (part, f"images/{part}") if (root / name).is_dir()), part)
        pictures = {int(i): inside_root(root, f"{folder}/{found.files[i]}", str(path)) for i in order}
        if split == "predict":
            records = [Record(f"{part}/{found.files[i]}", picture) for i, picture in pictures.items()]
        else:
            records = self._boxed(found, pictures, part, path)
        self._read[split] = records
        return records

    def _order(self, found: Instances, split: Split) -> np.ndarray:
        """Which pictures are in a split, as indices in its order."""
        order = np.argsort(found.ids, kind="stable")
        if self.protocol == "official":
            pictures, first = np.unique(found.image, return_index=True)
            order = pictures[np.argsort(first)]
        if split == "train" or self.protocol == "coco":
            return order
        half = len(order) // 2
        return order[:half] if split == "val" else order[half:]

    def _boxed(self, found: Instances, pictures: dict[int, Path], part: str, path: Path) -> list[Record]:
        if unknown := [name for name in self.names if name not in found.names]:
            raise InputError(
                f"{path}: has no category {', '.join(map(repr, unknown[:5]))} ({len(unknown)} of data.classes are not "
                f"there); list in data.classes only those that are: {', '.join(found.names[:100])}"
            )
        index = {name: k for k, name in enumerate(self.names)}
        labels = np.array([index.get(name, -1) for name in found.names], np.int64)[found.category]
        kept = (labels >= 0) & ~(found.crowd if self.crowd == "exclude" else np.zeros(len(labels), bool))
        by_picture = np.argsort(found.image, kind="stable")
        ends = np.searchsorted(found.image[by_picture], np.arange(len(found.files) + 1))
        flat = (found.boxes[:, 2:] <= found.boxes[:, :2]).any(1) & kept
        records: list[Record] = []
        unlisted: dict[str, str] = {}
        flat_places: list[str] = []
        for i, picture in pictures.items():
            rows = by_picture[ends[i] : ends[i + 1]]
            for row in rows[labels[rows] < 0]:
                unlisted.setdefault(found.names[found.category[row]], found.files[i])
            flat_places += [found.files[i]] * int(flat[rows].sum())
            rows = rows[kept[rows]]
            size = (int(found.sizes[i, 0]), int(found.sizes[i, 1]))
            records.append(
                boxed_record(f"{part}/{found.files[i]}", picture, self.names, found.boxes[rows], labels[rows], size)
            )
        report_unlisted(unlisted, self.unlisted, self.names, str(path))
        report_flat(flat_places, str(path))
        return records


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
