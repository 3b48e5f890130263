"""Queries of batches and data: wrong prompts, known names, and what a model cannot do without."""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor

from counting_zoo.data.records import Split
from counting_zoo.errors import InputError, QueryError, listed

if TYPE_CHECKING:
    from counting_zoo.module import CountingModule

from counting_zoo.types import Batch, Query


def wrong_prompts(batch: Batch, names: Sequence[str]) -> list[list[str]] | None:
    """Choose three prompts for each image that its true prompt must be distinguished from.

    Args:
        batch: images with one name each.
        names: every name of the split.

    Returns:
        B x [absent name, absent name that shares most words with the target, another image's name]; the image's
        own name stands where there is no such name. ``None`` where the split knows one name only.

    Example:
        >>> batch = {"image_id": ["a"], "queries": [Query(("red discs",))], "image": []}
        >>> wrong_prompts(batch, ["red discs", "red rings"])
        [['red rings', 'red rings', 'red rings']]
    """
    if len(set(names)) < 2:
        return None
    asked = [query.names for query in batch["queries"]]
    known = batch.get("present") or asked
    return [
        _wrong_for_image(image_id, own[0], sorted(set(names) - {own[0]}), set(present))
        for image_id, own, present in zip(batch["image_id"], asked, known, strict=True)
    ]


def known_names(batch: Batch, vocabulary: Sequence[str]) -> Batch:
    """Restrict a batch to the names of a list, for models that count nothing else.

    Args:
        batch: images as evaluation gives them, one by one.
        vocabulary: the names that are known.

    Returns:
        The batch without the other names, their counts, points, boxes and examples, and without images whose query
        has none of the names; images that name nothing stay as they are.

    Raises:
        InputError: different numbers of known names are left in the images of one batch.

    Example:
        >>> batch = {"image_id": ["a", "b"], "image": [0, 1], "queries": [Query(("figs", "dates")), Query(("dates",))]}
        >>> [query.names for query in known_names(batch, ["figs"])["queries"]]
        [('figs',)]
    """
    known, queries = set(vocabulary), batch["queries"]
    kept = [[k for k, name in enumerate(query.names) if name in known] for query in queries]
    if all(len(k) == len(query.names) for k, query in zip(kept, queries, strict=True)):
        return batch
    lengths = {len(k): batch["image_id"][i] for i, k in enumerate(kept) if k}
    if len(lengths) > 1:
        raise InputError(
            f"of the names asked about, the images {sorted(lengths.values())} have different numbers that the model "
            f"knows ({sorted(lengths)}); ask about the same names in every image (data.prompts: all), or about those "
            "the model knows (data.classes)"
        )
    asking = [i for i, query in enumerate(queries) if kept[i] or not query.names]
    found: dict[str, Any] = {}
    for key, value in batch.items():
        found[key] = value if key == "failed" else [value[i] for i in asking]  # type: ignore[index]
    found["queries"] = [queries[i].select(kept[i]) for i in asking]
    if "counts" in batch:
        rows = [batch["counts"][i][kept[i]] for i in asking]
        found["counts"] = torch.stack(rows) if rows else batch["counts"][:0]
    for labels, places in (("labels", "points"), ("box_labels", "boxes")):
        if labels in batch:
            new = [_relabelled(batch[labels][i], kept[i], len(queries[i].names)) for i in asking]  # type: ignore[literal-required]
            if places in batch:
                found[places] = [place[label >= 0] for place, label in zip(found[places], new, strict=True)]
            found[labels] = [label[label >= 0] for label in new]
    return cast(Batch, found)


def _relabelled(labels: Tensor, kept: list[int], n: int) -> Tensor:
    """Turn indices into all names into indices into the kept ones; -1 for others."""
    new = torch.full((n + 1,), -1, dtype=labels.dtype, device=labels.device)
    new[kept] = torch.arange(len(kept), dtype=labels.dtype, device=labels.device)
    return new[labels]


def _wrong_for_image(image_id: str, target: str, others: list[str], present: set[str]) -> list[str]:
    absent = [name for name in others if name not in present]
    words = set(target.split())
    shared = [len(words & set(name.split())) for name in absent]
    hard = [name for name, n in zip(absent, shared, strict=True) if n == max(shared) > 0]
    draw = zlib.crc32(image_id.encode())
    return [
        choices[draw // step % len(choices)] if choices else target
        for choices, step in ((absent, 1), (hard, 7), (others, 49))
    ]


def check_query(model: CountingModule, query: Query, image_id: str) -> None:
    """Refuse to score a model without what it cannot do without.

    Raises:
        QueryError: a part is missing; names the image and the part.
    """
    examples = query.exemplars if query.exemplar_features is None else query.exemplar_features
    if "exemplars" in model.asks_for and (examples is None or not len(examples)):
        raise QueryError(
            f"{image_id}: {type(model).__name__} counts by example boxes, and this image has none; give exemplars "
            "(count(image, exemplars=[[x1, y1, x2, y2]]), or data with example boxes)"
        )
    for part, given in (("exemplars", examples is not None), ("negatives", bool(query.negatives))):
        if given and part == "negatives" and not model.uses(part):
            raise QueryError(f"{image_id}: {part} are given, which {type(model).__name__} does not use; leave them out")


def check_data(model: CountingModule, datamodule: Any, split: Split) -> None:
    """Check before the first step that the data can ask what the model must be asked.

    Raises:
        QueryError: images lack example boxes; names the data and the images.
    """
    if "exemplars" not in model.asks_for:
        return
    records = datamodule.records(split)
    lacking = [record.image_id for record in records if record.exemplars is None or not len(record.exemplars)]
    if lacking:
        raise QueryError(
            f"{type(model).__name__} counts by example boxes, and {len(lacking)} of {len(records)} {split} images of "
            f"{type(datamodule).__name__} have none ({listed(lacking, 3)}); choose data with exemplars"
        )
