"""Checks of a whole split before anything is trained, so that errors come at setup and not hours later."""

from __future__ import annotations

import hashlib
import math
import warnings
from collections import defaultdict
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np

from counting_zoo.data.points import check_finite, keep_inside
from counting_zoo.data.records import Record
from counting_zoo.errors import ImageError, InputError
from counting_zoo.images import image_size

_SHOWN = 5  # names listed in a message before "and 17 more"
_THREADS = 8  # reading headers waits for the disk
_CHOICES = {
    "outside": ("error", "clamp", "drop"), "missing": ("error", "skip"), "duplicates": ("error", "warn", "ignore"),
}  # fmt: skip


def inside_root(root: str | Path, relative: str | Path, source: str) -> Path:
    """The file that an annotation names, which must lie below the root.

    Args:
        root: the data set's folder; may itself be a link.
        relative: the name as the annotation gives it.
        source: the annotation file, for messages.

    Returns:
        ``root / relative``; it need not exist.

    Raises:
        InputError: the name is absolute, leads out of the root (by ``..`` or a link), or runs in a circle of links.
    """
    name = Path(relative)
    cure = "expected a path below the root; correct the name, or point data.root at the folder that holds the files"
    if name.is_absolute():
        raise InputError(f"{source}: the file name {str(relative)!r} is absolute; {cure}")
    path = Path(root) / name
    try:
        inside = path.resolve().is_relative_to(Path(root).resolve())
    except (OSError, RuntimeError, ValueError) as error:  # a circle of links, a name too long, a NUL character
        raise InputError(f"{source}: the file name {str(relative)!r} cannot be followed ({error}); {cure}") from None
    if not inside:
        raise InputError(f"{source}: the file name {str(relative)!r} leads out of {str(root)!r}; {cure}")
    return path


def check_options(
    numbers: dict[str, int],
    choices: dict[str, str],
    *,
    prompts: int | str,
    classes: list[str] | None,
    merge_classes: str | None,
    constants: dict[str, float] | None,
) -> None:
    """Refuse options of a data module that are out of range.

    Args:
        numbers: those that have a least value, by name.
        choices: those that are one of a few words, by name.
        prompts, classes, merge_classes, constants: as of :class:`~counting_zoo.data.base.CountingDataModule`.

    Raises:
        InputError: names the option, its value and what is expected.
    """
    for name, value in numbers.items():
        least = 0 if name == "num_workers" else 1
        if value < least:
            raise InputError(f"data.{name} is {value}; expected at least {least}")
    for name, choice in choices.items():
        if choice not in _CHOICES[name]:
            raise InputError(f"data.{name} is {choice!r}; expected one of {', '.join(_CHOICES[name])}")
    if prompts not in ("target", "all") and (not isinstance(prompts, int) or prompts < 1):
        raise InputError(f"data.prompts is {prompts!r}; expected 'target', 'all' or a number of at least 1")
    if classes is not None and (not all(name.strip() for name in classes) or len(set(classes)) != len(classes)):
        raise InputError(f"data.classes is {classes}; expected names that are not empty, each once")
    if merge_classes is not None and not merge_classes.strip():
        raise InputError("data.merge_classes is empty; expected a name for every object, such as 'objects'")
    if constants is not None and not all(math.isfinite(value) for value in constants.values()):
        raise InputError(f"data.constants is {constants}; expected finite numbers by name")


def check_records(
    records: Iterable[Record], split: str, *, outside: str = "error", missing: str = "error", source: str = "data"
) -> list[Record]:
    """Check every record of a split against itself and against the header of its picture.

    Args:
        records: what a reader found.
        split: its name; in ``predict`` an unreadable picture is left to be reported when its turn comes.
        outside: what happens to coordinates outside the picture, see :func:`~counting_zoo.data.points.keep_inside`.
        missing: an absent picture is an ``error``, or ``skip``ped with one warning for the split.
        source: the data module, for messages.

    Returns:
        The records that remain, with ``size`` filled in.

    Raises:
        InputError: an inconsistency; the message names the picture and the field.
        ImageError: a picture whose header cannot be read (not in ``predict``).
    """
    if missing not in ("error", "skip"):
        raise InputError(f"data.missing is {missing!r}; expected 'error' or 'skip'")
    where = f"{source}, {split} split"
    records = list(records)
    for record in records:
        _check_consistent(record)
    records = _existing(records, missing, where)
    _check_unique(records, where)
    return _with_sizes(records, split, outside, where)


