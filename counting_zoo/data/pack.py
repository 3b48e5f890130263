"""Any data module as one HDF5 file: encoded images and annotation, guarded against bit rot.

Layout (schema 1); ``offset`` has one more row than there are items, item ``i`` lies in ``offset[i]:offset[i + 1]``::

    image/bytes  u1 (total,)     image/offset  i8 (I + 1,)       encoded images, each stored once
    class_names  u1                                              JSON {split: names} in UTF-8
    record/image i8 (R,)         record/split  i8 (R,)           index into image, and into the keys of class_names
    record/size  i8 (R, 2)       record/text, record/offset      height, width; JSON [id, classes, captions] in UTF-8
    points, boxes, exemplars, counts: values, offset, and known u1 (R,), 0 where a record has none
    points/labels, boxes/labels  i8                              index into the record's classes

Every dataset is chunked with a Fletcher-32 checksum, without which HDF5 hands out damaged bytes silently. Strings are
flat bytes, because the checksum does not reach HDF5's own variable-length strings.
"""

from __future__ import annotations

import hashlib
import json
import os
import warnings
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import h5py
import numpy as np

from counting_zoo.data.base import CountingDataModule
from counting_zoo.data.checks import fingerprint
from counting_zoo.data.records import Record, Split, without_annotation
from counting_zoo.errors import ImageError, InputError, check, listed
from counting_zoo.images import decode_image
from counting_zoo.io import progress, replacing, sha256

SCHEMA = 1


CHUNK_BYTES = 1 << 16  # what is read, and checked, to get at one image


BLOCK_BYTES = 1 << 22  # what is written or read at once where all of it is


# What a record may have: its fields, the columns of its values, and the field with their labels.
_PARTS: dict[str, tuple[int, str | None]] = {
    "points": (2, "labels"),
    "boxes": (4, "box_labels"),
    "exemplars": (4, None),
    "counts": (0, None),
}


def pack(
    datamodule: CountingDataModule,
    path: str | Path,
    splits: Sequence[Split] = ("train", "val", "test"),
    broken: Literal["error", "skip"] = "error",
) -> Path:
    """Write images and checked annotation of a data module into one HDF5 file.

    The file is written beside its final place, read back and compared, and only then renamed, so that an interrupted
    run leaves an older file as it was. Images are stored as they are encoded, byte for byte.

    Args:
        datamodule: what to pack; its options on outside points and missing files are applied.
        path: the file; an existing one is replaced.
        splits: which splits to pack.
        broken: an image that cannot be decoded is an ``error``, or left out (``skip``) with a warning. One without
            a readable header is an error in any case, already when its split is read.

    Returns:
        The path of the file.

    Raises:
        ImageError: an image cannot be decoded and ``broken`` is ``error``; names it.
        InputError: a split cannot be read, or two different images have one id.
    """
    check("broken", broken, one_of=("error", "skip"))
    if not splits:
        raise InputError("splits is empty; expected at least one of 'train', 'val', 'test', 'predict'")
    records = [(split, record) for split in splits for record in datamodule.records(split)]
    path = Path(path).expanduser()
    with replacing(path) as temporary:
        with h5py.File(temporary, "w") as file:
            packed, digest = _write_images(file, datamodule, records, broken)
            if not packed:
                raise InputError(f"no image of {', '.join(splits)} can be decoded; nothing to pack")
            _write_records(file, packed, list(splits))
            names = {split: datamodule.class_names(split) for split in splits}
            _dataset(file, "class_names", np.frombuffer(json.dumps(names).encode(), np.uint8))
            file.attrs.update(
                schema=SCHEMA,
                source=f"{type(datamodule).__name__}({str(datamodule.root)!r})",
                pictures=len(packed),
                image_sha256=digest,
                annotation_sha256=fingerprint(item.record for item in packed)["sha256"],
                protocol=json.dumps(dict(datamodule.hparams), default=str),
            )
        _verify(temporary, digest)
    return path


@dataclass(frozen=True)
class _Packed:
    split: str
    record: Record
    image: int  # row of image/offset


