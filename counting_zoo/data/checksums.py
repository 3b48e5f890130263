"""Checksums of picture files: the only way to notice flipped bytes, which decode without complaint."""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Iterable
from pathlib import Path

from counting_zoo.data.records import Record
from counting_zoo.errors import ImageError, InputError

_LINE = re.compile(r"([0-9a-fA-F]{64}) [ *](.+)")  # a star says that the file was read as binary


class Checksums:
    """The SHA-256 of every picture, from a file as ``sha256sum`` writes it: ``<64 hex digits>  <path>``.

    Paths are relative to the file's folder, so that ``sha256sum --check`` run there agrees with what is done here.

    Args:
        path: the file.

    Raises:
        InputError: it is not there, or a line is of another form.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._known: dict[str, str] = {}
        try:
            text = path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise InputError(
                f"data.checksums: {path} cannot be read ({error}); expected a file as sha256sum writes it"
            ) from None
        for number, line in enumerate(text.splitlines(), start=1):
            if not line:
                continue
            match = _LINE.fullmatch(line)
            if match is None:
                raise InputError(f"{path}, line {number}: {line[:100]!r}; expected a SHA-256, two spaces and a path")
            self._known[os.path.normpath(match[2])] = match[1].lower()

    def check_listed(self, records: Iterable[Record]) -> None:
        """Make sure, before a picture is read, that each can be verified.

        Raises:
            InputError: a picture is not listed.
        """
        absent = [record.image_id for record in records if self._name(record) not in self._known]
        if absent:
            raise InputError(
                f"{self.path}: does not list {len(absent)} pictures: {absent[:5]} (it lists {len(self._known)} files); "
                "add them with sha256sum in the file's folder, or leave data.checksums out"
            )

    def verify(self, record: Record, data: bytes) -> None:
        """Compare a picture's bytes, as they were read, with its checksum.

        Raises:
            ImageError: they differ.
        """
        expected, found = self._known[self._name(record)], hashlib.sha256(data).hexdigest()
        if found != expected:
            raise ImageError(
                f"{record.path}: its SHA-256 is {found}, but {self.path} says {expected}; copy the picture again, or "
                "correct the list if the picture was changed on purpose"
            )

    def _name(self, record: Record) -> str:
        """The picture's path as the file lists it; nothing listed where the picture is no file."""
        return "" if record.path is None else os.path.relpath(record.path, self.path.parent)


def write_checksums(path: Path, pictures: Iterable[Path]) -> None:
    """Write the checksums of pictures below the folder of ``path``, for ``sha256sum --check`` and ``data.checksums``.

    Args:
        path: the file to write.
        pictures: in the order they are listed in.
    """
    lines = [
        f"{hashlib.sha256(picture.read_bytes()).hexdigest()}  {picture.relative_to(path.parent).as_posix()}\n"
        for picture in pictures
    ]
    path.write_text("".join(lines), encoding="utf-8", newline="\n")


__all__ = ["Checksums", "write_checksums"]
