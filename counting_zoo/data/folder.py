"""Folders of images: for prediction, and with annotation files for training and testing."""

from __future__ import annotations

import logging
import os
import re
import unicodedata
import warnings
from dataclasses import fields, replace
from pathlib import Path
from typing import Any, ClassVar, Literal, NamedTuple

import numpy as np

from counting_zoo.data.base import CountingDataModule
from counting_zoo.data.checks import inside_root
from counting_zoo.data.records import Record, Split
from counting_zoo.data.splits import SPLITS, draw, draw_split, read_splits, take_ranges
from counting_zoo.data.tables import Captions, Marks, read_captions, read_marks, read_mat_points
from counting_zoo.errors import InputError, check
from counting_zoo.images import IMAGE_SUFFIXES, decode_channels, image_size

Dot = Literal["pixel", "blob"]


class Dots(NamedTuple):
    """Points of a dot image: ``(N, 2)`` float32 x, y, its (height, width), and how many blobs are suspect."""

    points: np.ndarray
    size: tuple[int, int]
    n_large: int = 0  # blobs of at least 1.5 times the usual size, where objects may touch


def read_dots(path: Path, dot: Dot | None = None) -> Dots:
    """Read the objects that a dot image marks on black.

    A pixel in column x, row y is the point (x + 0.5, y + 0.5). Any value above 0 in any colour is a mark (of 16-bit
    colours the upper byte counts, so any value above 255); pixels that are wholly transparent are none.

    Args:
        path: PNG, BMP, TIFF or lossless WebP of any number of bits and colours.
        dot: each marked ``pixel`` is an object, neighbours too; or each ``blob`` of pixels that touch, at corners
            too, is one, at its centroid. ``None`` means ``pixel``, but refuses marks that look like blobs.

    Raises:
        InputError: the image is missing, truncated, no image, lossy, or not black where nothing is marked; or
            what is marked may be meant either way.
    """
    try:
        data = path.read_bytes()
    except OSError as error:
        raise InputError(f"{path}: the dot image cannot be read ({error}); add it, or correct data.dots") from error
    if data[:3] == b"\xff\xd8\xff" or data[8:16] == b"WEBPVP8 ":
        raise InputError(
            f"{path}: a lossy image (JPEG or WebP) blurs single pixels into their surroundings, so that dots cannot "
            "be told from noise; save dot images as PNG from the original annotation"
        )
    marked = _marked(decode_channels(data, str(path)), path)
    height, width = marked.shape
    y, x = np.nonzero(marked)
    points, n_large = np.stack([x, y], 1).astype(np.float32), 0
    if dot != "pixel" and len(points):
        from scipy.ndimage import label  # a tenth of a second that other folders need not pay

        blobs, _ = label(marked, np.ones((3, 3)))  # pixels that touch at corners are one blob
        blob_of = blobs[y, x] - 1  # (N,), label 0 is the ground
        areas = np.bincount(blob_of)
        usual = float(np.median(areas))
        # Single pixels seldom touch: 451 pairs do among the 35,192 dots of the VGG cells.
        if dot is None and usual >= (3 if len(areas) < 5 else 2):
            raise InputError(
                f"{path}: {len(points)} pixels are marked, in {len(areas)} blobs of about {usual:g} pixels; set "
                "data.dot to 'blob' if each blob is one object, or to 'pixel' if each pixel is one"
            )
        if dot == "blob":
            centroids = [np.bincount(blob_of, along) / areas for along in (x, y)]
            points = np.stack(centroids, 1).astype(np.float32)
            n_large = int((areas >= 1.5 * usual).sum())
    return Dots(points + np.float32(0.5), (height, width), n_large)


