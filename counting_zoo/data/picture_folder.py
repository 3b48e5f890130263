"""One folder of pictures and whatever annotation lies in it."""

from __future__ import annotations

import logging
import os
import re
import unicodedata
from dataclasses import fields, replace
from pathlib import Path

from counting_zoo.data.annotation_files import Marks, read_marks, read_mat_points
from counting_zoo.data.checks import inside_root
from counting_zoo.data.dot_pictures import Dot, read_dots
from counting_zoo.errors import InputError
from counting_zoo.images import IMAGE_SUFFIXES, image_size

log = logging.getLogger(__name__)

ANNOTATION_FILES = (
    "points.csv",
    "points.json",
    "boxes.csv",
    "boxes.json",
    "annotations.json",
    "_annotations.coco.json",
    "counts.csv",
    "counts.json",
)


def list_pictures(folder: Path) -> list[str]:
    """Every picture below a folder, as sorted posix paths relative to it.

    Hidden files are passed over. Linked folders are not entered (they may form a circle) and links that lead out of
    the folder or nowhere are left out, both with a warning.

    Raises:
        InputError: the folder is not there.
    """
    if not folder.is_dir():
        raise InputError(f"{folder}: there is no such folder; expected one with pictures")
    top, names, links = folder.resolve(), [], []
    for parent, folders, files in os.walk(folder):
        folders[:] = [name for name in folders if not name.startswith(".")]
        links += [Path(parent, name) for name in folders if Path(parent, name).is_symlink()]
        for name in files:
            path = Path(parent, name)
            if name.startswith(".") or path.suffix.lower() not in IMAGE_SUFFIXES:
                continue
            if path.is_symlink() and not _leads_inside(path, top):
                links.append(path)
            else:
                names.append(path.relative_to(folder).as_posix())
    if links:
        shown = ", ".join(map(str, links[:5]))
        log.warning("%s: %d links are not followed: %s; copy what they point to, if needed", folder, len(links), shown)
    return sorted(names)


def _leads_inside(link: Path, top: Path) -> bool:
    try:
        target = link.resolve()
    except (OSError, RuntimeError):  # a circle of links
        return False
    return target.is_relative_to(top) and target.is_file()


def without_dots(names: list[str], picture: str | None, dots: str | None, *, keep_others: bool) -> list[str]:
    """The pictures to predict among the files of a folder; the patterns are those of :class:`PictureFolder`.

    Args:
        names: paths relative to the folder.
        picture: pattern of pictures.
        dots: pattern of dot pictures.
        keep_others: leave out only dot pictures whose picture is there too, not what fits no pattern.

    Example:
        >>> without_dots(["a.png", "a_dots.png", "b.jpg"], "{stem}.png", "{stem}_dots.png", keep_others=True)
        ['a.png', 'b.jpg']
    """
    pictures, dotted = _sorted_out(names, picture or "{stem}.*", dots)
    stems = set(pictures.values())
    return [name for name in names if dotted.get(name) not in stems] if keep_others else list(pictures)


