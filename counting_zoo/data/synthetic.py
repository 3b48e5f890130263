"""The built-in scenes as a data module, written to disk in the layout of FSC-147 on first use."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from multiprocessing import get_context
from pathlib import Path
from typing import Any, Literal

import cv2
import numpy as np

from counting_zoo.data.base import CountingDataModule, Prompts
from counting_zoo.data.checks import as_boxes, as_points, write_checksums
from counting_zoo.data.records import Record, Split
from counting_zoo.data.scenes import PRESETS, Attributes, EachClassPreset, render
from counting_zoo.errors import InputError, check
from counting_zoo.io import progress, read_json, sha256

SplitBy = Literal["class", "image", "picture"]  # the last is the first edition's word for image


IMAGES = "images_384_VarV2"  # FSC-147's name for the folder


TEST_IMAGES = "test_pictures"  # the test images alone, to predict on as a folder


ANNOTATION = "scenes.json"  # everything about every object; the other files say what FSC-147's say


CHECKSUMS = "SHA256SUMS"


FINGERPRINT = "fingerprint.json"


FORMAT = 2  # goes up whenever the same parameters give other bytes


SIZES = {"train": 1500, "val": 150, "test": 200}


JPEG_QUALITY = 92


@dataclass(frozen=True)
class SceneSet:
    """Everything that the files of a set of scenes depend on.

    Args:
        preset: ``easy``, ``low``, ``full`` or ``common``.
        split_by: ``class`` tests on (shape, colour) pairs never trained on, ``image`` on new images of the classes
            that training shows; ``None`` takes what the preset is made for.
        sizes: number of images of ``train``, ``val`` and ``test``; those left out keep their default.
        seed: of the images.

    Raises:
        InputError: a value is out of range.
    """

    preset: str = "easy"
    split_by: SplitBy | None = None
    sizes: dict[str, int] | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        check("data.preset", self.preset, one_of=tuple(PRESETS))
        fixed = isinstance(PRESETS[self.preset], EachClassPreset)
        split_by = "image" if self.split_by == "picture" else self.split_by or ("image" if fixed else "class")
        check("data.split_by", split_by, one_of=("class", "image"))
        if fixed and split_by == "class":
            raise InputError(
                f"data.split_by is 'class', but the preset {self.preset!r} has one list of classes for all splits; "
                "set data.split_by to 'image', or data.preset to 'easy' or 'full'"
            )
        sizes = {**SIZES, **(self.sizes or {})}
        if set(sizes) != set(SIZES) or not all(isinstance(n, int) and n >= 1 for n in sizes.values()):
            raise InputError(f"data.sizes is {self.sizes}; expected at least 1 for any of {', '.join(SIZES)}")
        check("data.scene_seed", self.seed, at_least=0)
        object.__setattr__(self, "split_by", split_by)
        object.__setattr__(self, "sizes", sizes)

    @property
    def fingerprint(self) -> dict[str, Any]:
        """Plain data that is equal for two sets exactly if their files are."""
        parameters = {**asdict(self), "format": FORMAT, "parameters": asdict(PRESETS[self.preset])}
        # The word of the first edition: sets that it wrote are found again.
        parameters["split_by"] = "picture" if self.split_by == "image" else self.split_by
        return json.loads(json.dumps(parameters))

    @property
    def folder_name(self) -> str:
        """The set's folder in the cache, such as ``easy-1c09a5b2f3``."""
        digest = sha256(json.dumps(self.fingerprint, sort_keys=True))
        return f"{self.preset}-{digest[:10]}"

    def class_splits(self) -> dict[str, list[Attributes]]:
        """Return the classes of each split, also those that no image happens to show."""
        splits = PRESETS[self.preset].class_splits()
        if self.split_by == "class" or isinstance(PRESETS[self.preset], EachClassPreset):
            return splits
        return dict.fromkeys(splits, sorted({c for classes in splits.values() for c in classes}))


def cache_folder() -> Path:
    """Return the folder of scenes: ``$COUNTING_ZOO_CACHE/scenes``, by default ``~/.cache/counting_zoo/scenes``."""
    return Path(os.environ.get("COUNTING_ZOO_CACHE") or "~/.cache/counting_zoo").expanduser() / "scenes"


def ensure_scenes(scenes: SceneSet, folder: Path, processes: int = 1) -> None:
    """Write the scenes unless ``folder`` already holds exactly them.

    The folder appears at once and whole, so that several processes may call this together: the first to finish wins
    and the others use what it wrote.

    Args:
        scenes: what to write.
        folder: where to.
        processes: how many render; the files do not depend on it.

    Raises:
        InputError: the folder holds something else, or cannot be written.
    """
    if _holds(scenes, folder):
        return
    try:
        with _appearing(folder) as temporary:
            _write(scenes, temporary, processes)
    except OSError as error:
        raise InputError(
            f"cannot write the scenes to {folder} ({error}); set data.root or the environment variable "
            "COUNTING_ZOO_CACHE to a folder that can be written and has room"
        ) from error
    _holds(scenes, folder)  # raises if another process put other scenes there