def check_kinds(records: list[Record], where: str) -> None:
    """Make sure that all pictures of a split have the same kinds of annotation, or no batch could be made of them.

    Raises:
        InputError: points, boxes, exemplars, captions or counts are known of some pictures only.
    """
    for kind in ("points", "boxes", "exemplars", "captions", "counts"):
        fields = (kind, "labels") if kind == "counts" else (kind,)  # counts follow from points
        known = [any(getattr(record, field) is not None for field in fields) for record in records]
        if any(known) and not all(known):
            lacking = [record.image_id for record, there in zip(records, known, strict=True) if not there]
            raise InputError(
                f"{where}: {len(lacking)} of {len(records)} pictures have no {kind} ({_listed(lacking)}), but others "
                f"have ({records[known.index(True)].image_id}); annotate all pictures alike"
            )


def check_duplicates(records_by_split: Mapping[str, list[Record]], action: str) -> None:
    """Find pictures that are in two splits, by path or by content.

    Args:
        records_by_split: the records of each split.
        action: ``error`` or ``warn``.

    Raises:
        InputError: the same file is in two splits and ``action`` is ``error``.
    """
    by_size: dict[int, list[tuple[str, Record, Path]]] = defaultdict(list)
    for split, records in records_by_split.items():
        for record in records:
            if record.path is not None and record.path.is_file():
                by_size[record.path.stat().st_size].append((split, record, record.path))
    by_hash: dict[bytes, list[tuple[str, Record]]] = defaultdict(list)
    for files in by_size.values():
        if len({split for split, _, _ in files}) > 1:
            for split, record, path in files:
                by_hash[hashlib.sha256(path.read_bytes()).digest()].append((split, record))
    pairs = [
        f"{a.image_id} ({split_a}) = {b.image_id} ({split_b})"
        for same in by_hash.values()
        for i, (split_a, a) in enumerate(same)
        for split_b, b in same[i + 1 :]
        if split_a != split_b
    ]
    if pairs:
        message = (
            f"{len(pairs)} pairs of equal pictures are in two splits: {_listed(pairs)}; scores on them mean nothing. "
            "Remove one of each pair, or set data.duplicates to 'warn' or 'ignore'"
        )
        if action == "error":
            raise InputError(message)
        warnings.warn(message, stacklevel=2)


def _check_unique(records: list[Record], where: str) -> None:
    seen: dict[str, Record] = {}
    folded: dict[str, Record] = {}
    clashes = []
    for record in records:
        if record.image_id in seen:
            raise InputError(f"{where}: picture {record.image_id!r} appears twice; expected every picture once")
        other = folded.get(record.image_id.casefold())
        if other is not None:
            if _same_file(record, other):
                raise InputError(
                    f"{where}: {other.image_id!r} and {record.image_id!r} are the same file; expected one spelling"
                )
            clashes.append(f"{other.image_id!r} and {record.image_id!r}")
        seen[record.image_id] = folded[record.image_id.casefold()] = record
    if clashes:
        warnings.warn(
            f"{where}: {len(clashes)} pairs of names differ in case only ({_listed(clashes)}); "
            "on Windows and macOS they are one file",
            stacklevel=3,
        )


def _same_file(a: Record, b: Record) -> bool:
    return a.path is not None and b.path is not None and a.path.exists() and b.path.exists() and a.path.samefile(b.path)


def _check_consistent(record: Record) -> None:
    """What must hold between the fields of one record."""
    name, n = record.image_id, len(record.classes)
    if len(set(record.classes)) != n:
        raise InputError(f"{name}: classes are {record.classes}; expected every name once")
    for values_name, labels_name in (("points", "labels"), ("boxes", "box_labels")):
        values, labels = getattr(record, values_name), getattr(record, labels_name)
        if (values is None) != (labels is None):
            absent, given = (values_name, labels_name) if values is None else (labels_name, values_name)
            raise InputError(f"{name}: has {given} but no {absent}; expected both or neither")
        if values is None:
            continue
        if len(values) != len(labels):
            raise InputError(f"{name}: {len(values)} {values_name} but {len(labels)} {labels_name}; expected as many")
        if len(labels) and not 0 <= int(labels.min()) <= int(labels.max()) < n:
            bad = int(np.flatnonzero((labels < 0) | (labels >= n))[0])
            raise InputError(
                f"{name}: {labels_name}[{bad}] is {int(labels[bad])}; expected an index into "
                f"its {n} classes {record.classes}"
            )
        check_finite(values, f"{name}: {values_name}")
    if record.exemplars is not None:
        check_finite(record.exemplars, f"{name}: exemplars")
    if record.counts is not None:
        _check_counts(record)