def _write_images(
    file: h5py.File, data: CountingDataModule, records: list[tuple[Split, Record]], broken: str
) -> tuple[list[_Packed], str]:
    """Append every image once; returns what was kept and the hash of all bytes."""
    flat = file.create_dataset("image/bytes", (0,), "u1", maxshape=(None,), chunks=(CHUNK_BYTES,), fletcher32=True)
    digest = hashlib.sha256()
    buffer = bytearray()
    offsets = [0]
    known: dict[str, tuple[int, str]] = {}  # image id -> row and hash
    packed: list[_Packed] = []
    failed: list[str] = []

    def flush(least: int) -> None:
        if len(buffer) >= least:
            flat.resize(flat.shape[0] + len(buffer), axis=0)
            flat[-len(buffer) :] = np.frombuffer(bytes(buffer), np.uint8)
            buffer.clear()

    for split, record in progress(records, len(records), "packing images"):
        try:
            encoded = data.read_verified(record)
            decode_image(encoded, record.image_id)
        except (ImageError, OSError) as error:
            if broken == "error":
                raise ImageError(
                    f"{record.image_id}: cannot be packed ({error}); replace the image, or pack with broken=skip"
                ) from error
            failed.append(f"{record.image_id} ({error})")
            continue
        image_hash = sha256(encoded)
        if record.image_id in known:
            row, other = known[record.image_id]
            if image_hash != other:
                raise InputError(f"two different images have the id {record.image_id!r}; expected unique ids")
        else:
            row = len(known)
            known[record.image_id] = (row, image_hash)
            digest.update(encoded)
            buffer += encoded
            offsets.append(offsets[-1] + len(encoded))
            flush(BLOCK_BYTES)
        packed.append(_Packed(split, record, row))
    flush(1)
    _dataset(file, "image/offset", np.array(offsets, np.int64))
    if failed:
        warnings.warn(
            f"{len(failed)} images cannot be decoded and were left out: {listed(failed, 5)}",
            stacklevel=3,
        )
    return packed, digest.hexdigest()


def _write_records(file: h5py.File, packed: list[_Packed], splits: list[str]) -> None:
    records = [item.record for item in packed]
    _dataset(file, "record/image", np.array([item.image for item in packed], np.int64))
    _dataset(file, "record/split", np.array([splits.index(item.split) for item in packed], np.int64))
    _dataset(file, "record/size", np.array([record.size or (-1, -1) for record in records], np.int64))
    texts = [json.dumps([r.image_id, r.classes, r.captions], ensure_ascii=False).encode() for r in records]
    _dataset(file, "record/text", np.frombuffer(b"".join(texts), np.uint8))
    _dataset(file, "record/offset", _offsets(texts))
    for part, (columns, labels) in _PARTS.items():
        given = [getattr(record, part) for record in records]
        shape = (0, columns) if columns else (0,)
        values = [np.zeros(shape, np.float32) if value is None else value for value in given]
        _dataset(file, f"{part}/values", np.concatenate(values).astype(np.float32))
        _dataset(file, f"{part}/offset", _offsets(values))
        _dataset(file, f"{part}/known", np.array([value is not None for value in given], np.uint8))
        if labels is not None:
            indices = [getattr(record, labels) for record in records]
            rows = [np.zeros(0, np.int64) if value is None else value for value in indices]
            _dataset(file, f"{part}/labels", np.concatenate(rows).astype(np.int64))


