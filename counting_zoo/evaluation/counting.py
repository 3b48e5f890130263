"""Counts of a whole split without a trainer: image by image, resumable, dealt out to processes, with their cost."""

from __future__ import annotations

import json
import logging
import platform
import statistics
import sys
import time
from collections import defaultdict
from collections.abc import ItemsView, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Self, TextIO, TypedDict

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from counting_zoo.data.base import CountingDataModule
from counting_zoo.data.dataset import collate
from counting_zoo.data.records import Record, Split, ask
from counting_zoo.data.tables import ImageNames
from counting_zoo.errors import InputError, NamesError, listed
from counting_zoo.geometry import Preprocess
from counting_zoo.io import progress, read_table, sha256, unsafe_cell
from counting_zoo.metrics.counts import CountTable
from counting_zoo.metrics.statistics import JOIN
from counting_zoo.module import CountingModule
from counting_zoo.prediction import Prediction
from counting_zoo.queries import check_data, known_names
from counting_zoo.types import Batch, CountOutput, Query

try:
    import resource
except ImportError:  # not on Windows
    resource = None  # type: ignore[assignment]


class FinishedImages:
    """Finished images on disk, a line of JSON each, by id; used as a context.

    Args:
        path: the file, which is read first and then added to; a line that an interruption left half written is no
            image. ``None`` keeps everything in memory only.

    Example:
        >>> with FinishedImages(None) as finished:
        ...     finished.add("a.jpg", {"count": 3})
        ...     "a.jpg" in finished, finished["a.jpg"]
        (True, {'count': 3})
    """

    def __init__(self, path: Path | None) -> None:
        self.path = path
        self._file: TextIO | None = None
        self._results: dict[str, dict[str, Any]] = {}
        if path is None or not path.is_file():
            return
        for line in path.read_text(encoding="utf-8", errors="replace").split("\n"):
            try:
                image_id, content = json.loads(line)
            except (ValueError, TypeError):
                continue
            self._results[image_id] = content

    def __enter__(self) -> Self:
        if self.path is not None:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._file = self.path.open("a", encoding="utf-8")
            self._file.write("\n")  # ends a line that an interruption left half written
        return self

    def __exit__(self, *exception: object) -> None:
        if self._file is not None:
            self._file.close()

    def __contains__(self, image_id: str) -> bool:
        return image_id in self._results

    def __getitem__(self, image_id: str) -> dict[str, Any]:
        return self._results[image_id]

    def items(self) -> ItemsView[str, dict[str, Any]]:
        """Iterate over ids and results, in the order in which they were finished."""
        return self._results.items()

    def add(self, image_id: str, content: dict[str, Any]) -> None:
        """Keep the result of an image, as it will be read again."""
        line = json.dumps([image_id, content], allow_nan=False)  # in ASCII, as ids may hold separators of lines
        self._results[image_id] = json.loads(line)[1]
        if self._file is not None:
            self._file.write(line + "\n")
            self._file.flush()


def finished_key(datamodule: CountingDataModule, record: Record) -> str:
    """Make the key of finished work on an image: its id, and a hash of its file as evaluation reads it.

    The annotation does not tell an image from another one of the same name: the same images with noise, say, or a
    file that was replaced.
    """
    try:
        content = datamodule.read_verified(record)
    except (InputError, OSError):
        content = b""  # whoever opens the image says what is wrong with it
    return f"{sha256(content)[:16]} {record.image_id}"


MEBI = 2**20


class Costs(TypedDict):
    """Result of :func:`measure_costs`."""

    pictures_per_second: float
    seconds_per_picture: float
    peak_memory_mib: float | None  # with weights and all else in memory; None where the system does not tell
    parameters: int
    pictures: int
    megapixels: float  # of an image, on average
    device: str
    threads: int