def _check_counts(record: Record) -> None:
    name, counts, n = record.image_id, np.asarray(record.counts), len(record.classes)
    if counts.shape != (n,):
        raise InputError(f"{name}: counts of shape {counts.shape}; expected one for each of its {n} classes")
    bad = ~np.isfinite(counts) | (counts < 0)
    if bad.any():
        k = int(np.flatnonzero(bad)[0])
        raise InputError(
            f"{name}: the count of {record.classes[k]!r} is {counts[k]:g}; expected a number of at least 0"
        )
    if record.labels is None:
        return
    found = np.bincount(record.labels, minlength=n)
    wrong = np.flatnonzero(counts != found)
    if len(wrong):
        k = int(wrong[0])
        raise InputError(
            f"{name}: the count of {record.classes[k]!r} is given as {counts[k]:g}, but {found[k]} points are "
            "annotated; correct one of them, or leave the counts out"
        )


def _existing(records: list[Record], missing: str, where: str) -> list[Record]:
    """The records whose file is there, or that have none."""
    absent = [record for record in records if record.path is not None and not record.path.is_file()]
    if not absent:
        return records
    message = f"{where}: {len(absent)} of {len(records)} pictures are missing: {_listed(map(_describe, absent))}"
    if missing == "error":
        raise InputError(f"{message}. Complete the folder, or set data.missing to 'skip'")
    warnings.warn(f"{message}; skipped (data.missing=skip)", stacklevel=3)
    gone = {id(record) for record in absent}
    return [record for record in records if id(record) not in gone]


def _describe(record: Record) -> str:
    """The missing file, with what may be meant instead."""
    path = record.path
    assert path is not None  # only called for records with one
    if path.is_symlink():
        return f"{path} (a link that leads nowhere)"
    if path.is_dir():
        return f"{path} (a folder)"
    if path.parent.is_dir():
        similar = [other.name for other in path.parent.iterdir() if other.name.casefold() == path.name.casefold()]
        if similar:
            return f"{path} (there is {similar[0]!r}: upper and lower case matter)"
    return str(path)


def _with_sizes(records: list[Record], split: str, outside: str, where: str) -> list[Record]:
    with ThreadPoolExecutor(_THREADS) as pool:
        sizes = list(pool.map(lambda record: _size(record, tolerate=split == "predict"), records, chunksize=64))
    checked: list[Record] = []
    touched: dict[str, int] = {}
    surprises: list[str] = []
    for record, size in zip(records, sizes, strict=True):
        if size is not None:
            if record.size not in (None, size):
                surprises.append(f"{record.image_id}: {record.size}, but the file has {size}")
            record, n = keep_inside(record, size, outside)
            if n:
                touched[record.image_id] = n
            record = replace(record, size=size)
        checked.append(record)
    if touched:
        verb = {"clamp": "moved to the border", "drop": "dropped or clipped"}[outside]
        warnings.warn(
            f"{where}: {sum(touched.values())} coordinates outside {len(touched)} pictures were {verb} "
            f"(data.outside={outside}): {_listed(f'{name} ({n})' for name, n in touched.items())}",
            stacklevel=3,
        )
    if surprises:
        warnings.warn(
            f"{where}: the annotation of {len(surprises)} pictures states another size (height, width) than the "
            f"file: {_listed(surprises)}; are points in the frame of a resized or unrotated copy?",
            stacklevel=3,
        )
    return checked


def _size(record: Record, tolerate: bool) -> tuple[int, int] | None:
    if record.path is None:
        return record.size
    try:
        return image_size(record.path, record.image_id)
    except ImageError:
        if tolerate:
            return None
        raise


def _listed(names: Iterable[str]) -> str:
    names = list(names)
    rest = len(names) - _SHOWN
    return ", ".join(names[:_SHOWN]) + (f" and {rest} more" if rest > 0 else "")


__all__ = ["check_duplicates", "check_kinds", "check_options", "check_records", "inside_root"]
