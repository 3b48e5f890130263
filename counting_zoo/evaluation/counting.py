"""Counting a whole split without a trainer: picture by picture, resumable, dealt out to processes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from counting_zoo.counter import Counter
from counting_zoo.data.base import CountingDataModule
from counting_zoo.data.dataset import collate
from counting_zoo.data.progress import progress
from counting_zoo.data.records import Record, Split
from counting_zoo.errors import InputError, NamesError
from counting_zoo.evaluation.count_table import COLUMNS, CountTable
from counting_zoo.evaluation.finished import FinishedPictures, picture_key
from counting_zoo.metrics import grid_errors
from counting_zoo.prompts import known_names
from counting_zoo.types import Batch, CountOutput

Row = list[str | float | None]
NO_NAME = (
    "asked about nothing, as its annotation names nothing; data.prompts: all or data.merge_classes asks every picture"
)
"""Why a picture has no row."""


@dataclass(frozen=True)
class CountedSplit:
    """What a model counted in a split.

    Args:
        table: a row for each picture and name, in the order of the data.
        failed: (id, reason) of pictures that could not be counted; they are not in the table.
    """

    table: CountTable
    failed: list[tuple[str, str]]


def count_split(
    model: Counter,
    datamodule: CountingDataModule,
    split: Split = "test",
    *,
    parts: Path | None = None,
    rank: int = 0,
    world_size: int = 1,
    description: str = "counting",
) -> CountedSplit:
    """Count every picture of a split as ``test`` does.

    Args:
        model: in evaluation mode, on the device it should count on.
        datamodule: whose ``prompts`` say which names each picture is asked about.
        split: what is counted.
        parts: a folder where each finished picture is kept at once, by its id and the hash of its file; pictures that
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
    shown = progress(_pictures(model, datamodule, split, mine), len(mine), description)
    with torch.inference_mode(), FinishedPictures(None if parts is None else parts / f"{rank}.jsonl") as finished:
        for batch in shown:
            for image_id, reason in batch.get("failed", []):
                finished.add(keys[image_id], {"failed": reason})
            if batch["image_id"]:
                finished.add(keys[batch["image_id"][0]], _counted(model, batch))
        return _gathered(dict(finished.items()) if parts is None else _finished(parts), keys)


def read_parts(parts: Path, datamodule: CountingDataModule, split: Split) -> CountedSplit:
    """What all processes have left in ``parts``, in the order of the data."""
    return _gathered(_finished(parts), _keys(parts, datamodule, datamodule.records(split)))


def _keys(parts: Path | None, datamodule: CountingDataModule, records: Sequence[Record]) -> dict[str, str]:
    """What each picture is kept under, by its id."""
    return {r.image_id: r.image_id if parts is None else picture_key(datamodule, r) for r in records}


def _gathered(done: dict[str, dict[str, Any]], keys: dict[str, str]) -> CountedSplit:
    """Finished pictures in the order of the data."""
    found = [(image_id, done[key]) for image_id, key in keys.items() if key in done]
    return CountedSplit(
        CountTable.of(row for _, one in found if "rows" in one for row in one["rows"]),
        [(image_id, one["failed"]) for image_id, one in found if "failed" in one],
    )


def _pictures(
    model: Counter, datamodule: CountingDataModule, split: Split, records: Sequence[Record]
) -> Iterator[Batch]:
    data = datamodule.evaluation_dataset(split, model.preprocess, tolerate=True, records=records)
    if not records:
        return
    yield from DataLoader(
        data,
        batch_size=1,  # a picture that fails takes no other with it
        num_workers=min(datamodule.num_workers, len(records)),
        collate_fn=partial(collate, training=False),
    )


def _check_names(model: Counter, datamodule: CountingDataModule, split: Split) -> None:
    asked = datamodule.class_names(split)
    if model.vocabulary is not None and asked and not set(asked) & set(model.vocabulary):
        raise NamesError(
            f"{type(model).__name__} counts {', '.join(model.vocabulary[:12])} and nothing else, and the {split} "
            f"pictures of {type(datamodule).__name__} are asked about {', '.join(asked[:12])}: no name in common"
        )


def _counted(model: Counter, batch: Batch) -> dict[str, Any]:
    """The rows of one picture, or why it has none."""
    image_id = batch["image_id"][0]
    if "counts" not in batch:
        raise InputError(f"{image_id} carries no counts, so nothing can be scored; use predict for such pictures")
    if not batch["classes"][0]:
        return {"failed": NO_NAME}
    if model.vocabulary is not None:
        asked = batch["classes"][0]
        batch = known_names(batch, model.vocabulary)
        if not batch["image_id"]:
            return {"failed": f"asked about {', '.join(asked[:12])}, which the model does not know"}
    try:
        outputs = model.count_batch(
            list(batch["image"]), batch["classes"], image_ids=batch["image_id"], sizes=batch.get("original_size")
        )
        assert isinstance(outputs, list)  # as for every list of pictures
        return {"rows": _rows(model, batch, outputs[0])}
    except (InputError, FloatingPointError, RuntimeError) as error:  # torch's own, of pictures too small or too large
        return {"failed": f"{type(error).__name__}: {error}"}


def _rows(model: Counter, batch: Batch, output: CountOutput) -> list[Row]:
    """A row for each name of one picture.

    Raises:
        FloatingPointError: a count is not finite.
    """
    image_id, names = batch["image_id"][0], batch["classes"][0]
    counts: Tensor = model.reported(output.counts)[0].cpu().double()  # Apple's devices have no float64
    target = batch["counts"][0].double()
    if model.class_blind:
        names, target = [" + ".join(names)], target.sum(0, keepdim=True)
    if not bool(counts.isfinite().all()):
        raise FloatingPointError(f"the count is {counts.tolist()}")
    rows: list[Row] = [[image_id, name, float(t), float(c)] for name, t, c in zip(names, target, counts, strict=True)]
    if "points" in batch and "labels" in batch:
        size = (int(batch["image"][0].shape[-2]), int(batch["image"][0].shape[-1]))
        density = output.density[0, : len(names)]
        labels = None if model.class_blind else batch["labels"][0]
        errors = grid_errors(density, batch["points"][0], size, labels, model.extent(density, size))
        for row, game in zip(rows, errors.cpu().tolist(), strict=True):
            row += game[1:]
    if (bounds := model.interval(output)) is not None:
        for row, own in zip(rows, bounds[0, : len(rows)].tolist(), strict=True):
            row += [*[None] * (COLUMNS.index("low") - len(row)), *own]
    return rows


def _finished(parts: Path | None) -> dict[str, dict[str, Any]]:
    """What the processes have left in ``parts``, by :func:`~counting_zoo.evaluation.finished.picture_key`."""
    found: dict[str, dict[str, Any]] = {}
    for path in sorted(parts.glob("*.jsonl")) if parts is not None else []:
        for image_id, one in FinishedPictures(path).items():
            if "rows" in one or image_id not in found:  # a picture that failed may have been counted since
                found[image_id] = one
    return found


__all__ = ["NO_NAME", "CountedSplit", "count_split", "read_parts"]
