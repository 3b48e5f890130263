"""Counts that somebody else's program wrote, taking part in a benchmark as a model does."""

from __future__ import annotations

import csv
import logging
import math
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path, PurePosixPath

from counting_zoo.data.base import CountingDataModule
from counting_zoo.data.records import Split, ask
from counting_zoo.errors import InputError
from counting_zoo.evaluation.comparison import JOIN
from counting_zoo.evaluation.count_table import CountTable
from counting_zoo.evaluation.counting import NO_NAME, CountedSplit
from counting_zoo.evaluation.tables import unsafe_cell
from counting_zoo.geometry import Preprocess

log = logging.getLogger(__name__)
COUNT_NAMES = ("count", "predicted", "prediction")
TOTAL = ""
"""Name of a row that says how many objects of all names there are."""


def read_counts(path: str | Path) -> dict[str, dict[str, float]]:
    """Counts by picture and name.

    Args:
        path: CSV with the columns ``image``, ``count`` (or ``predicted``) and, where several names are asked about,
            ``name``; others are ignored, so ``counts.csv`` of ``predict`` will do.

    Raises:
        InputError: the file cannot be read, lacks a column, says two things of one picture, or a count is no number.
    """
    path = Path(path)
    found: dict[str, dict[str, float]] = defaultdict(dict)
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            reader = csv.DictReader(file)
            columns = reader.fieldnames or []
            column = next((name for name in COUNT_NAMES if name in columns), None)
            if column is None or "image" not in columns:
                raise InputError(
                    f"{path}: its columns are {', '.join(columns) or 'none'}; expected image, count and, where several "
                    "names are asked about, name"
                )
            for line in reader:
                image, name = unsafe_cell(line["image"] or ""), unsafe_cell(line.get("name") or TOTAL)
                try:
                    count = float(line[column] or "nothing")
                except ValueError:
                    count = math.nan
                if not math.isfinite(count):
                    raise InputError(
                        f"{path}, line {reader.line_num}: {column} of {image!r} is {line[column]!r}; expected a number"
                    )
                if name in found[image]:
                    raise InputError(
                        f"{path}, line {reader.line_num}: a second count of {name or 'all'!r} in {image!r}"
                    )
                found[image][name] = count
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise InputError(f"{path}: cannot be read as a table of counts: {error}") from error
    return dict(found)


def counts_of_file(path: str | Path, datamodule: CountingDataModule, split: Split) -> CountedSplit:
    """The counts of a file beside the true ones of a split.

    Pictures are found by their id, else by their file name with or without suffix, where that is the only one of its
    kind; a warning says where the file has another folder, which may be another split. A file without names, or with
    the names of a picture joined by " + ", is compared with the sum of the names asked about.

    Args:
        path: see :func:`read_counts`.
        datamodule: whose ``prompts`` say which names each picture is asked about.
        split: what is scored.

    Returns:
        The table, and as ``failed`` the pictures the file says nothing of.

    Raises:
        InputError: see :func:`read_counts`; or no picture of the file is in the split.
    """
    counts = read_counts(path)
    records = datamodule.records(split)
    choose_names = datamodule.evaluation_dataset(split, Preprocess()).choose_names
    ids = _matched([r.image_id for r in records], list(counts))
    if not ids:
        raise InputError(
            f"{path}: none of its {len(counts)} pictures ({', '.join(list(counts)[:3])}, ...) is in the {split} split "
            f"({', '.join(r.image_id for r in records[:3])}, ...)"
        )
    if moved := [(theirs, ours) for ours, theirs in ids.items() if theirs != ours and "/" in theirs]:
        log.warning("%s: %d pictures of other folders were taken for those of the same name, such as %r for %r",
                    path, len(moved), *moved[0])  # fmt: skip
    rows: list[tuple[str, str, float, float]] = []
    failed = []
    for record in records:
        asked = ask(record, choose_names(record, None))
        said = counts.get(ids.get(record.image_id, ""))
        if said is None or asked.counts is None:
            failed.append((record.image_id, "no count in the file" if said is None else "no true count"))
        elif not asked.classes:
            failed.append((record.image_id, NO_NAME))
        elif set(said) <= {TOTAL, joined := JOIN.join(asked.classes)}:
            rows.append((record.image_id, joined, float(asked.counts.sum()), said.get(joined, said.get(TOTAL, 0.0))))
        elif missing := [name for name in asked.classes if name not in said]:
            failed.append((record.image_id, f"no count of {', '.join(map(repr, missing[:5]))} in the file"))
        else:
            rows += [
                (record.image_id, name, float(target), said[name])
                for name, target in zip(asked.classes, asked.counts, strict=True)
            ]
    return CountedSplit(CountTable.of(rows), failed)


def _matched(wanted: list[str], given: list[str]) -> dict[str, str]:
    """The file's id for each wanted picture that it has."""
    there = set(given)
    found = {image_id: image_id for image_id in wanted if image_id in there}
    keys: tuple[Callable[[str], str], ...] = (lambda i: PurePosixPath(i).name, lambda i: PurePosixPath(i).stem)
    for key in keys:
        ours, theirs = _by(wanted, key), _by(given, key)
        for name, image_ids in ours.items():
            if len(image_ids) == len(theirs.get(name, [])) == 1:
                found.setdefault(image_ids[0], theirs[name][0])
    return found


def _by(image_ids: list[str], key: Callable[[str], str]) -> dict[str, list[str]]:
    grouped: dict[str, list[str]] = defaultdict(list)
    for image_id in image_ids:
        grouped[key(image_id)].append(image_id)
    return grouped


__all__ = ["counts_of_file", "read_counts"]