class PictureFolder:
    """Pictures with the marks that files beside them hold.

    Args:
        folder: has the pictures in ``images/``, or itself.
        unnamed: the name of objects that carry none.
        annotation: the one annotation file, relative to ``folder``; all of the usual names if ``None``.
        picture: pattern of picture paths relative to ``folder``, with ``{stem}`` and any number of ``*``; all but the
            dot pictures if ``None``.
        dots: pattern of the dot picture that belongs to a ``{stem}``. A file that both patterns fit goes to the one
            with more text of its own.
        dot: what an object is in a dot picture, see :func:`~counting_zoo.data.dot_pictures.read_dots`.
        classes: the only names that a file of counts may have; any if ``None``.

    Raises:
        InputError: an annotation file is absent or cannot be understood, or a pattern is none or not one to one.
    """

    def __init__(
        self,
        folder: Path,
        *,
        unnamed: str,
        annotation: str | None = None,
        picture: str | None = None,
        dots: str | None = None,
        dot: Dot | None = None,
        classes: list[str] | None = None,
    ) -> None:
        self.folder = folder
        self.classes = classes
        self.dot = dot
        self.unnamed = unnamed
        self.images = folder / "images" if (folder / "images").is_dir() else folder
        listed = list_pictures(folder if picture or dots else self.images)
        if not picture and not dots and self.images != folder:
            listed = [f"images/{name}" for name in listed]
        self._known = {unicodedata.normalize("NFC", name): name for name in listed}
        self._dots: dict[str, str] = {}
        self._marks: dict[str, Marks] = {}
        self.n_large: dict[str, int] = {}
        """For each dot picture that was read, in how many of its blobs objects may touch."""
        self.has_files = False
        if picture or dots:
            listed = self._pair(listed, picture or "{stem}.*", dots)
        else:
            self._read_files(annotation)
        self.names: list[str] = sorted({*listed, *self._marks})
        """Every picture that is there or that an annotation names, relative to ``folder``."""

    def marks(self, name: str) -> Marks | None:
        """What the annotation says of a picture; ``None`` where it does not mention it.

        Raises:
            InputError: a dot picture or ``.mat`` file is absent or damaged.
        """
        if name in self._dots:
            points, size, self.n_large[name] = read_dots(self.folder / self._dots[name], self.dot)
            path = self.folder / name
            if path.is_file() and image_size(path) != size:
                raise InputError(
                    f"{self.folder / self._dots[name]}: {size[0]} x {size[1]} pixels (height x width), but {path} "
                    f"has {image_size(path)[0]} x {image_size(path)[1]}; expected the same"
                )
            return Marks(points=points, point_names=[self.unnamed] * len(points))
        if self.has_files:
            return self._marks.get(name)
        path = (self.folder / name).with_suffix(".mat")
        beside = [path, path.with_name(f"GT_{path.name}")]
        mat = next((candidate for candidate in beside if candidate.is_file()), None)
        if mat is None:
            raise InputError(
                f"{self.folder / name}: has no annotation; expected one of {', '.join(ANNOTATION_FILES)} in "
                f"{self.folder}, {path.name} beside the picture, or data.dots"
            )
        points = read_mat_points(mat)
        return Marks(points=points, point_names=[self.unnamed] * len(points))

    def find(self, name: str, source: str) -> str:
        """The path relative to ``folder`` of a picture that an annotation names.

        Args:
            name: relative to ``images/`` or to ``folder``, in any Unicode normal form.
            source: the file that names it, for messages.

        Raises:
            InputError: the name leads out of the folder.
        """
        inside_root(self.folder, name, source)
        plain = unicodedata.normalize("NFC", Path(name).as_posix())
        below = f"images/{plain}" if self.images != self.folder else plain
        path = inside_root(self.folder, below, source)
        return self._known.get(below) or self._known.get(plain) or path.relative_to(self.folder).as_posix()

    def all_names(self) -> list[str]:
        """Every name of an object, sorted."""
        names: set[str] = set()
        for marks in self._marks.values():
            names.update(marks.point_names, marks.box_names, marks.counts or {})
        return sorted(names) or [self.unnamed]

    def _read_files(self, annotation: str | None) -> None:
        if annotation is not None:
            paths = [self.folder / annotation]
            if not paths[0].is_file():
                raise InputError(f"{paths[0]}: there is no such file; correct data.annotation")
        else:
            paths = [self.folder / name for name in ANNOTATION_FILES if (self.folder / name).is_file()]
        self.has_files = bool(paths)
        for path in paths:
            own: set[str] = set()
            for given, marks in read_marks(path, self.unnamed, self.classes).items():
                name = self.find(given, str(path))
                if name in own:
                    raise InputError(f"{path}: {given!r} is a second spelling of {name!r}; expected one")
                own.add(name)
                self._marks[name] = _merged(self._marks.get(name, Marks()), marks, f"{path}: {given}")

    def _pair(self, listed: list[str], picture: str, dots: str | None) -> list[str]:
        """The pictures among the files; fills in which dot picture belongs to each."""
        stems, dotted = _sorted_out(listed, picture, dots)
        if dots is None:
            self._read_files(None)
            return list(stems)
        pictures = _by_stem(stems, self.folder, "data.picture")
        partners = _by_stem(dotted, self.folder, "data.dots")
        for stem in {**pictures, **partners}:
            # What lacks its other half is named all the same, so that it is missed and not passed over.
            name = pictures.get(stem) or picture.replace("{stem}", stem)
            self._dots[name] = partners.get(stem) or dots.replace("{stem}", stem)
        return list(self._dots)


def _sorted_out(names: list[str], picture: str, dots: str | None) -> tuple[dict[str, str], dict[str, str]]:
    """The stems of pictures, and those of dot pictures, by name."""
    pictures = _stems(names, picture, "data.picture")
    dotted = {} if dots is None else _stems(names, dots, "data.dots")
    for name in pictures.keys() & dotted.keys():
        del (pictures if len(dots or "") > len(picture) else dotted)[name]
    return pictures, dotted


def _stems(names: list[str], pattern: str, option: str) -> dict[str, str]:
    """The names that fit a pattern, each with what stands for ``{stem}`` in it."""
    if pattern.count("{stem}") != 1:
        raise InputError(f"{option} is {pattern!r}; expected one {{stem}} in it, such as '{{stem}}cell.png'")
    if pattern.startswith("/") or ".." in pattern.split("/"):
        raise InputError(
            f"{option} is {pattern!r}, which leads out of the folder; make data.root the folder that holds both, and "
            "begin both patterns there: picture 'images/{stem}.png' with dots 'dots/{stem}.png'"
        )
    escaped = re.escape(pattern).replace(re.escape("{stem}"), "(?P<stem>.+)").replace(re.escape("*"), "[^/]*")
    fits = re.compile(escaped).fullmatch
    return {name: match["stem"] for name in names if (match := fits(name))}


def _by_stem(stems: dict[str, str], folder: Path, option: str) -> dict[str, str]:
    found: dict[str, str] = {}
    for name, stem in stems.items():
        if stem in found:
            raise InputError(f"{folder / found[stem]} and {name} both fit {option}; expected one for {stem!r}")
        found[stem] = name
    return found


def _merged(first: Marks, second: Marks, where: str) -> Marks:
    """Both together; two files must not say the same thing."""
    changes = {}
    for item in fields(Marks):
        old, new = getattr(first, item.name), getattr(second, item.name)
        if item.name in ("points", "boxes", "counts") and old is not None and new is not None:
            raise InputError(f"{where}: a second file says its {item.name}; name the right one in data.annotation")
        changes[item.name] = old if new is None or (isinstance(new, list) and not new) else new
    return replace(first, **changes)


__all__ = ["ANNOTATION_FILES", "PictureFolder", "list_pictures", "without_dots"]