def _holds(scenes: SceneSet, folder: Path) -> bool:
    """Tell if the folder has these scenes; ``False`` if there is nothing yet."""
    if not folder.exists() or (folder.is_dir() and not any(folder.iterdir())):
        return False
    try:
        stored = json.loads((folder / FINGERPRINT).read_bytes())
    except (OSError, ValueError):
        raise InputError(
            f"{folder} is not empty and has no readable {FINGERPRINT}, so it holds no built-in scenes; "
            "choose another data.root, or leave it out to use the cache"
        ) from None
    expected = scenes.fingerprint
    if stored != expected:
        if not isinstance(stored, dict):
            stored = {}
        keys = sorted(key for key in {*stored, *expected} if stored.get(key) != expected.get(key))
        differences = "; ".join(
            f"{key} is {stored.get(key)!r:.80}, asked for {expected.get(key)!r:.80}" for key in keys
        )
        raise InputError(
            f"{folder} holds scenes made with other settings ({differences}); delete the folder, choose another "
            "data.root, or leave it out: every setting has its own folder in the cache"
        )
    return True


@contextmanager
def _appearing(folder: Path) -> Iterator[Path]:
    """Give a temporary folder that becomes ``folder`` at the end, unless there is one by then."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    try:
        yield temporary
        temporary.chmod(0o755)
        try:
            temporary.rename(folder)  # takes the place of an empty folder, fails on any other
        except OSError:
            if not (folder / FINGERPRINT).exists():
                raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


@dataclass(frozen=True)
class _Job:
    preset: str
    classes: list[Attributes]
    seed: int
    split: str
    index: int
    folder: Path


def _write(scenes: SceneSet, folder: Path, processes: int) -> None:
    assert scenes.sizes is not None  # filled in by __post_init__
    (folder / IMAGES).mkdir()
    (folder / TEST_IMAGES).mkdir()
    classes = scenes.class_splits()
    jobs = [
        _Job(scenes.preset, classes[split], scenes.seed, split, index, folder)
        for split, n in scenes.sizes.items()
        for index in range(n)
    ]
    description = f"rendering {scenes.preset} scenes"
    if processes > 1:
        with ProcessPoolExecutor(processes, get_context("spawn"), initializer=cv2.setNumThreads, initargs=(1,)) as pool:
            entries = list(progress(pool.map(_draw, jobs, chunksize=16), len(jobs), description))
    else:
        entries = list(progress(map(_draw, jobs), len(jobs), description))
    names = {split: [c.name for c in attributes] for split, attributes in classes.items()}
    files = {
        ANNOTATION: {"class_names": names, "pictures": entries},
        "annotation_FSC147_384.json": {p["file"]: _as_fsc147(p) for p in entries},
        "Train_Test_Val_FSC_147.json": {
            split: [p["file"] for p in entries if p["split"] == split] for split in scenes.sizes
        },
        "FSC-147-D.json": {
            p["file"]: {"data_split": p["split"], "text_description": f"the {p['classes'][0]}"} for p in entries
        },
        "Split_Classes.json": names,
        FINGERPRINT: scenes.fingerprint,
    }
    for name, content in files.items():
        (folder / name).write_text(json.dumps(content), encoding="utf-8")
    lines = "".join(f"{p['file']}\t{p['classes'][0]}\n" for p in entries)
    (folder / "ImageClasses_FSC147.txt").write_text(lines, encoding="utf-8")
    write_checksums(folder / CHECKSUMS, [folder / IMAGES / p["file"] for p in entries])


def _draw(job: _Job) -> dict[str, Any]:
    """Render and write one image; returns its annotation."""
    file = f"{job.split}_{job.index:05d}.jpg"
    scene = render(PRESETS[job.preset], job.classes, (job.seed, list(SIZES).index(job.split), job.index))
    _, data = cv2.imencode(".jpg", scene.image[..., ::-1], [cv2.IMWRITE_JPEG_QUALITY, JPEG_QUALITY])
    path = job.folder / IMAGES / file
    path.write_bytes(data.tobytes())
    if job.split == "test":
        try:
            os.link(path, job.folder / TEST_IMAGES / file)
        except OSError:  # a file system without links
            shutil.copy(path, job.folder / TEST_IMAGES / file)
    counts = np.bincount(scene.labels, minlength=len(scene.classes)).tolist()
    return {
        "file": file,
        "split": job.split,
        "size": list(scene.image.shape[:2]),
        "classes": [c.name for c in scene.classes],
        "points": _rounded(scene.points),
        "labels": scene.labels.tolist(),
        "boxes": _rounded(scene.boxes),
        "visible": _rounded(scene.visible),
        "exemplars": _rounded(scene.exemplars),
        "captions": captions(scene.classes, counts),
    }


def _rounded(values: np.ndarray) -> list[Any]:
    """Round to 1/1000 pixel, which shortens the files by half."""
    return np.asarray(values, np.float64).round(3).tolist()


def _as_fsc147(entry: dict[str, Any]) -> dict[str, Any]:
    """Convert the target's points and exemplars to what FSC-147's annotation file has."""
    height, width = entry["size"]
    corners = [[[x1, y1], [x1, y2], [x2, y2], [x2, y1]] for x1, y1, x2, y2 in entry["exemplars"]]
    points = [point for point, label in zip(entry["points"], entry["labels"], strict=True) if label == 0]
    return {
        "H": height,
        "W": width,
        "ratio_h": 1.0,
        "ratio_w": 1.0,
        "points": points,
        "box_examples_coordinates": corners,
    }


def captions(classes: list[Attributes], counts: list[int]) -> list[str]:
    """Write three sentences about what is there: with numbers, with vague amounts, with names only.

    Example:
        >>> captions([Attributes("rings", "yellow", "striped"), Attributes("discs", "red", "plain")], [7, 1])[0]
        '7 striped yellow rings and 1 red disc'
        >>> captions([Attributes("rings", "yellow", "striped"), Attributes("discs", "red", "plain")], [27, 3])[1:]
        ['many striped yellow rings and a few red discs', 'striped yellow rings and red discs']
    """
    there = [(c, n) for c, n in zip(classes, counts, strict=True) if n]
    number = [f"{n} {c.name if n > 1 else c.singular}" for c, n in there]
    amount = [f"{_amount(n)} {c.name if n > 1 else c.singular}" for c, n in there]
    return [_joined(number), _joined(amount), _joined([c.name for c, _ in there])]


def _amount(n: int) -> str:
    return "one" if n == 1 else "a few" if n <= 5 else "several" if n <= 20 else "many"


def _joined(parts: list[str]) -> str:
    return parts[0] if len(parts) == 1 else f"{', '.join(parts[:-1])} and {parts[-1]}"


class SyntheticScenes(CountingDataModule):
    """Images of shapes such as "striped yellow rings", with points, boxes, counts and captions of all objects.

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
            although it shows every word; ``image`` (default of ``low``) tests on new images of the same classes.
        sizes: number of images of ``train``, ``val`` and ``test`` (default 1500, 150 and 200).
        scene_seed: seeds the images; ``seed`` seeds only the order and augmentation in training.
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

    def annotated_names(self, split: Split) -> list[str]:
        """List the classes of the split, also those that no image shows."""
        return list(self._split_names["test" if split == "predict" else split])

    def read_split(self, split: Split) -> list[Record]:
        """Read scenes with everything in them; those of ``predict`` are the test images with their queries."""
        self.prepare_data()
        assert self.root is not None
        wanted = "test" if split == "predict" else split
        entries = [p for p in read_json(self.root / ANNOTATION)["pictures"] if p["split"] == wanted]
        records = [self._record(entry) for entry in entries]
        if split == "predict" and self.classes is not None:  # whoever predicts names what to count
            return [replace(record, classes=[], exemplars=None) for record in records]
        return records

    def _record(self, entry: dict[str, Any]) -> Record:
        assert self.root is not None  # set in __init__
        name = f"{ANNOTATION}: {entry['file']}"
        labels = np.array(entry["labels"], np.int64)
        classes = entry["classes"]
        exemplars: np.ndarray | None = as_boxes(entry["exemplars"], name)
        if self.fixed_list:
            # Every image answers for the whole list, in its order; there is no target to show examples of.
            names = self._split_names[entry["split"]]
            labels = np.array([names.index(c) for c in classes], np.int64)[labels]
            classes, exemplars = names, None
        return Record(
            image_id=entry["file"],
            path=self.root / IMAGES / entry["file"],
            classes=list(classes),
            points=as_points(entry["points"], name),
            labels=labels,
            boxes=as_boxes(entry["boxes"], name),
            box_labels=labels.copy(),
            exemplars=exemplars,
            counts=np.bincount(labels, minlength=len(classes)).astype(np.float32),
            captions=list(entry["captions"]),
            size=(entry["size"][0], entry["size"][1]),
        )