def measure_costs(
    model: CountingModule, images: Sequence[Tensor], names: Sequence[list[str]], *, repeats: int = 3
) -> Costs:
    """Count the same images several times, one by one as evaluation does, after a first round that is not timed.

    Args:
        model: in evaluation mode, on its device.
        images: ``(3, H_i, W_i)``, as the model's ``preprocess`` leaves them.
        names: what each is asked about.
        repeats: timed rounds; their median is given.

    Returns:
        Images each second without reading and resizing; the peak of memory, weights included: of the device where it
        is CUDA, else of the process since its start.

    Raises:
        InputError: there is no image.
    """
    if not images:
        raise InputError("no image to measure the cost of counting on")
    device = torch.device(model.device)
    seconds: list[float] = []
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    with torch.inference_mode():
        for round_ in range(repeats + 1):
            start = time.perf_counter()
            for image, asked in zip(images, names, strict=True):
                model.count_images([image], [Query(tuple(asked))])
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            if round_:
                seconds.append(time.perf_counter() - start)
    each = statistics.median(seconds) / len(images)
    peak = _peak_memory(device)
    return {
        "pictures_per_second": 1 / each,
        "seconds_per_picture": each,
        "peak_memory_mib": None if peak is None else peak / MEBI,
        "parameters": sum(p.numel() for p in model.parameters()),
        "pictures": len(images),
        "megapixels": sum(p.shape[1] * p.shape[2] for p in images) / len(images) / 1e6,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else _processor(),
        "threads": torch.get_num_threads(),
    }


def _peak_memory(device: torch.device) -> int | None:
    """Read the peak of memory in bytes: of a CUDA device since its last reset, else of the process since its start."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if resource is None:
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # kibibytes on Linux


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    named = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(named, platform.processor() or platform.machine())


log = logging.getLogger(__name__)


COUNT_NAMES = ("count", "predicted", "prediction")


TOTAL = ""
"""Name of a row that holds the count of all names together."""


def read_counts(path: str | Path) -> dict[str, dict[str, float]]:
    """Read counts by image and name.

    Args:
        path: CSV with the columns ``image``, ``count`` (or ``predicted``) and, where several names are asked about,
            ``name``; others are ignored, so ``counts.csv`` of ``predict`` will do.

    Raises:
        InputError: the file cannot be read, lacks a column, has two counts of one thing, or a count is no number.
    """
    table = read_table(Path(path), exact=True)
    column = next((name for name in COUNT_NAMES if name in table.header), COUNT_NAMES[0])
    names = table.column("name") if "name" in table.header else [TOTAL] * len(table.lines)
    counts: dict[str, dict[str, float]] = defaultdict(dict)
    for row, cells in enumerate(zip(table.column("image"), names, table.floats(column)[:, 0], strict=True)):
        image, name, count = unsafe_cell(cells[0]), unsafe_cell(cells[1]), cells[2]
        if name in counts[image]:
            raise InputError(f"{table.where(row)}: a second count of {name or 'all'!r} in {image!r}")
        counts[image][name] = float(count)
    return dict(counts)


def counts_of_file(path: str | Path, datamodule: CountingDataModule, split: Split) -> CountedSplit:
    """Compare the counts of a file with the true ones of a split.

    Images are found by their id, else by their file name with or without suffix, where that is the only one of its
    kind; a warning says where the file has another folder, which may be another split. A file without names, or with
    the names of an image joined by " + ", is compared with the sum of the names asked about.

    Args:
        path: see :func:`read_counts`.
        datamodule: whose ``prompts`` say which names each image is asked about.
        split: what is scored.

    Returns:
        The table, and as ``failed`` the images the file says nothing of.

    Raises:
        InputError: see :func:`read_counts`; or no image of the file is in the split.
    """
    counts = read_counts(path)
    records = datamodule.records(split)
    choose_names = datamodule.evaluation_dataset(split, Preprocess()).choose_names
    ids = _matched([r.image_id for r in records], list(counts))
    if not ids:
        raise InputError(
            f"{path}: none of its {len(counts)} images ({', '.join(list(counts)[:3])}, ...) is in the {split} split "
            f"({', '.join(r.image_id for r in records[:3])}, ...)"
        )
    if moved := [(theirs, ours) for ours, theirs in ids.items() if theirs != ours and "/" in theirs]:
        log.warning(
            "%s: %d images of other folders were taken for those of the same name, such as %r for %r",
            path,
            len(moved),
            *moved[0],
        )
    rows: list[tuple[str, str, float, float]] = []
    failed = []
    for record in records:
        asked = ask(record, choose_names(record, None))
        predicted = counts.get(ids.get(record.image_id, ""))
        if predicted is None or asked.counts is None:
            failed.append((record.image_id, "no count in the file" if predicted is None else "no true count"))
        elif not asked.classes:
            failed.append((record.image_id, NO_NAME))
        elif set(predicted) <= {TOTAL, joined := JOIN.join(asked.classes)}:
            rows.append(
                (record.image_id, joined, float(asked.counts.sum()), predicted.get(joined, predicted.get(TOTAL, 0.0)))
            )
        elif missing := [name for name in asked.classes if name not in predicted]:
            failed.append((record.image_id, f"no count of {', '.join(map(repr, missing[:5]))} in the file"))
        else:
            rows += [
                (record.image_id, name, float(target), predicted[name])
                for name, target in zip(asked.classes, asked.counts, strict=True)
            ]
    return CountedSplit(CountTable.of(rows), failed)


def _matched(wanted: list[str], given: list[str]) -> dict[str, str]:
    """Find the file's id for each wanted image, where both are the only ones that can mean each other."""
    ours, theirs = ImageNames(wanted), ImageNames(given)
    pairs = ((image_id, theirs.matches(image_id)) for image_id in wanted)
    return {image_id: found[0] for image_id, found in pairs if len(found) == 1 and ours.matches(found[0]) == [image_id]}


