"""Finished work on disk, a line of JSON for each picture, so that an interruption loses one picture at most."""

from __future__ import annotations

import hashlib
import json
from collections.abc import ItemsView
from pathlib import Path
from typing import Any, Self, TextIO

from counting_zoo.data.base import CountingDataModule
from counting_zoo.data.records import Record
from counting_zoo.errors import InputError


class FinishedPictures:
    """What is known of each picture, by id; used as a context.

    Args:
        path: the file, which is read first and then added to; a line that an interruption left half written is no
            picture. ``None`` keeps everything in memory only.

    Example:
        >>> with FinishedPictures(None) as finished:
        ...     finished.add("a.jpg", {"count": 3})
        ...     "a.jpg" in finished, finished["a.jpg"]
        (True, {'count': 3})
    """

    def __init__(self, path: Path | None) -> None:
        self.path = path
        self._file: TextIO | None = None
        self._found: dict[str, dict[str, Any]] = {}
        if path is None or not path.is_file():
            return
        for line in path.read_text(encoding="utf-8", errors="replace").split("\n"):
            try:
                image_id, content = json.loads(line)
            except (ValueError, TypeError):
                continue
            self._found[image_id] = content

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
        return image_id in self._found

    def __getitem__(self, image_id: str) -> dict[str, Any]:
        return self._found[image_id]

    def items(self) -> ItemsView[str, dict[str, Any]]:
        """Ids and what is known, in the order in which they were finished."""
        return self._found.items()

    def add(self, image_id: str, content: dict[str, Any]) -> None:
        """Keep what is known of a picture; the same as it will be read again."""
        line = json.dumps([image_id, content], allow_nan=False)  # in ASCII, as ids may hold separators of lines
        self._found[image_id] = json.loads(line)[1]
        if self._file is not None:
            self._file.write(line + "\n")
            self._file.flush()


def picture_key(datamodule: CountingDataModule, record: Record) -> str:
    """What finished work on a picture is kept under: its id, and a hash of its file as evaluation reads it.

    The annotation does not tell a picture from another one of the same name: the same pictures with noise, say, or a
    file that was replaced.
    """
    try:
        content = datamodule.read_verified(record)
    except (InputError, OSError):
        content = b""  # whoever opens the picture says what is wrong with it
    return f"{hashlib.sha256(content).hexdigest()[:16]} {record.image_id}"


__all__ = ["FinishedPictures", "picture_key"]