def _marked(channels: np.ndarray, path: Path) -> np.ndarray:
    """Find the ``(H, W)`` bool mask of the marks of a dot image ``(H, W, C)``."""
    n_colours = 1 if channels.shape[2] <= 2 else 3
    marked = np.asarray(channels[..., :n_colours].any(-1))
    if channels.shape[2] > n_colours:
        seen = channels[..., -1] > 0
        marked &= seen
        if not marked.any() and seen.any() and not seen.all():
            raise InputError(
                f"{path}: {seen.sum()} black pixels on a transparent ground, which may be dots or their background; "
                "save it as dots on opaque black"
            )
    if 2 * marked.sum() > marked.size:
        raise InputError(
            f"{path}: {marked.sum()} of {marked.size} pixels are not black; a dot image is black where there is no "
            "object: invert it, or correct data.dots if this is no dot image"
        )
    return marked


log = logging.getLogger(__name__)


ANNOTATION_FILES = (
    "points.csv",
    "points.json",
    "boxes.csv",
    "boxes.json",
    "annotations.json",
    "_annotations.coco.json",
    "counts.csv",
    "counts.json",
)


def list_images(folder: Path) -> list[str]:
    """List every image below a folder, as sorted posix paths relative to it.

    Hidden files are passed over. Linked folders are not entered (they may form a circle) and links that lead out of
    the folder or nowhere are left out, both with a warning.

    Raises:
        InputError: the folder is not there.
    """
    if not folder.is_dir():
        raise InputError(f"{folder}: there is no such folder; expected one with images")
    top, names, links = folder.resolve(), [], []
    for parent, folders, files in os.walk(folder):
        folders[:] = [name for name in folders if not name.startswith(".")]
        links += [Path(parent, name) for name in folders if Path(parent, name).is_symlink()]
        for name in files:
            path = Path(parent, name)
            if name.startswith(".") or path.suffix.lower() not in IMAGE_SUFFIXES:
                continue
            if path.is_symlink() and not _leads_inside(path, top):
                links.append(path)
            else:
                names.append(path.relative_to(folder).as_posix())
    if links:
        shown = ", ".join(map(str, links[:5]))
        log.warning("%s: %d links are not followed: %s; copy what they point to, if needed", folder, len(links), shown)
    return sorted(names)


def _leads_inside(link: Path, top: Path) -> bool:
    try:
        target = link.resolve()
    except (OSError, RuntimeError):  # a circle of links
        return False
    return target.is_relative_to(top) and target.is_file()


def without_dots(names: list[str], image: str | None, dots: str | None, *, keep_others: bool) -> list[str]:
    """Choose the images to predict among the files of a folder; the patterns are those of :class:`AnnotatedFolder`.

    Args:
        names: paths relative to the folder.
        image: pattern of images.
        dots: pattern of dot images.
        keep_others: leave out only dot images whose image is there too, not what fits no pattern.

    Example:
        >>> without_dots(["a.png", "a_dots.png", "b.jpg"], "{stem}.png", "{stem}_dots.png", keep_others=True)
        ['a.png', 'b.jpg']
    """
    images, dotted = _sorted_out(names, image or "{stem}.*", dots)
    stems = set(images.values())
    return [name for name in names if dotted.get(name) not in stems] if keep_others else list(images)


