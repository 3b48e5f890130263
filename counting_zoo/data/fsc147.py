"""FSC-147: 6,135 images of 147 kinds of object, with points and a few example boxes."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np

from counting_zoo.data.base import CountingDataModule
from counting_zoo.data.checks import as_boxes, as_points, inside_root
from counting_zoo.data.records import Record, Split
from counting_zoo.errors import InputError
from counting_zoo.io import read_json, read_lines

log = logging.getLogger(__name__)


FSCSplit = Literal["train", "val", "test", "val_coco", "test_coco"]


ANNOTATIONS = ("annotation_FSC147_384.json", "annotation_FSC_147_384.json")


CLASS_FILES = ("ImageClasses_FSC147.txt", "ImageClasses_FSC_147.txt")


SPLIT_FILES = ("Train_Test_Val_FSC_147.json", "Train_Test_Val_FSC147.json")


TEXT_FILES = ("FSC-147-D.json", "FSC_147_D.json")


class FSC147(CountingDataModule):
    """FSC-147 in its official layout; both spellings of the file names are known.

    Ranjan et al., "Learning To Count Everything", CVPR 2021. The name of the one class annotated in an image is its
    prompt. The example boxes mark a few of the objects, so they are ``exemplars`` and never ``boxes``. The release
    has points outside their images, and images that are in two splits (Hobley & Prisacariu, "Learning to Count
    Anything", 2022), so ``outside`` is ``clamp`` and ``duplicates`` is ``warn`` unless told otherwise.

    Args:
        root: the folder that holds the annotation and the images.
        annotation: file name of the points; the official names are looked for if ``None``.
        images: folder of the images; ``images_384_VarV2`` for the frame of 384 pixels if ``None``.
        frame: ``384``: images as released, 384 pixels high; ``original``: full-size images in ``images``, with
            the points divided by the annotation's ``ratio_w`` and ``ratio_h``.
        texts: the prompt of an image: its class name, or its sentence in FSC-147-D (Amini-Naieni et al., 2023).
        val_split: the split of the release that validation uses.
        test_split: the split of the release that test uses.
        outside: what happens to points outside their image.
        duplicates: what happens to the same file in two splits.
        options: those of :class:`CountingDataModule`.

    Raises:
        InputError: an option does not go with another one.
    """

    layout: ClassVar[str] = """\
  root/
    annotation_FSC147_384.json     {"2.jpg": {"points": [[x, y], ...], "box_examples_coordinates": ...}, ...}
    Train_Test_Val_FSC_147.json    {"train": ["7.jpg", ...], "val": [...], "test": [...]}
    ImageClasses_FSC147.txt        2.jpg<tab>sea shells
    images_384_VarV2/2.jpg ..."""

    def __init__(
        self,
        root: str | Path,
        *,
        annotation: str | None = None,
        images: str | None = None,
        frame: Literal["384", "original"] = "384",
        texts: Literal["class_names", "FSC-147-D"] = "class_names",
        val_split: FSCSplit = "val",
        test_split: FSCSplit = "test",
        outside: Literal["error", "clamp", "drop"] = "clamp",
        duplicates: Literal["error", "warn", "ignore"] = "warn",
        **options: Any,
    ) -> None:
        super().__init__(root, outside=outside, duplicates=duplicates, **options)
        if frame == "original" and images is None:
            raise InputError("data.frame is 'original': set data.images to the folder of the full-size images")
        self.annotation = annotation
        self.images = images or "images_384_VarV2"
        self.frame = frame
        self.texts = texts
        self.split_names = {"train": "train", "val": val_split, "test": test_split}

    def read_split(self, split: Split) -> list[Record]:
        """Read every image of a split; those whose annotation or file is absent follow ``missing``."""
        root = self.find_root(holding=self.images)
        split_path = self._find(root, SPLIT_FILES)
        splits = read_json(split_path)
        wanted = self.split_names.get(split, self.split_names["test"])
        if not isinstance(splits, dict) or not isinstance(splits.get(wanted), list):
            found = sorted(splits) if isinstance(splits, dict) else type(splits).__name__
            raise InputError(f"{split_path}: has no list {wanted!r}; found {found}")
        names = splits[wanted]
        texts = self._read_texts(root)
        paths = {name: inside_root(root, Path(self.images) / str(name), str(split_path)) for name in names}
        if unnamed := [name for name in names if name not in texts]:
            raise InputError(f"{root}: no {self.texts} text for {len(unnamed)} images of {wanted}: {unnamed[:5]}")
        if split == "predict":
            return [Record(name, path, classes=[texts[name]]) for name, path in paths.items()]
        source = root / self.annotation if self.annotation else self._find(root, ANNOTATIONS)
        annotation = read_json(source)
        if not isinstance(annotation, dict):
            raise InputError(f"{source}: expected annotation by image name, found a {type(annotation).__name__}")
        if absent := [name for name in names if name not in annotation]:
            message = f"{source}: no annotation for {len(absent)} of {len(names)} images of {wanted}: {absent[:5]}"
            if self.missing == "error":
                raise InputError(f"{message}; complete the file, or set data.missing to 'skip'")
            log.warning("%s; skipped (data.missing=skip)", message)
        return [
            self._record(name, paths[name], annotation[name], texts[name], f"{source}: {name}")
            for name in names
            if name in annotation
        ]

    def _record(self, name: str, path: Path, entry: Any, text: str, where: str) -> Record:
        try:
            points = as_points(entry["points"], f"{where}: points")
            corners = entry["box_examples_coordinates"]  # each box: 4 corners [x, y] in any order
        except (KeyError, TypeError):
            found = sorted(entry) if isinstance(entry, dict) else type(entry).__name__
            raise InputError(f"{where}: found {found}; expected points and box_examples_coordinates") from None
        flat = as_points([corner for box in corners for corner in box], f"{where}: box_examples_coordinates")
        if len(flat) != 4 * len(corners):
            raise InputError(f"{where}: box_examples_coordinates is not 4 corners [x, y] for each of its boxes")
        quads = flat.reshape(-1, 4, 2)  # (E, corner, xy)
        boxes = as_boxes(np.concatenate([quads.min(1), quads.max(1)], 1), f"{where}: box_examples_coordinates")
        size = None
        if self.frame == "original":
            try:
                scale = np.array([1 / float(entry["ratio_w"]), 1 / float(entry["ratio_h"])], np.float32)
                size = (int(entry["H"]), int(entry["W"]))
            except (KeyError, TypeError, ValueError, ZeroDivisionError):
                raise InputError(
                    f"{where}: has {sorted(entry)}; data.frame=original needs H, W, ratio_h and ratio_w in the "
                    "annotation, use the official file or data.frame=384"
                ) from None
            points, boxes = points * scale, boxes * np.tile(scale, 2)
        return Record(
            name,
            path,
            classes=[text],
            points=points,
            labels=np.zeros(len(points), np.int64),
            exemplars=boxes,
            counts=np.array([len(points)], np.float32),
            size=size,
        )

    def _read_texts(self, root: Path) -> dict[str, str]:
        """Read the prompt of every image."""
        if self.texts == "FSC-147-D":
            path = self._find(root, TEXT_FILES)
            found = read_json(path)
            try:
                return {name: str(entry["text_description"]) for name, entry in found.items()}
            except (AttributeError, KeyError, TypeError) as error:
                raise InputError(f'{path}: expected {{"2.jpg": {{"text_description": ...}}}} ({error!r})') from None
        path = self._find(root, CLASS_FILES)
        texts = {}
        for number, line in enumerate(read_lines(path, "expected a line for each image"), start=1):
            name, tab, text = line.partition("\t")
            if line.strip() and not (tab and text.strip()):
                raise InputError(f"{path}, line {number}: {line!r}; expected an image, a tab and its class name")
            texts[name] = text.strip()
        return texts

    def _find(self, root: Path, names: tuple[str, ...]) -> Path:
        """Find the first of the spellings that is there."""
        for name in names:
            if (root / name).is_file():
                return root / name
        found = sorted(path.name for path in root.iterdir() if path.suffix in (".json", ".txt"))
        raise InputError(f"FSC147: {root} has no {' or '.join(names)} (found {found}); expected\n{self.layout}")