Row = dict[str, str | float]


NO_NAME = (
    "asked about nothing, as its annotation names nothing; data.prompts: all or data.merge_classes asks every image"
)
"""Why an image has no row."""


@dataclass(frozen=True)
class CountedSplit:
    """Counts of a split, and the images that failed.

    Args:
        table: a row for each image and name, in the order of the data.
        failed: (id, reason) of images that could not be counted; they are not in the table.
    """

    table: CountTable
    failed: list[tuple[str, str]]


def count_split(
    model: CountingModule,
    datamodule: CountingDataModule,
    split: Split = "test",
    *,
    parts: Path | None = None,
    rank: int = 0,
    world_size: int = 1,
    description: str = "counting",
) -> CountedSplit:
    """Count every image of a split as ``test`` does.

    Args:
        model: in evaluation mode, on the device it should count on.
        datamodule: whose ``prompts`` say which names each image is asked about.
        split: what is counted.
        parts: a folder where each finished image is kept at once, by its id and the hash of its file; images that
            are already there are not counted again. Whoever chooses the folder answers for the model, the annotation
            and the names asked about being the same. ``None`` keeps nothing.
        rank, world_size: this process, and how many share the split and ``parts``.
        description: stands before the progress bar.

    Returns:
        What is known so far: with one process everything; with several, what had been finished by all of them when
        this one ended (:func:`read_parts` gives the whole when all have).

    Raises:
        InputError: the data carry no counts, or the model knows none of their names.
    """
    records = datamodule.records(split)
    _check_names(model, datamodule, split)
    keys = _keys(parts, datamodule, records)
    done = _finished(parts)
    mine = [r for r in records[rank::world_size] if "rows" not in done.get(keys[r.image_id], {})]
    shown = progress(_batches(model, datamodule, split, mine), len(mine), description)
    with torch.inference_mode(), FinishedImages(None if parts is None else parts / f"{rank}.jsonl") as finished:
        for batch in shown:
            for image_id, reason in batch.get("failed", []):
                finished.add(keys[image_id], {"failed": reason})
            if batch["image_id"]:
                finished.add(keys[batch["image_id"][0]], _counted(model, batch))
        return _gathered(dict(finished.items()) if parts is None else _finished(parts), keys)


def read_parts(parts: Path, datamodule: CountingDataModule, split: Split) -> CountedSplit:
    """Read the parts of all processes, in the order of the data."""
    return _gathered(_finished(parts), _keys(parts, datamodule, datamodule.records(split)))


def _keys(parts: Path | None, datamodule: CountingDataModule, records: Sequence[Record]) -> dict[str, str]:
    """Map image ids to the keys that their results are kept under."""
    return {r.image_id: r.image_id if parts is None else finished_key(datamodule, r) for r in records}