class AnnotatedFolder:
    """Images with the marks that files beside them hold.

    Args:
        folder: has the images in ``images/``, or itself.
        unnamed: the name of objects that carry none.
        annotation: the one annotation file, relative to ``folder``; all of the usual names if ``None``.
        image: pattern of image paths relative to ``folder``, with ``{stem}`` and any number of ``*``; all but the
            dot images if ``None``.
        dots: pattern of the dot image that belongs to a ``{stem}``. A file that both patterns fit goes to the one
            with more text of its own.
        dot: what an object is in a dot image, see :func:`~counting_zoo.data.folder.read_dots`.
        classes: the only names that a file of counts may have; any if ``None``.

    Raises:
        InputError: an annotation file is absent or cannot be understood, or a pattern is none or not one to one.
    """

    def __init__(
        self,
        folder: Path,
        *,
        unnamed: str,
        annotation: str | None = None,
        image: str | None = None,
        dots: str | None = None,
        dot: Dot | None = None,
        classes: list[str] | None = None,
    ) -> None:
        self.folder = folder
        self.classes = classes
        self.dot = dot
        self.unnamed = unnamed
        self.images = folder / "images" if (folder / "images").is_dir() else folder
        listed = list_images(folder if image or dots else self.images)
        if not image and not dots and self.images != folder:
            listed = [f"images/{name}" for name in listed]
        self._known = {unicodedata.normalize("NFC", name): name for name in listed}
        self._dots: dict[str, str] = {}
        self._marks: dict[str, Marks] = {}
        self.n_large: dict[str, int] = {}
        """For each dot image that was read, in how many of its blobs objects may touch."""
        self.has_files = False
        if image or dots:
            listed = self._pair(listed, image or "{stem}.*", dots)
        else:
            self._read_files(annotation)
        self.names: list[str] = sorted({*listed, *self._marks})
        """Every image that is there or that an annotation names, relative to ``folder``."""

    def marks(self, name: str) -> Marks | None:
        """Find the annotation of an image; ``None`` where it does not mention it.

        Raises:
            InputError: a dot image or ``.mat`` file is absent or damaged.
        """
        if name in self._dots:
            points, size, self.n_large[name] = read_dots(self.folder / self._dots[name], self.dot)
            path = self.folder / name
            if path.is_file() and image_size(path) != size:
                raise InputError(
                    f"{self.folder / self._dots[name]}: {size[0]} x {size[1]} pixels (height x width), but {path} "
                    f"has {image_size(path)[0]} x {image_size(path)[1]}; expected the same"
                )
            return Marks(points=points, point_names=[self.unnamed] * len(points))
        if self.has_files:
            return self._marks.get(name)
        path = (self.folder / name).with_suffix(".mat")
        beside = [path, path.with_name(f"GT_{path.name}")]
        mat = next((candidate for candidate in beside if candidate.is_file()), None)
        if mat is None:
            raise InputError(
                f"{self.folder / name}: has no annotation; expected one of {', '.join(ANNOTATION_FILES)} in "
                f"{self.folder}, {path.name} beside the image, or data.dots"
            )
        points = read_mat_points(mat)
        return Marks(points=points, point_names=[self.unnamed] * len(points))

    def find(self, name: str, source: str) -> str:
        """Find the path relative to ``folder`` of an image that an annotation names.

        Args:
            name: relative to ``images/`` or to ``folder``, in any Unicode normal form.
            source: the file that names it, for messages.

        Raises:
            InputError: the name leads out of the folder.
        """
        inside_root(self.folder, name, source)
        plain = unicodedata.normalize("NFC", Path(name).as_posix())
        below = f"images/{plain}" if self.images != self.folder else plain
        path = inside_root(self.folder, below, source)
        return self._known.get(below) or self._known.get(plain) or path.relative_to(self.folder).as_posix()

    def all_names(self) -> list[str]:
        """List every class name, sorted."""
        names: set[str] = set()
        for marks in self._marks.values():
            names.update(marks.point_names, marks.box_names, marks.counts or {})
        return sorted(names) or [self.unnamed]

    def _read_files(self, annotation: str | None) -> None:
        if annotation is not None:
            paths = [self.folder / annotation]
            if not paths[0].is_file():
                raise InputError(f"{paths[0]}: there is no such file; correct data.annotation")
        else:
            paths = [self.folder / name for name in ANNOTATION_FILES if (self.folder / name).is_file()]
        self.has_files = bool(paths)
        for path in paths:
            named: set[str] = set()
            for given, marks in read_marks(path, self.unnamed, self.classes).items():
                name = self.find(given, str(path))
                if name in named:
                    raise InputError(f"{path}: {given!r} is a second spelling of {name!r}; expected one")
                named.add(name)
                self._marks[name] = _merged(self._marks.get(name, Marks()), marks, f"{path}: {given}")

    def _pair(self, listed: list[str], image: str, dots: str | None) -> list[str]:
        """Choose the images among the files, and the dot image of each."""
        stems, dotted = _sorted_out(listed, image, dots)
        if dots is None:
            self._read_files(None)
            return list(stems)
        images = _by_stem(stems, self.folder, "data.image")
        partners = _by_stem(dotted, self.folder, "data.dots")
        for stem in {**images, **partners}:
            # What lacks its other half is named all the same, so that it is missed and not passed over.
            name = images.get(stem) or image.replace("{stem}", stem)
            self._dots[name] = partners.get(stem) or dots.replace("{stem}", stem)
        return list(self._dots)


