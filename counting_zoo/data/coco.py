"""COCO 2014 and 2017: 80 classes, a box around every object, and the splits of the counting literature."""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np

from counting_zoo.class_lists import COCO_CLASSES
from counting_zoo.data.base import CountingDataModule, Prompts
from counting_zoo.data.checks import inside_root
from counting_zoo.data.coco_instances import Instances, read_instances
from counting_zoo.data.detection import Unlisted, boxed_record, report_flat, report_unlisted
from counting_zoo.data.records import Record, Split
from counting_zoo.data.splits import check_choice
from counting_zoo.errors import InputError

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


__all__ = ["COCOCounts"]
