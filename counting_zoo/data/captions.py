"""Pictures with captions and nothing else: what region-text pretraining learns from."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any, ClassVar, Literal

from counting_zoo.data.base import CountingDataModule
from counting_zoo.data.caption_files import Captions, read_captions
from counting_zoo.data.checks import inside_root
from counting_zoo.data.picture_folder import list_pictures
from counting_zoo.data.records import Record, Split
from counting_zoo.data.splits import SPLITS, check_choice, draw
from counting_zoo.errors import InputError


class CaptionedPictures(CountingDataModule):
    """Pictures with any number of captions each, from COCO's JSON, CSV or TSV.

    - **JSON** in the layout of COCO's ``captions_train2017.json``: ``images`` (``id``, ``file_name``) and
      ``annotations`` (``image_id``, ``caption``). Chen et al., "Microsoft COCO Captions", arXiv 1504.00325.
    - **CSV and TSV** with a row for each caption: the columns ``image``, ``filepath`` or ``file``, and ``caption`` or
      ``title``; others are ignored. A table without a header, such as Conceptual Captions' (a caption, a tab, a path),
      needs ``columns``: ``[caption, image]``. In a TSV quotes count only around a whole cell.

    There are no names, points or counts, so no counter trains or is tested on this data; all of them predict on it.
    An augmentation may crop: a caption stays what it is, as CLIP's own training has it.

    Args:
        root: the folder that the files of captions and the pictures lie in.
        captions: the file of each split below ``root``, or one file, which is that of ``train``.
        pictures: the folder below ``root`` that the names of the pictures start from, one for all splits or each its
            own; ``root`` itself by default.
        columns: names of the columns of tables without a header.
        sizes: numbers of pictures (below 1: fractions) to draw for splits from the file of ``train``, which keeps the
            rest where ``sizes`` does not name it.
        split_seed: seeds the draw.
        empty: a picture without a caption that is not empty is an ``error``, or ``skip``ped and reported.
        predict_root: a folder or picture to predict; the pictures of ``test`` if ``None``.
        options: those of :class:`CountingDataModule`.

    Raises:
        InputError: an option is none of its choices, or two options say what one split is.
    """

    layout: ClassVar[str] = """\
  root/
    annotations/captions_train2017.json, captions_val2017.json   or captions.csv, captions.tsv (data.captions)
    train2017/000000000009.jpg ..., val2017/...                   (data.pictures)"""

    def __init__(
        self,
        root: str | Path,
        *,
        captions: dict[str, str] | str = "captions.csv",
        pictures: dict[str, str] | str = ".",
        columns: list[str] | None = None,
        sizes: dict[str, float] | None = None,
        split_seed: int = 0,
        empty: Literal["error", "skip"] = "error",
        predict_root: str | Path | None = None,
        **options: Any,
    ) -> None:
        super().__init__(root, **options)
        check_choice("empty", empty, ("error", "skip"))
        self.captions = {"train": captions} if isinstance(captions, str) else captions
        self.pictures = dict.fromkeys(SPLITS, pictures) if isinstance(pictures, str) else pictures
        for option, given in (("captions", self.captions), ("pictures", self.pictures), ("sizes", sizes or {})):
            if unknown := [name for name in given if name not in SPLITS]:
                raise InputError(f"data.{option} names the splits {unknown}; expected train, val and test only")
        if both := [name for name in sizes or {} if name in self.captions and name != "train"]:
            raise InputError(f"data.captions and data.sizes both say what {both} is; leave it out of one of them")
        if unplaced := [name for name in self.captions if name not in self.pictures]:
            raise InputError(f"data.pictures does not say where those of {unplaced} are; add a folder for each")
        self.columns = columns
        self.sizes = sizes
        self.split_seed = split_seed
        self.empty = empty
        self.predict_root = None if predict_root is None else Path(predict_root).expanduser()
        self._files: dict[str, tuple[Captions, list[str]]] = {}

    def read_split(self, split: Split) -> list[Record]:
        """Every picture of a split with its captions; ``predict`` takes ``predict_root``, or the test split."""
        if split == "predict":
            if self.predict_root is not None:
                return _pictures_of(self.predict_root)
            split = "test"
        root = self.find_root()
        source, names = self._members(root, split)
        found, _ = self._file(root, source)
        folder = self.pictures[source]
        records = []
        for name in names:
            path = inside_root(root, Path(folder, name), f"{found.path}, {found.places[name]}")
            records.append(Record(path.relative_to(root).as_posix(), path, captions=list(found.texts[name])))
        return records

    def _members(self, root: Path, split: str) -> tuple[str, list[str]]:
        """The split whose file names the pictures of a split, and which of them these are."""
        drawn = self.sizes or {}
        if split in self.captions and (split != "train" or not drawn):
            return split, self._file(root, split)[1]
        if "train" not in self.captions or (split != "train" and split not in drawn):
            raise InputError(
                f"CaptionedPictures: nothing says which pictures are {split} (data.captions has "
                f"{sorted(self.captions)}, data.sizes {sorted(drawn)}); name its file in data.captions, such as "
                f"{{{split}: captions_{split}.json}}, or draw it from train by data.sizes, such as {{{split}: 0.1}}"
                + ("; to predict other pictures set data.predict_root" if split == "test" else "")
            )
        names = self._file(root, "train")[1]
        dealt = draw(names, drawn, self.split_seed)
        taken = {name for found in dealt.values() for name in found}
        return "train", dealt[split] if split in dealt else [name for name in names if name not in taken]

    def _file(self, root: Path, split: str) -> tuple[Captions, list[str]]:
        """What the file of a split says, and its pictures that have captions; read once."""
        name = self.captions[split]
        if name not in self._files:
            found = read_captions(inside_root(root, name, "data.captions"), self.columns)
            bare = [picture for picture, texts in found.texts.items() if not texts]
            if bare:
                shown = ", ".join(f"{picture} ({found.places[picture]})" for picture in bare[:5])
                message = f"{found.path}: {len(bare)} of {len(found.texts)} pictures have no caption: {shown}"
                if self.empty == "error":
                    raise InputError(f"{message}. Give them one, or set data.empty to 'skip'")
                warnings.warn(f"{message}; skipped (data.empty=skip)", stacklevel=2)
            self._files[name] = found, [picture for picture, texts in found.texts.items() if texts]
        return self._files[name]


def _pictures_of(place: Path) -> list[Record]:
    if place.is_file():
        return [Record(place.name, place)]
    return [Record(name, place / name) for name in list_pictures(place)]


__all__ = ["CaptionedPictures"]
