"""The built-in scenes as a data module: coloured shapes with exact annotation, made on first use."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import numpy as np

from counting_zoo.data.annotation_files import read_json
from counting_zoo.data.base import CountingDataModule, Prompts
from counting_zoo.data.points import as_boxes, as_points
from counting_zoo.data.presets import PRESETS, EachClassPreset
from counting_zoo.data.records import Record, Split
from counting_zoo.data.scene_files import (
    ANNOTATION,
    CHECKSUMS,
    PICTURES,
    SceneSet,
    SplitBy,
    cache_folder,
    ensure_scenes,
)


class SyntheticScenes(CountingDataModule):
    """Pictures of shapes such as "striped yellow rings", with points, boxes, counts and captions of all objects.

    ``easy`` (192 x 192 pixels, 1 to 60 objects) is for tests and the quick start, ``full`` (384 x 384-672 pixels, 3 to
    300 objects, 147 classes) is like FSC-147, ``low`` (256 x 256 pixels, 0 to 8 objects of each of 12 classes) is for
    image-level counts, ``common`` (192 x 192 pixels, 1 to 120 objects) is for pretraining: it has the words of all and
    shows in training only pairs that neither ``easy`` nor ``full`` tests on. They are written as files in FSC-147's
    layout, so that its reader reads them as well.

    Args:
        root: the folder the scenes are written to and read from; by default one folder for each setting below
            ``$COUNTING_ZOO_CACHE/scenes`` or ``~/.cache/counting_zoo/scenes``.
        preset: what the scenes look like.
        split_by: ``class`` (default of all but ``low``) tests on shape-colour pairs that training never shows,
            although it shows every word; ``picture`` (default of ``low``) tests on new pictures of the same classes.
        sizes: number of pictures of ``train``, ``val`` and ``test`` (default 1500, 150 and 200).
        scene_seed: seeds the pictures; ``seed`` seeds only the order and augmentation in training.
        processes: how many processes render on first use; the files do not depend on it.
        prompts: as in the base class; by default ``all`` for ``low`` and ``target`` for the others.
        checksums: as in the base class; by default the file that is written with the scenes.
        kwargs: as in :class:`~counting_zoo.data.base.CountingDataModule`.

    Raises:
        InputError: a value is out of range, or the folder holds other scenes.
    """

    def __init__(
        self,
        root: str | Path | None = None,
        *,
        preset: Literal["easy", "low", "full", "common"] = "easy",
        split_by: SplitBy | None = None,
        sizes: dict[str, int] | None = None,
        scene_seed: int = 0,
        processes: int = 1,
        prompts: Prompts | None = None,
        checksums: str | None = CHECKSUMS,
        **kwargs: Any,
    ) -> None:
        self.scenes = SceneSet(preset, split_by, sizes, scene_seed)
        self.fixed_list = isinstance(PRESETS[preset], EachClassPreset)
        super().__init__(
            cache_folder() / self.scenes.folder_name if root is None else root,
            prompts=prompts if prompts is not None else "all" if self.fixed_list else "target",
            checksums=checksums,
            **kwargs,
        )
        self.processes = processes
        self._split_names = {split: [c.name for c in classes] for split, classes in self.scenes.class_splits().items()}

    def prepare_data(self) -> None:
        """Write the scenes; Lightning calls this in one process of each node."""
        assert self.root is not None  # set in __init__
        ensure_scenes(self.scenes, self.root, self.processes)

    def class_names(self, split: Split = "train") -> list[str]:
        """The names of the split's classes, also of those that no picture shows; those given with the data win."""
        if (given := self._given_names()) is not None:
            return given
        return list(self._split_names["test" if split == "predict" else split])

    def read_split(self, split: Split) -> list[Record]:
        """Scenes with everything in them; ``predict`` gives the test pictures with names but without annotation."""
        self.prepare_data()
        assert self.root is not None
        wanted = "test" if split == "predict" else split
        pictures = [p for p in read_json(self.root / ANNOTATION)["pictures"] if p["split"] == wanted]
        if split == "predict":
            return [self._without_annotation(picture) for picture in pictures]
        return [self._record(picture) for picture in pictures]

    def _record(self, picture: dict[str, Any]) -> Record:
        name = f"{ANNOTATION}: {picture['file']}"
        labels = np.array(picture["labels"], np.int64)
        classes = picture["classes"]
        exemplars: np.ndarray | None = as_boxes(picture["exemplars"], name)
        if self.fixed_list:
            # Every picture answers for the whole list, in its order; there is no target to show examples of.
            names = self._split_names[picture["split"]]
            labels = np.array([names.index(c) for c in classes], np.int64)[labels]
            classes, exemplars = names, None
        return Record(
            image_id=picture["file"],
            path=self._path(picture),
            classes=list(classes),
            points=as_points(picture["points"], name),
            labels=labels,
            boxes=as_boxes(picture["boxes"], name),
            box_labels=labels.copy(),
            exemplars=exemplars,
            counts=np.bincount(labels, minlength=len(classes)).astype(np.float32),
            captions=list(picture["captions"]),
            size=(picture["size"][0], picture["size"][1]),
        )

    def _without_annotation(self, picture: dict[str, Any]) -> Record:
        names = self._split_names["test"] if self.fixed_list else picture["classes"]
        return Record(
            image_id=picture["file"],
            path=self._path(picture),
            classes=[] if self.classes is not None else list(names),
            size=(picture["size"][0], picture["size"][1]),
        )

    def _path(self, picture: dict[str, Any]) -> Path:
        assert self.root is not None
        return self.root / PICTURES / picture["file"]


__all__ = ["SyntheticScenes"]
