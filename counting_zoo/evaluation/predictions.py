"""Files of predictions, and the submission file of the NWPU-Crowd benchmark."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path
from typing import Any

import cv2
import h5py
import lightning as L
import torch.distributed
from lightning.pytorch.utilities.rank_zero import rank_zero_info

from counting_zoo.errors import ImageError
from counting_zoo.io import replacing, write_table, write_whole
from counting_zoo.metrics.counts import SCHEMA
from counting_zoo.prediction import Prediction

COUNT_COLUMNS = (*SCHEMA, "points", "width", "height", "overlay", "density")


POINT_COLUMNS = ("image", "name", "x", "y")


BOX_COLUMNS = ("image", "name", "x1", "y1", "x2", "y2", "score")


ERROR_COLUMNS = ("image", "error")


_PARTS = ".parts"


class PartWriter:
    """Predictions of one process, on disk as they come, so that memory does not grow with the number of images.

    Args:
        folder: the folder of the predictions.
        rank: of this process.
        densities: whether to write density maps.
        max_images: how many to draw; ``None`` for all.
    """

    def __init__(self, folder: Path, rank: int, *, densities: bool, max_images: int | None) -> None:
        self._folder = folder / _PARTS / str(rank)
        shutil.rmtree(self._folder, ignore_errors=True)  # of a run that was killed
        self._folder.mkdir(parents=True)
        self._rank = rank
        self._rows = (self._folder / "rows.jsonl").open("w", encoding="utf-8")
        self._maps = _open_maps(self._folder / "densities.h5", "w") if densities else None
        self._max_images = max_images
        self._n = self._drawn = 0

    def add(self, prediction: Prediction) -> None:
        """Write one prediction; an image that came before is left as it is."""
        key = _key(prediction.image_id)
        drawn = False
        if self._max_images is None or self._drawn < self._max_images:
            self._drawn += 1
            drawn = True
            for k, name in enumerate(prediction.names):
                encoded = cv2.imencode(".jpg", cv2.cvtColor(prediction.overlay(name), cv2.COLOR_RGB2BGR))[1]
                (self._folder / f"{key}-{k}.jpg").write_bytes(encoded.tobytes())
        if self._maps is not None and key not in self._maps:
            for k in range(len(prediction.names)):
                self._maps.create_dataset(
                    f"{key}/{k}",
                    data=prediction.density[k].float().numpy(),
                    chunks=True,
                    compression="gzip",
                    compression_opts=1,
                    shuffle=True,
                    fletcher32=True,
                )
        row = {
            "image": prediction.image_id,
            "names": prediction.names,
            "counts": prediction.counts.tolist(),
            "interval": None if prediction.interval is None else prediction.interval.tolist(),
            "points": [points.tolist() for points in prediction.points],
            "boxes": None if prediction.boxes is None else [boxes.tolist() for boxes in prediction.boxes],
            "scores": None if prediction.scores is None else [scores.tolist() for scores in prediction.scores],
            "size": prediction.size,
            "extent": prediction.extent,
        }
        self._write(row | {"drawn": drawn, "mapped": self._maps is not None})

    def fail(self, image_id: str, reason: str) -> None:
        """Write down an image that could not be read."""
        self._write({"image": image_id, "error": reason})

    def close(self) -> None:
        """Finish the files of this part."""
        self._rows.close()
        if self._maps is not None:
            self._maps.close()

    def _write(self, row: dict[str, Any]) -> None:
        place = {"order": [self._n, self._rank], "part": self._rank}
        self._rows.write(json.dumps(row | place, ensure_ascii=False) + "\n")
        self._n += 1


@dataclass(frozen=True)
class Merged:
    """Numbers of images that were counted and that could not be read."""

    images: int
    errors: int


def merge_parts(folder: Path, n_parts: int, max_images: int | None) -> Merged:
    """Join the parts of all processes into the final files and remove them, one image in memory at a time.

    Args:
        folder: the folder of the predictions.
        n_parts: the number of processes.
        max_images: how many drawings stay, the first in the order in which the data was dealt out.
    """
    found = _find_rows(folder, n_parts)
    order = sorted(found)
    counted = [image for image in order if not found[image].failed]
    by_order = sorted(counted, key=lambda image: found[image].order)
    shown = {image for image in by_order[:max_images] if found[image].drawn}
    stems = _stems(counted)
    with ExitStack() as stack:
        files = [stack.enter_context(_part_file(folder, part, "rows.jsonl").open("rb")) for part in range(n_parts)]

        def rows(images: list[str]) -> Iterator[dict[str, Any]]:
            for image in images:
                file = files[found[image].order[1]]
                file.seek(found[image].place)
                yield json.loads(file.readline())

        for row in rows([image for image in counted if image in shown]):
            for k in range(len(row["names"])):
                (folder / "pictures").mkdir(exist_ok=True)
                drawing = _part_file(folder, row["part"], f"{_key(row['image'])}-{k}.jpg")
                os.replace(drawing, folder / _overlay(row, k, stems))
        if any(found[image].mapped for image in counted):
            _merge_densities(folder, n_parts, rows(counted), stems)
        write_table(
            folder / "points.csv",
            POINT_COLUMNS,
            (
                (row["image"], name, float(x), float(y))
                for row in rows(counted)
                for name, points in zip(row["names"], row["points"], strict=True)
                for x, y in points
            ),
        )
        boxed = [image for image in counted if found[image].boxed]
        if boxed:
            write_table(folder / "boxes.csv", BOX_COLUMNS, (line for row in rows(boxed) for line in _box_lines(row)))
        else:
            (folder / "boxes.csv").unlink(missing_ok=True)  # of an earlier run
        failed = [image for image in order if found[image].failed]
        write_table(folder / "errors.csv", ERROR_COLUMNS, ((row["image"], row["error"]) for row in rows(failed)))
        table = (line for row in rows(counted) for line in _count_lines(row, stems, row["image"] in shown))
        write_table(folder / "counts.csv", COUNT_COLUMNS, table)  # last: who sees it sees all files
    shutil.rmtree(folder / _PARTS)
    return Merged(len(counted), len(failed))


@dataclass(slots=True)
class _Place:
    """Position of an image's row in its part's file, and what must be known of all images at once."""

    order: tuple[int, int]  # number in its part, and the part
    place: int
    failed: bool
    drawn: bool
    mapped: bool
    boxed: bool


def _find_rows(folder: Path, n_parts: int) -> dict[str, _Place]:
    """Find the row of each image once; samplers may have dealt an image to two processes."""
    found: dict[str, _Place] = {}
    for part in range(n_parts):
        with _part_file(folder, part, "rows.jsonl").open("rb") as file:
            place = 0
            for line in file:
                row = json.loads(line)
                n, rank = row["order"]
                known = found.get(row["image"])
                if known is None or (n, rank) < known.order:
                    found[row["image"]] = _Place(
                        order=(n, rank),
                        place=place,
                        failed="error" in row,
                        drawn=row.get("drawn", False),
                        mapped=row.get("mapped", False),
                        boxed=row.get("boxes") is not None,
                    )
                place += len(line)
    return found


def _count_lines(row: dict[str, Any], stems: dict[str, str], shown: bool) -> Iterator[tuple[str | int | float, ...]]:
    """Yield the lines of an image in ``counts.csv``, one for each name."""
    image = row["image"]
    height, width = row["size"] or ("", "")
    bounds = row["interval"] or [("", "")] * len(row["names"])
    for k, (name, count, points) in enumerate(zip(row["names"], row["counts"], row["points"], strict=True)):
        overlay = _overlay(row, k, stems) if shown else ""
        density = f"{stems[image]}/{k}" if row["mapped"] else ""
        yield image, name, "", float(count), *bounds[k], len(points), width, height, overlay, density


def _box_lines(row: dict[str, Any]) -> Iterator[tuple[str | float, ...]]:
    """Yield the lines of an image in ``boxes.csv``, one for each box."""
    scores = row["scores"] or [[""] * len(boxes) for boxes in row["boxes"]]
    for name, boxes, own in zip(row["names"], row["boxes"], scores, strict=True):
        for box, score in zip(boxes, own, strict=True):
            yield row["image"], name, *map(float, box), score


def _overlay(row: dict[str, Any], k: int, stems: dict[str, str]) -> str:
    return f"pictures/{stems[row['image']]}{f'.{k}' if len(row['names']) > 1 else ''}.jpg"


def _merge_densities(folder: Path, n_parts: int, rows: Iterable[dict[str, Any]], stems: dict[str, str]) -> None:
    with ExitStack() as stack:
        parts = [stack.enter_context(_open_maps(_part_file(folder, n, "densities.h5"), "r")) for n in range(n_parts)]
        temporary = stack.enter_context(replacing(folder / "densities.h5"))
        file = stack.enter_context(_open_maps(temporary, "w"))
        for row in rows:
            group = file.create_group(stems[row["image"]])
            for k, name in enumerate(row["names"]):
                parts[row["part"]].copy(f"{_key(row['image'])}/{k}", group)
                group[str(k)].attrs.update({"image": row["image"], "name": name, "extent": row["extent"] or ()})


def _open_maps(path: Path, mode: str) -> h5py.File:
    """Open an HDF5 file with 1 MiB of metadata cache; the default of 32 takes up over 100."""
    file = h5py.File(path, mode)
    config = file.id.get_mdc_config()
    config.set_initial_size = True
    config.initial_size = config.min_size = config.max_size = 1 << 20
    file.id.set_mdc_config(config)
    return file


def _part_file(folder: Path, part: int, name: str) -> Path:
    return folder / _PARTS / str(part) / name


def _key(image_id: str) -> str:
    return blake2b(image_id.encode(), digest_size=8).hexdigest()


def _stems(image_ids: list[str]) -> dict[str, str]:
    """Make file names without suffix for images: readable, safe on every file system, and different from each other.

    Example:
        >>> _stems(["a b/c.jpg", "a b/C.jpg", "../x.png"])
        {'a b/c.jpg': 'a_b_c', 'a b/C.jpg': 'a_b_C-2', '../x.png': 'x'}
    """
    stems: dict[str, str] = {}
    taken: set[str] = set()
    for image_id in image_ids:
        bare = re.sub(r"\.\w{1,5}$", "", image_id)
        plain = re.sub(r"[^\w-]+", "_", bare).strip("_-")[-50:] or "picture"
        for stem in _numbered(plain):
            if stem.casefold() not in taken:
                break
        taken.add(stem.casefold())
        stems[image_id] = stem
    return stems


def _numbered(plain: str) -> Iterator[str]:
    yield plain
    n = 1
    while True:
        n += 1
        yield f"{plain}-{n}"


class NWPUSubmission(L.Callback):
    """Writes ``<id> <count>`` for every predicted image, by ascending id, to be uploaded to crowdbenchmark.com.

    On the command line: ``counting-zoo predict --config configs/data/nwpu_crowd.yaml --ckpt_path best.ckpt
    --trainer.callbacks+ counting_zoo.evaluation.predictions.NWPUSubmission``.

    Args:
        path: the file; replaced if it exists.

    Raises:
        ImageError: an image could not be read, and the server refuses a file without it; nothing is written.
    """

    def __init__(self, path: str = "nwpu_submission.txt") -> None:
        self.path = Path(path).expanduser()
        self._counts: dict[str, float] = {}
        self._failed: list[str] = []

    def on_predict_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._counts, self._failed = {}, []

    def on_predict_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        self._failed += [image_id for image_id, _ in batch.get("failed", [])]
        for prediction in outputs or []:
            self._counts[Path(prediction.image_id).stem] = float(prediction.counts.sum())

    def on_predict_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        parts = [(self._counts, self._failed)]
        if trainer.world_size > 1:
            parts *= trainer.world_size
            torch.distributed.all_gather_object(parts, (self._counts, self._failed))
        failed = sorted(name for _, names in parts for name in names)
        if failed:
            raise ImageError(
                f"{self.path} is not written: {len(failed)} images could not be read ({', '.join(failed[:5])}), and "
                "the benchmark needs a count for each; see errors.csv"
            )
        if trainer.is_global_zero:
            counts = {name: count for found, _ in parts for name, count in found.items()}
            order = sorted(counts, key=lambda name: (int(name) if name.isdigit() else 0, name))
            write_whole(self.path, "\n".join(f"{name} {counts[name]}" for name in order))
            rank_zero_info(f"{len(order)} counts for the NWPU-Crowd benchmark: see {self.path}")