def _dataset(file: h5py.File, name: str, values: np.ndarray) -> None:
    rows = max(1, min(len(values), CHUNK_BYTES // max(values.itemsize * int(np.prod(values.shape[1:])), 1)))
    maxshape = (None, *values.shape[1:])  # HDF5 wants it for an empty dataset in chunks
    file.create_dataset(name, data=values, maxshape=maxshape, chunks=(rows, *values.shape[1:]), fletcher32=True)


def _offsets(items: Iterable[Any]) -> np.ndarray:
    return np.cumsum([0, *(len(item) for item in items)], dtype=np.int64)


def _verify(path: Path, digest: str) -> None:
    """Read the finished file back: annotation against its hash, images against what was written."""
    with _explained(path), h5py.File(path, "r") as file:
        _read_records(file, path)
        flat = file["image/bytes"]
        stored = hashlib.sha256()
        for start in range(0, flat.shape[0], BLOCK_BYTES):
            stored.update(flat[start : start + BLOCK_BYTES].tobytes())
    if stored.hexdigest() != digest:
        raise InputError(f"{path}: reads back other bytes than were written; check the disk")


class PackedCounts(CountingDataModule):
    """A file of :func:`pack` as a data module that gives the same batches as the one that was packed.

    The file is opened in each loader process on its first image.

    Args:
        root: the HDF5 file.
        kwargs: as in :class:`~counting_zoo.data.base.CountingDataModule`.

    Raises:
        InputError: the file is missing, damaged, or of another schema (raised when the annotation is read).
    """

    def __init__(self, root: str | Path, **kwargs: Any) -> None:
        super().__init__(root, **kwargs)
        self._contents: _Contents | None = None
        self._opened: tuple[int, h5py.File] | None = None

    def read_split(self, split: Split) -> list[Record]:
        """Return the records of a split; without a ``predict`` split, that is ``test`` without its annotation."""
        contents = self._read()
        if split == "predict" and split not in contents.records:
            bare = [without_annotation(record) for record in self._split("test")]
            return [replace(record, classes=[]) for record in bare] if self.classes is not None else bare
        return self._split(split)

    def annotated_names(self, split: Split) -> list[str]:
        """List the class names of the packed data module's split."""
        names = self._read().class_names
        if split == "predict" and split not in names:
            split = "test"
        return list(names[split]) if split in names else super().annotated_names(split)

    def read_bytes(self, record: Record) -> bytes:
        """Read the encoded image, byte for byte as it was packed.

        Raises:
            ImageError: its bytes are damaged.
        """
        contents = self._read()
        row = contents.rows[record.image_id]
        try:
            with _explained(self._file):
                return self._handle()["image/bytes"][contents.offsets[row] : contents.offsets[row + 1]].tobytes()
        except InputError as error:
            raise ImageError(f"{record.image_id}: {error}") from error

    def __getstate__(self) -> dict[str, Any]:
        """Without the open file, which no other process could use."""
        return {**self.__dict__, "_opened": None}

    @property
    def _file(self) -> Path:
        assert self.root is not None  # a required argument
        return self.root

    def _handle(self) -> h5py.File:
        """Return this process's own handle; one inherited from a parent is left alone."""
        if self._opened is None or self._opened[0] != os.getpid():
            self._opened = (os.getpid(), h5py.File(self._file, "r", locking=False))
        return self._opened[1]

    def _split(self, split: str) -> list[Record]:
        records = self._read().records
        if split not in records:
            raise InputError(f"{self._file} has no {split!r} split, only {sorted(records)}; pack again with it")
        return records[split]

    def _read(self) -> _Contents:
        if self._contents is None:
            if not self._file.is_file():
                raise InputError(f"data.root is {str(self._file)!r}, which is no file; expected one made by 'pack'")
            with _explained(self._file), h5py.File(self._file, "r", locking=False) as file:
                self._contents = _read_records(file, self._file)
            if self._contents.protocol:
                self.save_hyperparameters(self._contents.protocol)  # results keep it, as those of the data packed
        return self._contents


@dataclass(frozen=True)
class _Contents:
    records: dict[str, list[Record]]  # by split
    class_names: dict[str, list[str]]  # by split
    rows: dict[str, int]  # image id -> row of offsets
    offsets: np.ndarray  # (I + 1,) int64
    protocol: dict[str, Any]  # by which the data was read, such as whether VOC's difficult objects count


@contextmanager
def _explained(path: Path) -> Iterator[None]:
    """Turn whatever HDF5 says of a damaged file into one error."""
    try:
        yield
    except InputError:
        raise
    except (OSError, RuntimeError, LookupError, ValueError, TypeError, ArithmeticError, MemoryError) as error:
        raise InputError(
            f"{path}: damaged or no pack ({type(error).__name__}: {error}); restore the file or pack the data again"
        ) from error


def _read_records(file: h5py.File, path: Path) -> _Contents:
    """Read all annotation, checked against its hash."""
    schema = file.attrs.get("schema")
    if schema != SCHEMA:
        raise InputError(f"{path}: pack schema is {schema}; expected {SCHEMA}: pack the data again with this version")
    class_names = json.loads(file["class_names"][:].tobytes())
    splits = list(class_names)
    images, codes, sizes = (file[f"record/{name}"][:] for name in ("image", "split", "size"))
    texts, ends = file["record/text"][:].tobytes(), file["record/offset"][:]
    parts = {part: _read_part(file, part, labels) for part, (_, labels) in _PARTS.items()}
    records: dict[str, list[Record]] = {split: [] for split in splits}
    every: list[Record] = []
    rows: dict[str, int] = {}
    for i, code in enumerate(codes.tolist()):
        image_id, classes, captions = json.loads(texts[ends[i] : ends[i + 1]])
        values: dict[str, Any] = {name: arrays[i] for part in parts.values() for name, arrays in part.items()}
        size = None if sizes[i, 0] < 0 else (int(sizes[i, 0]), int(sizes[i, 1]))
        record = Record(image_id, classes=classes, captions=captions, size=size, **values)
        every.append(record)
        records[splits[code]].append(record)
        rows[image_id] = int(images[i])
    if fingerprint(every)["sha256"] != file.attrs["annotation_sha256"]:
        raise InputError(f"{path}: the annotation differs from its checksum; restore the file or pack the data again")
    return _Contents(records, class_names, rows, file["image/offset"][:], json.loads(file.attrs.get("protocol", "{}")))


def _read_part(file: h5py.File, part: str, labels: str | None) -> dict[str, list[np.ndarray | None]]:
    """Read the values, and labels where there are any, of one kind of annotation: one entry a record."""
    inner = file[f"{part}/offset"][1:-1]
    known = file[f"{part}/known"][:]
    names = {part: "values"} | ({labels: "labels"} if labels is not None else {})
    arrays = {}
    for name, stored in names.items():
        rows = np.split(file[f"{part}/{stored}"][:], inner)
        arrays[name] = [row.copy() if there else None for row, there in zip(rows, known, strict=True)]
    return arrays
