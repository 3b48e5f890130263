"""PASCAL VOC 2007 and 2012, and other sets in their layout: 20 classes, a box around every object."""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np

from counting_zoo.class_lists import VOC_CLASSES
from counting_zoo.data.base import CountingDataModule, Prompts
from counting_zoo.data.checks import inside_root
from counting_zoo.data.detection import Unlisted, boxed_record, report_flat, report_unlisted
from counting_zoo.data.records import Record, Split
from counting_zoo.data.splits import check_choice, draw
from counting_zoo.data.voc_xml import read_voc_xml
from counting_zoo.errors import InputError


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


__all__ = ["VOCCounts"]