def _gathered(done: dict[str, dict[str, Any]], keys: dict[str, str]) -> CountedSplit:
    """Gather finished images in the order of the data."""
    results = [(image_id, done[key]) for image_id, key in keys.items() if key in done]
    return CountedSplit(
        CountTable.of(row for _, result in results for row in result.get("rows", [])),
        [(image_id, result["failed"]) for image_id, result in results if "failed" in result],
    )


def _batches(
    model: CountingModule, datamodule: CountingDataModule, split: Split, records: Sequence[Record]
) -> Iterator[Batch]:
    data = datamodule.evaluation_dataset(split, model.preprocess, tolerate=True, records=records)
    if not records:
        return
    yield from DataLoader(
        data,
        batch_size=1,  # an image that fails takes no other with it
        num_workers=min(datamodule.num_workers, len(records)),
        collate_fn=partial(collate, training=False),
    )


def _check_names(model: CountingModule, datamodule: CountingDataModule, split: Split) -> None:
    check_data(model, datamodule, split)
    asked = datamodule.class_names(split)
    if model.vocabulary is not None and asked and not set(asked) & set(model.vocabulary):
        raise NamesError(
            f"{type(model).__name__} counts {listed(model.vocabulary)} and nothing else, and the {split} "
            f"images of {type(datamodule).__name__} are asked about {listed(asked)}: no name in common"
        )


def _counted(model: CountingModule, batch: Batch) -> dict[str, Any]:
    """Count one image: its rows, or the reason why it has none."""
    image_id = batch["image_id"][0]
    if "counts" not in batch:
        raise InputError(f"{image_id} carries no counts, so nothing can be scored; use predict for such images")
    if not batch["queries"][0].names:
        return {"failed": NO_NAME}
    if model.vocabulary is not None:
        asked = batch["queries"][0].names
        batch = known_names(batch, model.vocabulary)
        if not batch["image_id"]:
            return {"failed": f"asked about {', '.join(asked[:12])}, which the model does not know"}
    try:
        outputs = model.count_images(
            list(batch["image"]), batch["queries"], image_ids=batch["image_id"], sizes=batch.get("original_size")
        )
        return {"rows": _rows(model, batch, outputs[0])}
    except (InputError, FloatingPointError, RuntimeError) as error:  # torch's own, of images too small or too large
        return {"failed": f"{type(error).__name__}: {error}"}


def _rows(model: CountingModule, batch: Batch, output: CountOutput) -> list[Row]:
    """Make a row for each name of one image.

    Raises:
        FloatingPointError: a count is not finite.
    """
    counts = model.reported(output.counts)[0]
    if not bool(counts.isfinite().all()):
        raise FloatingPointError(f"the count is {counts.tolist()}")
    columns = model.table_columns([output], batch, [(int(i.shape[-2]), int(i.shape[-1])) for i in batch["image"]])
    # The table is exact in float64, which Apple's devices do not have.
    on_cpu: dict[str, Any] = {
        key: value.cpu() if isinstance(value, Tensor) else value for key, value in columns.items()
    }
    table = CountTable()
    table.update(batch["image_id"], **on_cpu)
    return list(table.known_cells())


def _finished(parts: Path | None) -> dict[str, dict[str, Any]]:
    """Read what the processes have left in ``parts``, by :func:`finished_key`."""
    results: dict[str, dict[str, Any]] = {}
    for path in sorted(parts.glob("*.jsonl")) if parts is not None else []:
        for key, result in FinishedImages(path).items():
            if "rows" in result or key not in results:  # an image that failed may have been counted since
                results[key] = result
    return results


@torch.no_grad()
def count_again(module: CountingModule, batch: Batch, index: int, names: Sequence[str] | None = None) -> Prediction:
    """Count one image of an evaluation batch once more, with what drawing needs; other ``names`` if given."""
    query = batch["queries"][index]
    query = query if names is None else replace(query, names=tuple(names))
    image = batch["image"][index]
    size = (int(image.shape[-2]), int(image.shape[-1]))
    stored = batch["original_size"][index] if "original_size" in batch else size
    output = module.count_images([image], [query], image_ids=[batch["image_id"][index]], sizes=[stored])[0]
    return module.to_prediction(output, list(query.names), size, batch["image_id"][index], image)
