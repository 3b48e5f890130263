"""Reading files of captions: COCO's JSON, CSV and TSV; errors name file and line, or file and entry."""

from __future__ import annotations

import csv
import warnings
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from counting_zoo.data.annotation_files import read_json
from counting_zoo.errors import InputError

PICTURE_COLUMNS = ("image", "filepath", "file")
CAPTION_COLUMNS = ("caption", "title")
_NEEDED = {"images": ("id", "file_name"), "annotations": ("image_id", "caption")}


@dataclass(frozen=True)
class Captions:
    """What a file says of its pictures.

    Args:
        path: the file.
        texts: captions of each picture, in the order of the file; none where all of them are empty.
        places: where the file names each picture first, such as ``line 7`` or ``images[6]``.
    """

    path: Path
    texts: dict[str, list[str]]
    places: dict[str, str]


def read_captions(path: Path, columns: Sequence[str] | None = None) -> Captions:
    """Read every caption of a file; empty ones are left out, with one warning.

    Args:
        path: ``.json`` as ``captions_train2017.json``, ``.csv``, or ``.tsv`` with a row for each caption.
        columns: names of the columns of a table without a header, such as ``[caption, image]``; a table's first line
            if ``None``.

    Raises:
        InputError: the file is not of these kinds, not in UTF-8, or damaged, or a picture has no name.
    """
    kind = path.suffix.lower()
    if kind == ".json":
        if columns is not None:
            raise InputError(f"data.columns is {list(columns)}, but {path} is no table; leave data.columns out")
        rows = _coco_rows(path)
    elif kind in (".csv", ".tsv"):
        rows = _table_rows(path, kind, columns)
    else:
        raise InputError(f"{path}: captions are read from .json (COCO's layout), .csv and .tsv; expected one of these")
    texts: dict[str, list[str]] = {}
    places: dict[str, str] = {}
    empty: list[str] = []
    for place, picture, caption in rows:
        if not picture:
            raise InputError(f"{path}, {place}: the name of the picture is empty")
        name = PurePosixPath(picture).as_posix()  # without ./ in front
        places.setdefault(name, place)
        found = texts.setdefault(name, [])
        if caption is None:
            continue
        if caption.strip():
            found.append(caption.strip())
        else:
            empty.append(place)
    if not texts:
        raise InputError(f"{path}: names no picture; expected at least one with a caption")
    if empty:
        warnings.warn(f"{path}: {len(empty)} empty captions were left out (the first at {empty[0]})", stacklevel=2)
    return Captions(path, texts, places)


def _coco_rows(path: Path) -> Iterator[tuple[str, str, str | None]]:
    """Place, picture and caption; first each picture without one, so that no picture is lost."""
    content = read_json(path)
    for part, fields in _NEEDED.items():
        listed = content.get(part) if isinstance(content, dict) else None
        if not isinstance(listed, list):
            found = sorted(content) if isinstance(content, dict) else type(content).__name__
            raise InputError(f"{path}: has no list {part!r}, only {found}; expected COCO's captions_*.json")
        for i, one in enumerate(listed):
            lacking = [field for field in fields if not isinstance(one, dict) or field not in one]
            if lacking:
                found = sorted(one) if isinstance(one, dict) else repr(one)[:60]
                raise InputError(f"{path}: {part}[{i}] has no {', '.join(lacking)}, only {found}; complete it")
    files: dict[Any, str] = {}
    owners: dict[str, int] = {}
    for i, image in enumerate(content["images"]):
        number, name = image["id"], image["file_name"]
        if not isinstance(number, int | str) or not isinstance(name, str):
            raise InputError(
                f"{path}: images[{i}] has the id {number!r} and the file_name {name!r}; expected a number and a text"
            )
        if number in files or name in owners:
            same = "id" if number in files else "file_name"
            raise InputError(f"{path}: images[{i}] has the {same} {image[same]!r} of another; expected each once")
        files[number], owners[name] = name, i
        yield f"images[{i}]", name, None
    for i, one in enumerate(content["annotations"]):
        number, caption = one["image_id"], one["caption"]
        if not isinstance(number, int | str) or number not in files:
            raise InputError(
                f"{path}: annotations[{i}] has image_id {number!r}, but no image has this id; correct it or delete "
                "the annotation"
            )
        if not isinstance(caption, str):
            raise InputError(f"{path}: annotations[{i}] has the caption {caption!r}; expected a text")
        yield f"annotations[{i}]", files[number], caption


def _table_rows(path: Path, kind: str, columns: Sequence[str] | None) -> Iterator[tuple[str, str, str | None]]:
    """Place, picture and caption of each row."""
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            rows = _csv_rows(file) if kind == ".csv" else _tsv_rows(file)
            header = next(rows, (0, []))[1] if columns is None else [name.strip() for name in columns]
            picture, caption = (
                _column(path, header, names, columns is None) for names in (PICTURE_COLUMNS, CAPTION_COLUMNS)
            )
            for line, row in rows:
                if len(row) != len(header):
                    raise InputError(
                        f"{path}, line {line}: {len(row)} cells, but there are {len(header)} columns {header}: "
                        f"{[cell[:40] for cell in row[:6]]}"
                    )
                yield f"line {line}", row[picture].strip(), row[caption]
    except UnicodeDecodeError as error:
        raise InputError(
            f"{path}, line {_undecodable(path)}: not in UTF-8 ({error.reason}); save it in UTF-8"
        ) from error
    except (OSError, csv.Error) as error:
        raise InputError(f"{path}: cannot be read as a {kind[1:].upper()} file ({error})") from error


def _undecodable(path: Path) -> int:
    """The first line that is not UTF-8; a decoder by blocks knows its place in the block only."""
    content = path.read_bytes()
    try:
        content.decode()
    except UnicodeDecodeError as error:
        return content.count(b"\n", 0, error.start) + 1
    return 1


def _csv_rows(file: Iterable[str]) -> Iterator[tuple[int, list[str]]]:
    reader = csv.reader(file, skipinitialspace=True, strict=True)  # a quote that is never closed is an error
    try:
        for row in reader:
            if row:
                yield reader.line_num, row
    except csv.Error as error:
        raise csv.Error(f"line {reader.line_num}: {error}") from error


def _tsv_rows(file: Iterable[str]) -> Iterator[tuple[int, list[str]]]:
    """Cells between tabs. A cell wholly in quotes loses them; a lone quote is a character of its caption."""
    for line, text in enumerate(file, 1):
        if text := text.rstrip("\r\n"):
            yield line, [_unquoted(cell) for cell in text.split("\t")]


def _unquoted(cell: str) -> str:
    inner = cell[1:-1]
    if len(cell) < 2 or cell[0] != '"' or cell[-1] != '"' or '"' in inner.replace('""', ""):
        return cell
    return inner.replace('""', '"')


def _column(path: Path, header: list[str], names: Sequence[str], in_file: bool) -> int:
    places = [i for i, name in enumerate(header) if name.strip() in names]
    if len(places) == 1:
        return places[0]
    shown = [name[:40] for name in header[:12]]
    wanted = " or ".join(names)
    if not in_file:
        raise InputError(f"data.columns is {shown}; expected one of them to be {wanted}, and no other")
    cure = "rename the others" if places else "correct it, or name the columns in data.columns if there is no header"
    if len(header) == 1 and "\t" in header[0]:
        cure = "it has tabs: name the file .tsv"
    raise InputError(f"{path}, line 1: the header is {shown}; expected one column {wanted}; {cure}")


__all__ = ["CAPTION_COLUMNS", "PICTURE_COLUMNS", "Captions", "read_captions"]