def _sorted_out(names: list[str], image: str, dots: str | None) -> tuple[dict[str, str], dict[str, str]]:
    """Find the stems of images, and those of dot images, by name."""
    images = _stems(names, image, "data.image")
    dotted = {} if dots is None else _stems(names, dots, "data.dots")
    for name in images.keys() & dotted.keys():
        del (images if len(dots or "") > len(image) else dotted)[name]
    return images, dotted


def _stems(names: list[str], pattern: str, option: str) -> dict[str, str]:
    """Find the names that fit a pattern, each with what stands for ``{stem}`` in it."""
    if pattern.count("{stem}") != 1:
        raise InputError(f"{option} is {pattern!r}; expected one {{stem}} in it, such as '{{stem}}cell.png'")
    if pattern.startswith("/") or ".." in pattern.split("/"):
        raise InputError(
            f"{option} is {pattern!r}, which leads out of the folder; make data.root the folder that holds both, and "
            "begin both patterns there: image 'images/{stem}.png' with dots 'dots/{stem}.png'"
        )
    escaped = re.escape(pattern).replace(re.escape("{stem}"), "(?P<stem>.+)").replace(re.escape("*"), "[^/]*")
    fits = re.compile(escaped).fullmatch
    return {name: match["stem"] for name in names if (match := fits(name))}


def _by_stem(stems: dict[str, str], folder: Path, option: str) -> dict[str, str]:
    names: dict[str, str] = {}
    for name, stem in stems.items():
        if stem in names:
            raise InputError(f"{folder / names[stem]} and {name} both fit {option}; expected one for {stem!r}")
        names[stem] = name
    return names


def _merged(first: Marks, second: Marks, where: str) -> Marks:
    """Join both; two files must not say the same thing."""
    changes = {}
    for item in fields(Marks):
        old, new = getattr(first, item.name), getattr(second, item.name)
        if item.name in ("points", "boxes", "counts") and old is not None and new is not None:
            raise InputError(f"{where}: a second file says its {item.name}; name the right one in data.annotation")
        changes[item.name] = old if new is None or (isinstance(new, list) and not new) else new
    return replace(first, **changes)


SPLIT_FOLDERS = {"train": ("train",), "val": ("val", "valid", "validation"), "test": ("test",)}


