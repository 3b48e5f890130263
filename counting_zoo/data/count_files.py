"""Image-level counts from tables and JSON: how many of each class a picture has, and nothing else."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from counting_zoo.errors import InputError

Row = tuple[str, str, Mapping[str, Any]]
"""Where it stands (for messages), the picture, and counts by class as they are written."""


def checked_counts(rows: Iterable[Row], classes: Sequence[str] | None = None) -> dict[str, dict[str, float]]:
    """Counts by picture and class.

    Args:
        rows: any number for each picture, with different classes.
        classes: the only ones allowed; any if ``None``.

    Raises:
        InputError: a count is no whole number of at least 0, is there twice, or has another class; names the row.

    Example:
        >>> checked_counts([("line 2", "a.png", {"cat": "2"}), ("line 3", "a.png", {"dog": 0})])
        {'a.png': {'cat': 2.0, 'dog': 0.0}}
    """
    found: dict[str, dict[str, float]] = {}
    for where, picture, counts in rows:
        own = found.setdefault(picture, {})
        for name, value in counts.items():
            if classes is not None and name not in classes:
                raise InputError(
                    f"{where}: counts {name!r}, which data.classes does not list ({', '.join(classes)}); correct the "
                    "name, add it to data.classes, or leave it out of the file"
                )
            if name in own:
                raise InputError(f"{where}: a second count of {name!r} for {picture}; expected one")
            number = _number(value)
            if not (number >= 0 and number.is_integer()):
                raise InputError(
                    f"{where}: count is {str(value).strip() or 'empty'} for {name!r}; expected a whole number of at "
                    "least 0, which says how many there are in the picture; correct it, or leave the picture out if "
                    "nobody knows"
                )
            own[name] = number
    return found


def is_count_json(content: Any) -> bool:
    """Whether JSON content is one of the forms of counts, and not of points.

    Example:
        >>> is_count_json({"a.png": {"cat": 2}}), is_count_json({"a.png": {"cat": [[1, 2]]}})
        (True, False)
    """
    if isinstance(content, list):
        return bool(content) and all(isinstance(row, dict) for row in content)
    if not isinstance(content, dict):
        return False
    values = (v for found in content.values() for v in (found.values() if isinstance(found, dict) else (found,)))
    return any(isinstance(value, bool) or not math.isnan(_number(value)) for value in values)


def json_rows(content: Any, source: str, unnamed: str) -> Iterator[Row]:
    """The rows of ``{"a.png": {"cat": 2}}``, of ``{"a.png": 2}``, or of a list of objects.

    The objects of a list have ``image`` and either ``label`` and ``count`` or a field for each class.

    Args:
        content: of the file.
        source: the file, for messages.
        unnamed: the name of objects that carry none.

    Raises:
        InputError: an object of a list names no picture.
    """
    if isinstance(content, dict):
        for picture, found in content.items():
            yield f"{source}: {picture}", picture, found if isinstance(found, dict) else {unnamed: found}
        return
    for i, row in enumerate(content):
        where = f"{source}: row {i}"
        if not isinstance(row.get("image"), str):
            raise InputError(f"{where} is {row!r:.100}; expected image, label and count, or image and a count by class")
        others = {name: value for name, value in row.items() if name != "image"}
        yield where, row["image"], {str(row.get("label", unnamed)): row["count"]} if "count" in row else others


def _number(value: Any) -> float:
    """NaN for what is no number."""
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        return math.nan
    try:
        return float(value)
    except (ValueError, OverflowError):
        return math.nan


__all__ = ["Row", "checked_counts", "is_count_json", "json_rows"]
