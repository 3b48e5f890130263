"""From a record to a sample, and from samples to a :class:`~counting_zoo.types.Batch`."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterator, Sequence, Sized
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset, DistributedSampler

from counting_zoo.data.checks import check_inside
from counting_zoo.data.records import Record, Sample, ask, croppable, present_names
from counting_zoo.data.transforms import Augmentation
from counting_zoo.errors import ImageError, InputError
from counting_zoo.geometry import Preprocess, scale_boxes, scale_points
from counting_zoo.images import decode_image
from counting_zoo.types import Batch, Query


class TrainingSampler(DistributedSampler):
    """Yields ``(index, seed)`` pairs: a shuffled index and the seed of everything random done to that sample.

    Both are functions of ``(seed, epoch)`` alone, so an epoch is the same with any number of workers and after a
    restart. (albumentations 2.0.8 repeats its crops in every worker; here no worker draws anything of its own.)

    Args:
        data: anything with a length.
        seed: the run's seed.
        rank, world_size: this process and how many there are; all ranks get equally many samples.

    Attributes:
        start: samples of this rank that the epoch begins behind, where a run is taken up again inside it.
    """

    def __init__(self, data: Sized, *, seed: int, rank: int = 0, world_size: int = 1) -> None:
        super().__init__(data, num_replicas=world_size, rank=rank, shuffle=True, seed=seed)  # type: ignore[arg-type]
        self.start = 0

    def set_epoch(self, epoch: int) -> None:
        self.start = self.start if epoch == self.epoch else 0
        super().set_epoch(epoch)

    def __iter__(self) -> Iterator[tuple[int, int]]:  # type: ignore[override]
        rng = np.random.default_rng([self.seed, self.epoch])
        order = np.resize(rng.permutation(len(self.dataset)), self.total_size)  # type: ignore[arg-type]
        seeds = rng.integers(2**31 - 1, size=self.total_size)
        mine = slice(self.rank, self.total_size, self.num_replicas)
        return iter(list(zip(order[mine].tolist(), seeds[mine].tolist(), strict=True))[self.start :])


class EvaluationSampler(DistributedSampler):
    """Deals every index to exactly one rank.

    Two cases would leave ranks with unequal numbers of collective calls, and hang: fewer samples than ranks, and
    validation inside ``fit``, where DDP broadcasts buffers in every forward (``even=True``). There the last ranks
    repeat an index, and metrics and writers, which are keyed by image id, count it once.
    """

    def __init__(self, data: Sized, *, rank: int = 0, world_size: int = 1, even: bool = False) -> None:
        super().__init__(data, num_replicas=world_size, rank=rank, shuffle=False)  # type: ignore[arg-type]
        n = len(data)
        total = self.total_size if even or n < world_size else n
        self.indices = [i % n for i in range(rank, total, world_size)] if n else []

    def __iter__(self) -> Iterator[int]:  # type: ignore[override]
        return iter(self.indices)

    def __len__(self) -> int:
        return len(self.indices)


ChooseNames = Callable[[Record, np.random.Generator | None], list[str]]


class CountingDataset(Dataset):
    """Decodes, resizes as the model asks, augments (training only) and relabels to the names asked about.

    Args:
        records: the annotation.
        read_bytes: gives the encoded image of a record.
        choose_names: which names to ask about; gets a generator in training, ``None`` in evaluation.
        preprocess: the model's geometry.
        augmentation: training only; ``None`` in evaluation. Of each image it takes ``augmentation.crops`` samples.
        outside: what happens to points outside the image: ``error``, ``clamp`` or ``drop``.
        tolerate: predict only: an unreadable image becomes an item with ``failed`` instead of an error.
    """

    def __init__(
        self,
        records: Sequence[Record],
        read_bytes: Callable[[Record], bytes],
        choose_names: ChooseNames,
        *,
        preprocess: Preprocess,
        augmentation: Augmentation | None = None,
        training: bool = False,
        outside: str = "error",
        tolerate: bool = False,
    ) -> None:
        self.records = records
        self.read_bytes = read_bytes
        self.choose_names = choose_names
        self.preprocess = preprocess
        self.augmentation = augmentation
        self.training = training
        self.outside = outside
        self.tolerate = tolerate

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, key: int | tuple[int, int]) -> dict[str, Any] | list[dict[str, Any]]:
        """The item of an image, or the list of its items where the augmentation takes several crops of it.

        Args:
            key: the index, or what :class:`~counting_zoo.data.dataset.TrainingSampler` yields: index and seed.
        """
        index, seed = key if isinstance(key, tuple) else (key, None)
        record = self.records[index]
        try:
            items = self._items(record, seed)
        except (ImageError, OSError) as error:
            if not self.tolerate:
                raise
            return {"failed": (record.image_id, f"{type(error).__name__}: {error}")}
        return items[0] if len(items) == 1 else items

    def _items(self, record: Record, seed: int | None) -> list[dict[str, Any]]:
        if self.training and seed is None:
            # Indexed by hand, without the sampler: a function of the image, so still reproducible.
            seed = zlib.crc32(record.image_id.encode())
        rng = np.random.default_rng(seed) if self.training else None
        image = decode_image(self.read_bytes(record), record.image_id)
        original_size = image.shape[:2]
        record = check_inside(record, original_size, self.outside)
        asked = ask(record, self.choose_names(record, rng))
        resized = self.preprocess(torch.from_numpy(image).permute(2, 0, 1))  # (3, H, W), a view where nothing changes
        size = (resized.shape[1], resized.shape[2])
        image = resized.permute(1, 2, 0).numpy()
        sample = Sample(
            image=np.ascontiguousarray(image) if self.training else image,
            points=_moved(scale_points, asked.points, 2, original_size, size),
            labels=asked.labels if asked.labels is not None else np.zeros(0, np.int64),
            boxes=_moved(scale_boxes, asked.boxes, 4, original_size, size),
            box_labels=asked.box_labels if asked.box_labels is not None else np.zeros(0, np.int64),
            exemplars=_moved(scale_boxes, asked.exemplars, 4, original_size, size),
            croppable=croppable(asked),
        )
        samples = [sample]
        if self.training and self.augmentation is not None:
            assert rng is not None  # training draws its generator above
            samples = [self.augmentation(sample, rng) for _ in range(self.augmentation.crops)]
        query = Query(tuple(asked.classes))
        items = [self._item(asked, one, _with_exemplars(query, record, one)) for one in samples]
        for item in items:
            item.update(image_id=record.image_id, present=present_names(record), original_size=original_size)
        return items

    def _item(self, asked: Record, sample: Sample, query: Query) -> dict[str, Any]:
        """Turn a sample into tensors: the image, its query and the annotation that ``asked`` has."""
        image = np.ascontiguousarray(sample.image) if self.training else sample.image
        pixels = torch.from_numpy(image).permute(2, 0, 1)
        item: dict[str, Any] = {
            "image": pixels.float() / 255 if self.training else pixels,
            "query": query,
        }
        if asked.points is not None:
            item["points"] = torch.from_numpy(sample.points)
            item["labels"] = torch.from_numpy(sample.labels)
            item["counts"] = torch.from_numpy(
                np.bincount(sample.labels, minlength=len(asked.classes)).astype(np.float32)
            )
        elif asked.counts is not None:
            item["counts"] = torch.from_numpy(asked.counts)
        if asked.boxes is not None:
            item["boxes"] = torch.from_numpy(sample.boxes)
            item["box_labels"] = torch.from_numpy(sample.box_labels)
        if asked.captions is not None:
            item["captions"] = list(asked.captions)
        return item


def _with_exemplars(query: Query, record: Record, sample: Sample) -> Query:
    """Add the example boxes of a record, which are of its first class, as they lie in a sample of it."""
    if record.exemplars is None:
        return query
    boxes = torch.from_numpy(sample.exemplars)
    column = query.names.index(record.classes[0]) if record.classes[:1] and record.classes[0] in query.names else None
    if column is None:  # the class that the boxes show is not asked for
        return replace(query, exemplars=boxes[:0])
    return replace(query, exemplars=boxes, exemplar_labels=torch.full((len(boxes),), column) if column else None)


def _moved(
    scale: Callable[[Tensor, tuple[int, int], tuple[int, int]], Tensor],
    values: np.ndarray | None,
    columns: int,
    old: tuple[int, int],
    new: tuple[int, int],
) -> np.ndarray:
    """Scale the annotation to the resized frame; an empty array where there is none."""
    if values is None:
        return np.zeros((0, columns), np.float32)
    return scale(torch.from_numpy(np.asarray(values, np.float32)), old, new).numpy()


def collate(
    loaded: Sequence[dict[str, Any] | list[dict[str, Any]]], *, training: bool = False, ragged: bool = False
) -> Batch:
    """Put items into one batch: images are stacked in training and stay a list in evaluation.

    Args:
        loaded: what the data set gives for each image: its item, or the list of its crops' items.
        training: whether to stack the images.
        ragged: whether training images that differ in size stay a list, as for a model that pads them itself.

    Raises:
        InputError: training images differ in size, the images are asked about different numbers of names, or some
            have a kind of annotation that others lack.
    """
    every = [one for items in loaded for one in (items if isinstance(items, list) else [items])]
    failed = [item["failed"] for item in every if "failed" in item]
    items = [item for item in every if "failed" not in item]
    batch: dict[str, Any] = {
        "image": [item["image"] for item in items],
        "queries": [item["query"] for item in items],
        "image_id": [item["image_id"] for item in items],
    }
    if failed:
        batch["failed"] = failed
    numbers = sorted({len(query.names) for query in batch["queries"]})
    if len(numbers) > 1:
        raise InputError(
            f"images of one batch are asked about different numbers of names ({numbers}); "
            "set data.prompts to 'target', 'all' or a number"
        )
    if training:
        sizes = {tuple(image.shape[1:]) for image in batch["image"]}
        if len(sizes) > 1 and not ragged:
            raise InputError(
                f"training images of one batch differ in size ({sorted(sizes)[:3]}...); give data.augmentation "
                "a crop, use a model whose preprocess warps to one size, or set data.batch_size to 1"
            )
        if len(sizes) == 1:
            batch["image"] = torch.stack(batch["image"])
    given = {item["image_id"]: item["query"].exemplars is not None for item in items}
    if len(set(given.values())) > 1:
        lacking, owner = (min(image_id for image_id, has in given.items() if has is wanted) for wanted in (False, True))
        raise InputError(
            f"{lacking} has no exemplars, but {owner} of the same batch has; annotate the exemplars of all images "
            "(an empty list where there are none), or leave them out of all"
        )
    keys = set().union(*items) - set(batch) - {"query"}
    for key in sorted(keys):
        if lacking := [item["image_id"] for item in items if key not in item]:
            (owner, *_) = [item["image_id"] for item in items if key in item]
            raise InputError(
                f"{lacking[0]} has no {key}, but {owner} of the same batch has; annotate the {key} of all images "
                "(an empty list where there are none), or leave them out of all"
            )
        values = [item[key] for item in items]
        batch[key] = torch.stack(values) if key == "counts" else values
    return batch  # type: ignore[return-value]