class ImageFolder(CountingDataModule):
    """Your own images, annotated in one of the usual ways.

    **Annotation** lies in the folder and is found by its name:

    - ``points.csv`` with the columns ``image,x,y[,label]``, or ``points.json`` ``{"a.png": [[x, y], ...]}``;
    - ``boxes.csv`` with ``image,x1,y1,x2,y2[,label]``, or COCO's ``annotations.json``; points are the box centres;
    - ``counts.csv`` with ``image,label,count``, or with a column for each class (``image,cat,dog``), or ``counts.json``
      ``{"a.png": {"cat": 2}}`` or a list of such rows; beside points they are checked against these. Counts are whole
      numbers, and where ``classes`` are given, of no other class;
    - ``a.mat`` or ``GT_a.mat`` beside ``a.jpg``, as ShanghaiTech and UCF-QNRF have it;
    - dot images, paired by ``image`` and ``dots``: lossless images with a mark on black for each object, a
      single pixel or a small blob (``dot``); a pixel in column x, row y is the point (x + 0.5, y + 0.5).

    A row of ``points.csv`` or ``boxes.csv`` with empty coordinates says that an image has no objects.

    **Splits** come from the first of these that is there:

    - ``splits``: a mapping of each split to a range of the sorted images, or a JSON or CSV (``image,split``) file;
    - folders ``train``, ``val`` and ``test``, each with its images and annotation;
    - ``sizes`` alone: drawn from all images;
    - nothing: all images are the test split.

    Beside ``splits``, ``sizes`` draws from the images that ``splits`` gives to ``train`` (from all that it gives to
    no split, where it does not name ``train``). Beside split folders, it draws only the splits that have no folder,
    from ``train``, which keeps the rest. The VGG cells protocol, 64 to train and 36 to validate drawn from
    images 1-100, and 101-200 to test, is ``splits={"train": [0, 100], "test": [100, 200]}, sizes={"train": 64,
    "val": 36}`` with one ``split_seed`` a draw.

    Predict reads every image below ``predict_root`` (or ``root``), in sorted order, and needs no annotation; dot
    images beside their images are left out.

    Args:
        root: the folder; its images lie in ``images/``, or in itself.
        annotation: the one annotation file to read, relative to ``root`` (or to each split's folder).
        image: pattern of the images' paths below ``root``, such as ``{stem}cell.png`` or ``images/{stem}.*``; with
            ``dots`` alone, every other image.
        dots: pattern of the dot images' paths below ``root``, such as ``{stem}_dots.png`` or ``dots/{stem}.png``.
        dot: each marked ``pixel`` of a dot image is one object, or each ``blob`` of pixels that touch; ``None``
            takes pixels, and raises where they look like blobs.
        splits: ranges ``[start, stop]`` by split (from 0, ``stop`` not included, ``null`` for the end), or a file.
        sizes: numbers of images (below 1: fractions) to draw for each split.
        split_seed: seeds the draw.
        empty: an image that the annotation does not mention is an ``error``, or has no objects (``allow``).
        predict_root: a folder or image to predict; ``root`` if ``None``.
        options: those of :class:`CountingDataModule`; the first of ``classes`` names objects without a label.
    """

    layout: ClassVar[str] = """\
  root/ (or root/train/, root/val/, root/test/, each like this)
    images/a.png ...         or the images in root itself
    points.csv               image,x,y[,label]
    or boxes.csv, counts.csv, counts.json, annotations.json (COCO), a.mat beside each image, dot images
    (data.dots)"""

    def __init__(
        self,
        root: str | Path | None = None,
        *,
        annotation: str | None = None,
        image: str | None = None,
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
        check("data.empty", empty, one_of=("error", "allow"))
        check("data.dot", dot, one_of=(None, "pixel", "blob"))
        self.annotation = annotation
        self.image = image
        self.dots = dots
        self.dot = dot
        self.splits = splits
        self.sizes = sizes
        self.split_seed = split_seed
        self.empty = empty
        self.predict_root = None if predict_root is None else Path(predict_root).expanduser()
        self._folders: dict[Path, AnnotatedFolder] = {}

    def read_split(self, split: Split) -> list[Record]:
        """Read every image of a split; for ``predict`` every image there is, without annotation."""
        if split == "predict":
            return self._predict_records()
        folder, names = self._members(split)
        images = self._folder(folder)
        marks = {name: images.marks(name) for name in names}
        if large := {name: n for name in names if (n := images.n_large.get(name))}:
            log.warning(
                "%s: %d blobs in the dot images of %s have at least 1.5 times the usual size (the first in that of "
                "%s); each counts as one object, also where several touch",
                folder,
                sum(large.values()),
                split,
                next(iter(large)),
            )
        silent = [name for name, annotation in marks.items() if annotation is None]
        if silent and self.empty == "error":
            raise InputError(
                f"{folder}: the annotation does not mention {len(silent)} of {len(names)} images of {split}: "
                f"{silent[:5]}; annotate them, or set data.empty to 'allow' if they hold no objects"
            )
        if silent:
            log.warning("%s: %d images of %s without annotation hold no objects", folder, len(silent), split)
        order = list(dict.fromkeys([*(self.classes or []), *images.all_names()]))
        given = [annotation for annotation in marks.values() if annotation is not None]
        nothing = Marks(
            points=np.zeros((0, 2), np.float32) if any(annotation.points is not None for annotation in given) else None,
            boxes=np.zeros((0, 4), np.float32) if any(annotation.boxes is not None for annotation in given) else None,
            counts={},
        )
        return [self._record(folder, name, annotation or nothing, nothing, order) for name, annotation in marks.items()]

    # -- splits ---------------------------------------------------------------------------------------------------

    def _members(self, split: Split) -> tuple[Path, list[str]]:
        """Find the folder of a split and its images, relative to the folder."""
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
                names = draw_split(names, drawn, self.split_seed, split)
            return folder, names
        splits = self._dealt(root)
        if split not in splits:
            raise InputError(
                f"{root}: nothing says which images are {split} (known: {sorted(splits)}); set data.splits, such as "
                "{train: [0, 80], test: [80, null]}, or data.sizes, such as {train: 0.8, val: 0.1, test: 0.1}, or "
                "make folders train, val and test"
            )
        return root, splits[split]

    def _dealt(self, root: Path) -> dict[str, list[str]]:
        """Deal the images to splits, by ``splits`` and ``sizes``."""
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

    def _folder(self, folder: Path) -> AnnotatedFolder:
        if folder not in self._folders:
            unnamed = self.classes[0] if self.classes else "objects"
            self._folders[folder] = AnnotatedFolder(
                folder,
                unnamed=unnamed,
                annotation=self.annotation,
                image=self.image,
                dots=self.dots,
                dot=self.dot,
                classes=self.classes,
            )
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
        source = self.predict_root or self.find_root()
        if source.is_file() or not (self.image or self.dots):
            return _records_at(source)
        # Another folder may name its images as it likes; only what is surely no image is left out there.
        names = without_dots(list_images(source), self.image, self.dots, keep_others=self.predict_root is not None)
        return _records_at(source, names)


def _indices(names: list[str], classes: list[str]) -> np.ndarray:
    index = {name: i for i, name in enumerate(classes)}
    return np.array([index[name] for name in names], np.int64)


class CaptionedImages(CountingDataModule):
    """Images with any number of captions each, from COCO's JSON, CSV or TSV.

    - **JSON** in the layout of COCO's ``captions_train2017.json``: ``images`` (``id``, ``file_name``) and
      ``annotations`` (``image_id``, ``caption``). Chen et al., "Microsoft COCO Captions", arXiv 1504.00325.
    - **CSV and TSV** with a row for each caption: the columns ``image``, ``filepath`` or ``file``, and ``caption`` or
      ``title``; others are ignored. A table without a header, such as Conceptual Captions' (a caption, a tab, a path),
      needs ``columns``: ``[caption, image]``. In a TSV quotes count only around a whole cell.

    There are no names, points or counts, so no counter trains or is tested on this data; all of them predict on it.
    An augmentation may crop: a caption stays what it is, as CLIP's own training has it.

    Args:
        root: the folder that the files of captions and the images lie in.
        captions: the file of each split below ``root``, or one file, which is that of ``train``.
        images: the folder below ``root`` that the names of the images start from, one for all splits or each its
            own; ``root`` itself by default.
        columns: names of the columns of tables without a header.
        sizes: numbers of images (below 1: fractions) to draw for splits from the file of ``train``, which keeps the
            rest where ``sizes`` does not name it.
        split_seed: seeds the draw.
        empty: an image without a caption that is not empty is an ``error``, or ``skip``ped and reported.
        predict_root: a folder or image to predict; the images of ``test`` if ``None``.
        options: those of :class:`CountingDataModule`.

    Raises:
        InputError: an option is none of its choices, or two options say what one split is.
    """

    layout: ClassVar[str] = """\
  root/
    annotations/captions_train2017.json, captions_val2017.json   or captions.csv, captions.tsv (data.captions)
    train2017/000000000009.jpg ..., val2017/...                   (data.images)"""

    def __init__(
        self,
        root: str | Path,
        *,
        captions: dict[str, str] | str = "captions.csv",
        images: dict[str, str] | str = ".",
        columns: list[str] | None = None,
        sizes: dict[str, float] | None = None,
        split_seed: int = 0,
        empty: Literal["error", "skip"] = "error",
        predict_root: str | Path | None = None,
        **options: Any,
    ) -> None:
        super().__init__(root, **options)
        check("data.empty", empty, one_of=("error", "skip"))
        self.captions = {"train": captions} if isinstance(captions, str) else captions
        self.images = dict.fromkeys(SPLITS, images) if isinstance(images, str) else images
        for option, given in (("captions", self.captions), ("images", self.images), ("sizes", sizes or {})):
            if unknown := [name for name in given if name not in SPLITS]:
                raise InputError(f"data.{option} names the splits {unknown}; expected train, val and test only")
        if both := [name for name in sizes or {} if name in self.captions and name != "train"]:
            raise InputError(f"data.captions and data.sizes both say what {both} is; leave it out of one of them")
        if unplaced := [name for name in self.captions if name not in self.images]:
            raise InputError(f"data.images does not say where those of {unplaced} are; add a folder for each")
        self.columns = columns
        self.sizes = sizes
        self.split_seed = split_seed
        self.empty = empty
        self.predict_root = None if predict_root is None else Path(predict_root).expanduser()
        self._files: dict[str, tuple[Captions, list[str]]] = {}

    def read_split(self, split: Split) -> list[Record]:
        """Read every image of a split with its captions; ``predict`` takes ``predict_root``, or the test split."""
        if split == "predict":
            if self.predict_root is not None:
                return _records_at(self.predict_root)
            split = "test"
        root = self.find_root()
        source, names = self._members(root, split)
        found, _ = self._file(root, source)
        folder = self.images[source]
        records = []
        for name in names:
            path = inside_root(root, Path(folder, name), f"{found.path}, {found.places[name]}")
            records.append(Record(path.relative_to(root).as_posix(), path, captions=list(found.texts[name])))
        return records

    def _members(self, root: Path, split: str) -> tuple[str, list[str]]:
        """Find the split whose file names the images of a split, and those among its images."""
        drawn = self.sizes or {}
        if split in self.captions and (split != "train" or not drawn):
            return split, self._file(root, split)[1]
        if "train" not in self.captions or (split != "train" and split not in drawn):
            raise InputError(
                f"CaptionedImages: nothing says which images are {split} (data.captions has "
                f"{sorted(self.captions)}, data.sizes {sorted(drawn)}); name its file in data.captions, such as "
                f"{{{split}: captions_{split}.json}}, or draw it from train by data.sizes, such as {{{split}: 0.1}}"
                + ("; to predict other images set data.predict_root" if split == "test" else "")
            )
        return "train", draw_split(self._file(root, "train")[1], drawn, self.split_seed, split)

    def _file(self, root: Path, split: str) -> tuple[Captions, list[str]]:
        """Read the captions of a split's file, once, and its images that have some."""
        name = self.captions[split]
        if name not in self._files:
            found = read_captions(inside_root(root, name, "data.captions"), self.columns)
            bare = [image for image, texts in found.texts.items() if not texts]
            if bare:
                shown = ", ".join(f"{image} ({found.places[image]})" for image in bare[:5])
                message = f"{found.path}: {len(bare)} of {len(found.texts)} images have no caption: {shown}"
                if self.empty == "error":
                    raise InputError(f"{message}. Give them one, or set data.empty to 'skip'")
                warnings.warn(f"{message}; skipped (data.empty=skip)", stacklevel=2)
            self._files[name] = found, [image for image, texts in found.texts.items() if texts]
        return self._files[name]


def _records_at(source: Path, names: list[str] | None = None) -> list[Record]:
    """Make records of an image, or of those of a folder, all if ``None``."""
    if source.is_file():
        return [Record(source.name, source)]
    return [Record(name, source / name) for name in (list_images(source) if names is None else names)]
